"""What every precision policy promises, whatever it does: shapes, sizes, maps, and sameness."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, Compressed, MissCosts, OffloadContext, RouteSample, StepRoutes
from moesim.offload.compression import apply, check, gone_LE, stored_bytes_LE, stored_LE, total_bytes
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("precision")
L, E, K, T = 3, 12, 3, 120
BITS = 16.0


def context(fit=True, seed=0, pooled=False):
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(T, L, E)) + np.linspace(0, 1.5, E)
    ids = np.argsort(-score, axis=2)[:, :, :K]
    weight = np.sort(rng.dirichlet(np.ones(K), (T, L)))[:, :, ::-1]
    sample = RouteSample(ids, np.repeat(np.arange(4), T // 4), weight)
    costs = MissCosts(1e6, lambda rows: 1e3, lambda rows: 1e4, 0.0, 1e5)
    return OffloadContext(
        num_layers=L, num_experts=E, top_k=K, size_LE=np.full((L, E), 3 * 64 * 48 * 2, np.int64),
        capacity_bytes=200 * 3 * 64 * 48 * 2, staging=1, popularity_LE=sample.count_LE(E),
        semantics=CacheSemantics(pooled=pooled), costs=costs, seed=0, fit=sample if fit else None,
        expert_shape=(64, 48),
    )  # fmt: skip


def step(number=0, weights=True, prompt=True):
    sample = context(seed=5).fit
    return StepRoutes(number, sample.expert_TLK, sample.sequence_T, sample.weight_TLK if weights else None, prompt)


def equal(a: Compressed, b: Compressed) -> bool:
    same = (a.bits_LE == b.bits_LE).all() and (a.map_LE == b.map_LE).all()
    return bool(same) and (a.miss_bits, a.extra_bytes, a.quality) == (b.miss_bits, b.extra_bytes, b.quality)


def test_the_kinds_are_found():
    assert {"none", "uniform", "edgemoe", "hobbit", "mc_moe", "mote", "eaquant", "mole", "mc_smoe", "premoe"} <= set(
        KINDS
    )


@pytest.mark.parametrize("fit", [True, False], ids=["sample", "nothing known"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_a_cache_can_use(kind, fit):
    ctx = context(fit)
    before = ctx.size_LE.copy(), ctx.popularity_LE.copy()
    compressed = load_policy("precision", kind).compress(ctx, BITS)
    check(ctx, compressed)
    assert compressed.bits_LE.shape == compressed.map_LE.shape == (L, E)
    assert (compressed.bits_LE > 0).all()
    assert (compressed.bits_LE <= BITS).all()
    own = stored_LE(compressed)
    assert own.any(axis=1).all()
    # who serves others serves itself
    for layer in range(L):
        served = compressed.map_LE[layer][~gone_LE(compressed)[layer]]
        assert own[layer][served].all()
    assert (ctx.size_LE == before[0]).all()
    assert (ctx.popularity_LE == before[1]).all()
    assert equal(compressed, load_policy("precision", kind).compress(context(fit), BITS))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_once_and_never_more_than_before(kind):
    ctx = context()
    compressed = load_policy("precision", kind).compress(ctx, BITS)
    size = stored_bytes_LE(ctx, compressed, BITS)
    own = stored_LE(compressed)
    assert (size[~own] == 0).all()
    assert (size[own] > 0).all()
    exact = float((ctx.size_LE * compressed.bits_LE / BITS)[own].sum())
    assert exact - 1 <= size.sum() <= exact + own.sum()
    total = total_bytes(ctx, compressed, BITS)
    assert total == size.sum() + compressed.extra_bytes
    assert total <= ctx.size_LE.sum() or kind == "none"
    assert (total < ctx.size_LE.sum()) == (kind not in ("none", "hobbit"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_of_what_is_stored(kind):
    ctx = context()
    compressed = load_policy("precision", kind).compress(ctx, BITS)
    new = apply(ctx, compressed, BITS)
    gone = gone_LE(compressed)
    assert (new.size_LE >= 1).all()
    assert new.capacity_bytes + compressed.extra_bytes == ctx.capacity_bytes
    # popularity moves to who serves, and only that of gone experts is lost
    assert new.popularity_LE.sum() == pytest.approx(ctx.popularity_LE[~gone].sum())
    assert (new.popularity_LE[~stored_LE(compressed)] == 0).all()
    np.testing.assert_allclose(new.fit.count_LE(E), new.popularity_LE)


@pytest.mark.parametrize("kind", KINDS)
def test_serving_drops_and_moves_the_same_choices_each_time(kind):
    policy = load_policy("precision", kind)
    for layer in range(L):
        dropped = policy.prune(step(), layer)
        assert dropped is None or (dropped.shape == (T, K) and dropped.dtype == bool and not dropped.all(axis=1).any())
        moved = policy.drift(step(), layer, E)
        assert moved is None or moved.shape == (T, K)
        for found, again in ((dropped, policy.prune(step(), layer)), (moved, policy.drift(step(), layer, E))):
            assert found is again is None or (found == again).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_knows_a_parameter_by_another_name(kind):
    with pytest.raises(BadInput, match="colour"):
        load_policy("precision", {"kind": kind, "colour": 3})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"kind": "uniform", "width": 16.0}, "must make weights smaller"),
        ({"kind": "edgemoe", "average": 1.5}, "at least the least width"),
        ({"kind": "edgemoe", "sensitivity": [[1.0] * E]}, "a row for each MoE layer"),
        ({"kind": "mc_moe", "average": 1.0}, "at least one expert of each"),
        ({"kind": "mc_moe", "error": [[1.0]] * L}, "36 numbers"),
        ({"kind": "mole", "latent": 1.0}, "smaller than what they replace"),
        ({"kind": "mc_smoe", "groups": 13}, "at most the 12 experts"),
        ({"kind": "mc_smoe", "rank": 48}, "smaller than the matrix"),
        ({"kind": "premoe", "kept": 2}, "3 .experts a token. to 12"),
        ({"kind": "premoe", "kept": 13}, "3 .experts a token. to 12"),
    ],
)
def test_what_cannot_be_is_refused_with_its_mend(value, why):
    policy = load_policy("precision", value)
    with pytest.raises(BadInput, match=why):
        policy.compress(context(), BITS)


@pytest.mark.parametrize(
    ("value", "why"),
    [({"kind": "hobbit", "skip": 0.2}, "skip"), ({"kind": "mc_moe", "drop": 0.5}, "drop")],
)
def test_shares_of_gate_weights_need_gate_weights(value, why):
    with pytest.raises(BadInput, match=why):
        load_policy("precision", value).prune(step(weights=False), 0)


def test_shares_out_of_order_are_refused():
    with pytest.raises(BadInput, match="in order"):
        load_policy("precision", {"kind": "hobbit", "high": 0.2, "low": 0.5})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bits_LE": np.zeros((L, E))}, "positive"),
        ({"bits_LE": np.ones((L, E + 1))}, "must be"),
        ({"map_LE": np.full((L, E), E + 1)}, "mapped to"),
        ({"map_LE": np.tile(np.roll(np.arange(E), 1), (L, 1))}, "must serve itself"),
        ({"map_LE": np.full((L, E), E)}, "at least one expert"),
        ({"miss_bits": ((0.1, 4.0), (0.5, 16.0))}, "highest share"),
        ({"extra_bytes": -1}, "negative"),
    ],
)
def test_what_is_no_answer_is_refused(change, why):
    good = {"bits_LE": np.full((L, E), 4.0), "map_LE": np.tile(np.arange(E), (L, 1))}
    with pytest.raises(BadInput, match=why):
        check(context(), Compressed(**good | change))
