"""Points as rows of numbers, for distances: an ordered parameter's position in its range, a column for each value of
another; a parameter that means nothing has a column that says so.

Two values of an unordered parameter are 1 apart, as are the ends of an ordered one's range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim_tuner.records import Point
from moesim_tuner.search.gaussian import Floats
from moesim_tuner.space import Parameter, Space

__all__ = ["Encoding"]

_HALF = math.sqrt(0.5)


class Encoding:
    """column_D: the parameter of each column."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._first: list[int] = []
        columns: list[int] = []
        for index, p in enumerate(space.parameters):
            self._first.append(len(columns))
            columns += [index] * (2 if p.ordered or p.values is None else len(p.values) + 1)
        self.column_D: NDArray[np.int64] = np.array(columns, np.int64)
        self.parameters = len(space.parameters)

        self._code = [_codes(p) for p in space.parameters]

    def row(self, point: Point) -> Floats:
        """One point [D]; a value that is none of the space's counts as none."""
        out = np.zeros(len(self.column_D))
        for p, first, code in zip(self._space.parameters, self._first, self._code, strict=True):
            value = point.get(p.name)
            here = p.name in point and value in p
            if code is None:
                assert p.values is None
                out[first : first + 2] = (0.0, _share(p, float(value))) if here else (_HALF, 0.0)  # type: ignore[arg-type]
            else:
                at = p.position(value) if here else -1
                assert at is not None
                out[first : first + code.shape[1]] = code[at]
        return out

    def rows(self, points: Sequence[Point]) -> Floats:
        """Points [M, D]."""
        return np.array([self.row(point) for point in points]).reshape(len(points), len(self.column_D))

    def every_row(self, most: int) -> Floats | None:
        """All points in the order of `Space.points` [M, D]; None where they are more than `most`, or not to be
        listed."""
        count = self._space.count
        if count is None or count > most:
            return None
        parameters = self._space.parameters
        place = {p.name: i for i, p in enumerate(parameters)}
        at_MP = np.full((1, len(parameters)), -1, np.int64)
        for i, p in enumerate(parameters):
            assert p.values is not None
            on_M = np.ones(len(at_MP), bool)
            for name, values in (p.when or {}).items():
                other = parameters[place[name]]
                on_M &= np.isin(at_MP[:, place[name]], np.array([other.position(v) for v in values], np.int64))
            times_M = np.where(on_M, len(p.values), 1)
            first_M = np.cumsum(times_M) - times_M
            at_MP = np.repeat(at_MP, times_M, axis=0)
            within_M = np.arange(len(at_MP)) - np.repeat(first_M, times_M)
            at_MP[:, i] = np.where(np.repeat(on_M, times_M), within_M, -1)
        assert len(at_MP) == count
        return np.concatenate([code[at_MP[:, i]] for i, code in enumerate(self._code) if code is not None], axis=1)


def _codes(p: Parameter) -> Floats | None:
    """Columns of each value of a parameter, and, last, of its absence; None for a continuous one."""
    if p.values is None:
        return None
    number = len(p.values)
    if p.ordered:
        out = np.zeros((number + 1, 2))
        out[:number, 1] = np.arange(number) / max(number - 1, 1)
        out[number, 0] = _HALF
        return out
    out = np.zeros((number + 1, number + 1))
    out[:number, 1:] = np.eye(number) * _HALF
    out[number, 0] = _HALF
    return out


def _share(p: Parameter, value: float) -> float:
    """Where a value lies in a continuous range, 0 to 1."""
    if p.high <= p.low:
        return 0.0
    if p.log:
        return math.log(value / p.low) / math.log(p.high / p.low)
    return (value - p.low) / (p.high - p.low)
