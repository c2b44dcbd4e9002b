"""Score models against recorded scores (results/validation/synthetic_scores.md has all of it, over all layers).

Here: four layers of the recorded traces, fitted on one half of the sequences and compared with the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from moesim.traces.routing_npz import read
from moesim.workload import routing_stats as stats
from moesim.workload.pool import RoutingSource
from moesim.workload.scores import DrawnScores, RecordedScores, ScoreSpec
from moesim.workload.scores_synthetic import SyntheticScores, _past_prefix, fit
from moesim.workload.synthetic_fit import split_sequences

ROUTING = Path(__file__).parents[2].parent / "shared" / "data" / "routing"
TRACES = ("esft_dsv2lite_intent", "esft_dsv2lite_summary")
TAILS: tuple[Literal["gumbel", "spaced"], ...] = ("gumbel", "spaced")
SEEN = 3

pytestmark = pytest.mark.skipif(not ROUTING.is_dir(), reason="reads recorded traces from ../shared, which is not here")


@pytest.fixture(scope="module", params=TRACES)
def trace(request):
    source = read(ROUTING / f"{request.param}.npz")
    assert source.weight_TLK is not None
    order = np.lexsort((source.expert_TLK, -source.weight_TLK), axis=-1)[:, ::8]
    return replace(
        source,
        expert_TLK=np.take_along_axis(source.expert_TLK[:, ::8], order, -1),
        weight_TLK=np.take_along_axis(source.weight_TLK[:, ::8], order, -1),
        layer_index=None,
    )


@pytest.mark.parametrize("model", TAILS)
def test_recorded_scores_of_a_real_trace(trace: RoutingSource, model):
    scores = RecordedScores(trace, ScoreSpec(model=model), 0, norm_topk_prob=False)
    assert scores.whole
    score_NE = scores.scores(np.arange(trace.num_tokens), 2)
    assert np.isfinite(score_NE).all()
    found = np.argsort(-score_NE, axis=1, kind="stable")
    np.testing.assert_array_equal(found[:, :6], trace.expert_TLK[:, 2])
    ordered = np.take_along_axis(score_NE, found, 1)
    assert (ordered[:, 5] > ordered[:, 6]).all()
    # the probabilities add up to 1 wherever the K-th stored weight leaves room for that
    mass = np.exp(score_NE.astype(np.float64)).sum(1)
    room = trace.weight_TLK[:, 2, -1].astype(np.float64) * 58 > 2 * (1 - trace.weight_TLK[:, 2].astype(float).sum(1))
    room &= trace.weight_TLK[:, 2].astype(float).sum(1) < 1 - 1e-3
    assert room.mean() > 0.3
    np.testing.assert_allclose(mass[room], 1, atol=1e-5)


def hidden_ranks(trace: RoutingSource, model) -> tuple[float, float, float]:
    """Recall of ranks 4-6 by a tail that saw ranks 1-3, and the tail's share said and recorded of the next ranks."""
    assert trace.weight_TLK is not None
    held_out = split_sequences(trace, 1)
    ids, weight = held_out.expert_TLK, held_out.weight_TLK
    assert weight is not None
    seen = replace(held_out, expert_TLK=ids[:, :, :SEEN], weight_TLK=weight[:, :, :SEEN], top_k=SEEN)
    scores = RecordedScores(seen, ScoreSpec(model=model), 0, norm_topk_prob=False)
    figures = []
    for layer in range(trace.num_layers):
        prob = np.exp(scores.scores(np.arange(held_out.num_tokens), layer).astype(np.float64))
        guess = np.argsort(-prob, axis=1)[:, SEEN:6]
        real = weight[:, layer].astype(np.float64)
        mass = np.maximum(1 - real[:, :SEEN].sum(1), 1e-5)
        recall = (guess[:, :, None] == ids[:, layer, None, SEEN:]).any(2).mean()
        said = (np.take_along_axis(prob, guess, 1).sum(1) / mass).mean()
        figures.append((recall, said, (real[:, SEEN:].sum(1) / mass).mean()))
    recall, said, recorded = np.mean(figures, axis=0)
    return float(recall), float(said), float(recorded)


def test_tails_foretell_the_mass_of_hidden_ranks_and_popularity_some_of_their_experts(trace: RoutingSource):
    chance = 3 / 61
    for model in TAILS:
        recall, said, recorded = hidden_ranks(trace, model)
        # equal probabilities for all the tail would say 0.049, a third of what is recorded
        assert said == pytest.approx(recorded, rel=0.15)
        assert chance < recorded / 2.5
        if model == "gumbel":
            assert recall > 1.15 * chance
        else:
            assert recall == pytest.approx(chance, rel=0.1)


def test_the_generator_foretells_the_gates_of_held_out_sequences(trace: RoutingSource):
    spec = fit(split_sequences(trace, 0))
    held_out = _past_prefix(split_sequences(trace, 1))
    made = SyntheticScores(spec, held_out.num_tokens, 50).pool()
    assert held_out.weight_TLK is not None
    assert made.weight_TLK is not None
    gates = [-np.sort(-p.weight_TLK.astype(np.float64), axis=2) for p in (held_out, made)]
    entropy = []
    for gate in gates:
        inside = np.maximum(gate, 1e-12) / gate.sum(2, keepdims=True)
        entropy.append(-(inside * np.log(inside)).sum(2).mean())
    assert entropy[1] == pytest.approx(entropy[0], rel=0.05)
    for first, last in ((0, 1), (0, 6), (5, 6)):  # the highest weight, the mass of the K, the lowest weight
        found, true = (gate[:, :, first:last].sum(2).mean() for gate in reversed(gates))
        assert found == pytest.approx(true, rel=0.1)
    assert stats.coactivation(made).mean() == pytest.approx(stats.coactivation(held_out).mean(), rel=0.15)
    assert stats.affinity(made).mean() == pytest.approx(stats.affinity(held_out).mean(), rel=0.15)
    apart = 0.5 * np.abs(stats.popularity(made) - stats.popularity(held_out)).sum(1).mean()
    assert apart < 0.1


def test_scores_drawn_for_bare_ids_have_gates_like_recorded_ones(trace: RoutingSource):
    bare = DrawnScores(replace(trace, weight_TLK=None), ScoreSpec(), 0)
    mass = []
    for layer in range(trace.num_layers):
        prob = np.exp(bare.scores(np.arange(trace.num_tokens), layer).astype(np.float64))
        prob /= prob.sum(1, keepdims=True)
        mass.append(-np.sort(-prob, axis=1)[:, :6].sum(1).mean())
    assert trace.weight_TLK is not None
    recorded = trace.weight_TLK.astype(np.float64).sum(2).mean()
    assert np.mean(mass) == pytest.approx(recorded, rel=0.15)
