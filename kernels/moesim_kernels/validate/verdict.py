"""What a report comes to: a state, an exit code and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["EXIT_MISSED", "verdict"]

EXIT_MISSED = 4


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """state: wrong profile, missed, contended, few settings, or within. A wrong profile is told wherever it is found;
    bounds that were missed count where they bind."""
    bounds = list(report["bounds"])
    for part in ("served", "candidates"):
        bounds += (report[part] or {"bounds": []})["bounds"]
    fair = report["noise"]["quiet"]
    binding = [b for b in bounds if b["binds"]]
    missed = [b for b in binding if not b["met"]]
    narrow = report["coverage"]["state"] == "too narrow" and fair
    if report["wrong"]:
        return _said("wrong profile", EXIT_MISSED, _wrong(report))
    if missed or (narrow and binding):
        return _said("missed", EXIT_MISSED, _missed(report, missed))
    if not fair:
        return _said("contended", 0, _contended(report))
    if not binding:
        return _said("few settings", 0, f"Too few settings for a bound to bind: {_figures(report)}.")
    return _said("within", 0, f"Predictions hold: {_figures(report)}.")


def _said(state: str, code: int, sentence: str) -> dict[str, Any]:
    return {"state": state, "exit_code": code, "sentence": sentence}


def _figures(report: Mapping[str, Any]) -> str:
    step, tau = report["step"], report["ranking"]["tau"]
    count = step["settings"]
    order = "" if tau is None else f", and their order has tau {tau:.3f}"
    return (
        f"{count} held-out steps are off by {step['median']:.1%} (median) and nine in ten by at most {step['p90']:.1%}"
        f"{order}, by {report['clock']} time"
    )


def _wrong(report: Mapping[str, Any]) -> str:
    first = report["wrong"][0]
    where = "" if first["where"] == "all" else f" of {first['where']} steps"
    others = sorted({f["operator"] for f in report["wrong"][1:]} - {first["operator"]})
    more = f" Off as well: {', '.join(others)}." if others else ""
    allowed = first["allowed"] if first["factor"] >= 1 else 1 / first["allowed"]
    return (
        f"The profile does not describe this machine: {first['operator']} takes {first['operator_factor']:.2f} times "
        f"what it says, seen in the part `{first['part']}`{where} (x {first['factor']:.2f}, where its own errors and "
        f"the noise allow x {allowed:.2f}).{more}"
    )


def _missed(report: Mapping[str, Any], missed: list[dict[str, Any]]) -> str:
    if not missed:
        inside, count = report["coverage"]["inside"], report["coverage"]["settings"]
        return f"Predicted intervals are too narrow: {inside} of {count} held what was measured, {_figures(report)}."
    told = "; ".join(
        f"{b['figure']} is {shown(b['found'])}, {b['at']} {shown(b['bound'])} was to be reached" for b in missed
    )
    noise = report["noise"]
    changed = "" if noise["steady"] else (
        f" The machine's speed has changed since it was calibrated: its reference product takes x "
        f"{noise['speed_shift']:.2f}; calibrate again."
    )  # fmt: skip
    return f"Predictions miss: {told}.{changed}"


def shown(value: float | None) -> str:
    """A share as percent where it is one that is small, else as it is."""
    return "not known" if value is None else (f"{value:.1%}" if value < 0.5 else f"{value:.3f}")


def _contended(report: Mapping[str, Any]) -> str:
    noise = report["noise"]
    told = [] if noise["psi_percent"] is None else [f"PSI {noise['psi_percent']:.0f} %"]
    loose = noise["half_width_median"] is None
    told.append("too few repeats" if loose else f"medians firm to {noise['half_width_median']:.1%}")
    met = all(b["met"] for b in report["bounds"])
    tail = "which would be within the bounds" if met else "which would miss a bound"
    return f"Contended ({', '.join(told)}), so no bound binds: {_figures(report)}, {tail}."
