"""From a recording (or a pool of routed tokens) to rows that are batches of the size that the deployment serves.

A row of a recording is one forward pass, or the sum of many. Its tokens are cut down to a batch by keeping each with
the same chance (binomial thinning), which leaves what a batch of independent tokens of that moment is; rows with too
few tokens are first added to their neighbours. So balance is judged on batches with the noise of their finite size,
not on long means.

Legend: R rows, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.arrays import IntArray
from moesim.errors import BadInput
from moesim.rng import generator
from moesim.workload.loads import ExpertLoads

__all__ = ["Rows", "batch_rows", "thinned"]

_CELLS = 1 << 19
"""(row, layer, expert) cells that are priced for a candidate; more layers than that are sampled evenly"""
_ROWS = 192
_LEAST_LAYERS = 8
_LEAST_TIMED = 8
_PARTS = 48


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in time order. seen_RLE: pairs as recorded, what a placement is fitted on. half_RLE: a half of them, drawn
    at random. batch_RLE: pairs of a batch of `tokens` tokens of each row; rest_RLE: the same from the half that
    `half_RLE` leaves. row_steps: steps of the engine that a row stands for. layers: which layers of the recording.
    timed: rows follow each other in time; else they are dealt at random, and only one placement for all can be judged.
    """

    seen_RLE: IntArray
    batch_RLE: IntArray
    half_RLE: IntArray
    rest_RLE: IntArray
    tokens: int
    row_steps: float
    layers: IntArray
    timed: bool
    notes: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """R."""
        return len(self.seen_RLE)


def _layers(layers: int, rows: int, experts: int) -> IntArray:
    """All layers, or evenly spaced ones where pricing all would take long."""
    take = min(layers, max(_LEAST_LAYERS, _CELLS // max(rows * experts, 1)))
    return np.unique(np.linspace(0, layers - 1, take).round().astype(np.int64))


def batch_rows(loads: ExpertLoads, tokens: int, top_k: int, seed: int) -> Rows:
    """Rows of at least `tokens` tokens each, at most 192 of them, and a batch of each.

    Raises BadInput where the recording has not even two batches of tokens.
    """
    count, notes = loads.count_SLE, []
    held = float(count.sum(dtype=np.float64)) / (loads.num_layers * top_k)
    if held < 2 * tokens:
        raise BadInput(
            f"a step of this deployment has {tokens:,} tokens and the recording {held:,.0f} in all; record longer, or"
            " lower engine.max_num_seqs with --set",
            loads.source,
        )
    merge = max(1, int(np.ceil(0.98 * tokens / (held / loads.num_rows))), -(-loads.num_rows // _ROWS))
    if merge > 1:
        whole = loads.num_rows // merge * merge
        notes.append(f"{merge} rows of the recording make one row here")
        if whole < loads.num_rows:
            notes.append(f"the last {loads.num_rows - whole} rows are left out")
        count = np.add.reduceat(count[:whole], np.arange(0, whole, merge), axis=0)
    rng = generator(seed, "explain_eplb/rows")
    timed = loads.ordered and loads.steps_per_row > 0 and len(count) >= _LEAST_TIMED
    if not timed:
        count = _untimed(count, min(_PARTS, int(held // tokens)), rng)
    layers = _layers(loads.num_layers, len(count), loads.num_experts)
    if len(layers) < loads.num_layers:
        notes.append(f"{len(layers)} of {loads.num_layers} layers, evenly spaced, stand for all")
        count = count[:, layers]
    half = rng.binomial(count, 0.5)
    target = float(tokens) * top_k
    return Rows(
        seen_RLE=count,
        batch_RLE=thinned(count, target, rng),
        half_RLE=half,
        rest_RLE=thinned(count - half, target, rng),
        tokens=tokens,
        row_steps=float(max(loads.steps_per_row, 1)) * merge,
        layers=layers,
        timed=timed,
        notes=tuple(notes),
    )


def _untimed(count_RLE: IntArray, parts: int, rng: np.random.Generator) -> IntArray:
    """Rows in random order; where there are few, their pairs dealt at random to `parts` rows."""
    if len(count_RLE) >= parts:
        return rng.permutation(count_RLE)
    left, dealt = count_RLE.sum(axis=0), []
    for more in range(parts, 0, -1):
        dealt.append(rng.binomial(left, 1.0 / more))
        left = left - dealt[-1]
    return np.stack(dealt)


def thinned(count_RLE: IntArray, target: float, rng: np.random.Generator) -> IntArray:
    """Each pair kept with the same chance, so that a layer has `target` of them in the mean over rows. Then every layer
    is scaled to `target` (a batch has a given number of tokens), as are rows that had fewer, and rounded."""
    total = count_RLE.sum(axis=-1, keepdims=True).astype(np.float64)
    keep = np.minimum(1.0, target / np.maximum(total, 1.0))
    drawn = rng.binomial(count_RLE, np.broadcast_to(keep, count_RLE.shape))
    scale = target / np.maximum(drawn.sum(axis=-1, keepdims=True), 1)
    return np.asarray(np.rint(drawn * scale), np.int64)
