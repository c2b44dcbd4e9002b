"""Links in simulated time: transfers that run at once share the ports of their routes max-min fairly.

The bytes of a transfer are a fluid. Its rate changes only when a transfer that it shares a port with,
directly or through others, starts or ends; only those are shared anew then. Time is integer nanoseconds: an
end is rounded to the nearest one. Serialisation holds the ports; latency comes after it and holds none.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import simpy
from numpy.typing import ArrayLike

from moesim.arrays import FloatArray, IntArray
from moesim.topology import max_min_rates

__all__ = ["Network"]

_NS_PER_S = 1e9


class _Flow:
    """A transfer whose bytes are on the way: `left` bytes at `since`, flowing at `rate` bytes a
    nanosecond."""

    __slots__ = ("done", "end_ns", "latency_ns", "left", "nbytes", "number", "ports", "rate", "since")

    def __init__(self, number: int, ports: list[int], nbytes: int, latency_ns: int, done: simpy.Event) -> None:
        self.number, self.ports, self.nbytes, self.latency_ns, self.done = (
            number,
            ports,
            nbytes,
            latency_ns,
            done,
        )
        self.left, self.rate, self.since, self.end_ns = float(nbytes), 0.0, 0, -1

    def left_at(self, now: int) -> float:
        """Bytes still to go."""
        return max(self.left - self.rate * (now - self.since), 0.0)


class Network:
    """Ports with capacities, and the transfers on them.

    capacity_bytes_per_s: bytes a second of each port, [C]; a port of 0 refuses transfers. names: of the
    ports, for `report`. Ends at the same nanosecond fire in the order in which the transfers started. A
    timer that a later start made obsolete stays in SimPy's queue and does nothing, so `env.now` after a run
    without an end may be later than the last transfer's.
    """

    def __init__(
        self, env: simpy.Environment, capacity_bytes_per_s: ArrayLike, names: Sequence[str] | None = None
    ) -> None:
        capacity = np.array(capacity_bytes_per_s, dtype=np.float64)
        if capacity.ndim != 1 or not (np.isfinite(capacity) & (capacity >= 0)).all():
            raise ValueError("capacities must be a vector of finite numbers >= 0")
        self.names = tuple(names) if names is not None else tuple(f"link{c}" for c in range(capacity.size))
        if len(self.names) != capacity.size:
            raise ValueError(f"{capacity.size} ports need as many names, got {len(self.names)}")
        self._env = env
        self._capacity_C: list[float] = (capacity / _NS_PER_S).tolist()
        self._flows_C: list[dict[int, _Flow]] = [{} for _ in self.names]
        self._busy_ns_C = [0] * capacity.size
        self._busy_since_C = [0] * capacity.size
        self._bytes_C = [0] * capacity.size
        self._flows: dict[int, _Flow] = {}
        self._started = 0
        self._touched: dict[int, None] = {}
        self._ends: list[tuple[int, int]] = []
        self._timer_ns = -1

    def transfer(self, ports: Sequence[int], nbytes: int, latency_ns: int = 0) -> simpy.Event:
        """Send `nbytes` over `ports`. The event fires when the last byte is there, with the time it had left.

        Alone, that is round(nbytes / least capacity) + latency_ns from now. Without ports or bytes only the
        latency is left. Raises ValueError for negative numbers, ports that do not exist or have no capacity.
        """
        if nbytes < 0 or latency_ns < 0:
            raise ValueError(f"bytes and latency must not be negative, got {nbytes} and {latency_ns}")
        if any(not 0 <= port < len(self._capacity_C) or self._capacity_C[port] <= 0 for port in ports):
            raise ValueError(f"a route needs ports that exist and have capacity, got {tuple(ports)}")
        flow = _Flow(self._started, list(ports), nbytes, latency_ns, self._env.event())
        self._started += 1
        if not flow.ports or nbytes == 0:
            self._arrive(flow)
            return flow.done
        flow.since = now = self._now
        self._flows[flow.number] = flow
        for port in flow.ports:
            if not self._flows_C[port]:
                self._busy_since_C[port] = now
            self._flows_C[port][flow.number] = flow
        self._touch(flow.ports)
        return flow.done

    @property
    def active(self) -> int:
        """Transfers whose bytes are on the way."""
        return len(self._flows)

    @property
    def busy_ns_C(self) -> IntArray:
        """How long each port has had at least one transfer, up to now: int64 [C]."""
        now = self._now
        each = zip(self._busy_ns_C, self._busy_since_C, self._flows_C, strict=True)
        return np.array([busy + (now - since if flows else 0) for busy, since, flows in each], np.int64)

    @property
    def bytes_C(self) -> FloatArray:
        """Bytes through each port up to now, with what unfinished transfers have sent: float64 [C]."""
        sent_C = np.array(self._bytes_C, np.float64)
        for flow in self._flows.values():
            np.add.at(sent_C, flow.ports, flow.nbytes - flow.left_at(self._now))
        return sent_C

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes and busy time of every port that carried anything, by name."""
        each = zip(self.names, self.bytes_C.tolist(), self.busy_ns_C.tolist(), strict=True)
        return {name: {"bytes": round(sent), "busy_ns": busy} for name, sent, busy in each if sent > 0 or busy > 0}

    @property
    def _now(self) -> int:
        return int(self._env.now)

    def _after(self, delay_ns: int, action: Callable[[], object]) -> None:
        """Call `action` in `delay_ns`, behind what is already due at that instant."""

        def act(_: simpy.Event) -> None:
            action()

        self._env.timeout(delay_ns).callbacks.append(act)

    def _arrive(self, flow: _Flow) -> None:
        """Fire the event of a transfer whose last byte has left, after its latency."""
        left_ns = self._now
        if flow.latency_ns == 0:
            flow.done.succeed(left_ns)
        else:
            self._after(flow.latency_ns, lambda: flow.done.succeed(left_ns))

    def _touch(self, ports: Iterable[int]) -> None:
        """Share `ports` anew at this same instant, once, after everything else that starts or ends in it."""
        if not self._touched:
            self._after(0, self._settle)
        self._touched.update(dict.fromkeys(ports))

    def _connected(self, ports: Iterable[int]) -> list[_Flow]:
        """Transfers on these ports, and on any port of a transfer found, in the order of their start."""
        found: dict[int, _Flow] = {}
        seen = dict.fromkeys(ports)
        queue = list(seen)
        while queue:
            for number, flow in self._flows_C[queue.pop()].items():
                if number not in found:
                    found[number] = flow
                    new = [port for port in flow.ports if port not in seen]
                    seen.update(dict.fromkeys(new))
                    queue.extend(new)
        return [found[number] for number in sorted(found)]

    def _rates(self, flows: list[_Flow]) -> list[float]:
        """Max-min fair rates, bytes a nanosecond, of transfers that share no port with any other."""
        ports = sorted({port for flow in flows for port in flow.ports})
        place = {port: i for i, port in enumerate(ports)}
        capacity = [self._capacity_C[port] for port in ports]
        rates: list[float] = max_min_rates(capacity, [[place[p] for p in f.ports] for f in flows]).tolist()
        return rates

    def _settle(self) -> None:
        """New rates where something started or ended; a transfer whose rate stays keeps its end to the
        bit."""
        now = self._now
        flows = self._connected(self._touched)
        self._touched = {}
        for flow, rate in zip(flows, self._rates(flows), strict=True):
            if rate != flow.rate:
                flow.left, flow.rate, flow.since = flow.left_at(now), rate, now
                flow.end_ns = now + math.floor(flow.left / rate + 0.5)
                heapq.heappush(self._ends, (flow.end_ns, flow.number))
        self._set_timer()

    def _is_due(self, end_ns: int, number: int) -> bool:
        """Whether an entry of the heap of ends is still the end of its transfer."""
        return number in self._flows and self._flows[number].end_ns == end_ns

    def _set_timer(self) -> None:
        """One timer, for the earliest end."""
        while self._ends and not self._is_due(*self._ends[0]):
            heapq.heappop(self._ends)
        if self._ends and self._ends[0][0] != self._timer_ns:
            self._timer_ns = end_ns = self._ends[0][0]
            self._after(end_ns - self._now, lambda: self._end(end_ns))

    def _end(self, end_ns: int) -> None:
        """The transfers that end now are through, unless the timer has been set to another time since."""
        if end_ns != self._timer_ns:
            return
        self._timer_ns = -1
        while self._ends and self._ends[0][0] <= end_ns:
            entry = heapq.heappop(self._ends)
            if self._is_due(*entry):
                self._release(self._flows.pop(entry[1]))
        if not self._touched:
            self._set_timer()

    def _release(self, flow: _Flow) -> None:
        """Free the ports of a transfer whose last byte has left, and count its bytes on each."""
        for port in flow.ports:
            self._bytes_C[port] += flow.nbytes
            if self._flows_C[port].pop(flow.number, None) is not None and not self._flows_C[port]:
                self._busy_ns_C[port] += self._now - self._busy_since_C[port]
        self._touch(flow.ports)
        self._arrive(flow)

    def _check(self) -> None:
        """Invariants while no event of this instant is left: no port above its capacity, the tables agree."""
        load_C = [0.0] * len(self._capacity_C)
        on_C: list[set[int]] = [set() for _ in load_C]
        for number, flow in self._flows.items():
            assert 0 <= flow.left <= flow.nbytes
            for port in flow.ports:
                load_C[port] += flow.rate
                on_C[port].add(number)
        assert all(load <= size * (1 + 1e-9) for load, size in zip(load_C, self._capacity_C, strict=True))
        assert on_C == [set(flows) for flows in self._flows_C]
