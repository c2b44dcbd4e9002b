"""moe-lrc: hit rates of expert caches (read off vector plots, about 0.005), and tokens/s of ten small models with
experts offloaded. Routes are ESFT's: other fine-tunings of DeepSeek-V2-Lite's shape on one task each, where theirs
are the base model on 11 corpora; so hit rates of theirs are met on other text."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from benchmarks.validation.rows import ROOT, Beside, Bound, Found, Row, Source, found

GROUP = "offload"
TITLE = "moe-lrc: hit rates and throughput of expert caches"
SOURCE = Source(
    "moe-lrc",
    "github.com/ljcleo/moe-lrc plot/mchr.pdf, msch.pdf, src/D3_tp_plot.ipynb",
    "files' sha256 7f4e771f8b97ee25, 99d46d13f28385c7, 626dfdaccfe444da",
    "MIT",
    (
        "published/moe_lrc_hit_rates.json",
        "published/moe_lrc_sch.json",
        "published/moe_lrc_toy_throughput.csv",
        "routing/esft_dsv2lite_intent.npz",
        "routing/esft_dsv2lite_summary.npz",
    ),
    "DeepSeek-V2-Lite; ten toy models on their GPU",
)
SLOW = True
"""half a minute; tests/validation/test_moe_lrc.py asserts a part in seconds"""
POINTS = Bound("hit rates on other fine-tuning and other text, read off to 0.5 points: set before looking", None, 0.04)
TOYS = Bound("tokens/s of toy models: each within 10 %, as offload.md asks", None, 0.10)


def hit_rates() -> list[Row]:
    """Each policy at one, two and three times the active experts, both tasks: differences of hit rates."""
    import claims_caches as cc

    out = []
    rho = np.array(cc.RHOS)
    evenly = rho * cc.TOP_K / cc.EXPERTS
    for what, (file, name), policy, ahead in (
        ("LRU", ("moe_lrc_hit_rates.json", "LRU"), "lru", 1),
        ("Belady", ("moe_lrc_hit_rates.json", "Beladi"), "opt", 1),
        ("LFU", ("moe_lrc_hit_rates.json", "LFU"), "lfu", 1),
        *((f"segment cache, m = {m}", ("moe_lrc_sch.json", f"m{m}"), "segment", m) for m in (4, 16, 64, 256)),
    ):
        theirs = np.array([cc.published(file)[name][str(r)] for r in cc.RHOS])
        gap = np.concatenate([np.abs(np.array(cc.ours(task, policy, ahead)) - theirs) for task in cc.TASKS])
        simple = np.abs(evenly - theirs)
        f = Found(len(gap), float(np.median(gap)), float(gap.max()))
        others = (Beside("experts drawn evenly", float(np.median(simple)), float(simple.max())),)
        out.append(Row(f"hit rate, {what}", "nothing", "rho 1, 2, 3 on two tasks", f, POINTS, others, "points worst"))
    return out


def throughput() -> list[Row]:
    """Tokens/s, one constant from one cell: ms a miss. Each model's own time and its hit rate are theirs, put in."""
    import toys

    rows = [t for t in toys.toys() if (t.model, t.rho) != toys.TOY_FITTED_AT]
    table = toys.toy_table()
    base = {t.rho: t.tokens_s / t.all_on_gpu for t in toys.toys() if t.model == "baseline"}
    out = []
    for what, chosen in (
        ("tokens/s of nine toy models", [t for t in rows if t.model != "nolb"]),
        ("tokens/s of the one without load balancing", [t for t in rows if t.model == "nolb"]),
    ):
        measured = np.array([t.tokens_s for t in chosen])
        ours = np.array([table[t.model, t.rho][1] for t in chosen])
        alone = np.array([t.all_on_gpu * base[t.rho] for t in chosen])
        f, simple = (found(guess, measured, ranked=True) for guess in (ours, alone))
        worst = [float(np.abs(guess / measured - 1).max()) for guess in (ours, alone)]
        out.append(
            Row(
                what,
                "ms a miss, from one cell (baseline, rho 2)",
                "the other cells at rho 1, 2, 3",
                replace(f, p90=worst[0]),
                TOYS,
                (Beside("the baseline's slowdown for all", simple.median, worst[1], simple.tau),),
                "worst",
                "their stated hit rate is of one pooled cache, their caches are one a layer" if len(chosen) < 9 else "",
            )
        )
    return out


def rows() -> list[Row]:
    """Hit rates, then throughput."""
    for name in ("routing", "offload"):
        folder = str(ROOT / "benchmarks" / name)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return [*hit_rates(), *throughput()]
