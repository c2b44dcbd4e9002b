"""Operators on an H100: NVIDIA's tables of vLLM's and TensorRT-LLM's kernels. benchmarks/profiles/holdout.py has all
of it, operators.md its page; here the lines that the project's bounds name, each beside interpolating the same
points."""

from __future__ import annotations

import numpy as np
from moesim_kernels.fit.model import predict

from benchmarks.validation.rows import (
    HELD_OUT,
    SKEWED,
    UNSEEN,
    Beside,
    Bound,
    Errors,
    Row,
    Source,
    beside,
    found,
    interpolated,
    of_errors,
)
from benchmarks.validation.tables import profiles

GROUP = "operators"
TITLE = "vLLM's and TensorRT-LLM's kernels, H100"
FOLDER = "kernels/h100_sxm"
SOURCE = Source(
    "aiconfigurator H100",
    "PyPI aiconfigurator-core",
    "0.12.0",
    "Apache-2.0",
    (
        f"{FOLDER}/moe/vllm/0.24.0/moe_perf.parquet",
        f"{FOLDER}/moe/trtllm/1.3.0rc20/moe_perf.parquet",
        f"{FOLDER}/gemm/vllm/0.24.0/gemm_perf.parquet",
        f"{FOLDER}/attention/vllm/0.24.0/context_attention_perf.parquet",
        f"{FOLDER}/attention/vllm/0.24.0/generation_attention_perf.parquet",
        f"{FOLDER}/mla/trtllm/1.3.0rc20/context_mla_perf.parquet",
        f"{FOLDER}/mla/trtllm/1.3.0rc20/generation_mla_perf.parquet",
    ),
    "H100 SXM",
)
SLOW = True
"""half a minute: its test is marked slow (tests/validation/test_operator_accuracy.py asserts the same bounds)"""
COUNTS = Bound("operators at sizes between eight chosen ones: the project's target", 0.02, 0.09)
NAMES = {
    "moe": "fused MoE",
    "gemm": "GEMM",
    "attention_prefill": "attention, prompts",
    "attention_decode": "attention, decode",
}


def experts() -> list[Row]:
    """Fused MoE of two engines and two formats: eight token counts of each shape timed; then 32 shapes timed."""
    import figures
    import holdout

    ours, alone, measured = [], [], []
    carried, near, seen = Errors(), Errors(), 0
    for s, data in holdout.experts():
        mask = figures.kept(s, figures.EIGHT)
        some, rest = s.where(mask), s.where(~mask)
        ours.append(predict(figures.fitted(some), rest))
        alone.append(interpolated(some, rest))
        measured.append(rest.ns)
        timed, new = figures.split(s, data, 0)
        inside = np.array([k in set(timed) for k in s.key])
        some, rest = s.where(mask & inside), s.where(~inside)
        carried.add(predict(figures.fitted(some, new), rest), rest.ns)
        near.add(predict(figures.fitted(some, bare=True), rest), rest.ns)
        seen += len(new)
    p, a, m = (np.concatenate(x) for x in (ours, alone, measured))
    physics = near.found()
    return [
        Row(
            "fused MoE, bf16 and FP8, two engines",
            "8 token counts of each shape",
            "all other token counts",
            found(p, m),
            COUNTS,
            (beside("interpolated", a, m),),
        ),
        Row(
            "fused MoE, shapes never timed",
            "8 token counts of 32 shapes drawn at random, each of 4 kernels",
            f"{seen} other shapes, all of it",
            carried.found(),
            UNSEEN,
            (Beside("physics alone", physics.median, physics.p90),),
        ),
    ]


def rows() -> list[Row]:
    """MoE, GEMM and attention; then skewed routing."""
    profiles()
    import holdout

    out = experts()
    for s, data in holdout.cases(quick=True)[4:]:
        mask = holdout.kept_mask(s)
        some, rest = s.where(mask), s.where(~mask)
        profile = holdout.fitted(some)
        ours = predict(profile, rest, cuda_graph=not s.variant.endswith("@eager"))
        both = "8 sizes of each shape" if s.size.shape[1] == 1 else "8 lengths of each shape at batches 1, 4, 16, ..."
        rest_of = "all other sizes" if s.size.shape[1] == 1 else "all other lengths and batches"
        alone = interpolated(some, rest)
        out.append(
            Row(
                f"{NAMES[s.op]}: {data}",
                both,
                rest_of,
                found(ours, rest.ns),
                HELD_OUT,
                (beside("interpolated", alone, rest.ns),),
            )
        )
    for dtype in ("bf16", "fp8_block"):
        by_load, blind = holdout.skewed(dtype, 1.2)
        b = of_errors(blind.error)
        out.append(
            Row(
                f"fused MoE, {dtype}, power-law routing",
                "8 token counts of each shape, balanced",
                "all rows with power law 1.2",
                of_errors(by_load.error),
                SKEWED,
                (Beside("load-blind", b.median, b.p90),),
                note="the table does not hold its histograms; they are drawn anew from its law",
            )
        )
    return out
