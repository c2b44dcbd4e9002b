"""The answer as JSON, and as text drawn from it."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from moesim.explain_offload.answer import Answer, hit_rate
from moesim.explain_offload.flags import device_experts, engine_flags
from moesim.explain_offload.play import Played

__all__ = ["SCHEMA_VERSION", "render", "to_json"]

SCHEMA_VERSION = 1
_GIB = 2**30
_SHOWN = 14


def to_json(answer: Answer) -> dict[str, Any]:
    """The stable report: docs/offload.md lists its keys."""
    scenario, ask, chosen = answer.scenario, answer.ask, answer.chosen
    model = scenario.model
    summary = chosen.summary
    assert summary is not None
    verdicts = [row.verdicts for row in answer.comparison.rows]
    finals = []
    for i, played in enumerate(answer.finals):
        found = {row.figure.name: column[i] for row, column in zip(answer.comparison.rows, verdicts, strict=True)}
        finals.append(
            {
                **_candidate(answer, played),
                "expected_tok_per_s": _expected(answer, played),
                **{
                    name: None if v is None else {"value": v.value, "interval90": _interval(v.interval90)}
                    for name, v in found.items()
                },
                "ties_with_best": played.candidate.label in answer.ties,
            }
        )
    best = finals[[p is chosen for p in answer.finals].index(True)]
    return {
        "schema_version": SCHEMA_VERSION,
        "fits": answer.fits,
        "chosen": best,
        "why": _why(answer),
        "bound_by": bound_by(chosen),
        "memory": {
            "usable_bytes": _usable(answer),
            "by": summary["memory"]["hbm"]["by"],
            "experts_bytes": int(model.expert_bytes()) * model.num_experts * model.num_moe_layers,
            "expert_bytes": int(model.expert_bytes()),
            "experts_on_device": device_experts(scenario, summary),
            "experts": model.num_experts * model.num_moe_layers,
            "kv_tokens_needed": ask.kv_tokens,
        },
        "time_share": summary["time_share"],
        "cache": summary["cache"],
        "finals": finals,
        "tried": [_candidate(answer, played) for played in answer.tried],
        "what_if": [
            {
                "label": w.label,
                "output_tok_per_s": w.rate,
                "gain": None if w.rate is None else w.rate / answer.chosen_short - 1,
                "hit_rate": w.hit_rate,
            }
            for w in answer.what_if
        ],
        "deployment": {
            "model": model.name,
            "expert_dtype": model.expert_dtype,
            "profile": scenario.cluster.profile.name,
            "profile_kind": scenario.cluster.profile.kind,
            "tp": scenario.parallel.tp,
            "prompt_tokens": ask.prompt_tokens,
            "output_tokens": ask.output_tokens,
            "concurrency": ask.concurrency,
            "routing": None if ask.trace is None else ask.trace.name,
        },
        "flags": engine_flags(answer),
        "runs": answer.runs,
        "warnings": list(dict.fromkeys([*chosen.warnings, *answer.scenario.warnings])),
    }


def _candidate(answer: Answer, played: Played) -> dict[str, Any]:
    return {
        "label": played.candidate.label,
        "engine": played.candidate.engine,
        "kind": played.candidate.kind,
        "changes": list(played.candidate.changes),
        "feasible": played.summary is not None,
        "reasons": list(played.reasons),
        "estimate_tok_per_s": played.rate(answer.ask) if played.summary is not None else None,
        "hit_rate": hit_rate(played),
    }


def _expected(answer: Answer, played: Played) -> dict[str, Any] | None:
    if played.summary is None:
        return None
    return {"value": played.rate(answer.ask), "interval90": _interval(played.rate90(answer.ask))}


def _interval(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None or not all(map(math.isfinite, interval)) else list(interval)


def _usable(answer: Answer) -> int:
    tiers = answer.scenario.tiers
    if tiers is not None and tiers.vram is not None:
        return int(tiers.vram * _GIB)
    return int(answer.scenario.cluster.profile.memory_bytes * answer.scenario.engine.gpu_memory_utilization)


_BOUNDS = {
    "expert_stall": "the link to the host",
    "experts_on_cpu": "experts on the CPU",
    "cpu_sync": "handing work to the CPU and back",
    "experts": "experts on the device",
}


def bound_by(played: Played) -> str:
    """What the largest share of the time goes to, in words."""
    share = (played.summary or {}).get("time_share") or {}
    grouped: dict[str, float] = {}
    for name, part in share.items():
        key = _BOUNDS.get(name, "the rest of the model on the device")
        grouped[key] = grouped.get(key, 0.0) + part
    return max(grouped, key=lambda key: grouped[key]) if grouped else "nothing"


def _why(answer: Answer) -> str:
    model, chosen = answer.scenario.model, answer.chosen
    assert chosen.summary is not None
    held = device_experts(answer.scenario, chosen.summary)
    total = model.num_experts * model.num_moe_layers
    size = _size(int(model.expert_bytes()) * total)
    if answer.fits:
        return f"All {total:,} experts ({size}) fit beside the KV cache and buffers."
    share = chosen.summary["time_share"]
    told = ", ".join(f"{_PART.get(name, name.replace('_', ' '))} {part:.0%}" for name, part in list(share.items())[:3])
    found = hit_rate(chosen)
    hits = "" if found is None else f" {found:.0%} of the experts that layers ask for are there."
    return f"The experts take {size}; {held:,} of {total:,} ({held / total:.0%}) fit.{hits} Time goes to {told}."


_PART = {
    "expert_stall": "waiting for weights",
    "experts_on_cpu": "experts on the CPU",
    "cpu_sync": "handing over to the CPU",
    "experts": "experts on the device",
}


# ---- text


def render(report: dict[str, Any], width: int = 100) -> str:
    """The report as text."""
    d, chosen, memory = report["deployment"], report["chosen"], report["memory"]
    head = "everything fits: no offload" if report["fits"] else f"offload: {chosen['label']}"
    rate, first, between = (chosen[name] for name in ("expected_tok_per_s", "ttft_mean_ms", "tpot_mean_ms"))
    lines = [
        f"{d['model']} ({d['expert_dtype']} experts) on {d['profile']}"
        f"{' (datasheet, assumed)' if d['profile_kind'] == 'assumed' else ''}, {_size(memory['usable_bytes'])}:"
        f" {d['concurrency']} request{'s' if d['concurrency'] > 1 else ''} at a time,"
        f" {d['prompt_tokens']:,} + {d['output_tokens']:,} tokens",
        "",
        head,
        f"  {_number(rate)} output tokens/s{_span(rate)}; first token after {_number(first)} ms, then"
        f" {_number(between)} ms a token",
        *textwrap.wrap(report["why"], width, initial_indent="  ", subsequent_indent="  "),
        *_bounds(report),
        "",
        "memory of the device",
    ]
    for name, size in memory["by"].items():
        if size and name != "kv_peak":
            lines.append(f"  {name.replace('_', ' '):<20} {_size(size):>10}")
    lines += ["", f"run long on other requests ({len(report['finals'])}):"]
    lines += [
        f"  {_number(f['expected_tok_per_s']):>8} tok/s{_span(f['expected_tok_per_s']):<18} {_hits(f)}"
        f"{'=' if f['ties_with_best'] else ' '} {f['label']}{_engine(f)}"
        for f in sorted(report["finals"], key=lambda f: -(f["estimate_tok_per_s"] or 0.0))
        if f["expected_tok_per_s"] is not None
    ]
    lines += ["  (=: cannot be told from the best)"] if any(f["ties_with_best"] for f in report["finals"]) else []
    lines += ["", f"tried ({report['runs']} short and long runs):"]
    for t in report["tried"][:_SHOWN]:
        if t["feasible"]:
            lines.append(f"  {t['estimate_tok_per_s']:8.2f} tok/s  {_hits(t)} {t['label']}{_engine(t)}")
    for t in [t for t in report["tried"] if not t["feasible"]]:
        lines += textwrap.wrap(f"- {t['label']}: {t['reasons'][0]}", width, initial_indent="  ",
                               subsequent_indent="    ")  # fmt: skip
    if report["what_if"]:
        lines += ["", "with the same settings:"]
    for w in report["what_if"]:
        gain = "does not fit" if w["gain"] is None else f"{w['gain']:+.0%}"
        lines.append(f"  {gain:>12}  {w['label']}")
    if report["flags"]:
        lines += ["", "engine flags:"]
        lines += [f"  {engine}: {flags}" for engine, flags in report["flags"].items()]
    return "\n".join(lines) + "\n"


def _bounds(report: dict[str, Any]) -> list[str]:
    """What limits it, and how far off the bounds it is."""
    lines = [f"  bound by: {report['bound_by']}"]
    bound = (report["cache"] or {}).get("bound")
    if bound is not None:
        lines.append(
            f"  no eviction could hit more than {bound['min_bypass']:.0%} of these look-ups (Belady, MIN with bypass);"
            f" steps take {bound['time_over_bound']:.2f} times what computing or moving that takes"
        )
    better = [f for f in report["finals"] if not f["engine"] and f["expected_tok_per_s"] is not None]
    for f in better:
        gain = f["expected_tok_per_s"]["value"] / report["chosen"]["expected_tok_per_s"]["value"] - 1
        if gain > 0:
            lines.append(f"  no engine does it yet: {f['label']}, {gain:+.0%}")
    return lines


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.2f} MiB"


def _number(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "?"
    value = float(figure["value"])
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _span(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["interval90"] is None:
        return ""
    low, high = (f"{end:,.0f}" if end >= 100 else f"{end:.1f}" for end in figure["interval90"])
    return f" ({low} to {high})"


def _engine(candidate: dict[str, Any]) -> str:
    return f" ({candidate['engine'] or 'no engine yet'})"


def _hits(candidate: dict[str, Any]) -> str:
    return "        " if candidate["hit_rate"] is None else f"hit {candidate['hit_rate']:4.0%}"
