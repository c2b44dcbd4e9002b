"""Held-out error of the operator model on the public H100 tables: eight token counts a shape kept, the rest predicted.

`python benchmarks/profiles/holdout.py` writes results/validation/operators.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from typing import Any

import numpy as np
import tables
import yaml
from moesim_kernels.fit.curves import curves, spread
from moesim_kernels.fit.model import Fitted, predict, with_fits
from moesim_kernels.fit.physics import fit_physics
from moesim_kernels.fit.samples import Samples
from moesim_kernels.fit.shared import carry_over
from tables import ROOT

from moesim.cost.operators import MoEShape, Operators
from moesim.hardware import DeviceProfile
from moesim.rng import generator

BATCHES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
KEPT = 8
BLOCK = 64  # rows a grouped GEMM pads an expert's share to; 64 suits the skewed rows of three of four kernels best
Axes = list[list[float]]


def base() -> DeviceProfile:
    """The datasheet profile, marked measured, ready to take fits and curves."""
    path = ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml"
    profile = DeviceProfile.from_spec(yaml.safe_load(path.read_text()), path.parent, str(path))
    return dataclasses.replace(profile, kind="measured", moe_block_rows=BLOCK)


def selected(key: tuple[Any, ...]) -> bool:
    """Whether a shape is of the half that choices are made on: by a hash of its sizes, whatever back end and dtype."""
    sizes = repr(tuple(str(k) for k in key if not isinstance(k, str))).encode()
    return hashlib.blake2b(sizes, digest_size=2).digest()[0] % 2 == 0


def experts() -> list[tuple[Samples, str]]:
    """The MoE kernels whose figures are named: two back ends, two dtypes."""
    names = {"vllm": "vLLM Triton", "trtllm": "TensorRT-LLM"}
    return [(tables.moe(b, d, True), f"{names[b]}, {d}, EP 1") for b in names for d in ("bf16", "fp8_block")]


def kept_axes(size: np.ndarray) -> Axes:
    """The kept grid of one shape: eight lengths or token counts; batches by powers of four where there are any."""
    lengths = spread(size[:, -1].tolist(), KEPT)
    if size.shape[1] == 1:
        return [lengths]
    batches = set(size[:, 0].tolist())
    return [sorted(b for b in batches if b in BATCHES) or [min(batches)], lengths]


def kept_mask(s: Samples) -> np.ndarray:
    """Points on their shape's kept grid."""
    out = np.zeros(len(s.ns), bool)
    for rows in s.by_key().values():
        axes = kept_axes(s.size[rows])
        out[rows] = np.all([np.isin(s.size[rows, i], axis) for i, axis in enumerate(axes)], axis=0)
    return out


def fitted(s: Samples, bare: bool = False, carried: list[Any] | None = None) -> DeviceProfile:
    """The H100 with one operator's physics and, unless `bare`, residual curves from these points' kept grid; MoE shapes
    in `carried` get theirs from the other shapes (`moesim_kernels.fit.shared`).
    """
    values = fit_physics(s, base())
    found = [] if bare else curves(s, values, base(), kept_axes)
    if carried:
        found += carry_over(s, values, base(), carried, spread(s.size[:, 0] / s.extra["top_k"], 24))
    return with_fits(base(), [Fitted(s.op, s.variant, "", values, found)])


@dataclasses.dataclass
class Row:
    """Errors of one line of the table."""

    op: str
    data: str
    what: str
    shapes: int
    error: np.ndarray

    def line(self) -> str:
        """Markdown."""
        p50, p90 = (100 * float(np.quantile(self.error, q)) for q in (0.5, 0.9))
        mean = 100 * float(self.error.mean())
        name = f"| {self.op} | {self.data} | {self.what} "
        return name + f"| {self.shapes} | {len(self.error)} | {p50:.1f} | {mean:.1f} | {p90:.1f} |"


def _errors(profile: DeviceProfile, s: Samples, take: np.ndarray) -> np.ndarray:
    some = s.where(take)
    return np.abs(predict(profile, some, cuda_graph=not s.variant.endswith("@eager")) / some.ns - 1.0)


