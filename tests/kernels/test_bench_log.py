"""The log of a run: read whole, torn at the end without loss, and a wrong line named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.bench.drift import drift_factors, usual_reference_ns
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.log import LogWriter, Samples, begun_for, forget, read_log, read_points, speed_error
from moesim_kernels.bench.plan import Case, Plan

PLAN = Plan("cpu", tuple(Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in (1, 2, 3)))
IDS = [case.id for case in PLAN.cases]
MACHINE = {"device": "cpu", "cpu": "one", "torch": "2", "threads": 1, "kernel": "k"}


def write(path: Path, lines: int = 6) -> bytes:
    """A log of `lines` samples: 100, 110, 120, ... ns, the reference rising along."""
    log = LogWriter(path, PLAN, MACHINE)
    for i in range(lines):
        ns = 100.0 + 10 * i
        log.samples(Samples(IDS[i % 2], i // 2, (ns,), (2 * ns,), 1.5, 10.0 + i))
    log.text("remark", IDS[0], "timed eagerly")
    log.text("refused", IDS[2], "no memory")
    log.end({"stopped": "budget"})
    log.close()
    return path.read_bytes()


def test_reads_what_was_written(tmp_path: Path):
    write(tmp_path / "log")
    record = read_log(tmp_path / "log", PLAN)
    assert record.counts() == {IDS[0]: 3, IDS[1]: 3}
    assert record.remarks == {IDS[0]: "timed eagerly"}
    assert record.refused == {IDS[2]: "no memory"}
    assert record.ends == [{"stopped": "budget"}]
    assert record.machine == MACHINE


def test_points_are_quartiles_in_the_plans_order(tmp_path: Path):
    write(tmp_path / "log")
    first, second = read_points(PLAN, tmp_path / "log")
    assert [first.case, second.case] == list(PLAN.cases[:2])
    assert (first.ns_p25, first.ns_median, first.ns_p75) == (110.0, 120.0, 130.0)  # of 100, 120, 140
    assert (first.samples, first.wall_ns_median, first.psi) == (3, 240.0, 1.5)
    assert first.drift == pytest.approx(13.6 / 10.4)  # 90th over 10th percentile of 10, 12, 14


def test_normalised_points_follow_the_reference(tmp_path: Path):
    path = tmp_path / "log"
    log = LogWriter(path, PLAN, MACHINE)
    for slow in (1.0, 1.0, 2.0, 1.0, 2.0):  # a machine that runs at half speed now and then
        log.samples(Samples(IDS[0], 0, (100.0 * slow,), (100.0 * slow,), None, 50.0 * slow))
    log.close()
    (plain,), (normal,) = read_points(PLAN, path), read_points(PLAN, path, normalise="reference")
    assert (plain.ns_p25, plain.ns_median, plain.ns_p75) == (100.0, 100.0, 200.0)
    assert (normal.ns_p25, normal.ns_median, normal.ns_p75) == (100.0, 100.0, 100.0)
    assert plain.psi is None


@given(st.data())
def test_truncated_anywhere_no_whole_line_is_lost(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("log") / "log"
    whole = write(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    if kept == 0:
        with pytest.raises(BadPlan, match="no whole first line"):
            read_log(path, PLAN)
    else:
        assert len(read_log(path, PLAN).lines) == min(kept - 1, 6)
    log = LogWriter(path, PLAN, MACHINE)  # a resumed run appends after the last whole line
    log.samples(Samples(IDS[2], 9, (7.0,), (7.0,), None, None))
    log.close()
    again = read_log(path, PLAN)
    assert again.counts().pop(IDS[2]) == 1
    assert len(again.lines) == min(max(kept - 1, 0), 6) + 1
    if kept:
        assert path.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1])


@given(st.data())
def test_garbled_line_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("log") / "log"
    lines = write(path).splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    garbage = data.draw(
        st.binary(max_size=40).filter(lambda x: b"\n" not in x)
        | st.integers(0, len(lines[at]) - 1).map(lambda cut: lines[at][:cut])
        | st.sampled_from([b"{}", b"[]", b"null", b'{"id": 1}', b"\xff" * 9, b"[" * 90_000, lines[at] + lines[at]])
    )
    lines[at] = garbage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(BadPlan) as caught:
        read_log(path, PLAN)
    assert caught.value.where == f"{path}:{at + 1}"


GOOD: dict[str, Any] = {"id": IDS[0], "round": 0, "ns": [1.0], "wall_ns": [1.0], "psi": None, "reference_ns": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ns": []}, "ns must be a list of times"),
        ({"ns": [0]}, "ns must be a list of times"),
        ({"ns": [-1.0]}, "ns must be a list of times"),
        ({"ns": [1e15]}, "ns must be a list of times"),
        ({"ns": [True]}, "ns must be a list of times"),
        ({"ns": "1"}, "ns must be a list of times"),
        ({"ns": [1, 2]}, "equally long; got 2 and 1"),
        ({"psi": 101}, "psi must be null or a number from 0 to 100"),
        ({"reference_ns": -1}, "reference_ns must be null or"),
        ({"round": -1}, "round must be"),
        ({"round": 0.0}, "round must be"),
        ({"id": "feedfacefeedface"}, "no case of the plan has the id"),
        ({"id": 7}, "id must be a text"),
        ({"more": 1}, "a line with the keys"),
    ],
)
def test_wrong_value_is_named_with_its_line(change: dict[str, Any], said: str, tmp_path: Path):
    path = tmp_path / "log"
    LogWriter(path, PLAN, MACHINE).close()
    with path.open("a") as file:
        file.write(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(BadPlan, match=said) as caught:
        read_points(PLAN, path)
    assert caught.value.where == f"{path}:3"


def test_facts_that_a_fit_reads_are_checked(tmp_path: Path):
    for key, value in (("cpus", "many"), ("gpus", -1), ("device", 3)):
        write(tmp_path / key)
        lines = (tmp_path / key).read_text().splitlines(keepends=True)
        head = json.loads(lines[0])
        head["machine"][key] = value
        (tmp_path / key).write_text(json.dumps(head) + "\n" + "".join(lines[1:]))
        with pytest.raises(BadPlan, match=f"{key}:1: machine.{key} must be"):
            read_log(tmp_path / key)


def test_log_of_another_plan_or_machine_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "log"
    before = write(path)
    with pytest.raises(BadPlan, match="belongs to plan"):
        LogWriter(path, Plan("cpu", PLAN.cases[:2]), MACHINE)
    with pytest.raises(BadPlan, match="begun with torch = '2', now it is '3'"):
        LogWriter(path, PLAN, MACHINE | {"torch": "3"})
    with pytest.raises(BadPlan, match="belongs to plan"):
        read_points(Plan("cpu", PLAN.cases[:2]), path)
    assert path.read_bytes() == before


def test_file_that_is_no_log_is_not_overwritten(tmp_path: Path):
    path = tmp_path / "thesis.tex"
    path.write_text("no newline here")
    with pytest.raises(BadPlan, match="will not be overwritten"):
        LogWriter(path, PLAN, MACHINE)
    assert path.read_text() == "no newline here"


def test_two_runs_do_not_write_one_log(tmp_path: Path):
    first = LogWriter(tmp_path / "log", PLAN, MACHINE)
    with pytest.raises(BadPlan, match="another run writes this log"):
        LogWriter(tmp_path / "log", PLAN, MACHINE)
    first.close()
    LogWriter(tmp_path / "log", PLAN, MACHINE).close()
    with pytest.raises(BadPlan, match="cannot be written"):
        LogWriter(tmp_path / "no" / "log", PLAN, MACHINE)


def test_only_a_log_that_nobody_writes_is_forgotten(tmp_path: Path):
    path, other = tmp_path / "log", tmp_path / "thesis.tex"
    assert begun_for(path) is None
    forget(path)
    log = LogWriter(path, PLAN, MACHINE)
    assert begun_for(path) == PLAN.plan_id
    with pytest.raises(BadPlan, match="another run writes this log"):
        forget(path)
    log.close()
    forget(path)
    assert not path.exists()
    other.write_text("two\nlines\n")
    with pytest.raises(BadPlan, match="is no log"):
        forget(other)
    assert other.exists()


def test_shared_drift_is_taken_out_and_levels_stay(tmp_path: Path):
    """Twelve cases on a machine that slows down by half and comes back: quartiles close, medians where they were."""
    plan = Plan("cpu", tuple(Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in range(1, 13)))
    rng = np.random.default_rng(5)
    log = LogWriter(tmp_path / "log", plan, MACHINE)
    for n in range(30):
        slow = 1.5 if 10 <= n < 20 else 1.0
        for i in rng.permutation(12):
            ns = 1000.0 * (i + 1) * slow * float(np.exp(rng.normal(0.0, 0.01)))
            log.samples(Samples(plan.cases[i].id, n, (ns,), (ns,), None, None))
    log.close()
    plain = read_points(plan, tmp_path / "log", normalise="none")
    level = read_points(plan, tmp_path / "log")
    for i, (before, after) in enumerate(zip(plain, level, strict=True)):
        assert before.ns_p75 / before.ns_p25 > 1.4
        assert after.ns_p75 / after.ns_p25 < 1.03
        assert after.ns_median == pytest.approx(1000.0 * (i + 1), rel=0.01)
        assert after.wall_ns_median == before.wall_ns_median


@pytest.mark.parametrize("faster", [0.0, 0.1])
def test_speed_error_is_the_spread_of_a_runs_quarters(faster: float, tmp_path: Path):
    """Two quarters of the run on a machine that is e^faster as fast as in the other two: a sigma of faster / 2."""
    plan = Plan("cpu", tuple(Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in range(1, 13)))
    log = LogWriter(tmp_path / "log", plan, MACHINE)
    for n in range(40):
        for i, case in enumerate(plan.cases):
            ns = 1000.0 * (i + 1) * float(np.exp(faster * (n // 10 % 2)))
            log.samples(Samples(case.id, n, (ns,), (ns,), None, None))
    log.close()
    assert speed_error(plan, read_log(tmp_path / "log", plan)) == pytest.approx(faster / 2, abs=0.004)


def test_speed_error_of_a_short_log_is_unknown(tmp_path: Path):
    write(tmp_path / "log")
    assert speed_error(PLAN, read_log(tmp_path / "log", PLAN)) == 0.0


def test_a_drift_of_few_cases_is_left_in():
    ns = np.array([1.0, 5.0, 2.0, 6.0] * 10)
    assert (drift_factors(ns, np.array([0, 1] * 20)) == 1.0).all()
    assert drift_factors(np.zeros(0), np.zeros(0, dtype=np.int64)).size == 0


def test_bytes_through_disks_and_links_keep_their_own_times(tmp_path: Path):
    gemms = [Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in range(1, 13)]
    storage = Case("storage", {"mode": "direct", "block_bytes": 4096, "depth": 1}, {"bytes": 8192}, "fp32")
    plan = Plan("cpu", (*gemms, storage))
    log = LogWriter(tmp_path / "log", plan, MACHINE)
    for n in range(12):
        for case in plan.cases:
            ns = 100.0 * (1 + n // 4)
            log.samples(Samples(case.id, n, (ns,), (ns,), None, None))
    log.close()
    *compute, disk = read_points(plan, tmp_path / "log")
    assert (disk.ns_p25, disk.ns_median, disk.ns_p75) == (100.0, 200.0, 300.0)
    assert compute[0].ns_p75 / compute[0].ns_p25 < 1.5


def test_points_are_those_of_the_speed_that_the_machine_had_most_often(tmp_path: Path):
    """A core with two speeds in turns of a few samples, which products feel more than reads: what is common to both is
    no drift that could be taken out, so the samples of the usual speed stand."""
    plan = Plan("cpu", tuple(Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in range(1, 13)))
    rng = np.random.default_rng(6)
    log = LogWriter(tmp_path / "log", plan, MACHINE)
    slow, left = False, 0
    for n in range(30):
        for i in rng.permutation(12):
            if not left:
                slow, left = bool(rng.random() < 0.4), int(rng.integers(1, 6))
            left -= 1
            feels = 1.5 if i % 2 else 1.1
            ns = 1000.0 * (i + 1) * (feels if slow else 1.0) * float(np.exp(rng.normal(0.0, 0.005)))
            reference = (1450.0 if slow else 980.0) * float(np.exp(rng.normal(0.0, 0.02)))
            log.samples(Samples(plan.cases[i].id, n, (ns,), (ns,), None, reference))
    log.close()
    seen = np.array([line.reference_ns or 0.0 for line in read_log(tmp_path / "log", plan).lines])
    assert usual_reference_ns(seen) == pytest.approx(980.0, rel=0.02)
    assert usual_reference_ns(np.zeros(3)) is None
    for i, point in enumerate(read_points(plan, tmp_path / "log")):
        assert point.ns_median == pytest.approx(1000.0 * (i + 1), rel=0.03)
        assert point.samples < 30
