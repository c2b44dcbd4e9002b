"""Measured residuals: ln(measured / physics) over log sizes, looked up for one shape of one operator.

A shape that was measured uses its own curve. Another shape takes a median of its neighbours', by nearness, and is
graded extrapolated; without any curve near it physics stands alone. Log-linear interpolation, the edge value beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import BoolArray, FloatArray, U8Array
from moesim.hardware import ASSUMED, EXTRAPOLATED, INTERPOLATED, MEASURED, Curve, DeviceProfile

__all__ = ["Residual", "blend", "residual_of"]

Key = tuple[int | str, ...]
_REACH = 0.3  # distance, in summed |ln ratio| of sizes, over which a neighbour's weight falls by e
_LIMIT = 1.6  # beyond it physics stands alone
_NEIGHBOURS = 8


class _Axis:
    """Sizes along one axis, with what a look-up needs."""

    __slots__ = ("first", "last", "logs", "sizes", "steps")

    def __init__(self, sizes: FloatArray) -> None:
        self.sizes = sizes
        self.logs = np.log(sizes)
        self.steps = np.diff(self.logs)
        self.first, self.last = float(sizes[0]), float(sizes[-1])

    def cell(self, size: FloatArray) -> tuple[NDArray[np.intp], FloatArray, BoolArray, BoolArray]:
        """Cell, place in it (0..1, the edge beyond the axis), outside the axis, on a knot or outside."""
        outside = (size < self.first) | (size > self.last)
        top = len(self.steps) - 1
        if top < 0:
            return np.zeros(size.shape, np.intp), np.zeros(size.shape), outside, np.ones(size.shape, np.bool_)
        cell = np.minimum(np.maximum(np.searchsorted(self.sizes, size, side="right") - 1, 0), top)
        place = (np.log(np.maximum(size, 1e-9)) - self.logs[cell]) / self.steps[cell]
        place = np.minimum(np.maximum(place, 0.0), 1.0)
        return cell, place, outside, (place == 0.0) | (place == 1.0)


class Residual:
    """One shape's residual: a curve (None: physics alone), whose physics, and the best grade it can give."""

    def __init__(self, curve: Curve | None, variant: str, bare: np.uint8) -> None:
        self.curve = curve
        self.variant = variant
        self.bare = bare
        self._axes = [_Axis(a) for a in curve.axes] if curve is not None else []

    @property
    def exact(self) -> bool:
        """The shape itself was measured."""
        return self.curve is not None and self.bare == MEASURED

    def at(self, sizes: Sequence[FloatArray]) -> tuple[FloatArray | float, U8Array]:
        """Log residual and grade at points; one array for each axis of the curve, all of one shape."""
        if self.curve is None:
            return 0.0, np.full(sizes[0].shape, self.bare, dtype=np.uint8)
        value, grade = self._line(sizes[0]) if len(self._axes) == 1 else self._plane(sizes[0], sizes[1])
        return value, grade if self.exact else np.asarray(np.maximum(grade, self.bare))

    def _line(self, size: FloatArray) -> tuple[FloatArray, U8Array]:
        assert self.curve is not None
        ratio = self.curve.log_ratio
        cell, place, outside, on_knot = self._axes[0].cell(size)
        after = cell + (1 if len(ratio) > 1 else 0)
        low = ratio[cell]
        value: FloatArray = low + place * (ratio[after] - low)
        return value, self._grade(
            outside, on_knot, np.where(place < 1.0, cell, after), np.where(place > 0.0, after, cell)
        )

    def _plane(self, first: FloatArray, second: FloatArray) -> tuple[FloatArray, U8Array]:
        """Bilinear in the two logs."""
        assert self.curve is not None
        i, fi, out_i, on_i = self._axes[0].cell(first)
        j, fj, out_j, on_j = self._axes[1].cell(second)
        rows, columns = self.curve.log_ratio.shape
        flat = self.curve.log_ratio.ravel()
        step_i, step_j = (columns if rows > 1 else 0), (1 if columns > 1 else 0)
        corner = i * columns + j
        low = flat[corner]
        low = low + fj * (flat[corner + step_j] - low)
        high = flat[corner + step_i]
        high = high + fj * (flat[corner + (step_i + step_j)] - high)
        value: FloatArray = low + fi * (high - low)
        if self.curve.grade is None:
            return value, self._grade(out_i | out_j, on_i & on_j, corner, corner)
        near = corner + np.where(fi == 1.0, step_i, 0) + np.where(fj == 1.0, step_j, 0)
        far = corner + np.where(fi > 0.0, step_i, 0) + np.where(fj > 0.0, step_j, 0)
        return value, self._grade(out_i | out_j, on_i & on_j, near, far)

    def _grade(self, outside: BoolArray, on_knot: BoolArray, near: NDArray[np.intp], far: NDArray[np.intp]) -> U8Array:
        """Measured on a knot, interpolated between; no better than the weaker of two opposite corners."""
        assert self.curve is not None
        grade = np.where(on_knot, MEASURED, INTERPOLATED)
        if self.curve.grade is not None:
            known = self.curve.grade.ravel()
            grade = np.maximum(grade, np.maximum(known[near], known[far]))
        return np.where(outside, EXTRAPOLATED, grade)


