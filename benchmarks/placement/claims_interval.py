"""How often to rebalance: executed balance by interval and drift, and what a rebalance costs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import MISSED, ROOT, SHAPE, Row, Section, table

from moesim.cost.rebalancing import MoveCosts, move_ns
from moesim.placement import Placement, PlacementContext
from moesim.placement.moves import moves, settle
from moesim.policy import load_policy
from moesim.rng import generator
from moesim.scenario.load import load_model, load_profile

LAYERS, EXPERTS, SLOTS, RANKS, TOKENS, TOP_K = 4, 256, 320, 64, 128, 8
GRAIN, SPAN = 50, 12_000
INTERVALS = (100, 300, 1000, 3000, 10_000)
DRIFTS = (0.0, 0.1, 0.3, 1.0)
WINDOW = 1000


def popularity(drift: float, seed: int = 0) -> np.ndarray:
    """Zipf 1.0 whose logarithm walks at random, by `drift` (standard deviation) in 1,000 steps: [time, L, E], each
    layer summing to 1, a row every 50 steps."""
    rng = generator(seed, "interval/popularity")
    rank_LE = np.argsort(rng.random((LAYERS, EXPERTS)), axis=1) + 1.0
    walk = rng.standard_normal((SPAN // GRAIN, LAYERS, EXPERTS)) * (drift * np.sqrt(GRAIN / 1000))
    log_TLE = np.cumsum(walk, axis=0) - np.log(rank_LE)
    share = np.exp(log_TLE)
    return np.asarray(share / share.sum(axis=-1, keepdims=True))


def placed(load_LE: np.ndarray) -> Placement:
    """EPLB, global, 64 redundant experts on 64 ranks."""
    policy = load_policy("placement", {"kind": "eplb", "num_redundant_experts": SLOTS - EXPERTS, "mode": "global"})
    return policy.place(load_LE, PlacementContext(RANKS, num_nodes=8))


def executed(placement: Placement, share_LE: np.ndarray, rng: np.random.Generator, batches: int = 4) -> float:
    """max / mean rank load of batches of 128 tokens a rank, every pair on a replica drawn at random; mean over layers
    and batches."""
    pairs = TOKENS * RANKS * TOP_K
    out = []
    for _ in range(batches):
        slot_share = placement.of_slots(share_LE / placement.replica_count_LE)
        count_LS = np.stack([rng.multinomial(pairs, row / row.sum()) for row in slot_share])
        load_LG = placement.rank_load(count_LS)
        out.append(float((load_LG.max(axis=1) / load_LG.mean(axis=1)).mean()))
    return float(np.mean(out))


def by_interval(drift: float, interval: int | None) -> float:
    """Mean executed balance where the map is made anew every `interval` steps from the last 1,000; None: once."""
    share_TLE = popularity(drift)
    rng = generator(1, "interval/executed", int(drift * 1000), interval or 0)
    first, window = WINDOW // GRAIN, WINDOW // GRAIN
    every = SPAN // GRAIN if interval is None else interval // GRAIN
    values = []
    for at in range(first, SPAN // GRAIN, every):
        placement = placed(share_TLE[max(0, at - window) : at].mean(axis=0))
        later = np.arange(at, min(at + every, SPAN // GRAIN))
        values += [executed(placement, share_TLE[when], rng, 1) for when in later[:: max(1, len(later) // 4)]]
    return float(np.mean(values))


def rebalance_cost(relabel: bool) -> tuple[float, float, float]:
    """(ms of a layer's transfers, ms of all 58, share of slots that move) where popularity drifted by 0.3: DeepSeek-V3
    on 8 x 8 H100."""
    model = load_model(ROOT / "workloads" / "models" / "deepseek-v3.yaml")
    profile = load_profile(ROOT / "hw_profiles" / "h100_sxm.yaml")
    costs = MoveCosts.of(profile, int(model.expert_bytes()))
    share_TLE = popularity(0.3)
    old, new = placed(share_TLE[:20].mean(axis=0)), placed(share_TLE[20:40].mean(axis=0))
    settled = settle(old, new, relabel)
    found = moves(old, settled)
    ns_L = move_ns(found, costs)
    return float(ns_L.mean()) / 1e6, float(ns_L.mean()) * 58 / 1e6, float(found.moved_L.mean()) / SLOTS


def interval() -> Section:
    """The lever that packing is not: how old the loads are that a map was made for."""
    rows = []
    for drift in DRIFTS:
        never = by_interval(drift, None)
        rows.append((f"{drift:g}", *(f"{by_interval(drift, i):.3f}" for i in INTERVALS), f"{never:.3f}"))
    layer_ms, all_ms, moved = rebalance_cost(False)
    _, fewer_ms, fewer = rebalance_cost(True)
    near = 5 <= layer_ms <= 80
    claim = Row(
        "sgl-project/sglang#7879 (an operator's measurement)",
        "DeepSeek-V3, 64 H100, 64 redundant experts, drift 0.3 between two maps",
        "nothing",
        "about 1 s on the host and 20 ms a layer",
        f"{layer_ms:.1f} ms a layer for the weights' transfers alone ({all_ms:,.0f} ms for 58)",
        SHAPE if near else MISSED,
        "the size and number of GPUs of the report are not known; launches, synchronisation and slicing of tensors come"
        " on top, for which `rebalance.layer_ms` is there",
        "a layer within a factor of 4",
    )
    lines = [
        f"Executed max/mean load of {RANKS} GPUs in later batches ({TOKENS} tokens a GPU, top-{TOP_K} of {EXPERTS},"
        f" {SLOTS} slots, EPLB global, zipf 1.0, replicas drawn at random), by the interval between rebalances in"
        f" steps. The map sees the last {WINDOW:,} steps. Drift: standard deviation by which an expert's"
        " log-popularity changes in 1,000 steps (a random walk).",
        "",
        *table(("drift", *(f"{i:,}" for i in INTERVALS), "never"), rows),
        f"With no drift what is left is chance: batches are finite. A new map moves {moved:.0%} of the slots"
        f" ({all_ms:,.0f} ms of transfers for 58 layers); {fewer:.0%} ({fewer_ms:,.0f} ms) where ranks may take over"
        " each other's sets (`rebalance.relabel_ranks`).",
        "",
    ]
    return Section("interval", "Executed balance by interval and drift", [claim], lines)
