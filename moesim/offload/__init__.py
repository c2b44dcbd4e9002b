"""Offload: which expert weights are where, what is fetched when, in which precision, and who computes with them.

Six families of mechanisms meet here, one file a mechanism: `offload/<kind>.py` (what is resident, what misses do),
`offload/eviction/`, `offload/prefetch/`, `offload/precision/`, `offload/rebatching/`, `offload/rerouting/`. They are
pure functions and small state machines over ids; none knows a clock. `cache.ExpertCache` keeps who is on the device,
`drive.Driver` asks the mechanisms in the order in which a system does and tells a `Device` what to move and to compute.
The simulator's device (`moesim.tiers`) answers with nanoseconds, the mini-runtime's (`moesim_kernels.runtime`) with
real transfers: the same objects decide in both.

Legend: T tokens of a step, L MoE layers (sets of experts), E experts, K experts a token; a *key* is
`layer * num_experts + expert`; a *group* is what shares a capacity: a layer, or all layers where the cache is pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.spec import Spec

__all__ = [
    "CacheSemantics",
    "Compressed",
    "Counters",
    "Eviction",
    "EvictionPolicy",
    "MissCosts",
    "OffloadContext",
    "OffloadPlan",
    "OffloadPolicy",
    "PrecisionPolicy",
    "Prefetch",
    "PrefetchPolicy",
    "Proof",
    "RebatchingPolicy",
    "Reroute",
    "ReroutingPolicy",
    "RouteSample",
    "StepRoutes",
    "Upcoming",
    "Wanted",
]


class CacheSemantics(Spec):
    """What decides hit rates besides the policy. Each default is what most systems do.

    pooled: one capacity for all layers (MoE-Infinity, moe-lrc), not one for each (Mixtral-offloading, KTransformers,
    llama.cpp: a layer's slots are allocated with the layer). miss: `evict` makes room for every missed expert (there is
    no other place to compute from); `bypass` lets a policy stream it through a staging buffer and keep what it has.
    cold: whether the first touch of an expert while there is free room counts as a miss (it is a transfer) or a hit
    (moe-lrc). completion: `raced` takes a prefetched expert as present when its bytes are, and drops transfers that
    come too late before they start; `logical` as soon as it is asked for, so decisions do not depend on time (a look-up
    waits for its transfer).
    """

    pooled: bool = False
    miss: Literal["evict", "bypass"] = "evict"
    cold: Literal["miss", "hit"] = "miss"
    completion: Literal["raced", "logical"] = "raced"


@dataclass(frozen=True, slots=True)
class StepRoutes:
    """The routes of one step (a forward pass of a batch), in the order of its tokens.

    expert_TLK: ids; those not below num_experts are no expert. sequence_T: whose token each is. weight_TLK: gate
    weights, where known. prompt: the step computes prompts, not output tokens. score_TLE: what the router ranks experts
    by (logits, with its selection bias if it has one), where known.
    """

    number: int
    expert_TLK: AnyArray
    sequence_T: IntArray
    weight_TLK: FloatArray | None = None
    prompt: bool = False
    score_TLE: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class RouteSample:
    """Tokens that a policy may learn from: never those it is judged on. Rows of a sequence are consecutive."""

    expert_TLK: AnyArray
    sequence_T: IntArray
    weight_TLK: FloatArray | None = None

    def count_LE(self, num_experts: int) -> FloatArray:
        """Activations of each expert, float64 [L, E]."""
        layers = self.expert_TLK.shape[1]
        out = np.zeros((layers, num_experts))
        for layer in range(layers):
            ids = self.expert_TLK[:, layer].ravel()
            out[layer] = np.bincount(ids[ids < num_experts], minlength=num_experts)
        return out


class Upcoming(Protocol):
    """The look-ups to come, for policies that are told them (`moesim.offload.future.Future`)."""

    def next_call(self, key: int, now: int) -> int:
        """The first look-up call after number `now` that asks for `key`; a number beyond all where none does."""
        ...


@dataclass(frozen=True, slots=True)
class MissCosts:
    """ns, for policies that weigh them. transfer_ns: one expert over the slowest link to the device. gpu_ns, cpu_ns:
    rows of one expert -> ns there. Where drives are the home, both ways hold what reading an expert takes on average
    (none for those that have room in host memory). sync_ns: what a layer pays for having any expert on the CPU.
    layer_ns: a layer without stalls. product_ns: rows of several experts -> ns of one product of them all on the
    device; None: not said. running: requests that a decode step serves."""

    transfer_ns: float
    gpu_ns: Callable[[int], float]
    cpu_ns: Callable[[int], float]
    sync_ns: float
    layer_ns: float
    product_ns: Callable[[Sequence[int]], float] | None = None
    running: int = 1


@dataclass(frozen=True, slots=True)
class OffloadContext:
    """What mechanisms are told.

    size_LE: bytes of each expert as stored, int64. capacity_bytes: device memory for experts, staging buffers apart.
    staging: buffers for one expert each. popularity_LE: activations in `fit`, or of equal height where nothing is
    known. fit: tokens to learn from. upcoming: the look-ups to come, where the caller knows them. layer_bytes_L: bytes
    of all other weights of a layer (attention and shared experts), for policies that move whole layers; None: not said.
    block_L: number of each MoE layer among all blocks of the model, dense ones counted, for policies that name tensors;
    None: 0, 1, ...
    expert_shape: (hidden, intermediate) sizes of an expert's matrices, for policies that factor them; None: not said.
    """

    num_layers: int
    num_experts: int
    top_k: int
    size_LE: IntArray
    capacity_bytes: int
    staging: int
    popularity_LE: FloatArray
    semantics: CacheSemantics
    costs: MissCosts
    seed: int
    fit: RouteSample | None = None
    upcoming: Upcoming | None = None
    layer_bytes_L: IntArray | None = None
    block_L: IntArray | None = None
    expert_shape: tuple[int, int] | None = None

    @property
    def num_keys(self) -> int:
        return self.num_layers * self.num_experts

    @property
    def size_K(self) -> IntArray:
        """Bytes by key."""
        return self.size_LE.reshape(-1)

    @property
    def group_K(self) -> IntArray:
        """Group by key: 0 where pooled, else the layer."""
        keys = np.arange(self.num_keys, dtype=np.int64)
        return np.zeros_like(keys) if self.semantics.pooled else keys // self.num_experts


@dataclass(frozen=True, slots=True)
class Proof:
    """What is proven of a policy's answer. objective: of the answer, less is better; of: what it is, in words. bound:
    no answer that the policy chooses from has less. status: `optimal` (the bound is reached), `feasible` (a gap is
    left), `too_large` (and the programme is too large for a solver). solver_units: deterministic time of a solver; 0:
    it was not asked."""

    of: str
    objective: float
    bound: float
    status: str
    solver_units: float = 0.0

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        return 0.0 if self.objective <= self.bound else (self.objective - self.bound) / self.objective

    def __str__(self) -> str:
        return f"{self.of} {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.2%}, {self.status}"


# ---- what is resident, and what a miss does


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """Where experts are when serving starts, and what may change.

    capacity_G: bytes of the cache of each group (one entry where pooled). fixed_LE: on the device for good, outside
    the cache (their bytes count besides capacity_G). initial_LE: in the cache at the start. cpu_LE: computed on the CPU
    whenever not on the device, never fetched. deferred: last choices of a token whose results, where the CPU computes
    them, are added one layer later, so that they run beside the next layer (`drive.Driver`). write_back: an evicted
    expert travels back over the link (a load swaps). paged: all weights of a layer are streamed, layer after layer,
    `look_ahead` layers before they are used; the cache serves nothing. update_tokens: a prompt step of at least so many
    tokens makes fixed_LE anew from its own counts.
    """

    capacity_G: IntArray
    fixed_LE: BoolArray
    initial_LE: BoolArray
    cpu_LE: BoolArray
    deferred: int = 0
    write_back: bool = False
    paged: bool = False
    look_ahead: int = 1
    update_tokens: int | None = None
    proof: Proof | None = None

    def device_bytes(self, size_LE: IntArray) -> int:
        """Of experts on the device: fixed ones and the caches."""
        return int(size_LE[self.fixed_LE].sum() + self.capacity_G.sum())


class OffloadPolicy(Protocol):
    """`policies.offload`: one file of this folder defines `class Policy(Spec)` with these methods."""

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """Raises BadInput or Infeasible where the capacity cannot hold what the policy needs."""
        ...

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """Which of a layer's absent experts [M], with so many rows each, the CPU computes instead of their being
        fetched: bool [M]."""
        ...


# ---- eviction


class Eviction(Protocol):
    """Who leaves: the state of an eviction policy. `now` numbers the look-up calls from 0: it is the number of the call
    that runs, or between calls of the last one (-1: none yet). A call tells `used` of all its keys, in their order,
    before the first of its misses asks for room."""

    def begin(self, step: StepRoutes) -> None:
        """A step starts. Only what a policy says it knows beforehand may be taken from its routes."""
        ...

    def used(self, key: int, now: int) -> None:
        """A look-up asked for `key`, wherever it is."""
        ...

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """`key` has entered the cache."""
        ...

    def evicted(self, key: int) -> None:
        """`key` has left it."""
        ...

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """Who of `group` makes room for `incoming`, among those in the cache for which `evictable` holds; None: there
        is none."""
        ...

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """Whether `incoming` is worth more than `victim` (asked where a miss may bypass the cache)."""
        ...

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """In which order the missed `keys` of a call ask for room, the worthiest first (asked where misses may bypass
        the cache: who has entered stays until the call is over, so a worse one must not come first)."""
        ...


class EvictionPolicy(Protocol):
    """`policies.eviction`: one file of offload/eviction/. knows_future: it is told `upcoming`, so it is a bound, not a
    policy that an engine could run."""

    knows_future: bool

    def start(self, context: OffloadContext) -> Eviction:
        """A fresh state. Raises BadInput where the context lacks what it needs."""
        ...


# ---- prefetch


class Wanted(NamedTuple):
    """An expert that should be on its way; higher scores first."""

    layer: int
    expert: int
    score: float


class Prefetch(Protocol):
    """What is fetched before it is asked for: the state of a prefetch policy."""

    def begin(self, step: StepRoutes) -> None:
        """A step starts."""
        ...

    def wanted(self, layer: int) -> list[Wanted]:
        """Asked when the router of `layer` has run (-1: before the first), so its routes are known; best first."""
        ...

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """What the look-up of `layer` found: (key, kind of `cache.Found`)."""
        ...


class PrefetchPolicy(Protocol):
    """`policies.prefetch`: one file of offload/prefetch/."""

    def start(self, context: OffloadContext) -> Prefetch:
        """A fresh state. Raises BadInput where the context lacks what it needs."""
        ...


# ---- precision, merging, pruning


@dataclass(frozen=True, slots=True)
class Compressed:
    """What is stored of the experts.

    bits_LE: bits a weight of each expert, float64. map_LE: the expert whose weights serve it (itself, the one it was
    merged with, or num_experts: it is gone and its tokens lose it). miss_bits: bits of the copy that a miss fetches
    instead, by gate weight over the token's largest, highest threshold first: ((share, bits), ...); empty: the stored
    ones. extra_bytes: kept besides on the device. quality: what is published of accuracy, with its source, or "".
    proof: how good the allocation is by the policy's own measure, where it can say.
    What follows of it for sizes, popularity and samples: `moesim.offload.compression.apply`.
    """

    bits_LE: FloatArray
    map_LE: IntArray
    miss_bits: tuple[tuple[float, float], ...] = ()
    extra_bytes: int = 0
    quality: str = ""
    proof: Proof | None = None


class PrecisionPolicy(Protocol):
    """`policies.precision`: one file of offload/precision/."""

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """bits: a weight of the model's own number format; context.size_LE: bytes in that format."""
        ...

    def prune(self, step: StepRoutes, layer: int) -> BoolArray | None:
        """Which of a step's choices of `layer` are dropped while it serves: bool [T, K]; None: none ever."""
        ...

    def drift(self, step: StepRoutes, layer: int, num_experts: int) -> AnyArray | None:
        """The experts of `layer` that tokens take where rounding moves the router's choice: ids [T, K] in place of the
        step's; None: it never does."""
        ...


