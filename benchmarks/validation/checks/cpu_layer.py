"""A whole MoE layer on one CPU thread: thirty fresh settings (batch and histogram) after a calibration, from the
committed measurements of results/validation/cpu_calibration.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.validation.rows import ROOT, Beside, Bound, Found, Row, Source, found

GROUP = "whole steps"
TITLE = "An MoE layer on one CPU thread, calibrated"
SOURCE = Source(
    "own CPU",
    "this project",
    "",
    "",
    ("results/validation/cpu_calibration.json",),
    "AMD EPYC, one thread, fp32",
    committed=True,
)
COMMAND = "python benchmarks/kernels/cpu_holdout.py hw_profiles/cpu_epyc_1thread.yaml"
STEP = Bound("the project's bound for a calibrated CPU", 0.05, 0.12, 0.95)


def rows() -> list[Row]:
    """The layer's time, and how often the profile's own interval held it."""
    report: dict[str, Any] = json.loads((ROOT / SOURCE.files[0]).read_text("utf-8"))
    points = report["points"]
    predicted, measured = (np.array([float(p[name]) for p in points]) for name in ("predicted_ns", "ns"))
    count = np.array([float(sum(p["counts"])) for p in points])
    # one number for the layer, ns a row, from the same points: what a load-blind rate makes of them
    rate = float(np.median(measured / count))
    simple = found(count * rate, measured, ranked=True)
    return [
        Row(
            "MoE layer, 1 to 255 tokens",
            "the same machine half an hour before: operators, not layers",
            "30 fresh batches and histograms",
            found(predicted, measured, ranked=True),
            STEP,
            (Beside("one rate a row, fitted to these points", simple.median, simple.p90, simple.tau),),
        ),
        Row(
            "90 % interval of the profile",
            "the calibration's own held-out points",
            "the same 30",
            Found(len(points), 0.0, 0.0),
            inside=int(report["figures"]["interval"]["inside"]),
        ),
    ]
