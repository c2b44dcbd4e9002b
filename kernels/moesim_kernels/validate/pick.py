"""Candidates of a study, predicted against measured: is the pick the best, and what would others have picked?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim_kernels.validate.bounds import REGRET
from moesim_kernels.validate.judge import Measured
from moesim_kernels.validate.predict import SIGMAS
from moesim_kernels.validate.ranking import best_recall, pairs_by_gap, regret, tau_b, tied_NN, top_quartile

__all__ = ["judge_candidates", "run_figures"]


def run_figures(m: Measured, candidates: Sequence[Mapping[str, Any]], which: str) -> tuple[FloatArray, FloatArray]:
    """Step time a generated token of each candidate, measured [C], and the half width of ln of it [C]; nan where not
    all of its steps were measured. which: `settings` or `fresh`, names of steps drawn with a chance in proportion to
    their predicted time, so that measured / predicted of the run is the mean of that of the steps (`steps.py`)."""
    place = {p.name: n for n, p in enumerate(m.predicted)}
    ns, half = np.full(len(candidates), np.nan), np.full(len(candidates), np.nan)
    for at, candidate in enumerate(candidates):
        rows = [place[name] for name in candidate[which] if name in place]
        if not rows or len(rows) < len(candidate[which]):
            continue
        ratio = np.array([m.levels.ns_N[n] / m.predicted[n].ns for n in rows])
        noise = np.array([m.levels.half_width_N[n] for n in rows])
        ns[at] = candidate["predicted_ns_per_token"] * ratio.mean()
        # of the mean: the noise of each step's median, and that few steps stand for the run
        half[at] = float(np.sqrt((noise**2).sum())) / len(rows)
        if len(rows) > 1:
            half[at] += SIGMAS * float(ratio.std(ddof=1) / ratio.mean()) / np.sqrt(len(rows))
    return ns, half


def judge_candidates(m: Measured, facts: Mapping[str, Any], fresh: Measured | None) -> dict[str, Any] | None:
    """The ranking, top-3 recall and regret of what was measured of a study's candidates; None where nothing was.

    fresh: the measured winner and the default again, on steps that nothing was chosen by.
    """
    everyone = list(facts["candidates"])
    measured, half = run_figures(m, everyone, "settings")
    use = np.isfinite(measured)
    if use.sum() < 2:
        return None
    chosen = [c for c, ok in zip(everyone, use, strict=True) if ok]
    measured, half = measured[use], half[use]
    predicted = np.array([c["predicted_ns_per_token"] for c in chosen])
    roofline = np.array([c["roofline_ns_per_token"] for c in chosen])
    tied = tied_NN(measured, half)
    top = top_quartile(measured)
    default = next((n for n, c in enumerate(chosen) if c["default"]), None)
    pick = int(np.argmin(predicted))
    out: dict[str, Any] = {
        "study": facts["study"],
        "objective": facts["objective"],
        "measured": len(chosen),
        "skipped": facts["skipped"],
        "figure": "step time a generated token, over steps drawn from each candidate's simulated run",
        "tau": _finite(tau_b(predicted, measured, tied)),
        "tau_without_ties": _finite(tau_b(predicted, measured)),
        "tau_top_quartile": _finite(tau_b(predicted[top], measured[top], tied[np.ix_(top, top)])),
        "tau_of_study": _finite(tau_b([c["study_value"] for c in chosen], measured, tied)),
        "pairs_by_gap": [gap.to_json() for gap in pairs_by_gap(predicted, measured)],
        "top3_recall": round(best_recall(predicted, measured, tied), 4),
        "pick": chosen[pick]["name"],
        "best": chosen[int(np.argmin(measured))]["name"],
        "regret": {
            "pick": round(regret(measured, pick), 5),
            "roofline": round(regret(measured, int(np.argmin(roofline))), 5),
            "random": round(regret(measured, None), 5),
            "default": None if default is None else round(regret(measured, default), 5),
            "bound": REGRET,
        },
        "rows": [
            {
                "name": c["name"],
                "role": c["role"],
                "trial": c["trial"],
                "overrides": c["overrides"],
                "study_value": c["study_value"],
                "predicted_ns_per_token": c["predicted_ns_per_token"],
                "measured_ns_per_token": round(float(measured[n]), 1),
                "half_width": _finite(float(half[n])),
                "error": round(float(predicted[n] / measured[n] - 1.0), 5),
            }
            for n, c in enumerate(chosen)
        ],
    }
    out["fresh"] = None if fresh is None else _fresh(fresh, everyone)
    firm = float(np.hypot(half[pick], half[int(np.argmin(measured))]))
    out["bounds"] = [_bound(regret(measured, pick), firm, m.quiet)]
    return out


def _bound(found: float, half_width: float, quiet: bool) -> dict[str, Any]:
    """The pick's regret; it binds where the ratio of the pick to the best is firm to half the bound."""
    binds = quiet and half_width < REGRET / 2
    return {
        "figure": "regret of the pick",
        "found": round(found, 5),
        "bound": REGRET,
        "at": "most",
        "met": found <= REGRET,
        "binds": binds,
        "why_not": "" if binds else ("contended" if not quiet else "times are not firm enough"),
    }


def _fresh(m: Measured, candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    measured, half = run_figures(m, candidates, "fresh")
    return [
        {
            "name": c["name"],
            "predicted_ns_per_token": c["predicted_ns_per_token"],
            "measured_ns_per_token": round(float(ns), 1),
            "half_width": _finite(float(h)),
            "error": round(float(c["predicted_ns_per_token"] / ns - 1.0), 5),
        }
        for c, ns, h in zip(candidates, measured, half, strict=True)
        if np.isfinite(ns)
    ]


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
