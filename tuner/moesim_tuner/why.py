"""Why the winner wins: what bounds it, what each setting does, and how far the answer rests on the device profile."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moesim.compare import difference
from moesim.errors import BadInput
from moesim.scenario.load import load_scenario_text
from moesim.simulate import RunResult, simulate
from moesim_tuner.certainty import Certainty, certainty, chances
from moesim_tuner.definition import Definition
from moesim_tuner.figures import figure
from moesim_tuner.heldout import HeldOut, hold_out
from moesim_tuner.judge import Judgement, base_scenario, run_points, same_by_chance, tasks_of
from moesim_tuner.judgement import odds, spoken
from moesim_tuner.protocols import Workers
from moesim_tuner.records import Point, Trial, derived_seed
from moesim_tuner.sensitivity import Knob, Moved, look_around
from moesim_tuner.telling import name_of

__all__ = ["Why", "render", "why"]

_SEEDS = 3
"""of the judged seeds, those that neighbours are run with: t at 2 degrees of freedom is 2.9, at 4 it is 2.1"""
_SURE = 0.9
_SHOWN = 8
_REASON = 160


@dataclass(frozen=True, slots=True)
class Why:
    """bound: a sentence, and what it rests on. time_share: part of a step -> (the winner's share, that of the settings
    as written; None where these cannot run). busy_share: of the run in which groups step; None in training. knobs:
    `sensitivity.Knob` for each parameter. best: how likely each finalist is the best one under the errors that the
    profile states, by its name (with one objective). certainty: name of the other -> objective -> `Certainty` of the
    winner against it. profile, profile_kind: what prices are of. seeds: that neighbours were run with. sentences: the
    gist of it all."""

    bound: str
    time_share: Mapping[str, tuple[float, float | None]]
    busy_share: float | None
    knobs: tuple[Knob, ...]
    best: Mapping[str, float]
    certainty: Mapping[str, Mapping[str, Certainty]]
    profile: str
    profile_kind: str
    seeds: tuple[int, ...]
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `render` reads them."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def why(definition: Definition, trials: Sequence[Trial], judgement: Judgement, workers: Workers) -> Why:
    """Look at the judgement's winner. Pure but for time; runs the winner's neighbours on `workers` and one seed of the
    winner and of the settings as written here. trials: of the study (nothing is simulated again that they settle).

    A judgement from JSON has no observations: its finalists are run again then. Raises ValueError where nobody won.
    """
    if judgement.chosen is None:
        raise ValueError("nobody won, so there is nothing to explain")
    held = hold_out(base_scenario(definition), definition.spec)
    finalists = judgement.finalists
    runs = judgement.runs
    if not runs:
        found = run_points(definition, held, [one.point for one in finalists], judgement.seeds, workers)
        runs = tuple(one.runs for one in found)
    winner = finalists[judgement.chosen]
    seeds = judgement.seeds[:_SEEDS]
    default = _default_point(definition, finalists[0].point, trials)
    mine = runs[judgement.chosen]
    knobs = look_around(definition, held, winner.point, default, mine[: len(seeds)], seeds, workers)
    told, shares, busy, profile, kind = _bound(definition, held, winner.point, finalists[0].point, judgement.seeds[0])
    best, sure = _certainties(definition, judgement, runs)
    out = Why(told, shares, busy, tuple(knobs), best, sure, profile, kind, tuple(seeds), ())
    return replace(out, sentences=_sentences(out))


def _default_point(definition: Definition, judged: Point, trials: Sequence[Trial]) -> Point:
    """Where the scenario as written stands in the space."""
    found = next((t.point for t in trials if t.origin == "default"), judged)
    return {name: value for name, value in found.items() if name in definition.space.named}


# ---- what bounds it


def _bound(
    definition: Definition, held: HeldOut, point: Point, default: Point, seed: int
) -> tuple[str, dict[str, tuple[float, float | None]], float | None, str, str]:
    from moesim.terminal import bound_by

    result = _again(definition, held, point, seed)
    assert result is not None
    summary = result.to_json()["summary"]
    profile = result.scenario.cluster.profile
    other = _again(definition, held, default, seed) if point != default else result
    before = {} if other is None else other.to_json()["summary"]["time_share"]
    shares = {
        part: (share, None if other is None else before.get(part, 0.0)) for part, share in summary["time_share"].items()
    }
    busy = result.busy_share if isinstance(result, RunResult) else None
    told = bound_by(summary) if isinstance(result, RunResult) else _training_bound(summary)
    if busy is not None and busy < 0.9 and summary["offered_req_per_s"] is not None:
        told = f"Steps fill {busy:.0%} of the time, the rest waits for arrivals. In a step: {told[0].lower()}{told[1:]}"
    return told, shares, busy, profile.name, profile.kind


def _again(definition: Definition, held: HeldOut, point: Point, seed: int) -> Any:
    """The result of one judged run, simulated here; None where it cannot run."""
    try:
        task = tasks_of(definition, held, point, [seed])[0]
        result = simulate(load_scenario_text(task.text, Path(task.base), task.overrides, seed, task.name))
    except BadInput:
        return None
    return result if result.feasible else None


def _training_bound(summary: Mapping[str, Any]) -> str:
    phases = sorted(summary["phase_share"].items(), key=lambda kv: (-kv[1], kv[0]))
    told = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in phases if share >= 0.005)
    parts = next(iter(summary["time_share"].items()))
    return f"Of a step {told}; most of it is {parts[0].replace('_', ' ')}, {parts[1]:.0%}."


# ---- how sure it is


def _certainties(
    definition: Definition, judgement: Judgement, runs: Sequence[Sequence[Any]]
) -> tuple[dict[str, float], dict[str, dict[str, Certainty]]]:
    """Of the winner against the settings as written and, with one objective, against the best of the others; only of
    those that more than chance parts from it, for errors of the profile turn no tie of chance."""
    finalists, chosen = judgement.finalists, judgement.chosen
    assert chosen is not None
    able = [i for i, one in enumerate(finalists) if one.keeps]
    seed = derived_seed(definition.spec.seed, "certainty")
    names = judgement.objectives

    def apart(i: int, name: str) -> bool:
        return not same_by_chance(difference(runs[chosen], runs[i], figure(name), _SURE), figure(name))

    def ahead(i: int, name: str) -> bool:
        gain = finalists[chosen].scores[name].value - finalists[i].scores[name].value
        return apart(i, name) and gain * (1 if figure(name).more_is_better else -1) > 0

    best: dict[str, float] = {}
    others = [0] if chosen != 0 and 0 in able else []
    if len(names) == 1:
        sign = 1 if figure(names[0]).more_is_better else -1
        order = [i for i in able if i == chosen or apart(i, names[0])]
        order.sort(key=lambda i: (-sign * finalists[i].scores[names[0]].value, i))
        if len(order) > 1:
            found = chances([runs[i] for i in order], figure(names[0]), seed)
            best = {name_of(finalists[i]): share for i, share in zip(order, found, strict=True)}
        others += [i for i in order if i != chosen and i not in others][:1]
    sure = {
        name_of(finalists[i]): {
            name: certainty(runs[chosen], runs[i], figure(name), seed) for name in names if ahead(i, name)
        }
        for i in others
    }
    return best, {other: by_name for other, by_name in sure.items() if by_name}


# ---- in words


def _sentences(found: Why) -> tuple[str, ...]:
    out = [found.bound]
    for kind in ("steep", "flat"):
        names = [knob.parameter for knob in found.knobs if knob.shape == kind]
        if names:
            what = "What matters most near the winner" if kind == "steep" else "What hardly matters near the winner"
            out.append(f"{what}: {', '.join(names)}.")
    out += [_put_back(knob) for knob in found.knobs if knob.back is not None]
    out += [_edge(knob) for knob in found.knobs if knob.edge]
    out += [_cliff(knob, m) for knob in found.knobs for m in knob.neighbours if m.state != "done" or m.breaks]
    out += [_better(knob, m) for knob in found.knobs if knob.shape != "flat" for m in knob.neighbours if _beats(m)]
    for other, by_name in found.certainty.items():
        out += [_sure(found, other, name, one) for name, one in by_name.items()]
    return tuple(out)


def _put_back(knob: Knob) -> str:
    m = knob.back
    assert m is not None
    change = f"{knob.parameter} {_value(knob.default)} -> {_value(knob.value)}"
    if m.state != "done":
        return f"{change}: without it the winner is {m.state}."
    if m.breaks:
        return f"{change}: without it the winner breaks {', '.join(m.breaks)}."
    told = _ratios(m)
    if m.better and m.as_good:
        return f"{change}: the winner is better without it ({told})."
    if m.same:
        return f"{change}: makes no difference that chance could not ({told} without it)."
    return f"{change}: without it {told}."


def _edge(knob: Knob) -> str:
    return (
        f"{knob.parameter} stands at the end of its range ({_value(knob.value)}); a wider range may hold a better one."
    )


def _cliff(knob: Knob, m: Moved) -> str:
    what = f"breaks {', '.join(m.breaks)}" if m.state == "done" else f"is {m.state}"
    reason = f": {_short(m.reasons[0])}" if m.state != "done" and m.reasons else ""
    return f"One step away, {knob.parameter} {_value(m.value)} {what}{reason}".rstrip(".") + "."


def _short(reason: str) -> str:
    """The beginning of a reason, whose whole stands in the report of trials."""
    return textwrap.shorten(reason.split(" (")[0], _REASON, placeholder=" ...")


def _beats(m: Moved) -> bool:
    return m.better and m.as_good and not m.breaks


def _better(knob: Knob, m: Moved) -> str:
    return (
        f"A neighbour that the search has not chosen is better: {knob.parameter} {_value(m.value)} ({_ratios(m)}). "
        "Go on with more trials."
    )


def _ratios(m: Moved) -> str:
    return ", ".join(_ratio(name, *found) for name, found in (m.ratios or {}).items())


def _ratio(name: str, ratio: float, ends: tuple[float, float] | Sequence[float] | None) -> str:
    if figure(name).absolute:
        return f"{name} {'+' if ratio >= 0 else '-'}{spoken(name, abs(ratio))}"
    told = f"{name} times {ratio:.3g}"
    return told if ends is None else f"{told} [{ends[0]:.3g} to {ends[1]:.3g}]"


def _sure(found: Why, other: str, name: str, one: Certainty) -> str:
    told = (
        f"Against {other} in {name}: better with {odds(one.holds)} under the errors that profile {found.profile} states"
    )
    turns = [t for t in one.turns if t.sigmas is not None and t.sigmas < 3]
    if turns and turns[0].factor is not None:
        t, factor = turns[0], turns[0].factor
        told += f"; level if {t.operator} took {factor:.3g} times as long, {t.sigmas:.1f} of its standard errors"
    elif one.turns:
        told += "; no single operator's error within three of its standard errors turns it"
    if 1 - _SURE < one.holds < _SURE:
        doubt = max(one.turns, key=lambda t: (t.part, t.operator), default=None)
        told += ". It cannot be decided on "
        told += "datasheet figures" if found.profile_kind == "assumed" else "this profile"
        if doubt is not None and doubt.part > 0:
            told += f": measure {doubt.operator} first, {doubt.part:.0%} of the doubt is its"
    return f"{told}."


def _value(value: Any) -> str:
    return "as written" if value is None else str(value)


# ---- on screen


def render(found: Mapping[str, Any]) -> str:
    """The text of a `Why.to_json()`, plain, at most 100 columns in tables."""
    lines = [*(f"- {text}" for text in found["sentences"]), ""]
    shares = sorted(found["time_share"].items(), key=lambda kv: (-kv[1][0], kv[0]))
    lines += ["share of the steps' time       winner  as written"]
    for part, (share, before) in shares[:_SHOWN]:
        lines.append(f"  {part.replace('_', ' '):<28}{share:>7.1%}  {'-' if before is None else f'{before:.1%}':>10}")
    lines += ["", f"each setting, {len(found['seeds'])} seeds: what the objectives become with it moved"]
    for knob in found["knobs"]:
        edge = ", at the end of its range" if knob["edge"] else ""
        lines.append(f"  {knob['parameter']} = {_value(knob['value'])}: {knob['shape']}{edge}")
        lines += [f"      {_value(m['value'])}: {_moved_text(m)}" for m in knob["neighbours"]]
        if knob["untried"]:
            lines.append(f"      ({knob['untried']} other values were not tried)")
    for other, by_name in found["certainty"].items():
        for name, one in by_name.items():
            lines += ["", f"against {other}, {name}: what would turn it"]
            lines.append("  operator            winner   other   error   level at   in errors   of the doubt")
            for t in one["turns"][:_SHOWN]:
                level = "-" if t["factor"] is None else f"x {t['factor']:.3g}"
                sigmas = "-" if t["sigmas"] is None else f"{t['sigmas']:.1f}"
                lines.append(
                    f"  {t['operator']:<18}{t['shares'][0]:>8.1%}{t['shares'][1]:>8.1%}{t['error']:>8.1%}"
                    f"{level:>11}{sigmas:>12}{t['part']:>15.0%}"
                )
    if found["best"]:
        chance = ", ".join(f"{name} {odds(share)}" for name, share in found["best"].items() if share >= 0.005)
        lines += ["", f"best under the profile's errors: {chance}"]
    return "\n".join(lines) + "\n"


def _moved_text(m: Mapping[str, Any]) -> str:
    if m["state"] != "done":
        return f"{m['state']}: {_short(m['reasons'][0]) if m['reasons'] else ''}".rstrip(": ")
    told = ", ".join(_ratio(name, *found) for name, found in (m["ratios"] or {}).items())
    broken = f"; breaks {', '.join(m['breaks'])}" if m["breaks"] else ""
    return f"{told}{broken}" if told or broken else "-"
