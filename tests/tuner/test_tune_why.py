"""Why a winner wins: worked by hand, on landscapes that are known, and against the closed form of the normal law."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_tuner.certainty import certainty, chances
from moesim_tuner.definition import Definition
from moesim_tuner.figures import figure
from moesim_tuner.judge import judge
from moesim_tuner.judgement import Judgement
from moesim_tuner.records import Row, Trial, canonical
from moesim_tuner.sensitivity import Knob
from moesim_tuner.why import Why, render, why
from scipy.special import ndtr

from moesim.observe import Observation, Seen
from moesim.tune_spec import RungSpec, TuneSpec
from tests.build import tiny_model
from tests.tuner.test_tune_judge import World

STEP, RATE, P99 = "step_mean_ms", "output_tok_per_s", "tpot_p99_ms"


def run(
    name: str, value: float, slope: float = 1.0, errors: Mapping[str, float] | None = None, **more: Any
) -> Observation:
    """A run with no chance in it. more: shares of operators; profile, speed."""
    profile, speed = more.pop("profile", "p"), more.pop("speed", 0.0)
    return Observation(
        {name: Seen(value, slope=slope)}, more, errors or dict.fromkeys(more, 0.1), speed, 0.0, profile, "t"
    )


# ---- how sure it is


def test_the_error_that_turns_two_is_where_they_are_level() -> None:
    """12 ms, half of it experts, against 10 ms, a fifth of it experts and a half products."""
    a, b = [run(STEP, 10.0, moe=0.2, gemm=0.5)], [run(STEP, 12.0, moe=0.5, gemm=0.1)]
    found = certainty(a, b, figure(STEP), 1)
    turns = {t.operator: t for t in found.turns}
    # 10 (0.8 + 0.2 f) = 12 (0.5 + 0.5 f): experts would have to take half the time
    assert turns["moe"].factor == pytest.approx(0.5)
    assert turns["moe"].sigmas == pytest.approx(math.log(2) / 0.1)
    # 10 (0.5 + 0.5 f) = 12 (0.9 + 0.1 f): products 1.526 times as long
    assert turns["gemm"].factor == pytest.approx((12 * 0.9 - 5) / (5 - 1.2))
    assert [t.operator for t in found.turns] == ["gemm", "moe"]  # the nearest first
    assert sum(t.part for t in found.turns) == pytest.approx(1.0)
    assert turns["gemm"].part == pytest.approx(0.4**2 / (0.4**2 + 0.3**2))


def test_an_operator_that_both_share_alike_turns_nothing() -> None:
    found = certainty([run(STEP, 10.0, moe=0.5)], [run(STEP, 12.0, moe=0.5)], figure(STEP), 1)
    assert found.holds == 1.0
    assert found.turns[0].factor is None
    assert found.turns[0].part == 0.0


@pytest.mark.parametrize(("rate", "slope"), [(False, 1.0), (True, -1.0)])
@pytest.mark.parametrize("ratio", [1.004, 1.01, 1.03])
def test_small_errors_hold_with_the_normal_laws_probability(rate: bool, slope: float, ratio: float) -> None:
    """Errors of 1 and 2 % of operators whose shares differ by 0.4 and 0.3: to first order the ratio is normal."""
    name, errors = (RATE if rate else STEP), {"moe": 0.01, "gemm": 0.02}
    better, worse = (ratio, 1.0) if rate else (1.0, ratio)
    a = [run(name, better, slope, errors, moe=0.1, gemm=0.6)]
    b = [run(name, worse, slope, errors, moe=0.5, gemm=0.3)]
    sigma = math.hypot(0.4 * 0.01, 0.3 * 0.02)
    assert certainty(a, b, figure(name), 1).holds == pytest.approx(float(ndtr(math.log(ratio) / sigma)), abs=0.012)


def test_what_a_device_shares_cancels_and_two_devices_do_not() -> None:
    """Equal shares in all: the device's speed moves both alike; on two devices each has its own."""

    def on(profile: str, value: float) -> list[Observation]:
        return [run(STEP, value, errors={"moe": 0.0}, moe=1.0, speed=0.05, profile=profile)]

    assert certainty(on("p", 1.0), on("p", 1.05), figure(STEP), 1).holds == 1.0
    apart = certainty(on("p", 1.0), on("q", 1.05), figure(STEP), 1)
    assert apart.holds == pytest.approx(float(ndtr(math.log(1.05) / (0.05 * math.sqrt(2)))), abs=0.012)
    assert apart.turns == ()


