"""Which points next: `strategy` makes what the coordinator asks (`protocols.Strategy`).

The default, the user's own and the heuristics come first; then a sampler. `auto` is a model of our own (`surrogate`);
`tpe`, `nsga2` and `gp` are Optuna's (`optuna_view`); `random` and `grid` need none (`listed`). Which one a study uses
is decided when it is made (`choose_sampler`) and kept with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

from moesim.rng import generator
from moesim_tuner.definition import Definition
from moesim_tuner.records import Candidate, Point, Trial
from moesim_tuner.search.listed import Grid, Random, untried
from moesim_tuner.space import Scalar, Space

__all__ = ["SAMPLERS", "Search", "choose_sampler", "strategy"]

SAMPLERS = ("surrogate", "tpe", "nsga2", "gp", "random", "grid")


@cache
def _blas() -> Any:
    """The linear algebra libraries of this process; NumPy's and SciPy's are loaded first, so that they are found."""
    import numpy.linalg  # noqa: F401
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class _Sampler(Protocol):
    def tell(self, trial: Trial) -> None: ...

    def propose(self, count: int, pending: Sequence[Point]) -> list[dict[str, Scalar]]: ...


def choose_sampler(definition: Definition) -> str:
    """What `tune.sampler` means for this study, on every machine: one of SAMPLERS. `auto` lists a space that the
    study's trials can go through whole, and models any other.

    Raises BadInput for a sampler that cannot be had: `gp` without PyTorch or for many parameters, `grid` for a
    continuous space.
    """
    asked, count = definition.spec.sampler, definition.space.count
    if asked == "auto":
        return "grid" if count is not None and count <= definition.spec.trials else "surrogate"
    if asked == "gp":
        from moesim_tuner.search.optuna_view import check_gp

        check_gp(definition.space)
    elif asked == "grid":
        Grid(definition.space)
    return asked


def strategy(definition: Definition, starts: Sequence[Candidate] = ()) -> Search:
    """The strategy of a study. starts: proposed first, in their order. Raises BadInput as `choose_sampler` does."""
    space, spec, sampler = definition.space, definition.spec, definition.sampler
    figures = (spec.objectives, definition.signs, tuple(spec.constraints))
    made: _Sampler
    if sampler == "surrogate":
        from moesim_tuner.search.surrogate import Surrogate

        made = Surrogate(space, *figures, spec.seed, spec.trials)
    elif sampler in ("tpe", "nsga2", "gp"):
        from moesim_tuner.search.optuna_view import OptunaSampler

        made = OptunaSampler(sampler, space, *figures, spec.seed, spec.trials)
    else:
        assert sampler in ("random", "grid"), sampler
        made = Grid(space) if sampler == "grid" else Random(space, spec.seed)
    return Search(space, made, sampler, starts, spec.seed)


class Search:
    """`protocols.Strategy`: starts, then a sampler's points, none of them twice."""

    def __init__(self, space: Space, made: _Sampler, name: str, starts: Sequence[Candidate], seed: int) -> None:
        self.name = name
        self._space, self._sampler, self._seed = space, made, seed
        self._starts = tuple(starts)
        self._told = 0
        self._keys: set[str] = set()
        self._of_space = 0
        self._pending: dict[str, Point] = {}

    def tell(self, trials: Iterable[Trial]) -> None:
        """See `protocols.Strategy`."""
        for trial in trials:
            key = self._space.key(trial.point)
            self._pending.pop(key, None)
            self._sampler.tell(trial)
            self._told += 1
            self._of_space += key not in self._keys and trial.point in self._space
            self._keys.add(key)

    def propose(self, count: int) -> list[Candidate]:
        """See `protocols.Strategy`."""
        batch: list[Candidate] = []
        taken = self._keys | set(self._pending)
        pending = list(self._pending.values())

        def tried(point: Point) -> bool:
            return self._space.key(point) in taken

        def take(point: Point, origin: str) -> None:
            batch.append(Candidate(dict(point), origin))
            taken.add(self._space.key(point))
            pending.append(point)

        for start in self._starts:
            if len(batch) < count and not tried(start.point):
                take(start.point, start.origin)
        left = self._left(pending)
        wanted = count - len(batch) if left is None else min(count - len(batch), left)
        # one thread: products of small matrices, and the same rounding whatever cores there are
        with _blas().limit(limits=1, user_api="blas"):
            found = self._sampler.propose(wanted, pending) if wanted > 0 else []
        for place, point in enumerate(found):
            rng = generator(self._seed, "tune/untried", self._told, place)
            new = untried(self._space, point, tried, self._left(pending), rng)
            if new is not None:
                take(new, self.name)
        self._pending |= {self._space.key(c.point): c.point for c in batch}
        return batch

    def _left(self, pending: Sequence[Point]) -> int | None:
        """Points of the space that are neither told nor pending."""
        if self._space.count is None:
            return None
        return self._space.count - self._of_space - sum(point in self._space for point in pending)
