"""The judge against worlds whose truth is known: who is best, who was only lucky, who ties, who breaks a limit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_tuner.definition import Definition
from moesim_tuner.finalists import Finalist, finalists
from moesim_tuner.heldout import final_fields, hold_out, search_fields
from moesim_tuner.judge import Ran, judge, judge_seeds, tasks_of, weigh
from moesim_tuner.judgement import Judgement
from moesim_tuner.pareto import dominates, undominated
from moesim_tuner.records import Row, Task, Trial, canonical, derived_seed
from moesim_tuner.workers import make_workers

from moesim.errors import BadInput
from moesim.observe import Observation, Seen
from moesim.scenario.load import Scenario, load_scenario_text
from moesim.simulate import RunResult, simulate
from moesim.training.scores import training_scores
from moesim.tune_spec import RungSpec, TuneSpec
from tests.build import tiny_model

RATE, P99 = "output_tok_per_s", "tpot_p99_ms"
SCENARIO = """
model: {model}
cluster: {{device: h100_sxm_datasheet}}
parallel: {{dp: 4, ep: 4}}
requests: {requests}
routing: {{popularity_zipf: 1.0, pool_tokens: 2048, sequence_tokens: 64}}
policies: {{placement: contiguous}}
"""
CLOSED = "{format: closed_loop, concurrency: 8, num_requests: 24, prompt_tokens: 64, output_tokens: 8}"


def spec(**parts: Any) -> TuneSpec:
    base = {
        "space": {"engine.max_num_seqs": {"range": [1, 100]}, "engine.max_num_batched_tokens": {"range": [1000, 1009]}},
        "objectives": [RATE],
        "judge": {"fit_share": 0, "finalists": 4, "seeds": 5},
    }
    return TuneSpec.model_validate({**base, **parts})


def definition(folder: Path = Path(), requests: str = CLOSED, more: str = "", **parts: Any) -> Definition:
    text = SCENARIO.format(model=tiny_model(folder) if folder != Path() else "deepseek-v2-lite", requests=requests)
    return Definition(text + more, "t", str(folder), spec(**parts), "random", (RungSpec(),))


def seen(**figures: float | Seen) -> Observation:
    """A run that says nothing of its own chance: only the seeds do."""
    made = {name: value if isinstance(value, Seen) else Seen(float(value)) for name, value in figures.items()}
    return Observation(made, {}, {}, 0.0, 0.0, "profile", "traffic")


def trial(number: int, origin: str = "random", value: float = 1.0, **more: Any) -> Trial:
    point = more.pop("point", {"engine.max_num_seqs": number + 1, "engine.max_num_batched_tokens": 1000})
    return Trial(number, point, origin, more.pop("state", "complete"), more.pop("values", (value,)), **more)


def weighed(study: Definition, runs: Sequence[Sequence[Observation]], changes: Sequence[int] = ()) -> Judgement:
    """changes: how many parameters each finalist changes."""
    names = list(study.spec.space)
    chosen = [
        Finalist(
            i, dict.fromkeys(names[: changes[i] if changes else int(i > 0)], i + 1), "default" if i == 0 else "random"
        )
        for i in range(len(runs))
    ]
    tested = [Ran("done" if one else "infeasible", tuple(one), () if one else ("too large",)) for one in runs]
    return weigh(study, chosen, tested, range(len(runs[0])), ())


class World:
    """Workers that answer from a function of the point and the seed."""

    parallel = 2

    def __init__(self, answer: Callable[[Mapping[str, str], int], Row]) -> None:
        self.answer, self.seeds, self.tasks = answer, set(), []

    def submit(self, task: Task) -> Future[Row]:
        self.tasks.append(task)
        self.seeds.add(task.seed)
        assert task.observe
        future: Future[Row] = Future()
        future.set_result(self.answer(dict(text.split("=", 1) for text in task.overrides), task.seed))
        return future

    def close(self) -> None:
        """Nothing to end."""


def noise(*keys: Any) -> float:
    """A standard normal draw of its own."""
    return float(np.random.default_rng(derived_seed(7, *map(str, keys))).normal())


# ---- ties


def test_the_truly_best_is_marked_in_nine_of_ten_studies() -> None:
    """200 studies of five finalists, whose truths differ by twice their noise; seeds share a part of it. Interval by
    Student's t at the Bonferroni level: the best one is marked, alone or in a tie, at least as often as promised."""
    study = definition()
    rng = np.random.default_rng(1)
    marked = alone = 0
    for _ in range(200):
        truth = rng.normal(0, 0.04, 5)
        common, own = rng.normal(0, 0.1, 5), rng.normal(0, 0.02, (5, 5))
        runs = [
            [seen(output_tok_per_s=math.exp(t + common[s] + own[i, s])) for s in range(5)] for i, t in enumerate(truth)
        ]
        found = weighed(study, runs)
        marks = [one.scores[RATE].mark for one in found.finalists]
        marked += marks[int(truth.argmax())] is not None
        alone += marks.count("best")
    assert marked >= 180
    assert alone > 20  # and it does say so where it can


