"""Which token counts to time of a MoE shape: the choice behind `holdout.EIGHT` and `holdout.TWELVE`.

`python benchmarks/profiles/choose_counts.py` (half a minute; needs ../shared/data). It looks at the selection half of
the shapes alone (`holdout.selected`). Objective: the largest, over both back ends and both dtypes, of
median / target and p90 / target, plus a hundredth of their sum; the residual is interpolated in log tokens between kept
counts. Search: single exchanges from the rule of `spread` and from six random starts until none helps.
"""

from __future__ import annotations

import holdout
import numpy as np
from moesim_kernels.fit.curves import spread
from moesim_kernels.fit.physics import fit_physics, physics_ns

from moesim.rng import generator

TARGET = {8: (0.02, 0.09), 12: (0.012, 0.065)}
STARTS = 6


def residuals() -> tuple[np.ndarray, list[np.ndarray]]:
    """Token counts; of each data set ln(measured / physics) of the selection half's whole shapes [shapes, counts]."""
    sets, counts = [], np.zeros(0)
    for s, _ in holdout.experts():
        values = fit_physics(s.where(holdout.kept_mask(s)), holdout.base())
        ratio = np.log(s.ns / physics_ns(s, values, holdout.base()))
        counts = np.unique(s.extra["tokens"])
        rows = [at[np.argsort(s.size[at, 0])] for key, at in s.by_key().items() if holdout.selected(key)]
        sets.append(ratio[np.array([at for at in rows if len(at) == len(counts)])])
    return counts, sets


def score(kept: list[int], counts: np.ndarray, sets: list[np.ndarray]) -> float:
    """The objective; kept: places in counts."""
    basis = np.array([np.interp(np.log(counts), np.log(counts[kept]), row) for row in np.eye(len(kept))])
    rest = np.setdiff1d(np.arange(len(counts)), kept)
    parts = []
    for ratio in sets:
        error = np.abs(np.expm1(ratio[:, kept] @ basis - ratio))[:, rest]
        figures = np.quantile(error, [0.5, 0.9])
        parts += (figures / TARGET[len(kept)]).tolist()
    return max(parts) + 0.01 * sum(parts)


def exchange(kept: list[int], counts: np.ndarray, sets: list[np.ndarray]) -> tuple[float, list[int]]:
    """Exchange inner counts one at a time while that helps."""
    best, moved = score(kept, counts, sets), True
    while moved:
        moved = False
        for i in range(1, len(kept) - 1):
            for new in range(1, len(counts) - 1):
                if new not in kept:
                    other = sorted([*kept[:i], *kept[i + 1 :], new])
                    found = score(other, counts, sets)
                    if found < best - 1e-9:
                        best, kept, moved = found, other, True
    return best, kept


def main() -> None:
    """Print the choice for eight and for twelve counts."""
    counts, sets = residuals()
    inner = np.arange(1, len(counts) - 1)
    for number in TARGET:
        rng = generator(1, "counts", number)
        starts = [[int(np.searchsorted(counts, c)) for c in spread(counts.tolist(), number)]]
        for _ in range(STARTS):
            some = rng.choice(inner, number - 2, replace=False).tolist()
            starts.append(sorted([0, *some, len(counts) - 1]))
        best, kept = min(exchange(start, counts, sets) for start in starts)
        print(
            number,
            [int(c) for c in counts[kept]],
            f"objective {best:.3f}, by the rule {score(starts[0], counts, sets):.3f}",
        )


if __name__ == "__main__":
    main()
