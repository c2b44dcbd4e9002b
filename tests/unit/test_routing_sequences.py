"""`routing.sequences`: a part of the pool, and nothing else of it, reaches a run; two parts make the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.cost.routed import pool_source, route_source
from moesim.errors import BadInput
from moesim.scenario.load import load_scenario, load_scenario_text
from moesim.simulate import simulate
from moesim.traces.routing_npz import convert
from moesim.training.scores import training_scores
from moesim.workload.pool import RoutingSource
from tests.build import scenario, tiny_model, training_scenario

LAYERS, EXPERTS, TOP_K = 3, 64, 4  # of the tiny model
FEW = {"format": "closed_loop", "concurrency": 4, "num_requests": 4, "prompt_tokens": 8, "output_tokens": 2}


def trace(folder: Path, lengths: tuple[int, ...] = (3, 1, 4, 1, 5, 9, 2, 6), scores: bool = False) -> str:
    """A recorded trace of sequences of these lengths; token t's first expert in layer 0 is t."""
    rng = np.random.default_rng(5)
    tokens = sum(lengths)
    logits = rng.normal(size=(tokens, LAYERS, EXPERTS)).astype(np.float16)
    order = np.argsort(-logits.astype(np.float64), axis=2)[:, :, :TOP_K]
    members = {
        "expert_ids": order.astype(np.int64),
        "sequence_id": np.repeat(np.arange(len(lengths)), lengths),
        "token_id": np.arange(tokens),
        "phase": np.arange(tokens) % 2,
        "weights": np.full((tokens, LAYERS, TOP_K), 0.25, np.float32),
        "num_experts": np.array(EXPERTS),
    }
    if scores:
        members["scores"] = logits
    np.savez_compressed(folder / "trace.npz", **members)
    return "trace.npz"


def same(a: RoutingSource, b: RoutingSource) -> None:
    arrays = ("expert_TLK", "sequence_start", "weight_TLK", "score_TLE", "token_T", "phase_T", "domain_Q", "window_Q")
    for name in arrays:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)


def together(a: RoutingSource, b: RoutingSource) -> dict[str, object]:
    return {
        "expert_TLK": np.concatenate([a.expert_TLK, b.expert_TLK]),
        "sequence_tokens_Q": np.concatenate([a.sequence_tokens_Q, b.sequence_tokens_Q]),
    }


@pytest.mark.parametrize("share", [0.5, 0.3, 0.9, 1 / 3])
def test_two_parts_of_a_recorded_trace_are_the_trace(tmp_path: Path, share: float) -> None:
    path = trace(tmp_path, scores=True)
    whole = pool_source(scenario(tmp_path, routing={"path": path}), 1)
    first, rest = (
        pool_source(scenario(tmp_path, routing={"path": path, "sequences": part}), 1)
        for part in ([0, share], [share, 1])
    )
    assert first.num_sequences == round(share * whole.num_sequences)
    found = together(first, rest)
    np.testing.assert_array_equal(found["expert_TLK"], whole.expert_TLK)
    np.testing.assert_array_equal(found["sequence_tokens_Q"], whole.sequence_tokens_Q)
    # every array of a part is what picking its sequences one by one gives
    same(first, whole.take_sequences(np.arange(first.num_sequences)))
    same(rest, whole.take_sequences(np.arange(first.num_sequences, whole.num_sequences)))
    assert rest.recorded
    assert rest.source.endswith(f"sequences {first.num_sequences} to 7 of 8")


def test_a_converted_folder_is_cut_alike(tmp_path: Path) -> None:
    path = trace(tmp_path)
    convert(tmp_path / path, tmp_path / "folder")
    of_file, of_folder = (
        pool_source(scenario(tmp_path, routing={"path": name, "sequences": [0.25, 0.75]}), 1)
        for name in (path, "folder")
    )
    np.testing.assert_array_equal(of_file.expert_TLK, of_folder.expert_TLK)
    np.testing.assert_array_equal(of_file.sequence_start, of_folder.sequence_start)


