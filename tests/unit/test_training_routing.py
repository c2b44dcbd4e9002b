"""Routing over training steps: states go on, loads even out, samples stand for all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.tokens import TokenExperts
from moesim.layout import Layout
from moesim.routing import Router
from moesim.routing.capacity import limit
from moesim.simulate import simulate
from moesim.training import run as module
from moesim.training.result import TrainingResult, maxvio_by_chance, model_flop_per_token
from moesim.training.routing import StepRouter
from moesim.training.sampling import Shape, offsets, plan, spread
from moesim.training_spec import TrainingSpec
from moesim.workload.pool import RoutingSource
from moesim.workload.replay import Replay
from tests.build import tiny_model, training_scenario


def run(folder: Path, **parts: Any) -> TrainingResult:
    result = simulate(training_scenario(folder, **parts))
    assert isinstance(result, TrainingResult)
    assert result.feasible, result.reasons
    return result


def test_a_bias_evens_loads_out_over_steps(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "routing": {"popularity_zipf": 0.8},
        "training": {
            "steps": 25,
            "routing_tokens": 1024,
            "global_batch_sequences": 16,
            "progress_start": 0.5,
            "progress_end": 0.5,
        },
    }
    plain = run(tmp_path, **parts)
    free = run(tmp_path, policies={"routing": {"kind": "loss_free", "rate": 0.01}}, **parts)
    bip = run(tmp_path, policies={"routing": "bip"}, **parts)
    curve = [load.maxvio for load in free.loads]
    assert np.mean(curve[-5:]) < 0.5 * curve[0]
    assert np.mean([load.maxvio for load in plain.loads[-5:]]) > 0.8 * plain.loads[0].maxvio
    assert bip.loads[0].maxvio < 0.3 * plain.loads[0].maxvio  # even from the first step on
    table = free.steps_table()
    assert table["maxvio"].tolist() == curve
    assert len(table["step_ns"]) == 25


class Recording(Router):
    """Takes the first K experts and writes down what it is told."""

    couples: ClassVar[bool] = False
    stateful: ClassVar[bool] = True
    calls: ClassVar[list[tuple[int, int, int, int]]] = []

    def route(self, score_TE: Any, context: Any) -> Any:
        from moesim.routing import Routed

        seen = int(context.state.get("seen", np.zeros(1))[0])
        Recording.calls.append((context.step, context.layer, len(score_TE), seen))
        assert context.training
        assert len(context.position_T) == len(context.sequence_T) == len(score_TE)
        ids = np.tile(np.arange(context.top_k, dtype=np.int32), (len(score_TE), 1))
        return Routed(ids, np.full(ids.shape, 0.25, np.float32), {"seen": np.array([seen + 1.0])})


class Coupled(Recording):
    couples: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("policy", "scope", "calls"), [(Recording, "rank", 1), (Coupled, "rank", 32), (Coupled, "micro_batch", 4)]
)
def test_state_goes_on(policy: type[Recording], scope: str, calls: int, tmp_path: Path) -> None:
    """One call a step and layer; a router that balances within a batch is called for every micro-batch of each rank (of
    all ranks), its state going from micro-batch to micro-batch."""
    s = training_scenario(tmp_path, training={"routing_scope": scope, "measured_from_step": 2})
    Recording.calls.clear()
    policies = dataclasses.replace(s.policies, routing=policy())
    result = simulate(dataclasses.replace(s, policies=policies))
    assert isinstance(result, TrainingResult)
    seen = [c for c in Recording.calls if c[1] == 0]
    assert len(seen) == 3 * calls
    assert {c[2] for c in seen} == {4 * 8 * 128 // calls}
    per_micro = calls // 4 if calls > 1 else 1
    owners = [i % per_micro for i in range(len(seen))]
    for owner in set(owners):
        assert [c[3] for c, o in zip(seen, owners, strict=True) if o == owner] == list(range(len(seen) // per_micro))
    assert result.loads[0].maxvio == pytest.approx(64 / 4 - 1)
    assert len(result.times) == 3


def test_samples_stand_for_all(tmp_path: Path) -> None:
    whole = run(tmp_path, training={"routing_tokens": 1024})
    part = run(tmp_path, training={"routing_tokens": 256})
    assert whole.sampling is not None
    assert part.sampling is not None
    assert (whole.sampling.routed, part.sampling.routed) == (128, 32)
    for a, b in zip(whole.loads, part.loads, strict=True):
        assert a.wanted == b.wanted == 32 * 128 * 4 * 3
        assert a.run == pytest.approx(b.run)
    assert part.loads[0].maxvio_micro_batch > whole.loads[0].maxvio_micro_batch
    assert any("256" in w or "32 are routed" in w for w in part.warnings)
    assert not any("are routed" in w for w in whole.warnings)
    told = part.to_json()["summary"]["routing"]["sampling"]
    assert told["maxvio_by_chance"] == pytest.approx(2 * told["maxvio_by_chance_of_all"])


COUPLED: dict[str, dict[str, Any]] = {
    "rank": {"capacity": {"factor": 1.0}},
    "least": {"capacity": {"factor": 1.0, "min_capacity": 16}},
    "score": {"capacity": {"factor": 1.25, "drop": "score"}},
    "reroute": {"capacity": {"factor": 1.0, "drop": "reroute"}},
    "sequence": {"capacity": {"factor": 1.0, "scope": "sequence"}},
    "expert_choice": {"policies": {"routing": {"kind": "expert_choice", "scope": "sequence"}}},
    "segment": {"policies": {"routing": {"kind": "segment", "tokens": 8}}},
    "sinkhorn": {"policies": {"routing": "sinkhorn"}, "capacity": {"factor": 1.0}},
}


class Kept(StepRouter):
    """Writes down what each rank's micro-batch chose and what a capacity left of it, by layer and the number of its
    first token."""

    found: ClassVar[dict[tuple[int, int], Any]] = {}
    left: ClassVar[list[Any]] = []

    def _count(self, expert_TW: Any, gate_TW: Any, score_TE: Any, layer: int, step: int) -> Any:
        Kept.left.clear()
        out = super()._count(expert_TW, gate_TW, score_TE, layer, step)
        rows, _ = self._rows(step)
        routed = self.sampling.routed
        for block, first in enumerate(rows[::routed].tolist()):
            part = slice(block * routed, (block + 1) * routed)
            # wider where another rank's tokens took more experts: places without one are left out
            told = [[row[row >= 0].tolist() for row in ids[part]] for ids in (expert_TW, *Kept.left)]
            Kept.found[layer, first] = told
        return out


def limit_and_tell(*given: Any) -> Any:
    out = limit(*given)
    Kept.left.append(out.expert_TW)
    return out


@pytest.mark.parametrize("name", COUPLED)
def test_whole_scopes_stand_for_the_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of whole scopes chooses and drops in each what the whole run does there, choice by choice, so shares
    differ by which are asked alone: 2 of each 8 ranks."""
    monkeypatch.setattr(module, "StepRouter", Kept)
    monkeypatch.setattr("moesim.training.routing.limit", limit_and_tell)

    def routed(tokens: int) -> tuple[TrainingResult, dict[Any, Any]]:
        Kept.found = {}
        training = {"routing_tokens": tokens, "micro_batch_sequences": 2, "global_batch_sequences": 64}
        return run(tmp_path, routing={"popularity_zipf": 0.5}, training=training, **COUPLED[name]), Kept.found

    (whole, all_of), (part, some) = routed(2048), routed(512)
    assert len(some) * 4 == len(all_of) == 3 * 3 * 4 * 8
    assert {len(told) for told in some.values()} == {2 if "capacity" in COUPLED[name] else 1}
    for key, choice in some.items():
        assert all_of[key] == choice
    assert part.sampling is not None
    assert part.sampling.kind == "scopes"
    assert (part.sampling.micro_batches, part.sampling.ranks, part.sampling.routed) == (4, 2, 256)
    for a, b in zip(whole.loads, part.loads, strict=True):
        assert b.wanted == pytest.approx(a.wanted, rel=1e-12)
        assert b.dropped == pytest.approx(a.dropped, rel=0.05, abs=1e-3 * a.wanted)
        assert b.run == pytest.approx(a.run, rel=0.03)
        assert b.nvlink == pytest.approx(a.nvlink, rel=0.05)
    told = part.to_json()["summary"]["routing"]
    assert told["experts_per_token"] == pytest.approx(
        whole.to_json()["summary"]["routing"]["experts_per_token"], rel=0.02
    )
    (warning,) = [w for w in part.warnings if "routed" in w]
    assert "2 of each one's 8 data-parallel ranks" in warning
    assert "drops more" not in warning


