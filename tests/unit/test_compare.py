"""Comparing candidates: what --vary means, known verdicts, and how often chance alone makes a winner."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from moesim.candidates import load_candidates, parse_axes, split_values
from moesim.compare import Entry, Verdict, chosen_figures, compare, difference
from moesim.cost.explain import stats_by_draw
from moesim.errors import BadInput
from moesim.metrics import Z90
from moesim.observe import FIGURES, Observation, Seen, latency_figures, leave_out, observe, without_rates
from moesim.record import RequestRecords
from moesim.scenario.load import load_scenario
from moesim.simulate import simulate
from tests.build import scenario
from tests.unit.test_cli import SCENARIO, Ran

P50 = "ttft_p50_ms"
Run = Callable[..., Ran]


def seen(value: float, spread: float = 0.0, **more: Any) -> Observation:
    """A run whose one figure has 20 left-out values with a jackknife standard error of about `spread` (of its log)."""
    wiggle = np.tile([1.0, -1.0], 10)
    left = value * np.exp(spread * wiggle / math.sqrt(19))
    facts: dict[str, Any] = {
        "figures": {P50: Seen(value, (value / 1.1, value * 1.1), left, 1.0)},
        "operator_share": {"moe": 1.0},
        "errors": {"moe": 0.1, "gemm": 0.2},
        "speed_error": 0.0,
        "bank": 0.0,
        "profile": "p",
        "traffic": "t",
    }
    return Observation(**{**facts, **more})


def verdicts(*runs: Observation | None, name: str = P50) -> list[Verdict | None]:
    entries = [Entry(f"c{i}", () if run is None else (run,), ("too big",)) for i, run in enumerate(runs)]
    return list(compare(entries, [name], [1]).rows[0].verdicts)


def marks(*runs: Observation | None, name: str = P50) -> list[str | None]:
    return [None if verdict is None else verdict.mark for verdict in verdicts(*runs, name=name)]


# ---- --vary


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("topk,random", ["topk", "random"]),
        ("{kind: eplb, num_redundant_experts: 32}, eplb", ["{kind: eplb, num_redundant_experts: 32}", "eplb"]),
        ("[1, [2, 3]],4", ["[1, [2, 3]]", "4"]),
        ('"a,b",c', ['"a,b"', "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("'it''s, so',it's,b", ["'it''s, so'", "it's", "b"]),
        ("{a: 'x,}y', b: 1},2", ["{a: 'x,}y', b: 1}", "2"]),
        ("1", ["1"]),
        ("1,", ["1", ""]),
        ("{a: 1, b", ["{a: 1, b"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_kind_of_a_family_is_short_for_its_policy() -> None:
    texts = ["routing.kind=topk,random", "placement.kind=eplb,contiguous", "balancing.kind=session", "engine.a=1,2"]
    assert [axis.path for axis in parse_axes(texts)] == [
        "policies.routing",
        "policies.placement",
        "policies.balancer",
        "engine.a",
    ]


def test_what_is_wrong_with_vary_is_said_at_once() -> None:
    texts = ["seed=1,2", "parallel.ep", "a=1,,2", "b=1,1", "placement.kind=eplb", "policies.placement=contiguous"]
    with pytest.raises(BadInput) as caught:
        parse_axes(texts)
    assert [p.where for p in caught.value.problems] == [f"--vary {texts[i]}" for i in (0, 1, 2, 3, 5)]


def test_candidates_are_named_by_what_differs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(SCENARIO)
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"

    def labels(files: list[Path], *texts: str) -> list[str]:
        return [c.label for c in load_candidates(files, (), parse_axes(texts), 1)[0]]

    placement = "policies.placement=contiguous,{kind: eplb, num_redundant_experts: 2}"
    assert labels([a, b]) == ["a", "b"]
    assert labels([a], "parallel.ep=1,2", "engine.max_num_seqs=8") == ["1", "2"]
    assert labels([a], placement) == ["contiguous", "eplb, num_redundant_experts: 2"]
    assert labels([a, b], "parallel.ep=2,1", placement)[:3] == [
        "a, ep=2, placement=contiguous",
        "a, ep=2, placement=(eplb, num_redundant_experts: 2)",
        "a, ep=1, placement=contiguous",
    ]


def test_all_run_the_seed_of_the_first(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 9)):
        (tmp_path / f"{name}.yaml").write_text(SCENARIO.replace("seed: 7", f"seed: {seed}"))
    candidates, seeds = load_candidates([tmp_path / "a.yaml", tmp_path / "b.yaml"], (), [], 3)
    assert [c.scenario.seed for c in candidates] == [7, 7]
    assert seeds == [7, 8, 9]


# ---- verdicts


def test_what_is_sure_wins_and_the_rest_ties() -> None:
    assert marks(seen(10.0, 0.01), seen(11.0, 0.01)) == ["best", None]
    # left-out parts move both alike: the ratio is sure although neither figure is
    assert marks(seen(10.0, 0.3), seen(10.1, 0.3)) == ["best", None]
    wiggled = replace(seen(10.0, 0.05), figures={P50: Seen(10.0, None, seen(10.0, -0.05).figures[P50].without_G, 1.0)})
    assert marks(wiggled, seen(10.5, 0.05)) == ["tie", "tie"]
    assert marks(seen(10.0), seen(10.0)) == ["tie", "tie"]
    assert marks(seen(10.0)) == [None]


def test_the_interval_of_a_ratio_is_students() -> None:
    figure = FIGURES[P50]
    got = difference([seen(10.0, 0.05)], [seen(12.0)], figure, 0.9)
    assert got.centre == pytest.approx(math.log(10 / 12))
    assert got.half == pytest.approx(1.7291 * 0.05, rel=1e-4)  # t with 19 degrees of freedom, tables


def test_more_is_better_for_rates_only() -> None:
    def rate(value: float) -> Observation:
        return seen(1.0, figures={"req_per_s": replace(seen(value).figures[P50], slope=-1.0)})

    assert marks(rate(10.0), rate(20.0), name="req_per_s") == [None, "best"]
    got = verdicts(rate(10.0), rate(20.0), name="req_per_s")[0]
    assert got is not None
    assert got.ratio == pytest.approx(0.5)


def test_a_profiles_error_counts_only_where_it_is_not_shared() -> None:
    figure = FIGURES[P50]
    a, b = seen(10.0), seen(11.0, operator_share={"moe": 0.7, "gemm": 0.3})
    assert difference([a], [seen(11.0)], figure, 0.9).half == pytest.approx(0.0)
    assert difference([a], [b], figure, 0.9).half == pytest.approx(Z90 * math.hypot(0.3 * 0.1, 0.3 * 0.2))
    other = seen(11.0, profile="q")
    assert difference([a], [other], figure, 0.9).half == pytest.approx(Z90 * math.hypot(0.1, 0.1))
    fast, slow = (seen(10.0, operator_share={"moe": share}, speed_error=0.2) for share in (1.0, 0.5))
    assert difference([fast], [slow], figure, 0.9).half == pytest.approx(Z90 * math.hypot(0.5 * 0.1, 0.5 * 0.2))


def test_the_banks_error_is_each_candidates_own() -> None:
    got = difference([seen(10.0, bank=0.03)], [seen(11.0, bank=0.04)], FIGURES[P50], 0.9)
    assert got.half == pytest.approx(1.7291 * 0.05, rel=1e-4)


def test_several_seeds_are_judged_by_their_paired_spread() -> None:
    a, b = [10.0, 20.0, 30.0], [10.4, 21.0, 31.8]
    shift = np.log(np.array(a) / np.array(b))
    got = difference([seen(x) for x in a], [seen(x) for x in b], FIGURES[P50], 0.9)
    assert got.centre == pytest.approx(shift.mean())
    assert got.half == pytest.approx(2.91999 * shift.std(ddof=1) / math.sqrt(3), rel=1e-4)  # t with 2, tables
    entries = [Entry("a", tuple(map(seen, a))), Entry("b", tuple(map(seen, b)))]
    row = compare(entries, [P50], [1, 2, 3]).rows[0]
    assert [v.mark for v in row.verdicts if v] == ["best", None]
    assert row.verdicts[0] is not None
    assert row.verdicts[0].value == pytest.approx((10.0 * 20.0 * 30.0) ** (1 / 3))


def test_seeds_that_repeat_one_recorded_traffic_do_not_make_it_longer() -> None:
    def runs(sign: float, *traffic: str) -> list[Observation]:
        return [seen(10.0, 0.05 * sign, traffic=t) for t in traffic]

    one = difference(runs(1, "t"), runs(-1, "t"), FIGURES[P50], 0.9).half
    assert difference(runs(1, "t", "t"), runs(-1, "t", "t"), FIGURES[P50], 0.9).half == pytest.approx(one)
    assert difference(runs(1, "t", "u"), runs(-1, "t", "u"), FIGURES[P50], 0.9).half == pytest.approx(one / 2**0.5)


def test_counted_figures_tie_within_their_resolution() -> None:
    def hbm(gib: float) -> Observation:
        return seen(1.0, figures={"hbm_used_bytes": Seen(gib * 2**30)})

    assert marks(hbm(40.0), hbm(40.05), hbm(41.0), name="hbm_used_bytes") == ["tie", "tie", None]
    drops = [seen(1.0, figures={"dropped_share": Seen(share)}) for share in (0.0, 0.0, 0.02)]
    assert marks(*drops, name="dropped_share") == ["tie", "tie", None]


def test_what_does_not_fit_or_has_no_such_figure_is_not_judged() -> None:
    assert marks(None, seen(10.0), seen(12.0), seen(1.0, figures={})) == [None, "best", None, None]
    report = compare([Entry("a", (), ("too big", "by far")), Entry("b", (seen(1.0),))], [P50], [1])
    assert report.feasible
    told = report.to_json()["candidates"]
    assert (told[0]["feasible"], told[0]["reasons"], told[0]["figures"]) == (False, ["too big", "by far"], None)
    assert [c["label"] for c in told] == ["a", "b"]
    assert not compare([Entry("a", (), ("x",)), Entry("b", (), ("x",))], [P50], [1]).feasible
    assert compare([Entry("a", (seen(1.0),))], ["dropped_share"], [1]).rows == ()


def test_too_few_requests_tie() -> None:
    short = [seen(v, figures={P50: Seen(v, None, np.zeros(0), 1.0)}) for v in (1.0, 100.0)]
    assert marks(*short) == ["tie", "tie"]
    json.dumps(compare([Entry("a", (short[0],)), Entry("b", (short[1],))], [P50], [1]).to_json(), allow_nan=False)


@pytest.mark.parametrize(("count", "figure"), [(2, "mean"), (2, "p50"), (5, "mean")])
def test_chance_makes_a_winner_no_more_often_than_promised(count: int, figure: str) -> None:
    """Candidates of equal worth that share their traffic: in 400 comparisons the 90 % rule holds, and a real difference
    of five standard errors is found."""
    rng = np.random.default_rng(11)
    requests, trials = 400, 400
    part = np.arange(requests) * 20 // requests
    statistic = latency_figures()[figure]
    false_win = excluded = found = 0
    for _ in range(trials):
        common = rng.exponential(1.0, requests)
        runs = []
        for _ in range(count):
            values = common * rng.lognormal(0.0, 0.5, requests)
            left = leave_out(values, part, 20, statistic)
            runs.append(seen(1.0, figures={P50: Seen(statistic(np.sort(values)), None, left, 1.0)}))
        got = marks(*runs)
        false_win += "best" in got
        excluded += got[0] is None
        # the first made truly better, by about five standard errors of the ratio of two
        better = Seen(
            *(x * 0.8 for x in (runs[0].figures[P50].value,)), None, 0.8 * runs[0].figures[P50].without_G, 1.0
        )
        found += marks(replace(runs[0], figures={P50: better}), *runs[1:])[0] is not None
    # binomial(400, 0.1): 99.9 % of the mass lies below 60
    assert false_win < 60
    assert excluded < 60
    assert found == trials


def test_left_out_rates_know_that_only_the_end_differs() -> None:
    """Equal but for the last request's end: left-out stretches spread as wide as the difference."""

    def records(extra: int) -> RequestRecords:
        arrival = np.arange(400, dtype=np.int64) * 10**7
        finish = arrival + 10**7
        finish[-1] += extra
        ones = np.ones(400, np.int64)
        return RequestRecords(arrival, finish, finish, ones, 5 * ones, ones, 0 * ones)

    runs = []
    for extra in (0, 10**8):
        r = records(extra)
        value = 400 / (int(r.finish_ns.max()) / 1e9)
        left = without_rates(r)["req_per_s"]
        runs.append(seen(1.0, figures={"req_per_s": Seen(value, None, left, -1.0)}))
    assert marks(*runs, name="req_per_s") == ["tie", "tie"]
    assert marks(runs[0], replace(runs[0]), name="req_per_s") == ["tie", "tie"]


