"""Which row a token takes: the trace's while it lasts, then the same sequence's again; whatever the order of asking."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.workload.pool import RoutingSource
from moesim.workload.replay import RESAMPLE_TOKENS, Replay


def pool(lengths, **more):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return RoutingSource(np.zeros((starts[-1], 1, 1), np.uint8), starts, 4, 1, True, "test", **more)


LENGTHS = [5, 40, 17, 1, 300]


def replay(requests=23, prompt=30, output=50, seed=7, **more):
    return Replay(pool(LENGTHS, **more), np.full(requests, prompt), np.full(requests, output), seed)


def test_positions_within_the_sequence_are_its_rows_in_order():
    r = replay()
    for request in range(23):
        q = r.sequence_R[request]
        start, length = r.source.sequence_start[q], LENGTHS[q]
        rows = r.rows(np.full(length, request), np.arange(length))
        assert rows.tolist() == list(range(start, start + length))


def test_past_the_end_rows_stay_in_the_sequence_and_follow_each_other():
    r = replay()
    for request in range(23):
        q = r.sequence_R[request]
        start, length = r.source.sequence_start[q], LENGTHS[q]
        rows = r.rows(np.full(400, request), np.arange(length, length + 400)) - start
        assert rows.min() >= 0
        assert rows.max() < length
        step = (np.diff(rows) % length == 1 % length).reshape(-1)
        inside = np.arange(1, 400) % RESAMPLE_TOKENS != 0
        assert step[inside].all()


def test_resampled_rows_cover_the_sequence_evenly():
    r = Replay(pool([50]), np.full(4000, 1), np.full(4000, 1), 3)
    rows = r.rows(np.arange(4000), np.full(4000, 50))
    count = np.bincount(rows, minlength=50)
    assert ((count - 80) ** 2 / 80).sum() < 85.4  # chi-squared, 49 degrees: 0.1 %
    other = r.rows(np.arange(4000), np.full(4000, 50 + RESAMPLE_TOKENS))
    assert abs(np.corrcoef(rows, other)[0, 1]) < 0.06


def test_any_order_of_asking_gives_the_same_rows():
    rng = np.random.default_rng(0)
    request, position = rng.integers(0, 23, 5000), rng.integers(0, 500, 5000)
    at_once = replay().rows(request, position)
    order = rng.permutation(5000)
    r = replay()
    one_by_one = np.empty(5000, np.int64)
    for chunk in np.array_split(order, 97):
        one_by_one[chunk] = r.rows(request[chunk], position[chunk])
    np.testing.assert_array_equal(at_once, one_by_one)


def test_another_seed_gives_other_sequences_and_other_rows():
    request, position = np.arange(23).repeat(200), np.tile(np.arange(300, 500), 23)
    a, b = replay(seed=1), replay(seed=2)
    assert (a.sequence_R != b.sequence_R).any()
    assert (a.rows(request, position) != b.rows(request, position)).mean() > 0.5


def test_every_sequence_once_a_round_in_a_fresh_order():
    r = replay(requests=20)
    rounds = r.sequence_R.reshape(4, 5)
    assert (np.sort(rounds, axis=1) == np.arange(5)).all()
    assert len({tuple(turn) for turn in rounds.tolist()}) > 1


def test_arguments_broadcast_and_are_left_alone():
    r = replay()
    request, position = np.arange(23)[:, None], np.arange(60)
    before = position.copy()
    rows = r.rows(request, position)
    assert rows.shape == (23, 60)
    np.testing.assert_array_equal(position, before)
    np.testing.assert_array_equal(rows[3], r.rows(np.full(60, 3), position))


def test_shares_add_up_and_agree_with_marking_rows():
    rng = np.random.default_rng(5)
    prompt, output = rng.integers(1, 60, 40), rng.integers(1, 60, 40)
    r = Replay(pool(LENGTHS), prompt, output, 11)
    tokens = prompt + output - 1
    seen, replayed, reused, resampled = set(), 0, 0, 0
    for request in range(40):
        length = LENGTHS[r.sequence_R[request]]
        for position, row in enumerate(r.rows(np.full(tokens[request], request), np.arange(tokens[request])).tolist()):
            if position >= length:
                resampled += 1
            elif row in seen:
                reused += 1
            else:
                replayed += 1
                seen.add(row)
    assert r.shares() == (replayed, reused, resampled)
    assert sum(r.shares(np.array([3, 7]), np.array([2, 9]))) == 11


def test_requests_pass_through_drift_windows_in_order():
    windows = np.array([0, 0, 1, 1, 1], np.int16)
    r = replay(requests=20, window_Q=windows)
    assert windows[r.sequence_R].tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize("requests", [0, 1])
def test_few_requests(requests):
    r = replay(requests=requests)
    assert len(r.sequence_R) == requests
    assert r.rows(np.array([], np.int64), np.array([], np.int64)).shape == (0,)
    assert sum(r.shares()) == requests * 79
