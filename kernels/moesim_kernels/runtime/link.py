"""A link that carries experts: one thread, one transfer at a time, urgent ones before all others.

The thread calls `move(transfer, begin, end)` for one piece of a transfer after another: a read of a file, a copy in
memory, or a copy on a CUDA stream that is waited for. With `chunk_bytes` an urgent transfer may go between two pieces
of one that is not. What the thread meets (a read error, its own death) is told to whoever asks the link next, so nobody
waits for ever, and no transfer is lost: it is queued, running, done, or given back by `cancel` and `void`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moesim_kernels.runtime.errors import LinkDied

__all__ = ["Link", "Move", "Transfer"]

_LOOK_S = 0.2
"""How long a wait lasts before the thread is looked after."""


@dataclass(slots=True, eq=False)
class Transfer:
    """One expert on its way into `slot`. number: what the link's methods know it by, one at a time of each (-1: the
    key). moved: bytes that are there. Times: perf_counter_ns, 0 before."""

    key: int
    slot: int
    size_bytes: int
    urgent: bool
    number: int = -1
    asked_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0
    moved: int = 0
    void: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        if self.number < 0:
            self.number = self.key


Move = Callable[[Transfer, int, int], None]
"""Carry bytes [begin, end) of a transfer; raises what went wrong."""


class Link:
    """See the module. All methods are called by one thread, the one that computes."""

    def __init__(self, move: Move, chunk_bytes: int = 0, name: str = "link") -> None:
        """chunk_bytes: size of a piece; 0: a transfer that has started ends."""
        self._move, self._chunk, self._name = move, chunk_bytes, name
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._urgent: dict[int, Transfer] = {}
        self._later: dict[int, Transfer] = {}
        self._running: Transfer | None = None
        self._pending: dict[int, Transfer] = {}
        """what was asked for and neither taken note of nor given up, by number"""
        self._ended: list[Transfer] = []
        self._freed: list[int] = []
        self._error: BaseException | None = None
        self._closing = False
        self.log: list[Transfer] = []
        """every transfer that reached its end, void ones too, in that order"""
        self._thread = self._started()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        return thread

    # -- what the computing thread does -------------------------------------------------------------------------
    def ask(self, transfer: Transfer) -> None:
        """Queue a transfer behind those of its urgency. Never raises what the link met: who asks is between two states,
        `look` and the waits tell it."""
        with self._lock:
            transfer.asked_ns = time.perf_counter_ns()
            (self._urgent if transfer.urgent else self._later)[transfer.number] = transfer
            self._pending[transfer.number] = transfer
            self._work.notify()

    def hurry(self, key: int) -> None:
        """`key` is waited for: behind the urgent ones, before all others. Nothing where it has arrived."""
        with self._lock:
            found = self._pending.get(key)
            if found is None or found.done:
                return
            found.urgent = True
            if self._later.pop(key, None) is not None:
                self._urgent[key] = found

    def cancel(self, key: int) -> int | None:
        """Give up a transfer that has not started: the slot it was for; None: it has."""
        with self._lock:
            for queue in (self._later, self._urgent):
                found = queue.get(key)
                if found is not None and not found.moved:
                    del queue[key], self._pending[key]
                    return found.slot
        return None

    def void(self, key: int) -> int | None:
        """`key` is not wanted any more, wherever its transfer is. The slot is free now, or (None) when `freed` says
        so: its bytes are still coming."""
        with self._lock:
            found = self._pending.pop(key)
            for queue in (self._later, self._urgent):
                queue.pop(key, None)
            if self._running is found:
                found.void = True
                return None
            if found.done:
                self._ended.remove(found)
            return found.slot

    def pending(self, key: int) -> bool:
        """It was asked for, and nobody has taken note of its end."""
        return key in self._pending

    def look(self) -> None:
        """Raises what the thread met, if anything."""
        with self._lock:
            self._raise()

    def arrived(self) -> list[Transfer]:
        """Transfers that have ended since the last call, in that order."""
        with self._lock:
            self._raise()
            return self._take()

    def wait_any(self) -> list[Transfer]:
        """As `arrived`, but at least one: waits for it. Raises ValueError where none is on its way."""
        with self._lock:
            if not self._pending:
                raise ValueError("nothing is on its way")
            while not self._ended:
                self._raise()
                self._news.wait(_LOOK_S)
            return self._take()

    def freed(self, wait: bool = False) -> list[int]:
        """Slots of void transfers that have ended; wait: until there is one."""
        with self._lock:
            while wait and not self._freed and self._running is not None and self._running.void:
                if not self._thread.is_alive():
                    break
                self._news.wait(_LOOK_S)
            out, self._freed = self._freed, []
            return out

    def drain(self) -> list[Transfer]:
        """Wait until nothing is queued or running."""
        with self._lock:
            while self._urgent or self._later or self._running is not None:
                self._raise()
                self._news.wait(_LOOK_S)
            return self._take()

    def close(self) -> None:
        """End the thread after the piece that it carries."""
        with self._lock:
            self._closing = True
            self._work.notify()
        self._thread.join()

    def restart(self) -> None:
        """A new thread after an error or a death; what was queued is carried, what was running is carried anew."""
        self.close()
        self._back()
        with self._lock:
            self._closing, self._error = False, None
        self._thread = self._started()

    def slots(self) -> list[int]:
        """Slots that transfers hold: on their way, ended and not taken note of, or void and not given back."""
        with self._lock:
            held = [t.slot for t in self._pending.values()]
            if self._running is not None and self._running.void:
                held.append(self._running.slot)
            return held + self._freed

    # -- inside -------------------------------------------------------------------------------------------------
    def _take(self) -> list[Transfer]:
        out, self._ended = self._ended, []
        for transfer in out:
            del self._pending[transfer.number]
        return out

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive() and not self._closing:
            raise LinkDied(f"the thread {self._name} ended while transfers were on their way; run again")

    def _run(self) -> None:
        try:
            while self._carry():
                pass
        except Exception as error:  # noqa: BLE001  told to the thread that computes, which raises it
            self._fail(error)
        except BaseException as error:  # noqa: BLE001  the thread is being ended from outside
            self._fail(LinkDied(f"the thread {self._name} was ended ({type(error).__name__}); run again"))
        finally:
            with self._lock:
                self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Nobody's bytes are lost."""
        self._error = error
        self._back()

    def _back(self) -> None:
        """What was running when the thread ended is first in its queue, from its first byte."""
        with self._lock:
            running, self._running = self._running, None
            if running is None:
                return
            if running.done or (running.void and running.slot in self._freed):
                return  # it ended, and the thread before it could say so
            running.moved = 0
            if running.void:
                self._freed.append(running.slot)
            else:
                self._first(running)

    def _first(self, transfer: Transfer) -> None:
        """Put it before all others of its urgency."""
        queue = self._urgent if transfer.urgent else self._later
        rest = dict(queue)
        queue.clear()
        queue[transfer.number] = transfer
        queue.update(rest)

    def _carry(self) -> bool:
        """One piece of the transfer whose turn it is; False: the link is closing."""
        with self._lock:
            while not self._closing and not self._urgent and not self._later:
                self._work.wait()
            if self._closing:
                return False
            queue = self._urgent or self._later
            self._running = transfer = next(iter(queue.values()))  # noted before it leaves the queue: never nowhere
            del queue[transfer.number]
            if not transfer.start_ns:
                transfer.start_ns = time.perf_counter_ns()
        while True:
            end = min(transfer.size_bytes, transfer.moved + (self._chunk or transfer.size_bytes))
            self._move(transfer, transfer.moved, end)
            with self._lock:
                transfer.moved = end
                if end == transfer.size_bytes or transfer.void:
                    self._end(transfer)
                    return True
                if self._closing or (self._urgent and not transfer.urgent):
                    self._running = None
                    self._first(transfer)
                    return not self._closing

    def _end(self, transfer: Transfer) -> None:
        transfer.end_ns = time.perf_counter_ns()
        self.log.append(transfer)
        if transfer.void:
            self._freed.append(transfer.slot)
        else:
            transfer.done = True
            self._ended.append(transfer)
        self._running = None
        self._news.notify_all()

    def _check(self, keys: Iterable[int] = ()) -> None:
        """Invariants: every transfer that is pending is in exactly one place."""
        with self._lock:
            queued = [*self._urgent.values(), *self._later.values()]
            running = [self._running] if self._running is not None and not self._running.void else []
            places = queued + running + self._ended
            assert len({id(t) for t in places}) == len(places)
            assert {id(t) for t in places} == {id(t) for t in self._pending.values()}
            assert all(t.number == key for key, t in self._pending.items())
            assert all(key in self._pending for key in keys)
