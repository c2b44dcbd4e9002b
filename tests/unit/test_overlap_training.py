"""Overlap of exchange, experts and sums of gradients in training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.overlap.gradients import Slot, partition
from moesim.scenario.load import Scenario
from moesim.simulate import simulate
from moesim.training.hidden import LayerOptions, exposed_ns
from moesim.training.result import TrainingResult
from tests.build import tiny_model, training_scenario
from tests.unit.test_overlap_serving import WIDE

SHARDED = {"dp": 16, "ep": 2, "replicas": 2}  # each expert over the 8 ranks of a node


def case(folder: Path, communication: dict[str, Any] | None, parallel: dict[str, int], **training: Any) -> Scenario:
    training = {
        "sequence_tokens": 2048,
        "global_batch_sequences": 32,
        "micro_batch_sequences": 1,
        "steps": 2,
    } | training
    model = tiny_model(folder, **WIDE)
    return training_scenario(folder, model, communication=communication, parallel=parallel, training=training)


def trained(*args: Any, **training: Any) -> TrainingResult:
    result = simulate(case(*args, **training))
    assert isinstance(result, TrainingResult)
    assert result.feasible
    return result


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("overlap", "parallel"), [("pipeline", {"dp": 16, "ep": 16, "replicas": 2}), ("fsmoe", SHARDED)]
)
def test_the_parts_add_up_to_the_steps(tmp_path: Path, overlap: str, parallel: dict[str, int], recompute: str) -> None:
    result = trained(tmp_path, {"overlap": overlap}, parallel, recompute=recompute)
    assert result.ledger.total == sum(t.total for t in result.times)
    assert min(result.ledger.ns.values()) >= 0


def test_one_chunk_is_no_overlap(tmp_path: Path) -> None:
    parallel = {"dp": 16, "ep": 16, "replicas": 2}
    plain, one = (trained(tmp_path, c, parallel) for c in (None, {"overlap": "pipeline", "degree": 1}))
    assert [t.total for t in plain.times] == [t.total for t in one.times]
    assert plain.ledger.ns == one.ledger.ns


@pytest.mark.parametrize("overlap", ["pipeline", "fsmoe"])
def test_a_degree_that_is_chosen_is_no_slower_than_a_given_one(tmp_path: Path, overlap: str) -> None:
    parallel = {"dp": 16, "ep": 16} if overlap == "pipeline" else SHARDED
    best, *given = (trained(tmp_path, {"overlap": overlap, "degree": d}, parallel).times[0] for d in (None, 1, 3))
    assert best.total <= min(t.total for t in given)
    assert best.total < given[0].total


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_sums_that_share_a_stream_hide_no_more_than_on_their_own(tmp_path: Path, zero: int) -> None:
    """And no less than sums that wait for the end."""
    shared, alone = (
        trained(tmp_path, {"overlap": "fsmoe"}, SHARDED, zero_stage=zero, overlap_grad_reduce=hide).times[0]
        for hide in (True, False)
    )
    assert shared.compute == alone.compute
    assert 0 <= shared.reduction_exposed <= alone.reduction_exposed
    assert shared.reduction == alone.reduction


def test_exposed_time_by_hand() -> None:
    """A bucket of 10, of which 1 starts it, is ready before a layer that takes 12 with 6 of the stream busy, or 15
    with 4: 5 hide under the first, and the other 4 cost 4 there; under the second all hides and it costs 3."""
    layer = LayerOptions(np.array([12.0, 15.0]), np.array([6.0, 4.0]))
    assert exposed_ns([[20, None, layer]], np.array([10]), 1) == 3
    assert exposed_ns([[20, None, LayerOptions(np.array([12.0]), np.array([6.0]))]], np.array([10]), 1) == 4
    assert exposed_ns([[20, None, layer, 30]], np.array([10]), 1) == 0  # later work hides what is left
    assert exposed_ns([[20, layer, None]], np.array([10]), 1) == 10  # nothing runs after it
    assert partition([Slot(*layer, 9.0)], 1.0).option_N.tolist() == [1]


def test_two_micro_batches_are_not_of_training(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="two_batch cuts the batches of a serving step, not of training"):
        case(tmp_path, {"overlap": "two_batch"}, {"dp": 16, "ep": 16})
