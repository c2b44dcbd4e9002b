"""Every prefetch and every rebatching policy keeps its family's promises. A file added to moesim/offload/prefetch/ or
moesim/offload/rebatching/ is found here by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, RouteSample, StepRoutes
from moesim.offload.cache import ExpertCache
from moesim.offload.cached import Policy as Cached
from moesim.offload.drive import Driver
from moesim.offload.eviction.lru import Policy as Lru
from moesim.policy import load_policy, policy_class, policy_kinds

KINDS = policy_kinds("prefetch")
INNER = ("markov", "previous_token", "frequency", "predictor")
ALL = [
    *KINDS,
    *({"kind": "horizon", "inner": inner} for inner in INNER if inner in KINDS),
    {"kind": "next_layer", "ahead": 3},
    {"kind": "predictor", "ahead": None, "before_step": True, "names": 6},
    {"kind": "predictor", "ahead": 2, "stride": True},
    {"kind": "markov", "ahead": 3, "combine": "product"},
    {"kind": "previous_token", "ahead": 5, "memory": 2},
    {"kind": "frequency", "count": "served", "ahead": 2},
    {"kind": "trace_matching", "rows": "later", "capacity": 3, "names": 4},
    {"kind": "trace_matching", "keep": "latest", "decay": "none", "threshold": 0.2},
]
LAYERS, EXPERTS, TOP_K = 5, 12, 3
COSTS = MissCosts(1000.0, lambda rows: 10.0, lambda rows: 90.0, 5.0, 400.0)


def name(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


def routes(tokens, seed):
    rng = np.random.default_rng(seed)
    score = rng.random((tokens, LAYERS, EXPERTS)) ** rng.lognormal(0, 0.7, EXPERTS)
    return np.argsort(-score, axis=2)[:, :, :TOP_K].astype(np.uint8)


def frozen(array):
    array.setflags(write=False)
    return array


def made_steps(seed=3):
    """A prompt of two sequences, decoding, a sequence that ends and one that comes, nothing at all, ids of nobody."""
    sequences = [[1] * 6 + [2] * 5, [1, 2], [1, 2], [2], [], [2, 7], [2, 7], [1, 7]]
    out = []
    for number, owners in enumerate(sequences):
        ids = routes(len(owners), seed * 100 + number)
        if number % 2:
            ids[:, :, -1] = EXPERTS
        out.append(StepRoutes(number, frozen(ids), frozen(np.array(owners, np.int64)), prompt=number == 0))
    return out


def made_context(seed=0, fit=True, size=1000):
    sample = RouteSample(frozen(routes(60, 9)), frozen(np.repeat(np.arange(6), 10)))
    popularity = frozen(sample.count_LE(EXPERTS) if fit else np.ones((LAYERS, EXPERTS)))
    sizes = frozen(np.full((LAYERS, EXPERTS), size, np.int64))
    return OffloadContext(
        LAYERS, EXPERTS, TOP_K, sizes, 4 * LAYERS * size, 2, popularity, CacheSemantics(completion="logical"), COSTS,
        seed, sample if fit else None,
    )  # fmt: skip


def told(step, layer):
    ids = np.unique(step.expert_TLK[:, layer])
    return [(layer * EXPERTS + int(e), "load") for e in ids if e < EXPERTS]


def asked(kind, steps, context=None):
    """What a policy wants: by (step, layer it was asked at)."""
    state = load_policy("prefetch", kind).start(made_context() if context is None else context)
    out = {}
    for number, step in enumerate(steps):
        state.begin(step)
        for layer in range(-1, LAYERS):
            if layer >= 0:
                state.told(layer, told(step, layer))
            out[number, layer] = state.wanted(layer)
    return out


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_what_is_wanted_exists_comes_later_and_is_sorted(kind):
    for (_, layer), wanted in asked(kind, made_steps()).items():
        assert all(layer < w.layer < LAYERS and 0 <= w.expert < EXPERTS for w in wanted)
        scores = [w.score for w in wanted]
        assert scores == sorted(scores, reverse=True)
        assert np.isfinite(scores).all()
        assert len({w[:2] for w in wanted}) == len(wanted)


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_the_same_again_and_other_seeds_matter_where_something_is_drawn(kind):
    first = asked(kind, made_steps())
    assert first == asked(kind, made_steps())
    other = asked(kind, made_steps(), made_context(seed=1))
    drawn = getattr(load_policy("prefetch", kind), "oracle", False) or "capacity" in kind  # starts of clusters
    assert (first != other) == drawn


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_routes_of_later_steps_change_nothing(kind):
    steps, others = made_steps(), made_steps(seed=4)
    mixed = asked(kind, steps[:4] + others[4:])
    plain = asked(kind, steps)
    assert all(mixed[at] == plain[at] for at in plain if at[0] < 4)


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_routes_of_later_layers_change_nothing_but_for_those_who_say_that_they_look(kind):
    """An oracle sees a later layer's routes through its accuracy: what it names of other layers must not change."""
    oracle = getattr(load_policy("prefetch", kind), "oracle", False)
    steps = made_steps()
    plain = asked(kind, steps)
    for at in (0, 2):
        for layer in range(1, LAYERS):
            ids = steps[at].expert_TLK.copy()
            ids[:, layer:] = (ids[:, layer:] + 5) % EXPERTS
            changed = asked(kind, [*steps[:at], replace(steps[at], expert_TLK=ids)])
            for before in range(-1, layer):
                mine, his = ([w for w in a[at, before] if not oracle or w.layer < layer] for a in (changed, plain))
                assert mine == his


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_limits_are_kept_and_keep_the_best(kind):
    value = {"kind": kind} if isinstance(kind, str) else kind
    if "limit" not in policy_class("prefetch", value["kind"]).model_fields:
        return
    free = asked(kind, made_steps())
    for limits, most in (({"limit": 2}, 2), ({"limit_bytes": 3500}, 3), ({"limit_bytes": 999}, 0)):
        cut = asked({**value, **limits}, made_steps())
        assert all(len(cut[at]) <= most for at in free)
        if value["kind"] not in ("predictor", "previous_token", "frequency"):  # who are not asked twice for a layer
            assert all(cut[at] == free[at][:most] for at in free)