def test_chances_of_all_add_up_and_agree_with_those_of_two() -> None:
    runs = [[run(STEP, v, moe=m, gemm=1 - m)] for v, m in ((10.0, 0.2), (10.2, 0.8), (10.1, 0.5), (14.0, 0.5))]
    found = chances(runs, figure(STEP), 4)
    assert sum(found) == pytest.approx(1.0)
    assert found[3] == 0.0
    two = chances(runs[:2], figure(STEP), 4)
    assert two[0] == pytest.approx(certainty(*runs[:2], figure(STEP), 4).holds)
    assert two == chances(runs[:2], figure(STEP), 4)


# ---- what each setting does

SCENARIO = """
model: {model}
cluster: {{device: h100_sxm_datasheet}}
parallel: {{dp: 2, ep: 2}}
requests: {{format: closed_loop, concurrency: 4, num_requests: 6, prompt_tokens: 16, output_tokens: 3}}
routing: {{popularity_zipf: 1.0, pool_tokens: 512, sequence_tokens: 64}}
engine: {{max_num_seqs: 16, max_num_batched_tokens: 2048, block_size: 16}}
"""
SPACE = {
    "engine.max_num_seqs": {"choices": [8, 16, 32, 64, 128]},  # steep, best at 32
    "engine.max_num_batched_tokens": {"choices": [1024, 2048, 4096]},  # gentle, best at the end
    "engine.block_size": {"choices": [8, 16, 32]},  # nothing
    "policies.placement": {"choices": ["contiguous", "round_robin", "random", "eplb"]},
}


def study(folder: Path, **parts: Any) -> Definition:
    base = {"space": SPACE, "objectives": [RATE], "judge": {"fit_share": 0, "seeds": 4}}
    spec = TuneSpec.model_validate({**base, **parts})
    text = SCENARIO.format(model=tiny_model(folder))
    return Definition(text, "t", str(folder), spec, "random", (RungSpec(),))


def landscape(texts: Mapping[str, str], seed: int) -> Row:
    """The rate that the settings give; seeds share a factor. `random` does not fit, 64 requests break the limit,
    `eplb` fails."""
    seqs, tokens = int(texts.get("engine.max_num_seqs", 16)), int(texts.get("engine.max_num_batched_tokens", 2048))
    placement = texts.get("policies.placement", '"contiguous"')
    if placement == '"random"':
        return Row("infeasible", reasons=("rank 0 needs 3 GiB more",))
    if placement == '"eplb"':
        return Row("failed", reasons=("the worker died",))
    rate = 1000 * math.exp(-0.3 * math.log2(seqs / 32) ** 2) * (tokens / 4096) ** 0.03 * (1 + seed % 7 / 10)
    rate *= 1 + 1e-7 * (int(texts.get("engine.block_size", 16)) + seed % 11)
    slow = 2.0 if seqs >= 64 else 1.0
    share = {"moe": 0.2 if seqs == 32 else 0.5, "gemm": 0.3}
    figures = {RATE: Seen(rate, slope=-1.0), P99: Seen(slow, slope=1.0)}
    return Row("done", observation=Observation(figures, share, dict.fromkeys(share, 0.05), 0.0, 0.0, "p", "t"))


def explained(folder: Path, best: Mapping[str, Any], **parts: Any) -> tuple[Why, Judgement, Definition, World]:
    made = study(folder, **parts)
    default = {"engine.max_num_seqs": 16, "engine.max_num_batched_tokens": 2048, "engine.block_size": 16,
               "policies.placement": "contiguous"}  # fmt: skip
    trials = [
        Trial(0, default, "default", "complete", (600.0,) * len(made.spec.objectives)),
        Trial(1, {**default, **best}, "tpe", "complete", (900.0,) * len(made.spec.objectives)),
    ]
    world = World(landscape)
    found = judge(made, trials, world)
    world.tasks.clear()
    return why(made, trials, found, world), found, made, world


