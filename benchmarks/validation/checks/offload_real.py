"""Experts read from a disk for real: the mini-runtime's steps beside the simulator's, from the committed measurements
of results/validation/offload_real.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from benchmarks.validation.rows import ROOT, Beside, Bound, Found, Row, Source, found

GROUP = "offload"
TITLE = "The mini-runtime, experts read from disk"
SOURCE = Source(
    "own offload",
    "this project",
    "",
    "",
    ("results/validation/offload_real.json",),
    "Xeon 2.5 GHz, 2 CPUs, disk",
    committed=True,
)
COMMAND = "make offload-real"
STEP = Bound("steps with real reads: written into the tool before it ran", 0.10, None, 0.9)
RACE = Bound("raced prefetches, worst case: written into the tool before it ran", None, 0.02)


def rows() -> list[Row]:
    """Step times of twenty cases, and hit rates of raced prefetches."""
    report: dict[str, Any] = json.loads((ROOT / SOURCE.files[0]).read_text("utf-8"))
    cases, races = report["times"]["cases"], report["races"]
    predicted, measured = (np.array([c[name] for c in cases]) for name in ("predicted_ms", "measured_ms"))
    step = np.array([c["step_ms"] for c in cases])
    odd, even = step[:, ::2].mean(axis=1), step[:, 1::2].mean(axis=1)
    halves = found(odd, even)
    apart = np.array([abs(r["apart"]) / 100 for r in races])
    return [
        Row(
            "step, five policies and prefetches at four cache sizes",
            "parts of the runtime on other routes and cache sizes",
            "20 cases, predicted before they ran",
            found(predicted, measured, ranked=True),
            STEP,
            (Beside("odd against even rounds", halves.median, halves.p90, float(kendalltau(odd, even).statistic)),),
        ),
        Row(
            "hit rate of prefetches that race",
            "the same",
            "8 cases, 10 runs each",
            Found(len(apart), float(np.median(apart)), float(apart.max())),
            RACE,
            (),
            "points worst",
        ),
    ]
