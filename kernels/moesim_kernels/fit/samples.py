"""Timed points of one operator variant: what every fit here reads, from tables or from our own clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Key", "Samples", "sample_points"]

Key = tuple[int | str, ...]
_KEY_NAMES = {
    "gemm": ("n", "k"),
    "router": ("hidden", "experts", "top_k"),
    "router_backward": ("hidden", "experts", "top_k"),
    **dict.fromkeys(("moe", "moe_dgrad", "moe_wgrad"), ("hidden", "inter", "slots", "top_k", "dtype", "matrices")),
    **dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), ("ranks",)),
    "all_to_all": ("kind", "ranks"),
}
_NO_NUMBERS = ("elementwise", "copy", "storage", "block")
_GQA = ("kind", "heads", "kv_heads", "dim", "v_dim", "window")


@dataclass
class Samples:
    """Timed points of one operator variant, all on one device.

    op: a name of `moesim.hardware.OPERATORS`. variant: whose physics (`fits` of a profile). key[i]: shape of point i,
    in the order `moesim.cost.operators` documents. size: its sizes on the curve's axes, [points, axes]: gemm rows; moe
    (token, expert) pairs on the rank; router and block tokens; attention (batch, length), length being the new tokens
    of a sequence (prefill) or its context (decode); every other operator bytes. ns: [points].

    extra: numbers by name, each [points]. gemm: n, k. moe: hidden, inter, matrices, active (experts with a row), other
    (pairs of other ranks that the kernel touches). attention: heads, kv_heads, dim, v_dim, window, and kv (keys in
    all, prefill on a prefix). all_to_all: ranks, total (bytes that all ranks send to others). `sample_points` fills
    them in. counts: of moe, tokens by expert slot for every point; None: as even as can be over `active`. dtype: what
    multiplies (empty: the variant says so). source: place in the profile's `curve_sources`. refused: points left out as
    impossible.
    """

    op: str
    variant: str
    key: list[tuple[Any, ...]]
    size: NDArray[np.float64]
    ns: NDArray[np.float64]
    source: int = 0
    extra: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    refused: int = 0
    counts: list[NDArray[np.int64]] | None = None
    dtype: str = ""

    def where(self, mask: ArrayLike) -> Samples:
        """The points of `mask` (booleans, or places)."""
        chosen = np.asarray(mask)
        places = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.intp)
        keys = [self.key[i] for i in places.tolist()]
        counts = None if self.counts is None else [self.counts[i] for i in places.tolist()]
        extra = {name: values[places] for name, values in self.extra.items()}
        return replace(self, key=keys, size=self.size[places], ns=self.ns[places], extra=extra, counts=counts)

    def by_key(self) -> dict[tuple[Any, ...], NDArray[np.intp]]:
        """Places of each shape's points, shapes in order of first appearance."""
        out: dict[tuple[Any, ...], list[int]] = {}
        for i, key in enumerate(self.key):
            out.setdefault(key, []).append(i)
        return {key: np.array(rows, dtype=np.intp) for key, rows in out.items()}


def sample_points(
    op: str,
    variant: str,
    key: Sequence[Key],
    size: ArrayLike,
    ns: ArrayLike,
    *,
    counts: Sequence[ArrayLike] | None = None,
    kv: ArrayLike | None = None,
    total: ArrayLike | None = None,
    dtype: str = "",
) -> Samples:
    """Samples with the `extra` that the operator's physics needs, read off the keys.

    counts (moe): rows of each expert slot, one array a point; their sum must be the point's size. kv (prefill): keys in
    all, where a prefix was cached. total (all_to_all): bytes that all ranks send to others. Raises ValueError where
    lengths or sums disagree.
    """
    times = np.asarray(ns, dtype=np.float64)
    sizes = np.asarray(size, dtype=np.float64).reshape(len(times), -1)
    if not len(key) == len(sizes) == len(times):
        raise ValueError(f"keys, sizes and times must be as many: {len(key)}, {len(sizes)}, {len(times)}")
    if len(times) and not (np.isfinite(times).all() and times.min() > 0):
        raise ValueError("times must be finite and positive")
    names = _KEY_NAMES.get(op, _GQA)
    if op.startswith("attention") and key and key[0][0] == "mla":
        names = ("kind", "heads")
    columns = {} if op in _NO_NUMBERS else _columns(key, names)
    histograms = None
    if op.startswith("moe"):
        columns["other"] = np.zeros(len(times))
        columns["active"] = np.minimum(columns.pop("slots"), sizes[:, 0])
        if counts is not None:
            histograms = [np.asarray(c, dtype=np.int64) for c in counts]
            if [float(c.sum()) for c in histograms] != sizes[:, 0].tolist():
                raise ValueError("the rows of the expert slots must add up to each point's size")
            columns["active"] = np.array([float((c > 0).sum()) for c in histograms])
    if kv is not None:
        columns["kv"] = np.asarray(kv, dtype=np.float64)
    if total is not None:
        columns["total"] = np.asarray(total, dtype=np.float64)
    return Samples(op, variant, [tuple(k) for k in key], sizes, times, 0, columns, 0, histograms, dtype)


def _columns(key: Sequence[Key], names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """Numbers of the keys by name."""
    wanted = [(i, name) for i, name in enumerate(names) if name not in ("kind", "dtype")]
    return {name: np.array([float(k[i]) for k in key]) for i, name in wanted}
