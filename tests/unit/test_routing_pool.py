"""Counting a pool's ids, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.traces.routing_npz import read
from moesim.workload.pool import RoutingSource, count_ids, count_steps, id_dtype, ideal_counts

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "routing"


def by_hand(ids, experts):
    count = np.zeros((ids.shape[1], experts), np.int64)
    for layer in range(ids.shape[1]):
        for expert in range(experts):
            count[layer, expert] = (ids[:, layer] == expert).sum()
    return count


def pool(tokens, layers, experts, top_k, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, :top_k].astype(id_dtype(experts))
    return RoutingSource(ids, np.array([0, tokens], np.int64), experts, top_k, False, "test")


@pytest.mark.parametrize(
    "shape", [(0, 3, 8, 2), (1, 1, 1, 1), (7, 3, 8, 2), (3000, 5, 64, 6), (40, 58, 256, 8), (9, 4, 300, 3)]
)
def test_counts_are_exact(shape):
    source = pool(*shape)
    count = source.count_LE()
    assert count.dtype == np.int64
    np.testing.assert_array_equal(count, by_hand(source.expert_TLK, source.num_experts))


def test_many_layers_of_many_experts_do_not_wrap():
    ids = np.full((2, 400, 1), 299, np.uint16)
    count = count_ids(ids, 300)
    assert count[:, 299].tolist() == [2] * 400
    assert count.sum() == 800


@pytest.mark.parametrize("per_step", [0, 1, 3, 700])
def test_steps_counted_at_once_are_the_steps_counted_alone(per_step):
    source = pool(500, 6, 64, 6)
    rng = np.random.default_rng(per_step)
    lengths = rng.integers(0, 2 * per_step + 1, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = rng.integers(0, 500, offsets[-1])
    count = count_steps(source, rows, offsets)
    assert count.shape == (40, 6, 64)
    for step in range(40):
        alone = count_ids(source.expert_TLK[rows[offsets[step] : offsets[step + 1]]], 64)
        np.testing.assert_array_equal(count[step], alone)


def test_no_steps():
    assert count_steps(pool(5, 2, 4, 2), np.array([], np.int64), np.array([0])).shape == (0, 2, 4)


@pytest.mark.skipif(not DATA.exists(), reason="recorded routing is in ../shared/data, which is not here")
def test_the_recorded_trace_is_counted_exactly():
    source = read(DATA / "esft_dsv2lite_intent.npz")
    np.testing.assert_array_equal(source.count_LE(), by_hand(source.expert_TLK, 64))


def test_ideal_counts_are_whole_and_even():
    count = ideal_counts(np.array([0, 1, 64, 100]), 5, 64, 6)
    assert count.sum(2).tolist() == [[0] * 5, [6] * 5, [384] * 5, [600] * 5]
    assert (count.max(2) - count.min(2)).max() == 1
    assert (count[2] == 6).all()
    assert len({tuple(row) for row in count[1].tolist()}) == 5, "the experts with one more differ by layer"


def test_sequences_can_be_taken_apart():
    source = RoutingSource(np.arange(10, dtype=np.uint8).reshape(10, 1, 1), np.array([0, 3, 4, 10]), 10, 1, True, "x")
    part = source.take_sequences(np.array([2, 0]))
    assert part.expert_TLK.ravel().tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert part.sequence_start.tolist() == [0, 6, 9]
