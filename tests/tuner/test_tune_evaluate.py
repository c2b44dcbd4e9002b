"""A task becomes a row, whatever it says, and the same row whatever the process ran before."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from moesim_tuner import evaluate as module
from moesim_tuner.evaluate import evaluate
from moesim_tuner.records import Row, Task, canonical

from moesim.layout import Layout
from moesim.memory import RankMemory, rank_memory
from moesim.reuse import Reuse
from moesim.scenario.load import Scenario, load_scenario_text
from tests.build import tiny_model

TEXT = """
cluster: {device: h100_sxm, nodes: 1, gpus_per_node: 8}
parallel: {dp: 8, ep: 8}
requests: {format: closed_loop, concurrency: 8, num_requests: 20, prompt_tokens: 200, output_tokens: 30}
routing: {popularity_zipf: 0.5, pool_tokens: 1024, fidelity: count}
"""


@pytest.fixture
def task(tmp_path):
    text = f"model: {tiny_model(tmp_path)}\n{TEXT}"

    def make(*overrides: str, **more: object) -> Task:
        return Task(text, "t", str(tmp_path), overrides, 3, **more)

    return make


def bytes_of(row: Row) -> str:
    return canonical({**asdict(replace(row, observation=None)), "elapsed_s": 0})


def test_a_run_that_is_done(task):
    row = evaluate(task(observe=True))
    assert (row.state, row.reasons, row.limits) == ("done", (), {})
    assert row.figures["req_per_s"] > 0
    assert row.figures["rejected_share"] == 0
    assert row.elapsed_s > 0
    assert len(row.scenario_hash) == 16
    again = pickle.loads(pickle.dumps(row))
    assert again.observation.figures.keys() == row.observation.figures.keys()
    assert evaluate(task()).observation is None


def test_what_cannot_be_is_illegal_with_every_reason(task):
    row = evaluate(task("parallel.ep=3", "engine.max_num_seqs=0"))
    assert (row.state, row.limits, row.figures) == ("illegal", {"legality": 1.0}, {})
    assert len(row.reasons) == 2
    assert all(reason.startswith("--set") for reason in row.reasons)
    assert row.scenario_hash == ""
    nonsense = Task("model: [", "t", ".", (), 1)
    assert evaluate(nonsense).state == "illegal"
    assert evaluate(replace(nonsense, plugins=("no_such_module",))).reasons[0].startswith("the plugin 'no_such_module'")


def memory_of(asked: Task) -> tuple[Scenario, RankMemory]:
    s = load_scenario_text(asked.text, Path(asked.base), asked.overrides, 3, "t")
    layout = Layout.of(s.model, s.cluster, 1, 8, 8, s.communication)
    return s, rank_memory(s.model, s.cluster, layout, s.engine, 8, s.model.top_k)


def test_memory_that_is_missing_is_a_share_of_what_is_there(task):
    asked = task("engine.gpu_memory_utilization=0.009")
    row, (s, memory) = evaluate(asked), memory_of(asked)
    needed = memory.fixed + s.model.num_layers * memory.kv_unit
    assert (row.state, row.scenario_hash) == ("infeasible", s.hash)
    assert row.limits == {"memory": pytest.approx(needed / memory.usable - 1, rel=1e-12)}
    assert row.limits["memory"] > 0
    less = evaluate(task("engine.gpu_memory_utilization=0.008"))
    assert less.limits["memory"] > row.limits["memory"], "nearer to fitting is nearer to 0"
    assert "bytes a rank are missing" in row.reasons[0]


def test_a_kv_cache_that_holds_no_request_is_memory_that_is_missing(task):
    """230 tokens are 15 blocks of 16 in each of 4 layers, 60 units; 42 are there."""
    _, memory = memory_of(task())
    share = (memory.fixed + 42.5 * memory.kv_unit) / memory.capacity
    row = evaluate(task(f"engine.gpu_memory_utilization={share!r}"))
    assert row.state == "infeasible"
    assert row.reasons[0].startswith("requests: every request is longer than max_model_len or than the KV cache holds")
    assert row.limits == {"memory": pytest.approx(18 * memory.kv_unit / int(memory.capacity * share), rel=1e-12)}
    illegal = evaluate(task("engine.max_model_len=100"))
    assert (illegal.state, illegal.limits) == ("illegal", {"legality": 1.0})
    assert "max_model_len is 100" in illegal.reasons[0]


def test_requests_that_are_turned_away_are_told(task):
    lengths = "requests.prompt_tokens={distribution: lognormal, mean: 200, cv: 1.0, max: 4000}"
    row = evaluate(task(lengths, "engine.max_model_len=250"))
    assert row.state == "done"
    assert 0 < row.figures["rejected_share"] < 1
    assert row.warnings[-1].startswith(f"requests: {round(row.figures['rejected_share'] * 20)} of 20 were rejected")


PLUGIN = """
from moesim.placement.contiguous import Policy as Contiguous

class Broken(Contiguous):
    def place(self, weight_LE, ctx):
        raise MemoryError if ctx.num_ranks == 4 else RuntimeError("two\\nlines")

POLICIES = {"placement.worn": Broken}
"""


def test_mistakes_and_a_machine_that_is_too_small_fail(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "worn_policy.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = evaluate(task("policies.placement=worn", plugins=("worn_policy",)))
    assert (row.state, row.reasons) == ("failed", ("RuntimeError: two lines (worn_policy.py:6)",))
    assert row.scenario_hash
    assert capsys.readouterr().err == ""
    small = evaluate(task("policies.placement=worn", "parallel.ep=4", plugins=("worn_policy",)))
    assert (small.state, small.reasons) == (
        "failed", ("MemoryError: simulating this takes more memory than a worker can have",),
    )  # fmt: skip
    monkeypatch.setenv("MOESIM_DEBUG", "1")
    evaluate(task("policies.placement=worn", plugins=("worn_policy",)))
    assert "Traceback" in capsys.readouterr().err


def test_rows_do_not_depend_on_what_ran_before(task, monkeypatch):
    a, b, bad = task("engine.max_num_seqs=8"), task("parallel.ep=4"), task("engine.gpu_memory_utilization=0.009")
    alone = []
    for one in (a, b, bad):
        monkeypatch.setattr(module, "_REUSE", Reuse())
        alone.append(bytes_of(evaluate(one)))
    kept = Reuse()
    monkeypatch.setattr(module, "_REUSE", kept)
    mixed = [bytes_of(evaluate(one)) for one in (a, b, a, bad, b, a)]
    assert mixed == [alone[i] for i in (0, 1, 0, 2, 1, 0)]
    assert kept.hits["pool"] == 5
