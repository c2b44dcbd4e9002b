"""What a check against measurements returns: rows, each with what was calibrated on, what was held out, the error,
and the bound it is judged by; and the source that all rows of a check share.

Legend: P points. Errors are |predicted / measured - 1| of times and rates, |predicted - measured| of hit rates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from moesim_kernels.fit.conformal import clopper_pearson
from moesim_kernels.fit.samples import Samples
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

__all__ = [
    "DATA", "HELD_OUT", "ROOT", "SKEWED", "UNSEEN", "Beside", "Bound", "Errors", "Found", "Row", "Source", "beside",
    "found", "interpolated", "of_errors", "percent",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
WORSE = 0.05
"""of a figure recorded as missed: how much worse, relatively, a later version may be (floors and ties move a point)"""


@dataclass(frozen=True)
class Source:
    """Where measurements come from. name: as the page calls it. files: under ../shared/data, or committed ones."""

    name: str
    repository: str
    commit: str
    licence: str
    files: tuple[str, ...]
    machine: str
    committed: bool = False

    def missing(self) -> list[str]:
        """Files that are not here."""
        base = ROOT if self.committed else DATA
        return [file for file in self.files if not (base / file).exists()]


@dataclass(frozen=True)
class Bound:
    """The most that median and p90 may be, and the least that tau may be; why it is this one."""

    why: str
    median: float | None = None
    p90: float | None = None
    tau: float | None = None


HELD_OUT = Bound("operators at sizes between timed ones: the project's bound", 0.05, 0.15)
SKEWED = Bound("operators under uneven load: the bound for sizes between timed ones is asked of it too", 0.05, 0.15)
UNSEEN = Bound("operators of shapes that were never timed: the project's target", 0.07, 0.30)


@dataclass(frozen=True)
class Found:
    """Median and p90 of errors over n points; tau-b of the ranking where that is the question."""

    n: int
    median: float
    p90: float
    tau: float | None = None


@dataclass(frozen=True)
class Beside:
    """The same points by something simpler."""

    name: str
    median: float
    p90: float
    tau: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the page. unit: `%` of relative errors, `points` of hit rates (both shown times 100), `worst` in
    place of the p90, `wrong` for a share of wrong answers. inside: of an interval, how many of the n it held; its bound
    is that the exact interval of this share contains `level`. state: why no bound binds, such as `contended`."""

    what: str
    calibrated: str
    held_out: str
    found: Found
    bound: Bound | None = None
    beside: tuple[Beside, ...] = ()
    unit: str = "%"
    note: str = ""
    inside: int | None = None
    level: float = 0.9
    state: str = ""

    def verdict(self) -> str:
        """within, missed, no bound, or the state that keeps a bound from binding."""
        b, f = self.bound, self.found
        if self.state:
            return self.state
        if self.inside is not None:
            low, high = clopper_pearson(self.inside, f.n)
            return "within" if low <= self.level <= high else "missed"
        if b is None:
            return "no bound"
        over = (b.median is not None and f.median > b.median) or (b.p90 is not None and f.p90 > b.p90)
        return "missed" if over or (b.tau is not None and (f.tau is None or f.tau < b.tau)) else "within"

    def worse_than(self, recorded: Row) -> list[str]:
        """How this row breaks its bound, or, where the recorded one missed it, is worse than recorded by more than
        WORSE. An interval may not leave its level unless it had before."""
        b, f, r = recorded.bound, self.found, recorded.found
        if self.inside is not None:
            return [f"{self.what}: {self.inside} of {f.n} inside"] if self.verdict() > recorded.verdict() else []
        if b is None:
            return []
        out = []
        for name, limit in (("median", b.median), ("p90", b.p90)):
            value, before = getattr(f, name), getattr(r, name)
            if limit is not None and value > max(limit, before * (1.0 + WORSE)):
                out.append(f"{self.what}: {name} {value:.4f}, bound {limit}, recorded {before:.4f}")
        if b.tau is not None and (f.tau or 0.0) < min(b.tau, (r.tau or 0.0) * (1.0 - WORSE)):
            out.append(f"{self.what}: tau {f.tau}, bound {b.tau}, recorded {r.tau}")
        return out

    def plain(self) -> dict[str, Any]:
        """For JSON; figures keep four digits after the point, so that a rerun gives the same bytes."""

        def rounded(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 4)
            if isinstance(value, dict):
                return {k: rounded(v) for k, v in value.items() if v is not None and v != "" and v != ()}
            return [rounded(v) for v in value] if isinstance(value, list | tuple) else value

        out: dict[str, Any] = rounded(asdict(self))
        return out

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Row:
        """Back from JSON; a field that is not there has its default."""
        more: dict[str, Any] = dict(plain)
        more["found"] = Found(**plain["found"])
        more["bound"] = Bound(**plain["bound"]) if plain.get("bound") else None
        more["beside"] = tuple(Beside(**one) for one in plain.get("beside", ()))
        return cls(**more)


@dataclass
class Errors:
    """Predictions beside measurements, gathered shape by shape."""

    predicted: list[NDArray[np.float64]] = field(default_factory=list)
    measured: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, predicted: ArrayLike, measured: ArrayLike) -> None:
        """More points."""
        self.predicted.append(np.asarray(predicted, np.float64).ravel())
        self.measured.append(np.asarray(measured, np.float64).ravel())

    def relative(self) -> NDArray[np.float64]:
        """|predicted / measured - 1|, [P]."""
        return np.abs(np.concatenate(self.predicted) / np.concatenate(self.measured) - 1.0)

    def found(self, ranked: bool = False) -> Found:
        """Their errors."""
        return found(np.concatenate(self.predicted), np.concatenate(self.measured), ranked)


def found(predicted: ArrayLike, measured: ArrayLike, ranked: bool = False) -> Found:
    """Relative errors of [P] predictions; ranked: tau-b as well (Kendall, Biometrika 1945)."""
    ours, theirs = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    tau = float(kendalltau(ours, theirs).statistic) if ranked else None
    return of_errors(np.abs(ours / theirs - 1.0), tau)


def of_errors(error: ArrayLike, tau: float | None = None) -> Found:
    """Median and p90 of [P] errors."""
    values = np.asarray(error, np.float64)
    return Found(len(values), float(np.median(values)), float(np.quantile(values, 0.9)), tau)


def beside(name: str, predicted: ArrayLike, measured: ArrayLike, ranked: bool = False) -> Beside:
    """An alternative's errors."""
    f = found(predicted, measured, ranked)
    return Beside(name, f.median, f.p90, f.tau)


def percent(value: float) -> str:
    """Times 100."""
    return f"{100 * value:.1f}" if value < 0.9995 else f"{100 * value:.0f}"


def interpolated(some: Samples, rest: Samples) -> NDArray[np.float64]:
    """ns of `rest` from the timed points `some` alone, no physics: log time over log size, linear between points of the
    same shape, flat beyond them; of two sizes (batch, length) the batch is the nearest one. [P]; nan for new shapes."""
    out = np.full(len(rest.ns), np.nan)
    known = some.by_key()
    for key, places in rest.by_key().items():
        if key not in known:
            continue
        own = some.size[known[key]]
        ns = some.ns[known[key]]
        for place in places:
            wanted = rest.size[place]
            mine = np.ones(len(ns), bool)
            if len(wanted) > 1:
                apart = np.abs(np.log(own[:, 0] / wanted[0]))
                mine = apart == apart.min()
            order = np.argsort(own[mine, -1])
            out[place] = np.exp(np.interp(np.log(wanted[-1]), np.log(own[mine, -1][order]), np.log(ns[mine][order])))
    return out