@pytest.mark.parametrize("fidelity", ["count", "token"])
def test_an_observation_is_the_runs_own_figures(fidelity: str, tmp_path: Path) -> None:
    result = simulate(scenario(tmp_path, parallel={"dp": 4, "ep": 4}, routing={"fidelity": fidelity}))
    summary, got = result.to_json()["summary"], observe(result)
    assert got.figures["ttft_p99_ms"].value == summary["ttft_ms"]["p99"]
    assert got.figures["hbm_used_bytes"].value == summary["memory"]["hbm"]["used"]
    assert "dropped_share" not in got.figures  # no capacity, so no share
    for seen_ in got.figures.values():
        if seen_.without_G is not None:
            assert 0.5 < seen_.without_G.mean() / seen_.value < 2.0
    assert result.outcome is not None
    sums = stats_by_draw(result.outcome.runs, result.pricers[0])
    assert sums is not None
    assert result.explanation is not None
    assert sums[0].sum(axis=1) == pytest.approx(result.explanation.stats)
    assert sums[0][2].sum() / sums[1].sum() == pytest.approx(summary["balance"]["max_over_mean_load"])
    assert int(sums[1].sum()) == summary["steps"]


def test_unknown_figures_are_refused_with_the_nearest() -> None:
    assert chosen_figures(["ttft_p50_ms,req_per_s", "req_per_s"]) == ["ttft_p50_ms", "req_per_s"]
    with pytest.raises(BadInput, match="Did you mean 'max_over_mean_load'") as caught:
        chosen_figures(["max_over_mean", "x"])
    assert len(caught.value.problems) == 2


