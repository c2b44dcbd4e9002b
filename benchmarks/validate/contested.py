"""A contested space: candidates, what was predicted of them, what was measured, and what choosing by it costs.

A figure is a time, smaller is better; what it is stands with the space. Regret is how much more the pick's measured
figure is than the measured best's. Choosing the best of many noisy figures makes the best look better than it is, so
every regret stands with the same one taken apart: the best chosen on one half of the rounds, both judged on the other.

Legend: C candidates, R rounds, M samples in the order they were taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.validate.bounds import MAX_PSI, REGRET
from moesim_kernels.validate.noise import levels
from moesim_kernels.validate.ranking import best_recall, regret, tau_b, tied_NN

from moesim.rng import generator

__all__ = ["DEFAULT_SHARE", "LEAST_ROUNDS", "Candidate", "Measuring", "Sample", "Space", "judge", "measured", "page"]

LEAST_ROUNDS = 3  # fewer say nothing of noise
DEFAULT_SHARE = 1 / 3
"""the pick's regret is to be below this share of the default's"""
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """what: its settings, as a table shows them. roofline_ns: a bare roofline's word."""

    name: str
    what: Mapping[str, Any]
    predicted_ns: float
    roofline_ns: float
    default: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "what": dict(self.what),
            "predicted_ns": round(self.predicted_ns, 1),
            "roofline_ns": round(self.roofline_ns, 1),
            "default": self.default,
            **self.more,
        }


