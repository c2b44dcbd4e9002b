"""Which replica serves which tokens: LLEP's speed-ups and memory, LPLB's and waterfill's gains, executed balance."""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import DATA, FITTED, IDENTITY, MISSED, NOT_CHECKED, REPRODUCED, ROOT, SHAPE, Row, Section, table, within

from moesim.communication_spec import AllToAll, CommunicationSpec
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.experts import ExpertPrices, Ports
from moesim.cost.operators import Operators
from moesim.dispatch import split_local
from moesim.dispatch.llep import Policy as Llep
from moesim.dispatch.min_max import min_max_split
from moesim.dispatch.plan import Batches, Plan
from moesim.dispatch.static import rank_slots
from moesim.dispatch.waterfill import Policy as Waterfill
from moesim.engine_spec import EngineSpec
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.placement import Placement, PlacementContext
from moesim.policy import load_policy
from moesim.rng import generator
from moesim.scenario.load import load_model, load_profile

SHARES = (0.3, 0.5, 0.8, 0.95)
SPEEDUPS = {"gpt-oss-120b": (2.41, 3.48, 5.26, 6.11), "deepseek-v3": (1.96, 2.77, 4.23, 5.13)}
"""arXiv:2601.17111, figure 4, one imbalanced expert"""
BALANCED = {"gpt-oss-120b": 1.07, "deepseek-v3": 0.92}
PEAK_GB = {"gpt-oss-120b": (61.3, 14.6), "deepseek-v3": (90, 33.5)}
"""the same figure's lower row at 95 %, read off the bars: expert parallelism, LLEP"""
TOKENS = {"gpt-oss-120b": 32768, "deepseek-v3": 16384}
LLEP_RANKS = 8


def model_of(name: str, **changes: object) -> MoEModel:
    return replace(load_model(ROOT / "workloads" / "models" / f"{name}.yaml"), **changes)  # type: ignore[arg-type]


# ---- LLEP


@dataclass(frozen=True)
class LayerTime:
    """ns of one MoE layer's forward pass, and bytes that its busiest rank holds."""

    ns: float
    peak_bytes: float
    sent: float


def counts_of(model: MoEModel, share: float | None, tokens: int) -> np.ndarray:
    """Pairs by expert [E] as the authors' test makes them (`test_llep.py`): all choices of `share` of the tokens are
    expert 0, those of the others go round the other experts. None: balanced."""
    pairs = tokens * LLEP_RANKS * model.top_k
    hot = 0 if share is None else int(tokens * share) * LLEP_RANKS * model.top_k
    first = 0 if share is None else 1
    each, rest = divmod(pairs - hot, model.num_experts - first)
    count = np.full(model.num_experts, each)
    count[first : first + rest] += 1
    if share is not None:
        count[0] = hot
    return count


@cache
def llep_layer(
    name: str, share: float | None, spills: bool, variant: str = "paper", how: AllToAll = "pairwise"
) -> LayerTime:
    """Expert parallelism, or LLEP, on 8 H200: all in bf16, NCCL's all-to-all with a row a pair (`pairwise`), and
    the passes over a rank's own rows that the authors' code makes (`gpt_oss_llep.py`: rows repeated, sorted, sorted
    back, added up)."""
    model = model_of(name, expert_dtype="bf16", weight_dtype="bf16")
    tokens, ranks = TOKENS[name], LLEP_RANKS
    layout = Layout(1, ranks, ranks, ranks, True, CommunicationSpec(all_to_all=how))
    ops = Operators(load_profile(ROOT / "hw_profiles" / "h200_sxm.yaml"), cuda_graph=False)
    placement = Placement(np.arange(model.num_experts)[None], model.num_experts, ranks)
    policy = Llep(variant=variant, threshold=1.3 if spills else 1e6, alpha=1.0, min_tokens=1024)
    plan = policy.plan(Batches(counts_of(model, share, tokens)[None, None], np.zeros((1, ranks))), placement, 0)
    prices = ExpertPrices(model, layout, ops, placement.slots_per_rank)
    rows_G = plan.rows_BLG()[0, 0]
    away = rows_G * (ranks - 1) / ranks  # every rank has the same tokens
    sent = tokens * model.top_k * (ranks - 1) / ranks
    port = np.array([[max(away.max(), sent)]])
    zero = np.zeros((1, 1))
    ports = Ports(port, zero, np.array([[away.sum()]]), zero)
    computed = prices.compute(plan.count_BLW, plan)
    priced = prices.price(computed, np.array([tokens]), ports, moves=prices.moves(plan))
    row_bytes = model.hidden_size * 2.0
    own_rows = tokens * model.top_k
    passes = [2 * own_rows] * 3 + [own_rows]  # repeat, sort, sort back; sum
    own = sum(float(ops.elementwise(n * row_bytes).ns) for n in passes)
    total = float((priced.dispatch + priced.experts + priced.combine).item()) + own
    return LayerTime(total, peak_bytes(model, plan, tokens), float(priced.sent.item()))