def test_what_all_seeds_share_does_not_blur_the_verdict() -> None:
    """Seeds differ by a factor of two, candidates by 1 % in each of them."""
    runs = [[seen(output_tok_per_s=100 * 2**s * f) for s in range(4)] for f in (1.0, 1.01)]
    found = weighed(definition(), runs)
    assert found.chosen == 1
    assert found.finalists[1].scores[RATE].mark == "best"
    low, high = found.finalists[0].scores[RATE].to_best_interval or (0, 0)
    assert low == pytest.approx(1 / 1.01)
    assert high == pytest.approx(1 / 1.01)


def test_of_a_tie_of_chance_the_simplest_is_chosen() -> None:
    def runs(*means: float) -> list[list[Observation]]:
        shape = (-0.03, 0.0, 0.03)
        return [[seen(output_tok_per_s=m * (1 + shape[(s + i) % 3])) for s in range(3)] for i, m in enumerate(means)]

    found = weighed(definition(), runs(100, 100.5, 101), [0, 2, 1])
    assert (found.chosen, found.keep_settings, found.ties) == (0, True, (0, 1, 2))
    assert found.sentences[0].startswith("Keep your settings")
    found = weighed(definition(), runs(50, 100.5, 101, 100.8), [0, 2, 2, 1])
    assert (found.chosen, found.keep_settings) == (3, False)  # one change, the others two
    assert "simplest" in " ".join(found.sentences)


def test_a_tie_that_only_the_profile_could_break_goes_to_the_better() -> None:
    """No noise at all, 5 % better, a step made of other operators whose errors are 30 %."""

    def run(rate: float, **share: float) -> Observation:
        made = Seen(rate, slope=-1.0)
        return Observation({RATE: made}, share, dict.fromkeys(("moe", "gemm"), 0.3), 0.0, 0.0, "profile", "t")

    runs = [[run(100 + s, moe=0.9) for s in range(3)], [run(1.05 * (100 + s), gemm=0.9) for s in range(3)]]
    found = weighed(definition(), runs)
    assert found.chosen == 1
    assert found.ties == (0, 1)
    # 5 % against 0.9 * 0.3 * sqrt(2): better with 55 %
    assert "it holds with 55%" in " ".join(found.sentences)
    assert found.finalists[0].scores[RATE].by_chance == pytest.approx((1 / 1.05, 1 / 1.05))


def test_never_worse_than_the_settings_as_written() -> None:
    """Whatever is drawn: the chosen one has no worse judged value than the default, where that keeps its limits."""
    study = definition(constraints={P99: {"max": 1.0}})
    rng = np.random.default_rng(3)
    changed = 0
    for _ in range(200):
        level, spread, limits = rng.normal(0, 0.05, 5), rng.uniform(0, 0.1, 5), rng.uniform(0.8, 1.1, 5)
        runs = [
            [seen(output_tok_per_s=math.exp(m + s * rng.normal()), tpot_p99_ms=p) for _ in range(4)]
            for m, s, p in zip(level, spread, limits, strict=True)
        ]
        found = weighed(study, runs, [0, 2, 1, 2, 1])
        keeps = [p <= 1.0 for p in limits]
        assert [one.keeps for one in found.finalists] == keeps
        if found.chosen is None:
            assert not any(keeps)
            continue
        assert keeps[found.chosen]
        values = [one.scores[RATE].value for one in found.finalists]
        assert not keeps[0] or values[found.chosen] >= values[0]
        changed += found.chosen != 0
    assert changed > 50


