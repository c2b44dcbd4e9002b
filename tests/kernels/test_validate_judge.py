"""Judging, on measurements made up so that the answer is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_kernels.validate.again import agreement
from moesim_kernels.validate.judge import judge, measured_of
from moesim_kernels.validate.noise import at_speed, levels, median_half_width
from moesim_kernels.validate.predict import Predicted, Predictions
from moesim_kernels.validate.ranking import best_recall, pairs_by_gap, regret, tau_b, tied_NN, top_quartile
from moesim_kernels.validate.record import Record, Sample, read_record
from moesim_kernels.validate.tables import tables
from moesim_kernels.validate.verdict import verdict
from moesim_kernels.validate.wrong import PartTimes, blame, findings
from scipy.stats import kendalltau

from moesim.errors import BadInput

MEAN = {"moe": 0.6, "gemm": 0.3, "elementwise": 0.1}


def _predictions(count: int = 44, error: float = 0.03, speed: float = 0.01, seed: int = 0) -> Predictions:
    """Steps of 1 to 100 ms whose parts are experts (moe), own (gemm and elementwise) and head (gemm)."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(count):
        total = float(np.exp(rng.uniform(np.log(1e6), np.log(1e8))))
        share = rng.dirichlet([6.0, 2.5, 0.7, 1.5])
        ns = {k: round(total * s) for k, s in zip(("experts", "router", "norm", "lm_head"), share, strict=True)}
        operator = {"experts": "moe", "router": "gemm", "norm": "elementwise", "lm_head": "gemm"}
        part = {"experts": ns["experts"], "own": ns["router"] + ns["norm"], "head": ns["lm_head"]}
        whole = sum(ns.values())
        by_op = {"moe": share[0], "gemm": share[1] + share[3], "elementwise": share[2]}
        sigma = np.sqrt(sum((s * error) ** 2 for s in by_op.values()) + speed**2)
        one = 1.645 * float(np.hypot(error, speed))
        out.append(
            Predicted(
                f"s{n}",
                ("decode", "prompt", "mixed", "decode")[n % 4],
                (),
                1 + n,
                10,
                whole,
                ns,
                operator,
                part,
                1.645 * float(sigma),
                dict.fromkeys(part, one),
                (0.0, 1.0, 0.0, 0.0),
                dict.fromkeys(part, (0.0, 1.0, 0.0, 0.0)),
                whole * 0.6,
            )
        )
    facts = {
        "device": "cpu", "ranks": 1, "held_out": [p.name for p in out], "layers": 4,
        "profile": {"speed_error": speed, "errors": {}, "reference_ns": 1e6, "made_on": "a CPU"},
    }  # fmt: skip
    return Predictions(tuple(out), facts)


def _record(
    predictions: Predictions,
    factor: dict[str, float] | None = None,
    noise: float = 0.01,
    own_error: float = 0.02,
    rounds: int = 9,
    psi: float = 2.0,
    seed: int = 1,
    wall: float = 1.0,
) -> Record:
    """What would be measured where operators take `factor` of what is predicted, each setting is off by `own_error` and
    each sample by `noise`."""
    rng = np.random.default_rng(seed)
    factor = factor or {}
    scale = {p.name: float(np.exp(rng.normal(0, own_error))) for p in predictions.settings}
    samples = []
    for r in range(rounds):
        for n in rng.permutation(len(predictions.settings)).tolist():
            p = predictions.settings[n]
            jitter = scale[p.name] * float(np.exp(rng.normal(0, noise)))
            by_name = {name: ns * factor.get(p.operator[name], 1.0) * jitter for name, ns in p.operation_ns.items()}
            parts = {
                "experts": by_name["experts"],
                "own": by_name["router"] + by_name["norm"],
                "head": by_name["lm_head"],
            }
            cpu = sum(by_name.values())
            times = {k: v * wall for k, v in parts.items()}
            samples.append(Sample(p.name, r, cpu * wall, cpu, parts, times, psi, 1e6))
    return Record("seal", 1, {"device": "cpu", "cpu": "a CPU"}, samples)


def _whole(predictions: Predictions, record: Record) -> dict[str, Any]:
    """The report as the tables want it."""
    report = {**judge(predictions, record), "candidates": None, "served": None, "again": [], "notes": []}
    return {"verdict": verdict(report), **report}


# ---- ranking