def held_out_sizes(s: Samples, data: str) -> list[Row]:
    """Fit and curves from the kept points alone; errors on the others."""
    kept = kept_mask(s)
    profile = fitted(s.where(kept))
    shapes = len(s.by_key())
    if s.size.shape[1] == 1:
        return [Row(s.op, data, "token counts held out", shapes, _errors(profile, s, ~kept))]
    on_batch = np.isin(s.size[:, 0], BATCHES)
    return [
        Row(s.op, data, "lengths held out", shapes, _errors(profile, s, ~kept & on_batch)),
        Row(s.op, data, "batch sizes held out", shapes, _errors(profile, s, ~on_batch)),
    ]


def held_out_shapes(s: Samples, data: str) -> list[Row]:
    """Every sixth shape unseen: physics and neighbours from the kept points of the rest."""
    names = list(s.by_key())
    unseen = set(names[3::6])
    new = np.array([key in unseen for key in s.key])
    some = s.where(kept_mask(s) & ~new)
    ways = {"neighbours": fitted(some), "physics alone": fitted(some, bare=True)}
    if s.op == "moe":
        ways = {"carried over": fitted(some, carried=sorted(unseen, key=str)), **ways}
    return [
        Row(s.op, data, f"unseen shapes, {name}", len(unseen), _errors(profile, s, new))
        for name, profile in ways.items()
    ]


def power_law(tokens: int, experts: int, top_k: int, alpha: float, seed: int) -> np.ndarray:
    """Tokens by expert as the tables' benchmark draws them (aic_POWER_LAW_DISTRIBUTION.md): a truncated power law,
    scaled to tokens * top_k and rounded, no expert above `tokens`.
    """
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    u = generator(seed, "power_law", tokens, experts, top_k, round(alpha * 100)).random(experts)
    e = 1.0 - alpha
    x = ((high**e - low**e) * u + low**e) ** (1.0 / e) if high > low else np.ones(experts)
    count = np.minimum(np.round(x / x.sum() * tokens * top_k), tokens)
    order = np.argsort(-count, kind="stable")
    i, left = 0, tokens * top_k - count.sum()
    while left and i < 20 * experts:
        j, step = order[i % experts], np.sign(left)
        if 0 <= count[j] + step <= tokens:
            count[j] += step
            left -= step
        i += 1
    return count


def skewed(dtype: str, alpha: float) -> list[Row]:
    """EP 1 rows timed with power-law routing: balanced kept points and the histogram's features against ignoring skew.

    The histogram itself is not in the table; features are means over eight fresh draws of its law.
    """
    flat = tables.moe("vllm", dtype, True)
    profile = fitted(flat.where(kept_mask(flat)))
    ops = Operators(profile)
    s = tables.moe("vllm", dtype, True, f"power_law_{alpha:g}")
    known = set(flat.key)
    active, padded = np.zeros(len(s.ns)), np.zeros(len(s.ns))
    drawn: dict[tuple[int, ...], tuple[float, float]] = {}
    for i, case in enumerate(
        zip(*(s.extra[n].astype(int).tolist() for n in ("tokens", "experts", "top_k")), strict=True)
    ):
        if case not in drawn:
            counts = [power_law(*case, alpha, seed) for seed in range(8)]
            blocks = np.mean([np.ceil(c / BLOCK).sum() for c in counts])
            drawn[case] = (float(np.mean([(c > 0).sum() for c in counts])), float(blocks) * BLOCK)
        active[i], padded[i] = drawn[case]
    error, blind = [], []
    for key, rows in s.by_key().items():
        if key in known:
            shape = MoEShape(*key[:5], key[5] == 3)
            r = s.size[rows, 0]
            error.append(np.abs(ops.moe(r, active[rows], padded[rows], 0.0, shape).ns / s.ns[rows] - 1))
            blind.append(np.abs(predict(profile, s.where(rows)) / s.ns[rows] - 1))
    data = f"vLLM Triton, {dtype}, power law {alpha:g}"
    return [
        Row("moe", data, "skew, from the histogram", len(error), np.concatenate(error)),
        Row("moe", data, "skew ignored", len(blind), np.concatenate(blind)),
    ]


