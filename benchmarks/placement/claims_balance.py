"""Claims about balancing loads: EPLB's figures, the targets of eplb_swap, NVIDIA's replica table, FasterMoE, Lina."""

from __future__ import annotations

import itertools
import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "profiles"))

from balance import LOADS, SHAPES, Shape, bound, loads, place
from claim_page import (
    DATA,
    IDENTITY,
    MISSED,
    NOT_CHECKED,
    REPRODUCED,
    ROOT,
    SHAPE,
    TARGET,
    Row,
    Section,
    table,
    within,
)
from holdout import power_law

from moesim.cost.operators import MoEShape, Operators
from moesim.placement import Placement, PlacementContext, TokenSample
from moesim.placement.lina import Policy as Lina
from moesim.placement.lina import path_popularity
from moesim.placement.shadow import Policy as Shadow
from moesim.policy import load_policy
from moesim.scenario.load import load_profile
from moesim.traces.routing_npz import read

MEASURED = {
    "288/32 hierarchical": (1.380, 1.028),
    "288/32 global": (1.0035, 1.008),
    "320/64 hierarchical": (2.530, 1.161),
    "320/64 global": (1.0245, 1.028),
    "288/144 global": (2.054, 1.055),
    "256/64 global": (10.57, 1.217),
}
"""deepseek-ai/EPLB d52c72d, this project's own run on other draws: zipf 1.0, lognormal 0.5"""
README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]], float
)
README_SLOTS = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)
AIC = DATA / "kernels" / "h100_sxm" / "moe" / "trtllm" / "1.3.0rc10" / "wideep_moe_perf.parquet"
QUOTED = (2.05, 1.81, 0.77)
"""ms: plain, EPLB with 256 slots, with 288"""
TOKENS, RANKS = 16384, 32
DRAWS = 64
RECORDED = TARGET / "placement_balance.md"
PLANNED = (
    "Planned balance by definition: a map is judged on the loads it is made for, as EPLB's own figure is; on later"
    " batches see the sections on executed balance, interval and held-out traffic."
)


@cache
def _loads(kind: str) -> np.ndarray:
    return loads(kind)


@cache
def _balance(kind: str, load: str, shape: Shape, effort: int = 20) -> np.ndarray:
    parameters = {"effort": effort} if kind == "eplb_swap" else {}
    return place(kind, _loads(load), shape, **parameters).balance(_loads(load))


# ---- EPLB


def eplb() -> Section:
    """What our EPLB gives where the original was measured, and its published example."""
    rows = [_readme()]
    for shape in SHAPES:
        if shape.name in MEASURED:
            loose = shape.mode == "hierarchical" or shape.redundant == 0
            tolerance = 0.06 if loose else 0.015
            ours = [float(_balance("eplb", load, shape).mean()) for load in LOADS]
            fine = all(within(a, b, tolerance) for a, b in zip(ours, MEASURED[shape.name], strict=True))
            rows.append(
                Row(
                    "EPLB's code, measured for this project (no figure is published)",
                    f"{shape.name}, {shape.nodes} nodes, 58 layers of 256 experts in 8 groups, 8 M assignments each",
                    "nothing",
                    "max/mean GPU load {:.4g} (zipf 1.0), {:.4g} (lognormal 0.5)".format(*MEASURED[shape.name]),
                    "{:.4g}, {:.4g}".format(*ours),
                    REPRODUCED if fine else MISSED,
                    "few large groups, or single experts, decide: draws differ by several per cent" if loose else "",
                    f"other draws of the loads: each within {100 * tolerance:g} %",
                )
            )
    return Section("eplb", "EPLB: balance in the shapes of DeepSeek's units", rows, [PLANNED, ""])


def _readme() -> Row:
    placement = load_policy("placement", {"kind": "eplb", "num_redundant_experts": 4}).place(
        README, PlacementContext(8, 2, 4)
    )
    same = bool((placement.slot_to_expert_LS == README_SLOTS).all())
    return Row(
        "EPLB README",
        "its example: 2 layers, 12 experts in 4 groups, 16 replicas, 8 GPUs on 2 nodes",
        "nothing",
        "the map it prints",
        "the same map" if same else "another map",
        IDENTITY if same else MISSED,
        "",
        "all 32 slots hold the same experts",
    )


# ---- eplb_swap


