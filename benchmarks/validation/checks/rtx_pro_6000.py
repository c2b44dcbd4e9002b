"""Layer times of Qwen3-30B-A3B in vLLM 0.19 on one RTX PRO 6000, as LLMServingSim profiled them. Its fused MoE is
timed by tokens and by how many of 128 experts are hit, so even rows can predict skewed ones.
results/validation/operators.md has more; the fits are those of benchmarks/profiles/fit_rtx_pro_6000.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from moesim_kernels.fit.model import fit_operator, with_fits
from moesim_kernels.fit.samples import Samples

from benchmarks.validation.rows import HELD_OUT, SKEWED, Beside, Row, Source, beside, found, interpolated, of_errors
from benchmarks.validation.tables import profiles
from moesim.cost.operators import MoEShape, Operators

GROUP = "operators"
TITLE = "Qwen3-30B-A3B's layers, RTX PRO 6000"
FOLDER = "kernels/llmservingsim_rtxpro6000_qwen3_30b_a3b"
SOURCE = Source(
    "LLMServingSim",
    "github.com/casys-kaist/LLMServingSim",
    "5daddb21a545",
    "MIT",
    (f"{FOLDER}/tp1/moe.csv", f"{FOLDER}/tp1/attention.csv", f"{FOLDER}/tp1/dense.csv", f"{FOLDER}/tp2/attention.csv"),
    "RTX PRO 6000, vLLM 0.19, bf16",
)
NAMES = {
    "gemm": "projections and lm_head",
    "moe": "fused MoE",
    "attention_prefill": "attention, prompts",
    "attention_decode": "attention, decode",
}


def uneven() -> Row:
    """Fused MoE with the fewest experts hit, from rows whose load is as even as can be."""
    import fit_rtx_pro_6000 as rtx

    s = rtx.moe()
    active, rows = s.extra["active"], s.size[:, 0]
    s = replace(s, key=[(*k[:2], rtx.EXPERTS, *k[3:]) for k in s.key])
    even = active == np.minimum(rtx.EXPERTS, rows)
    part = fit_operator(s.where(even), rtx.device())
    ops = Operators(with_fits(rtx.device(), [part]))
    shape = MoEShape(*s.key[0][:5], True)

    def ns(hit: Any) -> Any:
        work = ops.moe_work(rows / hit, "bf16") * hit
        return ops.moe(rows, hit, work, 0.0, shape).ns

    ours, blind = ns(active), ns(np.minimum(float(rtx.EXPERTS), rows))
    return Row(
        "fused MoE, load on a part of the experts",
        f"the {int(even.sum())} rows with as many of 128 experts hit as can be",
        "every row with fewer: 8, 16, 32 or 64 experts hit",
        found(ours[~even], s.ns[~even], ranked=True),
        SKEWED,
        (beside("load-blind", blind[~even], s.ns[~even], ranked=True),),
    )


def alone(s: Samples) -> Beside:
    """Interpolating the kept sizes."""
    import fit_rtx_pro_6000 as rtx

    kept = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        axes = rtx.eight(s.size[at])
        kept[at] = np.all([np.isin(s.size[at, i], axis) for i, axis in enumerate(axes)], axis=0)
    rest = s.where(~kept)
    return beside("interpolated", interpolated(s.where(kept), rest), rest.ns)


def rows() -> list[Row]:
    """Sizes held out of each operator, then uneven load."""
    profiles()
    import fit_rtx_pro_6000 as rtx

    out = []
    for op, s in rtx.every().items():
        out.append(
            Row(
                NAMES[op],
                f"8 sizes a shape, {len(s.by_key())} shapes",
                "all other sizes",
                of_errors(rtx.held_out(s)),
                HELD_OUT,
                (alone(s),),
            )
        )
    return [*out, uneven()]
