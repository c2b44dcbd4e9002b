"""Reports and progress: counts add up, the front is the front, equal studies read alike."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.pareto import best_so_far, front
from moesim_tuner.progress import Progress
from moesim_tuner.records import Trial
from moesim_tuner.report import render, to_json
from moesim_tuner.words import figure, settings_in_short

from tests.tuner.studies import Found, definition, trial

TRIALS = [
    trial(0, 500, 100, origin="default"),
    trial(1, 300, 90),
    trial(2, 700, 200, tpot=150),  # breaks its limit
    trial(3, 0, 0, state="infeasible"),
    trial(4, 300, 120, origin="heuristic: vllm defaults"),
    trial(5, 900, 300),
    trial(6, 100, 10, state="pruned"),
    trial(7, 0, 0, state="failed"),
]


def printed(found: Found, width: int = 100) -> str:
    out = io.StringIO()
    render(found, out, width)
    return out.getvalue()


# ---- the front


def test_the_front_by_hand() -> None:
    assert [t.number for t in front(definition(), TRIALS)] == [4, 5]
    assert best_so_far(definition(), TRIALS) == [(0, 500), (1, 300)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([50, 150])), max_size=12))
def test_the_front_is_what_no_one_beats(values: list[tuple[int, int, int]]) -> None:
    """Brute force over all pairs; of equal trials the first."""
    trials = [trial(i, a, b, tpot) for i, (a, b, tpot) in enumerate(values)]

    def beats(one: Trial, other: Trial) -> bool:
        (a, b), (c, d) = one.values, other.values
        return a <= c and b >= d and ((a, b) != (c, d) or one.number < other.number)

    good = [t for t in trials if t.feasible]
    want = {t.number for t in good if not any(beats(o, t) for o in good if o is not t)}
    found = front(definition(), trials)
    assert {t.number for t in found} == want
    assert [t.values[0] for t in found] == sorted(t.values[0] for t in found)


# ---- the report


def test_counts_add_up() -> None:
    report = to_json(Found(definition(), TRIALS))
    search = report["search"]
    assert sum(search["states"].values()) == sum(search["origins"].values()) == search["trials"] == len(TRIALS)
    assert search["states"] == {"complete": 5, "pruned": 1, "infeasible": 1, "illegal": 0, "failed": 1}
    assert search["feasible"] == 4
    assert [row["trial"] for row in report["front"]] == [4, 5]
    assert [row["trial"] for row in report["beside"]] == [0, 4]
    assert report["space"]["points"] == 3 * 99
    json.dumps(report, allow_nan=False)


def test_the_screen_says_it() -> None:
    text = printed(Found(definition(), TRIALS))
    for told in (
        "least ttft_p99_ms and most output_tok_per_s, with tpot_p99_ms at most 100",
        "2 parameters, 297 points",
        "8 of 40 trials: 5 run whole, 1 stopped early, 1 do not fit, 1 failed; 4 feasible",
        "heuristic: vllm defaults",
        "any number of workers finds the same trials",
        "the best of many is lucky",
        "moesim tune resume world",
        "moesim tune export world",
    ):
        assert told in " ".join(text.split()), told


def test_equal_studies_read_alike_whatever_the_clock_and_the_order() -> None:
    late = [replace(t, started_s=7.0, ended_s=9.0) for t in reversed(TRIALS)]
    assert printed(Found(definition(), TRIALS)) == printed(Found(definition(), late))
    assert to_json(Found(definition(), TRIALS)) == to_json(Found(definition(), late))


def test_asynchronous_is_said() -> None:
    assert "may propose other trials" in " ".join(printed(Found(definition(asynchronous=True), TRIALS)).split())


def test_nothing_feasible_names_the_limits() -> None:
    text = printed(Found(definition(), [t for t in TRIALS if not t.feasible and t.state != "failed"]))
    assert "tune export" not in text
    assert "none of 3 trials is feasible" in text
    assert "tpot_p99_ms" in text


def test_no_trial_yet() -> None:
    text = printed(Found(definition(), []))
    assert "0 of 40 trials: none yet" in text


def test_it_fits_any_width() -> None:
    for width in (60, 72, 140):
        lines = printed(Found(definition(), TRIALS), width).splitlines()
        assert max(map(len, lines)) <= width


JUDGED: dict[str, Any] = {
    "objectives": ["ttft_p99_ms", "output_tok_per_s"], "seeds": [1, 2, 3], "winner": 4, "chosen": 1, "ties": [1, 2],
    "front": [1, 2], "keep_settings": False, "tie_level": 0.95, "sentences": ["Use trial 4, on 3 fresh seeds."],
    "notes": ["sequences 5 to 9 were held out"],
    "finalists": [
        {"trial": number, "origin": origin, "point": {}, "changes": {}, "state": "done", "reasons": [], "keeps": True,
         "scores": {name: {"value": 300.0, "interval90": [290.0, 310.0], "to_best": 1.02, "mark": mark,
                           "to_best_interval": [0.99, 1.05], "by_chance": None, "promised": 280.0}
                    for name in ("ttft_p99_ms", "output_tok_per_s")},
         "constraints": {"tpot_p99_ms": {"value": 99.0, "interval90": [95.0, 104.0], "status": status}},
         "figures": {}, "scenario_hash": ""}
        for number, origin, mark, status in (
            (0, "default", None, "kept"), (4, "heuristic: defaults", "best", "kept"), (5, "tpe", "tie", "not sure"),
        )
    ],
}  # fmt: skip


WHY: dict[str, Any] = {
    "bound": "the all-to-all", "time_share": {"all_to_all": [0.5, None]}, "busy_share": 1.0, "knobs": [], "best": {},
    "certainty": {}, "profile": "h100", "profile_kind": "assumed", "seeds": [1],
    "sentences": ["The all-to-all bounds it.", "Beside it: much is needed (weights 1 B, rest 2,000 B)."],
}  # fmt: skip


def test_the_judgement_is_shown_with_intervals_and_ties() -> None:
    found = Found(definition(), TRIALS, judgement=JUDGED, why=WHY)
    text = printed(found, 140)
    judged = text.split("Judged on 3 fresh seeds")[1]
    table = judged.split("output_tok_per_s")[0].splitlines()
    rows = {line.split()[1]: line for line in table if line.strip()[:1] in ("*", "=")}
    assert rows["4"].split()[0] == "*"
    assert rows["5"].split()[0] == "="
    assert "trial 5: tpot_p99_ms not sure" in judged
    assert "290..310" in judged
    assert "0.99..1.05" in judged
    assert "sequences 5 to 9 were held out" in judged
    assert "The all-to-all bounds it." in judged
    assert "much is needed.\n" in judged
    assert "best of many" not in judged
    nobody = printed(Found(definition(), TRIALS, judgement={**JUDGED, "winner": None, "chosen": None}))
    assert "tune export" not in nobody


# ---- words


def test_words() -> None:
    assert figure(3 * 2**30, "hbm_used_bytes") == "3.0 GiB"
    assert figure(0.0123, "dropped_share") == "1.2%"
    assert figure(12345.6) == "12,346"
    assert settings_in_short({"parallel.tp": 4, "a.x": 1, "b.x": True}) == "tp 4, a.x 1, b.x true"


# ---- progress


@dataclass
class Clock:
    """Moved by hand."""

    now: float = 0.0
    calls: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now


def test_no_terminal_gets_a_line_every_ten_seconds() -> None:
    clock, out = Clock(), io.StringIO()
    late = [replace(t, ended_s=4e9) for t in TRIALS]  # of this run, not of one before
    with Progress(definition(), file=out, clock=clock) as progress:
        for one, now in zip(late, itertools.count(3, 3), strict=False):
            clock.now = now
            progress.told([one])
        progress.stage("judging the best")
    lines = out.getvalue().splitlines()
    assert [line.split(";")[0] for line in lines[:2]] == ["4/40 trials", "8/40 trials"]
    assert "3.0 s a trial, 1 min 36 s left" in lines[1]
    assert "4 feasible, 12% do not fit, 12% over a limit, 12% stopped early, 12% failed" in lines[1]
    assert "best ttft_p99_ms 300, output_tok_per_s 120 (trial 4)" in lines[1]
    assert lines[2].startswith("judging the best: 8/40 trials")


def test_trials_from_before_are_told_and_do_not_make_the_rate() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(definition(), file=out, clock=clock)
    progress.told(TRIALS)
    assert progress.rate_per_s is None
    assert "8/40 trials (8 from before)" in progress.line()
    clock.now = 2.0
    progress.told([trial(8, 1, 1, ended_s=4e9)])
    assert progress.rate_per_s == 0.5


def test_quiet_is_quiet() -> None:
    out = io.StringIO()
    with Progress(definition(), enabled=False, file=out, clock=Clock()) as progress:
        progress.told(TRIALS)
        progress.stage("judging")
    assert not out.getvalue()


def test_a_terminal_gets_a_view_and_keeps_nothing_of_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress(definition(), file=out) as progress:
        progress.told(TRIALS)
        progress._live.refresh()  # type: ignore[union-attr]
    shown = out.getvalue()
    assert "8/40 trials" in shown
    assert "ttft_p99_ms" in shown
    assert shown.endswith("\x1b[?25h") or "\x1b[2K" in shown