def test_default_samples_are_whole_micro_batches(tmp_path: Path) -> None:
    """256 ranks, 128 tokens each: fewer micro-batches, each with all its ranks and its own loads."""
    shape = Shape(micro_batches=64, replicas=2, ranks=256, experts=128, layers=3)
    training = TrainingSpec(sequence_tokens=128, global_batch_sequences=64 * 512)
    found = plan(shape, training, "rank")
    assert (found.kind, found.micro_batches, found.replicas, found.ranks, found.routed) == ("scopes", 16, 1, 256, 128)
    assert plan(shape, training, None).kind == "tokens"
    some = plan(shape, training.model_copy(update={"routing_tokens": 1000}), "rank")
    assert (some.kind, some.micro_batches, some.replicas, some.ranks, some.routed) == ("scopes", 64, 1, 7, 128)
    assert plan(shape, training.model_copy(update={"routing_tokens": 1000}), "all").kind == "parts"
    long = TrainingSpec(sequence_tokens=1 << 20, global_batch_sequences=64 * 512)
    cut = plan(shape, long, "rank")  # 2^26 scores hold 2^19 tokens of 128 experts
    assert (cut.kind, cut.micro_batches, cut.ranks, cut.routed) == ("parts", 1, 1, 1 << 19)


@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 4), st.integers(1, 300),
    st.one_of(st.none(), st.integers(1, 4000)), st.sampled_from([None, "sequence", "rank", "all"]), st.booleans(),
)  # fmt: skip
def test_a_plan_keeps_its_limits(
    micros: int, replicas: int, ranks: int, sequences: int, length: int, tokens: int | None, scope: Any, couples: bool
) -> None:
    shape = Shape(micros, replicas, ranks, 64, 2)
    training = TrainingSpec(
        sequence_tokens=length,
        micro_batch_sequences=sequences,
        global_batch_sequences=sequences * micros * replicas * ranks,
        routing_tokens=tokens,
    )
    s = plan(shape, training, scope)
    assert 1 <= s.micro_batches <= micros
    assert 1 <= s.replicas <= replicas
    assert 1 <= s.ranks <= ranks
    assert 1 <= s.routed <= s.real == sequences * length
    assert (s.kind == "all") == (s.tokens_routed == s.tokens)
    if tokens and scope is not None:
        assert s.replicas * s.ranks * s.routed <= tokens
    if s.kind == "scopes":
        assert s.routed % length == 0
        assert scope == "sequence" or s.routed == s.real
        assert scope != "all" or s.ranks == ranks
    at_T = offsets(s, length, couples)
    assert len(at_T) == s.routed
    assert at_T[0] >= 0
    assert at_T[-1] < s.real
    assert (np.diff(at_T) > 0).all()
    if s.kind == "scopes" and scope == "sequence":
        assert (np.bincount(at_T // length)[np.unique(at_T // length)] == length).all()
    first, stands = spread(s.micro_batches, micros)
    np.testing.assert_array_equal(stands[first], np.arange(s.micro_batches))


def test_what_is_left_out_is_stood_for(tmp_path: Path) -> None:
    """Three of seven micro-batches, of one of two replicas: pairs by position and by micro-batch add up to all."""
    training = {"global_batch_sequences": 56, "routing_tokens": None}
    parts: dict[str, Any] = {"parallel": {"dp": 4, "ep": 4, "replicas": 2}, "capacity": {"factor": 1.0}}
    s = training_scenario(tmp_path, training=training, **parts)
    assert s.training is not None
    layout = Layout.of(s.model, s.cluster, 1, 4, 4)
    placement, scores = module._placement(s, layout), module.training_scores(s, 1)

    def routed(router: StepRouter) -> Any:
        return router.route(0)

    given: Any = (s.model, layout, s.training, s.policies.routing, placement, s.capacity, scores, 2, 1)
    whole = routed(StepRouter(*given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.training.sampling._CELLS", 64 * 3 * 4 * 128)
        router = StepRouter(*given)
    assert (router.sampling.kind, router.sampling.micro_batches, router.sampling.replicas) == ("scopes", 3, 1)
    part = routed(router)
    stands = [0, 0, 0, 3, 3, 5, 5]  # the first of each stretch
    np.testing.assert_array_equal(part.wanted_MRLE, whole.wanted_MRLE[stands][:, [0, 0]])
    np.testing.assert_array_equal(part.slot_MRLS, whole.slot_MRLS[stands][:, [0, 0]])
    for mine, theirs in zip(part.ports, whole.ports, strict=True):
        np.testing.assert_array_equal(mine, theirs[stands][:, [0, 0]])
    assert part.wanted_N.sum() == whole.wanted_N.sum() == 56 * 128 * 4 * 3
    assert part.dropped_N.sum() == part.wanted_MRLE.sum() - part.rows_MRLP.sum()


def test_few_ranks_send_for_all(tmp_path: Path) -> None:
    """One rank's tokens stand for what eight ranks on two nodes send: through every port about as much, where they
    would all leave one node for the other if that rank alone sent them."""
    s = training_scenario(tmp_path, policies={"routing": "sinkhorn"})
    assert s.training is not None
    layout = dataclasses.replace(Layout.of(s.model, s.cluster, 1, 8, 8), gpus_per_node=4)
    placement, scores = module._placement(s, layout), module.training_scores(s, 1)

    def ports(tokens: int) -> Any:
        training = s.training.model_copy(update={"routing_tokens": tokens})  # type: ignore[union-attr]
        router = StepRouter(s.model, layout, training, s.policies.routing, placement, None, scores, 1, 1)
        return router.sampling.ranks, router.route(0).ports

    (eight, whole), (one, part) = ports(1024), ports(128)
    assert (eight, one) == (8, 1)
    for theirs, mine in zip(whole, part, strict=True):
        assert mine.mean() == pytest.approx(theirs.mean(), rel=0.15)


@pytest.mark.parametrize("least", [0, 40])
def test_a_cut_scope_has_its_part_of_the_room(least: int, tmp_path: Path) -> None:
    """1,024 of 2,048 tokens have half the room on average, whatever rounding and least capacity say; so drops differ
    by chance (1 / sqrt(2 pi n) of n choices where experts are alike: 5.0 % of 64, 3.5 % of 128), and are no fewer."""
    training = {"sequence_tokens": 2048, "global_batch_sequences": 16, "steps": 2}
    parts: dict[str, Any] = {"routing": {"popularity_zipf": 0.5}, "capacity": {"factor": 0.25, "min_capacity": least}}
    whole = run(tmp_path, training=training, **parts).to_json()["summary"]
    cut = run(tmp_path, training={**training, "routing_tokens": 1024}, **parts)
    found = cut.to_json()["summary"]
    assert found["routing"]["sampling"]["kind"] == "parts"
    assert whole["drops"]["share"] - 0.005 < found["drops"]["share"] < whole["drops"]["share"] + 0.015
    (warning,) = [w for w in cut.warnings if "routed" in w]
    assert "some 5% in place of 4%" in warning


def test_a_share_of_a_room_is_rounded_both_ways(tmp_path: Path) -> None:
    s = training_scenario(tmp_path, capacity={"factor": 1.0}, training={"routing_tokens": 40})
    assert s.training is not None
    assert s.capacity is not None
    layout = Layout.of(s.model, s.cluster, 1, 8, 8)
    scores = module.training_scores(s, 1)
    router = StepRouter(
        s.model, layout, s.training, s.policies.routing, module._placement(s, layout), s.capacity, scores, 1, 1
    )
    rooms = np.concatenate([router._rooms(np.full(100, 40), 128, s.capacity, 1.0, (step, 0)) for step in range(40)])
    assert set(rooms.tolist()) == {2, 3}  # 8 * 40 / 128 = 2.5
    assert rooms.mean() == pytest.approx(2.5, abs=4 * 0.5 / np.sqrt(4000))
    np.testing.assert_array_equal(router._rooms(np.full(3, 128), 128, s.capacity, 1.0, (0, 0)), [8, 8, 8])


def test_chance_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    loads = np.stack(
        [np.bincount(rng.random((4096, 64)).argpartition(4, axis=1)[:, :4].ravel(), minlength=64) for _ in range(40)]
    )
    found = float((loads.max(axis=1) / loads.mean(axis=1)).mean() - 1)
    assert maxvio_by_chance(4096, 4, 64) == pytest.approx(found, rel=0.1)
    assert maxvio_by_chance(10, 8, 8) == 0.0


def test_every_token_is_met_once(tmp_path: Path) -> None:
    """Numbers of tokens differ over steps, micro-batches, replicas and ranks, and positions follow from them."""
    s = training_scenario(tmp_path, parallel={"dp": 2, "ep": 2, "replicas": 4})
    seen: list[Any] = []

    class Watching(StepRouter):
        def _rows(self, step: int) -> Any:
            out = super()._rows(step)
            seen.append(out)
            np.testing.assert_array_equal(out[0] % 128, self._position_T)
            np.testing.assert_array_equal(out[0] // 128, out[1])
            return out

    original = module.StepRouter
    try:
        module.StepRouter = Watching  # type: ignore[misc]
        simulate(s)
    finally:
        module.StepRouter = original  # type: ignore[misc]
    rows = np.concatenate([r for r, _ in seen])
    np.testing.assert_array_equal(np.sort(rows), np.arange(3 * 32 * 128))


@pytest.mark.parametrize("parts", [{}, {"cluster": {"device": "h100_sxm_datasheet", "nodes": 4, "gpus_per_node": 2}}])
def test_an_exchange_moves_what_serving_would(parts: dict[str, Any], tmp_path: Path) -> None:
    """Counts by slot and copies through ports of a micro-batch are those of a prompt step with the same tokens."""
    s = training_scenario(tmp_path, training={"routing_tokens": 1024, "global_batch_sequences": 8, "steps": 1}, **parts)
    chosen: list[Any] = []

    class Watching(StepRouter):
        def _count(self, expert_TW: Any, *more: Any) -> Any:
            chosen.append(expert_TW)
            return super()._count(expert_TW, *more)

    layout = Layout.of(s.model, s.cluster, 1, 8, 8)
    placement = module._placement(s, layout)
    assert s.training is not None
    scores = module.training_scores(s, 1)
    found = Watching(s.model, layout, s.training, s.policies.routing, placement, None, scores, 1, 1).route(0)
    ids = np.stack(chosen, axis=1).astype(np.uint8)
    source = RoutingSource(ids, np.array([0, 1024]), 64, 4, False, "as chosen")
    prices = ExpertPrices(s.model, layout, Operators(s.cluster.profile, False), 8)
    replay = Replay(source, np.array([1024]), np.array([1]), 1)
    served = TokenExperts(source, replay, placement, s.policies.dispatch, layout, prices, 1)
    rank_N = np.repeat(np.arange(8), 128)
    rows = np.arange(1024)
    count, ports, *_ = served._slots(ids, rows, np.array([0, 1024]), rank_N)
    np.testing.assert_array_equal(found.slot_MRLS[0, 0], count[0])
    assert ports is not None
    assert found.ports is not None
    for mine, theirs in zip(found.ports, ports, strict=True):
        np.testing.assert_allclose(mine[0, 0], theirs[0])


def test_model_flop_by_hand(tmp_path: Path) -> None:
    """6 N + 12 L H Q T (PaLM, appendix B): the tiny model with 4 of its experts a token, 128 tokens."""
    model = training_scenario(tmp_path).model
    products = 4 * 4 * 256 * 256 + 3 * 256 * 64 + 3 * 256 * 512 + 1024 * 256 + 3 * 4 * 3 * 256 * 128
    assert model_flop_per_token(model, 128, 4.0) == 6 * products + 12 * 4 * 8 * 32 * 128
    dense = training_scenario(tmp_path, tiny_model(tmp_path, moe=None), parallel={}).model
    assert (
        model_flop_per_token(dense, 128, 0.0) == 6 * (4 * 4 * 65536 + 4 * 3 * 256 * 512 + 1024 * 256) + 12 * 4 * 32768
    )


def test_figures_agree_with_each_other(tmp_path: Path) -> None:
    summary = run(tmp_path).to_json()["summary"]
    seconds = summary["step_ms"]["mean"] / 1e3
    assert summary["throughput"]["tok_per_s"] == pytest.approx(32 * 128 / seconds)
    flop = summary["training"]["model_flop_per_token"] * 32 * 128
    assert summary["mfu"] == pytest.approx(flop / seconds / 8 / 989e12)
    low, high = summary["step_ms"]["interval90"]["mean"]
    assert low < summary["step_ms"]["mean"] < high
    assert summary["routing"]["experts_per_token"] == pytest.approx(4.0)
