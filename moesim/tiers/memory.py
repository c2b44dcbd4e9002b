"""What fits into which tier, to the byte: device memory shared by dense weights, buffers, experts and KV cache, and the
home of all experts in host memory or on NVMe.

One term a line. On the device experts and KV cache compete: one of them is given (`tiers.experts` or
`tiers.kv_tokens`), the other gets the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moesim.arrays import IntArray
from moesim.engine_spec import EngineSpec
from moesim.errors import Infeasible
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.memory import RankMemory, rank_memory
from moesim.model import MoEModel
from moesim.offload import OffloadPlan
from moesim.tiers_spec import TiersSpec

__all__ = ["Budget", "TierUse", "budget_of", "home_use", "require", "with_plans"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class TierUse:
    """A tier of one node besides the devices': bytes there are for experts, and bytes by what they are for."""

    name: str
    capacity: int
    by: dict[str, int]

    @property
    def used(self) -> int:
        return sum(self.by.values())


@dataclass(frozen=True, slots=True)
class Budget:
    """Device memory of one rank before a policy plans: all but experts and KV cache (`memory`, whose KV is what is
    there with no expert), bytes that experts may take, and those that the KV cache needs besides."""

    memory: RankMemory
    expert_bytes: int
    kv_bytes: int


def budget_of(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    engine: EngineSpec,
    tiers: TiersSpec,
    slot_bytes: int,
) -> Budget:
    """slot_bytes: of the largest expert as stored on a rank (a staging buffer holds one). The budget may be negative:
    see `require`."""
    memory = rank_memory(model, cluster, layout, engine, 0)
    usable = memory.usable if tiers.vram is None else int(tiers.vram * _GIB)
    memory = replace(memory, usable=usable, expert_buffers=tiers.staging * slot_bytes, kv_units=0)
    free = usable - memory.fixed
    least = model.num_layers * memory.kv_unit  # one block of one sequence
    if tiers.experts == "rest":
        blocks = -(-(tiers.kv_tokens or 1) // engine.block_size)
        kv_bytes = max(blocks * model.num_layers * memory.kv_unit, least)
        return Budget(memory, free - kv_bytes, kv_bytes)
    return Budget(memory, min(int(tiers.experts * _GIB), free - least), least)


def require(
    model: MoEModel, cluster: Cluster, layout: Layout, engine: EngineSpec, tiers: TiersSpec, budget: Budget,
    shrink: Callable[[MoEModel], Budget],
) -> None:  # fmt: skip
    """Raises Infeasible where nothing is left for experts and KV cache, or less than tiers.experts. shrink: the budget
    of a model in other number formats."""
    memory = budget.memory
    asked = 0 if tiers.experts == "rest" else int(tiers.experts * _GIB)
    short = asked - budget.expert_bytes if asked else -budget.expert_bytes
    if short <= 0:
        return
    uses = ", ".join(f"{name} {size:,} B" for name, size in memory.by_use().items() if size and name != "kv_cache")
    limit = f"tiers.vram {tiers.vram:g} GiB" if tiers.vram is not None else (
        f"{memory.capacity / _GIB:.1f} GiB x {engine.gpu_memory_utilization}"
    )  # fmt: skip
    reasons = [
        f"Dense weights, buffers, the KV cache and {asked:,} bytes of experts must fit on every rank: "
        f"{memory.usable:,} are usable ({limit}), {short:,} bytes are missing ({uses}, kv_cache at least "
        f"{budget.kv_bytes:,} B)."
    ]
    free = memory.usable - memory.fixed
    per_block = model.num_layers * memory.kv_unit
    if asked and free > per_block:
        reasons.append(f"Largest tiers.experts that fits: {(free - per_block) / _GIB:.3f} GiB.")
    elif not asked and free >= per_block:
        tokens = free // per_block * engine.block_size
        reasons.append(f"Largest tiers.kv_tokens that fits, with no expert on the device: {tokens:,}.")
    if memory.usable + short <= memory.capacity:
        least = -(-(memory.usable + short) * 1000 // _GIB) / 1000
        reasons.append(f"Smallest tiers.vram that fits: {least:.3f} GiB.")
    for dtype in ("fp8_block", "int4"):
        lighter = (
            model.with_dtypes(weight_dtype=dtype, expert_dtype=dtype)
            if dtype == "fp8_block"
            else model.with_dtypes(expert_dtype=dtype)
        )
        if lighter.expert_bytes() < model.expert_bytes() and shrink(lighter).expert_bytes >= asked:
            also = " and weight_dtype" if dtype == "fp8_block" else ""
            reasons.append(f"Smallest change in precision that fits: model.expert_dtype{also} {dtype}.")
            break
    for tokens in (4096, 2048, 1024, 512, 256):
        if tokens < engine.max_num_batched_tokens:
            seqs = min(engine.max_num_seqs, tokens)
            smaller = engine.model_copy(update={"max_num_batched_tokens": tokens, "max_num_seqs": seqs})
            saved = memory.activations - rank_memory(model, cluster, layout, smaller, 0).activations
            if saved >= short:
                reasons.append(f"Or engine.max_num_batched_tokens={tokens}.")
                break
    raise Infeasible(reasons, short / max(memory.usable, 1))


def with_plans(
    budget: Budget, plans: Sequence[OffloadPlan], size_LE: Sequence[IntArray], extra_bytes: Sequence[int]
) -> RankMemory:
    """Memory of the fullest rank once each has planned. size_LE: bytes of each rank's experts as stored. extra_bytes:
    what each keeps on the device besides. What plans leave of the budget is KV cache. Raises Infeasible for a plan that
    takes more."""
    memory = budget.memory
    taken = [plan.device_bytes(s) + more for plan, s, more in zip(plans, size_LE, extra_bytes, strict=True)]
    full = taken.index(max(taken))
    if taken[full] > budget.expert_bytes:
        raise Infeasible(
            [
                f"The policy of offload must keep within the memory for experts: it takes {taken[full]:,} bytes of "
                f"{budget.expert_bytes:,}. Give experts more (tiers.experts, or a smaller tiers.kv_tokens), or the "
                "policy fewer."
            ],
            (taken[full] - budget.expert_bytes) / max(memory.usable, 1),
        )
    memory = replace(
        memory,
        expert_weights=int(size_LE[full][plans[full].fixed_LE].sum()),
        expert_cache=int(plans[full].capacity_G.sum()),
        expert_extra=extra_bytes[full],
    )
    units = (memory.usable - memory.fixed) // (memory.kv_unit * memory.kv_copies)
    return replace(memory, kv_units=max(0, units))


def home_use(cluster: Cluster, tiers: TiersSpec, stored_bytes: int, device_bytes: int, replicas: int) -> list[TierUse]:
    """Tiers of one node. stored_bytes: all experts of one replica as stored, copies for misses included. device_bytes:
    of them on its devices when it starts, which need no copy where tiers.host_copies is off (what leaves a device then
    travels back). replicas: on a node. Raises Infeasible where they do not fit."""
    node = cluster.node
    dram = node.host_memory_bytes if tiers.dram is None else int(tiers.dram * _GIB)
    if tiers.home == "nvme":
        nvme = TierUse("nvme", node.nvme_bytes, {"experts": stored_bytes})
        if nvme.used > nvme.capacity:
            mend = "Set model.expert_dtype to a narrower format."
            raise Infeasible([_short("NVMe", nvme, mend)], _over(nvme))
        return [TierUse("dram", dram, {"expert_cache": min(dram, stored_bytes * replicas)}), nvme]
    kept = stored_bytes if tiers.host_copies else stored_bytes - device_bytes
    host = TierUse("dram", dram, {"experts": kept * replicas})
    if host.used > host.capacity:
        mends = ["Set tiers.home to nvme (host memory is then a cache), or model.expert_dtype to a narrower format."]
        if tiers.dram is not None and host.used <= node.host_memory_bytes:
            mends.insert(0, f"Set tiers.dram to {host.used / _GIB:.1f} GiB, which the node has.")
        raise Infeasible([_short("host memory", host, " ".join(mends))], _over(host))
    return [host]


def _over(use: TierUse) -> float:
    return use.used / max(use.capacity, 1) - 1


def _short(name: str, use: TierUse, mend: str) -> str:
    by = ", ".join(f"{key} {size:,} B" for key, size in use.by.items())
    return (
        f"All experts must fit into their home, the node's {name}: {use.used:,} bytes are needed ({by}), "
        f"{use.capacity:,} are there for them, {use.used - use.capacity:,} are missing. {mend}"
    )
