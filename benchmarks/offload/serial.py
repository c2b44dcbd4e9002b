"""A model on one device with times that are constants, run through the project's own driver and simulated device: what
claims about offload need whose papers give milliseconds, not devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.offload import CacheSemantics, Counters, MissCosts, OffloadContext, StepRoutes
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Driver
from moesim.policy import load_policy
from moesim.rng import generator
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice
from moesim.tiers.links import Links

__all__ = ["FREE", "Constants", "Ran", "context_of", "run", "top_k_by_weight"]

FREE = LinkRates(to_device=1e9, host=1e9, nvme=1e9)
"""links that cost next to nothing, where a claim is not about transfers"""


@dataclass(frozen=True)
class Constants:
    """`moesim.tiers.LayerTimes` of constants. own: a layer without experts. gpu, cpu: an expert with one row, and each
    further row of it. sync: a layer with any expert on the CPU. last: after the last layer. All in ns."""

    own: float = 0.0
    gpu: float = 0.0
    cpu: float = 0.0
    sync: float = 0.0
    last: float = 0.0
    gpu_row: float = 0.0
    cpu_row: float = 0.0

    def begin(self, tokens: int) -> None:
        """See LayerTimes."""

    def own_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return round(self.own)

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes."""
        return round(len(rows) * self.gpu + (sum(rows) - len(rows)) * self.gpu_row)

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes."""
        return round(len(rows) * self.cpu + (sum(rows) - len(rows)) * self.cpu_row)

    def sync_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return round(self.sync)

    def join_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return 0

    def end_ns(self) -> int:
        """See LayerTimes."""
        return round(self.last)

    def miss_costs(self, transfer_ns: float) -> MissCosts:
        """The same, for policies that weigh them."""
        return MissCosts(transfer_ns, lambda n: self.gpu_ns(0, [n]), lambda n: self.cpu_ns(0, [n]), self.sync, self.own)


@dataclass(frozen=True)
class Ran:
    """step_ns: of the steps that were not prompts. counters: of all. fixed: experts on the device for good at the
    start."""

    step_ns: IntArray
    counters: Counters
    fixed: int

    @property
    def ms(self) -> float:
        """Of a step, on average."""
        return float(self.step_ns.mean()) / 1e6


def context_of(
    popularity_LE: FloatArray,
    top_k: int,
    expert_bytes: int,
    capacity_bytes: int,
    costs: MissCosts,
    staging: int = 2,
    seed: int = 0,
    semantics: CacheSemantics | None = None,
) -> OffloadContext:
    """Of experts that are all of one size."""
    layers, experts = popularity_LE.shape
    size = np.full((layers, experts), expert_bytes, np.int64)
    meant = semantics if semantics is not None else CacheSemantics()
    return OffloadContext(layers, experts, top_k, size, capacity_bytes, staging, popularity_LE, meant, costs, seed)


def run(
    context: OffloadContext,
    offload: dict[str, object],
    steps: Iterable[StepRoutes],
    times: Constants,
    rates: LinkRates = FREE,
    options: DeviceOptions | None = None,
    prefetch: object = "none",
    eviction: object = "lru",
) -> Ran:
    """Serve the steps one after another on one device."""
    policy = load_policy("offload", offload)
    plan = policy.plan(context)
    state = load_policy("eviction", eviction).start(context)
    cache = ExpertCache(
        context.size_K, context.group_K, plan.capacity_G, state, bypass=context.semantics.miss == "bypass"
    )
    device = SimDevice(times, Links(rates), context.size_K, options=options)
    ahead = load_policy("prefetch", prefetch).start(context)
    driver = Driver.start(context, policy, cache, ahead, device, plan)
    output = []
    for step in steps:
        driver.step(step)
        output.append(not step.prompt)
    return Ran(device.records.step_ns_S()[np.array(output, bool)], driver.counters, int(plan.fixed_LE.sum()))


def top_k_by_weight(log_weight: FloatArray, top_k: int, tokens: int, seed: int, name: str, *keys: int) -> IntArray:
    """Ids of `tokens` tokens [T, L, K]: each draws K experts of a layer one after another in proportion to their
    weights [L, E], without putting them back (Gumbel's trick: the largest of log weight and noise)."""
    noise = generator(seed, name, *keys).gumbel(size=(tokens, *log_weight.shape))
    ids: IntArray = np.argpartition(-(log_weight + noise), top_k - 1, axis=2)[:, :, :top_k]
    return ids
