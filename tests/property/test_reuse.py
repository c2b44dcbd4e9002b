"""What runs share changes no byte of any result, and cannot be changed by them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.reuse import Reuse, file_key, named, reused, reusing
from moesim.scenario.load import load_scenario_text
from moesim.simulate import simulate
from tests.build import tiny_model

BASE = """
cluster: {device: h100_sxm, nodes: 2, gpus_per_node: 8}
routing: {popularity_zipf: 0.8, pool_tokens: 512, sequence_tokens: 64}
"""
SERVING = """
requests:
  format: poisson
  rate_per_s: 200
  num_requests: 20
  prompt_tokens: {distribution: lognormal, mean: 80, cv: 1.0, max: 4000}
  output_tokens: {distribution: geometric, mean: 20, max: 400}
"""
TRAINING = """
mode: training
training: {sequence_tokens: 32, global_batch_sequences: 16, micro_batch_sequences: 1, steps: 2}
"""
TIERS = """
requests: {format: closed_loop, concurrency: 2, num_requests: 4, prompt_tokens: 32, output_tokens: 8}
tiers: {experts: 0.01}
policies: {offload: cached}
parallel: {tp: 1, dp: 1, ep: 1}
"""
LAYOUTS = [
    "{dp: 8, ep: 8}", "{tp: 2, dp: 4, ep: 8}", "{dp: 16, ep: 16}", "{tp: 4, dp: 2, ep: 2}",
    "{dp: 4, ep: 4, replicas: 2}",
]  # fmt: skip
KNOBS = {
    "parallel": LAYOUTS,
    "routing": [
        "{popularity_zipf: 0.8, pool_tokens: 512, sequence_tokens: 64, fidelity: count}",
        "{popularity_zipf: 0.8, pool_tokens: 512, sequence_tokens: 64, fidelity: token}",
        "{popularity_zipf: 0.8, pool_tokens: 512, sequence_tokens: 64, sequences: [0.0, 0.5], fidelity: count}",
        "{pool_tokens: 512, sequence_tokens: 64, drift: 0.3, domains: 3}",
    ],
    "policies.routing": ["topk", "balanced", "random", "{kind: auxiliary_loss}"],
    "policies.placement": [
        "contiguous", "round_robin", "{kind: eplb, num_redundant_experts: 16}", "{kind: exflow}", "{kind: random}",
    ],
    "policies.dispatch": ["local_first", "random", "static", "lp"],
    "communication.all_to_all": ["auto", "deepep_low_latency", "pairwise", "allgather_reducescatter"],
    "engine.max_num_seqs": ["16", "64"],
    "engine.max_num_batched_tokens": ["512", "2048"],
    "engine.cuda_graph": ["true", "false"],
    "rebalance": ["{interval_steps: 20, window_steps: 20}", "null"],
    "seed": ["1", "2"],
}  # fmt: skip


def outcome(text: str, base: Path, overrides: list[str]) -> str:
    """The result as JSON, or why there is none."""
    try:
        result = simulate(load_scenario_text(text, base, overrides))
    except BadInput as error:
        return str(error)
    found: dict[str, Any] = result.to_json()
    for key in ("elapsed", "host"):
        found["provenance"].pop(key, None)
    return json.dumps([found, [repr(row) for row in getattr(result, "reasons", ())]], sort_keys=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("reuse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.reuse._SETTLED_NS", 0)  # files are trusted although they are young
        yield made, f"model: {tiny_model(made)}\n{BASE}"


choices = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in KNOBS.items()})


@settings(max_examples=2)
@given(st.lists(choices, min_size=2, max_size=2))
def test_results_are_the_same_bytes(folder, runs) -> None:
    same_bytes(folder, runs)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(choices, min_size=2, max_size=4))
def test_results_are_the_same_bytes_in_many_scenarios(folder, runs) -> None:
    same_bytes(folder, runs)


def same_bytes(folder: tuple[Path, str], runs: list[dict[str, str]]) -> None:
    base, text = folder
    settings_of = [[f"{key}={value}" for key, value in run.items()] for run in runs]
    with reusing(Reuse(1 << 28)):
        shared = [outcome(text + SERVING, base, given) for given in settings_of * 2]
    assert shared == [outcome(text + SERVING, base, given) for given in settings_of] * 2


LIMITS = ["engine.max_num_seqs=16", "engine.max_num_seqs=64", "engine.cuda_graph=false", "parallel={dp: 16, ep: 16}"]


def test_limits_apart(folder) -> None:
    """What a search of batch limits shares most of."""
    base, text = folder
    common = ["parallel={dp: 8, ep: 8}", "policies.placement={kind: eplb, num_redundant_experts: 16}"]
    with reusing(Reuse(1 << 28)):
        shared = [outcome(text + SERVING, base, [*common, limit]) for limit in LIMITS]
    assert shared == [outcome(text + SERVING, base, [*common, limit]) for limit in LIMITS]


@pytest.mark.parametrize(
    ("more", "knob"),
    [
        (TRAINING, ["parallel={dp: 8, ep: 8}", "parallel={dp: 16, ep: 16}", "parallel={dp: 8, ep: 8}"]),
        (TIERS, ["tiers.experts=0.01", "tiers.experts=0.005", "tiers.experts=0.01"]),
    ],
)
def test_training_and_offloading_too(folder, more, knob) -> None:
    base, text = folder
    kept = Reuse(1 << 28)
    with reusing(kept):
        shared = [outcome(text + more, base, [one]) for one in knob]
    assert shared == [outcome(text + more, base, [one]) for one in knob]
    assert shared[0] == shared[2] != shared[1]


def test_a_second_run_computes_no_pool_and_no_prices(folder) -> None:
    base, text = folder
    kept = Reuse(1 << 28)
    given = ["parallel={dp: 8, ep: 8}", "routing={popularity_zipf: 0.5, pool_tokens: 512, fidelity: count}"]
    with reusing(kept):
        first = outcome(text + SERVING, base, given)
        before = dict(kept.misses)
        assert outcome(text + SERVING, base, given) == first
    fresh = {what: n - before.get(what, 0) for what, n in kept.misses.items() if n > before.get(what, 0)}
    assert not set(fresh) & {"pool", "requests", "loads of a pool", "bank blocks", "bank cell", "bank prices", "bound"}


# ---- the store itself


@dataclass(frozen=True)
class Thing:
    array: np.ndarray
    label: str = "a"


def test_equal_inputs_share_and_others_do_not() -> None:
    kept, made = Reuse(), []

    def make(*key: Any) -> np.ndarray:
        return reused("x", lambda: key, lambda: made.append(key) or np.arange(3))

    assert make(1) is not make(1), "nothing is shared unless asked for"
    made.clear()
    with reusing(kept):
        first = make(1, "a", (2.0, None))
        assert make(1, "a", (2.0, None)) is first
        others = [(True, "a", (2.0, None)), (1.0, "a", (2.0, None)), (1, "a", 2.0, None), (1, "a", [2.0, None]), (1, b"a", (2.0, None)), ()]  # fmt: skip # noqa: E501
        assert all(make(*other) is not first for other in others)
        assert len(made) == 1 + len(others)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 5


def test_arrays_count_by_content_and_kept_ones_by_name() -> None:
    kept = Reuse()
    with reusing(kept):
        a = named("k", lambda: (np.arange(4),))
        assert a == named("k", lambda: (np.arange(4),))
        others = (np.arange(4.0), np.arange(4).reshape(2, 2), np.arange(5))
        assert a not in {named("k", lambda x=x: (x,)) for x in others}
        thing = reused("thing", lambda: ("t",), lambda: Thing(np.zeros(1 << 20)))
        assert named("k", lambda: (thing,)) != named("k", lambda: (Thing(np.zeros(1 << 20)),)), "by name, not content"
        assert named("k", lambda: (thing.array,)) != named("k", lambda: (np.zeros(1 << 20),))
        assert named("k", lambda: (object(),)) is None
    assert named("k", lambda: (1,)) is None, "off"


def test_the_oldest_leaves_and_its_name_with_it() -> None:
    kept = Reuse(limit_bytes=3 << 20)
    with reusing(kept):
        things = [reused("thing", lambda i=i: (i,), lambda: Thing(np.zeros(1 << 17))) for i in range(4)]
        assert kept.size_bytes <= kept.limit_bytes
        fresh = named("k", lambda: (Thing(np.zeros(1 << 17)),))
        assert named("k", lambda: (things[0],)) == fresh, "no name any more: by content"
        assert named("k", lambda: (things[3],)) != fresh
        assert reused("thing", lambda: (3,), lambda: None) is things[3]
        assert reused("large", lambda: (), lambda: np.zeros(1 << 20)) is not reused(
            "large", lambda: (), lambda: np.zeros(1 << 20)
        )


def test_what_raises_is_tried_again() -> None:
    with reusing(Reuse()):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                reused("x", lambda: (1,), lambda: 1 / 0)
        assert reused("x", lambda: (1,), lambda: 7) == 7


def test_a_file_is_known_once_it_has_settled(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("moesim.reuse._SETTLED_NS", 2_000_000_000)
    file = tmp_path / "a"
    file.write_text("one")
    assert file_key(file) is None, "a further change could leave its times as they are"
    assert file_key(tmp_path / "missing") is None
    shipped = Path(__file__)
    assert file_key(shipped) == file_key(shipped)
    assert file_key(shipped.parent / "test_reuse.py") == file_key(shipped)


def test_a_file_that_changes_is_read_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("moesim.reuse._SETTLED_NS", 0)
    name = tiny_model(tmp_path)
    text = f"model: {name}\n{BASE}{SERVING}"
    with reusing(Reuse()):
        before = load_scenario_text(text, tmp_path).model
        assert load_scenario_text(text, tmp_path).model is before
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("hidden_size: 256", "hidden_size: 512"))
        assert load_scenario_text(text, tmp_path).model.hidden_size == 512
