"""The answer as JSON, and as text drawn from it."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any

from moesim.explain_eplb.answer import Answer, Judged
from moesim.explain_eplb.judge import Gain
from moesim.explain_eplb.replay import Played

__all__ = ["SCHEMA_VERSION", "engine_flags", "render", "to_json"]

SCHEMA_VERSION = 1
_SHOWN = 12


def to_json(answer: Answer) -> dict[str, Any]:
    """The stable report: docs/eplb.md lists its keys."""
    replay, chosen, scenario = answer.replay, answer.chosen, answer.scenario
    batch = answer.base.batch
    parallel = scenario.parallel
    return {
        "schema_version": SCHEMA_VERSION,
        "enable": answer.enable,
        "bound": answer.bound,
        "why": _why(answer),
        "gain": chosen.gain.value,
        "gain_interval": _interval(chosen.whole),
        "gain_sampling_interval": _interval(chosen.gain),
        "chosen": _candidate(answer, chosen),
        "baseline": {
            "step_ms": float(answer.base.step_ns_R.mean()) / 1e6,
            "max_over_mean_load": float(answer.base.times.balance.mean()),
            "requests_per_rank": batch.requests,
            "bound_by": batch.bound,
            "kv_tokens_per_rank": batch.kv_tokens,
            "time_share": _shares(answer.base),
        },
        "stages": {
            name: float(getattr(answer.stages, name)) for name in ("even", "fresh", "past", "moved", "fits")
        },
        "costs": _costs(answer),
        "skip": _skip(answer),
        "candidates": [_candidate(answer, j) for j in sorted(answer.judged, key=lambda j: -j.gain.value)],
        "traffic": {
            "source": answer.loads.source,
            "rows": replay.rows.number,
            "rows_judged": replay.scored - (replay.scored // 2 if answer.split else 0),
            "steps_per_row": replay.rows.row_steps,
            "timed": replay.rows.timed,
            "tokens_per_step": replay.rows.tokens,
            "skew": answer.persistence.skew,
            "persistence": answer.persistence.correlation,
            "persistence_steps": answer.persistence.lag_rows * replay.rows.row_steps,
            "persistence_next_row": answer.persistence.next_row,
        },
        "deployment": {
            "model": scenario.model.name,
            "profile": scenario.cluster.profile.name,
            "tp": parallel.tp, "dp": parallel.dp, "ep": parallel.ep,
            "nodes": replay.prices.layout.nodes,
            "policy": answer.ask.policy,
            "dispatch": scenario.policies.kinds["dispatch"],
        },
        "flags": engine_flags(answer) if answer.enable else {},
        "warnings": list(answer.warnings),
    }  # fmt: skip


def _interval(gain: Gain) -> list[float] | None:
    """None where too few rows were judged to have one."""
    return [gain.low, gain.high] if math.isfinite(gain.low) and math.isfinite(gain.high) else None


def _shares(played: Played) -> dict[str, float]:
    parts = played.by_operator
    total = sum(parts.values())
    return {name: ns / total for name, ns in sorted(parts.items(), key=lambda kv: -kv[1])}


def _candidate(answer: Answer, judged: Judged) -> dict[str, Any]:
    p, steps = judged.played, answer.replay.rows.row_steps
    c = p.candidate
    return {
        "mode": c.mode,
        "num_redundant_experts": c.redundant,
        "interval_steps": round(c.interval_rows * steps) or None,
        "window_steps": round((c.window_rows or answer.replay.start) * steps),
        "gain": judged.gain.value,
        "gain_interval": _interval(judged.whole),
        "gain_sampling_interval": _interval(judged.gain),
        "ties_with_best": judged.tied,
        "step_ms": float(p.step_ns_R.mean()) / 1e6,
        "max_over_mean_load": float(p.times.balance.mean()),
        "requests_per_rank": p.batch.requests,
        "kv_tokens_per_rank": p.batch.kv_tokens,
        "stall_ms": p.stall_ns / 1e6,
    }


def _costs(answer: Answer) -> dict[str, Any]:
    """Of the chosen candidate, in memory and for one rebalance; moves of one placed once are from no placement."""
    played, base = answer.chosen.played, answer.base
    size = answer.replay.prices.slot_bytes
    out: dict[str, Any] = {
        "memory_bytes_per_rank": played.batch.expert_bytes - base.batch.expert_bytes,
        "kv_tokens_lost_per_rank": base.batch.kv_tokens - played.batch.kv_tokens,
        "requests_lost_per_rank": base.batch.requests - played.batch.requests,
        "rebalance": None,
    }
    found = played.moved
    if found is not None:
        out["rebalance"] = {
            "bytes": {name: round(slots * size) for name, slots in found.slots.items()},
            "host_ms": played.host_ns / 1e6,
            "move_ms": found.ns / 1e6,
            "stall_ms": played.stall_ns / 1e6,
            "in_use_after_steps": round((played.host_ns + found.ns) / float(played.step_ns_R.mean())),
        }
    return out


def _skip(answer: Answer) -> dict[str, Any] | None:
    return None if answer.skip is None else answer.skip._asdict()


def engine_flags(answer: Answer) -> dict[str, str]:
    """What to start the engines with: names as vLLM's EPLBConfig (vllm/config/parallel.py) and SGLang's server
    arguments have them. vLLM takes no map from a file, so for a placement made once it gets the best rebalancing
    candidate, if that gains, too."""
    c = answer.chosen.played.candidate
    flags = {}
    if c.mode == "static":
        told = f"--ep-num-redundant-experts {c.redundant} --init-expert-location FILE"
        flags["sglang"] = f"{told}  # FILE: moesim place --dump ... --emit sglang"
    else:
        flags["sglang"] = _sglang(answer)
    moving = answer.moving
    if moving is not None and moving.whole.low > 0:
        c, steps = moving.played.candidate, answer.replay.rows.row_steps
        config = {
            "num_redundant_experts": c.redundant,
            "step_interval": round(c.interval_rows * steps),
            "window_size": round(c.window_rows * steps),
            "use_async": c.mode == "async",
        }
        flags["vllm"] = f"--enable-eplb --eplb-config '{json.dumps(config)}'"
    return flags


def _sglang(answer: Answer) -> str:
    """SGLang moves layers while others wait, so what is recommended as asynchronous is split into chunks of layers."""
    c, steps = answer.chosen.played.candidate, answer.replay.rows.row_steps
    flags = (
        f"--enable-eplb --ep-num-redundant-experts {c.redundant}"
        f" --eplb-rebalance-num-iterations {round(c.interval_rows * steps)}"
        f" --expert-distribution-recorder-buffer-size {round(c.window_rows * steps)}"
    )
    if c.mode == "async":
        flags += " --eplb-rebalance-layers-per-chunk 1"
    skip = answer.skip
    if skip is not None and skip.threshold < 1:
        flags += f" --eplb-min-rebalancing-utilization-threshold {skip.threshold:.2f}"
    return flags


# ---- text


def _why(answer: Answer) -> str:
    s, kept, steps = answer.stages, answer.persistence, answer.replay.rows.row_steps
    base, shares = answer.base, _shares(answer.base)
    moe = shares.get("moe", 0.0) + shares.get("all_to_all", 0.0)
    before = f"max/mean load without EPLB is {base.times.balance.mean():.2f}"
    if answer.enable:
        parts = (
            ("chance and too few replicas", s.even - s.fresh), ("drift", s.fresh - s.past),
            ("rebalancing", s.past - s.moved), ("KV memory", s.moved - s.fits),
        )  # fmt: skip
        lost = ", ".join(f"{name} {_points(x)}" for name, x in parts if x >= 5e-4) or "nothing"
        return f"{before}. Perfectly even loads would gain {_percent(s.even)}; of these are lost to {lost}."
    texts = {
        "balance": f"{before}, of which {_percent(s.fresh)} could be won by placing each step by half of its own"
        " tokens: the rest is the chance of finite batches, which no placement foresees",
        "rest of the step": f"perfectly even loads would gain {_percent(s.even)}: experts and their exchange are"
        f" {moe:.0%} of a step, and {before}",
        "drift": f"placed by its own moment's traffic it would gain {_percent(s.fresh)}, by past traffic"
        f" {_percent(s.past)}: popularity correlates {kept.correlation:.2f} with itself"
        f" {kept.lag_rows * steps:,.0f} steps later, the shortest interval tried",
        "rebalance time": f"placements from past traffic would gain {_percent(s.past)}, and {_percent(s.moved)} when"
        " their rebalances are paid for; longer intervals pay less, and gain less as traffic drifts",
        "KV memory": f"the balance would gain {_percent(s.moved)}, but replicas take KV cache: the batch that fits"
        f" falls, and {_percent(s.fits)} is left",
        "chance": f"the best candidate gains {_percent(answer.chosen.gain.value)}, and "
        + ("too few rows were judged to tell that from chance" if _interval(answer.chosen.gain) is None
           else "the interval holds none at all"),
    }  # fmt: skip
    return texts[answer.bound] + "."


def _percent(gain: float) -> str:
    return f"{gain * 100:+.1f} %"


def _told(interval: list[float] | None) -> str:
    return "too few rows" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"


def _points(gain: float) -> str:
    return f"{gain * 100:.1f} points"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _label(c: dict[str, Any]) -> str:
    if c["mode"] == "static":
        return f"{c['num_redundant_experts']} redundant, placed once"
    every = f"every {c['interval_steps']:,}, window {c['window_steps']:,}"
    return f"{c['num_redundant_experts']} redundant, {every}, {c['mode']}"


def render(report: dict[str, Any], width: int = 100) -> str:
    """The report as text."""
    chosen, d, t = report["chosen"], report["deployment"], report["traffic"]
    gain = f"{_percent(report['gain'])} tokens/s ({_told(report['gain_interval'])})"
    head = f"enable EPLB: {_label(chosen)}" if report["enable"] else "do not enable EPLB"
    best = gain if report["enable"] else f"the best tried, {_label(chosen)}: {gain}"
    lines = [
        f"{head}   {best}",
        *textwrap.wrap(f"why: {report['why']}", width, subsequent_indent="     "),
        f"bound by: {report['bound']}",
        "",
        f"{d['model']} on {d['nodes']} nodes of {d['profile']}, tp {d['tp']}, dp {d['dp']}, ep {d['ep']};"
        f" placement {d['policy']}, dispatch {d['dispatch']}",
        f"traffic: {t['source']}, {t['rows']} rows of {t['steps_per_row']:g} steps, judged on the last"
        f" {t['rows_judged']}; steps of {t['tokens_per_step']:,} tokens",
        "",
        *_table(report),
        "",
        *_cost_lines(report),
    ]
    lines += [""] * bool(report["flags"])
    lines += [f"{engine}: {flags}" for engine, flags in report["flags"].items()]
    lines += [f"note: {text}" for text in report["warnings"]]
    return "\n".join(lines) + "\n"


def _table(report: dict[str, Any]) -> list[str]:
    base = report["baseline"]
    head = ("candidate", "gain", "90 % interval", "step ms", "max/mean", "requests a rank")
    rows = [
        (
            "no EPLB",
            "",
            "",
            f"{base['step_ms']:.2f}",
            f"{base['max_over_mean_load']:.2f}",
            f"{base['requests_per_rank']}",
        )
    ]
    shown = report["candidates"][:_SHOWN]
    if report["chosen"] not in shown:
        shown = [*shown[:-1], report["chosen"]]
    for c in shown:
        mark = "*" if c == report["chosen"] else "=" if c["ties_with_best"] else " "
        rows.append(
            (f"{mark} {_label(c)}", _percent(c["gain"]), _told(c["gain_interval"]), f"{c['step_ms']:.2f}",
             f"{c['max_over_mean_load']:.2f}", f"{c['requests_per_rank']}")
        )  # fmt: skip
    wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    out = [
        "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))]).rstrip()
        for row in (head, *rows)
    ]
    more = len(report["candidates"]) - len(shown)
    tail = f"; {more} more in --json" if more else ""
    return [*out, f"* chosen: the cheapest of those that tie on other rows; = ties with it{tail}"]


def _cost_lines(report: dict[str, Any]) -> list[str]:
    costs, skip = report["costs"], report["skip"]
    out = [
        f"memory: {_gib(costs['memory_bytes_per_rank'])} a rank, {costs['kv_tokens_lost_per_rank']:,} KV tokens and"
        f" {costs['requests_lost_per_rank']} requests fewer"
    ]
    move = costs["rebalance"]
    if move is not None:
        size = {name: _gib(x) for name, x in move["bytes"].items()}
        out += [
            f"a rebalance moves: in the node {size['same_node']}, across nodes {size['across']}, copies on a GPU"
            f" {_gib(move['bytes']['same_rank'] + move['bytes']['free_rider'])}; unchanged {size['unchanged']}",
            f"  host {move['host_ms']:,.0f} ms, moving {move['move_ms']:,.0f} ms; steps wait"
            f" {move['stall_ms']:,.0f} ms, the new map is in use after {move['in_use_after_steps']:,} steps",
        ]
    if skip is not None:
        told = "no rebalance is worth skipping"
        if skip["threshold"] < 1:
            told = f"skip rebalances at a mean/max load of {skip['threshold']:.2f} and above: {skip['skipped']} of"
            told += f" {skip['due']} fewer, {_percent(skip['gain'])} tokens/s"
        out.append(told)
    return out
