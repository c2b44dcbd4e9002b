"""The link: order, cancel, pieces, errors and deaths, driven by a mover that waits to be told."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from moesim_kernels.runtime.errors import LinkDied, ReadFailed
from moesim_kernels.runtime.link import Link, Transfer
from moesim_kernels.runtime.slots import Slots


class Gate:
    """A mover that lets one piece through for every permit, and notes what it carried."""

    def __init__(self, permits: int = 0) -> None:
        self.permit = threading.Semaphore(permits)
        self.entered = threading.Semaphore(0)
        self.blocked = False
        self.carried: list[tuple[int, int, int]] = []
        self.fail: BaseException | None = None

    def __call__(self, transfer: Transfer, begin: int, end: int) -> None:
        self.blocked = not self.permit.acquire(blocking=False)
        self.entered.release()
        if self.blocked:
            assert self.permit.acquire(timeout=20)
            self.blocked = False
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.carried.append((transfer.key, begin, end))

    def inside(self) -> None:
        """Wait until the thread is in here."""
        assert self.entered.acquire(timeout=20)


def keys(transfers: list[Transfer]) -> list[int]:
    return [t.key for t in transfers]


def test_urgent_before_the_rest_and_each_in_order() -> None:
    gate = Gate()
    link = Link(gate)
    link.ask(Transfer(0, 0, 8, urgent=False))
    gate.inside()
    for key, urgent in ((1, False), (2, False), (3, True), (4, True), (5, False)):
        link.ask(Transfer(key, key, 8, urgent))
    link.hurry(2)
    link._check()
    gate.permit.release(6)
    assert keys(link.drain()) == [0, 3, 4, 2, 1, 5]
    assert not link.slots()
    link.close()


def test_what_has_not_started_can_be_given_up() -> None:
    gate = Gate()
    link = Link(gate)
    for key in range(3):
        link.ask(Transfer(key, 10 + key, 8, urgent=False))
    gate.inside()
    assert link.cancel(0) is None, "it has started"
    assert link.cancel(1) == 11
    assert link.void(2) == 12
    assert link.void(0) is None
    assert link.slots() == [10]
    assert link.freed() == []
    link.ask(Transfer(0, 13, 8, urgent=True))  # the same expert again, while the void one is under way
    gate.permit.release(2)
    assert keys(link.wait_any()) == [0]
    assert link.freed(wait=True) == [10]
    link._check()
    link.close()


def test_an_urgent_one_goes_between_two_pieces() -> None:
    gate = Gate()
    link = Link(gate, chunk_bytes=4)
    link.ask(Transfer(0, 0, 10, urgent=False))
    gate.inside()
    link.ask(Transfer(1, 1, 4, urgent=True))
    gate.permit.release(4)
    assert keys(link.drain()) == [1, 0]
    assert gate.carried == [(0, 0, 4), (1, 0, 4), (0, 4, 8), (0, 8, 10)]
    assert link.cancel(0) is None
    link.close()


def test_a_read_error_reaches_whoever_asks_and_nothing_is_lost() -> None:
    gate = Gate()
    gate.fail = ReadFailed("the disk is gone")
    link = Link(gate)
    link.ask(Transfer(0, 0, 8, urgent=False))
    link.ask(Transfer(1, 1, 8, urgent=True))
    gate.permit.release(4)
    with pytest.raises(ReadFailed, match="gone"):
        link.wait_any()
    link.ask(Transfer(2, 2, 8, urgent=False))  # taken, carried when the link goes on
    for told in (link.look, link.arrived, link.drain):
        with pytest.raises(ReadFailed):
            told()
    link._check()
    assert sorted(link.slots()) == [0, 1, 2]
    link.restart()
    assert sorted(keys(link.drain())) == [0, 1, 2]
    link.close()


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_killed_thread_is_noticed(chunk: int) -> None:
    """The interpreter raises SystemExit in the thread, as a shutdown does: no wait is left hanging."""
    gate = Gate()
    link = Link(gate, chunk)
    link.ask(Transfer(0, 0, 8, urgent=False))
    link.ask(Transfer(1, 1, 8, urgent=False))
    gate.inside()
    thread = link._thread
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1
    gate.permit.release(1)
    with pytest.raises(LinkDied, match="ended"):
        link.drain()
    thread.join(timeout=20)
    assert not thread.is_alive()
    link._check()
    gate.permit.release(4)
    link.restart()
    link.drain()
    assert not link.slots()
    link.close()


def test_a_thread_that_is_gone_without_a_word_is_noticed() -> None:
    link = Link(Gate())
    link.close()
    link._closing = False
    link._pending[0] = Transfer(0, 0, 8, urgent=True)
    begin = time.monotonic()
    with pytest.raises(LinkDied):
        link.wait_any()
    assert time.monotonic() - begin < 20


def test_buffers_are_lent_once() -> None:
    slots = Slots(2)
    first = slots.take()
    slots.take()
    with pytest.raises(ValueError, match="in use"):
        slots.take()
    slots.give([first])
    with pytest.raises(ValueError, match="free already"):
        slots.give([first])
    slots._check([1 - first])
    with pytest.raises(AssertionError, match="lost"):
        slots._check([])


class Machine(RuleBasedStateMachine):
    """Anything a device may ask, in any order, against a model that knows what must be pending."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.link = Link(self.gate, chunk_bytes=4)
        self.slots = Slots(6)
        self.wanted: dict[int, int] = {}

    def quiet(self) -> None:
        """Wait until the thread can do nothing more without another permit, so that a run can be repeated."""
        while not self.gate.blocked:
            with self.link._lock:
                if not self.link._urgent and not self.link._later and self.link._running is None:
                    return
            time.sleep(1e-5)

    def note(self, transfers: list[Transfer]) -> None:
        for one in transfers:
            assert self.wanted.pop(one.key) == one.slot
            assert one.moved == one.size_bytes
            self.slots.give([one.slot])

    @precondition(lambda self: self.slots.free)
    @rule(key=st.integers(0, 20), urgent=st.booleans(), size=st.sampled_from([3, 4, 9]))
    def ask(self, key: int, urgent: bool, size: int) -> None:
        if key not in self.wanted:
            slot = self.wanted[key] = self.slots.take()
            self.link.ask(Transfer(key, slot, size, urgent))
            self.quiet()

    @rule(key=st.integers(0, 20))
    def hurry(self, key: int) -> None:
        self.link.hurry(key)

    @rule(key=st.integers(0, 20))
    def cancel(self, key: int) -> None:
        slot = self.link.cancel(key)
        if slot is not None:
            assert self.wanted.pop(key) == slot
            self.slots.give([slot])

    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        if self.wanted:
            key = data.draw(st.sampled_from(sorted(self.wanted)))
            slot = self.wanted.pop(key)
            if self.link.void(key) is not None:
                self.slots.give([slot])

    @rule(pieces=st.integers(1, 3))
    def carry(self, pieces: int) -> None:
        for _ in range(pieces):
            if self.gate.blocked:
                before = len(self.gate.carried)
                self.gate.permit.release()
                while len(self.gate.carried) == before:
                    time.sleep(1e-5)
                self.quiet()

    @rule()
    def look(self) -> None:
        self.note(self.link.arrived())
        self.slots.give(self.link.freed())

    @rule()
    def finish(self) -> None:
        while self.gate.blocked:
            self.carry(1)
        self.note(self.link.drain())
        self.slots.give(self.link.freed())
        assert not self.wanted
        assert self.slots.free == 6

    @invariant()
    def consistent(self) -> None:
        self.link._check(self.wanted)

    def teardown(self) -> None:
        self.gate.permit.release(1000)
        self.link.close()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase
