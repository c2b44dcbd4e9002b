"""The synthetic routing model: fitted to every other sequence of ESFT's recorded routes, compared with the rest in
figures that the fit does not look at. results/validation/synthetic_routing.md has each of them."""

from __future__ import annotations

import numpy as np

from benchmarks.validation.rows import DATA, Beside, Bound, Row, Source, of_errors
from moesim.traces.routing_npz import read
from moesim.workload.synthetic_fit import compare, fit_synthetic, split_sequences

GROUP = "routing"
TITLE = "Synthetic routing against recorded routes"
SOURCE = Source(
    "ESFT",
    "github.com/deepseek-ai/ESFT",
    "579a7711e4b3",
    "MIT",
    ("routing/esft_dsv2lite_intent.npz", "routing/esft_dsv2lite_summary.npz"),
    "DeepSeek-V2-Lite's shape, 64 experts, top 6",
)
SLOW = True
"""twenty seconds; tests/validation/test_synthetic_fit.py asserts each figure"""
LEVEL = Bound("figures of routing that the fit does not look at: as for operators", 0.05, 0.15)
KINDS = {  # nothing of these does the fit look at
    "experts that a batch hits": ("distinct experts",),
    "load of the busiest expert and rank": ("expert max/mean, mean", "rank max/mean, mean"),
    "how that load varies from batch to batch": ("expert max/mean, sd", "rank max/mean, sd"),
}


def rows() -> list[Row]:
    """Figures by kind, both tasks; beside them the fitted half itself, replayed."""
    error: dict[str, list[float]] = {kind: [] for kind in KINDS}
    own: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for file in SOURCE.files:
        source = read(DATA / file)
        half, rest = split_sequences(source, 0), split_sequences(source, 1)
        for found, errors in ((fit_synthetic(half, rest).report, error), (compare(rest, half), own)):
            for row in found:
                for kind, starts in KINDS.items():
                    if row.name.startswith(starts):
                        errors[kind].append(abs(row.error))
    out = []
    for kind, values in error.items():
        replay = of_errors(np.array(own[kind]))
        out.append(
            Row(
                kind,
                "every other sequence",
                "the rest; 1 to 512 tokens, three kinds of batch, two tasks",
                of_errors(np.array(values)),
                LEVEL,
                (Beside("replaying the fitted half", replay.median, replay.p90),),
            )
        )
    return out