def peak_bytes(model: MoEModel, plan: Plan, tokens: int) -> float:
    """What the authors' test holds when the busiest rank's largest expert runs: all experts on every GPU (its stand-in
    for a model is not sharded; a rank's own ones are views of it) and those received; a rank's own rows, repeated and
    sorted; for received rows their inputs, these sorted, and outputs, and for the expert that runs gate and up, both
    clamped, their product, and the product that goes down (equation 4, each tensor of the code)."""
    hidden, inner, size = model.hidden_size, model.moe_intermediate_size, 2.0
    each = plan.slots_per_rank
    count = plan.count_BLW[0, 0].reshape(-1, each)
    weights = 3.0 * hidden * inner * size
    kept = model.num_experts + (count[:, plan.placement.slots_per_rank :] > 0).sum(axis=1)
    rows = count.sum(axis=1) * (3.0 * hidden) + count.max(axis=1) * (6.0 * inner)
    own = tokens * model.top_k * 2.0 * hidden + tokens * hidden
    return float((kept * weights + (rows + own) * size).max())


def speedup(name: str, share: float | None, variant: str = "paper", how: AllToAll = "pairwise") -> float:
    return llep_layer(name, share, False, how=how).ns / llep_layer(name, share, True, variant, how).ns


def furthest(name: str, how: AllToAll = "pairwise") -> float:
    """How far the speed-up that is furthest from the paper's is off, as a share of it."""
    return max(abs(speedup(name, s, how=how) / c - 1) for s, c in zip(SHARES, SPEEDUPS[name], strict=True))


