"""How far studies are: a line each, also while they run. Nothing that simulates is imported."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

from moesim_tuner.store import StudyLine, list_studies

__all__ = ["show_status", "status_json"]


def status_json(line: StudyLine, counts: Counter[str], best: dict[str, Any] | None, now_s: float) -> dict[str, Any]:
    """A study as the report says it. best: of the feasible trials, by objective; last_trial_s: how long ago the last
    one ended, None before the first."""
    return {
        "study": line.name,
        "trials": line.num_trials,
        "wanted": line.num_wanted,
        "states": dict(sorted(counts.items())),
        "best": best,
        "last_trial_s": round(now_s - line.changed_s, 1) if line.changed_s else None,
        "running": line.holder,
    }


def show_status(study: str | None, storage: str, as_json: bool) -> None:
    """Print one study's state, or every one's. Raises BadInput for a study that is not kept."""
    from moesim_tuner.store import definition_of, read_study

    lines = [line for line in list_studies(storage) if study in (None, line.name)]
    if study is not None and not lines:
        read_study(storage, study)  # says that it is not there
    found = []
    for line in lines:
        kept = read_study(storage, line.name)
        definition, trials = definition_of(kept), kept.trials
        feasible = [t for t in trials if t.feasible]
        best = {
            name: max((t.values[i] for t in feasible), key=lambda v, sign=sign: sign * v)  # type: ignore[misc]
            for i, (name, sign) in enumerate(zip(definition.spec.objectives, definition.signs, strict=True))
            if feasible
        }
        counts = Counter("feasible" if t.feasible else t.state for t in trials)
        found.append(status_json(line, counts, best or None, time.time()))
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    if not found:
        print("no study is kept there; `moesim tune FILE` begins one")
    for one in found:
        print(_line(one))


def _line(one: dict[str, Any]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in one["states"].items()) or "nothing yet"
    best = "" if one["best"] is None else "; best " + ", ".join(f"{k} {v:,.4g}" for k, v in one["best"].items())
    ended = one["trials"] >= one["wanted"]
    how = f"running ({one['running']})" if one["running"] else "finished" if ended else "stopped"
    ago = "" if one["last_trial_s"] is None else f", last trial {_ago(one['last_trial_s'])} ago"
    return f"{one['study']}: {one['trials']} of {one['wanted']} trials, {how}{ago}: {states}{best}"


def _ago(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
