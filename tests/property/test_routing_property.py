"""Routing, for any shape: counts conserve choices, pools hold distinct experts, replay stays in its sequence."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.workload.pool import RoutingSource, count_steps, ideal_counts
from moesim.workload.replay import Replay
from moesim.workload.synthetic import Groups, SyntheticSpec, generate

SHARE = st.floats(0, 1)


@st.composite
def models(draw):
    number = draw(st.sampled_from([1, 2, 4]))
    experts = number * draw(st.integers(1, 12))
    kept = draw(st.integers(1, number))
    top_k = draw(st.integers(1, experts * kept // number))
    return experts, top_k, Groups(number, kept)


@settings(max_examples=60, deadline=None)
@given(
    models(), st.integers(1, 60), st.integers(1, 20), SHARE, SHARE, SHARE, st.floats(0, 0.9), st.floats(0, 0.9),
    st.integers(1, 5), st.integers(0, 9), st.integers(0, 5), st.floats(0, 5),
)  # fmt: skip
def test_any_pool_holds_k_distinct_experts_within_the_kept_groups(
    model, tokens, length, repeat, affinity, coactivation, topic, drift, domains, prefix, seed, skew
):
    experts, top_k, groups = model
    spec = SyntheticSpec(
        pool_tokens=tokens, sequence_tokens=length, repeat=repeat, affinity=affinity, coactivation=coactivation,
        topic_spread=topic, topic_tokens=3, drift=drift, drift_windows=2, domains=domains, prefix_tokens=prefix,
    )  # fmt: skip
    weight = np.arange(1.0, experts + 1)[None].repeat(2, 0) ** -skew
    pool = generate(spec, weight, top_k, seed, groups)
    assert pool.expert_TLK.shape == (tokens, 2, top_k)
    assert pool.expert_TLK.max() < experts
    ids = np.sort(pool.expert_TLK, axis=2)
    assert (ids[:, :, 1:] > ids[:, :, :-1]).all()
    group = np.sort(pool.expert_TLK // (experts // groups.number), axis=2)
    assert ((np.diff(group, axis=2) > 0).sum(2) + 1 <= groups.kept).all()
    assert pool.count_LE().sum() == tokens * 2 * top_k


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 9), st.integers(0, 99))
def test_steps_conserve_choices(lengths, top_k, seed):
    pool = generate(SyntheticSpec(pool_tokens=40, sequence_tokens=8), np.ones((3, 9)), top_k, seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.random.default_rng(seed).integers(0, 40, offsets[-1])
    count = count_steps(pool, rows, offsets)
    assert count.sum(2).tolist() == [[n * top_k] * 3 for n in lengths]
    assert (count <= np.asarray(lengths).reshape(-1, 1, 1)).all()
    ideal = ideal_counts(np.asarray(lengths, np.int64), 3, 9, top_k)
    assert ideal.sum(2).tolist() == count.sum(2).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(0, 1 << 40),
)
def test_replay_stays_in_its_sequence_and_shares_add_up(lengths, requests, seed):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pool = RoutingSource(np.zeros((starts[-1], 1, 1), np.uint8), starts, 4, 1, True, "test")
    prompt, output = np.array(requests).T
    replay = Replay(pool, prompt, output, seed)
    request = np.arange(len(requests)).repeat(120)
    position = np.tile(np.arange(120), len(requests))
    rows = replay.rows(request, position)
    sequence = replay.sequence_R[request]
    assert ((rows >= starts[sequence]) & (rows < starts[sequence + 1])).all()
    shares = replay.shares()
    assert sum(shares) == int((prompt + output - 1).sum())
    assert 0 < shares.replayed <= pool.num_tokens
