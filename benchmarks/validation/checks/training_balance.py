"""Balance while a small model trains: MaxVio (busiest expert over the mean, less one) of ten real runs, each with
another balancing method, beside the simulator's policies on the router scores of the run without balancing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks.validation.rows import ROOT, Beside, Bound, Found, Row, Source

GROUP = "routing"
TITLE = "Balancing methods while a model trains"
SOURCE = Source(
    "own training",
    "this project",
    "",
    "",
    ("results/validation/routing_maxvio.json", "results/validation/routing_maxvio_simulated.json"),
    "a byte-level MoE model on one CPU",
    committed=True,
)
COMMAND = "make routing-lm"
FACTOR = Bound("a factor of 2, up or down, for every method, as routing.md asks", None, 1.0)
LAST = 50
Floats = NDArray[np.float64]


def rows() -> list[Row]:
    """Mean MaxVio of the last 50 steps by method, methods with none of either left out."""
    real, simulated = (json.loads((ROOT / file).read_text("utf-8")) for file in SOURCE.files)
    out = []
    for kind, what, fitted in (
        (
            "recorded",
            "MaxVio at the end, on recorded scores",
            "one rate, from 100 steps of one method (auxiliary loss)",
        ),
        (
            "generated",
            "MaxVio at the end, on generated scores",
            "that, and the generator's spread from the run without balancing",
        ),
    ):
        pairs: list[Any] = [
            (np.mean(curve[-LAST:]), np.mean(real["methods"][name]["maxvio_S"][-LAST:]))
            for name, curve in simulated["maxvio_S"][kind].items()
            if name not in ("none", "auxiliary_loss", "expert_choice")
        ]
        ours, theirs = np.array(pairs).T
        level = np.full(len(theirs), np.exp(np.mean(np.log(theirs))))
        f, simple = factors(ours, theirs), factors(level, theirs)
        out.append(
            Row(
                what,
                fitted,
                "six other methods, mean of the last 50 steps",
                f,
                FACTOR,
                (Beside("their own mean for all", simple.median, simple.p90),),
                "worst",
                "factors, less one; a router that answers to its balancing is in the real runs alone",
            )
        )
    return out


def factors(ours: Floats, theirs: Floats) -> Found:
    """How many times too large or too small, less one: median and worst."""
    off = np.exp(np.abs(np.log(ours / theirs))) - 1.0
    return Found(len(off), float(np.median(off)), float(off.max()), float(kendalltau(ours, theirs).statistic))