def llep() -> Section:
    """Speed-ups and memory of figure 4."""
    rows = []
    asked = "every speed-up within 15 %: reproduced; within 35 % and in the same order: shape"
    for name, claimed in SPEEDUPS.items():
        ours = [speedup(name, share) for share in SHARES]
        off = furthest(name)
        rising = all(a < b for a, b in itertools.pairwise(ours))
        verdict = REPRODUCED if off <= 0.15 else SHAPE if off <= 0.35 and rising else MISSED
        rows.append(
            Row(
                "LLEP, arXiv:2601.17111, figure 4",
                f"{name}'s MoE layer forward, 8 H200, bf16, {TOKENS[name]:,} tokens a GPU, 30/50/80/95 % into 1 expert,"
                " lambda 1.3, alpha 1, m 1024",
                "all-to-all pairwise (the paper's NCCL), set after a first run; over the default, DeepEP's prices, the"
                f" furthest would be {furthest(name, 'auto'):.0%} off",
                " / ".join(f"{c:.2f}" for c in claimed),
                " / ".join(f"{o:.2f}" for o in ours),
                verdict,
                f"furthest off {off:.0%}. Planning in Python with its synchronisation, and launches expert by"
                " expert, are not priced; what is missing is nearly the same time at every share (last column below)",
                asked,
            )
        )
    for name, claim in BALANCED.items():
        ours = speedup(name, None)
        rows.append(
            Row(
                "LLEP, figure 4, balanced",
                f"{name}, the same set-up",
                "nothing",
                f"{claim:.2f}",
                f"{ours:.2f}",
                IDENTITY if abs(ours - claim) <= 0.1 else MISSED,
                "below lambda the same plan runs, so ours is 1; what the check costs is not priced",
                "within 0.1",
            )
        )
    for name, (plain, spilled) in PEAK_GB.items():
        ours = [llep_layer(name, 0.95, spills).peak_bytes / 1e9 for spills in (False, True)]
        ratio, claim = ours[0] / ours[1], plain / spilled
        rows.append(
            Row(
                "LLEP, figure 4, peak memory (abstract: 4x; section 5.1: up to 5x)",
                f"{name}, 95 % into 1 expert",
                "all experts kept on every GPU (as in the authors' test), put in after a first count missed",
                f"{plain:.0f} GB against {spilled:.0f} GB: {claim:.1f}x less",
                f"{ours[0]:.0f} GB against {ours[1]:.0f} GB: {ratio:.1f}x less",
                FITTED if within(ratio, claim, 0.2) else MISSED,
                "tensors alive were read off the authors' code and test. Bars were read off the figure to about 1 GB",
                "ratio within 20 %",
            )
        )
    shown = []
    for name, claimed in SPEEDUPS.items():
        for share, claim in zip((None, *SHARES), (BALANCED[name], *claimed), strict=True):
            plain, spilled = llep_layer(name, share, False), llep_layer(name, share, True)
            missing = (plain.ns / claim - spilled.ns) / 1e6
            shown.append(
                (
                    name, "balanced" if share is None else f"{share:.0%}", f"{plain.ns / 1e6:.2f}",
                    f"{spilled.ns / 1e6:.2f}", f"{spilled.sent:.0f}", f"{speedup(name, share, 'code'):.2f}",
                    f"{plain.peak_bytes / 1e9:.1f}", f"{spilled.peak_bytes / 1e9:.1f}", f"{missing:+.1f}",
                )
            )  # fmt: skip
    head = ["model", "into one expert", "EP ms", "LLEP ms", "experts sent", "speed-up of the code's variant"]
    head += ["EP GB", "LLEP GB", "ms that LLEP would have to take longer for the claim"]
    return Section("llep", "LLEP: spilling tokens with weights", rows, table(head, shown))


# ---- LPLB and waterfill on two nodes

LPLB = {"red16": (1.52, 0.86, 4.26), "red32": (2.72, 0.84, 7.34)}
WATERFILL = {"red0": (3.40, 2.46, 4.45), "red16": (2.76, 2.14, 3.53), "red32": (1.48, 2.62, 3.19)}
"""per cent of total throughput on MMLU, GPQA, GSM8K (lmsys.org/blog/2026-06-26-waterfill-lplb, the table)"""
SHARED = "the shared expert's rows and copies cost more among the routed ones than its own GEMM does"
SIGMAS = (0.0, 0.3, 0.6)
DRAWS = 8
PROMPT = 256


def recorded() -> np.ndarray | None:
    """Loads of DeepSeek-V3's layers 3 to 18 [16, 256]; None where they are not there."""
    path = DATA / "routing" / "deepseek_v3_counts_l3_18.csv"
    if not path.exists():
        return None
    with path.open() as file:
        return np.array([[float(x) for x in row[1:]] for row in list(csv.reader(file))[1:]])