# ---- the verb


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "s.yaml").write_text(SCENARIO.replace("num_requests: 6", "num_requests: 50"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *arguments])
        code = ended.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call


TOO_BIG = "engine.runtime_memory_gib=1,500"


def test_a_table_of_80_columns_and_nothing_on_disk(run: Run, tmp_path: Path) -> None:
    ran = run("s.yaml", "--vary", "placement.kind=contiguous,round_robin,{kind: eplb, num_redundant_experts: 2}")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    for text in ("contiguous", "num_redundant_experts: 2", "TTFT p99, ms", "* best, = tie: the 95% interval"):
        assert text in ran.out
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def test_many_candidates_stand_below_each_other(run: Run) -> None:
    ran = run("s.yaml", "--vary", "engine.max_num_seqs=2,3,4,5,6,7,8", "--metric", "ttft_p50_ms,req_per_s")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    assert sum(line.startswith(f"  {i}  ") for i in range(2, 9) for line in ran.out.splitlines()) == 7


def test_json_and_results_are_kept_where_asked(run: Run, tmp_path: Path) -> None:
    ran = run("s.yaml", "--vary", "parallel.ep=1,2", "--vary", TOO_BIG, "--seeds", "2", "--json", "--out", "o")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert (report["schema_version"], report["seeds"]) == (1, [7, 8])
    assert [c["feasible"] for c in report["candidates"]] == [True, False, True, False]
    assert report["candidates"][0]["varied"] == {"parallel.ep": "1", "engine.runtime_memory_gib": "1"}
    assert "500 " not in report["candidates"][1]["reasons"][0][:10]
    kept = {p.name for p in (tmp_path / "o").iterdir()}
    assert "comparison.json" in kept
    assert f"small-{report['candidates'][0]['scenario_hash']}" in kept
    assert len(kept) == 5  # two that fit, two seeds each
    assert json.loads((tmp_path / "o" / "comparison.json").read_text()) == report
    scenario_of = load_scenario("s.yaml", ["parallel.ep=1"])
    single = simulate(scenario_of).to_json()["summary"]
    one = json.loads(run("s.yaml", "--vary", "parallel.ep=1,2", "--json").out)["candidates"][0]["figures"]
    assert one["ttft_p50_ms"]["value"] == single["ttft_ms"]["p50"]
    assert one["ttft_p50_ms"]["interval90"] == single["ttft_ms"]["interval90"]["p50"]