# ---- a search that was lucky


def lucky(study: Definition, gain: Callable[[int], float]) -> tuple[list[Trial], World]:
    """A search with one seed, whose noise is 10 %, over candidates that truly differ by `gain` of their first value."""
    trials = [trial(0, "default", math.exp(gain(1) + 0.1 * noise("search", 0)))]
    trials += [trial(n, value=math.exp(gain(n + 1) + 0.1 * noise("search", n))) for n in range(1, 60)]

    def answer(texts: Mapping[str, str], seed: int) -> Row:
        n = int(texts["engine.max_num_seqs"])
        return Row("done", observation=seen(output_tok_per_s=math.exp(gain(n) + 0.1 * noise(n, seed))))

    return trials, World(answer)


def test_a_lucky_candidate_is_exposed_by_fresh_seeds() -> None:
    study = definition()
    trials, world = lucky(study, lambda n: 0.0)
    found = judge(study, trials, world)
    best = max(trials, key=lambda t: t.values)
    assert best.values[0] > 1.15 * trials[0].values[0]  # the search would have it 15 % better
    assert found.keep_settings
    assert found.winner == 0
    assert best.number in [one.trial for one in found.finalists]
    search_seeds = {task.seed for t in trials for task in study.tasks(t.point, 0)}
    assert not world.seeds & search_seeds


def test_the_truly_better_one_wins_and_the_promise_is_told() -> None:
    study = definition()
    trials, world = lucky(study, lambda n: 0.4 if n == 31 else 0.0)
    found = judge(study, trials, world)
    assert found.winner == 30
    assert not found.keep_settings
    told = " ".join(found.sentences)
    assert "Use trial 30" in told
    assert "The search promised" in told
    default, winner = found.finalists[0].scores[RATE], found.finalists[found.chosen or 0].scores[RATE]
    assert winner.promised == trials[30].values[0]
    assert winner.value / default.value == pytest.approx(math.exp(0.4), rel=0.2)


# ---- who is judged


def test_the_best_the_default_and_the_best_heuristic_are_judged() -> None:
    study = definition(judge={"finalists": 2})
    trials = [
        trial(0, "default", 5.0),
        trial(1, "heuristic: a", 3.0),
        trial(2, "heuristic: b", 4.0),
        trial(3, value=9.0, violations={P99: 0.5}),
        trial(4, value=8.0),
        trial(5, value=8.0, point=trial(4).point),  # the same point again
        trial(6, value=7.0),
        trial(7, value=6.0),
        trial(8, value=99.0, state="pruned"),
        trial(9, state="infeasible", values=()),
    ]
    assert [one.trial for one in finalists(study, trials)] == [0, 4, 6, 2]
    assert [one.trial for one in finalists(study, trials[:2])] == [0, 1]
    # too few feasible: those that break least fill up; no default was tried: the empty point is the scenario as written
    found = finalists(study, [trials[3], trial(10, value=1.0, violations={P99: 0.1})])
    assert [one.trial for one in found] == [None, 10, 3]
    assert found[0].point == {}


def test_a_front_is_what_nothing_dominates_and_finalists_spread_over_it() -> None:
    rng = np.random.default_rng(2)
    values = [tuple(v) for v in rng.integers(0, 12, (60, 3)).tolist()]
    signs = (1, -1, 1)
    brute = [i for i, v in enumerate(values) if not any(dominates(w, v, signs) for w in values) and v not in values[:i]]
    assert undominated(values, signs) == brute
    study = definition(objectives=[RATE, P99], judge={"finalists": 3})
    # a front of 11 (more of both), and one inside it
    trials = [trial(i, values=(100.0 * 1.1**i, 5.0 * 1.1**i)) for i in range(11)] + [trial(11, values=(100.0, 6.0))]
    assert [one.trial for one in finalists(study, trials)][1:] == [10, 5, 0]


def test_seeds_of_the_judge_are_its_own() -> None:
    study = definition(judge={"seeds": 20})
    seeds = judge_seeds(study)
    assert len(set(seeds)) == 20
    assert not set(seeds) & {derived_seed(study.spec.seed, "search", i) for i in range(100)}
    assert judge_seeds(study) == seeds


