"""Worker processes of a parent that never outlive it: started together, asked in lines of JSON, ended together.

The parent starts one process a rank (a module of this package, run as such) and talks to each over a socket pair in
lines of JSON; nothing is pickled. The ranks meet through a file in a private scratch folder and speak over the loopback
interface. A worker ends as soon as its parent's end of the socket closes, so a parent that is killed leaves no process
behind; a worker that dies or stalls makes the parent end all others and raise `WorkerFailed`.

The parent needs the standard library alone: torch is imported by the workers (`moesim_kernels.ops.worker`).
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = ["BACKENDS", "WorkerFailed", "Workers"]

BACKENDS = ("gloo", "nccl")
_MAX_RANKS = 256
_MAX_LINE = 16 << 20
_END_S = 10.0  # how long workers have to end by themselves


class WorkerFailed(RuntimeError):
    """A worker died, stalled or refused; all workers of its group have been ended."""


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    line: socket.socket
    unread: bytes = b""


class Workers:
    """`ranks` processes of `module`, joined by `backend` ("gloo" on CPU over loopback, "nccl" with one process a GPU).

    ready: what each rank said when it had joined. timeout_s bounds the start and every request. Raises ValueError for
    a group that cannot be, WorkerFailed when it does not start. paths: folders of other packages that the module
    imports. Close it, or use it in a `with` statement.
    """

    def __init__(
        self, module: str, ranks: int, backend: str = "gloo", *, timeout_s: float = 120.0, paths: Sequence[str] = ()
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"a back end is one of {', '.join(BACKENDS)}, not {backend!r}")
        if not 2 <= ranks <= _MAX_RANKS:
            raise ValueError(f"a group has 2 to {_MAX_RANKS} ranks, not {ranks}")
        self.ranks = ranks
        self.backend = backend
        self.timeout_s = timeout_s
        self._workers: list[_Worker] = []
        folder = Path(tempfile.mkdtemp(prefix="moesim-group-"))
        self._folder = folder
        self._end = weakref.finalize(self, _end, self._workers, folder)
        try:
            for rank in range(ranks):
                self._workers.append(_start(module, rank, ranks, backend, folder, timeout_s, paths))
            self.ready = self._answers("start")
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
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

    def ask(self, request: dict[str, Any], what: str) -> list[dict[str, Any]]:
        """The answer of every rank to one request; `what` names it in errors. Raises WorkerFailed."""
        return self.ask_each([request] * self.ranks, what)

    def ask_each(self, requests: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        """As `ask`, with a request of its own for every rank."""
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


def _start(
    module: str, rank: int, ranks: int, backend: str, folder: Path, timeout_s: float, paths: Sequence[str]
) -> _Worker:
    """One worker process, in a session of its own so that Ctrl-C reaches the parent alone."""
    ours, theirs = socket.socketpair()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    arguments = [str(theirs.fileno()), str(rank), str(ranks), backend, str(folder / "meeting"), repr(timeout_s)]
    with theirs, open(folder / f"{rank}.err", "wb") as errors:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module, no shell
            [sys.executable, "-m", module, *arguments],
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