def test_nothing_fits_is_exit_code_3(run: Run) -> None:
    ran = run("s.yaml", "--vary", "engine.runtime_memory_gib=400,500", "--plot", "x.png")
    assert ran.code == 3
    assert "Does not fit" in ran.out
    assert "2 candidates, 0 of them fit" in ran.out


def test_bad_input_of_all_files_and_values_is_said_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(SCENARIO.replace("seed: 7", "seeed: 7"))
    ran = run("s.yaml", "t.yaml", "none.yaml", "--vary", "parallel.ep=3,2", "--vary", "policies.plcement=eplb,first")
    assert (ran.code, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert lines[0].startswith("error: --vary parallel.ep=3: parallel.ep must divide")
    assert [line for line in lines if "plcement" in line] == [
        "error: --vary policies.plcement: policies.plcement: unknown key 'plcement'. Did you mean 'placement'? "
        "Known: balancer, batching, dispatch, eviction, offload, placement, precision, prefetch, rebatching, "
        "rerouting, routing."
    ]
    assert any(line.startswith("error: t.yaml:2:1: seeed") for line in lines)
    assert any(line.startswith("error: none.yaml: no such file") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["s.yaml"], "takes 2 to 200 candidates, got 1"),
        (["s.yaml", "./s.yaml"], "named twice"),
        (["s.yaml", "--vary", "parallel.ep=1,2", "--plot", "x.gif"], "must end in .png, .svg or .pdf"),
        (["s.yaml", "--vary", "parallel.ep=1,2", "--plot", "no/x.png"], "there is no folder no"),
        (["s.yaml", "--vary", "parallel.ep=1,2", "--metric", "speed"], "unknown figure 'speed'"),
        (["s.yaml", "--vary", "parallel.ep=1,2", "--out", "s.yaml/x"], "cannot be written"),
        (["s.yaml", "--vary", "engine.max_model_len=2,100"], "s.yaml, engine.max_model_len=2: requests: every"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], told: str, run: Run, tmp_path: Path) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert told in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def test_a_picture_is_written_and_matplotlib_is_asked_for_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["s.yaml", "--vary", "parallel.ep=1,2", "--metric", "ttft_p50_ms", "--plot", "x.png"]
    ran = run(*arguments)
    assert ran.code == 0
    assert ran.out.endswith("plot: x.png\n")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err == "error: --plot: matplotlib is not installed. Run: pip install 'moesim[plot]'\n"
