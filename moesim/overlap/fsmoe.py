"""FSMoE's co-scheduling (arXiv:2501.10714): inter-node all-to-all, intra-node gathers and experts overlap.

Experts are split over the ranks of one node (ESP), and parts of experts sit in different nodes (EP). A chunk of a
layer's tokens goes to its experts' node by all-to-all, is gathered by the ranks of that node, computed, summed back
inside the node, and returned by all-to-all. Three streams run beside each other: between nodes, inside a node, and
compute. In the backward pass an all-reduce of gradients (`gar`) shares the stream between nodes.

The paper picks one of four closed forms by seven conditions (`fsmoe_case`). In each the program takes what the form
says or more: the forms leave out chains that cross the streams, such as gathers behind each other, then the last
chunk's experts and sum (a test states both, and how often they agree). What is simulated is the program. Degrees are
found by trying all of them, where the paper solves by SLSQP and rounds.

Units are the caller's: all times of a call in one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.overlap.timeline import Op, play

__all__ = ["Chunk", "Coefficients", "fsmoe_case", "fsmoe_gap", "fsmoe_ns", "fsmoe_paper_ns", "fsmoe_program"]

INTER, INTRA, COMPUTE = "inter-node", "intra-node", "compute"


class Chunk(NamedTuple):
    """Times of one chunk: all-to-all one way, gather and sum inside a node, experts. Numbers or arrays, in one unit."""

    a2a: AnyArray | float
    ag: AnyArray | float
    rs: AnyArray | float
    experts: AnyArray | float


class Coefficients(NamedTuple):
    """t(r) = start + size / r of each part (t = alpha + n beta / r), items (start, size)."""

    a2a: tuple[float, float]
    ag: tuple[float, float]
    rs: tuple[float, float]
    experts: tuple[float, float]

    def chunk(self, degree: AnyArray | int) -> Chunk:
        """Times of one of `degree` chunks."""
        return Chunk(*(start + size / np.asarray(degree) for start, size in self))

    def backward(self) -> Coefficients:
        """The experts' products double."""
        start, size = self.experts
        return self._replace(experts=(2 * start, 2 * size))


def fsmoe_program(
    degree: int,
    a2a: AnyArray | float,
    ag: AnyArray | float,
    rs: AnyArray | float,
    experts: AnyArray | float,
    gar: AnyArray | float = 0,
    back: AnyArray | float | None = None,
) -> list[Op]:
    """`degree` equal chunks in the order of issue: all dispatches, the gradients' all-reduce in the gap, all combines;
    all gathers, all sums. back: the combine's all-to-all where it differs from the dispatch's."""
    chunks = range(degree)
    return [
        *(Op(f"dispatch {i}", INTER, a2a) for i in chunks),
        Op("gar", INTER, gar),
        *(Op(f"gather {i}", INTRA, ag, (f"dispatch {i}",)) for i in chunks),
        *(Op(f"experts {i}", COMPUTE, experts, (f"gather {i}",)) for i in chunks),
        *(Op(f"sum {i}", INTRA, rs, (f"experts {i}",)) for i in chunks),
        *(Op(f"combine {i}", INTER, a2a if back is None else back, (f"sum {i}",)) for i in chunks),
    ]


def fsmoe_ns(
    degree: int,
    a2a: AnyArray | float,
    ag: AnyArray | float,
    rs: AnyArray | float,
    experts: AnyArray | float,
    gar: AnyArray | float = 0,
    back: AnyArray | float | None = None,
) -> AnyArray:
    """Time of `fsmoe_program`."""
    return play(fsmoe_program(degree, a2a, ag, rs, experts, gar, back)).makespan


def fsmoe_case(degree: AnyArray | int, chunk: Chunk, gar: AnyArray | float = 0) -> IntArray:
    """The paper's case, 1 to 4 (its conditions Q1 to Q7). 1: the stream between nodes, with gradients on it,
    is what counts; 2: the experts; 3: the all-to-alls; 4: the node's own collectives."""
    r, a, g, s, e, sums = _arrays(degree, chunk, gar)
    near, far = g + s, 2 * (r - 1) * a
    q1 = a > g
    q2 = r * e > far
    q3 = r * e > (r - 1) * near
    q4 = sums > near
    q5 = sums > r * e - far + near
    q6 = sums > r * near - far
    q7 = sums > near + r * e - far
    first = (q1 & ~q2 & q4) | (q1 & q2 & q5) | (~q1 & ~q3 & q6) | (~q1 & q3 & q7)
    second = (q1 & q2 & ~q5) | (~q1 & q3 & ~q7)
    third = q1 & ~q2 & ~q4
    return np.asarray(np.where(first, 1, np.where(second, 2, np.where(third, 3, 4))), np.int64)


def fsmoe_paper_ns(degree: AnyArray | int, chunk: Chunk, gar: AnyArray | float = 0) -> FloatArray:
    """The paper's time of a layer: the closed form of its case."""
    r, a, g, s, e, sums = _arrays(degree, chunk, gar)
    forms = np.stack([2 * r * a + sums, 2 * a + g + s + r * e, 2 * r * a + g + s, 2 * a + r * (g + s)])
    at = fsmoe_case(degree, chunk, gar)[None] - 1
    return np.asarray(np.take_along_axis(forms, at, 0)[0], np.float64)


def fsmoe_gap(degree: AnyArray | int, chunk: Chunk) -> FloatArray:
    """How long an all-reduce between nodes may take beside a layer without making it longer: what its time
    without gradients lies above that of its all-to-alls."""
    far = 2 * np.asarray(degree) * np.asarray(chunk.a2a)
    return np.asarray(np.maximum(fsmoe_paper_ns(degree, chunk) - far, 0.0), np.float64)


def _arrays(degree: AnyArray | int, chunk: Chunk, gar: AnyArray | float) -> list[FloatArray]:
    """All of them as numbers of one shape."""
    return [np.asarray(x, np.float64) for x in np.broadcast_arrays(degree, *chunk, gar)]