@pytest.mark.parametrize("policy", ["topk", "random", "balanced"])
def test_a_synthetic_pool_is_drawn_once_and_cut(tmp_path: Path, policy: str) -> None:
    """Also where a policy draws ids of its own: the halves are halves of one draw, not one draw twice."""
    knobs = {"popularity_zipf": 1.0, "pool_tokens": 1024, "sequence_tokens": 64, "domains": 3, "drift": 0.1}

    def pool(**more: object) -> RoutingSource:
        return pool_source(scenario(tmp_path, routing={**knobs, **more}, policies={"routing": policy}), 3)

    whole, first, rest = pool(), pool(sequences=[0, 0.5]), pool(sequences=[0.5, 1])
    np.testing.assert_array_equal(together(first, rest)["expert_TLK"], whole.expert_TLK)
    assert policy == "balanced" or not np.array_equal(first.expert_TLK, rest.expert_TLK)  # which is periodic
    assert pool(sequences=[0, 1]).source == whole.source


def test_counts_are_cut_as_the_pool_drawn_from_them(tmp_path: Path) -> None:
    rows = "\n".join(f"{layer}," + ",".join(str(1 + (e + layer) % 7) for e in range(EXPERTS)) for layer in range(1, 4))
    (tmp_path / "counts.csv").write_text("layer," + ",".join(f"e{e}" for e in range(EXPERTS)) + "\n" + rows + "\n")
    whole, first = (
        pool_source(scenario(tmp_path, routing={"path": "counts.csv", **part}), 1)
        for part in ({}, {"sequences": [0, 0.5]})
    )
    np.testing.assert_array_equal(first.expert_TLK, whole.expert_TLK[: whole.num_tokens // 2])


def test_a_placement_learns_and_serves_within_the_part(tmp_path: Path) -> None:
    """Sequences of the first half use experts 0 to 31 alone, the others 32 to 63: each run sees its own half only."""
    rng = np.random.default_rng(1)
    low = np.argsort(rng.random((512, LAYERS, 32)), axis=2)[:, :, :TOP_K]
    high = 32 + np.argsort(rng.random((512, LAYERS, 32)), axis=2)[:, :, :TOP_K]
    np.savez_compressed(
        tmp_path / "two.npz", expert_ids=np.concatenate([low, high]), sequence_id=np.arange(1024) // 64,
        num_experts=np.array(EXPERTS),
    )  # fmt: skip
    for part, experts in (([0, 0.5], np.arange(32)), ([0.5, 1], np.arange(32, 64))):
        made = scenario(
            tmp_path, requests=FEW, parallel={"dp": 2, "ep": 2},
            policies={"placement": {"kind": "eplb", "num_redundant_experts": 8}},
            routing={"path": "two.npz", "sequences": part, "fidelity": "token"},
        )  # fmt: skip
        result = simulate(made)
        assert result.experts is not None
        used = np.flatnonzero(result.experts.source.count_LE()[0])
        np.testing.assert_array_equal(used, experts)
        assert result.experts.replay is not None
        replicas = np.bincount(result.experts.placement.slot_to_expert_LS[0], minlength=EXPERTS)
        assert set(np.flatnonzero(replicas > 1)) <= set(experts.tolist())


def test_placement_from_may_name_the_other_part(tmp_path: Path) -> None:
    """What holds out for routers that couple a batch: the placement sees one part, requests take the other."""
    path = trace(tmp_path, tuple([16] * 32), scores=True)
    made = scenario(
        tmp_path, requests=FEW, parallel={"dp": 2, "ep": 2}, routing={"path": path, "sequences": [0.5, 1]},
        placement_from={"routing": {"path": path, "sequences": [0, 0.5]}},
        policies={"placement": {"kind": "eplb", "num_redundant_experts": 8}}, capacity={"factor": 2.0},
    )  # fmt: skip
    result = simulate(made)
    assert result.experts is not None
    assert result.experts.router is not None
    assert result.experts.router.couples
    assert result.experts.source.num_sequences == 16
    assert result.experts.fit is not None
    assert result.experts.fit.num_sequences == 16
    assert not np.array_equal(result.experts.fit.expert_TLK, result.experts.source.expert_TLK)


def test_a_router_on_scores_sees_the_part(tmp_path: Path) -> None:
    path = trace(tmp_path, scores=True)
    routing = {"path": path, "sequences": [0, 0.5]}
    source, router, _ = route_source(scenario(tmp_path, routing=routing, capacity={"factor": 1.0}), 1)
    assert router is not None
    assert router.pool_tokens == source.num_tokens == 9


def test_training_takes_the_part_over_and_over(tmp_path: Path) -> None:
    path = trace(tmp_path, scores=True)
    rows = np.arange(9)
    whole, first = (
        training_scores(training_scenario(tmp_path, routing={"path": path, **part}), 1)
        for part in ({}, {"sequences": [0, 0.5]})
    )
    np.testing.assert_array_equal(whole.scores(rows, 0), first.scores(rows, 0))
    np.testing.assert_array_equal(first.scores(rows, 1), first.scores(rows + 9, 1))
    assert not np.array_equal(whole.scores(rows, 1), whole.scores(rows + 9, 1))


# ---- the hash


def test_the_hash_heeds_it_only_where_it_is_given(tmp_path: Path) -> None:
    plain = scenario(tmp_path)
    assert "sequences" not in plain.resolved["routing"]
    parts = [scenario(tmp_path, routing={"sequences": part}) for part in ([0, 0.5], [0.5, 1], [0.0, 1.0])]
    assert len({plain.hash, *(s.hash for s in parts)}) == 4
    other = scenario(tmp_path, placement_from={"routing": {"popularity_zipf": 1.0}})
    assert "sequences" not in other.resolved["placement_from"]["routing"]


def test_the_quickstart_keeps_its_hash() -> None:
    """As README prints it. It changes with the content of the device's profile, as all hashes do."""
    assert load_scenario("workloads/quickstart.yaml").hash == "af67ecc06c436d42"


# ---- what is refused


YAML = """\
name: t
model: {model}
cluster: {{device: h100_sxm_datasheet}}
requests: {{format: closed_loop, concurrency: 2, num_requests: 4, prompt_tokens: 8, output_tokens: 4}}
routing:
  popularity_zipf: 0.5
  sequences: {value}
"""


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[0.5, 0.5]", "t.yaml:7:14: routing.sequences.*from < to"),
        ("[0.6, 0.2]", "t.yaml:7:14: routing.sequences.*from < to"),
        ("[0, 1.5]", "t.yaml:7:18: routing.sequences.*less than or equal to 1"),
        ("[-1, 1]", "t.yaml:7:15: routing.sequences.*greater than or equal to 0"),
        ("0.5", "t.yaml:7:14: routing.sequences"),
        ("[0, 0.5, 1]", "t.yaml:7:14: routing.sequences"),
        ("[a, 1]", "t.yaml:7:15: routing.sequences"),
    ],
)
def test_what_is_no_part_is_refused_with_its_place(tmp_path: Path, value: str, told: str) -> None:
    text = YAML.format(model=tiny_model(tmp_path), value=value)
    with pytest.raises(BadInput, match=told):
        load_scenario_text(text, tmp_path, name="t")


def test_a_part_without_a_sequence_says_how_many_there_are(tmp_path: Path) -> None:
    path = trace(tmp_path)
    with pytest.raises(BadInput, match=r"routing.sequences: .*\[0.0, 0.01\] of 8 sequences is 0 to 0"):
        pool_source(scenario(tmp_path, routing={"path": path, "sequences": [0, 0.01]}), 1)


def test_training_without_a_pool_has_no_part(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"routing\.sequences is a part of a pool"):
        training_scenario(tmp_path, routing={"sequences": [0, 0.5]})
