"""Conventions of hit rates, and what routes are like: hand-worked cases, and brute force from the definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload.conventions import (
    LAYERS,
    MOE_LRC,
    TEXTBOOK,
    Convention,
    distance_to_bound,
    hit_curve,
    look_ups_of,
    reuse_probability,
    segment_routing,
    slots_of,
    static_curve,
    time_bound_ns,
    unique_experts,
)

ROUTES = np.array([[[2, 0], [1, 3]], [[0, 2], [3, 9]], [[1, 0], [3, 1]]])
"""[T=3, L=2, K=2] of 4 experts; 9 is none"""


def random_routes(seed: int, tokens: int = 40, layers: int = 2, experts: int = 7, top_k: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    score = rng.random((tokens, layers, experts)) * rng.uniform(0.3, 1, (layers, experts))
    return np.argsort(-score, axis=2)[:, :, :top_k]


def test_look_ups_are_cut_as_the_convention_says() -> None:
    def cut(convention: Convention) -> list[list[list[int]]]:
        caches = look_ups_of(ROUTES, 4, convention)
        return [[part.tolist() for part in np.split(c.id_N.astype(int), c.call_C[1:-1])] for c in caches]

    assert cut(TEXTBOOK) == [[[2], [0], [0], [2], [1], [0]], [[1], [3], [3], [], [3], [1]]]
    assert cut(LAYERS) == [[[0, 2], [0, 2], [0, 1]], [[1, 3], [3], [1, 3]]]
    assert cut(replace(LAYERS, order="choice")) == [[[2, 0], [0, 2], [1, 0]], [[1, 3], [3], [3, 1]]]
    assert cut(Convention(pooled=True)) == [[[0, 2], [5, 7], [0, 2], [7], [0, 1], [5, 7]]]
    assert cut(replace(MOE_LRC, window=3)) == [[[2, 0, 5, 7], [0, 2, 7], [1, 0, 7, 5]]]
    assert cut(Convention(look_up="batch", batch=2)) == [[[0, 2], [0, 1]], [[1, 3], [1, 3]]]
    assert cut(Convention(pooled=True, look_up="batch", batch=2)) == [[[0, 2], [5, 7], [0, 1], [5, 7]]]
    assert cut(replace(LAYERS, window=2, whole=True)) == [[[0, 2], [0, 2]], [[1, 3], [3]]]
    assert look_ups_of(ROUTES, 4, replace(LAYERS, window=2))[0].cut_W.tolist() == [0, 2, 3]
    rows = look_ups_of(ROUTES, 4, Convention(look_up="batch", batch=2, counted="rows"))
    assert [c.weight_N.tolist() for c in rows] == [[2, 2, 1, 1], [1, 2, 1, 1]]  # type: ignore[union-attr]


def test_batches_do_not_reach_over_windows() -> None:
    routes = random_routes(1, tokens=7)
    (cache, _) = look_ups_of(routes, 7, Convention(look_up="batch", batch=2, window=3))
    assert cache.cut_W.tolist() == [0, 2, 4, 5]
    calls = [set(part.tolist()) for part in np.split(cache.id_N, cache.call_C[1:-1])]
    assert calls == [set(routes[part, 0].ravel().tolist()) for part in ([0, 1], [2], [3, 4], [5], [6])]


def test_first_touches_are_hits_or_misses() -> None:
    """moe-lrc, 3 slots: of token 1 (keys 2 0 5 7) three first touches find room; it leaves 0 5 7. Token 2 (0 2 7)
    finds 0 and 7 and leaves 0 2 7. Token 3 (1 0 7 5) finds 0 and 7."""
    warm = replace(MOE_LRC, window=3)
    assert hit_curve(ROUTES, 4, "lru", warm).hits_GS[0, 3] == 3 + 2 + 2
    assert hit_curve(ROUTES, 4, "lru", replace(warm, cold="miss")).hits_GS[0, 3] == 4
    assert hit_curve(ROUTES, 4, "lru", warm).look_ups_G.tolist() == [11]
    # with room for all, whatever is not a hit is a first touch; windows forget
    for policy in ("lru", "lfu", "opt", "bound"):
        assert hit_curve(ROUTES, 4, policy, warm).rate(8) == 1.0  # type: ignore[arg-type]
    assert hit_curve(ROUTES, 4, "lru", replace(warm, window=1, cold="miss")).hits_GS.sum() == 0


def test_static_sets_hit_what_they_hold() -> None:
    routes = random_routes(2)
    popularity = np.stack([np.bincount(routes[:, layer].ravel(), minlength=7) for layer in range(2)])
    curve = static_curve(routes, 7, popularity)
    for slots in range(8):
        sets = [set(np.argsort(-popularity[layer], kind="stable")[:slots].tolist()) for layer in range(2)]
        assert curve.hits_GS[:, slots].tolist() == [
            sum(int(e) in sets[layer] for e in routes[:, layer].ravel()) for layer in range(2)
        ]


# ---- SRP and SCH, from their definitions


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, None), (4, None), (4, 12), (12, 12)])
def test_srp_is_the_best_f1_over_thresholds(length: int, window: int | None, by_layer: bool) -> None:
    routes = random_routes(3)
    size = window or len(routes)
    cells: list[list[int]] = [[], []]
    for start in range(0, len(routes) - size + 1, size):
        for at in range(start, start + size - length + 1):
            for layer in range(2):
                segment = routes[at : at + length, layer]
                cells[layer] += [int((segment == e).sum()) for e in range(7)]
    found = segment_routing(routes, 7, length, window=window, by_layer=by_layer)
    for unit, counts in enumerate(cells if by_layer else [cells[0] + cells[1]]):
        f1 = []
        for threshold in range(length + 1):
            kept = [c for c in counts if c >= threshold]
            f1.append(2 * sum(kept) / (length * len(kept) + sum(counts)))
        assert found.srp[unit] == pytest.approx(max(f1))
        kept = [c for c in counts if c >= int(np.argmax(f1))]
        assert found.ratio[unit] == pytest.approx(length * len(kept) / sum(counts))
        assert found.rate[unit] == pytest.approx(3 / 7)


def segment_hits(calls: list[list[int]], slots: int, ahead: int) -> int:
    """SCH(m, rho): who has the fewest uses ahead leaves, then the least recent; uses counted anew every time."""
    inside: list[int] = []
    last: dict[int, int] = {}
    hits = clock = 0
    for t, call in enumerate(calls):
        hits += sum(x in inside for x in call)
        for i, x in enumerate(call):
            clock += 1
            last[x] = clock
            coming = [y for later in (call[i + 1 :], *calls[t + 1 : t + ahead]) for y in later]
            if x not in inside and len(inside) == slots:
                inside.remove(min(inside, key=lambda y: (coming.count(y), last[y])))
            if x not in inside:
                inside.append(x)
    return hits


@pytest.mark.parametrize("ahead", [1, 3, 8, 100])
def test_sch_is_its_definition(ahead: int) -> None:
    convention = replace(MOE_LRC, window=20, cold="miss")
    for seed in range(3):
        routes = random_routes(seed + 10)
        curve = hit_curve(routes, 7, "segment", convention, ahead=ahead)
        keys = (routes + np.array([[0], [7]])).reshape(len(routes), -1).tolist()
        for slots in (1, 3, 6, 9, 14):
            assert curve.rate(slots) * 240 == pytest.approx(
                segment_hits(keys[:20], slots, ahead) + segment_hits(keys[20:], slots, ahead)
            )


# ---- the rest


def test_unique_experts_and_reuse_by_hand() -> None:
    assert unique_experts(ROUTES, 4, 1).tolist() == pytest.approx([2, 5 / 3])
    assert unique_experts(ROUTES, 4, 2).tolist() == [2, 2]
    assert unique_experts(ROUTES, 4, 5).tolist() == [0, 0]
    assert reuse_probability(ROUTES, 4).tolist() == pytest.approx([3 / 4, 2 / 3])
    assert reuse_probability(ROUTES, 4, np.array([0, 1, 1])).tolist() == pytest.approx([1 / 2, 1 / 2])


def test_distance_to_the_bound_is_never_negative() -> None:
    routes = random_routes(5)
    for convention in (TEXTBOOK, LAYERS, replace(MOE_LRC, window=20), Convention(look_up="batch", batch=3)):
        bound = hit_curve(routes, 7, "bound", convention)
        for policy in ("lru", "lfu", "opt", "random", "segment"):
            far = distance_to_bound(hit_curve(routes, 7, policy, convention, ahead=4), bound)  # type: ignore[arg-type]
            assert far.min() >= 0
            assert far[-1] == pytest.approx(0)
    with pytest.raises(BadInput, match="same look-ups"):
        distance_to_bound(hit_curve(routes, 7, "lru"), bound)


def test_time_is_bound_by_compute_or_by_the_link() -> None:
    assert time_bound_ns(100.0, 3, 20.0) == 100.0
    assert time_bound_ns(100.0, 7, 20.0) == 140.0


def test_slots_follow_the_cache_ratio() -> None:
    assert slots_of(2, 26, 6, pooled=True) == 312
    assert slots_of(1.5, 26, 6, pooled=False) == 9


def test_bad_input_is_told() -> None:
    with pytest.raises(BadInput, match="routes are ids"):
        look_ups_of(np.zeros((3, 2)), 4)
    with pytest.raises(BadInput, match="65,536"):
        look_ups_of(np.zeros((1, 60, 1), int), 2000, Convention(pooled=True))
    with pytest.raises(BadInput, match="at least 1 token"):
        Convention(batch=0)
    with pytest.raises(BadInput, match="do not fit"):
        segment_routing(ROUTES, 4, 5, window=None)
    with pytest.raises(BadInput, match="not asked for"):
        hit_curve(ROUTES, 4, "lru", sizes=[2]).rate(3)


def test_no_tokens_no_hits() -> None:
    none = np.zeros((0, 2, 2), int)
    for convention in (TEXTBOOK, LAYERS, MOE_LRC, Convention(look_up="batch", batch=2)):
        assert hit_curve(none, 4, "opt", convention).hits_GS.sum() == 0
