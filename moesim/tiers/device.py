"""The simulator's device: what `moesim.offload.drive.Driver` tells it to move and to compute, in nanoseconds.

Its clock moves when it computes or waits. A transfer starts when it is asked for and its link is free, and runs beside
whatever the device does. A layer's experts:

```
device  | sync | experts that are there | those that have come | ... | wait | the last to come | meet | join |
CPU     | sync | experts on the CPU .......... | deferred ones, beside the next layer ...
links   ... demand, in order | streams, one for each staging buffer that is free | prefetches ...
```
The parts of a step (`records.PARTS`) compare this with a device on which every expert is present.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from moesim.arrays import IntArray
from moesim.offload import StepRoutes
from moesim.offload.drive import LayerWork, Work
from moesim.tiers import LayerTimes
from moesim.tiers.links import Links, Transfer
from moesim.tiers.records import PARTS, Records
from moesim.tiers.store import TierStore

__all__ = ["Cpu", "DeviceOptions", "SimDevice", "Waits"]

Waits = Generator[int | None, None, None]
"""Yields the ns up to which the links have to be played before it goes on; None: up to their next event."""

_Pending = tuple[Transfer, int, bool]
"""what is waited for, its rows, whether it comes through a staging buffer"""

_STUCK = "the device waits, and nothing is on its way"

_OWN, _EXPERTS, _CPU, _SYNC, _STALL, _MEET, _JOIN, _END = range(len(PARTS))


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What decides times besides the policies.

    staging: buffers of one expert each, for streamed experts and for evicted ones that travel back. compute: `arrival`:
    what is there computes first, then the others as they come, those that came together in one product (most systems
    launch expert by expert); `after`: the missed ones in one product when all have come; `once`: one product for all
    when the last has come (a fused kernel). duplex: write-backs have the other direction of the link; else they queue
    with the loads (both copies on one stream, as in mixtral-offloading's expert_cache.py; its order, the load before
    its victim, is that of a home without copies). sync_blocks: the device stands still while work is handed to the CPU
    (host functions in the order of its stream); else only the CPU waits. whole_pages: a page holds the layer's
    attention too, so the layer waits for it before it starts, not only its experts. on_host: the device's memory is
    the host's, filled from NVMe.
    """

    staging: int = 2
    compute: Literal["arrival", "after", "once"] = "arrival"
    duplex: bool = True
    sync_blocks: bool = True
    whole_pages: bool = False
    on_host: bool = False


class Cpu:
    """The host's cores: one expert's work after another, of all devices of the node."""

    def __init__(self) -> None:
        self.free_ns = 0
        self.busy_ns = 0

    def run(self, ready_ns: int, work_ns: int) -> int:
        """Work that can start at `ready_ns`; ns when it has ended."""
        self.free_ns = max(self.free_ns, ready_ns) + work_ns
        self.busy_ns += work_ns
        return self.free_ns


