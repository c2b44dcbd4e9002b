"""What judging found, in sentences: what to use, how much better it is, how sure that is, what the search promised."""

from __future__ import annotations

import math

from scipy.special import ndtr

from moesim.compare import difference
from moesim_tuner.figures import figure
from moesim_tuner.judgement import Judged, Judgement, odds, spoken

__all__ = ["holds", "name_of", "sentences", "times"]

_LEVEL = 0.9


def name_of(one: Judged) -> str:
    """How a finalist is called."""
    return "the settings as written" if one.origin == "default" else f"trial {one.trial}"


def times(ratio: float) -> str:
    """A ratio in words: 1.23 times."""
    return f"{ratio:.3g} times"


def holds(found: Judgement, a: int, b: int, name: str) -> float | None:
    """How likely it is that a is better than b by more than chance allows for, given the errors that the profile
    states; None where it states none."""
    of = figure(name)
    centre, _, _, profile = difference(found.runs[a], found.runs[b], of, _LEVEL)
    if not profile:
        return None
    return float(ndtr((1 if of.more_is_better else -1) * centre / profile))


def sentences(found: Judgement) -> tuple[str, ...]:
    """The finding, most important first. found: with its observations."""
    if found.chosen is None:
        return (_nobody(found),)
    chosen, default = found.finalists[found.chosen], found.finalists[0]
    out = [_headline(found, chosen)]
    if found.chosen != 0 and default.keeps:
        out += [_against_default(found, name) for name in found.objectives]
    elif found.chosen != 0:
        out.append(f"The settings as written are no choice: {_why_not(default)}.")
    out += _tied(found)
    if len(found.objectives) > 1:
        out += _knee(found)
    out += _promise(found, chosen, default)
    out += _limits(chosen)
    return tuple(out)


def _nobody(found: Judgement) -> str:
    told = "; ".join(f"{name_of(one)}: {_why_not(one)}" for one in found.finalists)
    return f"No finalist keeps every constraint on fresh seeds and held-out traffic. {told}."


def _why_not(one: Judged) -> str:
    if one.state != "done":
        return f"{one.state}: {one.reasons[0] if one.reasons else 'no reason was given'}".rstrip(".")
    broken = []
    for name, kept in one.constraints.items():
        if kept.value is None:
            broken.append(f"a run has no {name}")
        elif kept.status != "kept":
            broken.append(f"{name} is {spoken(name, kept.value)} ({kept.status})")
    return ", ".join(broken) or "a run has not every objective"


def _headline(found: Judgement, chosen: Judged) -> str:
    scores = ", ".join(f"{spoken(name, score.value)} {_within(name, score.interval90)}".strip()
                       for name, score in chosen.scores.items())  # fmt: skip
    what = f"on {len(found.seeds)} fresh seeds: {scores} ({', '.join(found.objectives)})"
    if found.keep_settings:
        better = "nothing that was found is better than they are by more than chance"
        return f"Keep your settings; {better}, {what}."
    return f"Use {name_of(chosen)}, {what}."


def _within(name: str, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{spoken(name, interval[0])} to {spoken(name, interval[1])}]"


def _against_default(found: Judgement, name: str) -> str:
    assert found.chosen is not None
    of = figure(name)
    centre, half, chance, _ = difference(found.runs[found.chosen], found.runs[0], of, _LEVEL)
    if of.absolute:
        told = f"{name}: {spoken(name, abs(centre))} {'more' if centre > 0 else 'less'} than the settings as written"
        near, far = abs(centre) - half, abs(centre) + half
        ends = None if not math.isfinite(half) else f"{spoken(name, near)} to {spoken(name, far)}"
    else:
        told = f"{name}: {times(math.exp(centre))} that of the settings as written"
        ends = None if half > 50 else f"{math.exp(centre - half):.3g} to {math.exp(centre + half):.3g}"
    told += f" (90 %: {ends})" if ends else " (the runs are too short for an interval)"
    better = centre * (1 if of.more_is_better else -1) > 0
    sure = holds(found, found.chosen, 0, name)
    if better and abs(centre) <= half and abs(centre) > chance and sure is not None:
        told += f"; more than chance, less than what the profile's errors could hide: it holds with {odds(sure)}"
    return f"{told}."


def _tied(found: Judgement) -> list[str]:
    assert found.chosen is not None
    others = [i for i in found.ties if i != found.chosen]
    if not others or found.chosen not in found.ties:
        return []
    names = ", ".join(name_of(found.finalists[i]) for i in others)
    why = (
        "it is what is there already" if found.keep_settings else "it is chosen as the simplest that chance cannot part"
    )
    return [f"A tie: {names} cannot be told from {'them' if found.keep_settings else 'it'}; {why}."]


def _knee(found: Judgement) -> list[str]:
    """What the chosen member of the front gives up for what."""
    assert found.chosen is not None
    chosen = found.finalists[found.chosen]
    parts = []
    for name in found.objectives:
        of, value = figure(name), chosen.scores[name].value
        values = [found.finalists[i].scores[name].value for i in found.front]
        best = max(values) if of.more_is_better else min(values)
        if of.absolute or best <= 0 or value <= 0:
            parts.append(f"{name} is {spoken(name, value)}, the best {spoken(name, best)}")
        else:
            off = abs(value / best - 1)
            parts.append(f"{name} is the best there is" if off < 5e-4 else f"{name} is {off:.1%} off the best")
    places = ", ".join(name_of(found.finalists[i]) for i in found.front)
    told = (
        f"The front has {len(found.front)}: {places}. The knee, nearest to the best of all at once: {', '.join(parts)}."
    )
    return [told] if len(found.front) > 1 else []


def _promise(found: Judgement, chosen: Judged, default: Judged) -> list[str]:
    """What the search said of the winner, beside what it is worth: against the settings as written where both were
    searched, for the traffic is another one."""
    out = []
    for name, score in chosen.scores.items():
        if score.promised is None or found.keep_settings:
            continue
        base = default.scores.get(name)
        told = f"The search promised {spoken(name, score.promised)} of {name}, held-out traffic says "
        told += spoken(name, score.value)
        whole = min(score.promised, score.value) > 0 and not figure(name).absolute
        if base is not None and base.promised and base.value > 0 and whole:
            told += f"; against the settings as written {times(score.promised / base.promised)} was promised and "
            told += f"{score.value / base.value:.3g} held"
        out.append(f"{told}.")
    return out


def _limits(chosen: Judged) -> list[str]:
    unsure = [
        f"{name} is {spoken(name, kept.value)} {_within(name, kept.interval90)}".strip()
        for name, kept in chosen.constraints.items()
        if kept.status == "not sure" and kept.value is not None
    ]
    return [f"Kept, but not surely: {'; '.join(unsure)}."] if unsure else []
