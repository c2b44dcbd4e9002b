"""Which exchanges between ranks are measured: those of a deployment's MoE layers, and collectives of every size.

A rank is a process here: on a CPU processes over gloo, on CUDA one a GPU over NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from moesim.dtypes import dtype_bytes
from moesim_kernels.bench.plan import Case
from moesim_kernels.calibrate.deployment import Deployment

__all__ = ["collective_cases", "exchange_cases", "ranks_of"]

_HELD_OUT = 12  # of each collective and each way of the exchange: gloo scatters, and 9 are the least for an interval
_SIZES = 8
_LOPSIDED = 3  # sizes at which one rank has all tokens, too: how far the ports of a node are one medium
_MOST_PROCESSES = 8  # on a CPU: more than cores only wait for each other
_MOST_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
_RINGS = ("all_reduce", "all_gather", "reduce_scatter")


def ranks_of(d: Deployment, device: str) -> int:
    """Ranks that are measured for a deployment: those of a node. On a CPU at least two processes."""
    ranks = min(d.layout.ranks, d.layout.gpus_per_node)
    if device == "cuda":
        return ranks
    return ranks if 2 <= ranks <= _MOST_PROCESSES else 2


def exchange_cases(d: Deployment, device: str, rng: np.random.Generator) -> Iterator[Case]:
    """Dispatch and combine of one layer from one row through the busiest port up to twice an even share of the most
    tokens, and held-out ones between, whose ranks have unequal shares of the tokens.
    """
    ranks = ranks_of(d, device)
    if d.moe is None or ranks < 2:
        return
    m = d.model
    dtype = "bf16" if m.activation_dtype == "fp16" else m.activation_dtype
    shape: dict[str, Any] = {
        "ranks": ranks,
        "backend": "nccl" if device == "cuda" else "gloo",
        "hidden": m.expert_hidden,
        "slots": max(1, -(-d.slots * d.layout.ep // ranks)),
        "top_k": m.top_k,
    }
    row = round(m.expert_hidden * dtype_bytes(dtype))
    pairs = d.max_tokens * m.top_k
    most = max(1, min(pairs, 2 * pairs * (ranks - 1) // ranks, _MOST_BYTES[device] // row))
    for way in ("dispatch", "combine"):
        for rows in _ladder(most, ranks - 1):
            size: dict[str, Any] = {"bytes": rows * row, "spread": "even"}
            yield Case("token_exchange", {**shape, "way": way}, size, dtype)
        for rows in _ladder(most, 1)[-_LOPSIDED:]:
            size = {"bytes": rows * row, "spread": "one"}
            yield Case("token_exchange", {**shape, "way": way}, size, dtype)
    for i in range(_HELD_OUT):
        for way in ("dispatch", "combine"):
            size = {"bytes": _log_uniform(rng, 1, most) * row, "spread": "drawn"}
            yield Case("token_exchange", {**shape, "way": way}, size, dtype, role="heldout", seed=i + 1)


def collective_cases(device: str, ranks: int, rng: np.random.Generator) -> Iterator[Case]:
    """All-reduce, all-gather and reduce-scatter from 256 bytes on, and held-out sizes between."""
    if ranks < 2:
        return
    cuda = device == "cuda"
    shape: dict[str, Any] = {"ranks": ranks, "backend": "nccl" if cuda else "gloo"}
    least, most = 1 << 8, 1 << (28 if cuda else 24)
    for op in _RINGS:
        for moved in sorted({*(least << i for i in range(0, (most // least).bit_length(), 2)), most}):
            yield Case(op, shape, {"bytes": moved}, "fp32")
    for i in range(_HELD_OUT):
        for op in _RINGS:
            moved = 4 * _log_uniform(rng, least // 4, most // 4)
            yield Case(op, shape, {"bytes": moved}, "fp32", role="heldout", seed=i + 1)


def _ladder(most: int, step: int) -> list[int]:
    """Multiples of `step` rows up to `most` or beyond, their logarithms even."""
    return sorted({round(n) * step for n in np.geomspace(1, max(1, -(-most // step)), _SIZES)})


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """A whole number from `least` to `most`, its logarithm uniform."""
    low, high = math.log(least), math.log(most + 1)
    return max(least, min(most, int(math.exp(rng.uniform(low, high)))))
