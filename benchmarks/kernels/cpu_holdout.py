"""How far a calibrated CPU profile is off on fresh points of the deployed layer: 30 points, one thread.

python benchmarks/kernels/cpu_holdout.py PROFILE.yaml [--points 30] [--rounds 15] [--budget 240] [--seed 1]

The shape is that of the profile's own MoE curve; nothing measured here was seen by the fit. Tokens are log-uniform up
to the calibrated limit. A third of the points has a histogram of recorded routing (DeepSeek-V2-Lite, ../shared/data,
its experts folded onto the slots of this layer) where the data is there; the others are drawn from the calibration's
random family. Points take turns among the other operators of the deployment, as in a calibration and in a step (alone,
one after the other, the same calls take 4 to 5 % less); each sample is thread CPU time of one call, experts change from
call to call, the drift that all share is taken out, and a reference product is timed in every round.
Results go to results/validation/cpu_calibration.md and .json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from moesim_kernels.bench import clock
from moesim_kernels.bench.cases import build
from moesim_kernels.bench.drift import drift_factors
from moesim_kernels.bench.machine import facts
from moesim_kernels.bench.pool import Device, Pool, Prepared, torch_dtype
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.calibrate.deployment import from_scenario
from moesim_kernels.calibrate.grid import random_histogram
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.fit.conformal import clopper_pearson
from moesim_kernels.fit.model import predict
from moesim_kernels.fit.samples import Samples, sample_points
from moesim_kernels.ops.routing import assign, histogram
from moesim_kernels.profiles.show import half_width
from numpy.typing import NDArray
from scipy.stats import kendalltau

from moesim.scenario.load import load_profile
from moesim.traces.routing_npz import read

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT.parent / "shared" / "data" / "routing" / "esft_dsv2lite_intent.npz"
OUT = ROOT / "results" / "validation"
Counts = NDArray[np.int64]


def recorded_counts(tokens: int, slots: int, top_k: int, rng: np.random.Generator) -> Counts | None:
    """Rows of each slot for consecutive tokens of a recorded trace at a random layer: experts folded onto the slots at
    random, rows scaled to tokens * top_k, at most one a token and slot. None where the trace is not there."""
    if not RECORDED.is_file():
        return None
    source = read(RECORDED)
    layer = int(rng.integers(source.num_layers))
    start = int(rng.integers(max(1, source.num_tokens - tokens)))
    ids = np.asarray(source.expert_TLK[start : start + tokens, layer]).ravel().astype(np.int64)
    place = rng.permutation(source.num_experts) % slots
    share = np.bincount(place[ids], minlength=slots) / ids.size
    count, left = np.zeros(slots, np.int64), tokens * top_k
    while left:  # what overflows a slot goes to those with room
        room = np.where(count < tokens, share + 1e-9, 0.0)
        count += rng.multinomial(left, room / room.sum())
        left = int(np.maximum(count - tokens, 0).sum())
        np.minimum(count, tokens, out=count)
    return count


def draw(points: int, most: int, slots: int, top_k: int, seed: int) -> list[tuple[int, str, Counts]]:
    """Tokens, kind and rows by slot of every point."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(points):
        tokens = int(np.exp(rng.uniform(0.0, np.log(most + 1))))
        kind = random_histogram(rng, slots, top_k)
        real = recorded_counts(tokens, slots, top_k, rng) if i % 3 == 0 else None
        count = histogram(kind, tokens * top_k, slots, tokens, seed + i) if real is None else real
        out.append((tokens, kind if real is None else "recorded", count))
    return out