def cases(quick: bool) -> list[tuple[Samples, str]]:
    """What is validated; quick: only what the project's accuracy bounds name."""
    out = [
        *experts(),
        (tables.gemm("bf16"), "bf16"),
        (tables.gemm("fp8_block"), "fp8_block, launched by the host"),
        (tables.gqa("prefill", "bf16"), "GQA, FA3, bf16 cache"),
        (tables.gqa("decode", "bf16"), "GQA, FA3, bf16 cache"),
        (tables.mla("prefill", "bf16"), "MLA, bf16 cache"),
        (tables.mla("decode", "bf16"), "MLA, bf16 cache"),
    ]
    if not quick:
        out += [
            (tables.moe("vllm", "mxfp4", True), "vLLM Triton, mxfp4, EP 1"),
            (tables.moe("trtllm", "bf16", False), "TensorRT-LLM, bf16, all EP"),
            (tables.moe("trtllm", "fp8_block", False), "TensorRT-LLM, fp8_block, all EP"),
            (tables.gemm("fp8"), "fp8, Cutlass"),
            (tables.gqa("prefill", "fp8"), "GQA, FA3, fp8 cache"),
            (tables.gqa("decode", "fp8"), "GQA, FA3, fp8 cache"),
            (tables.mla("prefill", "fp8"), "MLA, fp8 cache"),
            (tables.mla("decode", "fp8"), "MLA, fp8 cache"),
        ]
    return out


def main() -> None:
    """Print the table; write it unless --print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="print only")
    import figures  # they use this module
    import fit_rtx_pro_6000

    only_print = parser.parse_args().print
    if not tables.H100.is_dir():
        sys.exit(f"the public tables are not here: {tables.H100}")
    head = ["| operator | data | predicted | shapes | points | median % | mean % | p90 % |"]
    head += ["|---|---|---|---|---|---|---|---|"]
    all_cases = cases(quick=False)
    sizes = [row.line() for s, data in all_cases for row in held_out_sizes(s, data)]
    shapes = [row.line() for s, data in all_cases for row in held_out_shapes(s, data)]
    skew = [row.line() for d in ("bf16", "fp8_block") for a in (1.01, 1.2) for row in skewed(d, a)]
    rtx = [
        Row(s.op, "vLLM 0.19, bf16", "sizes held out", len(s.by_key()), fit_rtx_pro_6000.held_out(s)).line()
        for s in fit_rtx_pro_6000.every().values()
    ]
    refused = [f"- {data}: {s.refused} of {s.refused + len(s.ns)}" for s, data in all_cases if s.refused]
    text = "\n".join(
        [
            INTRO,
            *head,
            *sizes,
            *figures.sections(),
            SKEW,
            *head,
            *skew,
            SHAPES,
            *head,
            *shapes,
            RTX,
            *head,
            *rtx,
            REFUSED,
            *refused,
            "",
        ]
    )
    print(text)
    if not only_print:
        path = ROOT / "results" / "validation" / "operators.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


INTRO = """# Held-out error of the operator model on the public H100 tables

Command: `python benchmarks/profiles/holdout.py`. It reads the tables of `../shared/data/kernels/h100_sxm`
(aiconfigurator-core 0.12.0, Apache-2.0). Error = |predicted / measured - 1|, every point weighing the same.

Kept for each shape: eight token counts (GEMM: rows; MoE: tokens; attention: lengths) by one rule that looks at no
time: the least, the largest, then six times the count nearest the log middle of the widest gap. Attention keeps these
at the batch sizes 1, 4, 16, 64, 256, 1024. Physics is fitted and residuals are taken on kept points alone.
"""
SKEW = """
## Skewed routing

Rows of the same shapes timed with power-law routing, predicted from the balanced kept points. The table does not hold
its histograms, so theirs are redrawn from their law: part of the error is the draw.
"""
SHAPES = """
## Shapes never seen

Every sixth shape of a table left out whole; the rest as above. Graded `extrapolated` by the model.
"""
RTX = """
## RTX PRO 6000

Layer times of Qwen3-30B-A3B (LLMServingSim, MIT), TP 1 and 2; eight sizes a shape kept. The weights of small layers
stay in its 128 MB L2 cache in this benchmark, so the smallest GEMMs are timed below the HBM floor that the model keeps.
"""
REFUSED = """
## Rows refused

MoE rows timed faster than the weights of their experts can be read from HBM, with all larger token counts of the shape
(the benchmark's router cannot have hit that many experts), and rows of ranks without a whole (token, expert) pair:
"""

if __name__ == "__main__":
    main()