def test_tau_b_is_scipys_and_brute_forces_where_pairs_are_left_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12).astype(float), rng.integers(1, 6, 12).astype(float)
        assert tau_b(a, b) == pytest.approx(kendalltau(a, b).statistic)
        tied = rng.random((12, 12)) < 0.3
        tied |= tied.T
        right = wrong = in_a = in_b = 0
        for i, j in itertools.combinations(range(12), 2):
            if tied[i, j]:
                continue
            sign = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
            right, wrong = right + (sign > 0), wrong + (sign < 0)
            in_a, in_b = in_a + (a[i] != a[j]), in_b + (b[i] != b[j])
        assert tau_b(a, b, tied) == pytest.approx((right - wrong) / np.sqrt(in_a * in_b))
    assert np.isnan(tau_b([1.0, 1.0], [1.0, 2.0]))


def test_the_tie_band_is_twice_the_half_width_of_the_ratio() -> None:
    ns = np.array([100.0, 104.0, 130.0])
    half = np.array([0.015, 0.015, 0.0])
    # 2 sqrt(2) 0.015 = 0.0424 > ln 1.04; ln 1.3 is far beyond 0.03
    assert tied_NN(ns, half).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    predicted = [104.0, 100.0, 130.0]
    assert tau_b(predicted, ns) == pytest.approx(1 / 3)
    assert tau_b(predicted, ns, tied_NN(ns, half)) == 1.0


def test_pairs_are_counted_by_their_true_gap() -> None:
    measured = np.array([100.0, 103.0, 110.0])  # gaps 3 %, 10 %, 6.8 %
    gaps = pairs_by_gap([2.0, 1.0, 3.0], measured)
    assert [(g.pairs, g.right) for g in gaps] == [(1, 0), (1, 1), (1, 1)]
    assert gaps[0].to_json() == {"low": 0.02, "high": 0.05, "pairs": 1, "right": 0, "share": 0.0}
    assert pairs_by_gap([1.0, 1.0, 3.0], measured)[0].right == 0, "equal is not in order"


def test_recall_and_regret_of_picks() -> None:
    measured = np.array([10.0, 11.0, 12.0, 13.0, 20.0])
    assert best_recall([1, 2, 3, 4, 5], measured) == 1.0
    assert best_recall([5, 4, 3, 2, 1], measured) == pytest.approx(1 / 3)
    tied = np.zeros((5, 5), bool)
    tied[2, 3] = tied[3, 2] = True
    assert best_recall([5, 4, 3, 2, 1], measured, tied) == pytest.approx(2 / 3)
    assert regret(measured, 0) == 0.0
    assert regret(measured, 4) == 1.0
    assert regret(measured, None) == pytest.approx(13.2 / 10 - 1)
    assert top_quartile(np.arange(20)[::-1]).tolist() == [19, 18, 17, 16, 15]
    assert top_quartile(np.array([3.0, 1.0, 2.0, 4.0])).tolist() == [1, 2, 0]


# ---- noise


def test_levels_are_medians_without_the_drift_that_all_settings_share() -> None:
    rng = np.random.default_rng(3)
    true = np.exp(rng.uniform(0, 3, 20)) * 1e6
    at = np.concatenate([rng.permutation(20) for _ in range(15)])
    drift = 1.0 + 0.3 * (np.arange(len(at)) > len(at) * 0.6)
    ns = true[at] * drift * np.exp(rng.normal(0, 0.005, len(at)))
    found = levels(ns, at, 20, True)
    assert np.abs(np.log(found.ns_N / true)).max() < 0.01
    assert found.drift_M[-1] / found.drift_M[0] == pytest.approx(1.3, rel=0.02)
    assert found.rounds_N.tolist() == [15] * 20
    plain = levels(ns, at, 20, False)
    assert (plain.drift_M == 1).all()
    assert plain.half_width_N.max() > 0.1


def test_the_half_width_of_a_median_covers_what_it_says() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(300):
        sample = np.exp(rng.normal(0, 0.1, 15))
        half = median_half_width(sample, np.random.default_rng(trial))
        inside += abs(np.log(np.median(sample))) <= half
    assert 0.82 <= inside / 300 <= 0.97
    assert median_half_width([1.0, 2.0], rng) == float("inf")


# ---- the report