def swap() -> Section:
    """The project's own targets for eplb_swap, and how far its maps are from a proven bound."""
    rows, lines = [], []
    worse = 0.0
    for load in LOADS:
        for shape in SHAPES:
            least = float(bound(_loads(load), shape).mean())
            swaps, found = (_balance("eplb_swap", load, shape, effort) for effort in (0, 20))
            plain = None if shape.uneven else _balance("eplb", load, shape)
            if plain is not None:
                worse = max(worse, float((swaps / plain).max()), float((found / plain).max()))
            told = "refused" if plain is None else f"{plain.mean():.4f}"
            cells = [load, shape.name, f"{least:.4f}", told, f"{swaps.mean():.5f}", f"{found.mean():.5f}"]
            lines.append([*cells, f"{100 * (found.mean() / least - 1):.3f} %"])
    rows.append(
        Row(
            "this project's target: never worse than EPLB in the same mode",
            "all shapes that EPLB takes, both loads, every layer",
            "nothing", "at most 1 times EPLB's max/mean", f"{worse:.6f}", REPRODUCED if worse <= 1 + 1e-9 else MISSED,
            "", "every layer, swaps alone and with 20 kicks, 1e-9 for rounding",
        )
    )  # fmt: skip
    for redundant, ranks, asked in ((64, 64, 1.001), (32, 32, 1.001), (32, 64, 1.005)):
        shape = next(s for s in SHAPES if (s.redundant, s.ranks, s.mode) == (redundant, ranks, "global"))
        ours = [float(_balance("eplb_swap", load, shape).mean()) for load in LOADS]
        rows.append(
            Row(
                f"this project's target: {shape.slots} slots on {ranks} ranks, global",
                "58 layers, both loads, 20 kicks (CPU seconds: below, where a limit is asked)",
                "number of kicks, on other draws",
                f"mean of max/mean at most {asked:g}",
                "{:.5f} (zipf 1.0), {:.5f} (lognormal 0.5)".format(*ours),
                REPRODUCED if max(ours) <= asked else MISSED,
                "EPLB refuses this shape: ranks do not divide the slots" if shape.uneven else "",
                f"both at most {asked:g}",
            )
        )
    rows += _measured()
    head = ("loads", "slots/ranks", "proven bound", "EPLB", "swaps alone", "20 kicks", "gap to the bound")
    body = [f"Largest over mean rank load, mean of 58 layers. {PLANNED} CPU seconds: placement_balance.md.", ""]
    return Section("swap", "EPLB's greedy with swaps and replica moves", rows, [*body, *table(head, lines)])


def _measured() -> list[Row]:
    """What is asked of CPU time, held against the seconds that balance.py measured and wrote down."""
    setup = "as measured in results/validation/placement_balance.md"
    if not RECORDED.exists():
        return [
            Row("this project's target: CPU seconds", setup, "nothing", "-", "-", NOT_CHECKED, "the page is not there")
        ]
    rows, held = [], recorded()
    uneven = held["zipf", "288/64 global"]
    for asked, limit_s in ((1.01, 1.0), (1.005, 5.0)):
        tried = {head.partition("effort ")[2]: _figures(cell) for head, cell in uneven.items() if "effort" in head}
        met = {effort: f for effort, f in tried.items() if f[0] <= asked and f[1] <= limit_s}
        effort = next(iter(met or tried))
        balance, spent_s = tried[effort]
        rows.append(
            Row(
                f"this project's target: 288 slots on 64 ranks within {limit_s:g} s",
                f"58 layers, zipf 1.0, {setup}",
                "effort, the least of three that does",
                f"mean of max/mean at most {asked:g} in {limit_s:g} s",
                f"{balance:.5f} in {spent_s:.2f} CPU s at effort {effort} (kicks a layer; 0: swaps alone)",
                REPRODUCED if met else MISSED,
                "seconds of one process on a busy machine",
                f"some effort of {', '.join(tried)} keeps both",
            )
        )
    taken = [cells for cells in held.values() if cells["EPLB original"] != "refused"]
    times = [float(cells["CPU of EPLB / greedy + swap"]) for cells in taken]
    rows.append(
        Row(
            "this project's target: greedy + swap takes at most a fifth of EPLB's CPU time",
            f"deepseek-ai/EPLB on PyTorch, one thread, in the same process; {len(times)} shapes and loads, {setup}",
            "nothing",
            "EPLB's CPU seconds at least 5 times those of greedy + swap",
            f"{min(times):.0f} to {max(times):.0f} times",
            REPRODUCED if min(times) >= 5 else MISSED,
            "",
            "every shape that EPLB takes, both loads",
        )
    )
    return rows


