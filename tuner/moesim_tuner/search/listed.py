"""Points without a model: all in a row, or drawn; and a point in the place of one that has been tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moesim.errors import BadInput
from moesim.rng import generator
from moesim_tuner.records import Point, Trial
from moesim_tuner.space import Scalar, Space

__all__ = ["Grid", "Random", "untried"]


class Grid:
    """Every point, in the order of the values. Raises BadInput for a space that cannot be listed."""

    def __init__(self, space: Space) -> None:
        if space.count is None:
            raise BadInput(
                "tune.sampler: grid takes every point in turn, and a continuous parameter has no list of values; give "
                "it a step or a factor, or choose another sampler"
            )
        self._space, self._told = space, 0
        self._keys: set[str] = set()

    def tell(self, trial: Trial) -> None:
        """The next trial."""
        self._keys.add(self._space.key(trial.point))

    def propose(self, count: int, pending: Sequence[Point]) -> list[dict[str, Scalar]]:
        """The next points that are new."""
        assert self._space.count is not None
        taken = self._keys | {self._space.key(point) for point in pending}
        out: list[dict[str, Scalar]] = []
        at = self._told
        while len(out) < count and at < self._space.count:
            point = self._space.at(at)
            if self._space.key(point) not in taken:
                out.append(point)
            elif at == self._told and self._space.key(point) in self._keys:
                self._told += 1  # told, and so never looked at again
            at += 1
        return out


class Random:
    """Each point as likely."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed, self._told = space, seed, 0

    def tell(self, trial: Trial) -> None:
        """The next trial."""
        self._told += 1

    def propose(self, count: int, pending: Sequence[Point]) -> list[dict[str, Scalar]]:
        """Draws; some may have been told before."""
        return [
            self._space.random(generator(self._seed, "tune/random", self._told, len(pending) + place))
            for place in range(count)
        ]


def untried(
    space: Space, point: dict[str, Scalar], tried: Callable[[Point], bool], left: int | None, rng: np.random.Generator
) -> dict[str, Scalar] | None:
    """`point` where it is new, else a neighbour that is, else a draw, else the next of the list. left: how many points
    of the space are new; None: no end of them. None where there is none."""
    if not tried(point):
        return point
    if left == 0:
        return None
    near = [p for p in space.neighbours(point) if not tried(p)]
    if near:
        return near[int(rng.integers(len(near)))]
    for _ in range(64):
        drawn = space.random(rng)
        if not tried(drawn):
            return drawn
    if space.count is None:
        return None
    first = int(rng.integers(min(space.count, 1 << 62)))
    for step in range(space.count):
        listed = space.at((first + step) % space.count)
        if not tried(listed):
            return listed
    return None