class TwoNodes:
    """DeepSeek-V3 on 2 nodes of 8 H100, EP16: what a prefill step takes under a dispatch."""

    def __init__(self, tokens: int, redundant: int) -> None:
        """tokens: of each rank."""
        self.tokens, self.ranks, self.nodes = tokens, 16, 2
        self.model = model_of("deepseek-v3")
        self.layout = Layout(1, 16, 16, 8, True)
        self.ops = Operators(load_profile(ROOT / "hw_profiles" / "h100_sxm.yaml"))
        load_LE = recorded()
        assert load_LE is not None
        self.load_LE = load_LE
        policy = load_policy("placement", {"kind": "eplb", "num_redundant_experts": redundant})
        self.placement = policy.place(load_LE, PlacementContext(16, 2))
        self.prices = ExpertPrices(self.model, self.layout, self.ops, self.placement.slots_per_rank)
        number = np.array([tokens])
        self.dense = {
            shared: DenseTables(self.model, self.layout, EngineSpec(), self.ops, True, number, shared).total_N.item()
            for shared in (True, False)
        }
        shape = attention_shape(self.model, 1, False)
        sequences = tokens / PROMPT
        attention = float(self.ops.attention_prefill(PROMPT, PROMPT, shape, sequences).ns)
        self.attention = attention * self.model.num_layers

    def batch(self, sigma: float, draw: int) -> np.ndarray:
        """Pairs by expert [1, L, E] of a batch whose popularity is off the recorded one by `sigma`."""
        rng = generator(draw, "dispatch/two-nodes", round(sigma * 100))
        share_LE = self.load_LE * np.exp(sigma * rng.standard_normal(self.load_LE.shape))
        pairs = self.tokens * self.ranks * self.model.top_k
        return np.stack([rng.multinomial(pairs, row / row.sum()) for row in share_LE])[None]

    def step_ns(self, count_BLE: np.ndarray, kind: str) -> float:
        """static, lp (SGLang's two), or waterfill on top of static."""
        tokens, ranks = self.tokens, self.ranks
        total, pairs = tokens * ranks, tokens * ranks * self.model.top_k
        own = {"lp": "lp"}.get(kind, "static")
        policy = Waterfill(routed=own, min_batch=0 if kind == "waterfill" else 1 << 30)
        from_BG = np.full((1, ranks), float(tokens))
        first = policy.plan(Batches(count_BLE, from_BG), self.placement, 0)
        load_BLG = first.rows_BLG(shared=False)
        at_GN = np.arange(ranks)[:, None] // 8 == np.arange(self.nodes)
        # tokens that reach a place: its share of the pairs drawn with each of their choices
        reach = [total * (1 - (1 - load / pairs) ** self.model.top_k) for load in (load_BLG, load_BLG @ at_GN)]
        plan = policy.plan(Batches(count_BLE, from_BG, *reach), self.placement, 0)
        copies = [reach[0] * (1 - 1 / ranks), reach[1] * (1 - 1 / self.nodes)]
        if plan.copies_BLG is not None and kind == "waterfill":
            copies = [copies[0] + plan.copies_BLG, copies[1] + plan.copies_BLN]
        ports = Ports(
            np.maximum(copies[0].max(axis=2), copies[0].sum(axis=2) / ranks),
            np.maximum(copies[1].max(axis=2) / 8, copies[1].sum(axis=2) / ranks),
            copies[0].sum(axis=2),
            copies[1].sum(axis=2),
        )
        fused = kind == "waterfill"
        rows = plan.count_BLW if fused else plan.own(plan.count_BLW)
        computed = self.prices.compute(rows, plan if fused else None)
        priced = self.prices.price(computed, np.array([tokens]), ports)
        layer = float((priced.dispatch + priced.experts + priced.combine).mean())
        return layer * self.model.num_moe_passes + self.dense[not fused] + self.attention


@cache
def gains(kind: str, redundant: int, sigma: float, tokens: int = 4096) -> tuple[float, float]:
    """Per cent of throughput over static dispatch: mean over draws, half of its 90 % interval."""
    two = TwoNodes(tokens, redundant)
    found = []
    for draw in range(DRAWS):
        count = two.batch(sigma, draw)
        found.append(100 * (two.step_ns(count, "static") / two.step_ns(count, kind) - 1))
    return float(np.mean(found)), float(1.895 * np.std(found, ddof=1) / np.sqrt(DRAWS))


