"""The process that workers are forked from: it has imported everything, runs one thread, and does nothing else.

A fork takes milliseconds where an interpreter with its imports takes a second, and forking from here is safe where
forking from the coordinator, which has threads, is not. It lives in a process group of its own, so Ctrl-C reaches the
coordinator alone; when the coordinator is gone, however it went, its end of the socket closes, and the nursery
kills its workers and ends. Workers see the same by themselves (a thread reads their socket, and the kernel kills them
should the nursery be gone).

Control: the coordinator sends `s<id>` with a socket (start a worker on it) or `k<id>` (kill it), eight digits each;
the nursery answers with messages ("ready",), ("started", id, pid), ("failed", id, why), ("died", id, exit code) or
("broken", why).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from moesim_tuner.workers.frames import receive, send

__all__ = ["ORDER_BYTES", "main"]

ORDER_BYTES = 9
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(control_fd: int, function: str) -> NoReturn:
    """Import `module:name`, which tasks are given to, then start and bury workers until the coordinator is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    try:
        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
    except BaseException as error:  # noqa: BLE001  whatever stops the import, the user is told of it
        with contextlib.suppress(OSError):
            send(control, ("broken", f"{type(error).__name__}: {' '.join(str(error).split())}"))
        os._exit(1)
    gc.collect()
    gc.freeze()  # pages that a worker's collector never touches stay shared
    read_end, write_end = os.pipe()
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    pids: dict[int, int] = {}
    try:
        send(control, ("ready",))
        while True:
            ready = select.select([control.fileno(), read_end], [], [])[0]
            if read_end in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read_end, 4096)
                _bury(control, pids)
            if control.fileno() in ready and not _order(control, pids, run, (read_end, write_end)):
                break
    except OSError:  # the coordinator is gone
        pass
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    for pid in pids.values():
        os.waitpid(pid, 0)
    os._exit(0)


def _order(control: socket.socket, pids: dict[int, int], run: Callable[[Any], Any], mine: tuple[int, int]) -> bool:
    """Carry out one order; False where the coordinator is gone."""
    message, fds, _, _ = socket.recv_fds(control, ORDER_BYTES, 1)
    while message and len(message) < ORDER_BYTES:
        more = control.recv(ORDER_BYTES - len(message))
        if not more:
            return False
        message += more
    if not message:
        return False
    worker = int(message[1:])
    if message[:1] == b"k":
        if worker in pids:
            os.kill(pids[worker], signal.SIGKILL)
        return True
    try:
        pid = os.fork()
    except OSError as error:
        os.close(fds[0])
        send(control, ("failed", worker, error.strerror or str(error)))
        return True
    if pid == 0:
        control.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in mine:
            os.close(end)
        _work(fds[0], run)
    os.close(fds[0])
    pids[worker] = pid
    send(control, ("started", worker, pid))
    return True


def _bury(control: socket.socket, pids: dict[int, int]) -> None:
    """Tell the coordinator of workers that ended."""
    for worker, pid in list(pids.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del pids[worker]
            send(control, ("died", worker, os.waitstatus_to_exitcode(status)))


def _work(fd: int, run: Callable[[Any], Any]) -> NoReturn:
    """A worker: tasks come, results go."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # Linux
    channel = socket.socket(fileno=fd)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                tasks.put(receive(channel))
        except BaseException:  # noqa: BLE001  the coordinator is gone, or sent what cannot be read
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            send(channel, run(tasks.get()))
    except BaseException:  # noqa: BLE001  nothing of this process may go on in its parent's frames
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)
