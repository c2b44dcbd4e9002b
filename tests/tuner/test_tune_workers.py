"""Workers that really die, hang and raise, and coordinators that are killed.

What goes wrong is asked for by the task: the pool gives its tasks to a function of the module `faults` below. Rows of
real simulations are compared with those of this process.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest
from moesim_tuner.evaluate import evaluate
from moesim_tuner.records import Row, Task
from moesim_tuner.workers import make_workers
from moesim_tuner.workers.inline import InlineWorkers
from moesim_tuner.workers.pool import PoolWorkers

from moesim.errors import BadInput
from tests.build import tiny_model

FAULTS = """
import os, signal, time

def answer(task):
    what, _, rest = task.partition(":")
    if what == "die":
        os.kill(os.getpid(), int(rest))
        time.sleep(60)
    if what == "exit":
        os._exit(int(rest))
    if what == "die-once" and not os.path.exists(rest):
        open(rest, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit-then-die":
        if os.path.exists(rest):
            os.kill(os.getpid(), signal.SIGKILL)
        open(rest, "w").close()
        os._exit(7)
    if what == "hang":
        time.sleep(600)
    if what == "spin":  # holds the interpreter's lock for ever
        sum(range(1 << 60))
    if what == "raise":
        raise ValueError(rest)
    if what == "sleep":
        time.sleep(float(rest))
    if what == "large":
        return "x" * int(rest)
    return (task, os.getpid())
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "faults:answer"


@pytest.fixture
def pool(faults):
    made: list[PoolWorkers] = []

    def make(number: int = 2, timeout_s: float = 60) -> PoolWorkers:
        made.append(PoolWorkers(number, timeout_s, function=faults))
        return made[-1]

    yield make
    for one in made:
        one.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    """All of them end before long."""
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def reason(row: Row) -> str:
    assert (row.state, len(row.reasons), row.figures) == ("failed", 1, {})
    return row.reasons[0]


def test_tasks_come_back_and_large_ones_too(pool):
    workers = pool(2)
    assert workers.parallel == 2
    asked = [f"task {i}" for i in range(50)]
    found = [future.result() for future in [workers.submit(task) for task in asked]]
    assert [task for task, _ in found] == asked
    assert {pid for _, pid in found} <= set(workers.pids())
    assert os.getpid() not in {pid for _, pid in found}
    assert len(workers.submit("large:20000000").result()) == 20_000_000
    assert workers.submit("y" * 5_000_000).result()[0] == "y" * 5_000_000


def test_a_worker_that_dies_is_replaced_and_its_task_tried_once_more(pool, tmp_path):
    workers = pool(2)
    assert workers.submit(f"die-once:{tmp_path}/one").result()[0].startswith("die-once")
    assert reason(workers.submit("die:9").result()) == "the worker died (signal 9) twice"
    assert reason(workers.submit("die:15").result()) == "the worker died (signal 15) twice"
    assert reason(workers.submit("exit:3").result()) == "the worker died (exit code 3) twice"
    both = workers.submit(f"exit-then-die:{tmp_path}/two").result()
    assert reason(both) == "the worker died twice (exit code 7, then signal 9)"
    assert workers.submit("next").result()[0] == "next"


def test_a_worker_that_hangs_is_killed_alone(pool):
    workers = pool(2, 0.7)
    workers.submit("warm").result()
    slow, quick = workers.submit("hang"), [workers.submit("sleep:0.01") for _ in range(5)]
    assert [q.result()[0] for q in quick] == ["sleep:0.01"] * 5
    assert reason(slow.result()) == "no answer within 0.7 s (tune.timeout_s)"
    assert reason(workers.submit("spin").result()) == "no answer within 0.7 s (tune.timeout_s)"
    assert workers.submit("next").result()[0] == "next"


def test_a_worker_killed_at_any_moment_harms_no_other(pool):
    workers, rng = pool(3), random.Random(5)
    futures = [workers.submit(f"sleep:{rng.choice((0, 0.001, 0.01))}") for _ in range(120)]
    for _ in range(12):
        time.sleep(rng.random() * 0.03)
        pids = workers.pids()
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
    rows = [future.result(timeout=60) for future in futures]
    assert all(row[0].startswith("sleep") for row in rows if not isinstance(row, Row))
    assert {reason(row) for row in rows if isinstance(row, Row)} <= {"the worker died (signal 9) twice"}


def test_the_nursery_can_be_killed(pool):
    workers = pool(2)
    workers.submit("warm").result()
    before = workers.pids()
    os.kill(workers._nursery.pid, signal.SIGKILL)
    assert workers.submit("next").result()[0] == "next"
    assert gone(before)


def test_ctrl_c_reaches_the_coordinator_alone(pool):
    workers = pool(1)
    _, pid = workers.submit("warm").result()
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert workers.submit("next").result() == ("next", pid)


def test_close_ends_those_that_run_and_cancels_the_rest(pool):
    workers = pool(2)
    workers.submit("warm").result()
    left = [workers.submit("spin") for _ in range(5)]
    pids = workers.pids()
    workers.close()
    assert gone(pids)
    for future in left:
        with pytest.raises(CancelledError):
            future.result(timeout=5)
    with pytest.raises(CancelledError):
        workers.submit("late").result(timeout=5)
    workers.close()


def test_a_future_that_is_cancelled_is_not_run(pool):
    workers = pool(1)
    first, second, third = (workers.submit(t) for t in ("sleep:0.3", "die:9", "third"))
    assert second.cancel()
    wait([first, third], timeout=30)
    assert (first.result()[0], third.result()[0]) == ("sleep:0.3", "third")


def test_no_worker_at_all_is_said_once_and_ends_the_study():
    workers = PoolWorkers(2, 60, function="no_such_module:answer")
    for _ in range(2):
        with pytest.raises(BadInput, match="workers cannot be started: ModuleNotFoundError: No module named"):
            workers.submit("x").result(timeout=60)
    workers.close()
    with pytest.raises(BadInput, match="at least one worker"):
        make_workers(0)


@pytest.mark.parametrize("task", ["spin", "hang"])
def test_nothing_is_left_of_a_coordinator_that_was_killed(faults, tmp_path, task):
    script = """
        import sys, time
        from moesim_tuner.workers.pool import PoolWorkers
        workers = PoolWorkers(2, 600, function="faults:answer")
        [f.result() for f in [workers.submit("sleep:0.05") for _ in range(8)]]
        while len(workers.pids()) < 2:
            time.sleep(0.01)
        left = [workers.submit(sys.argv[1]) for _ in range(4)]
        time.sleep(0.1)
        print(workers._nursery.pid, *workers.pids(), flush=True)
        time.sleep(600)
    """
    path = os.pathsep.join([str(tmp_path), *sys.path])
    coordinator = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), task],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    pids = [int(word) for word in coordinator.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(alive, pids))
    coordinator.kill()
    coordinator.wait()
    assert gone(pids)


