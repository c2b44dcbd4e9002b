"""A real Dask cluster on this machine: the same bytes, and clear words where it cannot be used."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, replace

import pytest
from moesim_tuner.evaluate import evaluate
from moesim_tuner.records import Row, Task, canonical
from moesim_tuner.workers import cluster as module
from moesim_tuner.workers import make_workers

from moesim.errors import BadInput
from tests.build import tiny_model

distributed = pytest.importorskip("distributed")

TEXT = """
cluster: {device: h100_sxm, nodes: 1, gpus_per_node: 8}
parallel: {dp: 8, ep: 8}
requests: {format: closed_loop, concurrency: 8, num_requests: 12, prompt_tokens: 200, output_tokens: 30}
routing: {popularity_zipf: 0.5, pool_tokens: 1024, fidelity: count}
"""
PLUGIN = """
import os
from moesim.placement.contiguous import Policy as Contiguous

class Deadly(Contiguous):
    def place(self, weight_LE, ctx):
        os._exit(9)

POLICIES = {"placement.deadly": Deadly}
"""


@pytest.fixture(scope="module")
def local():
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, host="tcp://127.0.0.1"
    ) as made:
        yield made.scheduler_address


def bytes_of(row: Row) -> str:
    return canonical({**asdict(replace(row, observation=None)), "elapsed_s": 0})


def tasks(folder) -> list[Task]:
    text = f"model: {tiny_model(folder)}\n{TEXT}"
    more = ["parallel.ep=8", "parallel.ep=4", "parallel.ep=3", "engine.gpu_memory_utilization=0.01", "seed=9"]
    return [Task(text, "t", str(folder), (one,), 3) for one in more]


def test_rows_of_a_cluster_are_those_of_one_process(local, tmp_path, monkeypatch):
    (tmp_path / "deadly_policy.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = tasks(tmp_path)
    workers = make_workers(cluster=local, timeout_s=120)
    assert workers.parallel == 2
    found = [future.result(timeout=300) for future in [workers.submit(task) for task in asked]]
    assert [bytes_of(row) for row in found] == [bytes_of(evaluate(task)) for task in asked]
    deadly = replace(asked[0], overrides=("policies.placement=deadly",), plugins=("deadly_policy",))
    assert workers.submit(deadly).result(timeout=300).reasons == ("the worker died (exit code 9) twice",)
    elsewhere = replace(asked[0], base=str(tmp_path / "elsewhere"))
    assert workers.submit(elsewhere).result(timeout=300).state == "illegal", "and illegal here, too"
    workers.close()
    assert workers.submit(asked[0]).cancelled()


def test_workers_with_other_files_are_told(local, tmp_path, monkeypatch):
    one = tasks(tmp_path)[0]
    monkeypatch.setattr(module, "_hash_here", lambda task: "0123456789abcdef")
    workers = make_workers(cluster=local, timeout_s=120)
    with pytest.raises(BadInput, match=r"has another file than this machine under one name.*same paths"):
        workers.submit(one).result(timeout=300)
    with pytest.raises(BadInput, match=r"cannot load the scenario, which is fine here: .*no such file.*MOESIM_HOME"):
        workers.submit(replace(one, base=str(tmp_path / "x"))).result(timeout=300)
    workers.close()


@pytest.mark.parametrize("what", ["Python", "NumPy", "moesim"])
def test_workers_with_another_version_are_refused(local, monkeypatch, what):
    monkeypatch.setattr(module, "_here", lambda: {**module.facts(), what: "1.0"})
    with pytest.raises(BadInput, match=rf"worker .* must run what this machine runs: {what} .* there, 1\.0 here"):
        make_workers(cluster=local)


def test_nobody_there(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    monkeypatch.setattr(module, "_CONNECT_S", 0.5)
    with pytest.raises(BadInput, match=rf"--cluster tcp://127.0.0.1:{free}: nobody answers there within 0.5 s"):
        make_workers(cluster=f"tcp://127.0.0.1:{free}")
    with pytest.raises(BadInput, match="--cluster nonsense:a:b: ValueError: invalid address"):
        make_workers(cluster="nonsense:a:b")


def test_no_workers():
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None, host="tcp://127.0.0.1") as empty,
        pytest.raises(BadInput, match="the scheduler has no workers"),
    ):
        make_workers(cluster=empty.scheduler_address)


@pytest.mark.slow
def test_four_worker_processes_finish_the_same_study_as_one(tmp_path, monkeypatch):
    from tests.tuner.study_of_rows import study

    text = f"model: {tiny_model(tmp_path)}\n{TEXT}"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(__import__("sys").path))
    one = study(text, tmp_path, make_workers(1, 120))
    with distributed.LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=None) as made:
        four = study(text, tmp_path, make_workers(cluster=made.scheduler_address, timeout_s=120))
    assert one == four
    assert one.count('"complete"') >= 3