def test_errors_by_hand() -> None:
    p = _predictions(8)
    record = _record(p, noise=0.0, own_error=0.0, rounds=3)
    for s in record.samples:
        off = 1.10 if int(s.setting[1:]) % 2 else 0.96
        object.__setattr__(s, "wall_ns", s.wall_ns * off)
    report = judge(p, record)
    # predicted / measured - 1: -0.0909 for half of them, +0.0417 for the others
    assert report["clock"] == "wall"
    assert report["step"]["median"] == pytest.approx((1 / 0.96 - 1 + 1 - 1 / 1.1) / 2, abs=1e-4)
    assert report["step"]["p90"] == pytest.approx(1 - 1 / 1.1, abs=1e-4)
    assert report["step"]["bias"] == pytest.approx((1 / 0.96 - 1 - (1 - 1 / 1.1)) / 2, abs=1e-4)
    assert report["settings"] == {"measured": 8, "predicted": 8, "rounds": [3, 3]}
    assert all(not b["binds"] and b["why_not"] == "fewer than 40 settings" for b in report["bounds"])


def test_an_honest_profile_is_within_bounds_and_its_intervals_hold() -> None:
    for seed in range(6):
        p = _predictions(seed=seed)
        report = _whole(p, _record(p, seed=seed))
        assert report["wrong"] == []
        assert report["verdict"]["state"] == "within"
        assert report["verdict"]["exit_code"] == 0
        assert all(b["met"] and b["binds"] for b in report["bounds"])
        assert report["ranking"]["tau"] > 0.97
        # the roofline is 0.6 of the truth
        assert report["baselines"]["roofline"]["median"] == pytest.approx(0.4, abs=0.02)
        low, high = report["coverage"]["clopper_pearson_95"]
        assert low <= report["coverage"]["inside"] / 44 <= high


@pytest.mark.parametrize(("operator", "part"), [("gemm", "own"), ("gemm", "head"), ("moe", "experts")])
def test_an_operator_that_takes_twice_what_the_profile_says_is_named(operator: str, part: str) -> None:
    p = _predictions()
    report = _whole(p, _record(p, {operator: 2.0}))
    found = {f["part"]: f for f in report["wrong"]}
    assert found[part]["operator"] == operator
    assert found[part]["operator_factor"] == pytest.approx(2.0, rel=0.05)
    assert {f["operator"] for f in report["wrong"]} == {operator}
    assert report["verdict"]["state"] == "wrong profile"
    assert report["verdict"]["exit_code"] == 4
    assert f"{operator} takes" in report["verdict"]["sentence"]
    assert any("Measured over predicted" in t.title for t in tables(report))


def test_an_operator_that_is_faster_than_the_profile_says_is_named_too() -> None:
    p = _predictions()
    report = _whole(p, _record(p, {"moe": 0.5}))
    first = report["wrong"][0]
    assert (first["operator"], first["part"]) == ("moe", "experts")
    assert first["factor"] == pytest.approx(0.5, rel=0.05)


def test_what_the_profile_itself_allows_for_is_no_finding() -> None:
    p = _predictions(error=0.10, speed=0.05)
    assert _whole(p, _record(p, {"moe": 1.2}))["wrong"] == []  # two of its sigmas
    assert _whole(p, _record(p, {"moe": 1.6}))["wrong"] != []
    firm = _predictions(error=0.03, speed=0.01)
    assert _whole(firm, _record(firm, {"moe": 1.2}))["wrong"] != []
    firm.facts["profile"]["reference_ns"] = 1.15e6  # the machine was seen to change its speed: one more sigma, 0.14
    assert _whole(firm, _record(firm, {"moe": 1.2}))["wrong"] == []
    assert _whole(firm, _record(firm, {"moe": 2.0}))["wrong"] != []
    firm.facts["profile"]["made_on"] = "another CPU"  # which excuses nothing
    assert _whole(firm, _record(firm, {"moe": 1.2}))["wrong"] != []


def test_a_small_part_that_is_off_is_no_wrong_profile() -> None:
    rng = np.random.default_rng(0)
    predicted = np.exp(rng.normal(0, 1, 20)) * 1e4
    part = PartTimes(
        "embedding", predicted, predicted * 3, np.full(20, 0.05), np.full(20, 0.01), ["decode"] * 20,
        {"elementwise": predicted},
    )  # fmt: skip
    assert findings([part]) == []
    part = PartTimes("own", predicted, predicted * 3, np.full(20, 0.05), np.full(20, 0.3), ["decode"] * 20,
                     {"elementwise": predicted})  # fmt: skip
    assert findings([part])[0].factor == pytest.approx(3.0)
    few = PartTimes("own", predicted[:4], predicted[:4] * 3, np.full(4, 0.05), np.full(4, 0.3), ["decode"] * 4,
                    {"elementwise": predicted[:4]})  # fmt: skip
    assert findings([few]) == []