def residual_of(profile: DeviceProfile, op: str, key: Key, variant: str, eager: bool, scaled: int = -1) -> Residual:
    """The residual of a shape, by its key. `scaled`: place in the key that stretches the first axis (-1: none).

    Curves of variants that end in `@eager` count only when `eager`; then they come first.
    """
    curves = [c for c in profile.curves.get(op, ()) if eager or not c.variant.endswith("@eager")]
    if eager:
        curves.sort(key=lambda c: not c.variant.endswith("@eager"))
    if not curves:
        bare = EXTRAPOLATED if profile.kind == "measured" and op in profile.fits else ASSUMED
        return Residual(None, variant, bare)
    for curve in curves:
        if curve.key == key:
            return Residual(curve, curve.variant, MEASURED)
    return blend(curves, key, scaled, variant)


def blend(curves: Sequence[Curve], key: Key, scaled: int, variant: str) -> Residual:
    """A shape that was not measured: at each point the median of its neighbours' residuals, weighted by nearness.

    Weights fall by e for each `_REACH` of distance (summed |ln ratio| of sizes); physics alone (no residual) weighs
    as much as a neighbour `_LIMIT` away. A median, because a few measured shapes hit a badly chosen kernel. All are
    taken on the nearest one's axes, and only those with its physics count.
    """
    near = sorted(((_distance(c.key, key), i) for i, c in enumerate(curves)))[:_NEIGHBOURS]
    near = [(d, i) for d, i in near if d <= _LIMIT]
    if not near:
        return Residual(None, variant, EXTRAPOLATED)
    first = curves[near[0][1]]

    def stretch(curve: Curve) -> float:
        return float(key[scaled]) / float(curve.key[scaled]) if scaled >= 0 else 1.0

    axes = (first.axes[0] * stretch(first), *first.axes[1:])
    grid = [a.ravel() for a in np.meshgrid(*axes, indexing="ij")]
    values, weights = [np.zeros(grid[0].shape)], [math.exp(-_LIMIT / _REACH)]
    for distance, i in near:
        curve = curves[i]
        if curve.variant == first.variant and len(curve.axes) == len(axes):
            at = (grid[0] / stretch(curve), *grid[1:])
            values.append(np.asarray(Residual(curve, curve.variant, MEASURED).at(at)[0]))
            weights.append(math.exp(-distance / _REACH))
    ratio = _weighted_median(np.array(values), np.array(weights)).reshape([len(a) for a in axes])
    return Residual(Curve(key, first.variant, axes, ratio), first.variant, EXTRAPOLATED)


def _weighted_median(value_VP: FloatArray, weight_V: FloatArray) -> FloatArray:
    """Of each column: where half of the weight is reached, linearly between the two values around it."""
    order = np.argsort(value_VP, axis=0)
    value = np.take_along_axis(value_VP, order, axis=0)
    weight = weight_V[order]
    middle = np.cumsum(weight, axis=0) - weight / 2
    half = weight_V.sum() / 2
    return np.array([np.interp(half, middle[:, p], value[:, p]) for p in range(value.shape[1])])


def _distance(a: Key, b: Key) -> float:
    """Summed |ln ratio| of sizes; infinite where names differ or only one is zero."""
    if len(a) != len(b):
        return math.inf
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x == y:
            continue
        if isinstance(x, str) or isinstance(y, str) or x <= 0 or y <= 0:
            return math.inf
        total += abs(math.log(x / y))
    return total