# ---- which experts tokens take, given what is on the device


class Reroute(Protocol):
    """Routing that looks at the cache: its state."""

    def begin(self, step: StepRoutes) -> None:
        """A step starts. Raises BadInput where it lacks what the mechanism needs (`score_TLE`)."""
        ...

    def routes(self, step: StepRoutes, layer: int, resident_E: BoolArray) -> tuple[IntArray, FloatArray | None]:
        """Experts [T, K] that the tokens take in `layer`, and their gate weights [T, K] where the step has any.
        resident_E: whose weights are on the device, or on their way."""
        ...


class ReroutingPolicy(Protocol):
    """`policies.rerouting`: one file of offload/rerouting/."""

    def start(self, context: OffloadContext, gone_LE: BoolArray | None = None) -> Reroute | None:
        """A fresh state; None: routes stay as they are. gone_LE: experts that must not be taken."""
        ...


# ---- which tokens run together


class RebatchingPolicy(Protocol):
    """`policies.rebatching`: one file of offload/rebatching/."""

    pool: int
    """batches that are looked at together; 1: nothing is rearranged"""

    def split(self, step: StepRoutes, num_experts: int, limit: int) -> list[IntArray]:
        """Token numbers of each micro-batch, at most `limit` tokens in one, every token once. What the policy predicts
        of routes, and how well, are its parameters."""
        ...


@dataclass(slots=True)
class Counters:
    """What look-ups found, summed. hits, late, loads, streams: experts by kind (`cache.Found`); on_cpu: computed
    there; cold: first touches, into free room; *_rows: the same in rows (a token's choices). calls: look-up calls.
    upgrades: hits whose copy on the device had too few bits, so that a better one was fetched. rerouted: choices that
    are other experts than the router's own top K."""

    hits: int = 0
    late: int = 0
    loads: int = 0
    streams: int = 0
    on_cpu: int = 0
    cold: int = 0
    hit_rows: int = 0
    late_rows: int = 0
    miss_rows: int = 0
    cpu_rows: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    cancelled: int = 0
    evictions: int = 0
    calls: int = 0
    upgrades: int = 0
    rerouted: int = 0

    @property
    def look_ups(self) -> int:
        """Experts asked for, once a look-up call."""
        return self.hits + self.late + self.loads + self.streams + self.on_cpu
