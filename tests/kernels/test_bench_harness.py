"""Real runs: killed again and again and gone on with, interrupted by signals, with torch and numpy alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from moesim_kernels.bench.__main__ import budget_seconds
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.log import read_log, read_points
from moesim_kernels.bench.plan import Case, Plan, save_plan

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}

# Importing torch takes longer than measuring, so one process imports it and forks: each child is a process of its own
# that runs the harness and is killed with SIGKILL at a random moment, some before their first sample.
KILLER = """
import json, os, random, signal, sys, time
import torch, triton
from moesim_kernels.bench.harness import run
from moesim_kernels.bench.plan import load_plan
from moesim_kernels.bench.pool import Device

plan, log = load_plan(sys.argv[1]), sys.argv[2]
kills, target = int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
rng = random.Random(7)


def start():
    child = os.fork()
    if child == 0:
        try:
            device = Device("cpu", cache_bytes=1 << 18, capacity_bytes=1 << 30)
            run(plan, log, 600.0, target=target, device=device)
            os._exit(0)
        finally:
            os._exit(9)
    return child


def size():
    return os.stat(log).st_size if os.path.exists(log) else 0


states, hits = [], 0
while hits < kills:
    before, child = size(), start()
    if rng.random() < 0.75:
        while size() <= before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
    time.sleep(rng.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    hits += os.waitpid(child, 0)[1] == signal.SIGKILL
    states.append(open(log, "rb").read().decode() if size() else "")
ended = os.waitpid(start(), 0)[1]
print(json.dumps({"states": states, "hits": hits, "ended": ended}))
"""


def tiny_plan(path: Path) -> Plan:
    moe = {"hidden": 32, "intermediate": 16, "slots": 4, "top_k": 2}
    cases = [Case("gemm", {"n": 32, "k": 32}, {"m": m}, "fp32") for m in (1, 8, 32)]
    cases += [
        Case("moe", moe, {"tokens": t, "rows": 2 * t, "histogram": kind}, "fp32")
        for t, kind in ((1, "uniform"), (8, "zipf:1.2"), (8, "one"))
    ]
    cases[-1] = Case("moe", moe, {"tokens": 8, "rows": 8, "histogram": "one"}, "fp32", role="heldout")
    plan = Plan("cpu", tuple(cases))
    save_plan(plan, path)
    return plan


def run_killed(tmp_path: Path, kills: int) -> None:
    plan, target = tiny_plan(tmp_path / "plan.json"), 200
    command = [
        sys.executable,
        "-c",
        KILLER,
        str(tmp_path / "plan.json"),
        str(tmp_path / "log"),
        str(kills),
        str(target),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["hits"], said["ended"]) == (kills, 0)
    final = (tmp_path / "log").read_text()
    for state in said["states"]:  # every whole line that a killed run left is in the end where it was
        assert final.startswith(state[: state.rfind("\n") + 1])
    grown = [state.count("\n") for state in said["states"]]
    assert grown == sorted(grown)
    assert grown[-1] > grown[0]
    record = read_log(tmp_path / "log", plan)
    assert record.counts() == {case.id: target for case in plan.cases}  # as an undisturbed run ends
    assert record.ends[-1]["stopped"] == "complete"
    assert len(record.ends) == 1
    points = read_points(plan, tmp_path / "log")
    assert [point.case for point in points] == list(plan.cases)
    assert all(0 < p.ns_p25 <= p.ns_median <= p.ns_p75 for p in points)


def test_killed_twenty_times_ends_with_the_same_grid(tmp_path: Path):
    run_killed(tmp_path, 20)


def bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moesim_kernels.bench", *arguments]


def test_signal_ends_a_run_cleanly(tmp_path: Path):
    plan = tiny_plan(tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--budget", "5m", "--target", "1000000"]
    children = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        command = bench(*options, "--log", str(tmp_path / number.name))
        children[number] = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for number, child in children.items():
        log = tmp_path / number.name
        while child.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 5):
            time.sleep(0.005)
        child.send_signal(number)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 128 + number
        assert said.startswith("interrupted: 0 of 6 cases")
        record = read_log(log, plan)
        assert record.ends[-1]["stopped"] == "interrupted"
        assert sum(record.counts().values()) == record.ends[-1]["samples"] >= 4
        assert log.read_bytes().endswith(b"}\n")


def test_no_reader_no_room_and_no_parent(tmp_path: Path):
    plan = tiny_plan(tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--minimum", "2", "--log"]
    full = ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash"]
    some, many = ["--target", "2"], ["--target", "1000000", "--budget", "5m"]
    commands = {
        "read": [*bench(*options, str(tmp_path / "read"), *some)],
        "full": [*full, *bench(*options, str(tmp_path / "full"), *many)],
        "left": [*bench(*options, str(tmp_path / "left"), *many, "--parent", "1")],
    }
    pipe = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = {name: subprocess.Popen(command, **pipe) for name, command in commands.items()}  # type: ignore[call-overload]
    children["read"].stdout.close()
    assert children["read"].wait(60) == 0
    assert children["read"].stderr.read() == ""
    assert read_log(tmp_path / "read", plan).ends[-1]["stopped"] == "complete"
    _, said = children["full"].communicate(timeout=60)
    assert children["full"].returncode == 5
    assert "make room" in said
    assert said.count("\n") == 1
    assert read_log(tmp_path / "full", plan).lines
    children["left"].communicate(timeout=60)
    assert children["left"].returncode == 128 + signal.SIGTERM
    assert read_log(tmp_path / "left", plan).ends[-1]["stopped"] == "interrupted"


def test_runs_with_torch_and_numpy_alone(tmp_path: Path):
    tiny_plan(tmp_path / "plan.json")
    script = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            banned = ("moesim", "pydantic", "scipy", "yaml", "typer", "rich", "simpy", "pyarrow", "matplotlib")
            if name.split(".")[0] in banned:
                raise ImportError(f"{name} is not to be imported")

    sys.meta_path.insert(0, Blocker())
    from moesim_kernels.bench.__main__ import main

    assert "torch" not in sys.modules
    code = main(["--default", "cpu", "--save-plan", sys.argv[2]])
    assert code == 0
    assert "torch" not in sys.modules
    code = main(["--plan", sys.argv[1], "--log", sys.argv[3], "--target", "3", "--minimum", "2", "--device", "cpu"])
    assert "torch" in sys.modules
    sys.exit(code)
    """
    paths = [str(tmp_path / name) for name in ("plan.json", "default.json", "log")]
    command = [sys.executable, "-c", textwrap.dedent(script), *paths]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "complete: 6 of 6 cases have their 3 samples; 18 samples" in done.stdout
    assert done.stderr == ""


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from moesim_kernels.bench.__main__ import main

    tiny_plan(tmp_path / "plan.json")
    plan = ["--plan", str(tmp_path / "plan.json")]
    log = ["--log", str(tmp_path / "log")]
    for arguments, said in (
        (plan, "--log: name a log"),
        ([*plan, *log, "--budget", "soon"], "--budget: a budget is a time"),
        ([*plan, *log, "--device", "cuda"], "the plan is for cpu, --device says cuda"),
        (["--plan", str(tmp_path / "none"), *log], "none: cannot be read"),
        ([*plan, "--log", str(tmp_path / "no" / "log")], "cannot be written"),
        ([*plan, *log, "--minimum", "9", "--target", "3"], "minimum=9, target=3"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(("text", "seconds"), [("300", 300), ("30s", 30), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120)])
def test_budgets(text: str, seconds: float):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-1m", "5d", "m", "1e3", "9999h"])
def test_wrong_budgets(text: str):
    with pytest.raises(BadPlan, match="a budget is a time"):
        budget_seconds(text)
