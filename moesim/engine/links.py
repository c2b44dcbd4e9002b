"""Links in simulated time: transfers that run at once share the ports of their routes max-min fairly.

The bytes of a transfer are a fluid. Its rate changes only when a transfer starts or ends, so between two
such moments everything is linear and one timer, for the earliest end, is enough. Time is integer
nanoseconds: an end is rounded to the nearest one. Serialisation holds the ports; latency comes after it and
holds none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import simpy
from numpy.typing import ArrayLike

from moesim.arrays import FloatArray, IntArray
from moesim.topology import max_min_rates

__all__ = ["Network"]

_NS_PER_S = 1e9


class _Flow:
    """A transfer whose bytes are on the way. `rate` in bytes a nanosecond, `left` in bytes."""

    __slots__ = ("done", "latency_ns", "left", "nbytes", "ports", "rate")

    def __init__(self, ports: list[int], nbytes: int, latency_ns: int, done: simpy.Event) -> None:
        self.ports, self.nbytes, self.latency_ns, self.done = ports, nbytes, latency_ns, done
        self.left, self.rate = float(nbytes), 0.0


class Network:
    """Ports with capacities, and the transfers on them.

    capacity_bytes_per_s: bytes a second of each port, > 0, [C]. names: of the ports, for `report`.
    Ends at the same nanosecond fire in the order in which the transfers started. A timer that a later start
    made obsolete stays in SimPy's queue and does nothing, so `env.now` after a run without an end may be
    later than the last transfer's.
    """

    def __init__(
        self, env: simpy.Environment, capacity_bytes_per_s: ArrayLike, names: Sequence[str] | None = None
    ) -> None:
        capacity = np.array(capacity_bytes_per_s, dtype=np.float64)
        if capacity.ndim != 1 or not (np.isfinite(capacity) & (capacity >= 0)).all():
            raise ValueError("capacities must be a vector of finite numbers >= 0")
        self._env = env
        self._capacity_C = capacity / _NS_PER_S
        self.names = tuple(names) if names is not None else tuple(f"link{c}" for c in range(capacity.size))
        if len(self.names) != capacity.size:
            raise ValueError(f"{capacity.size} ports need as many names, got {len(self.names)}")
        self._flows: list[_Flow] = []
        self._ending: list[_Flow] = []
        self._users_C = np.zeros(capacity.size, np.int64)
        self._busy_ns_C = np.zeros(capacity.size, np.int64)
        self._bytes_C = np.zeros(capacity.size, np.int64)
        self._since = int(env.now)
        self._settling = False
        self._timer = 0

    def transfer(self, ports: Sequence[int], nbytes: int, latency_ns: int = 0) -> simpy.Event:
        """Send `nbytes` over `ports`. The event fires, with the time serialisation ended, when the last byte
        is there.

        Alone, that is round(nbytes / least capacity) + latency_ns from now. Without ports or bytes only the
        latency is left. Raises ValueError for negative numbers, ports that do not exist or have no capacity.
        """
        if nbytes < 0 or latency_ns < 0:
            raise ValueError(f"bytes and latency must not be negative, got {nbytes} and {latency_ns}")
        if any(not 0 <= port < self._capacity_C.size or self._capacity_C[port] <= 0 for port in ports):
            raise ValueError(f"a route needs ports that exist and have capacity, got {tuple(ports)}")
        flow = _Flow(list(ports), nbytes, latency_ns, self._env.event())
        if not flow.ports or nbytes == 0:
            self._arrive(flow)
            return flow.done
        self._advance()
        self._flows.append(flow)
        np.add.at(self._users_C, flow.ports, 1)
        self._settle_soon()
        return flow.done

    @property
    def active(self) -> int:
        """Transfers whose bytes are on the way."""
        return len(self._flows)

    @property
    def busy_ns_C(self) -> IntArray:
        """How long each port has had at least one transfer, up to now: int64 [C]."""
        return self._busy_ns_C + np.where(self._users_C > 0, self._now - self._since, 0)

    @property
    def bytes_C(self) -> FloatArray:
        """Bytes through each port up to now, with what unfinished transfers have sent: float64 [C]."""
        sent = self._bytes_C.astype(np.float64)
        elapsed = self._now - self._since
        for flow in self._flows:
            np.add.at(sent, flow.ports, flow.nbytes - max(flow.left - flow.rate * elapsed, 0.0))
        return sent

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes and busy time of every port that carried anything, by name."""
        carried, busy = self.bytes_C, self.busy_ns_C
        return {
            name: {"bytes": round(carried[c]), "busy_ns": int(busy[c])}
            for c, name in enumerate(self.names)
            if carried[c] > 0 or busy[c] > 0
        }

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
        ended = self._now
        if flow.latency_ns == 0:
            flow.done.succeed(ended)
        else:
            self._after(flow.latency_ns, lambda: flow.done.succeed(ended))

    def _advance(self) -> None:
        """Bring what is left of each transfer, and the ports' busy time, up to now."""
        elapsed = self._now - self._since
        if elapsed:
            self._since = self._now
            self._busy_ns_C[self._users_C > 0] += elapsed
            for flow in self._flows:
                flow.left = max(flow.left - flow.rate * elapsed, 0.0)

    def _settle_soon(self) -> None:
        """Share anew at this same instant, once, after everything else that starts or ends in it."""
        if not self._settling:
            self._settling = True
            self._after(0, self._settle)

    def _settle(self) -> None:
        """New rates, and a timer for the earliest end."""
        self._settling = False
        self._advance()
        self._timer += 1
        self._ending = []
        if not self._flows:
            return
        rate_F = max_min_rates(self._capacity_C, [flow.ports for flow in self._flows])
        ends_ns = []
        for flow, rate in zip(self._flows, rate_F.tolist(), strict=True):
            flow.rate = rate
            ends_ns.append(math.floor(flow.left / rate + 0.5))
        first = min(ends_ns)
        self._ending = [f for f, end in zip(self._flows, ends_ns, strict=True) if end == first]
        timer = self._timer
        self._after(first, lambda: self._end(timer))

    def _end(self, timer: int) -> None:
        """The transfers that the timer was set for are through, unless rates have changed since it was
        set."""
        if timer != self._timer:
            return
        self._advance()
        ending = set(map(id, self._ending))
        self._flows = [flow for flow in self._flows if id(flow) not in ending]
        for flow in self._ending:
            np.subtract.at(self._users_C, flow.ports, 1)
            np.add.at(self._bytes_C, flow.ports, flow.nbytes)
            self._arrive(flow)
        self._ending = []
        self._settle_soon()

    def _check(self) -> None:
        """Invariants that hold whenever no event of this instant is left: no port above its capacity, counts
        agree."""
        load_C = np.zeros_like(self._capacity_C)
        users_C = np.zeros_like(self._users_C)
        for flow in self._flows:
            np.add.at(load_C, flow.ports, flow.rate)
            np.add.at(users_C, flow.ports, 1)
            assert 0 <= flow.left <= flow.nbytes
        assert (load_C <= self._capacity_C * (1 + 1e-9)).all()
        assert (users_C == self._users_C).all()
        assert all(a.rate > 0 for a in self._flows)
