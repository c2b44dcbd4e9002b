"""What fits where, to the byte: weights, buffers and KV cache of one rank, and what would make it fit.

The rules, one term a line, are in `rank_memory`. Activations and communication buffers are estimates that lean high
(`assumed`): an engine's own profiling run would measure them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesim.engine_spec import EngineSpec
from moesim.errors import Infeasible
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.model import MoEModel, dtype_bytes

__all__ = [
    "RankMemory",
    "deepep_queue_bytes",
    "exchange_buffers",
    "low_latency_buffer_bytes",
    "rank_memory",
    "require_fit",
]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of HBM on the fullest rank. `usable` = capacity * gpu_memory_utilization (or tiers.vram); KV gets what is
    left of it."""

    capacity: int
    usable: int
    dense_weights: int
    expert_weights: int
    staging: int
    """one layer's expert slots, for weights that arrive"""
    activations: int
    exchange_buffers: int
    runtime: int
    kv_unit: int
    """bytes of one KV unit: one block of one layer"""
    kv_units: int
    """of the requests of one data-parallel rank"""
    kv_copies: int = 1
    """ranks whose requests' KV each rank keeps"""
    expert_cache: int = 0
    """capacity for experts that come and go between memories (`moesim.tiers.memory`)"""
    expert_buffers: int = 0
    """that streamed experts pass through"""
    expert_extra: int = 0
    """what a precision policy keeps besides"""

    @property
    def experts(self) -> int:
        """All that is there for routed experts' weights."""
        return self.expert_weights + self.expert_cache + self.expert_buffers + self.expert_extra + self.staging

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.dense_weights + self.experts + self.activations + self.exchange_buffers + self.runtime

    @property
    def kv_cache(self) -> int:
        return self.kv_unit * self.kv_units * self.kv_copies

    def by_use(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {
            "dense_weights": self.dense_weights,
            "expert_weights": self.expert_weights,
            **({"expert_staging": self.staging} if self.staging else {}),
            **{
                name: size
                for name in ("expert_cache", "expert_buffers", "expert_extra")
                if (size := getattr(self, name))
            },
            "activations": self.activations,
            "exchange_buffers": self.exchange_buffers,
            "runtime": self.runtime,
            "kv_cache": self.kv_cache,
        }


def rank_memory(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    engine: EngineSpec,
    slots_per_part: float,
    copies: float = 0,
    moves: bool = False,
) -> RankMemory:
    """Memory of one rank. `slots_per_part`: expert slots (replicas included) of one expert-parallel part and set of
    experts, smaller experts counted by their size. `copies`: of a token that
    are sent, where more than one to each of its K experts. `moves`: experts move while it serves, so there is a buffer
    for the slots of one layer (vLLM's `expert_buffer`, vllm/distributed/eplb)."""
    tokens = engine.max_num_batched_tokens
    act = dtype_bytes(model.activation_dtype)
    # residual, normed input, attention in and out, and the widest feed-forward intermediate, each [tokens, width]
    widest = max(
        4 * model.hidden_size,
        2 * model.dense_intermediate_size // layout.tp if len(model.moe_layers) < model.num_layers else 0,
        2 * model.moe_intermediate_size * model.top_k // layout.expert_tp if model.is_moe else 0,
        2 * model.shared_intermediate_size // layout.tp,
    )
    activations = int(tokens * act * (3 * model.hidden_size + widest))
    # float32 logits of the sampled rows of one vocabulary shard
    activations += 4 * engine.max_num_seqs * model.vocab_size // layout.tp
    exchange = exchange_buffers(model, layout, tokens, copies)
    kv_layers = set(model.kv_bytes_per_token(layout.tp))
    per_layer = max(kv_layers)
    kv_unit = int(per_layer * engine.block_size)
    kv_copies = layout.dp if layout.communication.coherent else 1  # every rank keeps every request's context
    capacity = cluster.profile.memory_bytes
    usable = int(capacity * engine.gpu_memory_utilization)
    # engines keep the two absorbed halves of MLA's up-projection beside the projection itself
    dense_weights = model.weight_bytes_dense_rank(layout.tp) + model.mla_absorbed_bytes_rank(layout.tp)
    experts = 0
    if model.is_moe:
        experts = int(model.expert_sets_held * slots_per_part * model.expert_bytes()) // layout.expert_tp
    staging = int(slots_per_part * model.expert_bytes()) // layout.expert_tp if moves else 0
    runtime = int(engine.runtime_memory_gib * _GIB)
    fixed = dense_weights + experts + staging + activations + exchange + runtime
    return RankMemory(
        capacity=capacity,
        usable=usable,
        dense_weights=dense_weights,
        expert_weights=experts,
        staging=staging,
        activations=activations,
        exchange_buffers=exchange,
        runtime=runtime,
        kv_unit=kv_unit,
        kv_units=max(0, (usable - fixed) // (kv_unit * kv_copies)),
        kv_copies=kv_copies,
    )


def exchange_buffers(model: MoEModel, layout: Layout, tokens: int, copies: float = 0) -> int:
    """Bytes of one rank's buffers for exchanges of at most `tokens` tokens a rank, by back end; copies: as of
    `rank_memory`.

    Throughput back ends: what is sent and what is received, at most every token to every one of its K experts; NCCL's
    send a copy for each expert even where two live on one rank, 2DH keeps those between its two steps as well. DeepEP's
    kernels add their own queues (`deepep_queue_bytes`; V2's are not public as a formula and counted alike). Low
    latency: `low_latency_buffer_bytes` alone. A gather: all ranks' tokens, and as many results.
    """
    how = layout.communication.all_to_all
    row = model.expert_hidden * dtype_bytes(model.activation_dtype)
    if layout.meets and layout.expert_tp == 1 and how == "allgather_reducescatter":
        return int(2 * tokens * layout.dp * row)
    if not layout.exchanges:
        return 0
    if how == "deepep_low_latency":
        cap = layout.communication.max_dispatch_tokens
        return low_latency_buffer_bytes(cap, model.expert_hidden, layout.ranks, model.num_experts)
    if how in ("pairwise", "hierarchical"):
        return int((2 if how == "pairwise" else 3) * tokens * max(model.top_k, copies) * row)
    both = int(2 * tokens * max(min(model.top_k, layout.ep), copies) * row)
    if how in ("deepep_normal", "deepep_v2"):
        nvlink, nic = deepep_queue_bytes(row, layout.ranks, layout.communication.sms or 20)
        both += nvlink + nic
    return both


def low_latency_buffer_bytes(max_dispatch_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """What DeepEP's `get_low_latency_rdma_size_hint` returns (csrc/legacy/config.hpp, LowLatencyLayout): room for
    `max_dispatch_tokens` tokens of every rank for each of its experts, twice, in bf16. ranks does not enter: each holds
    experts / ranks experts, with rows for all ranks."""
    scales = hidden // 128
    dispatch = 16 + max(2 * hidden, hidden + 4 * scales)  # a header; bf16, or fp8 with scales
    combine = 4 * scales + 2 * hidden  # bf16, and the least and greatest of 128 elements
    send = max(max_dispatch_tokens * dispatch, experts * max_dispatch_tokens * combine)
    receive = experts * max_dispatch_tokens * max(dispatch, combine)
    signals = -(-4 * experts // 128) * 128
    return (2 * (send + receive + signals) // 128 + 1) * 128


def deepep_queue_bytes(row_bytes: float, ranks: int, sms: int) -> tuple[int, int]:
    """What DeepEP's `get_nvl_buffer_size_hint` and `get_rdma_buffer_size_hint` return (csrc/legacy/config.hpp, Config)
    for the larger of the recommended dispatch and combine settings (deep_ep/buffers/legacy.py) of the next number of
    ranks listed. row_bytes: of a token."""
    listed = next((r for r in sorted(_CHUNKS) if r >= ranks), max(_CHUNKS))
    nvlink_tokens, send = _CHUNKS[listed]
    nic_tokens = -(-128 // send) * send
    nodes, near, channels = max(ranks // 8, 1), min(ranks, 8), sms // 2
    # source meta, 128 expert ids of 8 bytes and their weights, 128 scales
    side = 8 + 128 * (8 + 4 + 4)
    nvlink = channels * near * (4 * (2 * nodes + 3) + nvlink_tokens * (int(row_bytes) + side))
    nic = 0
    if ranks > 8:
        nic = channels * nodes * 2 * (4 * (8 * 2 + 2) + nic_tokens * (int(row_bytes) + side + 16))
    return -(-nvlink // 128) * 128, -(-nic // 128) * 128


_CHUNKS = {
    8: (256, 6),
    16: (288, 20),
    24: (288, 8),
    64: (288, 8),
    96: (480, 12),
    128: (560, 12),
    160: (720, 12),
}
"""ranks -> tokens of an NVLink queue, tokens sent over a NIC at once (rounds its queue of 128 up)"""


def require_fit(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    engine: EngineSpec,
    slots_per_part: float,
    copies: float = 0,
    moves: bool = False,
) -> RankMemory:
    """`rank_memory`, or Infeasible with the bytes by use and the smallest changes that would fit."""
    memory = rank_memory(model, cluster, layout, engine, slots_per_part, copies, moves)
    least = model.num_layers  # one block of one sequence
    if memory.kv_units >= least:
        return memory
    short = memory.fixed + least * memory.kv_unit * memory.kv_copies - memory.usable
    uses = ", ".join(f"{name} {size:,} B" for name, size in memory.by_use().items() if size and name != "kv_cache")
    reasons = [
        f"Weights and buffers must leave room for a KV cache on every rank: {memory.fixed:,} bytes are needed, "
        f"{memory.usable:,} are usable ({memory.capacity / _GIB:.1f} GiB x {engine.gpu_memory_utilization}), "
        f"{short:,} bytes a rank are missing ({uses})."
    ]
    reasons.extend(_mends(model, cluster, layout, engine, slots_per_part))
    raise Infeasible(reasons, short / max(memory.usable, 1))


def _mends(model: MoEModel, cluster: Cluster, layout: Layout, engine: EngineSpec, slots_per_part: float) -> list[str]:
    """The smallest single change of each kind that fits, found by trying."""
    out: list[str] = []

    def fits(m: MoEModel, lay: Layout, eng: EngineSpec, slots: float) -> bool:
        return rank_memory(m, cluster, lay, eng, slots).kv_units >= m.num_layers

    if model.is_moe:
        slots_all = round(slots_per_part * layout.ep)
        for factor in (2, 4, 8, 16, 32, 64):
            ranks = layout.ranks * factor
            ep = max(e for e in range(1, min(ranks, slots_all) + 1) if ranks % e == 0)
            slots = -(-slots_all // ep)
            grown = replace(layout, dp=layout.dp * factor, ep=ep, meets=True)
            if fits(model, grown, engine, slots):
                nodes = -(-ranks // cluster.gpus_per_node)
                more = slots * ep - model.num_experts
                also = f", num_redundant_experts={more}" if slots * ep != slots_all else ""
                shape = f"dp={grown.dp}, ep={ep}{also}"
                out.append(f"Smallest change in ranks that fits: {ranks} ranks ({shape}) on {nodes} nodes.")
                break
    for dtype in ("fp8_block", "int4"):
        lighter = (
            model.with_dtypes(weight_dtype=dtype, expert_dtype=dtype)
            if dtype == "fp8_block"
            else model.with_dtypes(expert_dtype=dtype)
        )
        if lighter.expert_bytes() < model.expert_bytes() and fits(lighter, layout, engine, slots_per_part):
            also = " and weight_dtype" if dtype == "fp8_block" else ""
            out.append(f"Smallest change in precision that fits: model.expert_dtype{also} {dtype}.")
            break
    for tokens in (4096, 2048, 1024):
        if tokens < engine.max_num_batched_tokens:
            smaller = engine.model_copy(
                update={"max_num_batched_tokens": tokens, "max_num_seqs": min(engine.max_num_seqs, tokens)}
            )
            if fits(model, layout, smaller, slots_per_part):
                out.append(f"Or engine.max_num_batched_tokens={tokens}.")
                break
    how = layout.communication
    if layout.exchanges and how.all_to_all == "deepep_low_latency":
        for cap in [c for c in (1024, 512, 256, 128, 64, 32, 16) if c < how.max_dispatch_tokens]:
            less = replace(layout, communication=how.model_copy(update={"max_dispatch_tokens": cap}))
            if fits(model, less, engine, slots_per_part):
                out.append(f"Or communication.max_dispatch_tokens={cap}.")
                break
    if not out:
        out.append("No single change of ranks, precision or batch size fits; use devices with more memory.")
    return out
