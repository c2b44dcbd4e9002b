"""Life of a worker of `moesim_kernels.ops.processes`: join the others, answer the parent's lines, end with it."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

__all__ = ["State", "serve"]


class State(Protocol):
    """What a worker is once it has joined. ready: what the parent is told then."""

    ready: dict[str, Any]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request of the parent, which names it by `do`."""
        ...


def serve(arguments: list[str], begin: Callable[[torch.device], State]) -> None:
    """Join, make the state of this rank, answer until told to end or until the parent is gone. `arguments`: those that
    `moesim_kernels.ops.processes` gave. Does not return."""
    fd, rank, ranks, backend, meeting, timeout_s = arguments
    line = socket.socket(fileno=int(fd))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, requests), daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        state = begin(_join(int(rank), int(ranks), backend, meeting, float(timeout_s)))
        _say(line, state.ready)
        while (request := requests.get())["do"] != "end":
            _say(line, state.answer(request))
        dist.destroy_process_group()
        os._exit(0)  # nothing is left to do, and an orderly end of torch takes a second
    except Exception as error:  # noqa: BLE001  whatever it is, the parent is told and ends the group
        _say(line, {"error": f"{type(error).__name__}: {error}"[:2000]})
        os._exit(1)


def _say(line: socket.socket, answer: dict[str, Any]) -> None:
    line.sendall(json.dumps(answer).encode() + b"\n")


def _join(rank: int, ranks: int, backend: str, meeting: str, timeout_s: float) -> torch.device:
    """The device of this rank, one thread, and the process group."""
    device = torch.device("cpu")
    if backend == "nccl":
        if torch.cuda.device_count() < ranks:
            have = torch.cuda.device_count()
            raise RuntimeError(f"nccl runs one process a GPU: {ranks} ranks, {have} CUDA devices here. Use gloo.")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return device


def _listen(line: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass the parent's requests on; when the parent is gone end at once, even within a collective."""
    with line.makefile("rb") as lines:
        for text in lines:
            requests.put(json.loads(text))
    os._exit(0)
