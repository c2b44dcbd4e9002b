"""The published MaxVio curves say what results/validation/routing.md says of them; the driver of the simulated ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing.maxvio import BALANCED, balanced_from, policy_of, simulate, smooth

FOLDER = Path(__file__).parents[2] / "results" / "validation"
REAL = json.loads((FOLDER / "routing_maxvio.json").read_text())
CURVES = json.loads((FOLDER / "routing_maxvio_simulated.json").read_text())["maxvio_S"]
MEASURED = {name: row["maxvio_S"] for name, row in REAL["methods"].items()}
EACH = {"real": MEASURED, "recorded": CURVES["recorded"]}
LAST = slice(-50, None)


@pytest.mark.parametrize(
    ("kind", "name"),
    # bip_cold on recorded scores is a miss: 14 sweeps from zero do not even out the unbalanced run's at steps 20 to 40
    [("real", "bip"), ("real", "bip_cold"), ("recorded", "bip")],
)  # fmt: skip
def test_bip_is_balanced_from_the_first_step_to_the_last(kind, name):
    curve_S = np.array(EACH[kind][name])
    assert curve_S[0] < BALANCED
    assert curve_S.max() < BALANCED


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", ["loss_free", "auxiliary_loss"])
def test_loss_free_and_auxiliary_loss_converge_over_steps(kind, name):
    curve_S = np.array(EACH[kind][name])
    assert curve_S[0] > 3 * BALANCED
    assert curve_S[LAST].mean() < BALANCED
    start = balanced_from(curve_S)
    assert start is not None
    assert 10 < start < len(curve_S)


@pytest.mark.parametrize("kind", EACH)
def test_expert_choice_is_even_and_no_balancing_is_not(kind):
    assert max(EACH[kind]["expert_choice"]) == 0
    assert min(EACH[kind]["none"]) > 3 * BALANCED


def test_the_run_without_balancing_is_simulated_as_it_was():
    """The same scores, the same choice; rounding the stored ones to float16 tips some."""
    apart_S = np.abs(np.array(CURVES["recorded"]["none"]) - MEASURED["none"])
    assert np.median(apart_S) <= 0.002
    assert apart_S.max() < 0.1


@pytest.mark.parametrize("name", ["loss_free", "bip"])
def test_simulated_levels_are_near_the_real_ones_without_a_fit(name):
    real, simulated = (np.mean(curves[name][LAST]) for curves in (MEASURED, CURVES["recorded"]))
    assert 0.5 < simulated / real < 2


@pytest.mark.parametrize("name", REAL["methods"])
def test_every_method_learned_more_than_how_often_bytes_occur(name):
    row = REAL["methods"][name]
    assert row["held_out_loss"] < 0.7 * REAL["text"]["unigram_entropy_nats"]
    assert row["train_loss_last"] < 0.7 * REAL["text"]["unigram_entropy_nats"]


def test_the_driver_by_hand():
    score_SLTE = np.zeros((3, 2, 8, 4), np.float16)
    score_SLTE[..., 0] = 1
    base = {"alpha": 0.01, "rate": 0.5, "iterations": 4, "warm": True, "temperature": 1.0, "scoring": "sigmoid"}
    # experts 0 and 1 take all: 8 of a mean of 4
    np.testing.assert_allclose(simulate(score_SLTE, policy_of(base | {"kind": "topk"}), 2), 1.0)
    np.testing.assert_allclose(simulate(score_SLTE, policy_of(base | {"kind": "expert_choice"}), 2), 0.0)
    # a bias of 0.5 moves all tokens to the other two and back
    np.testing.assert_allclose(simulate(score_SLTE, policy_of(base | {"kind": "loss_free"}), 2), 1.0)
    assert policy_of(base | {"kind": "hash"}) is None


def test_when_a_curve_counts_as_balanced():
    assert balanced_from(np.full(20, 0.5)) == 0
    assert balanced_from(np.full(20, 2.0)) is None
    falling = np.array([2.0] * 10 + [0.0] * 10)
    assert balanced_from(falling) == 14  # five of the last ten steps at 2 make a mean of 1, which is not above it
    np.testing.assert_allclose(smooth(np.array([1.0, 3.0])), [1.0, 2.0])
