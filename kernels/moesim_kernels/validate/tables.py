"""A report as headings, lines and tables of text, from which the terminal and the Markdown page are both made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Table", "profile_words", "tables"]


@dataclass(frozen=True)
class Table:
    """title; header and rows of cells, the first column text, the others figures; lines below it."""

    title: str
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    lines: list[str] = field(default_factory=list)


def profile_words(profile: Mapping[str, Any]) -> str:
    """Which profile predicted."""
    if profile["source"] == "measured for this run":
        return "profile measured for this run"
    return f"profile {profile['name']} ({profile['source']})"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All that a person is shown, the verdict apart."""
    made = [_bounds(report), _parts(report), _kinds(report), _ranking(report), _honesty(report)]
    if report["wrong"]:
        made.insert(1, _wrong(report["wrong"]))
    if report["candidates"] is not None:
        made += _candidates(report["candidates"])
    if report["served"] is not None:
        made.append(_served(report["served"]))
    if report["again"]:
        made.append(_again(report["again"]))
    return [table for table in made if table.rows or table.lines]


def _percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.{digits}%}" if sign else f"{value:.{digits}%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bounds(report: Mapping[str, Any]) -> Table:
    more = [] if report["candidates"] is None else report["candidates"]["bounds"]
    rows = [_bound_row(b) for b in (*report["bounds"], *more)]
    rows.append(_coverage_row(report["coverage"]))
    return Table(f"Found beside the bounds, by {report['clock']} time", ("figure", "found", "bound", ""), rows)


def _bound_row(b: Mapping[str, Any]) -> tuple[str, ...]:
    form = _percent if b["at"] == "most" else _number
    sign = "<=" if b["at"] == "most" else ">="
    state = ("met" if b["met"] else "missed") + ("" if b["binds"] else f" ({b['why_not']})")
    return b["figure"], form(b["found"]), f"{sign} {form(b['bound'])}", state


def _coverage_row(c: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = c["clopper_pearson_95"]
    share = f"{c['inside']}/{c['settings']}, {low:.0%} to {high:.0%}"
    width = f"{c['state']}, +-{_percent(c['median_half_width'])}"
    return "90% intervals that hold", share, f"{c['level']:.0%} in it", width


def _wrong(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            f"{f['operator']} in {f['part']}" + ("" if f["where"] == "all" else f", {f['where']} steps"),
            f"x {f['operator_factor']:.2f}",
            f"x {f['factor']:.2f}",
            f"x {f['allowed'] if f['factor'] >= 1 else 1 / f['allowed']:.2f}",
            _percent(f["effect_on_step"]),
            str(f["settings"]),
        )
        for f in found
    ]
    header = ("beyond the profile's own errors", "operator", "part", "allowed", "of the step", "settings")
    return Table("Measured over predicted", header, rows)


def _parts(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{p['part']} ({', '.join(p['operators'])})",
            _percent(p["share"], 0),
            _percent(p["median"]),
            _percent(p["p90"]),
            _percent(p["bias"], sign=True),
            _percent(p["interval_median_width"]),
            f"{p['covered']}/{p['settings']}",
        )
        for p in report["parts"]
    ]
    return Table("Error by part", ("part", "of a step", "median", "p90", "bias", "interval", "inside"), rows)


def _kinds(report: Mapping[str, Any]) -> Table:
    rows = [
        (f"{kind} steps", str(e["settings"]), _percent(e["median"]), _percent(e["p90"]), _percent(e["bias"], sign=True))
        for kind, e in [("all", report["step"]), *report["step"]["by_kind"].items()]
    ]
    return Table("Error by step", ("steps", "settings", "median", "p90", "bias"), rows)


def _ranking(report: Mapping[str, Any]) -> Table:
    r, base = report["ranking"], report["baselines"]
    rows = [
        ("this prediction", _number(r["tau"]), _number(r["tau_without_ties"]), _number(r["tau_top_quartile"]),
         _percent(report["step"]["median"])),
        ("bare roofline", _number(base["roofline"]["tau"]), "", "", _percent(base["roofline"]["median"])),
        ("number of tokens", _number(base["tokens"]["tau"]), "", "", ""),
    ]  # fmt: skip
    lines = [
        f"{r['tied_pairs']} of {r['pairs']} pairs are closer than the measurement can tell, and count for nobody.",
        f"Pairs in the right order by their true gap: {_gaps(r['pairs_by_gap'])}.",
    ]
    return Table("Order of the steps", ("by", "tau-b", "all pairs", "best quarter", "median error"), rows, lines)