def prepare(key: tuple[Any, ...], tokens: int, count_E: Counts, seed: int, device: Device, pool: Pool) -> Prepared:
    """One call of the layer with these rows; every rotation gives them to other experts."""
    import torch
    from moesim_kernels.ops.moe import moe_local

    hidden, inner, slots, _, dtype, _ = key
    kind = torch_dtype(dtype)
    sets = pool.rotate(kind, [(slots, 2 * inner, hidden), (slots, hidden, inner)])
    x_TH = pool.arena("input", kind, tokens * hidden)[: tokens * hidden].view(tokens, hidden)
    out_TH = pool.arena("scratch", kind, tokens * hidden)[: tokens * hidden].view(tokens, hidden)
    rng = np.random.default_rng(seed)
    turns = []
    for turn in range(8):
        moved_E = count_E[rng.permutation(slots)]
        token_R, _ = assign(moved_E, tokens, seed + turn)
        turns.append((torch.from_numpy(token_R), torch.from_numpy(np.cumsum(moved_E).astype(np.int32))))
    gate_R = torch.rand(int(count_E.sum()))

    def run(i: int) -> Any:
        w13, w2 = sets[i % len(sets)]
        token_R, end_E = turns[i % 8]
        return moe_local(x_TH, token_R, gate_R, end_E, w13, w2, "loop", out_TH)

    return Prepared(run, 8 * len(sets), 0.0, 0.0, "thread")


