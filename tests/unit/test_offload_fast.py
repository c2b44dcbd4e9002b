"""Cache cores: against definitions spelt out here, against exhaustive search, against the cache and its policies, each
compiled and in plain Python."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, fast, replay, stacks
from moesim.offload.conventions import MOE_LRC, TEXTBOOK, Convention, hit_curve, look_ups_of
from moesim.offload.fast import LookUps, found, next_uses
from moesim.offload.stacks import best_split_of_slots, hits_by_slots
from moesim.policy import load_policy

ESFT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "routing" / "esft_dsv2lite_intent.npz"


@pytest.fixture(params=["plain", "compiled"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of every core, whatever the size of the trace."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(fast, "_COMPILED_LOOK_UPS", 0)
    monkeypatch.setenv("MOESIM_COMPILED", str(int(request.param == "compiled")))
    return str(request.param)


def calls_of(calls: list[list[int]], experts: int, cut: tuple[int, ...] = ()) -> LookUps:
    ids = np.array([x for call in calls for x in call], np.uint16)
    ends = np.r_[0, np.cumsum([len(call) for call in calls])].astype(np.int64)
    return LookUps(ids, ends, np.array([0, *cut, len(calls)], np.int64), experts)


def random_calls(seed: int, most: int) -> tuple[list[list[int]], int]:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 9))
    weight = rng.random(experts) ** 2 + 0.01
    sizes = rng.integers(0 if most > 1 else 1, min(most, experts) + 1, 40)
    draw = lambda n: rng.choice(experts, n, replace=False, p=weight / weight.sum())  # noqa: E731
    return [sorted(draw(n).tolist()) for n in sizes], experts


def by_definition(
    calls: list[list[int]], slots: int, policy: str, bypass: bool, pinned: bool, counts: str
) -> list[bool]:
    """Everything is looked up in the past and the future anew, every time. Returns hits of all look-ups."""
    flat = [(c, x) for c, call in enumerate(calls) for x in call]
    inside: dict[int, int] = {}  # expert -> the look-up that it entered with
    hits: list[bool] = []

    def worth(x: int, done: int, call: int) -> tuple[int, int]:
        """After `done` look-ups."""
        last = max(n for n in range(done) if flat[n][1] == x)
        if policy == "lru":
            return (last, 0)
        if policy == "lfu":
            since = inside.get(x, last) if counts == "resident" else 0
            return (sum(flat[n][1] == x for n in range(since, done)), last)
        if pinned:  # by calls; of equals the lower key leaves
            return (-min((c for c, y in flat if y == x and c > call), default=10**6), x)
        return (-next((n for n in range(done, len(flat)) if flat[n][1] == x), 10**6), 0)

    for c, call in enumerate(calls):
        first = len(hits)
        hits += [x in inside for x in call]
        asked = set(call)
        todo = [first + i for i in range(len(call)) if not pinned or not hits[first + i]]
        if pinned and bypass and policy != "lru":
            done = first + len(call)
            todo.sort(key=lambda n: worth(flat[n][1], done, c)[: 1 if policy == "opt" else 2], reverse=True)
        for n in todo:
            x = flat[n][1]
            done = first + len(call) if pinned else n + 1
            if x in inside:
                continue
            if len(inside) >= slots:
                may = [y for y in inside if not (pinned and y in asked)]
                if not may:
                    continue
                victim = min(may, key=lambda y: worth(y, done, c))
                mine, least = worth(x, done, c), worth(victim, done, c)
                if bypass and policy != "lru" and not (mine[0] > least[0] if policy == "opt" else mine > least):
                    continue
                del inside[victim]
            inside[x] = n
    return hits


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize(("policy", "counts"), [("lru", "all"), ("lfu", "all"), ("lfu", "resident"), ("opt", "all")])
def test_every_rule_is_its_definition(mode: str, policy: str, counts: str, most: int) -> None:
    for seed in range(6):
        calls, experts = random_calls(seed, most)
        look_ups = calls_of(calls, experts)
        for slots, bypass, pinned in itertools.product((1, 2, 3, experts), (False, True), (False, True)):
            if counts == "resident" and not pinned and most > 1:
                continue  # who was pushed out and comes back within one call has no count that papers define
            got = found(look_ups, slots, policy, bypass=bypass, pinned=pinned, counts=counts)
            assert got.tolist() == by_definition(calls, slots, policy, bypass, pinned, counts), (seed, slots)


@pytest.mark.parametrize("policy", ["lru", "lfu", "opt"])
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(("most", "pinned"), [(1, True), (3, False), (3, True)])
def test_one_pass_gives_what_each_size_gives(mode: str, policy: str, bypass: bool, most: int, pinned: bool) -> None:
    for seed in range(5):
        calls, experts = random_calls(seed + 50, most)
        look_ups = replace(calls_of(calls, experts, cut=(13, 21)), weight_N=None)
        look_ups = replace(look_ups, weight_N=np.arange(1, len(look_ups.id_N) + 1))
        curve = hits_by_slots(look_ups, policy, bypass=bypass, pinned=pinned)
        for slots in range(experts + 1):
            hit = np.concatenate(
                [
                    by_definition(part, slots, policy, bypass, pinned, "all")
                    for part in (calls[:13], calls[13:21], calls[21:])
                ]
            ).astype(bool)
            assert curve[slots] == look_ups.weight_N[hit].sum()


def most_hits(trace: list[int], slots: int, bypass: bool) -> int:
    """The best of all choices of victims."""

    @cache
    def best(n: int, inside: frozenset[int]) -> int:
        if n == len(trace):
            return 0
        x = trace[n]
        if x in inside:
            return 1 + best(n + 1, inside)
        if len(inside) < slots:
            return max(best(n + 1, inside | {x}), best(n + 1, inside) if bypass else 0)
        options = [best(n + 1, inside - {y} | {x}) for y in inside]
        return max([*options, best(n + 1, inside)] if bypass else options)

    return best(0, frozenset())


@pytest.mark.parametrize("bypass", [False, True])
def test_opt_is_the_most_that_any_choice_gives(mode: str, bypass: bool) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        trace = rng.integers(0, 5, 14).tolist()
        look_ups = calls_of([[x] for x in trace], 5)
        curve = hits_by_slots(look_ups, "opt", bypass=bypass)
        assert curve.tolist() == [0, *(most_hits(trace, slots, bypass) for slots in range(1, 6))]


def most_hits_of_calls(calls: list[list[int]], slots: int) -> int:
    """The best of all that a cache may hold after each call: any of what it had and what came."""

    @cache
    def best(c: int, inside: frozenset[int]) -> int:
        if c == len(calls):
            return 0
        every = sorted(inside | set(calls[c]))
        keeps = itertools.combinations(every, min(slots, len(every)))
        return len(inside & set(calls[c])) + max(best(c + 1, frozenset(keep)) for keep in keeps)

    return best(0, frozenset())


def test_the_bound_of_calls_is_the_most_that_any_cache_holds(mode: str) -> None:
    for seed in range(12):
        calls, experts = random_calls(seed, 3)
        calls = [[x for x in call if x < 5] for call in calls[:9]]
        look_ups = calls_of(calls, min(experts, 5))
        curve = hits_by_slots(look_ups, "bound")
        assert curve[1:].tolist() == [most_hits_of_calls(calls, slots) for slots in range(1, look_ups.experts + 1)]


@pytest.mark.parametrize("traces", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_bounds_hold_on_random_traces(mode: str, traces: int) -> None:
    """MIN + bypass >= MIN >= every policy that evicts, a larger LRU never hits less, on every trace; in calls of
    several look-ups nobody passes the bound."""
    for seed in range(traces if mode == "compiled" else traces // 6):
        calls, experts = random_calls(seed, 1)
        look_ups = calls_of(calls, experts)
        best, least = hits_by_slots(look_ups, "opt", bypass=True), hits_by_slots(look_ups, "opt")
        assert (best >= least).all()
        lru = hits_by_slots(look_ups, "lru")
        assert (np.diff(lru) >= 0).all()
        for curve in (lru, hits_by_slots(look_ups, "lfu"), hits_by_slots(look_ups, "random", seed=seed)):
            assert (curve <= least).all()
        assert (hits_by_slots(look_ups, "lfu", bypass=True) <= best).all()
        np.testing.assert_array_equal(hits_by_slots(look_ups, "bound"), best)
        calls, experts = random_calls(seed, 3)
        look_ups = calls_of(calls, experts)
        best = hits_by_slots(look_ups, "bound")
        for policy, bypass, pinned in itertools.product(("lru", "opt", "lfu"), (False, True), (False, True)):
            sizes = (1, 2, 4)
            assert (
                hits_by_slots(look_ups, policy, sizes, bypass=bypass, pinned=pinned) <= best[np.minimum(sizes, experts)]
            ).all()


def test_random_evicts_each_resident_equally_often(mode: str) -> None:
    """Expert 0 of two slots, then many newcomers: it survives each with probability 1/2."""
    calls = [[x] for _ in range(4000) for x in (0, 1, 2, 0)]
    look_ups = replace(calls_of(calls, 3), cut_W=np.arange(0, len(calls) + 1, 4))
    hit_N = found(look_ups, 2, "random", seed=3)
    assert not hit_N.reshape(-1, 4)[:, :3].any()
    assert abs(hit_N[3::4].mean() - 0.5) < 0.04  # five standard deviations
    assert (found(look_ups, 2, "random", seed=4) != hit_N).any()


def test_both_forms_agree_on_a_longer_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(1)
    routes = np.argsort(rng.random((60, 3, 70)) - 0.6 * rng.random(70) ** 3, axis=2)[:, :, :6].astype(np.uint8)
    for convention in (TEXTBOOK, Convention(), replace(MOE_LRC, window=16), Convention(look_up="batch", batch=4)):
        for policy in ("lru", "lfu", "opt", "random", "segment", "bound"):
            curves = []
            for wanted in ("0", "1"):
                monkeypatch.setenv("MOESIM_COMPILED", wanted)
                monkeypatch.setattr(fast, "_COMPILED_LOOK_UPS", 0)
                one = hit_curve(routes, 70, policy, convention, sizes=(0, 1, 5, 12, 40, 70), ahead=5)
                curves.append(one.hits_GS)
            np.testing.assert_array_equal(curves[0], curves[1])


# ---- against the cache and its policies


def replayed(
    routes: np.ndarray, experts: int, policy: str, slots: int, convention: Convention, **options: str
) -> list[tuple[int, bool]]:
    """(key, whether it hit), look-up by look-up, as the reference finds them."""
    layers = routes.shape[1]
    words = CacheSemantics(pooled=convention.pooled, miss="bypass" if convention.bypass else "evict")
    steps = replay.chunks(routes, tokens=convention.batch)
    spec = load_policy("eviction", {"kind": policy, **options})
    capacity = slots * (1 if convention.pooled else layers)
    done = replay.replay(
        steps, spec, experts, capacity, granularity=convention.look_up, semantics=words, keep_events=True
    )
    return [(event.key, event.kind == "hit") for event in done.events]


@pytest.mark.parametrize(
    ("policy", "options"), [("lru", {}), ("lfu", {}), ("lfu", {"counts": "resident"}), ("belady", {})]
)
@pytest.mark.parametrize("look_up", ["each", "layer", "token", "batch"])
def test_equal_to_the_cache_and_its_policies(mode: str, policy: str, options: dict[str, str], look_up: str) -> None:
    """Event by event, on random routes and on recorded ones."""
    rng = np.random.default_rng(5)
    cases = [(np.argsort(rng.random((20, 3, 9)) * np.linspace(1, 2, 9), axis=2)[:, :, :3].astype(np.uint8), 9)]
    if ESFT.exists():
        cases.append((np.load(ESFT)["expert_ids"][300:320, 3:6], 64))
    for routes, experts in cases:
        for pooled, bypass, rho in itertools.product((False, True), (False, True), (0.5, 1.5)):
            order = "choice" if look_up == "each" else "key"
            batch = 4 if look_up == "batch" else 1
            convention = Convention(pooled, look_up, batch, bypass=bypass, order=order)
            slots = int(rho * routes.shape[2] * (3 if pooled else 1))
            ours: dict[int, list[bool]] = {}
            name = "opt" if policy == "belady" else policy
            for g, cache_ in enumerate(look_ups_of(routes, experts, convention)):
                hit_N = found(cache_, slots, name, bypass=bypass, counts=options.get("counts", "all"))
                for key, hit in zip((cache_.id_N + (0 if pooled else g * experts)).tolist(), hit_N, strict=True):
                    ours.setdefault(key, []).append(bool(hit))
            theirs: dict[int, list[bool]] = {}
            for key, hit in replayed(routes, experts, policy, slots, convention, **options):
                theirs.setdefault(key, []).append(hit)
            assert ours == theirs, (policy, look_up, pooled, bypass, rho)


# ---- next uses, slots for layers, bad input


def test_next_uses_stay_in_their_window(mode: str) -> None:
    look_ups = calls_of([[0], [1], [0], [1], [1]], 2, cut=(2,))
    assert next_uses(look_ups).tolist() == [5, 6, 5, 4, 6]
    assert fast.first_uses(look_ups).tolist() == [True, True, True, True, False]


def test_hand_worked_curve(mode: str) -> None:
    """a b c a b d a b c d: LRU of 3 hits a b a b. MIN of 3 hits a b a b d, of 2 a a d: it drops b for c, c for b, b for
    d, and what is never used again for b and c."""
    look_ups = calls_of([[x] for x in (0, 1, 2, 0, 1, 3, 0, 1, 2, 3)], 4)
    assert hits_by_slots(look_ups, "lru").tolist() == [0, 0, 0, 4, 6]
    assert hits_by_slots(look_ups, "opt").tolist() == [0, 0, 3, 5, 6]


def test_best_split_is_the_best_of_all_splits() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        hits = np.cumsum(rng.integers(0, 6, (3, 6)), axis=1)
        hits[:, 0] = 0
        if rng.random() < 0.5:  # concave curves take another way
            hits = np.concatenate([np.zeros((3, 1), int), np.cumsum(-np.sort(-rng.integers(0, 6, (3, 5))), axis=1)], 1)
        least = int(rng.integers(0, 2))
        total = int(rng.integers(3 * least, 17))
        slots, most = best_split_of_slots(hits, total, least)
        splits = itertools.product(range(least, 6), repeat=3)
        every = [sum(hits[g, c] for g, c in enumerate(s)) for s in splits if sum(s) <= total]
        assert most == max(every) == hits[np.arange(3), slots].sum()
        assert slots.sum() <= total
        assert slots.min() >= least


def test_greedy_and_dynamic_programming_agree_on_recorded_layers() -> None:
    if not ESFT.exists():
        pytest.skip("shared/data/routing is not there")
    hits = hit_curve(np.load(ESFT)["expert_ids"][:600, ::5], 64, "opt", replace(TEXTBOOK, bypass=True)).hits_GS
    slots, most = best_split_of_slots(hits, 6 * 12)
    exact = stacks._exact_split(hits, 6 * 12, 0)
    assert most == hits[np.arange(6), exact].sum()
    assert most >= hits[:, 12].sum()
    assert slots.sum() == 72


def test_bad_input_is_told() -> None:
    look_ups = calls_of([[0]], 1)
    with pytest.raises(BadInput, match="no less than 0 slots"):
        found(look_ups, -1, "lru")
    with pytest.raises(BadInput, match="at least one call"):
        hits_by_slots(look_ups, "segment", ahead=0)
    with pytest.raises(BadInput, match="least slots"):
        best_split_of_slots(np.zeros((2, 3), int), 1, 1)
