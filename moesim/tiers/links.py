"""Serial copy links of one node in time: one transfer after another on each, rates shared while several are busy.

Each device has three lanes: host to device, device to host (PCIe carries both ways at once), and its reader of the
node's drives. A lane carries one transfer at a time; the others wait in order: urgent ones first, then first come,
first served. A queued transfer can be hurried or cancelled. One that has started ends, or with `chunk_bytes` makes way
between two chunks for an urgent one and goes on later. Lanes that are busy at once share the memory of their NUMA
domain, and readers the drives, max-min fairly, so the rate of a transfer changes while others start and end.

Time is played forward: `advance` says how far. All ends are integer ns, rounded up, so no transfer beats its link. Each
piece (a transfer, or a chunk of one) pays the lane's latency first, which holds the lane but none of what is shared.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from moesim.arrays import IntArray
from moesim.tiers import LinkRates
from moesim.topology import max_min_rates

__all__ = ["LANES", "NEVER", "NVME", "REASONS", "TO_DEVICE", "TO_HOST", "Links", "Transfer"]

TO_DEVICE, TO_HOST, NVME = 0, 1, 2
LANES = ("to_device", "to_host", "nvme")
"""Names of a device's lanes, in the order of their numbers."""

REASONS = ("demand", "prefetch", "stream", "page", "write_back")
"""Why bytes travel."""
_NUMBER = {reason: number for number, reason in enumerate(REASONS)}

NEVER = 1 << 62
_TINY = 1e-6
"""ns that float rounding may add to an end before it counts as another nanosecond"""


class Transfer:
    """Bytes that were asked for. done_ns, started_ns: -1 while it has not; cancelled: it will not end."""

    __slots__ = (
        "after",
        "asked_ns",
        "cancelled",
        "done_ns",
        "followers",
        "key",
        "lane",
        "left_bytes",
        "reason",
        "size_bytes",
        "started_ns",
        "stopped",
        "turn",
        "urgent",
    )

    def __init__(self, lane: int, size_bytes: int, urgent: bool, reason: int, key: int, asked_ns: int) -> None:
        self.lane, self.size_bytes, self.left_bytes = lane, size_bytes, size_bytes
        self.urgent, self.reason, self.key, self.asked_ns = urgent, reason, key, asked_ns
        self.turn = -1
        self.started_ns = self.done_ns = -1
        self.cancelled = self.stopped = False
        self.after: list[Transfer] = []
        self.followers: list[Transfer] = []

    @property
    def started(self) -> bool:
        return self.started_ns >= 0

    @property
    def done(self) -> bool:
        return self.done_ns >= 0


class _Lane:
    """What a lane does now. `left` bytes of the piece at `since`, flowing at `rate`. Where nothing else is busy
    `since` may lie ahead: then the latency before it is still running (it needs no event of its own)."""

    __slots__ = (
        "bit",
        "busy_ns",
        "current",
        "end_ns",
        "flowing",
        "latency",
        "left",
        "piece",
        "queue",
        "rate",
        "since",
        "taken_ns",
    )

    def __init__(self, bit: int, latency: int) -> None:
        self.bit, self.latency = bit, latency
        self.queue: list[tuple[bool, int, Transfer]] = []
        self.current: Transfer | None = None
        self.flowing = False
        self.left = self.rate = 0.0
        self.piece = self.since = self.taken_ns = self.busy_ns = 0
        self.end_ns = NEVER