# ---- constraints


@pytest.mark.parametrize(
    ("values", "status", "keeps"),
    [
        ((0.90, 0.91, 0.92), "kept", True),
        ((0.90, 0.98, 1.06), "not sure", True),
        ((0.96, 1.02, 1.08), "not sure", False),
        ((1.10, 1.11, 1.12), "violated", False),
    ],
)
def test_limits_are_held_against_intervals(values: tuple[float, ...], status: str, keeps: bool) -> None:
    study = definition(constraints={P99: {"max": 1.0}})
    found = weighed(study, [[seen(output_tok_per_s=1.0, tpot_p99_ms=v) for v in values]])
    kept = found.finalists[0].constraints[P99]
    assert (kept.status, found.finalists[0].keeps, found.chosen) == (status, keeps, 0 if keeps else None)
    assert kept.value == pytest.approx(math.exp(np.log(values).mean()))
    assert ("not surely" in " ".join(found.sentences)) == (status == "not sure" and keeps)


def test_where_nobody_keeps_the_limits_it_says_why_for_each() -> None:
    study = definition(constraints={P99: {"max": 1.0}})
    slow = [seen(output_tok_per_s=1.0, tpot_p99_ms=2.0)] * 3
    found = weighed(study, [slow, [], [seen(output_tok_per_s=1.0)] * 3])
    assert found.chosen is None
    assert found.winner is None
    told = found.sentences[0]
    assert "No finalist keeps every constraint" in told
    assert f"{P99} is 2 ms (violated)" in told
    assert "infeasible: too large" in told
    assert f"a run has no {P99}" in told


def test_the_best_that_keeps_wins_over_a_better_one_that_does_not() -> None:
    study = definition(constraints={P99: {"max": 1.0}})
    runs = [
        [seen(output_tok_per_s=rate, tpot_p99_ms=p) for _ in range(3)] for rate, p in ((1, 2.0), (2, 0.5), (3, 1.5))
    ]
    found = weighed(study, runs)
    assert found.chosen == 1
    assert "no choice" in " ".join(found.sentences)  # of the settings as written


# ---- several objectives


def test_the_knee_is_the_member_of_the_front_nearest_to_all() -> None:
    study = definition(objectives=[RATE, P99])
    worlds = [(100, 10.0), (200, 40.0), (180, 12.0), (150, 13.0), (90, 10.5)]  # the fourth and fifth are dominated
    found = weighed(study, [[seen(output_tok_per_s=r, tpot_p99_ms=p)] * 3 for r, p in worlds])
    assert found.front == (0, 1, 2)
    assert found.chosen == 2
    told = " ".join(found.sentences)
    assert f"{RATE} is 10.0% off the best" in told
    assert f"{P99} is 20.0% off the best" in told


def test_shares_are_weighed_by_their_difference() -> None:
    """0.1 % dropped is no half of 0.2 % that would be worth a third of the throughput."""
    study = definition(objectives=["tok_per_s", "dropped_share"])
    worlds = [(156_421, 0.0488), (213_395, 0.13), (127_254, 0.00226), (105_090, 0.00125)]
    found = weighed(study, [[seen(tok_per_s=t, dropped_share=d)] * 3 for t, d in worlds])
    assert found.front == (0, 1, 2, 3)
    assert found.chosen == 0
    found = weighed(study, [[seen(tok_per_s=t, dropped_share=d)] * 3 for t, d in (worlds[3], *worlds[:3])])
    assert found.chosen == 1
    assert "dropped_share: 4.75 % more than the settings as written (90 %: 4.75 % to 4.75 %)" in " ".join(
        found.sentences
    )


def test_a_knee_that_chance_cannot_part_from_the_settings_is_left() -> None:
    study = definition(objectives=[RATE, P99])
    shape = (0.95, 1.0, 1.05)
    runs = [
        [
            seen(output_tok_per_s=100 * shape[(s + i) % 3], tpot_p99_ms=(10 - 0.01 * i) * shape[(s + 2 * i) % 3])
            for s in range(3)
        ]
        for i in range(2)
    ]
    assert weighed(study, runs).keep_settings


# ---- what is kept


