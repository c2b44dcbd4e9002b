"""Routing over training steps: states go on, loads even out, samples stand for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.tokens import TokenExperts
from moesim.layout import Layout
from moesim.routing import Router
from moesim.simulate import simulate
from moesim.training import run as module
from moesim.training.result import TrainingResult, maxvio_by_chance, model_flop_per_token
from moesim.training.routing import StepRouter
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
    import dataclasses

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
