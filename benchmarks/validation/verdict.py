"""The first words of results/validation/README.md: what is predicted how well, and what is not.

A sentence holds names in place of figures: `moe` is the median of the row that ROWS names, `moe.p90` its p90,
`moe.simple` the median of what stands beside it. Each row has the verdict that its sentence speaks of, else the page is
not made.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.validation.rows import Row, percent

__all__ = ["Parts", "pick", "verdict"]

Parts = Mapping[str, tuple[Any, list[Row]]]

GOOD = """
**Good.** A GPU's operators, from a few timed points: a fused MoE layer is {moe} % off in the median between eight
token counts ({moe.simple} % by interpolating them) and {new} % for shapes that were never timed; GEMMs of another GPU
{gemm} % from at most four sizes ({gemm.simple} %). Uneven load is where counting single experts pays: {load} %
against {load.simple} % for a model that sees totals alone, and {hit} % (over the bound of 5) against {hit.simple} %
where batches hit a part of the experts. A layer on a calibrated CPU thread is {layer} % off, a step with experts on a
disk {disk} %, decoding with experts on a CPU {kt} %, the shipped H100's large all-reduces {other} % on somebody
else's machine, DeepEP's kernels inside a node {deep} %. Hit rates of LRU caches lie within {lru.p90} points.
"""
BAD = """
**Not good.** Sizes far below anything timed ({small} %). Kernels that jump between configurations (Mixtral's on an
A100: {mixtral} %; interpolating does no better). Numbers of GPUs or nodes that were never timed ({ranks} % for an
all-gather, where the middle between two timed ones gives {ranks.simple} %; {nodes} % for DeepEP on four nodes). What
an engine does around DeepEP's kernels, which is not priced ({engine} %). LFU on other text ({lfu} points). How the
load of synthetic routing varies from batch to batch ({vary.p90} % at the p90; its mean is good), and how balanced a
training run ends ({train} %).
"""
STEPS = "**Whole steps**, predicted and sealed before the first one ran."
ROWS: dict[str, tuple[str, str, str, str]] = {
    "moe": ("h100", "fused MoE, bf16 and FP8, two engines", "", "within"),
    "new": ("h100", "fused MoE, shapes never timed", "", "within"),
    "gemm": ("infersim", "H20, GEMM", "", "within"),
    "load": ("a800", "uneven load", "", "within"),
    "hit": ("rtx_pro_6000", "fused MoE, load on a part of the experts", "", "missed"),
    "layer": ("cpu_layer", "MoE layer, 1 to 255 tokens", "", "within"),
    "disk": ("offload_real", "step, five policies and prefetches at four cache sizes", "", "within"),
    "kt": ("ktransformers", "ms a token, frequency", "", "within"),
    "other": ("dgx_h100", "all-reduce, 1 to 64 MiB, profile as shipped", "", "within"),
    "lru": ("moe_lrc", "hit rate, LRU", "", "within"),
    "small": ("a800", "uneven load, smaller than anything fitted", "", "missed"),
    "mixtral": ("a100_mixtral", "token counts held out", "", "missed"),
    "ranks": ("h100_links", "all-gather, NCCL", "4 GPUs", "missed"),
    "deep": ("h100_links", "DeepEP normal kernels, 20 SMs", "counts", "within"),
    "nodes": ("h100_nodes", "DeepEP normal kernels", "", "missed"),
    "engine": ("vllm_deepep", "DeepEP normal kernels, 20 SMs", "", "missed"),
    "lfu": ("moe_lrc", "hit rate, LFU", "", "missed"),
    "vary": ("synthetic_routing", "how that load varies from batch to batch", "", "missed"),
    "train": ("training_balance", "MaxVio at the end, on recorded scores", "", "missed"),
}
"""name -> check, row, a part of what it held out, its verdict"""


def pick(parts: Parts, check: str, what: str, held_out: str, expected: str) -> Row:
    """The row that a sentence speaks of. Raises ValueError where it is not there or has another verdict."""
    for row in parts[check][1]:
        if row.what == what and held_out in row.held_out:
            if row.verdict() != expected:
                raise ValueError(f"the page says {expected} of {what!r}, which is {row.verdict()}: mend verdict.py")
            return row
    raise ValueError(f"no row {what!r} in {check}: run `python benchmarks/validation/page.py --measure {check}`")


def verdict(parts: Parts) -> str:
    """Two paragraphs, figures filled in."""
    rows = {name: pick(parts, *where) for name, where in ROWS.items()}

    def figure(match: re.Match[str]) -> str:
        name, _, which = match[1].partition(".")
        row = rows[name]
        values = {"": row.found.median, "p90": row.found.p90}
        return percent(row.beside[0].median if which == "simple" else values[which])

    filled = [re.sub(r"\{([a-z0-9.]+)\}", figure, text) for text in (GOOD, BAD)]
    told = [steps(check, found) for name, (check, found) in parts.items() if name.startswith("raw/")]
    if told:
        filled.insert(1, f"{STEPS} {' '.join(told)}")
    return "\n\n".join(textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False) for text in filled)


def steps(check: Any, rows: list[Row]) -> str:
    """One run of `moesim validate`, whatever its verdict."""
    step = next(row for row in rows if row.what == "step time")
    held = next(row for row in rows if row.inside is not None)
    f, r = step.found, check.report
    tau = "" if f.tau is None else f", tau {f.tau:.2f}"
    off = f"{f.n} steps are {percent(f.median)} % off, nine in ten within {percent(f.p90)} %{tau}: {step.verdict()}"
    return f"{check.SOURCE.machine} (`{r['scenario']}`): {off}; {held.inside} of {held.found.n} intervals of 90 % held."