def test_a_judgement_goes_through_json_and_is_the_same_again() -> None:
    study = definition(constraints={P99: {"max": 1.0}})
    trials, world = lucky(study, lambda n: 0.2 if n == 31 else 0.0)
    found = judge(study, trials, world)
    text = canonical(found.to_json())
    assert canonical(judge(study, list(reversed(trials)), world).to_json()) == text
    again = Judgement.from_json(json.loads(text))
    assert canonical(again.to_json()) == text
    assert again.finalists == found.finalists
    assert found.runs
    assert not again.runs


def test_a_worker_that_dies_costs_its_finalist_only() -> None:
    study = definition()
    trials, world = lucky(study, lambda n: 0.4 if n == 31 else 0.0)
    whole = world.answer
    dead = judge(study, trials, world).finalists[1].point["engine.max_num_seqs"]
    world.answer = lambda texts, seed: (
        Row("failed", reasons=("the worker died",)) if texts["engine.max_num_seqs"] == str(dead) else whole(texts, seed)
    )
    found = judge(study, trials, world)
    assert (found.finalists[1].state, found.finalists[1].reasons) == ("failed", ("the worker died",))
    assert found.chosen is not None


# ---- held-out traffic


def load(study: Definition, *texts: str) -> Scenario:
    return load_scenario_text(study.text, Path(study.base), texts, 1, "t")


def test_finalists_serve_what_the_search_has_not_seen(tmp_path: Path) -> None:
    """Placements learn from the searched half; every finalist serves the other half, sequence by sequence the same."""
    study = definition(tmp_path, CLOSED.replace("24", "4"), judge={"fit_share": 0.25})
    scenario = load(study)
    fields, notes = search_fields(scenario, study.spec)
    assert fields == ("routing.sequences=[0.0, 0.25]",)
    assert "first 8 of the pool's 32 sequences" in notes[0]
    searched = simulate(load(study, *fields))
    assert isinstance(searched, RunResult)
    assert searched.experts is not None
    served = []
    for more in (
        (),
        ("policies.placement=eplb",),
        ("capacity.factor=4",),
        ("capacity.factor=4", "policies.placement=eplb"),
    ):
        candidate = load(study, *more)
        result = simulate(load(study, *more, *final_fields(scenario, study.spec, candidate)))
        assert isinstance(result, RunResult)
        assert result.experts is not None
        assert result.experts.source.num_sequences == 24
        served.append(result.experts.source)
        assert not result.experts.fitted
        if "policies.placement=eplb" in more:
            assert result.experts.fit is not None
            assert result.experts.fit.num_sequences == 8
    whole = simulate(load(study))
    assert isinstance(whole, RunResult)
    assert whole.experts is not None
    # what was searched and what is served make up the pool
    both = np.concatenate([searched.experts.source.expert_TLK, served[0].expert_TLK])
    np.testing.assert_array_equal(both, whole.experts.source.expert_TLK)
    np.testing.assert_array_equal(served[0].expert_TLK, served[1].expert_TLK)


def test_a_placement_from_of_the_scenario_keeps_its_meaning(tmp_path: Path) -> None:
    study = definition(tmp_path, judge={"fit_share": 0.5})
    scenario = load(study)
    elsewhere = load(study, "placement_from={routing: {popularity_zipf: 0.5}}")
    assert final_fields(scenario, study.spec, elsewhere) == ("routing.sequences=[0.5, 1.0]",)
    half = load(study, "routing.sequences=[0.5, 1]")
    assert search_fields(half, study.spec)[0] == ("routing.sequences=[0.5, 0.75]",)
    assert final_fields(half, study.spec) == ("placement_from.share=0.5",)  # of the half that the scenario has


TIERS = "tiers: {{experts: 0.001, fit_share: {}}}\n"


@pytest.mark.parametrize(("own", "told"), [(0.5, "tiers.fit_share=0.25"), (0, "routing.sequences=[0.25, 1.0]")])
def test_caches_learn_from_the_searched_part_or_know_nothing(tmp_path: Path, own: float, told: str) -> None:
    study = definition(tmp_path, more=TIERS.format(own), judge={"fit_share": 0.25})
    scenario = load(study, "parallel={dp: 1}", "policies.offload=cached")
    assert final_fields(scenario, study.spec) == (told,)


