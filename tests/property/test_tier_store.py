"""A machine of hypothesis over store and links: whatever is asked for, in whatever order, bytes are accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moesim.tiers import LinkRates
from moesim.tiers.links import LANES, NVME, REASONS, TO_DEVICE, TO_HOST, Links, Transfer
from moesim.tiers.store import Home, TierStore

KEYS = 6
SIZES = np.array([100, 100, 160, 160, 240, 60])
ROOM = 500
"""bytes on each device"""


class StoreMachine(RuleBasedStateMachine):
    """rooms: what the machine itself knows to have a room, by device; asked: bytes it asked for, by lane and reason."""

    kind = "dram"

    @initialize(
        devices=st.sampled_from([1, 2]),
        dram=st.sampled_from([0, 200, 400]),
        chunk=st.sampled_from([0, 64]),
        latency=st.sampled_from([0, 5]),
        staging=st.sampled_from([1, 2]),
        duplex=st.booleans(),
        first=st.sets(st.integers(0, KEYS - 1), min_size=1, max_size=4),
    )
    def begin(
        self, devices: int, dram: int, chunk: int, latency: int, staging: int, duplex: bool, first: set[int]
    ) -> None:
        rates = LinkRates(2.0, 3.0, 1.0, latency, 3 * latency, chunk_bytes=chunk)
        self.links = Links(rates, devices)
        kind, self.devices, self.staging = self.kind, devices, staging
        self.rooms: list[set[int]] = [set() for _ in range(devices)]
        for key in sorted(first):
            if SIZES[[*self.rooms[0], key]].sum() <= ROOM:
                for rooms in self.rooms:
                    rooms.add(key)
        total = devices * int(SIZES.sum())
        placed = sum(int(SIZES[list(rooms)].sum()) for rooms in self.rooms)
        home = {
            "dram": Home(dram_bytes=total),
            "swap": Home(dram_bytes=total - placed + dram // 4, copies=False),
            "nvme": Home("nvme", dram_bytes=dram),
            "exclusive": Home("nvme", dram_bytes=dram, copies=False, bounce=1),
            "host": Home("nvme"),
        }[kind]
        self.store = TierStore(
            self.links, [SIZES] * devices, home, staging, [ROOM] * devices, on_host=kind == "host", duplex=duplex
        )
        for device, rooms in enumerate(self.rooms):
            self.store.place(device, sorted(rooms))
        self.store.start([(0, 0), (0, 2), (devices - 1, 1)])
        self.using: list[set[int]] = [set() for _ in range(devices)]
        self.streams: list[tuple[int, Transfer]] = []
        self.pages: list[Transfer] = []
        self.asked = np.zeros((len(LANES), len(REASONS)), np.int64)
        self.now = 0

    def count(self, size: int, reason: str) -> None:
        lane = NVME if self.kind == "host" else TO_DEVICE
        self.asked[lane, REASONS.index(reason)] += size

    def fits(self, device: int, key: int) -> bool:
        return int(SIZES[list(self.rooms[device])].sum()) + int(SIZES[key]) <= ROOM

    @rule(device=st.integers(0, 1), number=st.integers(0, KEYS - 1), urgent=st.booleans(), part=st.booleans())
    def load(self, device: int, number: int, urgent: bool, part: bool) -> None:
        """One of those that have no room, and for which there is one."""
        device %= self.devices
        keys = [k for k in range(KEYS) if k not in self.rooms[device] and self.fits(device, k)]
        if not keys:
            return
        key = keys[number % len(keys)]
        size = int(SIZES[key]) // 2 if part and self.kind != "swap" else int(SIZES[key])
        reason = "demand" if urgent else "prefetch"
        one = self.store.load(device, key, size, urgent, reason)
        assert one.size_bytes == size
        self.rooms[device].add(key)
        self.count(size, reason)

    @rule(device=st.integers(0, 1), number=st.integers(0, KEYS - 1), write_back=st.booleans())
    def evict(self, device: int, number: int, write_back: bool) -> None:
        """One of those that may go."""
        device %= self.devices
        keys = sorted(self.rooms[device] - self.using[device])
        if keys:
            key = keys[number % len(keys)]
            self.store.evict(device, key, write_back and self.kind != "host")
            self.rooms[device].remove(key)
            assert self.store.device_state(device, key) == "absent"

    @rule(device=st.integers(0, 1), out=st.integers(0, KEYS - 1), new=st.integers(0, KEYS - 1), urgent=st.booleans())
    def exchange(self, device: int, out: int, new: int, urgent: bool) -> None:
        """As a cache does it that is full."""
        self.evict(device, out, True)
        self.load(device, new, urgent, False)

    @rule(device=st.integers(0, 1), key=st.integers(0, KEYS - 1))
    def wrong(self, device: int, key: int) -> None:
        """What must be refused is."""
        device %= self.devices
        if key in self.rooms[device] or not self.fits(device, key):
            with pytest.raises(ValueError, match="has a room, or there is none"):
                self.store.load(device, key, int(SIZES[key]), True, "demand")
        if key not in self.rooms[device] or key in self.using[device]:
            with pytest.raises(ValueError, match="has no room"):
                self.store.evict(device, key, True)

    @rule(device=st.integers(0, 1), key=st.integers(0, KEYS - 1))
    def cancel(self, device: int, key: int) -> None:
        device %= self.devices
        state = self.store.device_state(device, key)
        if self.store.cancel(device, key):
            assert state == "queued"
            self.rooms[device].remove(key)
        elif self.kind in ("dram", "host"):
            assert state != "queued"

    @rule(device=st.integers(0, 1), key=st.integers(0, KEYS - 1))
    def hurry(self, device: int, key: int) -> None:
        one = self.store.way(device % self.devices).get(key)
        if one is not None:
            self.links.hurry(one)

    @rule(device=st.integers(0, 1), key=st.integers(0, KEYS - 1))
    def stream(self, device: int, key: int) -> None:
        device %= self.devices
        if self.store.buffers_free(device) < 1:
            with pytest.raises(ValueError, match="no staging buffer"):
                self.store.stream(device, key, int(SIZES[key]))
            return
        self.streams.append((device, self.store.stream(device, key, int(SIZES[key]))))
        self.count(int(SIZES[key]), "stream")

    @precondition(lambda self: any(one.done for _, one in self.streams))
    @rule()
    def release(self) -> None:
        number = next(n for n, (_, one) in enumerate(self.streams) if one.done)
        device, one = self.streams.pop(number)
        self.store.release(device, one)

    @rule(device=st.integers(0, 1))
    def compute(self, device: int) -> None:
        device %= self.devices
        there = [k for k in self.rooms[device] if self.store.device_state(device, k) == "present"]
        self.using[device] = set(there[:2])
        self.store.use(device, there[:2])
        assert all(self.store.device_state(device, key) == "in use" for key in there[:2])

    @rule(device=st.integers(0, 1))
    def page(self, device: int) -> None:
        self.pages.append(self.store.page(device % self.devices, 70))
        self.count(70, "page")

    @rule(device=st.integers(0, 1), key=st.integers(0, KEYS - 1), done=st.booleans())
    def on_cpu(self, device: int, key: int, done: bool) -> None:
        device %= self.devices
        read = self.store.need_in_dram(device, key)
        if done:
            self.store.cpu_done(device)
        elif read is None and self.kind in ("nvme", "exclusive"):
            assert self.store.dram_state(device, key) == "present" or self.store.dram_state(device, key) == "in use"

    @rule(device=st.integers(0, 1))
    def settle(self, device: int) -> None:
        device %= self.devices
        for key in self.store.settle(device):
            assert self.store.device_state(device, key) in ("present", "in use")
            assert key in self.rooms[device]

    @rule(events=st.integers(1, 4), more=st.integers(0, 20))
    def advance(self, events: int, more: int) -> None:
        """One event at a time, so that what holds only between two actions is seen."""
        for _ in range(events):
            following = self.links.next_ns()
            if following is not None:
                assert following >= self.links.now_ns
                self.links.advance(following)
                self.links._check()
                self.store._check()
        self.links.advance(self.links.now_ns + more)

    @invariant()
    def checks(self) -> None:
        if not hasattr(self, "store"):
            return
        self.links._check()
        self.store._check()
        assert self.links.now_ns >= self.now
        self.now = self.links.now_ns
        for device, rooms in enumerate(self.rooms):
            assert self.store.device_bytes(device) == int(SIZES[list(rooms)].sum()) <= ROOM
            for key in range(KEYS):
                assert (self.store.device_state(device, key) != "absent") == (key in rooms)

    def teardown(self) -> None:
        """Nothing waits for ever, and what has moved is what was asked for and not given up, lane by lane."""
        if not hasattr(self, "store"):
            return
        while self.streams or self.links.next_ns() is not None:
            self.links.drain()
            assert all(one.done for _, one in self.streams)
            for device, one in self.streams:
                self.store.release(device, one)
            self.streams.clear()
        self.links._check()
        self.store._check()
        for device, rooms in enumerate(self.rooms):
            assert all(self.store.device_state(device, key) in ("present", "in use") for key in rooms)
        assert all(one.done for one in self.pages)
        by_lane = [self.links.asked_XR()[lane::3].sum(axis=0) for lane in range(3)]
        lane = NVME if self.kind == "host" else TO_DEVICE
        write_back = REASONS.index("write_back")
        by_lane[lane][write_back] = 0  # not asked for by the machine: on the same lane without duplex
        assert (by_lane[lane] == self.asked[lane]).all()
        if self.kind == "dram":
            assert by_lane[NVME].sum() == 0
        if self.kind == "host":
            assert by_lane[TO_DEVICE].sum() == by_lane[TO_HOST].sum() == 0
        left = self.links.asked_XR() - self.links.moved_XR() - self.links.cancelled_XR()
        assert not left.any()


class SwapMachine(StoreMachine):
    kind = "swap"


class NvmeMachine(StoreMachine):
    kind = "nvme"


class ExclusiveMachine(StoreMachine):
    kind = "exclusive"


class HostMachine(StoreMachine):
    kind = "host"


@pytest.mark.parametrize(
    ("machine", "examples"),
    [(StoreMachine, 10), (SwapMachine, 30), (NvmeMachine, 25), (ExclusiveMachine, 15), (HostMachine, 5)],
)
def test_the_store(machine: type[StoreMachine], examples: int):
    how = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(machine, settings=how)  # type: ignore[no-untyped-call]
