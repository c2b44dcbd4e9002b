"""A MoE layer in chunks of its tokens: exchange on one stream, experts on the other (Tutel, PipeMoE).

Tutel (arXiv:2206.03382) and PipeMoE (INFOCOM 2023) cut the tokens of a layer into r chunks and issue all
dispatches, then the experts, then all combines: chunk i's experts run while later chunks arrive and earlier ones
return. Each chunk launches every kernel again and reads the experts' weights again, which is why r is a choice.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import AnyArray
from moesim.overlap.timeline import Op

__all__ = ["pipeline_ns", "pipeline_program"]


def pipeline_program(
    degree: int, dispatch: AnyArray | float, experts: AnyArray | float, combine: AnyArray | float
) -> list[Op]:
    """`degree` equal chunks, in the order of issue; the times are those of one chunk."""
    chunks = range(degree)
    return [
        *(Op(f"dispatch {i}", "exchange", dispatch) for i in chunks),
        *(Op(f"experts {i}", "compute", experts, (f"dispatch {i}",)) for i in chunks),
        *(Op(f"combine {i}", "exchange", combine, (f"experts {i}",)) for i in chunks),
    ]


def pipeline_ns(
    degree: int, dispatch: AnyArray | float, experts: AnyArray | float, combine: AnyArray | float
) -> AnyArray:
    """Time of `pipeline_program`, closed: the longest way through it.

    Chunk i's experts end at max(i d + e, d + i e); the last combine ends after r d + r c, or r - i + 1 combines after
    chunk i's experts, which is linear in i on either side, so largest for the first or the last chunk.
    """
    r, d, e, c = degree, dispatch, experts, combine
    first = d + e + r * c
    last = np.maximum(r * d + e, d + r * e) + c
    return np.maximum(np.maximum(first, last), r * (d + c))