def test_a_recorded_request_trace_is_cut_in_time(tmp_path: Path) -> None:
    rows = "".join(f"{i},{10 + i},5\n" for i in range(20))
    (tmp_path / "r.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    requests = "{format: csv, path: r.csv, offset: 2, limit: 10}"
    study = definition(tmp_path, requests, judge={"fit_share": 0.4}, rungs=[{"set": {"requests.limit": 5}}, {}])
    scenario = load(study)
    fields, notes = search_fields(scenario, study.spec)
    assert fields[1:] == ("requests.offset=2", "requests.limit=4")
    assert any("tune.rungs.0 reaches into the requests that are held out" in note for note in notes)
    results = [simulate(load(study, *texts)) for texts in (fields, final_fields(scenario, study.spec))]
    prompts = [r.stream.prompt_tokens.tolist() for r in results if isinstance(r, RunResult) and r.stream is not None]
    assert prompts == [list(range(12, 16)), list(range(16, 22))]


def test_training_on_a_recorded_pool_is_cut_and_drawn_scores_are_not(tmp_path: Path) -> None:
    text = f"mode: training\nmodel: {tiny_model(tmp_path)}\ncluster: {{device: h100_sxm_datasheet}}\n"
    text += "parallel: {dp: 4, ep: 4}\ntraining: {sequence_tokens: 64, global_batch_sequences: 4, steps: 1}\n"
    study = Definition(text, "t", str(tmp_path), spec(judge={"fit_share": 0.5}), "random", (RungSpec(),))
    fields, notes = search_fields(load(study), study.spec)
    assert (fields, final_fields(load(study), study.spec)) == ((), ())
    assert "fresh seeds" in notes[0]
    pooled = load(study, "routing={popularity_zipf: 1.0, pool_tokens: 1024, sequence_tokens: 64}")
    first, rest = search_fields(pooled, study.spec)[0], final_fields(pooled, study.spec)
    assert (first, rest) == (("routing.sequences=[0.0, 0.5]",), ("routing.sequences=[0.5, 1.0]",))
    knobs = "routing={popularity_zipf: 1.0, pool_tokens: 1024, sequence_tokens: 64}"
    scores = [training_scores(load(study, knobs, *texts), 1).scores(np.arange(4), 0) for texts in (first, rest)]
    assert not np.array_equal(*scores)


def test_what_cannot_be_cut_is_said_and_left_whole(tmp_path: Path) -> None:
    study = definition(tmp_path, judge={"fit_share": 0.5})
    short = load(study, "routing.pool_tokens=64")  # one sequence
    fields, notes = search_fields(short, study.spec)
    assert fields == ()
    assert "the pool cannot be cut" in " ".join(notes)
    none = definition(tmp_path)
    assert search_fields(load(none), none.spec)[0] == ()
    assert "fit_share 0" in search_fields(load(none), none.spec)[1][0]
    dense = load(study, "model=llama-3.1-8b", "parallel={tp: 1}", "routing=null")
    assert not hold_out(dense, study.spec).pool


def test_judging_real_runs(tmp_path: Path) -> None:
    """Larger batches serve faster; the judge finds it by simulation, with what `judge.set` says, and says it again."""
    study = definition(
        tmp_path,
        space={"engine.max_num_seqs": {"choices": [1, 2, 1024]}},
        judge={"fit_share": 0.5, "seeds": 2, "set": {"requests.num_requests": 8}},
        constraints={"hbm_used_bytes": {"max": 1e12}},
    )
    trials = [trial(0, "default", 1.0, point={}), trial(1, value=2.0, point={"engine.max_num_seqs": 1})]
    workers = make_workers(1)
    found = judge(study, trials, workers)
    assert found.keep_settings  # the engine's own limit is far above one request a rank
    assert found.finalists[0].scores[RATE].value > 1.5 * found.finalists[1].scores[RATE].value
    assert found.finalists[0].constraints["hbm_used_bytes"].status == "kept"
    held = hold_out(load(study), study.spec)
    texts = tasks_of(study, held, {}, [1])[0].overrides
    assert texts == ("placement_from.share=0.5", "requests.num_requests=8")
    with pytest.raises(BadInput):
        tasks_of(definition(tmp_path, more="nonsense: 1\n"), held, {}, [1])
    workers.close()