@dataclass(frozen=True, slots=True)
class Space:
    """title, figure, about: what a reader must know. facts: what the predictions were made from."""

    key: str
    title: str
    figure: str
    about: str
    candidates: tuple[Candidate, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        head = {"key": self.key, "title": self.title, "figure": self.figure, "about": self.about}
        return {**head, "facts": dict(self.facts), "candidates": [c.to_json() for c in self.candidates]}


@dataclass(frozen=True, slots=True)
class Sample:
    """The figure of one candidate once, ns: by the wall, and with CPU time of the computing thread in place of the wall
    where there is such a figure (0: none)."""

    wall_ns: float
    cpu_ns: float = 0.0


class Measuring(Protocol):
    """Measures candidates by number. It is told no price."""

    def once(self, candidate: int) -> Sample:
        """One run."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def measured(
    key: str, count: int, rounds: int, open_: Callable[[], Measuring], told: Told, seed: int = 0
) -> list[list[Any]]:
    """Every candidate once a round, each round in a fresh order: [round, candidate, wall ns, CPU ns, PSI] a sample."""
    out: list[list[Any]] = []
    measuring = open_()
    try:
        for number in range(rounds):
            told(f"{key}: round {number + 1} of {rounds}")
            for at in generator(seed, "validate/spaces", number).permutation(count).tolist():
                found = measuring.once(at)
                out.append([number, at, round(found.wall_ns), round(found.cpu_ns), cpu_pressure()])
    finally:
        measuring.close()
    return out


# ---- judging


def judge(space: Mapping[str, Any], samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Figures of a space (`Space.to_json`) and its samples (of `measured`), all JSON."""
    everyone = space["candidates"]
    count = len(everyone)
    at_M = np.array([s[1] for s in samples], np.int64)
    psi = [s[4] for s in samples if s[4] is not None]
    quiet = not psi or float(np.median(psi)) < MAX_PSI
    by_cpu = not quiet and all(s[3] > 0 for s in samples)
    ns_M = np.array([s[3 if by_cpu else 2] for s in samples], float)
    found = levels(ns_M, at_M, count, take_out_drift=True)
    clean_CR = _by_round(ns_M / found.drift_M, at_M, count)
    predicted = np.array([c["predicted_ns"] for c in everyone])
    roofline = np.array([c["roofline_ns"] for c in everyone])
    tied = tied_NN(found.ns_N, found.half_width_N)
    best, pick = int(np.argmin(found.ns_N)), int(np.argmin(predicted))
    default = next(i for i, c in enumerate(everyone) if c["default"])
    lowest = np.flatnonzero(roofline <= roofline.min() * (1 + 1e-9)).tolist()
    chosen = {"pick": [pick], "default": [default], "roofline": lowest, "random": list(range(count))}
    regrets = {name: _regret(found.ns_N, clean_CR, places) for name, places in chosen.items()}
    noise = float(np.sqrt(found.half_width_N[pick] ** 2 + found.half_width_N[best] ** 2))
    bound = max(regrets["default"]["regret"], 0.0) * DEFAULT_SHARE
    return {
        "clock": "thread CPU" if by_cpu else "wall",
        "quiet": quiet,
        "psi": round(float(np.median(psi)), 1) if psi else None,
        "rounds": int(found.rounds_N.min()),
        "best": everyone[best]["name"],
        "pick": everyone[pick]["name"],
        "default": everyone[default]["name"],
        "roofline": [everyone[i]["name"] for i in lowest],
        "regrets": regrets,
        "noise": round(noise, 4),
        "noise_median": round(float(np.median(found.half_width_N)), 4),
        "tied_with_best": [everyone[i]["name"] for i in np.flatnonzero(tied[best]).tolist() if i != best],
        "pick_ties_with_best": bool(tied[best, pick]),
        "spread": round(float(found.ns_N.max() / found.ns_N.min() - 1.0), 4),
        "tau": _finite(tau_b(predicted, found.ns_N, tied)),
        "roofline_tau": _finite(tau_b(roofline, found.ns_N, tied)),
        "top3_recall": round(best_recall(predicted, found.ns_N, tied), 4),
        "error": round(float(np.median(np.abs(predicted / found.ns_N - 1.0))), 4),
        "bias": round(float(np.median(predicted / found.ns_N - 1.0)), 4),
        "met": {
            "regret": bool(regrets["pick"]["regret"] <= REGRET),
            "share": bool(regrets["pick"]["regret"] < bound) if bound > 0 else None,
        },
        "rows": [
            {
                "name": c["name"],
                "measured_ns": round(float(found.ns_N[i])),
                "half_width": round(float(found.half_width_N[i]), 4),
                "error": round(float(predicted[i] / found.ns_N[i] - 1.0), 4),
            }
            for i, c in enumerate(everyone)
        ],
    }


def _by_round(ns_M: np.ndarray, at_M: np.ndarray, count: int) -> np.ndarray:
    """[C, R], the rounds that all have."""
    rows = [ns_M[at_M == i] for i in range(count)]
    return np.array([row[: min(map(len, rows))] for row in rows])


def _regret(ns_C: np.ndarray, clean_CR: np.ndarray, places: Sequence[int]) -> dict[str, Any]:
    """Of a choice that is drawn evenly from `places`; `apart`: see the head of this file."""
    whole = float(np.mean([regret(ns_C, place) for place in places]))
    halves = [(clean_CR[:, a::2], clean_CR[:, b::2]) for a, b in ((0, 1), (1, 0))] if clean_CR.shape[1] > 1 else []
    apart = []
    for chosen_CR, judged_CR in halves:
        best, judged = int(np.argmin(np.median(chosen_CR, axis=1))), np.median(judged_CR, axis=1)
        apart.append(float(np.mean(judged[list(places)]) / judged[best] - 1.0))
    return {"regret": round(whole, 5), "apart": round(float(np.mean(apart)), 5) if apart else None}


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


# ---- the page


def page(report: Mapping[str, Any]) -> str:
    """Of all spaces that were measured, as Markdown."""
    about = report["about"]
    lines = [
        "# Contested choices on a CPU: the simulator's pick beside the measured best\n",
        f"Command: `{about['command']}`. {about['date']}, {about['cpu']}, {about['cpus']} CPUs, torch "
        f"{about['torch']}, one thread a rank; profile calibrated by the same command ({about['profile']}); "
        f"{about['seconds']:.0f} s in all. Predictions were on disk before the first measurement (SHA-256 "
        f"`{about['seal'][:16]}`); every candidate was then measured once a round, each round in a fresh order.\n",
        "*Regret*: how much longer the choice takes than the measured best of the space. *Apart*: the same with the "
        "best chosen on one half of the rounds and both judged on the other, since the best of many noisy figures "
        "looks better than it is. *Noise*: half width of the 90 % interval of the ratio between pick and best. Wanted: "
        f"the pick's regret at most {REGRET:.0%}, and less than a third of the default's.\n",
        "| space | candidates | pick's regret | apart | noise | default's | roofline's | random | worst | tau-b | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    judged = [(s, judge(s, report["samples"][s["key"]])) for s in report["spaces"] if s["key"] in report["samples"]]
    lines += [_row(space, found) for space, found in judged]
    for space, found in judged:
        lines += _section(space, found)
    return "\n".join(lines) + "\n"


def _row(space: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    r = found["regrets"]
    return (
        f"| {space['title']} | {len(space['candidates'])} | {r['pick']['regret']:.1%} | "
        f"{_percent(r['pick']['apart'])} | +-{found['noise']:.1%} | {r['default']['regret']:.1%} | "
        f"{r['roofline']['regret']:.1%} | {r['random']['regret']:.1%} | {found['spread']:.1%} | "
        f"{_number(found['tau'])} | {_verdict(found)} |"
    )


def _verdict(found: Mapping[str, Any]) -> str:
    if not found["quiet"]:
        return "contended"
    told = "reached" if found["met"]["regret"] and found["met"]["share"] is not False else "missed"
    return f"{told}, a tie" if found["pick_ties_with_best"] and found["pick"] != found["best"] else told


def _section(space: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    row = {r["name"]: r for r in found["rows"]}
    ordered = sorted(space["candidates"], key=lambda c: row[c["name"]]["measured_ns"])
    keys = list(ordered[0]["what"])
    psi = "not told" if found["psi"] is None else f"{found['psi']:.0f} %"
    tied = "; ".join(found["tied_with_best"]) or "none"
    lines = [
        f"\n## {space['title']}\n",
        f"{space['about']} Figure: {space['figure']}.\n",
        f"{found['rounds']} rounds, {found['clock']} clock, CPU pressure (PSI) median {psi}, noise of a candidate's "
        f"figure +-{found['noise_median']:.1%} (median). Predictions: median |error| {found['error']:.1%}, bias "
        f"{found['bias']:+.1%}; tau-b {_number(found['tau'])} (bare roofline {_number(found['roofline_tau'])}), top-3 "
        f"recall {found['top3_recall']:.0%}. Best: {found['best']}. Pick: {found['pick']}. Default: "
        f"{found['default']}. Roofline: {'; '.join(found['roofline'])}. Tied with the best: {tied}.\n",
        f"| {' | '.join(keys)} | predicted ms | measured ms | noise | error | |",
        "|" + "---|" * (len(keys) + 5),
    ]
    for c in ordered:
        r = row[c["name"]]
        marks = [name for name in ("best", "pick", "default") if found[name] == c["name"]]
        cells = " | ".join(str(c["what"][k]) for k in keys)
        lines.append(
            f"| {cells} | {c['predicted_ns'] / 1e6:.2f} | {r['measured_ns'] / 1e6:.2f} | +-{r['half_width']:.1%} | "
            f"{r['error']:+.1%} | {', '.join(marks)} |"
        )
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