BEST = {"engine.max_num_seqs": 32, "engine.max_num_batched_tokens": 4096, "engine.block_size": 32}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Why, Judgement, Definition, World]:
    folder = tmp_path_factory.mktemp("why")
    return explained(folder, BEST, constraints={P99: {"max": 1.5}})


def knobs(found: Why) -> dict[str, Knob]:
    return {knob.parameter: knob for knob in found.knobs}


def test_shapes_of_a_known_landscape(told: tuple[Why, Judgement, Definition, World]) -> None:
    found = knobs(told[0])
    assert {name: knob.shape for name, knob in found.items()} == {
        "engine.max_num_seqs": "steep",
        "engine.max_num_batched_tokens": "gentle",
        "engine.block_size": "flat",
        "policies.placement": "flat",
    }
    assert [m.value for m in found["engine.max_num_seqs"].neighbours] == [16, 64]
    ratio, ends = (found["engine.max_num_seqs"].neighbours[0].ratios or {})[RATE]
    assert ratio == pytest.approx(math.exp(-0.3), rel=1e-5)
    assert ends is not None
    assert ends[0] < ratio < ends[1]  # the profile's errors
    assert {knob.edge for name, knob in found.items() if name != "engine.max_num_batched_tokens"} == {False}
    assert found["engine.max_num_batched_tokens"].edge
    assert found["policies.placement"].untried == 0


def test_what_breaks_one_step_away(told: tuple[Why, Judgement, Definition, World]) -> None:
    found = knobs(told[0])
    over = found["engine.max_num_seqs"].neighbours[1]
    assert (over.state, over.breaks) == ("done", (P99,))
    states = {m.value: m.state for m in found["policies.placement"].neighbours}
    assert states == {"round_robin": "done", "random": "infeasible", "eplb": "failed"}
    text = " ".join(told[0].sentences)
    assert f"engine.max_num_seqs 64 breaks {P99}" in text
    assert "policies.placement random is infeasible: rank 0 needs 3 GiB more" in text


def test_each_change_put_back(told: tuple[Why, Judgement, Definition, World]) -> None:
    found = knobs(told[0])
    back = {name: knob.back for name, knob in found.items()}
    assert back["policies.placement"] is None  # as written
    assert back["engine.max_num_seqs"] is not None
    assert back["engine.max_num_seqs"].worse
    for name, factor in (("engine.block_size", 1.0), ("engine.max_num_batched_tokens", 0.5**0.03)):
        moved = back[name]
        assert moved is not None
        ratio, _ = (moved.ratios or {})[RATE]
        assert ratio == pytest.approx(factor, rel=1e-5)


def test_neighbours_meet_the_judged_seeds_and_nothing_is_run_twice(
    told: tuple[Why, Judgement, Definition, World],
) -> None:
    found, judgement, _, world = told
    assert found.seeds == judgement.seeds[:3]
    assert world.seeds == set(judgement.seeds)
    asked = [(task.overrides, task.seed) for task in world.tasks]
    assert len(asked) == len(set(asked))
    # 2 + 1 + 1 + 3 neighbours; putting back 16, 2,048 and 16 are among them
    assert len(asked) == 7 * 3


def test_the_bound_is_that_of_a_run_and_the_rest_of_the_table_adds_up(
    told: tuple[Why, Judgement, Definition, World],
) -> None:
    found = told[0]
    assert found.bound.startswith("Bound by")
    assert sum(share for share, _ in found.time_share.values()) == pytest.approx(1.0)
    assert sum(before or 0.0 for _, before in found.time_share.values()) <= 1.0 + 1e-9
    assert (found.profile, found.profile_kind) == ("h100_sxm_datasheet", "assumed")