def two_nodes() -> Section:
    """LPLB and waterfill over EPLB with static dispatch."""
    title = "LPLB and waterfill on two Hopper nodes"
    source = "SGLang blog of 2026-06-26, waterfill and LPLB"
    setup = "DeepSeek-V3, 16 H100, EP16, prefill, EPLB on recorded loads of layers 3 to 18, 4,096 tokens a GPU"
    if recorded() is None:
        why = "recorded loads are not on this machine"
        rows = [Row(source, setup, "nothing", "+0.84 to +7.34 %; +1.48 to +4.66 %", "", NOT_CHECKED, why)]
        return Section("two-nodes", title, rows)
    rows = []
    asked = "the gain at some drift of 0 to 0.6 lies in the claim's range: shape (the drift is not published)"
    for kind, claimed in (("lp", LPLB), ("waterfill", WATERFILL)):
        for red, percent in claimed.items():
            ours = [gains(kind, int(red[3:]), sigma)[0] for sigma in SIGMAS]
            inside = any(min(percent) <= o <= max(percent) for o in ours)
            loss = f"; {ours[0]:+.1f} % at drift 0: where no rank idles, {SHARED}" if ours[0] < 0 else ""
            rows.append(
                Row(
                    source,
                    f"{kind}, {red}; {setup}",
                    "drift, best of three",
                    f"+{min(percent):.2f} to +{max(percent):.2f} % (MMLU, GPQA, GSM8K)",
                    ", ".join(f"{o:+.2f} %" for o in ours) + " at drift 0, 0.3, 0.6",
                    SHAPE if inside else MISSED,
                    "the datasets' routing is not public: popularity is the recorded one times a lognormal of that"
                    f" width; what planning costs (claim without replicas: -1.0 to -1.6 %) is not priced{loss}",
                    asked,
                )
            )
    shown = [
        (kind, red, f"{tokens:,}", *("{:+.2f} +- {:.2f} %".format(*gains(kind, red, s, tokens)) for s in SIGMAS))
        for kind in ("lp", "waterfill")
        for red in (0, 16, 32)
        for tokens in (1024, 4096)
    ]
    head = ("dispatch", "redundant", "tokens a GPU", *(f"drift {s:g}" for s in SIGMAS))
    lines = [
        "Total throughput over static dispatch on the same map, mean of 8 batches and its 90 % interval. 16 recorded"
        " layers stand for 58.",
        "",
        *table(head, shown),
    ]
    return Section("two-nodes", title, rows, lines)


# ---- executed balance

CASES = {"decode EP64, 128 tokens a GPU": (64, 128, 64), "prefill EP32, 4,096 tokens a GPU": (32, 4096, 32)}
"""ranks, tokens of each, redundant experts"""
NOTES = dict(zip(CASES, ((1.46, 1.32), (1.30, 1.17)), strict=True))
"""max/mean at drift 0.3, replicas drawn at random and by linear program, that the notes' prototype gave"""
KINDS = ("random", "static", "local_first", "lp", "llep")
LAYERS, BATCHES, EXPERTS, TOP_K = 4, 8, 256, 8


def slots_of(kind: str, count_GLE: np.ndarray, placement: Placement, rng: np.random.Generator) -> np.ndarray:
    """Rank loads [L, G] of a batch. count_GLE: pairs by source rank and expert."""
    count_LE = count_GLE.sum(axis=0)
    if kind == "lp":
        return placement.rank_load(min_max_split(count_LE[None], placement)[0])
    if kind == "llep":
        policy = Llep(min_tokens=max(8, int(count_LE[0].sum() / placement.num_ranks / 16)))
        tokens = np.zeros((1, placement.num_ranks))
        return policy.plan(Batches(count_LE[None], tokens), placement, 0).rows_BLG()[0]
    if kind == "local_first":
        return placement.rank_load(split_local(count_GLE, placement).sum(axis=0))
    out = np.zeros((LAYERS, placement.num_slots), np.int64)
    if kind == "static":
        slot_GLE = rank_slots(placement, 0)
        for layer in range(LAYERS):
            np.add.at(out[layer], slot_GLE[:, layer], count_GLE[:, layer])
        return placement.rank_load(out)
    for layer in range(LAYERS):
        number = placement.replica_count_LE[layer]
        for expert in range(EXPERTS):
            slots = placement.expert_to_slots_LEX[layer, expert, : number[expert]]
            share = np.full(len(slots), 1 / len(slots))
            out[layer, slots] = rng.multinomial(count_LE[layer, expert], share)
    return placement.rank_load(out)