def _gaps(gaps: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for g in gaps:
        name = f"over {g['low']:.0%}" if g["high"] is None else f"{g['low']:.0%} to {g['high']:.0%}"
        told.append(f"{name} {g['right']}/{g['pairs']}")
    return ", ".join(told)


def _honesty(report: Mapping[str, Any]) -> Table:
    n, w, s = report["noise"], report["worst"], report["settings"]
    spread = "too few rounds to say" if n["half_width_median"] is None else (
        f"medians firm to {_percent(n['half_width_median'])} (half width at 90 %, median), "
        f"{_percent(n['half_width_p90'])} (nine in ten)"
    )  # fmt: skip
    psi = "not told by this kernel" if n["psi_percent"] is None else f"{n['psi_percent']:.0f} %"
    low, high = s["rounds"]
    rounds = str(low) if low == high else f"{low} to {high}"
    lines = [
        f"Noise: {s['measured']} of {s['predicted']} settings, {rounds} rounds; {spread}; CPU pressure (PSI) {psi}; "
        f"drift taken out, x {n['drift'][0]:.3f} to x {n['drift'][1]:.3f}."
    ]
    if n["speed_shift"] is not None:
        lines[0] += f" The machine's reference product took x {n['speed_shift']:.3f} of what it took while calibrating."
    if n.get("same_speed") is not None:
        lines[0] += (
            f" Times are those of its speed while calibrating, which it had in {n['same_speed']:.0%} of the samples."
        )
    if n["wall_over_cpu"] is not None:
        lines[0] += f" Wall over thread CPU time: {n['wall_over_cpu']:.3f}."
    a = report["coverage"].get("anchors")
    if a is not None:
        lines.append(
            f"Intervals: from {a['steps']} other steps like these, measured before anything was predicted; those were "
            f"off by {_percent(float(np.expm1(a['bias'])), sign=True)} (median), "
            + (
                "which is told and not taken out."
                if a.get("steady", True)
                else "on a machine of another speed than while calibrating, so the profile's error of its speed"
                " stands in its place."
            )
        )
    grade = ", ".join(f"{share:.0%} {name}" for name, share in w["grade"].items())
    what = f"its part `{w['part']}`" + (f" ({', '.join(w['operators'])})" if w["operators"] else "")
    explains = "" if w["explains"] is None else f", which is {w['explains']:.0%} of the miss"
    own = "" if w["part_error"] is None else f" and is itself off by {_percent(w['part_error'], sign=True)}"
    changed = f" ({' '.join(w['overrides'])})" if w["overrides"] else ""
    lines.append(
        f"Worst error: {_percent(w['error'], sign=True)} in {w['setting']}{changed}, by {what}{explains}{own}"
        + (f"; the profile's grade of it: {grade}." if grade else ".")
    )
    return Table("What to know", lines=[*lines, *(f"Note: {note}." for note in report["notes"])])


def _candidates(c: Mapping[str, Any]) -> list[Table]:
    rows = [
        (
            f"{r['name']} {r['role']}",
            _per_token(r["predicted_ns_per_token"]),
            f"{_per_token(r['measured_ns_per_token'])} +-{_percent(r['half_width'])}",
            _percent(r["error"], sign=True),
            f"{abs(r['study_value']):.4g}",
            " ".join(r["overrides"]) or "as written",
        )
        for r in sorted(c["rows"], key=lambda r: r["measured_ns_per_token"])
    ]
    g = c["regret"]
    lines = [
        f"Figure: {c['figure']}; the study's objective is {c['objective']}.",
        f"Picked {c['pick']}, best measured {c['best']}. Regret: pick {_percent(g['pick'], 2)}, bare roofline "
        f"{_percent(g['roofline'], 2)}, random {_percent(g['random'], 2)}, default {_percent(g['default'], 2)}.",
        f"tau-b {_number(c['tau'])} (all pairs {_number(c['tau_without_ties'])}, best quarter "
        f"{_number(c['tau_top_quartile'])}, by the study's objective {_number(c['tau_of_study'])}); top-3 recall "
        f"{c['top3_recall']:.2f}; right order by true gap: {_gaps(c['pairs_by_gap'])}.",
    ]
    lines += [f"Not executed: {name}: {why}" for name, why in c["skipped"].items()]
    for f in c["fresh"] or []:
        lines.append(
            f"On fresh steps {f['name']} takes {_per_token(f['measured_ns_per_token'])} a token "
            f"(+-{_percent(f['half_width'])}), predicted {_per_token(f['predicted_ns_per_token'])}, off by "
            f"{_percent(f['error'], sign=True)}."
        )
    header = ("candidate", "predicted", "measured", "error", "study", "settings")
    return [Table(f"Candidates of the study {c['study']}, best first", header, rows, lines)]


def _per_token(ns: float) -> str:
    return f"{ns / 1e6:.3f} ms" if ns >= 1e5 else f"{ns / 1e3:.2f} us"


def _served(served: Mapping[str, Any]) -> Table:
    rows = [_bound_row(b) for b in served["bounds"]]
    return Table("Served for real", ("figure", "found", "bound", ""), rows, list(served["lines"]))


def _again(again: Sequence[Mapping[str, Any]]) -> Table:
    rows, lines = [], []
    for a in again:
        low, high = a["clopper_pearson_95"]
        rows.append(
            (
                a["record"],
                _percent(a["shift"], sign=True),
                _percent(a["median_difference"]),
                f"{a['inside']}/{a['settings']}, {low:.0%} to {high:.0%}",
                _percent(a["step"]["median"]),
                _number(a["tau"]),
            )
        )
        same = "agree" if a["agree"] else "DIFFER by more than their intervals"
        lines.append(f"{a['record']} and the first measurement {same}; clocks: {a['clocks'][0]} time.")
    header = ("measured again", "shift", "difference", "within intervals", "median error", "tau-b")
    return Table("Against the first measurement", header, rows, lines)