TEXT = """
cluster: {device: h100_sxm, nodes: 1, gpus_per_node: 8}
parallel: {dp: 8, ep: 8}
requests: {format: closed_loop, concurrency: 8, num_requests: 20, prompt_tokens: 200, output_tokens: 30}
routing: {popularity_zipf: 0.5, pool_tokens: 1024, fidelity: count}
"""
PLUGIN = """
from moesim.placement.contiguous import Policy as Contiguous

class Broken(Contiguous):
    def place(self, weight_LE, ctx):
        raise ZeroDivisionError("no\\nload")

POLICIES = {"placement.broken": Broken}
"""


def test_rows_are_the_same_bytes_in_a_worker(tmp_path, monkeypatch):
    (tmp_path / "broken_policy.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = f"model: {tiny_model(tmp_path)}\n{TEXT}"
    tasks = [
        Task(text, "t", str(tmp_path), ("parallel.ep=4",), 3, observe=True),
        Task(text, "t", str(tmp_path), ("parallel.ep=3",), 3),
        Task(text, "t", str(tmp_path), ("engine.gpu_memory_utilization=0.01",), 3),
        Task(text, "t", str(tmp_path), ("policies.placement=broken",), 3, plugins=("broken_policy",)),
    ]
    workers = make_workers(2, 120)
    found = [future.result() for future in [workers.submit(task) for task in tasks * 2]]
    workers.close()
    assert [row.state for row in found] == ["done", "illegal", "infeasible", "failed"] * 2
    here = InlineWorkers(120)
    for row, task in zip(found, tasks * 2, strict=True):
        mine = here.submit(task).result()
        for name in ("state", "figures", "limits", "reasons", "warnings", "scenario_hash"):
            assert getattr(row, name) == getattr(mine, name), name
        assert (row.observation is None) == (mine.observation is None)
    assert found[0].observation.figures.keys() == evaluate(tasks[0]).observation.figures.keys()
    assert found[3].reasons == ("ZeroDivisionError: no load (broken_policy.py:6)",)


def test_in_this_process_a_task_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr("moesim_tuner.evaluate.evaluate", lambda task: time.sleep(60))
    before = signal.getsignal(signal.SIGALRM)
    workers = make_workers(1, 0.05)
    assert workers.parallel == 1
    assert reason(workers.submit("x").result()) == "no answer within 0.05 s (tune.timeout_s)"
    assert signal.getsignal(signal.SIGALRM) == before
    workers.close()
    assert workers.submit("x").cancelled()
