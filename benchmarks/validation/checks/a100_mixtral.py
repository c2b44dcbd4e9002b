"""Grouped GEMMs of Mixtral-8x7B's experts on an A100: Frontier's table of tokens by tensor-parallel degree. It holds
no histogram, so rows are taken as even over the experts."""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from functools import cache

import numpy as np
from moesim_kernels.fit.curves import spread
from moesim_kernels.fit.model import Fitted, fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points
from numpy.typing import NDArray

from benchmarks.validation.rows import DATA, HELD_OUT, ROOT, UNSEEN, Row, Source, beside, found, interpolated
from moesim.hardware import DeviceProfile
from moesim.scenario.load import load_profile

GROUP = "operators"
TITLE = "Mixtral's experts, A100"
SOURCE = Source(
    "Frontier A100",
    "github.com/NetX-lab/Frontier",
    "a4b22df82118",
    "MIT",
    ("kernels/frontier/a100_mixtral_8x7b_moe.csv.gz",),
    "A100 80GB, bf16",
)


@cache
def device() -> DeviceProfile:
    """The datasheet's rates, taken as measured; blocks of 128 rows, which suits large experts."""
    return replace(load_profile(ROOT / "hw_profiles" / "a100_sxm_80gb.yaml"), kind="measured", moe_block_rows=128)


@cache
def samples() -> Samples:
    """Grouped GEMM by tokens at TP 1, 2, 4, 8: 8 experts, 2 a token."""
    with gzip.open(DATA / SOURCE.files[0], "rt", encoding="utf-8", newline="") as file:
        rows = sorted(
            (
                14336 // int(r["num_tensor_parallel_workers"]),
                int(r["num_tokens"]) * 2,
                float(r["time_stats.moe_grouped_gemm.median"]) * 1e6,
            )
            for r in csv.DictReader(file)
        )
    key = [(4096, inter, 8, 2, "bf16", 3) for inter, _, _ in rows]
    return sample_points("moe", "bf16", key, [r[1] for r in rows], [r[2] for r in rows])


def kept(s: Samples) -> NDArray[np.bool_]:
    """Eight token counts a shape."""
    out = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        out[at] = np.isin(s.size[at, 0], spread(s.size[at, 0].tolist(), 8))
    return out


def rows() -> list[Row]:
    """Token counts held out; then the shapes of TP 2 and 4."""
    s = samples()
    mask = kept(s)
    some, rest = s.where(mask), s.where(~mask)
    ours = predict(with_fits(device(), [fit_operator(some, device())]), rest)
    out = [
        Row(
            "token counts held out",
            "8 token counts each of TP 1, 2, 4, 8",
            "all other token counts",
            found(ours, rest.ns),
            HELD_OUT,
            (beside("interpolated", interpolated(some, rest), rest.ns),),
        )
    ]
    ends = np.isin([k[1] for k in s.key], (14336, 14336 // 8))
    some, rest = s.where(mask & ends), s.where(~ends)
    part = fit_operator(some, device())
    bare = with_fits(device(), [Fitted(part.op, part.variant, "", part.values, [])])
    out.append(
        Row(
            "shapes never timed",
            "8 token counts each of TP 1 and 8",
            "TP 2 and 4, all of it",
            found(predict(with_fits(device(), [part]), rest), rest.ns),
            UNSEEN,
            (beside("physics alone", predict(bare, rest), rest.ns),),
        )
    )
    return out