class Links:
    """See the module. Lane numbers are 3 * device + TO_DEVICE, TO_HOST or NVME; X lanes, R reasons."""

    def __init__(self, rates: LinkRates, devices: int = 1) -> None:
        """Devices are dealt out to the NUMA domains in order, in equal parts. Raises ValueError for rates that carry
        nothing (nvme may be 0 where nobody reads from it)."""
        if devices < 1 or rates.domains < 1 or not (rates.to_device > 0 and rates.host > 0 and rates.nvme >= 0):
            raise ValueError(f"links need devices, domains and rates above 0, got {devices} devices and {rates}")
        self.rates, self.devices = rates, devices
        self.short_cuts = True
        """False: rates are shared anew at every event, which changes no time"""
        self.now_ns = 0
        self.ended: list[list[Transfer]] = [[] for _ in range(devices)]
        """by device: transfers that have ended, until whoever asked for them takes them out"""
        latency = (rates.to_device_latency_ns, rates.to_device_latency_ns, rates.nvme_latency_ns)
        self._lanes = [_Lane(1 << x, latency[x % 3]) for x in range(3 * devices)]
        self._chunk = rates.chunk_bytes
        self._ports = [self._ports_of(lane) for lane in range(3 * devices)]
        self._capacity = [rates.host] * rates.domains + [rates.nvme] + [rates.to_device] * (2 * devices)
        self._rates_of: dict[int, dict[int, float]] = {}
        self._mask = self._shared = 0
        """lanes that flow, and those among which rates were shared last, as bits"""
        self._busy = 0
        self._fresh: list[_Lane] = []
        """lanes that have begun to flow since"""
        self._turn = 0
        self._next = NEVER
        self._asked_XR = [[0] * len(REASONS) for _ in self._lanes]
        self._moved_XR = [[0] * len(REASONS) for _ in self._lanes]
        self._cancelled_XR = [[0] * len(REASONS) for _ in self._lanes]

    def _ports_of(self, lane: int) -> list[int]:
        """Shared ones of the capacities: memory of the domains, the drives, then two directions a device."""
        device, kind = divmod(lane, 3)
        domains = self.rates.domains
        domain = device * domains // self.devices
        return [domain, domains if kind == NVME else domains + 1 + 2 * device + kind]

    # -- asking -------------------------------------------------------------------------------------------------
    def ask(
        self,
        lane: int,
        size_bytes: int,
        urgent: bool,
        reason: str,
        key: int = -1,
        after: Sequence[Transfer] = (),
    ) -> Transfer:
        """A transfer from now on. after: those that have to end, or to be given up, before it may start. Raises
        ValueError for one without bytes."""
        if size_bytes <= 0:
            raise ValueError(f"a transfer needs bytes, got {size_bytes}")
        if lane % 3 == NVME and self.rates.nvme <= 0:
            raise ValueError("the node has no drives")
        number = _NUMBER[reason]
        one = Transfer(lane, size_bytes, urgent, number, key, self.now_ns)
        self._asked_XR[lane][number] += size_bytes
        if after:
            one.after = [other for other in after if not other.done and not other.cancelled]
            for other in one.after:
                other.followers.append(one)
        if not one.after:
            self._queue(one)
        return one

    def hurry(self, one: Transfer) -> None:
        """It, and what it waits for, is urgent from now on: behind the urgent ones that are queued already."""
        for other in one.after:
            self.hurry(other)
        if one.urgent or one.done or one.cancelled:
            return
        one.urgent = True
        if one.turn >= 0 and self._lanes[one.lane].current is not one:
            self._queue(one)

    def cancel(self, one: Transfer) -> bool:
        """Give it up where it has not started; returns whether it has been. Who waits for it waits for what it has
        waited for, which goes on."""
        if one.started or one.done or one.cancelled:
            return False
        self._wake(self._give_up(one))
        return True

    def stop(self, one: Transfer) -> None:
        """Nobody wants it any more: it is given up as early as the link can, at once or at the end of a chunk."""
        if one.done or one.cancelled:
            return
        if self._lanes[one.lane].current is one:
            one.stopped = True
        else:
            self._wake(self._give_up(one))

    def _give_up(self, one: Transfer) -> list[_Lane]:
        """Who waits for it waits for what it has waited for. Returns the lanes on which others are queued now."""
        one.cancelled = True
        self._cancelled_XR[one.lane][one.reason] += one.left_bytes
        for before in one.after:
            before.followers.remove(one)
            for other in one.followers:
                if before not in other.after:
                    other.after.append(before)
                    before.followers.append(other)
        one.after.clear()
        return self._let_follow(one)

    def _let_follow(self, one: Transfer) -> list[_Lane]:
        """It is no more waited for. Returns the lanes on which others are queued now."""
        woken: list[_Lane] = []
        for other in one.followers:
            other.after.remove(one)
            if not other.after:
                lane = self._lanes[other.lane]
                other.turn = self._turn
                self._turn += 1
                heapq.heappush(lane.queue, (not other.urgent, other.turn, other))
                woken.append(lane)
        one.followers.clear()
        return woken

    def _wake(self, lanes: Sequence[_Lane]) -> None:
        """Idle ones of these start what is queued."""
        for lane in lanes:
            if lane.current is None:  # a lane can be listed twice
                self._pick(lane)
        if lanes:
            self._share()

    # -- time ---------------------------------------------------------------------------------------------------
    def next_ns(self) -> int | None:
        """When something happens on a lane next; None: nothing is on its way."""
        return None if self._next == NEVER else self._next

    def play_next(self) -> bool:
        """Play forward to what happens next; False: nothing is on its way."""
        if self._next == NEVER:
            return False
        self.advance(self._next)
        return True

    def advance(self, to_ns: int) -> None:
        """Play forward. Raises ValueError for a time that is past."""
        if to_ns < self.now_ns:
            raise ValueError(f"time goes back from {self.now_ns} to {to_ns} ns")
        while self._next <= to_ns:
            self._event()
        self.now_ns = to_ns

    def finish_ns(self, one: Transfer) -> int:
        """Play forward until it has ended, and say when. Raises ValueError where it never will."""
        while one.done_ns < 0:
            if one.cancelled or self._next == NEVER:
                raise ValueError("the transfer was cancelled")
            self._event()
        return one.done_ns

    def drain(self) -> int:
        """Play forward until nothing is on its way; ns then."""
        while self._next != NEVER:
            self._event()
        return self.now_ns

    def _queue(self, one: Transfer) -> None:
        """Into its lane's queue, last of its priority; an idle lane starts it."""
        one.turn = self._turn
        self._turn += 1
        lane = self._lanes[one.lane]
        heapq.heappush(lane.queue, (not one.urgent, one.turn, one))
        if lane.current is None:
            self._wake((lane,))

    def _pick(self, lane: _Lane) -> None:
        """Start the first of an idle lane's queue, if there is one."""
        if not self._take(lane):
            return
        now = self.now_ns
        latency = lane.latency
        if not latency or not self._busy:
            self._flow(lane, now + latency)
        else:
            lane.end_ns = now + latency
        self._busy += 1
        if self._busy == 2:
            self._no_longer_alone(lane)

    def _take(self, lane: _Lane) -> bool:
        """Put the first of a lane's queue onto it; False: nobody waits."""
        queue = lane.queue
        while queue:
            _, turn, one = heapq.heappop(queue)
            if turn == one.turn and not one.cancelled:
                break
        else:
            return False
        if one.started_ns < 0:
            one.started_ns = self.now_ns
        lane.current, lane.taken_ns = one, self.now_ns
        chunk = self._chunk
        lane.piece = min(chunk, one.left_bytes) if chunk else one.left_bytes
        return True

    def _flow(self, lane: _Lane, since_ns: int) -> None:
        lane.flowing, lane.left, lane.since, lane.rate = True, float(lane.piece), since_ns, 0.0
        self._mask |= lane.bit
        self._fresh.append(lane)

    def _no_longer_alone(self, newcomer: _Lane) -> None:
        """A lane whose latency still runs gets an event for its end, because then rates change."""
        for lane in self._lanes:
            if lane.flowing and lane.since > self.now_ns and lane is not newcomer:
                lane.flowing, lane.end_ns, lane.rate = False, lane.since, 0.0
                self._mask &= ~lane.bit

    def _lone_event(self, lane: _Lane, one: Transfer) -> None:
        """`_event` where `lane` is the only busy one and nobody but its own queue hears of its piece's end: the next of
        its queue has the same rate, so nothing is shared anew."""
        now = self.now_ns = self._next
        lane.busy_ns += now - lane.taken_ns
        one.left_bytes -= lane.piece
        self._moved_XR[one.lane][one.reason] += lane.piece
        if one.left_bytes:
            heapq.heappush(lane.queue, (not one.urgent, one.turn, one))
        else:
            one.done_ns = now
            self.ended[one.lane // 3].append(one)
        if lane.queue and self._take(lane):
            lane.left, lane.since = float(lane.piece), now + lane.latency
            self._next = lane.end_ns = lane.since + max(math.ceil(lane.left / lane.rate - _TINY), 0)
        else:
            lane.current, lane.flowing, lane.end_ns = None, False, NEVER
            self._busy = self._mask = self._shared = 0
            self._next = NEVER

    def _event(self) -> None:
        """What happens at the next instant, all lanes together: pieces end, then lanes pick anew."""
        if self._busy == 1 and self._mask and self.short_cuts:
            lane = self._lanes[self._mask.bit_length() - 1]
            one = lane.current
            if one is not None and not one.followers and not one.stopped:
                self._lone_event(lane, one)
                return
        now = self.now_ns = self._next
        idle: list[_Lane] = []
        for lane in self._lanes:
            if lane.end_ns != now:
                continue
            if not lane.flowing:  # latency is over
                self._flow(lane, now)
                continue
            one = lane.current
            assert one is not None
            lane.flowing, lane.end_ns, lane.current = False, NEVER, None
            lane.busy_ns += now - lane.taken_ns
            self._mask &= ~lane.bit
            self._busy -= 1
            one.left_bytes -= lane.piece
            self._moved_XR[one.lane][one.reason] += lane.piece
            idle.append(lane)
            if one.left_bytes == 0:
                one.done_ns = now
                self.ended[one.lane // 3].append(one)
                if one.followers:
                    idle += self._let_follow(one)
            elif one.stopped:
                idle += self._give_up(one)
            else:  # the same place in the order: it goes on unless a better one waits
                heapq.heappush(lane.queue, (not one.urgent, one.turn, one))
        self._wake(idle)
        if not idle:
            self._share()

    def _share(self) -> None:
        """Rates of the lanes that flow, their ends, and the next event."""
        mask, now = self._mask, self.now_ns
        if mask != self._shared or self._fresh:
            rates = self._rates_of.get(mask)
            if rates is None:
                rates = self._rates_of[mask] = self._max_min(mask)
            changed = self._lanes if mask != self._shared else self._fresh
            for lane in changed:
                if not lane.flowing:
                    continue
                rate = rates[lane.bit]
                if lane.rate != rate:
                    since = max(now, lane.since)
                    lane.left = max(lane.left - lane.rate * (since - lane.since), 0.0)
                    lane.since, lane.rate = since, rate
                    lane.end_ns = since + max(math.ceil(lane.left / rate - _TINY), 0)
            self._shared = mask
            self._fresh.clear()
        self._next = min([lane.end_ns for lane in self._lanes])

    def _max_min(self, mask: int) -> dict[int, float]:
        """Rate by the bit of each lane that flows."""
        flowing = [x for x in range(len(self._lanes)) if mask >> x & 1]
        if not flowing:
            return {}
        shared = max_min_rates(np.array(self._capacity), [self._ports[x] for x in flowing])
        return {1 << x: rate for x, rate in zip(flowing, shared.tolist(), strict=True)}

    # -- report -------------------------------------------------------------------------------------------------
    def asked_XR(self) -> IntArray:
        """Bytes asked for by lane and reason, int64 [X, R]."""
        return np.array(self._asked_XR, np.int64)

    def moved_XR(self) -> IntArray:
        """Bytes that have got through (whole pieces), int64 [X, R]."""
        return np.array(self._moved_XR, np.int64)

    def cancelled_XR(self) -> IntArray:
        """Bytes that were asked for and given up, int64 [X, R]."""
        return np.array(self._cancelled_XR, np.int64)

    def busy_ns_X(self) -> IntArray:
        """ns each lane has been busy so far, latencies included, int64 [X]."""
        now = self.now_ns
        return np.array(
            [one.busy_ns + (now - one.taken_ns if one.current is not None else 0) for one in self._lanes], np.int64
        )

    def _check(self) -> None:
        """Invariants: every byte asked for has moved, was given up or waits; lanes carry one each; shares fit."""
        left_X = [0] * len(self._lanes)
        seen: dict[int, Transfer] = {}
        for number, lane in enumerate(self._lanes):
            waiting = [one for _, turn, one in lane.queue if turn == one.turn and not one.cancelled]
            if lane.current is not None:
                assert lane.current not in waiting
                waiting.append(lane.current)
                assert lane.end_ns >= self.now_ns
            else:
                assert not waiting, "a lane idles while transfers are queued"
                assert not lane.flowing
                assert lane.end_ns == NEVER
            for one in waiting:
                assert one.lane == number
                assert not one.after
            todo = list(waiting)
            while todo:
                one = todo.pop()
                if id(one) not in seen:
                    seen[id(one)] = one
                    left_X[one.lane] += one.left_bytes
                    todo += one.followers
        for asked, moved, gone, left in zip(self._asked_XR, self._moved_XR, self._cancelled_XR, left_X, strict=True):
            assert sum(asked) == sum(moved) + sum(gone) + left
        used = [0.0] * len(self._capacity)
        for lane, ports in zip(self._lanes, self._ports, strict=True):
            for port in ports:
                used[port] += lane.rate if lane.flowing else 0.0
        assert all(u <= c * (1 + 1e-9) for u, c in zip(used, self._capacity, strict=True))