def test_it_says_how_sure_the_winner_is(told: tuple[Why, Judgement, Definition, World]) -> None:
    found = told[0]
    one = found.certainty["the settings as written"][RATE]
    # 0.3 + 0.03 ln 2 in the logarithm, against 0.3 * 0.05 of the experts' share
    assert one.holds == 1.0
    moe = next(t for t in one.turns if t.operator == "moe")
    assert moe.shares == pytest.approx((0.2, 0.5))
    gap = math.exp(0.3 + 0.03 * math.log(2))
    assert moe.factor is not None
    assert (0.8 + 0.2 * moe.factor) / (0.5 + 0.5 * moe.factor) == pytest.approx(gap, rel=1e-4)
    assert found.best == {"trial 1": 1.0, "the settings as written": 0.0}


def test_it_is_drawn_from_json_and_again_the_same(told: tuple[Why, Judgement, Definition, World]) -> None:
    found, judgement, made, world = told
    text = canonical(found.to_json())
    kept = Judgement.from_json(json.loads(canonical(judgement.to_json())))
    again = why(made, [Trial(0, judgement.finalists[0].point, "default", "complete")], kept, world)
    assert canonical(again.to_json()) == text
    page = render(json.loads(text))
    assert "engine.max_num_seqs = 32: steep" in page
    assert "random: infeasible: rank 0 needs 3 GiB more" in page
    assert "against the settings as written" in page
    assert all(len(line) <= 110 for line in page.split("share of the steps")[1].splitlines())


def test_a_neighbour_that_is_better_is_named(tmp_path: Path) -> None:
    found, judgement, _, _ = explained(tmp_path, {"engine.max_num_seqs": 8})  # worse than as written
    assert judgement.keep_settings
    assert "A neighbour that the search has not chosen is better: engine.max_num_seqs 32" in " ".join(found.sentences)
    assert all(knob.back is None for knob in found.knobs)
    # the other finalist is worse by 0.9 in the logarithm
    assert found.certainty["trial 1"][RATE].holds == 1.0


def test_where_the_datasheet_cannot_decide_it_says_what_to_measure(tmp_path: Path) -> None:
    made = study(tmp_path)

    def answer(texts: Mapping[str, str], seed: int) -> Row:
        better = texts.get("engine.max_num_seqs", "16") == "32"
        share = {"moe": 0.7, "gemm": 0.1} if better else {"moe": 0.1, "gemm": 0.4}
        figures = {RATE: Seen((1.05 if better else 1.0) * (1 + seed % 5), slope=-1.0)}
        return Row("done", observation=Observation(figures, share, dict.fromkeys(share, 0.3), 0.0, 0.0, "p", "t"))

    world, point = World(answer), {"engine.max_num_seqs": 32}
    trials = [Trial(0, {}, "default", "complete", (1.0,)), Trial(1, point, "tpe", "complete", (1.05,))]
    found = judge(made, trials, world)
    assert found.winner == 1
    text = " ".join(why(made, trials, found, world).sentences)
    assert "It cannot be decided on datasheet figures: measure moe first, 80% of the doubt is its" in text


def test_several_objectives_are_each_told(tmp_path: Path) -> None:
    found, judgement, _, _ = explained(tmp_path, BEST, objectives=[RATE, P99])
    assert judgement.chosen == 1  # as fast for each, and more
    assert set(found.certainty["the settings as written"]) == {RATE}  # nothing parts them in the other
    assert not found.best


def test_nobody_who_won_cannot_be_explained(tmp_path: Path) -> None:
    made = study(tmp_path)
    world = World(lambda texts, seed: Row("failed", reasons=("no",)))
    found = judge(made, [Trial(0, {}, "default", "complete", (1.0,))], world)
    with pytest.raises(ValueError, match="nobody won"):
        why(made, [], found, world)


def test_probabilities_do_not_depend_on_who_is_asked_first() -> None:
    a, b = [run(STEP, 10.0, moe=0.2, gemm=0.7)], [run(STEP, 10.3, moe=0.8, gemm=0.1)]
    one, other = certainty(a, b, figure(STEP), 3).holds, certainty(b, a, figure(STEP), 3).holds
    assert one + other == pytest.approx(1.0)
    assert 0.5 < one < 0.9
    assert np.isfinite(one)
