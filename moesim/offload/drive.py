"""One device that serves with a cache of experts: asks the mechanisms, layer by layer, and tells the device what to do.

```
routes of a step ──> before experts (device) ──> look-up (cache, eviction) ──> urgent fetches, CPU work ──> prefetch
                          └ layer after layer <── experts: here, coming, streamed, on the CPU (device) <──┘
```
The order is that of the systems: the router of a layer runs, its experts are looked up, missing ones are asked for at
once, then later layers are prefetched behind them, then experts compute as they are there. Who decides is the same in
the simulator and in the mini-runtime; only the `Device` differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from moesim.arrays import AnyArray, BoolArray
from moesim.offload import (
    Compressed,
    Counters,
    OffloadContext,
    OffloadPlan,
    OffloadPolicy,
    PrecisionPolicy,
    Prefetch,
    Reroute,
    StepRoutes,
)
from moesim.offload.asked import asked, own_copy, serves_LE
from moesim.offload.cache import ABSENT, LOADING, ExpertCache, Found

__all__ = ["Device", "Driver", "Event", "LayerWork", "Work"]


class Work(NamedTuple):
    """An expert and its rows in this step. size_bytes: of the copy that is fetched; 0: nothing is."""

    key: int
    rows: int
    size_bytes: int = 0


@dataclass(slots=True)
class LayerWork:
    """What a layer's experts compute. here: with weights that are on the device (by the cache's word: under logical
    completion they may still be on their way). coming: in the order in which they were asked for. streams: through
    staging buffers, in order. cpu: there, now; deferred: there, and wanted only by the next layer's end. ids_TK: the
    expert of each choice after merging and pruning (num_experts: none), for who really computes. paged: all weights of
    the layer come as pages."""

    here: list[Work] = field(default_factory=list)
    coming: list[Work] = field(default_factory=list)
    streams: list[Work] = field(default_factory=list)
    cpu: list[Work] = field(default_factory=list)
    deferred: list[Work] = field(default_factory=list)
    ids_TK: AnyArray | None = None
    paged: bool = False


class Device(Protocol):
    """Moves and computes. Calls come in the order of the module's drawing; none of them says what to decide."""

    def begin(self, step: StepRoutes) -> None:
        """A step starts."""
        ...

    def own(self, layer: int, tokens: int) -> None:
        """Everything between the experts of the layer before and the look-up of `layer`, its router included."""
        ...

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """Ask for a transfer into the room that `key` has in the cache. Urgent ones come before all others that have
        not started."""
        ...

    def hurry(self, key: int) -> None:
        """A transfer that was asked for without haste is waited for now."""
        ...

    def cancel(self, key: int) -> bool:
        """Give up a transfer that has not started; False: it has."""
        ...

    def arrived(self) -> list[int]:
        """Keys whose transfers have ended since the last call, in that order (not asked under logical completion)."""
        ...

    def evict(self, key: int, write_back: bool) -> None:
        """The room of `key` is given to another: its transfer, if any is on its way, is void. write_back: its weights
        travel to the host first."""
        ...

    def page(self, layer: int, size_bytes: int) -> None:
        """Ask for all of a layer's weights, in order."""
        ...

    def experts(self, layer: int, work: LayerWork) -> None:
        """Compute, waiting for what is not there; streams are fetched here, as staging buffers get free."""
        ...

    def end(self) -> None:
        """The step is over (its last norm and head are the device's own)."""
        ...


class Event(NamedTuple):
    """What one look-up found of one key."""

    step: int
    layer: int
    key: int
    kind: str