def test_blame_falls_on_the_operator_that_explains_the_part() -> None:
    rng = np.random.default_rng(1)
    gemm, rest = rng.uniform(1, 9, 30), rng.uniform(1, 3, 30)
    part = PartTimes("own", gemm + rest, gemm + 2.5 * rest, np.full(30, 0.05), np.full(30, 0.3), ["decode"] * 30,
                     {"gemm": gemm, "elementwise": rest})  # fmt: skip
    operator, factor = blame(part, np.ones(30, bool))
    assert operator == "elementwise"
    assert factor == pytest.approx(2.5)


def test_bounds_bind_on_a_quiet_machine_alone_and_a_miss_then_costs_the_exit_code() -> None:
    p = _predictions(error=0.15, speed=0.05)
    missed = _whole(p, _record(p, own_error=0.12))
    assert missed["verdict"]["state"] == "missed"
    assert missed["verdict"]["exit_code"] == 4
    assert "step time, median error" in missed["verdict"]["sentence"]
    busy = _whole(p, _record(p, own_error=0.12, psi=80.0, wall=1.7))
    assert busy["clock"] == "thread CPU"
    assert busy["verdict"]["state"] == "contended"
    assert busy["verdict"]["exit_code"] == 0
    # thread-CPU time is what is judged: the wall is 1.7 times as long
    assert busy["step"]["by_kind"]["decode"] == pytest.approx(missed["step"]["by_kind"]["decode"])
    assert busy["parts"][0]["median"] == pytest.approx(missed["parts"][0]["median"])
    loud = _whole(p, _record(p, own_error=0.0, noise=0.12))
    assert not loud["noise"]["quiet"]
    assert loud["verdict"]["state"] == "contended"


def test_a_machine_that_has_changed_its_speed_since_it_was_calibrated_is_said_to_have() -> None:
    p = _predictions(error=0.15, speed=0.05)
    p.facts["profile"]["reference_ns"] = 1.02e6  # within half of the median's bound
    steady = _whole(p, _record(p, own_error=0.12))["verdict"]
    assert steady["state"] == "missed"
    assert "speed" not in steady["sentence"]
    p.facts["profile"]["reference_ns"] = 1.4e6
    report = _whole(p, _record(p, own_error=0.12))
    assert report["clock"] == "wall"
    assert report["verdict"]["state"] == "missed"
    assert report["verdict"]["exit_code"] == 4
    assert "takes x 0.71; calibrate again" in report["verdict"]["sentence"]


def test_intervals_that_are_too_narrow_or_too_wide_are_said_to_be() -> None:
    narrow = _predictions(error=0.005, speed=0.001)
    report = _whole(narrow, _record(narrow, own_error=0.025))
    assert report["coverage"]["state"] == "too narrow"
    assert report["verdict"]["exit_code"] == 4
    assert "too narrow" in report["verdict"]["sentence"]
    wide = _predictions(error=0.2, speed=0.2)
    report = _whole(wide, _record(wide))
    assert report["coverage"]["state"] == "too wide"
    assert report["verdict"]["exit_code"] == 0


def test_the_worst_error_is_explained_by_the_part_that_has_it() -> None:
    p = _predictions(20)
    record = _record(p, noise=0.0, own_error=0.0, rounds=3)
    for s in record.samples:
        if s.setting == "s7":
            more = {**s.part_wall_ns, "head": s.part_wall_ns["head"] + s.wall_ns}
            object.__setattr__(s, "part_wall_ns", more)
            object.__setattr__(s, "wall_ns", 2 * s.wall_ns)
    worst = judge(p, record)["worst"]
    assert worst["setting"] == "s7"
    assert worst["error"] == pytest.approx(-0.5, abs=1e-3)
    assert (worst["part"], worst["operators"], worst["explains"]) == ("head", ["gemm"], pytest.approx(1.0, abs=1e-3))
    assert worst["grade"] == {"interpolated": 1.0}


def test_strangers_and_an_empty_record_are_refused() -> None:
    p = _predictions(8)
    record = _record(p, rounds=1)
    record.samples.append(Sample("who", 0, 1.0, 1.0, {}, {}, None, None))
    with pytest.raises(BadInput, match="nothing was predicted for who"):
        judge(p, record)
    with pytest.raises(BadInput, match="no setting has been measured"):
        judge(p, Record("seal", 1, {}))