@cache
def executed(case: str, sigma: float) -> dict[str, tuple[float, float]]:
    """max/mean rank load in later batches: mean over batches of the mean over layers, and half of its 90 % interval;
    `planned`: what the map was made for."""
    ranks, tokens, redundant = CASES[case]
    rng = generator(0, "dispatch/executed", ranks, round(sigma * 100))
    popularity_LE = 1.0 / (np.argsort(rng.random((LAYERS, EXPERTS)), axis=1) + 1.0)
    value = {"kind": "eplb", "num_redundant_experts": redundant, "mode": "global"}
    placement = load_policy("placement", value).place(popularity_LE, PlacementContext(ranks, ranks // 8))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(BATCHES):
        later_LE = popularity_LE * np.exp(sigma * rng.standard_normal((LAYERS, EXPERTS)))
        share_LE = later_LE / later_LE.sum(axis=1, keepdims=True)
        count_GLE = rng.multinomial(tokens * TOP_K, share_LE[None].repeat(ranks, axis=0))
        for kind in KINDS:
            load_LG = slots_of(kind, count_GLE, placement, rng)
            found[kind].append(float((load_LG.max(axis=1) / load_LG.mean(axis=1)).mean()))
    half = {kind: 1.895 * float(np.std(v, ddof=1)) / BATCHES**0.5 for kind, v in found.items()}
    out = {kind: (float(np.mean(v)), half[kind]) for kind, v in found.items()}
    return out | {"planned": (float(placement.balance(popularity_LE).mean()), 0.0)}


def balance() -> Section:
    """Executed balance of later batches by dispatch."""
    shown, rows = [], []
    for case in CASES:
        for sigma in (0.0, 0.3):
            found = executed(case, sigma)
            cells = [f"{found['planned'][0]:.3f}", *("{:.3f} +- {:.3f}".format(*found[kind]) for kind in KINDS)]
            shown.append((case, f"{sigma:g}", *cells))
    for case, claimed in NOTES.items():
        found = executed(case, 0.3)
        ours = [found[kind] for kind in ("random", "lp")]
        rows.append(
            Row(
                "prototype of this project (research notes, placement); LPLB itself publishes no figure of balance",
                f"{case}, {CASES[case][2]} redundant experts, EPLB on the loads before a drift of 0.3",
                "nothing",
                "max/mean {:.2f} with a replica drawn at random, {:.2f} with a linear program a batch".format(*claimed),
                "{:.3f} +- {:.3f} and {:.3f} +- {:.3f}".format(*ours[0], *ours[1]),
                SHAPE if all(within(o[0], c, 0.05) for o, c in zip(ours, claimed, strict=True)) else MISSED,
                "the notes drew one popularity and 20 batches, here 4 and 8; the same project made both, and the 5 %"
                " were set with these figures known: agreement says that the dispatch here does what the prototype did",
                "each within 5 %",
            )
        )
    lines = [
        "Largest over mean rank load that batches after the plan get, top-8 of 256 experts, zipf 1.0, EPLB global, 64"
        " (EP64) and 32 (EP32) redundant experts; mean of 8 batches and its 90 % interval. Drift: width of a lognormal"
        " that multiplies every expert's popularity, drawn for each batch. llep: m is a sixteenth of a rank's pairs,"
        " and it pays with weights that travel.",
        "",
        *table(("batches", "drift", "planned", *KINDS), shown),
    ]
    return Section("dispatch", "Executed balance by dispatch", rows, lines)
