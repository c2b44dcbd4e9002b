"""Two micro-batches of one step: one computes while the other exchanges tokens.

DeepSeek-V3 (arXiv:2412.19437, section 3.4) serves so, and SGLang issues it in two orders (its operations_strategy.py):

- *aligned*, for prompts: own A, own B, experts A, experts B, so that A's dispatch runs beside B's own part, B's
  dispatch beside A's experts, A's combine beside B's experts and B's combine beside A's next own part;
- *shifted*, for decode: A is half a layer ahead and B's own part is cut in two, so that A's dispatch runs beside the
  first piece of B's own part and A's combine beside the second, and the other way round.

`own` is what a rank computes by itself between two exchanges: attention, norms, router, shared expert, dense layers.
Where SGLang cuts it, and that its shared expert runs while a combine is under way, is simplified: own parts are cut in
the middle, and the shared expert is part of them. Compute is one stream and the exchange another.

Legend: L MoE layers. The two micro-batches are the leading axis of 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.overlap.timeline import Op

__all__ = ["Halves", "Order", "two_batch_ns", "two_batch_program"]

Order = Literal["aligned", "shifted"]


class Halves(NamedTuple):
    """ns of each micro-batch: what a rank computes by itself before each MoE layer and after the last one, L + 1 items
    of [2, ...]; dispatch, experts and combine of each MoE layer, L items of [2, ...]."""

    own: Sequence[AnyArray]
    dispatch: Sequence[AnyArray]
    experts: Sequence[AnyArray]
    combine: Sequence[AnyArray]


class _Issue(NamedTuple):
    """What is issued next: `own` with piece 0 or 1 (2: whole), or `experts`; of a half and a layer."""

    what: str
    half: int
    layer: int
    piece: int = 2


def _order(layers: int, order: Order) -> Iterator[_Issue]:
    """The compute stream's operations. A dispatch is issued right behind the own part, a combine behind the experts."""
    for layer in range(layers + 1):
        if order == "aligned":
            yield _Issue("own", 0, layer)
            yield _Issue("own", 1, layer)
            if layer < layers:
                yield _Issue("experts", 0, layer)
                yield _Issue("experts", 1, layer)
            continue
        yield _Issue("own", 0, layer, 0)
        if layer:
            yield _Issue("experts", 1, layer - 1)
        yield _Issue("own", 0, layer, 1)
        yield _Issue("own", 1, layer, 0)
        if layer < layers:
            yield _Issue("experts", 0, layer)
        yield _Issue("own", 1, layer, 1)


def _piece(ns: AnyArray, piece: int) -> AnyArray:
    return ns if piece == 2 else ns // 2 if piece == 0 else ns - ns // 2


def two_batch_program(halves: Halves, order: Order) -> list[Op]:
    """The operations in the order of issue."""
    layers = len(halves.experts)
    out: list[Op] = []
    for what, half, layer, piece in _order(layers, order):
        at = f"{half} {layer}"
        if what == "experts":
            out.append(Op(f"experts {at}", "compute", halves.experts[layer][half], (f"dispatch {at}",)))
            out.append(Op(f"combine {at}", "exchange", halves.combine[layer][half], (f"experts {at}",)))
            continue
        name = f"own {at} {piece}"
        after = (f"combine {half} {layer - 1}",) if layer else ()
        out.append(Op(name, "compute", _piece(halves.own[layer][half], piece), after))
        if piece and layer < layers:
            out.append(Op(f"dispatch {at}", "exchange", halves.dispatch[layer][half], (name,)))
    return out


def two_batch_ns(halves: Halves, order: Order) -> IntArray:
    """Time of `two_batch_program`, for any shape [...] at once."""
    layers = len(halves.experts)
    zero = np.zeros(np.shape(halves.own[0])[1:], np.int64)
    busy, wire = zero, zero  # when the compute and the exchange stream are free
    there, back = [zero, zero], [zero, zero]  # when each half's last dispatch, and combine, has ended
    for what, half, layer, piece in _order(layers, order):
        if what == "experts":
            busy = np.maximum(busy, there[half]) + halves.experts[layer][half]
            wire = back[half] = np.maximum(wire, busy) + halves.combine[layer][half]
            continue
        busy = np.maximum(busy, back[half]) + _piece(halves.own[layer][half], piece)
        if piece and layer < layers:
            wire = there[half] = np.maximum(wire, busy) + halves.dispatch[layer][half]
    return np.asarray(np.maximum(busy, wire))
