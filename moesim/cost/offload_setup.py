"""From a scenario with tiers to what its policies are told, what they plan, and the pricers that play the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.deployed import Experts
from moesim.cost.offload_times import CpuPrices, OffloadTimes
from moesim.cost.offloaded import OffloadedPricer, Rank
from moesim.cost.operators import Operators, Priced
from moesim.cost.placing import sample_rows, token_sample
from moesim.dtypes import dtype_bytes
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.memory import RankMemory
from moesim.model import MoEModel
from moesim.offload import (
    CacheSemantics,
    Compressed,
    MissCosts,
    OffloadContext,
    OffloadPlan,
    RouteSample,
    StepRoutes,
)
from moesim.offload.cache import ExpertCache
from moesim.offload.compression import apply, gone_LE, stored_bytes_LE
from moesim.offload.drive import Driver
from moesim.scenario.load import Scenario
from moesim.tiers import LinkRates
from moesim.tiers.device import Cpu, DeviceOptions, SimDevice
from moesim.tiers.group import DeviceGroup, rates_of_one
from moesim.tiers.links import Links
from moesim.tiers.memory import Budget, TierUse, budget_of, home_use, require, with_plans
from moesim.tiers.store import Home, TierStore
from moesim.tiers_spec import TiersSpec
from moesim.workload.pool import RoutingSource
from moesim.workload.requests import RequestStream
from moesim.workload.scores import AsChosen, ScoreModel, WholeScores, score_model

__all__ = ["Offload", "RankPlan", "offload_of", "offload_warnings", "offloaded_pricer"]

_BLOCK_BYTES, _DEPTH = 1 << 20, 32
"""of reads from NVMe"""
Tables = tuple[DenseTables, AttentionTables | None, AttentionTables | None]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank's policies were told (of what is stored), and what they answered."""

    context: OffloadContext
    compressed: Compressed
    plan: OffloadPlan
    local_LE: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Offload:
    """A deployment with tiers, before it runs. tiers: of one node besides the devices'. stored_L: bytes of experts as
    stored over those of the model's format. fetch: what one expert's way to the device takes, and how firm that is.
    learned_from: what policies were fitted on."""

    ranks: tuple[RankPlan, ...]
    memory: RankMemory
    tiers: tuple[TierUse, ...]
    rates: LinkRates
    fetch: Priced
    stored_L: FloatArray
    expert_bytes: int
    cpu: CpuPrices
    learned_from: str
    ranks_behind: int = 1
    """devices that each of `ranks` stands for"""
    dram_bytes: int = 0
    """host memory for experts of one replica, of each of `ranks_behind` alike"""

    @property
    def plan(self) -> OffloadPlan:
        """The first rank's."""
        return self.ranks[0].plan