def recorded() -> dict[tuple[str, str], dict[str, str]]:
    """placement_balance.md's table: (loads, slots/ranks) -> head -> cell."""
    lines = [line for line in RECORDED.read_text("utf-8").splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


def _figures(cell: str) -> tuple[float, float]:
    """Mean balance and CPU seconds of a cell."""
    return float(cell.split()[0]), float(cell.split()[-2])


# ---- NVIDIA's table of replicas


def _counts(seed: int) -> np.ndarray:
    return power_law(TOKENS, 256, 8, 1.2, seed)[None].astype(np.float64)


@cache
def _drawn() -> dict[str, np.ndarray]:
    """Busiest rank's rows over the mean, and ns of its experts, for each draw of the loads: [DRAWS, 2] by placement."""
    ops = Operators(load_profile(ROOT / "hw_profiles" / "h100_sxm.yaml"))
    kinds = {"plain": ("contiguous", 0), "eplb 256": ("eplb", 0), "eplb 288": ("eplb", 32)}
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for seed in range(DRAWS):
        count_LE = _counts(seed)
        for name, (kind, redundant) in kinds.items():
            placement = load_policy("placement", {"kind": kind, "num_redundant_experts": redundant}).place(
                count_LE, PlacementContext(RANKS)
            )
            out[name].append((float(placement.balance(count_LE)[0]), _slowest(ops, placement, count_LE)))
    return {name: np.array(rows) for name, rows in out.items()}


def _slowest(ops: Operators, placement: Placement, count_LE: np.ndarray) -> float:
    """Milliseconds of the slowest rank's grouped GEMMs, DeepSeek-V3's experts in fp8."""
    share_LS = placement.of_slots(count_LE / placement.replica_count_LE)
    rows_GQ = share_LS.reshape(placement.num_ranks, -1)
    return float(_ms(ops, rows_GQ).max())


def _ms(ops: Operators, rows_GQ: np.ndarray) -> np.ndarray:
    shape = MoEShape(7168, 2048, rows_GQ.shape[1], 8, "fp8_block", True)
    work_G = ops.moe_work(rows_GQ, "fp8_block").sum(axis=1)
    priced = ops.moe(rows_GQ.sum(axis=1), (rows_GQ > 0).sum(axis=1), work_G, 0.0, shape)
    return np.asarray(priced.ns) / 1e6


def replicas() -> Section:
    """EP32, 16,384 tokens, power_law_1.2: plain, EPLB without and with 32 redundant experts."""
    import pyarrow.parquet as pq

    head = ("placement", "table: rows of rank 0", "ours, median", "least .. largest", "table ms", "ours, those rows",
            "ours, median draw")  # fmt: skip
    claim = "2.05 ms plain, 1.81 ms with EPLB and 256 slots, 0.77 ms with 288"
    setup = f"EP{RANKS}, {TOKENS:,} tokens, 256 experts, 8 a token, power_law_1.2, H100, fp8 blocks"
    placed = setup + "; in-sample, as in AIC: each draw is placed by its own loads"
    if not AIC.exists():
        return Section(
            "replicas", "NVIDIA's table of replicas", [Row("AIC", setup, "nothing", claim, "-", NOT_CHECKED)]
        )
    frame = pq.read_table(AIC).to_pandas()
    take = (frame.moe_ep_size == RANKS) & (frame.num_tokens == TOKENS) & (frame.num_experts == 256)
    take &= (frame.hidden_size == 7168) & frame.distribution.str.startswith("power_law_1.2")
    some, mean = frame[take], TOKENS * 8 / RANKS
    ops, drawn = Operators(load_profile(ROOT / "hw_profiles" / "h100_sxm.yaml")), _drawn()
    lines, inside, near, measured, ours = [], [], [], {}, {}
    for name, (op, slots) in {
        "plain": ("wideep_moe", 256), "eplb 256": ("wideep_moe_eplb", 256), "eplb 288": ("wideep_moe_eplb", 288),
    }.items():  # fmt: skip
        row = some[(some.op_name == op) & (some.num_slots == slots)].iloc[0]
        ratio, (low, high) = float(row.rank0_num_tokens) / mean, (drawn[name][:, 0].min(), drawn[name][:, 0].max())
        room = slots // RANKS
        priced = float(_ms(ops, np.full((1, room), row.rank0_num_tokens / room))[0])
        measured[name], ours[name] = float(row.latency), float(np.median(drawn[name][:, 1]))
        inside.append(low * 0.999 <= ratio <= high * 1.05)
        near.append(within(priced, measured[name], 0.25))
        lines.append([name, f"{ratio:.2f} x mean", f"{np.median(drawn[name][:, 0]):.2f}", f"{low:.2f} .. {high:.2f}",
                      f"{measured[name]:.2f}", f"{priced:.2f}", f"{ours[name]:.2f}"])  # fmt: skip
    near_quoted = all(within(ours[n], c, 0.15) for n, c in zip(ours, QUOTED, strict=True))
    rows = [
        Row("aiconfigurator's table, rows of rank 0", placed, "nothing",
            ", ".join(f"{line[0]} {line[1]}" for line in lines), ", ".join(f"{line[0]} {line[3]}" for line in lines),
            SHAPE if all(inside) else MISSED,
            "one draw there, 64 here, and their range is wide; rank 0 is there the busiest by choice",
            "each of the table's within the range of 64 draws of its law, placed by our contiguous and eplb (the"
            " largest widened by 5 %)"),
        Row("aiconfigurator's table, ms of these rows", setup + ", TensorRT-LLM Cutlass", "nothing",
            ", ".join(f"{k} {v:.2f} ms" for k, v in measured.items()),
            ", ".join(f"{line[0]} {line[5]} ms" for line in lines), REPRODUCED if all(near) else MISSED,
            "our profile holds vLLM's Triton kernels; the split of rank 0's rows over its experts is not in the table,"
            " here it is even", "each within 25 %"),
        Row("AIC, as this project's notes on peers quote it", placed, "nothing", claim,
            f"medians {ours['plain']:.2f}, {ours['eplb 256']:.2f}, {ours['eplb 288']:.2f} ms",
            SHAPE if near_quoted else MISSED,
            "off by "
            + ", ".join(f"{100 * (ours[n] / c - 1):+.0f} %" for n, c in zip(ours, QUOTED, strict=True))
            + ". The quoted figures are not those of the H100 rows in this table, so only the scale compares. At first"
            " their ratios were asked to lie within the range of 64 draws, which they could hardly miss; 15 % of the"
            " medians was set later, with the medians known", "each median within 15 %"),
    ]  # fmt: skip
    return Section("replicas", "NVIDIA's table of replicas", rows, table(head, lines))


# ---- FasterMoE


def fastermoe() -> Section:
    """Dynamic shadowing under its own prices: when it pays, and how the gain grows with skew."""
    ctx, rows, gains = PlacementContext(64), 64 * 2048.0, []
    policy = Shadow(tokens=rows)
    exponents = (0.0, 0.5, 1.0, 1.5)
    lines = []
    for exponent in exponents:
        share_E = np.arange(1, 65) ** -exponent
        weight_LE = (rows * share_E / share_E.sum())[None]
        shadowed = policy.place(weight_LE, ctx)
        plain = policy.model_copy(update={"max_shadows": 0}).place(weight_LE, ctx)
        before, after = (float(policy.objective(p, weight_LE, ctx)[0]) for p in (plain, shadowed))
        number = int((shadowed.replica_count_LE == 64).sum())
        gains.append((number, before / after))
        lines.append(
            [f"{exponent:g}", str(number), f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / after:.2f}"]
        )
    rises = all(a[1] <= b[1] for a, b in itertools.pairwise(gains))
    setup = "64 experts on 64 ranks, 2,048 rows a rank, the paper's prices (d 2048, alpha 2, 50 Gb/s, 11.5 TFLOP/s)"
    found = [
        Row("FasterMoE (PPoPP'22), dynamic shadowing", setup, "popularity 1 / rank^x, ours",
            "shadows where popularity is skewed, none where it is balanced; the gain grows with skew",
            ", ".join(f"x {x:g}: {n} shadows, {g:.2f}x" for x, (n, g) in zip(exponents, gains, strict=True)),
            SHAPE if rises and gains[0][0] == 0 and gains[-1][0] > 0 else MISSED,
            "modelled time of one layer by the paper's own formula", "no shadow at x = 0, gains in order of x"),
        Row("FasterMoE, end to end", "up to 64 GPUs, against DeepSpeed's ZeRO and FastMoE", "nothing",
            "1.37 to 17.87x", "-", NOT_CHECKED,
            "whole systems with three optimisations together, on clusters whose expert loads are not published"),
    ]  # fmt: skip
    head = ("x", "shadows", "modelled ms, none", "with shadows", "gain")
    return Section("fastermoe", "FasterMoE: shadows of the hottest experts", found, table(head, lines))


# ---- Lina


def lina() -> Section:
    """Replicas by popularity along paths, on recorded tokens that the map has not seen."""
    setup = "ESFT intent (64 experts, 6 a token, 26 layers), 16 ranks, 16 redundant; last third of the sequences"
    rows = [
        Row("Lina (ATC'23), inference", "16 A100, 100 Gb/s", "nothing", "1.45x median, 1.63x p95 of inference time",
            "-", NOT_CHECKED, "top-1 and top-2 gates of models that are not public; the paper's text was not at hand"),
    ]  # fmt: skip
    path = DATA / "routing" / "esft_dsv2lite_intent.npz"
    if not path.exists():
        return Section("lina", "Lina: popularity along paths", rows)
    source = read(path, 64)
    ids, starts = source.expert_TLK, np.asarray(source.sequence_start)
    sequence_T = np.searchsorted(starts, np.arange(len(ids)), side="right") - 1
    known = sequence_T < len(source.sequence_tokens_Q) * 2 // 3
    sample = TokenSample(ids[known], sequence_T[known], 64)
    fitted_LE, later_LE = (source.counted(ids[of]).astype(np.float64) for of in (known, ~known))
    ctx = PlacementContext(16, sample=sample)
    placement = Lina(num_redundant_experts=16).place(fitted_LE, ctx)
    plain = load_policy("placement", {"kind": "contiguous", "num_redundant_experts": 16}).place(fitted_LE, ctx)
    greedy = load_policy("placement", {"kind": "eplb", "num_redundant_experts": 16}).place(fitted_LE, ctx)
    ours, before, theirs = (float(p.balance(later_LE).mean()) for p in (placement, plain, greedy))
    rows.append(
        Row("Lina (ATC'23), direction", setup, "nothing", "less imbalance than one place an expert in order",
            f"max/mean {ours:.3f}, contiguous with as many slots {before:.3f} (EPLB {theirs:.3f})",
            SHAPE if ours < before else MISSED, "a reconstruction; held-out tokens of the same task",
            "below contiguous on tokens that the map has not seen"))  # fmt: skip
    rows.append(_top(sample, source.counted(sample.expert_TLK), setup))
    return Section("lina", "Lina: popularity along paths", rows)


def _top(sample: TokenSample, count_LE: np.ndarray, setup: str) -> Row:
    """How often the estimate's most popular experts are not the batch's."""
    odd = np.unique(sample.sequence_T, return_inverse=True)[1] % 2 == 1
    estimate_LE = path_popularity(sample, 3)
    batch_LE = np.stack(
        [np.bincount(layer.ravel(), minlength=65)[:64] for layer in sample.expert_TLK[odd].transpose(1, 0, 2)]
    )
    differ = [
        set(np.argsort(-e)[:12]) != set(np.argsort(-b)[:12]) for e, b in zip(estimate_LE[3:], batch_LE[3:], strict=True)
    ]
    missed = np.mean([len(set(np.argsort(-e)[:12]) - set(np.argsort(-b)[:12])) / 12
                      for e, b in zip(estimate_LE[3:], batch_LE[3:], strict=True)])  # fmt: skip
    share = float(np.mean(differ))
    return Row(
        "Lina (ATC'23), estimates that are wrong", setup.partition(", 16 ranks")[0] + ", every other sequence a batch",
        "nothing", "the 2k most popular experts differ from the estimate in about 23 % of cases (notes on the paper)",
        f"{100 * share:.0f} % of layers; {100 * missed:.0f} % of the 12 experts",
        SHAPE if 0.23 / 2 <= share <= 0.46 else MISSED,
        "k = 6 of 64 experts here and one long batch, k = 1 or 2 there: a set of 12 differs by one expert more easily",
        "the share of layers within a factor of 2",
    )  # fmt: skip