class Driver:
    """See the module. `counters` sums what was found; `events` lists it, where `keep_events`."""

    def __init__(
        self,
        context: OffloadContext,
        policy: OffloadPolicy,
        plan: OffloadPlan,
        cache: ExpertCache,
        prefetch: Prefetch,
        device: Device,
        compressed: Compressed | None = None,
        precision: PrecisionPolicy | None = None,
        keep_events: bool = False,
        held_LE: BoolArray | None = None,
        reroute: Reroute | None = None,
    ) -> None:
        """cache: with the plan's experts in place already (`start` does it). held_LE: the experts that live on this
        device under expert parallelism, bool [L, E]; None: all. reroute: routing that looks at the cache."""
        self.context, self.policy, self.plan = context, policy, plan
        self.cache, self.prefetch, self.device = cache, prefetch, device
        self.compressed, self.precision, self.held_LE, self.reroute = compressed, precision, held_LE, reroute
        self.counters = Counters()
        self.events: list[Event] | None = [] if keep_events else None
        self._logical = context.semantics.completion == "logical"
        self._size: list[int] = context.size_K.tolist()
        self._loading: dict[int, int] = {}
        """key on its way -> the turn (layers since the start) at which it is wanted"""
        self._unused: dict[int, None] = {}
        self._bits: dict[int, float] = {}
        """key on the device as a copy of fewer bits than stored -> its bits"""
        self._never_fetched: list[bool] | None = plan.cpu_LE.reshape(-1).tolist() if plan.cpu_LE.any() else None
        self._steps = 0
        self._serves_LE = serves_LE(context, compressed, held_LE)

    @classmethod
    def start(
        cls,
        context: OffloadContext,
        policy: OffloadPolicy,
        cache: ExpertCache,
        prefetch: Prefetch,
        device: Device,
        plan: OffloadPlan,
        **more: object,
    ) -> Driver:
        """A driver whose cache holds what the plan says."""
        cache.fix(np.flatnonzero(plan.fixed_LE.reshape(-1)).tolist())
        order = np.argsort(context.popularity_LE.reshape(-1), kind="stable")  # the most popular one is the newest
        initial = plan.initial_LE.reshape(-1)
        cache.place([key for key in order.tolist() if initial[key] and not plan.fixed_LE.reshape(-1)[key]])
        return cls(context, policy, plan, cache, prefetch, device, **more)  # type: ignore[arg-type]

    # -- a step -------------------------------------------------------------------------------------------------
    def step(self, step: StepRoutes) -> None:
        """One forward pass."""
        for layer, work in self.layers(step):
            if work is None:
                self.device.own(layer, len(step.expert_TLK))
            else:
                self.device.experts(layer, work)

    def layers(self, step: StepRoutes) -> Iterator[tuple[int, LayerWork | None]]:
        """A forward pass in parts, for whoever runs several devices side by side: at (layer, None) the caller lets
        the device do `own`, at (layer, work) `experts`, before it asks for the next part."""
        layers = self.context.num_layers
        self._serves_LE = serves_LE(self.context, self.compressed, self.held_LE)
        if self.reroute is not None:
            step = own_copy(step)
            self.reroute.begin(step)
        self.device.begin(step)
        self.cache.eviction.begin(step)
        self.prefetch.begin(step)
        ahead = min(self.plan.look_ahead, layers)
        if self.plan.paged and not self._steps:
            for layer in range(ahead):
                self._page(layer)
        self._poll()
        self._ask_ahead(-1)
        ids_TLK = step.expert_TLK if self.reroute is not None else self._ids_TLK(step)
        calls = [] if self.reroute is not None else asked(ids_TLK, self.context.num_experts)
        for layer in range(layers):
            yield layer, None
            if self.plan.paged:  # beyond the last layer: the next step's first ones
                self._page((layer + ahead) % layers)
            self._poll()
            if self.reroute is not None:
                self._reroute(self.reroute, step, layer)
                ids_TK = self.ids_TK(step, layer)
                work = self._look_up(step, layer, ids_TK, *asked(ids_TK[:, None], self.context.num_experts, layer)[0])
            else:
                work = self._look_up(step, layer, ids_TLK[:, layer], *calls[layer])
            self._drop_stale(layer)  # first: what it frees need not be evicted for
            self._ask_ahead(layer)
            yield layer, work
            if self._loading:
                for key in [w.key for w in work.coming if self.cache.state(w.key) == LOADING]:
                    self.cache.arrived(key)
                    self._loading.pop(key, None)
            self.cache.release()
        self.device.end()
        self._steps += 1
        if self.plan.update_tokens is not None and step.prompt and len(step.expert_TLK) >= self.plan.update_tokens:
            self._update(step)

    def ids_TK(self, step: StepRoutes, layer: int) -> AnyArray:
        """The expert of each choice of a layer, after pruning and merging; num_experts: none, or not on this device."""
        ids = self._chosen_TK(step, layer)
        ids = step.expert_TLK[:, layer] if ids is None else ids
        if self._serves_LE is not None:
            ids = self._serves_LE[layer][np.minimum(ids, self.context.num_experts)]
        return ids

    def _ids_TLK(self, step: StepRoutes) -> AnyArray:
        """`ids_TK` of all layers, [T, L, K]."""
        ids, layers = step.expert_TLK, range(self.context.num_layers)
        if self.precision is not None:
            chosen = [self._chosen_TK(step, layer) for layer in layers]
            if any(one is not None for one in chosen):
                ids = np.stack([ids[:, n] if one is None else one for n, one in enumerate(chosen)], axis=1)
        if self._serves_LE is not None:
            ids = self._serves_LE[np.arange(len(layers))[:, None], np.minimum(ids, self.context.num_experts)]
        return ids

    def _chosen_TK(self, step: StepRoutes, layer: int) -> AnyArray | None:
        """What `precision` makes of a layer's choices; None: nothing."""
        if self.precision is None:
            return None
        none = self.context.num_experts
        ids = self.precision.drift(step, layer, none)
        if (dropped := self.precision.prune(step, layer)) is not None:
            ids = np.where(dropped, none, step.expert_TLK[:, layer] if ids is None else ids)
        return ids

    def _turn(self, layer: int) -> int:
        return self._steps * self.context.num_layers + layer

    # -- parts of it --------------------------------------------------------------------------------------------
    def _reroute(self, reroute: Reroute, step: StepRoutes, layer: int) -> None:
        """Write the experts that tokens really take into the step, which is the driver's own copy."""
        none, base = self.context.num_experts, layer * self.context.num_experts
        serves_E = np.arange(none) if self.compressed is None else self.compressed.map_LE[layer]
        there_E = np.array([self.cache.state(base + e) != ABSENT for e in range(none)] + [False])
        ids_TK, weight_TK = reroute.routes(step, layer, there_E[serves_E])
        before_TK = step.expert_TLK[:, layer]
        kept_TK = (ids_TK[:, :, None] == before_TK[:, None, :]).any(axis=2)
        self.counters.rerouted += int((~kept_TK & (ids_TK < none)).sum())
        step.expert_TLK[:, layer] = ids_TK
        if step.weight_TLK is not None and weight_TK is not None:
            step.weight_TLK[:, layer] = weight_TK

    def _poll(self) -> None:
        """Take note of what has arrived."""
        if self._logical:
            return
        for key in self.device.arrived():
            if key in self._loading:
                del self._loading[key]
                self.cache.arrived(key)

    def _look_up(self, step: StepRoutes, layer: int, ids_TK: AnyArray, keys: list[int], rows: list[int]) -> LayerWork:
        """keys: that are asked for, ascending; rows: of each."""
        if self.plan.paged:
            return LayerWork(here=list(map(Work, keys, rows)), ids_TK=ids_TK, paged=True)
        work = LayerWork(ids_TK=ids_TK)
        rows_of = dict(zip(keys, rows, strict=True))
        on_cpu = self._on_cpu(layer, rows_of)
        if on_cpu:
            self._compute_on_cpu(work, on_cpu, step, layer, rows_of)
            there = set(on_cpu)
            keys = [key for key in keys if key not in there]
        found = self.cache.look_up(keys)
        now = self.cache.now - 1
        for key in on_cpu:
            self.cache.eviction.used(key, now)
        self._take(found, rows_of, work, self._gate_share(step, layer, ids_TK))
        c = self.counters
        c.calls += 1
        told: list[tuple[int, str]] = [(one.key, one.kind) for one in found]
        if on_cpu:
            c.on_cpu += len(on_cpu)
            c.cpu_rows += sum([rows_of[key] for key in on_cpu])
            told += [(key, "cpu") for key in on_cpu]
        self.prefetch.told(layer, told)
        if self.events is not None:
            number = step.number
            self.events += [Event(number, layer, key, kind) for key, kind in told]
        return work

    def _on_cpu(self, layer: int, rows_of: dict[int, int]) -> list[int]:
        """Which of the keys that are asked for the policy has the CPU compute, in order."""
        absent = self.cache.absent(rows_of)
        if not absent:
            return []
        never = self._never_fetched
        if never is not None and all(never[key] for key in absent):
            return absent
        base = layer * self.context.num_experts
        rows = [rows_of[key] for key in absent]
        chosen = self.policy.on_cpu(layer, np.array(absent) - base, np.array(rows), self.plan, self.context.costs)
        return [key for key, cpu in zip(absent, chosen.tolist(), strict=True) if cpu]

    def _take(self, found: Sequence[Found], rows_of: dict[int, int], work: LayerWork, share: dict[int, float]) -> None:
        """Turn what was found into work and transfers, and count it."""
        c, unused = self.counters, self._unused
        for key, kind, cold, evicted in found:
            rows = rows_of[key]
            if evicted:
                for victim in evicted:
                    self._evicted(victim)
            if kind == "hit":
                c.hits += 1
                c.hit_rows += rows
                if self._bits and self._too_coarse(key, share):  # a better copy takes its room
                    c.upgrades += 1
                    self.device.evict(key, False)
                    self._fetch(key, rows, work, share)
                else:
                    work.here.append(Work(key, rows))
            elif kind == "late":
                c.late += 1
                c.late_rows += rows
                work.coming.append(Work(key, rows, self._size[key]))
                self.device.hurry(key)
            else:
                c.miss_rows += rows
                c.cold += cold
                if kind == "load":
                    c.loads += 1
                    self._fetch(key, rows, work, share)
                else:
                    c.streams += 1
                    work.streams.append(Work(key, rows, self._fetch_bytes(key, share, stays=False)))
                continue
            if unused and key in unused:
                del unused[key]
                c.prefetched_used += 1

    def _fetch(self, key: int, rows: int, work: LayerWork, share: dict[int, float]) -> None:
        """An expert that has room now is asked for."""
        size = self._fetch_bytes(key, share) if share or self._bits else self._size[key]
        work.coming.append(Work(key, rows, size))
        self.device.fetch(key, size, urgent=True)

    def _compute_on_cpu(
        self, work: LayerWork, keys: list[int], step: StepRoutes, layer: int, rows_of: dict[int, int]
    ) -> None:
        """Share the CPU's experts between now and one layer later: of each token at most `deferred` choices, those
        with the least gate weight (KTransformers' deferred experts), never in the last layer."""
        base, none, ids_TK = layer * self.context.num_experts, self.context.num_experts, work.ids_TK
        if not self.plan.deferred or layer == self.context.num_layers - 1:
            work.cpu = [Work(key, rows_of[key]) for key in keys]
            return
        assert ids_TK is not None
        there = np.isin(ids_TK, np.array(keys) - base)
        weight = step.weight_TLK[:, layer] if step.weight_TLK is not None else -np.arange(there.shape[1])[None, :]
        order = np.argsort(np.where(there, weight, np.inf), axis=1, kind="stable")
        turn = np.argsort(order, axis=1, kind="stable")
        late = there & (turn < self.plan.deferred)
        for mask, out in ((there & ~late, work.cpu), (late, work.deferred)):
            out.extend(map(Work, *asked(np.where(mask, ids_TK, none)[:, None], none, layer)[0]))

    def _gate_share(self, step: StepRoutes, layer: int, ids_TK: AnyArray) -> dict[int, float]:
        """By key the largest gate weight over its token's largest, where misses are fetched by it."""
        if self.compressed is None or not self.compressed.miss_bits or step.weight_TLK is None:
            return {}
        weight = np.asarray(step.weight_TLK[:, layer], np.float64)
        share = weight / np.maximum(weight.max(axis=1, keepdims=True), 1e-30)
        out = np.zeros(self.context.num_experts + 1)
        np.maximum.at(out, np.minimum(ids_TK, self.context.num_experts).ravel(), share.ravel())
        base = layer * self.context.num_experts
        return {base + e: float(x) for e, x in enumerate(out[:-1]) if x > 0}

    def _wanted_bits(self, key: int, share: dict[int, float]) -> tuple[float, float]:
        """Bits of the copy that an expert is wanted in, and those that are stored."""
        assert self.compressed is not None
        stored = float(self.compressed.bits_LE.reshape(-1)[key])
        bits = next((b for least, b in self.compressed.miss_bits if share[key] >= least), stored)
        return min(bits, stored), stored

    def _too_coarse(self, key: int, share: dict[int, float]) -> bool:
        """Whether what is on the device is a copy of fewer bits than its tokens want now."""
        return key in self._bits and key in share and self._wanted_bits(key, share)[0] > self._bits[key]

    def _fetch_bytes(self, key: int, share: dict[int, float], stays: bool = True) -> int:
        """Bytes of the copy that a miss fetches. Its room is that of the stored one, so that a better copy has room.
        stays: it enters the cache, so its bits are remembered."""
        self._bits.pop(key, None)
        if key not in share:
            return self._size[key]
        bits, stored = self._wanted_bits(key, share)
        if bits < stored and stays:
            self._bits[key] = bits
        return max(1, round(self._size[key] * bits / stored))

    def _ask_ahead(self, layer: int) -> None:
        """Prefetch what the policy wants, behind everything urgent."""
        if self.plan.paged:
            return
        for want in self.prefetch.wanted(layer):
            expert = want.expert if self.compressed is None else int(self.compressed.map_LE[want.layer, want.expert])
            if expert >= self.context.num_experts:
                continue
            key = want.layer * self.context.num_experts + expert
            if self.held_LE is not None and not self.held_LE[want.layer, expert]:
                continue
            left = self.cache.prefetch(key, self._logical)
            if left is None:
                continue
            for victim in left:
                self._evicted(victim)
            self.counters.prefetched += 1
            self._unused[key] = None
            if not self._logical:  # wanted by a later layer of this step, or by the next step
                ahead = want.layer - layer if want.layer > layer else want.layer - layer + self.context.num_layers
                self._loading[key] = self._turn(layer) + ahead
            self.device.fetch(key, self._size[key], urgent=False)

    def _drop_stale(self, layer: int) -> None:
        """Transfers for layers that have been looked up already are given up, where they have not started."""
        if not self._loading:
            return
        turn = self._turn(layer)
        for key in [k for k, due in self._loading.items() if due <= turn and k not in self.cache.pinned]:
            if self.device.cancel(key):
                del self._loading[key]
                self._unused.pop(key, None)
                self.cache.cancelled(key)
                self.counters.cancelled += 1

    def _evicted(self, key: int) -> None:
        self.counters.evictions += 1
        if self._unused:
            self._unused.pop(key, None)
        if self._bits:
            self._bits.pop(key, None)
        self.device.evict(key, self.plan.write_back)

    def _page(self, layer: int) -> None:
        fixed_E = self.plan.fixed_LE[layer]
        other = 0 if self.context.layer_bytes_L is None else int(self.context.layer_bytes_L[layer])
        self.device.page(layer, int(self.context.size_LE[layer][~fixed_E].sum()) + other)

    def _update(self, step: StepRoutes) -> None:
        """The fixed experts of each layer become as many of the prompt's most used ones, of equals those with the lower
        number, whoever is there (KTransformers' dynamic update, `select_top_experts_from_batch` of its SGLang)."""
        none = self.context.num_experts
        for layer in range(self.context.num_layers):
            base = layer * none
            ids = self.ids_TK(step, layer).ravel()
            count = np.bincount(ids[ids < none], minlength=none)
            held = [e for e in range(none) if self.cache.fixed(base + e)]
            best = np.lexsort((np.arange(none), -count))[: len(held)].tolist()
            new = [e for e in best if self.cache.state(base + e) == ABSENT]  # the most used first
            gone = sorted(set(held) - set(best), key=lambda e: (int(count[e]), e))
            new, gone = self._exchange(base, new, gone)
            self.cache.unfix([base + e for e in gone])
            for e in gone:
                self.device.evict(base + e, self.plan.write_back)
            self.cache.fix([base + e for e in new])
            for e in new:
                self.device.fetch(base + e, self._size[base + e], urgent=False)

    def _exchange(self, base: int, new: list[int], gone: list[int]) -> tuple[list[int], list[int]]:
        """As many of `new`, in order, as find room where as few of `gone`, in order, have been."""
        free = left = 0
        for number, expert in enumerate(new):
            size, more = self._size[base + expert], left
            while free < size and more < len(gone):
                free += self._size[base + gone[more]]
                more += 1
            if free < size:
                return new[:number], gone[:left]
            free, left = free - size, more
        return new, gone[:left]