def offload_of(
    scenario: Scenario, layout: Layout, ops: Operators, experts: Experts, stream: RequestStream, seed: int
) -> Offload:
    """Ask the policies. Raises Infeasible where memory does not do, BadInput where a policy cannot be used here."""
    model, tiers, policies = scenario.model, scenario.tiers, scenario.policies
    assert tiers is not None
    base_bytes = int(model.expert_bytes()) // layout.expert_tp
    bits = 8.0 * dtype_bytes(model.expert_dtype)
    sharers = max(1, min(scenario.parallel.replicas, scenario.cluster.gpus_per_node // layout.ranks))
    drafts = _contexts(scenario, layout, experts, base_bytes, seed)
    made = [policies.precision.compress(draft, bits) for draft, _ in drafts]
    _copies_possible(policies.kinds["precision"], tiers, experts, made)
    stored = [stored_bytes_LE(draft, one, bits) for (draft, _), one in zip(drafts, made, strict=True)]
    copies = layout.expert_tp * sum(
        int(stored_bytes_LE(draft, replace(one, bits_LE=np.full_like(one.bits_LE, fewer)), bits).sum())
        for (draft, _), one in zip(drafts, made, strict=True)
        for _, fewer in one.miss_bits
        if fewer < one.bits_LE.max()
    )
    total = layout.expert_tp * sum(int(size_LE.sum()) for size_LE in stored) + copies
    largest = max(int(size_LE.max()) for size_LE in stored)
    budget = _budget(scenario, layout, tiers, largest)
    rates, fetch = _rates(scenario, layout, ops, tiers, max(largest, 1), sharers)
    read_ns = _read_ns(scenario, tiers, rates, max(largest, 1), total * sharers)
    fetch = fetch._replace(ns=np.asarray(fetch.ns + read_ns))
    stored_L = np.stack([s.sum(axis=1) / np.maximum((s > 0).sum(axis=1), 1) for s in stored]).mean(axis=0) / base_bytes
    whole = float(np.mean([s[s > 0].mean() for s in stored])) * layout.expert_tp
    cpu = CpuPrices(tiers.cpu, scenario.cluster.node, model, whole, scenario.cpu, sharers)
    costs = _costs(scenario, layout, ops, stream, experts, cpu, float(fetch.ns), read_ns, float(stored_L.mean()))
    ranks = []
    for (draft, local_LE), one, size_LE in zip(drafts, made, stored, strict=True):
        capacity = min(budget.expert_bytes, int(size_LE.sum()) + one.extra_bytes)
        context = apply(replace(draft, capacity_bytes=capacity, costs=costs), one, bits)
        ranks.append(RankPlan(context, one, policies.offload.plan(context), local_LE))
    held = [_held_bytes(rank) for rank in ranks]
    memory = with_plans(
        budget, [rank.plan for rank in ranks], [rank.context.size_LE for rank in ranks],
        [rank.compressed.extra_bytes for rank in ranks],
    )  # fmt: skip
    uses = home_use(scenario.cluster, tiers, total, layout.expert_tp * sum(held), sharers)
    return Offload(
        tuple(ranks), memory, tuple(uses), rates, fetch, stored_L, base_bytes, cpu, experts.placed_for,
        layout.expert_tp, uses[0].capacity // sharers // layout.expert_tp,
    )  # fmt: skip


def offload_warnings(scenario: Scenario, offload: Offload, experts: Experts, seed: int) -> tuple[str, ...]:
    """What policies were fitted on, and what of the tiers is not followed."""
    out = []
    if offload.learned_from:
        out.append(f"tiers: policies learned from {offload.learned_from}, and serve the others")
    else:
        out.append("tiers: policies know nothing of the traffic (tiers.fit_share is 0)")
    if (scores := _scores(scenario, experts, seed)) is not None and scores.assumed:
        out.append(f"rerouting: {scores.assumed}")
    quality = offload.ranks[0].compressed.quality
    if quality:
        out.append(f"precision: {quality}")
    return tuple(out)


def _copies_possible(kind: str, tiers: TiersSpec, experts: Experts, made: Sequence[Compressed]) -> None:
    """Raise BadInput where misses are to fetch copies of fewer bits, and nothing says which, or nobody keeps them."""
    if not any(one.miss_bits for one in made):
        return
    if experts.source.weight_TLK is None:
        raise BadInput(
            Problem(
                "policies.precision",
                f"{kind} chooses the copy that a miss fetches by gate weights, which {experts.source.source} lacks. "
                "Use a routing trace with weights, or another precision",
            )
        )
    if tiers.home == "dram" and not tiers.host_copies:
        raise BadInput(
            Problem(
                "tiers.host_copies",
                f"{kind} keeps copies of every expert in several precisions in host memory, and without host copies "
                "an expert is in one place. Set it to true, or use another precision",
            )
        )


def _budget(scenario: Scenario, layout: Layout, tiers: TiersSpec, slot_bytes: int) -> Budget:
    """Device memory for experts; Infeasible where there is none."""

    def shrunk(model: MoEModel) -> Budget:
        slot = slot_bytes * int(model.expert_bytes()) // max(int(scenario.model.expert_bytes()), 1)
        return budget_of(model, scenario.cluster, layout, scenario.engine, tiers, slot)

    budget = shrunk(scenario.model)
    require(scenario.model, scenario.cluster, layout, scenario.engine, tiers, budget, shrunk)
    return budget


def _held_bytes(rank: RankPlan) -> int:
    """Bytes of experts that are on the device at the start."""
    return int(rank.context.size_LE[rank.plan.fixed_LE | rank.plan.initial_LE].sum())


# ---- what policies are told


def _contexts(
    scenario: Scenario, layout: Layout, experts: Experts, base_bytes: int, seed: int
) -> list[tuple[OffloadContext, IntArray | None]]:
    """Of each rank that has experts of its own: the context before anything is known of capacity and costs, and its
    numbering of experts. Where ranks hold parts of all experts, one stands for all."""
    model, tiers = scenario.model, scenario.tiers
    assert tiers is not None
    fit = experts.fit
    semantics = CacheSemantics(pooled=tiers.pooled, miss=tiers.miss, cold=tiers.cold, completion=tiers.completion)
    layers, count = model.num_moe_layers, model.num_experts // layout.ep
    out: list[tuple[OffloadContext, IntArray | None]] = []
    for part in range(layout.ep):
        local_LE = None if layout.ep == 1 else _local(experts, part)
        sample = None if fit is None else _sample(fit, local_LE)
        popularity = np.ones((layers, count)) if fit is None else _popularity(fit, local_LE, count)
        out.append(
            (
                OffloadContext(
                    num_layers=layers,
                    num_experts=count,
                    top_k=model.top_k,
                    size_LE=np.full((layers, count), base_bytes, np.int64),
                    capacity_bytes=base_bytes * layers * count,
                    staging=tiers.staging,
                    popularity_LE=popularity,
                    semantics=semantics,
                    costs=_NO_COSTS,
                    seed=seed,
                    fit=sample,
                    block_L=np.array(model.moe_layers, np.int64),
                    expert_shape=(model.expert_hidden, -(-model.moe_intermediate_size // layout.expert_tp)),
                ),
                local_LE,
            )
        )
    return out


_NO_COSTS = MissCosts(1.0, lambda rows: 0.0, lambda rows: 0.0, 0.0, 0.0)


def _local(experts: Experts, part: int) -> IntArray:
    """A rank's number of each expert: its place among the rank's slots; the number of slots for all others."""
    placement = experts.placement
    slots = placement.slots_per_rank
    mine_LS = placement.slot_to_expert_LS[:, part * slots : (part + 1) * slots]
    out = np.full((placement.num_layers, placement.num_experts + 1), slots, np.int64)
    np.put_along_axis(out, mine_LS.astype(np.int64), np.arange(slots)[None, :].repeat(len(out), 0), axis=1)
    return out


def _popularity(fit: RoutingSource, local_LE: IntArray | None, count: int) -> FloatArray:
    weight_LE = fit.count_LE().astype(np.float64)
    if local_LE is None:
        return weight_LE
    out = np.zeros((len(weight_LE), count + 1))
    np.add.at(out, (np.arange(len(out))[:, None], local_LE[:, :-1]), weight_LE)
    return np.ascontiguousarray(out[:, :count])


def _sample(fit: RoutingSource, local_LE: IntArray | None) -> RouteSample:
    told, rows = token_sample(fit), sample_rows(fit)
    ids: Any = told.expert_TLK
    if local_LE is not None:
        none = local_LE.shape[1] - 1
        ids = local_LE[np.arange(len(local_LE))[None, :, None], np.minimum(ids, none)]
    weight = None if fit.weight_TLK is None else np.asarray(fit.weight_TLK[rows], np.float64)
    return RouteSample(ids, np.asarray(told.sequence_T, np.int64), weight)


def _costs(
    scenario: Scenario, layout: Layout, ops: Operators, stream: RequestStream, experts: Experts, cpu: CpuPrices,
    transfer_ns: float, read_ns: float, stored: float,
) -> MissCosts:  # fmt: skip
    """Costs in decode steps as full as the engine and the traffic let them be. read_ns: what an expert takes on its way
    into host memory, on average. stored: bytes of an expert as stored over those of the model's format."""
    model, engine, tiers = scenario.model, scenario.engine, scenario.tiers
    assert tiers is not None
    running = max(1, min(engine.max_num_seqs, len(stream), stream.concurrency or len(stream)))
    context = running * float(stream.prompt_tokens.mean() + stream.output_tokens.mean() / 2)
    attention = float(ops.attention_decode(running, context, attention_shape(model, layout.tp, False)).ns)
    dense = DenseTables(model, layout, engine, ops, layout.meets, np.array([running]))
    shape = experts.prices.shape

    def gpu_ns(rows: int) -> float:
        return float(ops.moe(rows, 1.0, ops.moe_work(rows, shape.dtype), 0.0, shape).ns) if rows else 0.0

    def cpu_ns(rows: int) -> float:
        return float(cpu.ns([rows])) + read_ns if rows else 0.0

    def product_ns(rows: Sequence[int]) -> float:
        if not rows:
            return 0.0
        work = float(ops.moe_work(np.array(rows), shape.dtype).sum())
        return float(ops.moe(float(sum(rows)), len(rows) * stored, work, 0.0, shape).ns)

    layer_ns = (float(dense.total_N[0]) + attention * model.num_layers) / model.num_moe_layers
    return MissCosts(transfer_ns, gpu_ns, cpu_ns, tiers.cpu.sync_us * 1e3, layer_ns, product_ns, running)


def _rates(
    scenario: Scenario, layout: Layout, ops: Operators, tiers: TiersSpec, size: int, sharers: int
) -> tuple[LinkRates, Priced]:
    """Links as the profile prices a transfer of one expert, and that price. Replicas of a node have equal parts of its
    memory and drives; ranks that hold parts of all experts move them at the same time."""
    node, profile = scenario.cluster.node, scenario.cluster.profile
    memory: Literal["pinned", "pageable"] = "pinned" if tiers.pinned else "pageable"
    whole = ops.copy(float(size), "h2d", memory)
    start = float(ops.copy(1.0, "h2d", memory).ns)
    rate = (size - 1) / max(float(whole.ns) - start, 1e-9)
    measured = any(curve.key[:2] == ("h2d", memory) for curve in profile.curves.get("copy", ()))
    if not tiers.pinned and not measured:
        rate /= 2  # read into the bounce buffer, then sent
    read = ops.storage(float(size), "direct", _BLOCK_BYTES, _DEPTH)
    first = float(ops.storage(1.0, "direct", _BLOCK_BYTES, _DEPTH).ns)
    rates = LinkRates(
        to_device=rate,
        host=node.host_bytes_per_s * 1e-9 / max(tiers.numa_domains, sharers),
        nvme=(size - 1) / max(float(read.ns) - first, 1e-9) / sharers,
        to_device_latency_ns=round(start),
        nvme_latency_ns=round(first),
        domains=max(1, tiers.numa_domains // sharers),
        chunk_bytes=tiers.chunk or 0,
    )
    if layout.expert_tp > 1:
        rates = rates_of_one(rates, layout.expert_tp)
    slowest = min(rates.to_device, rates.host)
    return rates, Priced(np.asarray(start + size / slowest), whole.grade)


def _read_ns(scenario: Scenario, tiers: TiersSpec, rates: LinkRates, size: int, stored_bytes: int) -> float:
    """What an expert takes from the drives into host memory, by the share of them that has no room there. Loads pass
    through host memory whole (`moesim.tiers.store`), so it adds to the copy. stored_bytes: of all replicas."""
    if tiers.home != "nvme":
        return 0.0
    dram = scenario.cluster.node.host_memory_bytes if tiers.dram is None else int(tiers.dram * 2**30)
    return max(0.0, 1.0 - dram / stored_bytes) * (rates.nvme_latency_ns + size / rates.nvme)


# ---- what plays it


def offloaded_pricer(
    scenario: Scenario, offload: Offload, experts: Experts, ops: Operators, shared: Tables, seed: int
) -> OffloadedPricer:
    """A fresh state of one group."""
    model, tiers, policies = scenario.model, scenario.tiers, scenario.policies
    assert tiers is not None
    assert experts.replay is not None
    dense, full, window = shared
    links = Links(offload.rates, len(offload.ranks))
    cpu = Cpu()
    options = DeviceOptions(staging=tiers.staging)
    home = Home(tiers.home, offload.dram_bytes, tiers.host_copies)
    store = TierStore(links, [one.context.size_K for one in offload.ranks], home, tiers.staging)
    ranks = []
    for number, one in enumerate(offload.ranks):
        context = one.context
        times = OffloadTimes(
            model, dense, full, window, experts.prices, ops, offload.cpu, round(tiers.cpu.sync_us * 1e3),
            offload.stored_L,
        )  # fmt: skip
        device = SimDevice(times, links, context.size_K, number, options, cpu, store)
        cache = ExpertCache(
            context.size_K, context.group_K, one.plan.capacity_G, policies.eviction.start(context),
            tiers.miss == "bypass",
        )  # fmt: skip
        driver = Driver.start(
            context, policies.offload, cache, policies.prefetch.start(context), device, one.plan,
            compressed=one.compressed, precision=policies.precision, keep_events=True,
            reroute=policies.rerouting.start(context, gone_LE(one.compressed)),
        )  # fmt: skip
        store.place(number, cache.resident())
        ranks.append(Rank(driver, device, times, one.local_LE))
    store.start(_warm(ranks))
    replay = experts.replay
    window_tokens = max(model.window_of_layer, default=0)
    return OffloadedPricer(
        dense, full, window, ranks, _player(ranks), experts.source, replay, policies.rebatching, window_tokens,
        _scores(scenario, experts, seed),
    )  # fmt: skip


def _scores(scenario: Scenario, experts: Experts, seed: int) -> ScoreModel | None:
    """Scores of all experts for what is served, where routing looks at the cache."""
    if scenario.policies.kinds.get("rerouting", "none") == "none":
        return None
    model, spec = scenario.model, scenario.routing.scores
    if spec.model == "generator":
        spec = spec.model_copy(update={"model": "gumbel"})
    scores = score_model(experts.source, spec, seed, model.norm_topk_prob, model.scoring)
    return AsChosen(experts.source, scores) if isinstance(scores, WholeScores) else scores


def _warm(ranks: Sequence[Rank]) -> list[tuple[int, int]]:
    """(rank, expert) in the order in which host memory's cache takes them: those that are not on a device, by
    popularity."""
    order: list[tuple[float, int, int]] = []
    for number, rank in enumerate(ranks):
        there = set(rank.driver.cache.resident())
        popularity = rank.driver.context.popularity_LE.reshape(-1).tolist()
        order += [(-share, number, key) for key, share in enumerate(popularity) if key not in there]
    return [(number, key) for _, number, key in sorted(order)]


def _player(ranks: Sequence[Rank]) -> Callable[[Sequence[StepRoutes]], None]:
    """Runs one pass on all ranks."""
    if len(ranks) > 1:
        return DeviceGroup([rank.driver for rank in ranks], [rank.device for rank in ranks]).step
    return lambda routes: ranks[0].driver.step(routes[0])
