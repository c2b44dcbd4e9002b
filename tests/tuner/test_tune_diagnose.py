"""A study without a feasible point, by hand: who excludes what, what cannot be together, what would have to give."""

from __future__ import annotations

import json
from typing import Any

from moesim_tuner.definition import Definition
from moesim_tuner.diagnose import diagnose
from moesim_tuner.figures import violation
from moesim_tuner.records import Trial

from moesim.tune_spec import TuneSpec

SPEC = TuneSpec.model_validate(
    {
        "space": {"engine.max_num_seqs": {"range": [1, 9]}},
        "objectives": ["output_tok_per_s"],
        "constraints": {"ttft_p99_ms": {"max": 2000}, "output_tok_per_s": {"min": 100}},
    }
)
DEFINITION = Definition("", "s", ".", SPEC, "random", ())


def measured(number: int, ttft: float, rate: float) -> Trial:
    figures = {"ttft_p99_ms": ttft, "output_tok_per_s": rate}
    broken = {name: violation(figures, name, limit.min, limit.max) for name, limit in SPEC.constraints.items()}
    return Trial(number, {"engine.max_num_seqs": number}, "random", "complete", (rate,), broken, (figures,))


def stopped(number: int, state: Any, name: str, reason: str) -> Trial:
    return Trial(number, {"engine.max_num_seqs": number}, "random", state, (), {name: 1.0}, (), (reason,))


TRIALS = [
    measured(0, 2340, 150),  # breaks TTFT by 17 %
    measured(1, 1500, 50),  # breaks the rate by half
    measured(2, 4000, 50),  # both
    stopped(3, "infeasible", "memory", "rank 0 needs 90.1 GiB and has 80 GiB"),
    stopped(4, "infeasible", "memory", "rank 0 needs 101.7 GiB and has 80 GiB"),
    stopped(5, "illegal", "legality", "--set parallel.ep=3: parallel.ep must divide 64 experts, got 3"),
    Trial(6, {"engine.max_num_seqs": 6}, "random", "failed", reasons=("a worker died",)),
]


def test_who_excludes_what() -> None:
    found = diagnose(DEFINITION, TRIALS)
    by_name = {e.constraint: e for e in found.excluded}
    assert (found.trials, found.feasible, found.failed, found.pruned) == (7, 0, 1, 0)
    assert (by_name["ttft_p99_ms"].broken, by_name["ttft_p99_ms"].known, by_name["ttft_p99_ms"].alone) == (2, 3, 1)
    assert (by_name["output_tok_per_s"].broken, by_name["output_tok_per_s"].alone) == (2, 1)
    assert (by_name["memory"].broken, by_name["memory"].known, by_name["memory"].alone) == (2, 6, 2)
    assert by_name["legality"].broken == 1
    assert (by_name["ttft_p99_ms"].best, by_name["ttft_p99_ms"].trial) == (1500, 1)


def test_nearest_in_the_figures_own_unit_and_what_gives() -> None:
    found = diagnose(DEFINITION, TRIALS)
    assert found.nearest == 0
    assert [str(b) for b in found.breaches] == ["ttft_p99_ms 2,340 where at most 2,000 is wanted"]
    assert found.apart == (("ttft_p99_ms", "output_tok_per_s"),)
    assert found.relax == {"ttft_p99_ms": (2340, 0), "output_tok_per_s": (50, 1)}
    text = found.text()
    assert "none of 7 trials is feasible (1 failed)" in text
    assert "it is feasible with max 2,340 for ttft_p99_ms" in text
    assert "moving output_tok_per_s alone to 50 makes trial 1 feasible" in text
    assert "ttft_p99_ms and output_tok_per_s: each is kept by some trial, both by none" in text


def test_what_it_says_makes_feasible_does() -> None:
    """The limits set to what the report says, the same trials: the nearest is feasible."""
    found = diagnose(DEFINITION, TRIALS)
    nearest = next(t for t in TRIALS if t.number == found.nearest)
    loose = {name: (limit.min, limit.max) for name, limit in SPEC.constraints.items()}
    for breach in found.breaches:
        low, high = loose[breach.constraint]
        loose[breach.constraint] = (breach.value, high) if breach.side == "min" else (low, breach.value)
    figures = nearest.rungs[-1]
    assert all(violation(figures, name, low, high) <= 0 for name, (low, high) in loose.items())


def test_reasons_that_differ_in_numbers_alone_are_one() -> None:
    reasons = diagnose(DEFINITION, TRIALS).reasons
    assert reasons == (
        ("memory", "rank 0 needs 90.1 GiB and has 80 GiB", 2),
        ("legality", "parallel.ep must divide 64 experts, got 3", 1),
    )


def test_nothing_measured() -> None:
    found = diagnose(DEFINITION, TRIALS[3:6])
    assert found.apart == ()
    assert found.relax == {}
    assert found.nearest == 3
    assert "memory excludes 2 of 3, 2 of them by it alone" in found.text()
    assert "feasible with" not in found.text()
    assert diagnose(DEFINITION, []).text() == "no trial has been run yet"
    assert diagnose(DEFINITION, TRIALS[6:]).nearest is None


def test_with_feasible_points_shares_are_left() -> None:
    found = diagnose(DEFINITION, [*TRIALS, measured(7, 1000, 200)])
    assert found.feasible == 1
    assert found.apart == ()
    assert found.text().splitlines()[0] == "1 of 8 trials are feasible (1 failed)"
    assert "nearest: trial" not in found.text()


def test_json_is_plain() -> None:
    found = diagnose(DEFINITION, TRIALS).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["breaches"][0]["value"] == 2340