def company(scenario: Path, device: Device, pool: Pool) -> list[Prepared]:
    """The other operators that a calibration of the scenario measures in the same rounds, moved bytes left out."""
    apart = ("moe", "copy", "storage", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    found = make_plan([from_scenario(scenario, [])], "cpu").cases
    return [build(c, device, pool) for c in found if c.op not in apart and c.role == "grid"]


def measure(
    cases: list[Prepared], others: list[Prepared], device: Device, pool: Pool, rounds: int, budget_s: float
) -> dict[str, Any]:
    """Samples of `cases` in ns, taken in turns with `others`, with PSI and the reference product of each round."""
    import torch

    rng, began = np.random.default_rng(0), time.monotonic()
    samplers = [clock.sampler(c, device, pool) for c in [*cases, *others]]
    a, b = torch.randn(384, 384), torch.randn(384, 384)
    reference = clock.sampler(Prepared(lambda i: a @ b, 1, 0.0, 0.0, "thread"), device, pool)
    out: dict[str, Any] = {"ns": [[] for _ in cases], "psi": [], "reference_ns": []}
    taken: list[tuple[int, float]] = []
    for done in range(rounds):
        if done >= 3 and time.monotonic() - began > budget_s:
            break
        out["reference_ns"].append(min(reference.sample()[0] for _ in range(3)))
        for i in rng.permutation(len(samplers)):
            taken.append((int(i), samplers[i].sample()[0]))
            if i < len(cases):
                out["ns"][i].append(round(taken[-1][1]))
        out["psi"].append(cpu_pressure())
    case, ns = np.array([i for i, _ in taken]), np.array([t for _, t in taken])
    level = ns / drift_factors(ns, case)  # as the calibration's own points are read
    out["median_ns"] = np.array([float(np.median(level[case == i])) for i in range(len(cases))])
    return out


def judge(predicted: NDArray[np.float64], measured: NDArray[np.float64], width: float) -> dict[str, Any]:
    """The three figures, and coverage of the profile's own interval, its error of speed from run to run included."""
    error = np.abs(predicted / measured - 1.0)
    out = {
        "points": len(error),
        "median": float(np.median(error)),
        "p90": float(np.quantile(error, 0.9)),
        "kendall_tau": float(kendalltau(predicted, measured).statistic),
        # between the two runs: other load, other clock. The figures above have it in them
        "common_factor": (shift := float(np.median(measured / predicted))),
        "p90_without_it": float(np.quantile(np.abs(predicted * shift / measured - 1.0), 0.9)),
    }
    inside = int((np.abs(np.log(predicted / measured)) <= width).sum())
    low, high = clopper_pearson(inside, len(error))
    out["interval"] = {"half_width": float(np.expm1(width)), "inside": inside, "low": low, "high": high}
    return out


def table(found: dict[str, Any], rows: list[dict[str, Any]], command: str) -> str:
    """The page."""
    f = found["figures"]
    inside = f["interval"]
    lines = [
        "# A calibrated CPU on fresh points of the deployed layer",
        "",
        f"Command: `{command}`. Date {found['machine']['date']}, {found['machine']['cpu']}, torch "
        f"{found['machine']['torch']}, one thread, layer {found['layer']}, calibrated {found['calibrated']}.",
        f"CPU pressure (PSI) while measuring: median {found['psi_median']} %; reference product p90 / p10 "
        f"{found['drift']:.2f}; {found['samples']} samples a point.",
        "",
        "| figure | found | wanted |",
        "|---|---|---|",
        f"| median error | {f['median']:.1%} | <= 5 % |",
        f"| p90 error | {f['p90']:.1%} | <= 12 % |",
        f"| Kendall tau | {f['kendall_tau']:.3f} | >= 0.95 |",
    ]
    common = f"{f['common_factor'] - 1:+.1%}, without it p90 {f['p90_without_it']:.1%}"
    lines.append(
        f"| all points slower or faster than in the calibration by (median) | {common} | tells of the machine |"
    )
    lines.append(
        f"| in the profile's 90 % interval (x{1 + inside['half_width']:.3f}) | {inside['inside']}/{f['points']}, "
        f"95 % interval of the share {inside['low']:.0%} to {inside['high']:.0%} | contains 90 % |"
    )
    lines += [
        "",
        "| tokens | histogram | busiest expert | measured ms | predicted ms | error |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["tokens"]):
        lines.append(
            f"| {r['tokens']} | {r['histogram']} | {max(r['counts'])} | {r['ns'] / 1e6:.2f} | "
            f"{r['predicted_ns'] / 1e6:.2f} | {r['predicted_ns'] / r['ns'] - 1:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description="Fresh points of the deployed layer against a calibrated CPU profile.")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--scenario", type=Path, default=ROOT / "workloads" / "calibrate_cpu.yaml")
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds; at least three rounds are run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    profile = load_profile(options.profile)
    key = profile.curves["moe"][0].key
    most = int(profile.provenance["deployments"][0]["max_batched_tokens"])
    device = Device.find("cpu")
    pool = Pool(device)
    drawn = draw(options.points, most, int(key[2]), int(key[3]), options.seed)
    cases = [prepare(key, t, count, options.seed + i, device, pool) for i, (t, _, count) in enumerate(drawn)]
    others = company(options.scenario, device, pool)
    seen = measure(cases, others, device, pool, options.rounds, options.budget)
    ns = seen["median_ns"]
    s: Samples = sample_points(
        "moe", str(key[4]), [key] * len(ns), [[int(c.sum())] for _, _, c in drawn], ns, counts=[c for _, _, c in drawn],
        dtype=str(key[4]),
    )  # fmt: skip
    predicted = predict(profile, s)
    width = half_width(profile, "moe", "interpolated")
    psi = [p for p in seen["psi"] if p is not None]
    found = {
        "figures": judge(predicted, ns, width),
        "machine": facts(device),
        "layer": f"hidden {key[0]}, intermediate {key[1]}, {key[2]} experts, top {key[3]}, {key[4]}",
        "calibrated": f"{profile.provenance['date']} (kernels {profile.provenance['kernel']})",
        "psi_median": float(np.median(psi)) if psi else None,
        "drift": float(np.quantile(seen["reference_ns"], 0.9) / np.quantile(seen["reference_ns"], 0.1)),
        "samples": len(seen["ns"][0]),
    }
    rows = [
        {
            "tokens": t,
            "histogram": kind,
            "counts": c.tolist(),
            "ns": n,
            "predicted_ns": round(float(p)),
            "samples_ns": x,
        }
        for (t, kind, c), n, p, x in zip(drawn, ns.tolist(), predicted.tolist(), seen["ns"], strict=True)
    ]
    page = table(found, rows, "python benchmarks/kernels/cpu_holdout.py " + " ".join(sys.argv[1:]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cpu_calibration.json").write_text(
        json.dumps({**found, "points": rows}, separators=(",", ":")) + "\n"
    )
    (options.out / "cpu_calibration.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