class SimDevice:
    """`moesim.offload.drive.Device` in simulated time; `records` says what each step took."""

    tells_waits = False
    """somebody listens to `experts_waits`, so each wait is told there; else a device alone takes short cuts"""

    def __init__(
        self,
        times: LayerTimes,
        links: Links,
        size_K: IntArray,
        index: int = 0,
        options: DeviceOptions | None = None,
        cpu: Cpu | None = None,
        store: TierStore | None = None,
    ) -> None:
        """size_K: bytes by key, as stored. index: which of the links' devices it is. cpu: shared with the node's other
        devices; None: its own. store: where experts are, shared likewise, with what is on the devices at the start;
        None: all of them in host memory, and whatever the cache says on the device."""
        self.times, self.links, self.index = times, links, index
        self._size: list[int] = size_K.tolist()
        self.options = options if options is not None else DeviceOptions()
        self.cpu = cpu if cpu is not None else Cpu()
        self.now_ns = links.now_ns
        self.grouped = False
        """somebody else plays the links, and says when a step is over (`close`)"""
        self.records = Records()
        how = self.options
        if store is None:
            sizes = [size_K] * links.devices
            store = TierStore(links, sizes, staging=how.staging, on_host=how.on_host, duplex=how.duplex)
        if (store.staging, store.on_host, store.duplex) != (how.staging, how.on_host, how.duplex):
            raise ValueError("a device and its store differ in staging, on_host or duplex")
        self.store = store
        self._way = store.way(index)
        self._ended = links.ended[index]
        self._arrived: dict[int, None] = {}
        self._pages: dict[int, list[Transfer]] = {}
        self._deferred_ns = 0
        self._start_ns = 0
        self._part_ns = [0] * len(PARTS)
        self._tokens = 0
        self._seen_moved = self._moved()
        self._seen_busy = self._busy()

    # -- a step (moesim.offload.drive.Device) -------------------------------------------------------------------
    def begin(self, step: StepRoutes) -> None:
        """See Device."""
        self._start_ns = self.now_ns
        self._part_ns = [0] * len(PARTS)
        self._tokens = len(step.expert_TLK)
        self.times.begin(self._tokens)

    def own(self, layer: int, tokens: int) -> None:
        """See Device."""
        if self.options.whole_pages:
            self._play(self.own_waits(layer))
            return
        took = self.times.own_ns(layer)
        self.now_ns += took
        self._part_ns[_OWN] += took

    def own_waits(self, layer: int) -> Waits:
        """`own`, for whoever plays the links for several devices."""
        if self.options.whole_pages:
            yield from self._wait_page(layer)
        took = self.times.own_ns(layer)
        self.now_ns += took
        self._part_ns[_OWN] += took
        yield self.now_ns

    def experts(self, layer: int, work: LayerWork) -> None:
        """See Device."""
        self._play(self.experts_waits(layer, work))
        self.meet(layer, self.now_ns)

    def experts_waits(self, layer: int, work: LayerWork) -> Waits:
        """`experts` up to the meeting with other devices (`meet`), for whoever plays the links for several."""
        if work.paged and not self.options.whole_pages:
            yield from self._wait_page(layer)
        at = self.now_ns
        sync = self.times.sync_ns(layer) if work.cpu or work.deferred else 0
        start = at + sync if self.options.sync_blocks else at
        rows = [one.rows for one in work.here]
        rows += [one.rows for one in work.coming]
        rows += [one.rows for one in work.streams]
        alone = self.times.gpu_ns(layer, rows) if rows else 0
        if not work.paged:
            self.store.use(self.index, [one.key for one in (*work.here, *work.coming)])
        pending, here = self._pending(work)
        reads = self._reads(work)
        cpu_ns = ideal_cpu_ns = 0 if reads else self._on_cpu(layer, work, at + sync)
        if (pending or work.streams) and (self.grouped or self.tells_waits):
            yield from self._compute(layer, here, pending, work.streams, start)
        elif work.streams:
            self._compute_alone(layer, here, pending, work.streams, start)
        elif pending:
            self._compute_arrivals(layer, here, pending, start)
        else:
            self.now_ns = start + alone
        if reads:  # deferred experts' are waited for at once, too
            yield from self._until(reads)
            late = max(max(one.done_ns for one in reads) - max(at + sync, self.cpu.free_ns), 0)
            cpu_ns = self._on_cpu(layer, work, max(at + sync, *(one.done_ns for one in reads)))
            ideal_cpu_ns = cpu_ns - late if work.cpu else cpu_ns
        self.now_ns = max(self.now_ns, cpu_ns)
        self._book(start - at, sync, alone, start, ideal_cpu_ns)

    def _book(self, blocked: int, sync: int, alone: int, start: int, cpu_ns: int) -> None:
        """Parts of a layer whose experts have ended now. cpu_ns: when the CPU would have with all weights in memory."""
        ideal = start + alone
        exposed = max(cpu_ns - ideal, 0)
        waits = 0 if blocked else min(max(sync - alone, 0), exposed)
        part = self._part_ns
        part[_SYNC] += blocked + waits
        part[_EXPERTS] += alone
        part[_CPU] += exposed - waits
        part[_STALL] += self.now_ns - max(ideal, cpu_ns)

    def meet(self, layer: int, at_ns: int) -> None:
        """All devices are there at `at_ns`; their results are joined."""
        self.wait_to(at_ns)
        self.store.use(self.index, ())
        self.store.cpu_done(self.index)
        took = self.times.join_ns(layer)
        self._part_ns[_JOIN] += took
        self.now_ns += took

    def wait_to(self, at_ns: int) -> None:
        """The other devices are there only then."""
        self._part_ns[_MEET] += at_ns - self.now_ns
        self.now_ns = at_ns

    def end(self) -> None:
        """See Device."""
        took = self.times.end_ns()
        self._part_ns[_END] += took
        self.now_ns += took
        if not self.grouped:
            self.close()

    def close(self) -> None:
        """The step's record. Called by `end` where the device is alone; else when all devices have ended."""
        self.links.advance(max(self.links.now_ns, self.now_ns))
        moved, busy = self._moved(), self._busy()
        records = self.records
        records.start_ns.append(self._start_ns)
        records.step_ns.append(self.now_ns - self._start_ns)
        records.tokens.append(self._tokens)
        records.part_ns.append(self._part_ns)
        records.moved.append(moved - self._seen_moved)
        records.busy.append(busy - self._seen_busy)
        self._seen_moved, self._seen_busy = moved, busy

    def skip_to(self, at_ns: int) -> None:
        """Nothing to do until then; links go on. Raises ValueError for a time that is past."""
        if at_ns < self.now_ns:
            raise ValueError(f"time goes back from {self.now_ns} to {at_ns} ns")
        self.now_ns = at_ns

    # -- transfers ----------------------------------------------------------------------------------------------
    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """See Device."""
        if self.links.now_ns < self.now_ns or self._ended:
            self._settle()
        self.store.load(self.index, key, size_bytes, urgent, "demand" if urgent else "prefetch")
        if self._arrived:
            self._arrived.pop(key, None)

    def hurry(self, key: int) -> None:
        """See Device."""
        self._settle()
        if key in self._way:
            self.links.hurry(self._way[key])

    def cancel(self, key: int) -> bool:
        """See Device."""
        self._settle()
        return self.store.cancel(self.index, key)

    def arrived(self) -> list[int]:
        """See Device."""
        self._settle()
        if not self._arrived:
            return []
        keys = list(self._arrived)
        self._arrived.clear()
        return keys

    def evict(self, key: int, write_back: bool) -> None:
        """See Device. What has not arrived is not written back."""
        if self.links.now_ns < self.now_ns or self._ended:
            self._settle()
        if self._arrived:
            self._arrived.pop(key, None)
        self.store.evict(self.index, key, write_back)

    def page(self, layer: int, size_bytes: int) -> None:
        """See Device. A layer whose weights are on the device anyhow has no page."""
        self._settle()
        if size_bytes:
            self._pages.setdefault(layer, []).append(self.store.page(self.index, size_bytes))

    def _settle(self) -> None:
        """Play the links up to the device's clock, and note what has come."""
        links = self.links
        if links.now_ns < self.now_ns:
            links.advance(self.now_ns)
        if self._ended:
            self._note()

    def _note(self) -> None:
        """What has come."""
        for key in self.store.settle(self.index):
            self._arrived[key] = None

    # -- computing ----------------------------------------------------------------------------------------------
    def _on_cpu(self, layer: int, work: LayerWork, ready_ns: int) -> int:
        """When the layer has all it wants of the CPU: its own experts and those deferred by the layer before."""
        wanted, self._deferred_ns = self._deferred_ns, 0
        if work.cpu:
            took = self.times.cpu_ns(layer, [one.rows for one in work.cpu])
            wanted = max(wanted, self.cpu.run(ready_ns, took))
        if work.deferred:
            took = self.times.cpu_ns(layer, [one.rows for one in work.deferred])
            self._deferred_ns = self.cpu.run(ready_ns, took)
        return wanted

    def _pending(self, work: LayerWork) -> tuple[list[_Pending], list[int]]:
        """(transfer, rows, False) of experts that are still on their way, which are waited for from now on, and the
        rows of those that are there."""
        self._settle()
        pending: list[_Pending] = []
        here: list[int] = []
        if not self._way:
            return pending, [one.rows for one in (*work.here, *work.coming)]
        coming = self._way.get
        for one in (*work.here, *work.coming):
            transfer = coming(one.key)
            if transfer is None:
                here.append(one.rows)
                continue
            if not transfer.urgent or transfer.after:
                self.links.hurry(transfer)
            pending.append((transfer, one.rows, False))
        return pending, here

    def _compute_arrivals(self, layer: int, here: list[int], pending: list[_Pending], start_ns: int) -> None:
        """`_compute_alone` without streams: nothing the device does meanwhile changes what the links do, so they are
        played to the last arrival first."""
        finish_ns, gpu_ns = self.links.finish_ns, self.times.gpu_ns
        done = sorted([(finish_ns(one), number) for number, (one, _, _) in enumerate(pending)])
        self._note()
        now, last = start_ns, len(done)
        if self.options.compute != "arrival":
            rows = [rows for _, rows, _ in pending]
            if self.options.compute == "once":
                rows = here + rows
            elif here:
                now += gpu_ns(layer, here)
            self.now_ns = max(now, done[-1][0])
            self.now_ns += gpu_ns(layer, rows)
            return
        if here:
            now += gpu_ns(layer, here)
        first = 0
        while first < last:
            now = max(now, done[first][0])
            end = first + 1
            while end < last and done[end][0] <= now:
                end += 1
            came = sorted([number for _, number in done[first:end]]) if end > first + 1 else [done[first][1]]
            now += gpu_ns(layer, [pending[number][1] for number in came])
            first = end
        self.now_ns = now

    def _compute_alone(
        self, layer: int, here: list[int], pending: list[_Pending], streams: Sequence[Work], start_ns: int
    ) -> None:
        """`_compute` for a device that plays its links itself: what has come is told by the links, not searched."""
        links, ended, gpu_ns = self.links, self._ended, self.times.gpu_ns
        waiting = list(reversed(streams))
        pending += self._stream(waiting)
        self.now_ns = start_ns
        held: list[int] = []
        if self.options.compute == "once":
            held = here
        elif here:
            self.now_ns += gpu_ns(layer, here)
        at_once = self.options.compute == "arrival"
        turn = {one[0]: number for number, one in enumerate(pending)}
        came: list[int] = []
        left = len(pending)
        while left or waiting:
            if links.now_ns < self.now_ns:
                links.advance(self.now_ns)
            if ended:
                came += [turn[one] for one in ended if one in turn]
                self._note()
            if waiting:
                for asked in self._stream(waiting):
                    turn[asked[0]] = len(pending)
                    pending.append(asked)
                    left += 1
            if not came or not (at_once or len(came) == left):
                if not links.play_next():
                    raise RuntimeError(_STUCK)
                self.now_ns = max(self.now_ns, links.now_ns)
                continue
            came.sort()
            self.now_ns += gpu_ns(layer, held + [pending[number][1] for number in came])
            held = []
            for number in came:
                one, _, streamed = pending[number]
                if streamed:
                    self.store.release(self.index, one)
            left -= len(came)
            came = []

    def _compute(
        self,
        layer: int,
        here: list[int],
        pending: list[_Pending],
        streams: Sequence[Work],
        start_ns: int,
    ) -> Waits:
        """Experts of which some have to come; the clock stands at their end afterwards."""
        waiting = list(reversed(streams))
        pending += self._stream(waiting)
        self.now_ns = start_ns
        held: list[int] = []
        if self.options.compute == "once":
            held = here
        elif here:
            self.now_ns += self.times.gpu_ns(layer, here)
        while pending or waiting:
            yield self.now_ns
            self._settle()
            pending += self._stream(waiting)
            came = [one for one in pending if one[0].done]
            if not came or (self.options.compute != "arrival" and len(came) < len(pending)):
                yield None
                self.now_ns = max(self.now_ns, self.links.now_ns)
                continue
            pending = [one for one in pending if not one[0].done]
            self.now_ns += self.times.gpu_ns(layer, held + [rows for _, rows, _ in came])
            held = []
            for one, _, streamed in came:
                if streamed:
                    self.store.release(self.index, one)

    def _stream(self, waiting: list[Work]) -> list[_Pending]:
        """Ask for as many of the streamed experts as there are free buffers (`waiting` has the first one last)."""
        out: list[_Pending] = []
        free = self.store.buffers_free(self.index) if waiting else 0
        while waiting and free > 0:
            one = waiting.pop()
            size = one.size_bytes or self._size[one.key]
            out.append((self.store.stream(self.index, one.key, size), one.rows, True))
            free -= 1
        return out

    def _reads(self, work: LayerWork) -> list[Transfer]:
        """What brings the CPU's experts into host memory, where they are not there."""
        if self.store.all_in_dram:
            return []
        wanted = [self.store.need_in_dram(self.index, one.key) for one in (*work.cpu, *work.deferred)]
        return [one for one in wanted if one is not None]

    def _until(self, transfers: Sequence[Transfer]) -> Waits:
        """Until all of them have ended."""
        yield self.now_ns
        while not all(one.done for one in transfers):
            yield None
            self.now_ns = max(self.now_ns, self.links.now_ns)
        self._settle()

    def _wait_page(self, layer: int) -> Waits:
        """Until the layer's weights are there, if they come as a page."""
        pages = self._pages.get(layer)
        if not pages:
            return
        page, since = pages.pop(0), self.now_ns
        yield self.now_ns
        self._settle()
        self.links.hurry(page)
        yield from self._until([page])
        self._part_ns[_STALL] += self.now_ns - since

    def _play(self, waits: Waits) -> None:
        """The device is alone with its links."""
        links = self.links
        for want in waits:
            if want is None:
                if not links.play_next():
                    raise RuntimeError(_STUCK)
            elif want > links.now_ns:
                links.advance(want)

    # -- counters -----------------------------------------------------------------------------------------------
    def _moved(self) -> IntArray:
        return self.links.moved_XR()[3 * self.index : 3 * self.index + 3]

    def _busy(self) -> IntArray:
        return self.links.busy_ns_X()[3 * self.index : 3 * self.index + 3]
