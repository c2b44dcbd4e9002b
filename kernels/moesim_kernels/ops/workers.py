"""A group of real worker processes that run collectives for a parent, and never outlive it.

The parent starts one process a rank (`moesim_kernels.ops.collectives` run as a module) and talks to each over a
socket pair in lines of JSON; nothing is pickled. The ranks meet through a file in a private scratch folder and speak
over the loopback interface. A worker ends as soon as its parent's end of the socket closes, so a parent that is
killed leaves no process behind; a worker that dies or stalls makes the parent end all others and raise `WorkerFailed`.

The parent needs numpy alone: torch is imported by the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPES", "OPS", "Call", "Group", "WorkerFailed"]

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_allv")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes an element
BACKENDS = ("gloo", "nccl")
_MAX_RANKS = 256
_MAX_LINE = 16 << 20
_MAX_VALUES = 1 << 16
_END_S = 10.0  # how long workers have to end by themselves


class WorkerFailed(RuntimeError):
    """A worker died, stalled or refused; all workers of its group have been ended."""


@dataclass(frozen=True)
class Call:
    """One collective over a group of ranks.

    count, in elements: all_reduce the buffer; all_gather and reduce_scatter one rank's part; all_to_all the block
    that a rank sends to each rank, itself included; all_to_allv unused. splits (all_to_allv alone): [source rank]
    [destination rank] elements. composed: use the composition of point-to-point sends even where the back end has
    the primitive (reduce_scatter and the all-to-alls). Raises ValueError for anything else.
    """

    op: str
    count: int = 0
    dtype: str = "fp32"
    splits: tuple[tuple[int, ...], ...] = ()
    composed: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"a collective is one of {', '.join(OPS)}, not {self.op!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.op} runs in {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.count < 0 or any(n < 0 for row in self.splits for n in row):
            raise ValueError(f"{self.op} cannot move a negative number of elements")
        if bool(self.splits) != (self.op == "all_to_allv"):
            raise ValueError("splits belong to all_to_allv, and all_to_allv needs them")
        if any(len(row) != len(self.splits) for row in self.splits):
            raise ValueError("splits are one row and one column a rank")
        if self.composed and self.op in ("all_reduce", "all_gather"):
            raise ValueError(f"{self.op} has no composition: every back end brings it")

    def elements(self, rank: int, ranks: int) -> tuple[int, int]:
        """Elements of the buffer that `rank` of `ranks` gives, and of the one that it ends with."""
        if self.op == "all_to_allv":
            if len(self.splits) != ranks:
                raise ValueError(f"splits are for {len(self.splits)} ranks, the group has {ranks}")
            return sum(self.splits[rank]), sum(row[rank] for row in self.splits)
        wide = ranks * self.count
        return {
            "all_reduce": (self.count, self.count),
            "all_gather": (self.count, wide),
            "reduce_scatter": (wide, self.count),
            "all_to_all": (wide, wide),
        }[self.op]

    def buffer_bytes(self, ranks: int) -> int:
        """Bytes that all ranks together allocate for this call (a source that all_reduce copies from included)."""
        both = sum(sum(self.elements(rank, ranks)) for rank in range(ranks))
        return both * DTYPES[self.dtype]


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    line: socket.socket
    unread: bytes = b""


class Group:
    """`ranks` worker processes of `backend` ("gloo" on CPU over loopback, "nccl" with one process a GPU).

    native: which collectives the back end brings itself; the others are composed of point-to-point sends.
    buffers_bytes bounds what all calls of the group may allocate together. timeout_s bounds the start and every
    request. Raises ValueError for a group that cannot be, WorkerFailed when it does not start.
    Close it, or use it in a `with` statement.
    """

    def __init__(
        self, ranks: int, backend: str = "gloo", *, timeout_s: float = 120.0, buffers_bytes: int = 4 << 30
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"a back end is one of {', '.join(BACKENDS)}, not {backend!r}")
        if not 2 <= ranks <= _MAX_RANKS:
            raise ValueError(f"a group has 2 to {_MAX_RANKS} ranks, not {ranks}")
        self.ranks = ranks
        self.backend = backend
        self.timeout_s = timeout_s
        self.buffers_bytes = buffers_bytes
        self._calls: dict[Call, int] = {}
        self._workers: list[_Worker] = []
        folder = Path(tempfile.mkdtemp(prefix="moesim-group-"))
        self._folder = folder
        self._end = weakref.finalize(self, _end, self._workers, folder)
        try:
            for rank in range(ranks):
                self._workers.append(_start(rank, ranks, backend, folder, timeout_s))
            ready = self._answers("start")
        except BaseException:
            self._end()
            raise
        self.native: dict[str, bool] = {str(op): bool(has) for op, has in ready[0]["native"].items()}

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [worker.process.pid for worker in self._workers]

    @property
    def alive(self) -> bool:
        """Whether the group still answers: not closed, and no worker has failed."""
        return self._end.alive

    def rank_ns(self, call: Call) -> list[int]:
        """Wall nanoseconds of one execution on each rank, after a barrier; CUDA events with nccl.

        Buffers hold random normal values and are allocated at the first use of a call, until `release`.
        """
        self._admit(call)
        return [int(answer["ns"]) for answer in self._ask({"do": "time", "call": asdict(call)}, call.op)]

    def time_ns(self, call: Call) -> int:
        """Wall nanoseconds of one execution: that of the slowest rank."""
        return max(self.rank_ns(call))

    def values(self, call: Call, given: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """What each rank ends with when rank r gives given[r] (flat); outputs are poisoned with NaN before."""
        for rank in range(self.ranks):
            need = call.elements(rank, self.ranks)
            if given[rank].size != need[0] or max(need) > _MAX_VALUES:
                raise ValueError(f"rank {rank} gives {need[0]} elements (at most {_MAX_VALUES}): {given[rank].size}")
        requests = [{"do": "values", "call": asdict(call), "given": part.ravel().tolist()} for part in given]
        return [np.array(answer["values"], dtype=np.float32) for answer in self._ask_each(requests, call.op)]

    def release(self, call: Call) -> None:
        """Free the buffers that timing this call took."""
        if self._calls.pop(call, None) is not None and self._end.alive:
            self._ask({"do": "release", "call": asdict(call)}, "release")

    def close(self) -> None:
        """End the workers; without effect when they have ended."""
        if self._end.alive:
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    worker.line.sendall(b'{"do": "end"}\n')
            deadline = time.monotonic() + _END_S
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        self._end()

    def _admit(self, call: Call) -> None:
        if call in self._calls:
            return
        need = call.buffer_bytes(self.ranks)
        taken = sum(self._calls.values())
        if taken + need > self.buffers_bytes:
            raise ValueError(
                f"the buffers of all calls of a group stay below {self.buffers_bytes} bytes: {taken} are taken and "
                f"{call.op} of {call.count} elements on {self.ranks} ranks needs {need}. Use smaller sizes."
            )
        self._calls[call] = need

    def _ask(self, request: dict[str, Any], what: str) -> list[dict[str, Any]]:
        return self._ask_each([request] * self.ranks, what)

    def _ask_each(self, requests: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        if not self._end.alive:
            raise WorkerFailed(f"{what}: this group of workers has ended; start a new one")
        try:
            for worker, request in zip(self._workers, requests, strict=True):
                worker.line.settimeout(self.timeout_s)
                try:
                    worker.line.sendall(json.dumps(request).encode() + b"\n")
                except TimeoutError:
                    raise self._failed(what, f"rank {worker.rank} takes no request") from None
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it has ended, which reading from it tells
            return self._answers(what)
        except BaseException:
            self._end()  # an interrupted answer would be taken for the next one
            raise

    def _answers(self, what: str) -> list[dict[str, Any]]:
        """One line of each worker, or WorkerFailed after the deadline, an end of file or an error."""
        deadline = time.monotonic() + self.timeout_s
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as waiting:
            for worker in self._workers:
                waiting.register(worker.line, selectors.EVENT_READ, worker)
            while len(answers) < self.ranks:
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(set(range(self.ranks)) - set(answers))
                    raise self._failed(what, f"no answer of rank {missing} within {self.timeout_s:g} s")
                for key, _ in ready:
                    answer = _read(key.data)
                    if answer is None:
                        continue
                    if "error" in answer:
                        raise self._failed(what, f"rank {key.data.rank}: {answer['error']}")
                    answers[key.data.rank] = answer
                    waiting.unregister(key.fileobj)
        return [answers[rank] for rank in range(self.ranks)]

    def _failed(self, what: str, reason: str) -> WorkerFailed:
        """The error to raise, with how workers ended by themselves: the first cause often shows there alone."""
        time.sleep(0.2)
        polled = {worker.rank: worker.process.poll() for worker in self._workers}
        codes = {rank: code for rank, code in polled.items() if code is not None}
        ends = [
            f"rank {rank} {f'was killed by signal {-code}' if code < 0 else f'ended with code {code}'}"
            for rank, code in codes.items()
        ]
        said = [_tail(self._folder / f"{worker.rank}.err") for worker in self._workers if worker.rank in codes]
        parts = [f"{what} on {self.ranks} {self.backend} workers failed: {reason}", *ends, *filter(None, said)]
        return WorkerFailed("; ".join(parts))


def _start(rank: int, ranks: int, backend: str, folder: Path, timeout_s: float) -> _Worker:
    """One worker process, in a session of its own so that Ctrl-C reaches the parent alone."""
    ours, theirs = socket.socketpair()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    arguments = [str(theirs.fileno()), str(rank), str(ranks), backend, str(folder / "meeting"), repr(timeout_s)]
    with theirs, open(folder / f"{rank}.err", "wb") as errors:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module, no shell
            [sys.executable, "-m", "moesim_kernels.ops.collectives", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return _Worker(rank, process, ours)


def _read(worker: _Worker) -> dict[str, Any] | None:
    """The worker's next answer; None while its line is not whole; an error when it has ended."""
    try:
        got = worker.line.recv(1 << 16)
    except ConnectionResetError:
        got = b""
    if not got:
        return {"error": "its process ended"}
    worker.unread += got
    if len(worker.unread) > _MAX_LINE:
        return {"error": f"its answer is longer than {_MAX_LINE} bytes"}
    head, newline, rest = worker.unread.partition(b"\n")
    if not newline:
        return None
    worker.unread = rest
    answer: dict[str, Any] = json.loads(head)
    return answer


def _tail(path: Path, most: int = 600) -> str:
    """The end of what a worker wrote on stderr, on one line."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return " ".join(file.read().decode(errors="replace").split())
    return ""


def _end(workers: list[_Worker], folder: Path) -> None:
    """Kill what still runs, reap it, remove the scratch folder."""
    for worker in workers:
        worker.line.close()
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in workers:
        worker.process.wait()
    shutil.rmtree(folder, ignore_errors=True)