def test_settings_without_samples_are_counted_and_the_rest_judged() -> None:
    p = _predictions(12)
    record = _record(p)
    record.samples[:] = [s for s in record.samples if s.setting != "s3"]
    report = judge(p, record)
    assert report["settings"]["measured"] == 11
    assert report["settings"]["predicted"] == 12


def test_two_measurements_agree_or_do_not() -> None:
    p = _predictions()
    first = measured_of(p, _record(p, seed=1, own_error=0.0))
    second = measured_of(p, _record(p, seed=2, own_error=0.0))
    same = agreement(first, second, 0.01)
    assert same["agree"]
    assert abs(same["shift"]) < 0.01
    slower = measured_of(p, _record(p, dict.fromkeys(MEAN, 1.15), seed=2, own_error=0.0))
    other = agreement(first, slower, 0.01)
    assert not other["agree"]
    assert other["shift"] == pytest.approx(0.15, abs=0.01)


# ---- the record


def _lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


HEAD = {"schema": 1, "seal": "abc", "ranks": 1, "machine": {"device": "cpu"}}
LINE = {"setting": "s", "round": 0, "wall_ns": 5.0, "cpu_ns": 4, "part_ns": {"own": 3}, "psi": None, "reference_ns": 7}


def test_a_record_of_other_predictions_is_refused(tmp_path: Path) -> None:
    path = _lines(tmp_path / "r.jsonl", HEAD, LINE)
    assert read_record(path, "abc").samples[0].part_ns == {"own": 3.0}
    with pytest.raises(BadInput, match="written or changed after it was begun"):
        read_record(path, "abd")


def test_a_torn_last_line_is_ignored_and_any_other_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = _lines(tmp_path / "r.jsonl", HEAD, LINE, {"note": "cannot run", "about": "t"}, {"end": {}})
    with path.open("a") as file:
        file.write('{"setting": "s", "rou')
    record = read_record(path)
    assert len(record.samples) == 1
    assert record.refused == {"t": "cannot run"}
    with path.open("a") as file:
        file.write("nd\n")
    with pytest.raises(BadInput, match="jsonl:5"):
        read_record(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**LINE, "wall_ns": 0}, "wall_ns must be a number above 0"),
        ({**LINE, "cpu_ns": -1}, "cpu_ns"),
        ({**LINE, "cpu_ns": True}, "cpu_ns"),
        ({**LINE, "round": "1"}, "its round"),
        ({**LINE, "part_ns": [1]}, "part_ns"),
        ([1], "an object"),
    ],
)
def test_what_is_no_sample_is_refused(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_record(_lines(tmp_path / "r.jsonl", HEAD, line))


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    for head in ({}, {**HEAD, "schema": 2}, {**HEAD, "ranks": 0}, {**HEAD, "machine": 1}):
        with pytest.raises(BadInput):
            read_record(_lines(tmp_path / "r.jsonl", head))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match="no whole first line"):
        read_record(tmp_path / "empty.jsonl")


def test_times_are_told_at_the_speed_at_which_the_machine_was_calibrated() -> None:
    """A machine that is half as fast again for two rounds of three: by its reference, the slow rounds are like the
    calibration, so all times are theirs."""
    rng = np.random.default_rng(5)
    level_N = np.exp(rng.uniform(0, 2, 30)) * 1e6
    fast_R = np.repeat([False, True, True, False, True, True, False, True, True], 30)
    at = np.tile(np.arange(30), 9)
    ns = level_N[at] * np.where(fast_R, 0.8, 1.0) * np.exp(rng.normal(0, 0.002, 270))
    reference = [700.0 if fast else 1010.0 for fast in fast_R]
    plain = levels(ns, at, 30, True).ns_N / level_N
    assert np.median(plain) == pytest.approx(0.8, rel=0.02)
    same = at_speed(reference, 1000.0)
    assert same is not None
    assert same.mean() == pytest.approx(1 / 3)
    told = levels(ns, at, 30, True, same).ns_N / level_N
    assert np.median(told) == pytest.approx(1.0, rel=0.01)
    assert np.abs(told - 1).max() < 0.06
    # a calibration at a speed that was never seen, or none that is known: nothing is changed
    assert at_speed(reference, 3000.0) is None
    assert at_speed(reference, None) is None
    assert at_speed([None, *reference[1:]], 1000.0) is None
