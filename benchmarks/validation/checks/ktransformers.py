"""KTransformers' table of tokens/s by share of experts on the GPU and placement strategy: Qwen3-Next-80B, 4 x RTX
4090 and a Xeon. What is fitted, what stands in for what and why is said in benchmarks/offload/kt_table.py and on
offload.md."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from benchmarks.validation.rows import ROOT, Bound, Row, Source, beside, found

GROUP = "offload"
TITLE = "KTransformers: decode with experts on the CPU"
SOURCE = Source(
    "KTransformers",
    "github.com/kvcache-ai/ktransformers doc/en/kt-kernel/experts-sched-Tutorial.md",
    "file's sha256 a836875f64f226f9",
    "Apache-2.0",
    ("published/ktransformers_placement_table.csv", "routing/deepseek_v3_counts_l3_18.csv"),
    "Qwen3-Next-80B-A3B FP8, 4 x RTX 4090, Xeon Gold 6454S",
)
SLOW = True
"""a minute; tests/validation/test_ktransformers.py asserts single cells in seconds"""
WITHIN = Bound("a token's time: as much as tests/validation/test_ktransformers.py asks of the table", 0.05, 0.12)
ORDER = Bound("the project's bound for rankings on a CPU", None, None, 0.85)


def rows() -> list[Row]:
    """Cells not fitted, by strategy, in ms a token; then the order of the strategies."""
    for name in ("routing", "offload"):
        folder = str(ROOT / "benchmarks" / name)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    import kt_table as kt

    theirs = kt.published()
    ours = {name: np.array([kt.ms(kt.simulate(name, r, kt.fitted())) for r in kt.RATIOS]) for name in kt.ORDERED[:3]}
    ours["uniform"] = np.array([kt.ms(kt.simulate("uniform", r, kt.fitted())) for r in kt.RATIOS])
    fitted = [kt.RATIOS.index(r) for r in kt.FITTED_AT]
    straight = np.interp(kt.RATIOS, kt.FITTED_AT, [1e3 / theirs["random"][i] for i in fitted])

    def row(name: str, at: NDArray[np.intp], held_out: str) -> Row:
        measured = 1e3 / theirs[name][at]
        return Row(
            f"ms a token, {name.replace('_', ' ')}",
            "3 constants from 3 cells of the random column (0, 0.6, 1)",
            held_out,
            found(ours[name][at], measured),
            WITHIN,
            (beside("straight lines through the 3 cells", straight[at], measured),),
        )

    rest = np.array([i for i in range(len(kt.RATIOS)) if i not in fitted])
    every, inner = np.arange(len(kt.RATIOS)), np.arange(1, len(kt.RATIOS) - 1)
    out = [row("random", rest, "the column's other 8 cells"), row("uniform", every, "the whole column")]
    out += [row(name, inner, "0.1 to 0.9") for name in ("front_loading", "frequency")]
    names = ("random", "front_loading", "frequency")
    a = np.concatenate([ours[n][inner] for n in names])
    b = np.concatenate([1e3 / theirs[n][inner] for n in names])
    line = np.concatenate([straight[inner]] * 3)
    out.append(
        Row(
            "which strategy and share is faster",
            "the same",
            "27 cells of three strategies, ranked",
            found(a, b, ranked=True),
            ORDER,
            (beside("straight lines", line, b, ranked=True),),
            note="popularity of that model's experts is not public; DeepSeek-V3's counts stand in",
        )
    )
    return out
