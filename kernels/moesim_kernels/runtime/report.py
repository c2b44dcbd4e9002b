"""What a run or a comparison found, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.runtime.run import RealRun, Settings
from moesim_kernels.runtime.weights import WeightFile

__all__ = ["comparison_table", "run_table", "run_to_json"]


def run_to_json(run: RealRun, settings: Settings, file: WeightFile, link: str) -> dict[str, Any]:
    """Counts, medians over steps, bytes, and what the machine was like."""
    c, steps, sizes = run.driver.counters, run.steps, file.sizes
    names = ("step", "own", "experts", "join", "sync", "stall", "other", "cpu")
    ns = {name: np.array([getattr(s, f"{name}_ns") for s in steps], np.float64) for name in names}
    tokens = np.array([s.tokens for s in steps])
    moves = np.array([t[3] - t[2] for t in run.transfers], np.float64)
    return {
        "model": {
            "path": str(file.path),
            "seed": file.seed,
            "sizes": sizes.model_dump(),
            "slot_bytes": sizes.slot_bytes,
        },
        "settings": asdict(settings),
        "link": link,
        "steps": len(steps),
        "tokens": int(tokens.sum()),
        "seconds": round(run.seconds, 4),
        "tokens_per_s": round(float(tokens.sum() / (ns["step"].sum() / 1e9)), 3),
        "hit_rate": round(c.hits / max(1, c.look_ups), 6),
        "counters": {**asdict(c), "look_ups": c.look_ups},
        "median_ms": {name: round(float(np.median(x)) / 1e6, 4) for name, x in ns.items()},
        "p95_step_ms": round(float(np.quantile(ns["step"], 0.95)) / 1e6, 4),
        "stall_ms_a_token": round(float(ns["stall"].sum() / tokens.sum()) / 1e6, 4),
        "bytes_a_token": round(sum(t[0] for t in run.transfers) / int(tokens.sum())),
        "transfers": len(run.transfers),
        "transfer_ms": None if not len(moves) else round(float(np.median(moves)) / 1e6, 4),
        "digest": f"{run.digest:08x}",
        "psi": cpu_pressure(),
        "remark": run.remark,
    }


def run_table(report: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    s, c, ms = report["settings"], report["counters"], report["median_ms"]
    whole = report["model"]["sizes"]["layers"] * report["model"]["sizes"]["experts"] * report["model"]["slot_bytes"]
    share = s["capacity_bytes"] / whole
    kinds = f"{_kind(s['eviction'])}, prefetch {_kind(s['prefetch'])}, {_kind(s['offload'])}, {s['completion']}"
    found = f"{c['hits']} here, {c['late']} late, {c['loads']} loaded, {c['streams']} streamed"
    found += f", {c['on_cpu']} on the host"
    asked = f"{c['look_ups']} in {report['steps']} steps of {report['tokens']} tokens, {report['hit_rate']:.1%} hit"
    rows = [
        ("cache", f"{s['capacity_bytes']:,} bytes, {share:.0%} of the experts; link {report['link']}"),
        ("policies", kinds),
        ("look-ups", asked),
        ("found", found),
        ("prefetched", f"{c['prefetched']}, {c['prefetched_used']} used, {c['cancelled']} given up"),
        ("moved", f"{report['bytes_a_token']:,} bytes a token, {report['transfer_ms'] or 0:.3f} ms a transfer"),
        ("step", f"{ms['step']:.3f} ms (p95 {report['p95_step_ms']:.3f}), {report['tokens_per_s']:.1f} tokens/s"),
        ("of it", ", ".join(f"{name} {ms[name]:.3f}" for name in ("own", "experts", "join", "sync", "stall", "other"))),
        ("digest", f"{report['digest']} of all logits"),
    ]
    return "".join(f"{name:<11} {text}\n" for name, text in rows)


def _kind(policy: Any) -> str:
    return str(policy["kind"] if isinstance(policy, dict) else policy)


def comparison_table(report: dict[str, Any]) -> str:
    """A line a case, then the verdict's figures."""
    width = max(len(one["case"]) for one in report["cases"])
    lines = [f"{'case':<{width}}  predicted  measured   error  spread  hit rate: predicted  measured  events\n"]
    for one in report["cases"]:
        rounds, same = len(one["same_events"]), sum(one["same_events"])
        events = "same" if same == rounds else f"{same} of {rounds} same"
        lines.append(
            f"{one['case']:<{width}}  {one['predicted_ms']:>6.2f} ms {one['measured_ms']:>6.2f} ms "
            f"{one['error']:>+7.1%} {one['spread']:>7.1%}  {one['predicted_hit_rate']:>19.3f}  "
            f"{float(np.mean(one['hit_rate'])):>8.3f}  {events}\n"
        )
    halves = report["tau_b_of_halves"]
    lines.append(
        f"median error {report['median_error']:.1%}, spread of rounds {report['median_spread']:.1%} (median), tau-b "
        f"{report['tau_b']:.3f}" + ("" if halves is None else f" (odd against even rounds {halves:.3f})") + "\n"
    )
    return "".join(lines)
