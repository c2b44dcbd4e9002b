"""The synthetic routing model: each knob moves its own statistic, and the others little."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from moesim.workload import routing_stats as stats
from moesim.workload.synthetic import Groups, SyntheticSpec, generate, inclusion, popularity_weights

LAYERS, EXPERTS, TOP_K = 6, 64, 6
BASE = {"popularity_lognormal_sigma": 0.7, "pool_tokens": 8192, "sequence_tokens": 256}


def measured(**knobs):
    spec = SyntheticSpec(**{**BASE, **knobs})
    weight = popularity_weights(spec, LAYERS, EXPERTS, 3)
    pool = generate(spec, weight, TOP_K, 3)
    skip = spec.prefix_tokens
    lags = stats.autocorrelation(pool, [1, 8, 64, 200], skip).mean(1)
    share = np.sort(stats.popularity(pool), axis=1)[:, ::-1]
    window = np.array(
        [pool.expert_TLK[pool.sequence_start[q] : pool.sequence_start[q + 8], 0].astype(int).ravel() for q in (0, 24)]
    )
    ends = [np.bincount(w, minlength=EXPERTS) / len(w) for w in window]
    return {
        "hottest": share[:, 0].mean() * EXPERTS,
        "repeat": lags[0] - lags[1],
        "near": lags[1] - lags[3],
        "far": lags[3],
        "coactivation": stats.coactivation(pool, skip).mean(),
        "tie": stats.tie(pool, skip),
        "drift": np.abs(ends[0] - ends[1]).sum(),
        "prefix": stats.common_prefix(pool),
    }


PLAIN = measured()
NOISE = {
    "hottest": 0.45, "repeat": 0.03, "near": 0.03, "far": 0.02, "coactivation": 0.2, "tie": 0.06, "drift": 0.11,
    "prefix": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "moved", "least", "most", "also"),
    [
        ({"popularity_lognormal_sigma": 1.2}, "hottest", 2.0, 6.0, ()),
        ({"repeat": 0.3}, "repeat", 0.25, 0.35, ()),
        ({"coactivation": 0.6}, "coactivation", 1.0, 1.8, ()),
        ({"affinity": 0.8}, "tie", 0.45, 0.85, ()),
        ({"topic_spread": 0.08}, "near", 0.04, 0.08, ()),
        # Tokens of one domain are alike in all layers and slots: that is what a domain is, and what ties and
        # co-activation then see of it.
        ({"domains": 8, "domain_spread": 0.08}, "far", 0.05, 0.09, ("coactivation", "tie", "drift")),
        ({"drift": 0.03}, "drift", 0.12, 0.9, ("far", "coactivation", "tie")),
        ({"prefix_tokens": 32}, "prefix", 32, 33, ()),
    ],
)
def test_each_knob_moves_its_own_statistic(knobs, moved, least, most, also):
    found = measured(**knobs)
    change = {name: found[name] - PLAIN[name] for name in PLAIN}
    assert least <= change[moved] <= most, change
    for name, value in change.items():
        if name != moved and name not in also:
            assert abs(value) <= NOISE[name], (name, value)


def test_two_knobs_together_each_keep_their_own():
    found = measured(repeat=0.25, affinity=0.9, coactivation=0.6)
    assert found["repeat"] == pytest.approx(0.25, abs=0.04)
    assert found["tie"] > 0.55
    assert found["coactivation"] > 0.6


@pytest.mark.parametrize("groups", [Groups(), Groups(8, 4), Groups(8, 3)])
@pytest.mark.parametrize("knobs", [{}, {"repeat": 0.3, "affinity": 0.7, "coactivation": 0.5, "prefix_tokens": 9}])
def test_the_popularity_asked_for_is_the_popularity_drawn(groups, knobs):
    spec = SyntheticSpec(pool_tokens=20_000, sequence_tokens=100, **knobs)
    weight = np.random.default_rng(0).lognormal(0, 0.6, (2, EXPERTS))
    pool = generate(spec, weight, TOP_K, 5, groups)
    wanted = inclusion(weight, TOP_K, groups)
    np.testing.assert_allclose(wanted.sum(1), TOP_K)
    found = pool.count_LE() / pool.num_tokens
    assert (((found - wanted) ** 2) * 20_000 / (wanted * (1 - wanted))).mean() < (
        1.4 if not knobs else 12
    )  # copies add variance
    ids = np.sort(pool.expert_TLK, axis=2)
    assert (ids[:, :, 1:] > ids[:, :, :-1]).all()
    if groups.limited:
        group = pool.expert_TLK // (EXPERTS // groups.number)
        kinds = (np.diff(np.sort(group, axis=2), axis=2) > 0).sum(2) + 1
        assert kinds.max() <= groups.kept


def test_inclusion_is_capped_and_complete():
    weight = np.array([[1e12, 1.0, 1.0, 0.0, 0.0, 1.0]])
    chance = inclusion(weight, 3)
    assert chance.sum() == pytest.approx(3)
    assert chance.max() <= 1
    assert chance[0, 0] > 0.99
    np.testing.assert_array_equal(inclusion(np.ones((1, 4)), 4), np.ones((1, 4)))
    assert inclusion(np.eye(5)[:1], 4).sum() == pytest.approx(4)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (2, 2), (8, 2), (9, 8), (300, 4)])
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_small_and_odd_shapes(experts, top_k, tokens):
    spec = SyntheticSpec(
        popularity_zipf=3.0, pool_tokens=tokens, sequence_tokens=7, repeat=0.5, affinity=0.5, coactivation=0.5,
        domains=3, topic_spread=0.3, topic_tokens=2, drift=0.2, prefix_tokens=3,
    )  # fmt: skip
    pool = generate(spec, popularity_weights(spec, 3, experts, 1), top_k, 1)
    assert pool.expert_TLK.shape == (tokens, 3, top_k)
    assert pool.expert_TLK.max() < experts
    ids = np.sort(pool.expert_TLK, axis=2)
    assert (ids[:, :, 1:] > ids[:, :, :-1]).all()
    assert pool.sequence_start[-1] == tokens


def test_the_same_seed_the_same_pool():
    spec = SyntheticSpec(**BASE, repeat=0.2, domains=4, topic_spread=0.05, drift=0.05)
    weight = popularity_weights(spec, 2, 16, 9)
    a, b, c = (generate(spec, weight, 2, seed).expert_TLK for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5


def test_layers_do_not_depend_on_how_many_follow():
    spec = SyntheticSpec(**BASE, repeat=0.2, affinity=0.5)
    weight = popularity_weights(spec, 4, 16, 9)
    np.testing.assert_array_equal(
        generate(spec, weight, 2, 1).expert_TLK[:, :2], generate(spec, weight[:2], 2, 1).expert_TLK
    )


def test_domains_and_windows_are_told():
    spec = SyntheticSpec(pool_tokens=4096, sequence_tokens=64, domains=4, drift=0.05, drift_windows=8)
    pool = generate(spec, np.ones((1, 8)), 2, 1)
    assert np.bincount(pool.domain_Q).tolist() == [16] * 4
    assert pool.window_Q.tolist() == sorted(pool.window_Q.tolist())
    assert set(pool.window_Q) == set(range(8))


@pytest.mark.parametrize(
    "knobs",
    [{"repeat": 1.5}, {"repeat": -0.1}, {"repeat": float("nan")}, {"pool_tokens": 0}, {"affinity": "much"},
     {"sticky": 1}, {"popularity_zipf": 1.0, "popularity_lognormal_sigma": 1.0}, {"domain_spread": 1.0}],
)  # fmt: skip
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(ValidationError):
        SyntheticSpec(**knobs)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="between 1 and 4"):
        generate(SyntheticSpec(pool_tokens=4), np.ones((1, 4)), 5, 1)
    with pytest.raises(ValueError, match="cannot serve"):
        generate(SyntheticSpec(pool_tokens=4), np.ones((1, 8)), 3, 1, Groups(8, 2))