@pytest.mark.parametrize("kind", KINDS)
def test_who_learns_says_so_where_there_is_nothing_to_learn_from(kind):
    policy = load_policy("prefetch", kind)
    if kind in ("markov", "trace_matching", "frequency"):
        with pytest.raises(BadInput, match=rf"'{kind}'.*Give") as caught:
            policy.start(made_context(fit=False))
        assert str(caught.value).endswith(".")
        return
    state = policy.start(made_context(fit=False))
    state.begin(made_steps()[0])
    assert isinstance(state.wanted(0), list)


@pytest.mark.parametrize("kind", ["markov", "trace_matching"])
def test_routes_of_another_model_are_refused(kind):
    context = made_context()
    fit = RouteSample(context.fit.expert_TLK[:, :2], context.fit.sequence_T)
    with pytest.raises(BadInput, match=r"5 MoE layers.* have 2"):
        load_policy("prefetch", kind).start(replace(context, fit=fit))


class Nobody:
    """A device that does nothing and has every transfer done at once."""

    def __getattr__(self, what):
        return {"arrived": lambda: [], "cancel": lambda key: True}.get(what, lambda *a, **k: None)


@pytest.mark.parametrize("completion", ["logical", "raced"])
@pytest.mark.parametrize("kind", ALL, ids=name)
def test_under_the_driver_every_look_up_is_served_and_the_cache_stays_whole(kind, completion):
    context = replace(made_context(), semantics=CacheSemantics(completion=completion))
    plan = Cached().plan(context)
    cache = ExpertCache(context.size_K, context.group_K, plan.capacity_G, Lru().start(context))
    prefetch = load_policy("prefetch", kind).start(context)
    driver = Driver.start(context, Cached(), cache, prefetch, Nobody(), plan)
    for step in made_steps():
        driver.step(step)
        cache._check()
    count = driver.counters
    experts = sum(len(told(step, layer)) for step in made_steps() for layer in range(LAYERS))
    assert count.look_ups == experts
    assert 0 <= count.prefetched_used <= count.prefetched
    assert (count.prefetched == 0) == (kind == "none")


# ---- rebatching

SPLITS = [
    *policy_kinds("rebatching"),
    {"kind": "expertflow", "accuracy": 0.7, "swaps": 50},
    {"kind": "expertflow", "accuracy": 0.0, "starts": 1},
    {"kind": "expert_queues", "pool": 1},
]


@pytest.mark.parametrize("kind", SPLITS, ids=name)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 37])
def test_every_token_runs_once_in_batches_that_are_not_too_large(kind, tokens):
    policy = load_policy("rebatching", kind)
    ids = routes(tokens, 5)
    ids[::3, :, 1:] = EXPERTS
    step = StepRoutes(4, frozen(ids), frozen(np.arange(tokens)))
    parts = policy.split(step, EXPERTS, 8)
    assert all(0 < len(part) <= 8 and part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate([np.zeros(0, int), *parts]).tolist()) == list(range(tokens))
    again = policy.split(step, EXPERTS, 8)
    assert [p.tolist() for p in again] == [p.tolist() for p in parts]
    assert policy.pool >= 1
    # whoever pools so many batches makes no more batches of them
    assert len(parts) == -(-tokens // 8)


@pytest.mark.parametrize("kind", SPLITS, ids=name)
def test_a_pool_is_parted_by_its_own_tokens_alone(kind):
    policy = load_policy("rebatching", kind)
    reach = 8 * policy.pool
    ids = routes(2 * reach, 6)
    parts = policy.split(StepRoutes(0, ids, np.arange(2 * reach)), EXPERTS, 8)
    own = policy.split(StepRoutes(0, ids[:reach], np.arange(reach)), EXPERTS, 8)
    assert [p.tolist() for p in parts[: len(own)]] == [p.tolist() for p in own]
