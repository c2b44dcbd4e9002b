"""Operations on streams: the reference that every closed form of this package is tested against.

A stream runs its operations one after the other in the order they are issued, each not before what it waits for has
ended: the semantics of CUDA streams and events. The order is part of the program, because systems fix it when they
issue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray

__all__ = ["Op", "Timeline", "bounds", "play"]


class Op(NamedTuple):
    """One operation. ns: how long it takes, a number or an array (operations of a program broadcast). after: names of
    operations that must have ended."""

    name: str
    stream: str
    ns: AnyArray | float
    after: tuple[str, ...] = ()


class Timeline(NamedTuple):
    """When each operation starts and ends, by name, and when the last one ends; arrays of the program's shape."""

    start: dict[str, AnyArray]
    end: dict[str, AnyArray]
    makespan: AnyArray


def play(program: Sequence[Op]) -> Timeline:
    """Run the operations as they are issued.

    Raises ValueError where a name occurs twice or an operation waits for one that is issued later.
    """
    times = [op.ns for op in program]
    zero = np.zeros(np.broadcast_shapes(*(np.shape(ns) for ns in times)), np.result_type(*times))
    start: dict[str, AnyArray] = {}
    end: dict[str, AnyArray] = {}
    free: dict[str, AnyArray] = {}
    for op in program:
        if op.name in end:
            raise ValueError(f"operations have names of their own: {op.name!r} is issued twice")
        ready = free.get(op.stream, zero)
        for name in op.after:
            if name not in end:
                raise ValueError(f"an operation waits for one issued before it: {op.name!r} waits for {name!r}")
            ready = np.maximum(ready, end[name])
        start[op.name] = ready
        end[op.name] = free[op.stream] = ready + op.ns
    return Timeline(start, end, np.maximum.reduce(list(free.values())) if free else zero)


def bounds(program: Sequence[Op]) -> tuple[AnyArray, AnyArray]:
    """What no order can beat: the busiest stream's total, and the longest chain of operations that wait for each
    other."""
    total: dict[str, AnyArray | float] = {}
    chain: dict[str, AnyArray | float] = {}
    for op in program:
        total[op.stream] = total.get(op.stream, 0) + op.ns
        before: AnyArray | float = 0
        for name in op.after:
            before = np.maximum(before, chain[name])
        chain[op.name] = before + op.ns
    return _largest(total.values()), _largest(chain.values())


def _largest(values: Iterable[AnyArray | float]) -> AnyArray:
    out: AnyArray = np.zeros((), np.int64)
    for value in values:
        out = np.maximum(out, value)
    return out
