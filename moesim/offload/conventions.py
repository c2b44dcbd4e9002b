"""What a hit rate means: the conventions of systems and papers, and what they measure besides.

The same routes in the same cache give hit rates that differ by 30 points, because papers count differently: one cache
for all layers or one a layer, judged look-up by look-up or a whole token at its start, first touches as hits or not, a
missed expert streamed past the cache or not, the cache emptied every 512 tokens or never. A `Convention` says all that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload.fast import MOST_EXPERTS, Counts, LookUps
from moesim.offload.stacks import CurvePolicy, cold_by_slots, hits_by_slots

__all__ = [
    "LAYERS", "MOE_INFINITY", "MOE_LRC", "TEXTBOOK", "Convention", "HitCurve", "SegmentRouting", "distance_to_bound",
    "hit_curve", "look_ups_of", "reuse_probability", "segment_routing", "slots_of", "static_curve", "time_bound_ns",
    "unique_experts",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Convention:
    """How hits are counted. The defaults are those of `CacheSemantics` and of `drive.Driver` with one token a step.

    pooled: one cache for all layers. look_up: what is judged against one state: `each` (one look-up at a time), `layer`
    (a token's experts of a layer), `token` (of all layers; a layer's, where caches are not pooled), `batch` (all that
    `batch` consecutive tokens want of a layer, each expert once). cold: first touches into free room are misses or
    hits. bypass: a miss may pass through a staging buffer and leave the cache as it is. pinned: nobody whom the running
    call asked for leaves. order: in which order a call's experts count as used: by `key`, or as recorded (`choice`,
    layer after layer; not for batches). window: tokens after which the cache starts anew; None: never. whole: tokens
    after the last full window are left out. counted: in batches, each expert once or by its rows.
    """

    pooled: bool = False
    look_up: Literal["each", "layer", "token", "batch"] = "layer"
    batch: int = 1
    cold: Literal["miss", "hit"] = "miss"
    bypass: bool = False
    pinned: bool = True
    order: Literal["key", "choice"] = "key"
    window: int | None = None
    whole: bool = False
    counted: Literal["experts", "rows"] = "experts"

    def __post_init__(self) -> None:
        """Raises BadInput for numbers below 1."""
        if self.batch < 1 or (self.window is not None and self.window < 1):
            raise BadInput(f"batch and window are at least 1 token, got {self.batch} and {self.window}")


TEXTBOOK: Final = Convention(look_up="each", order="choice")
"""One look-up at a time, a cache a layer: what Belady's and Mattson's theorems are about."""
LAYERS: Final = Convention()
"""A cache a layer, a call a token and layer: Mixtral-offloading, KTransformers, llama.cpp with slots."""
MOE_INFINITY: Final = Convention(pooled=True)
"""One cache for all layers, a call a token and layer."""
MOE_LRC: Final = Convention(
    pooled=True, look_up="token", cold="hit", pinned=False, order="choice", window=512, whole=True
)
"""CHR of arXiv:2505.16056, `50_chr_calc.py`: samples of 512 tokens, all L * K look-ups of a token judged against the
state at its start, then one after the other they push others out (so MIN may drop within a token what it has just
loaded, which resembles bypass); first touches while there is room are hits."""


def look_ups_of(expert_TLK: AnyArray, num_experts: int, convention: Convention = LAYERS) -> list[LookUps]:
    """The look-ups of each cache: one a layer, or one. Ids that are no expert are left out; keys of a pooled cache are
    layer * num_experts + expert. Raises BadInput where `expert_TLK` is not [T, L, K], or a cache serves more than
    65,536 experts."""
    expert_TLK = np.asarray(expert_TLK)
    if expert_TLK.ndim != 3 or num_experts < 1:
        raise BadInput(f"routes are ids [T, L, K] of at least one expert, got {expert_TLK.shape} and {num_experts}")
    tokens, layers, _ = expert_TLK.shape
    window = convention.window or max(tokens, 1)
    if convention.whole:
        tokens -= tokens % window
        expert_TLK = expert_TLK[:tokens]
    if layers * num_experts > MOST_EXPERTS and (convention.pooled or num_experts > MOST_EXPERTS):
        raise BadInput(f"one cache serves at most {MOST_EXPERTS:,} experts, got {layers} layers of {num_experts}")
    if convention.look_up == "batch":
        return _batches(expert_TLK, num_experts, convention, window)
    return _tokens(expert_TLK, num_experts, convention, window)


def _tokens(expert_TLK: AnyArray, num_experts: int, convention: Convention, window: int) -> list[LookUps]:
    """Calls within a token."""
    tokens, layers, top_k = expert_TLK.shape
    wide = layers * top_k
    width = {"each": 1, "layer": top_k, "token": wide if convention.pooled else top_k}[convention.look_up]
    real_TLK = (expert_TLK >= 0) & (expert_TLK < num_experts)
    if convention.pooled:
        key_GTX = (expert_TLK.astype(np.int32) + num_experts * np.arange(layers)[:, None]).reshape(1, tokens, wide)
        real_GTX = real_TLK.reshape(1, tokens, wide)
    else:
        key_GTX, real_GTX = expert_TLK.transpose(1, 0, 2), real_TLK.transpose(1, 0, 2)
    every = bool(real_TLK.all())
    out = []
    for key_TX, real_TX in zip(key_GTX, real_GTX, strict=True):
        calls = key_TX.size // max(width, 1)
        key_CX, real_CX = key_TX.reshape(calls, width), None if every else real_TX.reshape(calls, width)
        if convention.order == "key" and width > 1:
            if real_CX is not None:
                key_CX = np.where(real_CX, key_CX, MOST_EXPERTS)
            key_CX = np.sort(key_CX, axis=1)
            once_CX = np.ones(key_CX.shape, bool)
            once_CX[:, 1:] = key_CX[:, 1:] != key_CX[:, :-1]
            if real_CX is not None or not once_CX.all():
                real_CX = once_CX & (key_CX < MOST_EXPERTS)
        if real_CX is None:
            id_N, call_C = key_CX.astype(np.uint16).ravel(), np.arange(calls + 1, dtype=np.int64) * width
        else:
            id_N, call_C = key_CX[real_CX].astype(np.uint16), np.r_[0, np.cumsum(real_CX.sum(axis=1))]
        each = calls // max(tokens, 1)
        cut_W = np.append(np.arange(0, tokens, window, dtype=np.int64), tokens) * each
        universe = num_experts * (layers if convention.pooled else 1)
        out.append(LookUps(np.ascontiguousarray(id_N), call_C, cut_W, universe))
    return out


def _batches(expert_TLK: AnyArray, num_experts: int, convention: Convention, window: int) -> list[LookUps]:
    """Calls of batches, which do not reach over the end of a window."""
    tokens, layers, _ = expert_TLK.shape
    token = np.arange(tokens)
    inside = -(-window // convention.batch)  # batches of a window
    number_T = token // window * inside + token % window // convention.batch
    batches = int(number_T[-1]) + 1 if tokens else 0
    real_TLK = (expert_TLK >= 0) & (expert_TLK < num_experts)
    place_TLK = (number_T[:, None, None] * layers + np.arange(layers)[:, None]) * num_experts + expert_TLK
    count = np.bincount(place_TLK[real_TLK], minlength=batches * layers * num_experts)
    rows_BLE = count.reshape(batches, layers, num_experts)
    cut_W = np.append(np.arange(0, tokens, window) // window * inside, batches)
    universe = num_experts * (layers if convention.pooled else 1)
    parts = [rows_BLE] if convention.pooled else [rows_BLE[:, [layer]] for layer in range(layers)]
    out = []
    for rows_BGE in parts:
        at = np.flatnonzero(rows_BGE)
        call_C = np.r_[0, np.cumsum((rows_BGE > 0).sum(axis=2).ravel())]
        weight_N = rows_BGE.ravel()[at] if convention.counted == "rows" else None
        calls_W = cut_W * rows_BGE.shape[1]
        out.append(LookUps((at % universe).astype(np.uint16), call_C, calls_W, universe, weight_N))
    return out


# ---- hit rates


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hits of each of G caches by slots. slots_S: the sizes, of one cache. hits_GS: what hits count for, int64.
    look_ups_G: what all look-ups count for."""

    policy: str
    convention: Convention
    slots_S: IntArray
    hits_GS: IntArray
    look_ups_G: IntArray

    @property
    def rate_GS(self) -> FloatArray:
        """Hit rate of each cache."""
        return np.asarray(self.hits_GS / np.maximum(self.look_ups_G, 1)[:, None], np.float64)

    @property
    def rate_S(self) -> FloatArray:
        """Hit rate of all look-ups, where every cache has the same slots."""
        return np.asarray(self.hits_GS.sum(axis=0) / max(int(self.look_ups_G.sum()), 1), np.float64)

    def rate(self, slots: int) -> float:
        """Of all look-ups, with so many slots in each cache. Raises BadInput for a size that was not asked for."""
        at = np.flatnonzero(self.slots_S == slots)
        if not at.size:
            raise BadInput(f"hits with {slots} slots were not asked for, only with {self.slots_S.tolist()}")
        return float(self.rate_S[at[0]])


def slots_of(rho: float, num_layers: int, top_k: int, pooled: bool) -> int:
    """Slots of one cache at moe-lrc's cache ratio: rho times the experts that a token activates, in a layer or in all;
    rounded to the nearest."""
    return round(rho * top_k * (num_layers if pooled else 1))


def hit_curve(
    expert_TLK: AnyArray,
    num_experts: int,
    policy: CurvePolicy,
    convention: Convention = LAYERS,
    *,
    sizes: Sequence[int] | None = None,
    counts: Counts = "all",
    ahead: int = 1,
    seed: int = 0,
) -> HitCurve:
    """Hits by slots of a cache, for every size (sizes None: 0 .. experts of a cache) or some.

    One pass for `lru` and `bound`, and for `opt`, `lfu` and `segment` where calls are of one look-up or not pinned; the
    other combinations are played size by size (`stacks.is_stack`). Keywords as in `stacks.hits_by_slots`. Raises
    BadInput as `look_ups_of`.
    """
    caches = look_ups_of(expert_TLK, num_experts, convention)
    most = caches[0].experts if caches else 0
    slots_S = np.arange(most + 1) if sizes is None else np.array(sizes, np.int64)
    hits_GS = np.zeros((len(caches), len(slots_S)), np.int64)
    for g, cache in enumerate(caches):
        hits_GS[g] = hits_by_slots(
            cache, policy, slots_S.tolist(), bypass=convention.bypass, pinned=convention.pinned, counts=counts,
            ahead=ahead, seed=seed + g,
        )  # fmt: skip
        if convention.cold == "hit":
            hits_GS[g] += cold_by_slots(cache)[np.minimum(slots_S, most)]
    return HitCurve(policy, convention, slots_S, hits_GS, np.array([cache.total for cache in caches], np.int64))


def static_curve(
    expert_TLK: AnyArray, num_experts: int, popularity_LE: FloatArray, convention: Convention = LAYERS
) -> HitCurve:
    """Hits of fixed sets: the most popular experts of each cache, of equal ones the lower id. popularity_LE: what they
    are chosen by, [L, E]; counts of the same routes give hindsight. First touches count like others."""
    caches = look_ups_of(expert_TLK, num_experts, convention)
    worth_GE = np.asarray(popularity_LE, np.float64).reshape(len(caches), -1)
    out_GS = np.zeros((len(caches), worth_GE.shape[1] + 1), np.int64)
    for g, cache in enumerate(caches):
        weight = None if cache.weight_N is None else cache.weight_N.astype(np.float64)
        count_E = np.bincount(cache.id_N, weight, minlength=cache.experts)
        best = np.argsort(-worth_GE[g], kind="stable")
        out_GS[g, 1:] = np.cumsum(count_E[best])
    total_G = np.array([cache.total for cache in caches], np.int64)
    return HitCurve("static", convention, np.arange(out_GS.shape[1]), out_GS, total_G)


# ---- bounds


def distance_to_bound(curve: HitCurve, bound: HitCurve) -> FloatArray:
    """Hit rate that the most possible (a curve of policy `bound`) has above the policy's, by slots, [S]. Raises
    BadInput where the curves are not of the same look-ups, sizes and convention."""
    same = np.array_equal(curve.slots_S, bound.slots_S) and np.array_equal(curve.look_ups_G, bound.look_ups_G)
    if not same or curve.convention != bound.convention:
        raise BadInput("a bound is of the same look-ups, sizes and convention as what it bounds")
    return bound.rate_S - curve.rate_S


def time_bound_ns(compute_ns: float, misses: int, transfer_ns: float) -> float:
    """No schedule is faster: T >= max(sum of compute, misses * transfer), with the misses of `bound` in one cache for
    all layers whose slots include the staging buffers; every transfer passes the one link, and prefetch does not change
    how many there are. First touches are misses. transfer_ns: of one expert."""
    return max(compute_ns, misses * transfer_ns)


# ---- what routes are like


class SegmentRouting(NamedTuple):
    """srp: SRP(m). ratio: experts that its choice keeps, over those that a token activates (rho-hat). rate: share of
    (window, expert, token) cells that are active. All [L] or of the whole model, as asked."""

    srp: FloatArray
    ratio: FloatArray
    rate: FloatArray


def segment_routing(
    expert_TLK: AnyArray, num_experts: int, length: int, *, window: int | None = 512, by_layer: bool = False
) -> SegmentRouting:
    """SRP(m) of moe-lrc (arXiv:2505.16056, `30_srp_calc.py`, `31_srp_refine.py`): how well one fixed choice of experts
    serves every token of a segment of m = `length` tokens.

    Over all sliding segments, c counts an expert's activations (0 .. m). One threshold t chooses for all segments the
    experts with c >= t; matches = sum of c over the chosen, chosen cells = m * chosen, active = sum of c; SRP is the
    greatest F1 = 2 * matches / (chosen cells + active) over t. window: segments do not reach over its ends, and tokens
    after the last full one are left out (samples of 512 tokens); None: all are one sample. by_layer: a threshold a
    layer, [L]; else one for the model, [1]. Raises BadInput where a segment is longer than a window.
    """
    tokens, layers, _ = expert_TLK.shape
    window = window or tokens
    if not 1 <= length <= window or tokens < window:
        raise BadInput(f"segments of {length} tokens do not fit into samples of {window} tokens, of {tokens} in all")
    samples = tokens // window
    hist_LC = np.zeros((layers, length + 1), np.int64)
    for layer in range(layers):
        ids_TK = np.asarray(expert_TLK[: samples * window, layer])
        active_TE = np.zeros((len(ids_TK), num_experts + 1), np.int16)
        np.put_along_axis(active_TE, np.minimum(ids_TK, num_experts).astype(np.int64), 1, axis=1)
        sum_STE = active_TE[:, :num_experts].reshape(samples, window, num_experts).cumsum(axis=1, dtype=np.int32)
        count_SWE = sum_STE[:, length - 1 :].copy()
        count_SWE[:, 1:] -= sum_STE[:, : window - length]
        hist_LC[layer] = np.bincount(count_SWE.ravel(), minlength=length + 1)
    if not by_layer:
        hist_LC = hist_LC.sum(axis=0, keepdims=True)
    count_C = np.arange(length + 1)
    matches_LC = np.cumsum((hist_LC * count_C)[:, ::-1], axis=1)[:, ::-1]
    chosen_LC = np.cumsum(hist_LC[:, ::-1], axis=1)[:, ::-1] * length
    active_L = matches_LC[:, 0]
    f1_LC = 2 * matches_LC / np.maximum(chosen_LC + active_L[:, None], 1)
    best_L = f1_LC.argmax(axis=1)
    row = np.arange(len(best_L))
    ratio_L = chosen_LC[row, best_L] / np.maximum(active_L, 1)
    return SegmentRouting(f1_LC[row, best_L], ratio_L, active_L / np.maximum(chosen_LC[:, 0], 1))


def unique_experts(expert_TLK: AnyArray, num_experts: int, batch: int) -> FloatArray:
    """Mean number of experts of a layer that `batch` consecutive tokens use, float64 [L]; full batches only, 0 where
    there is none."""
    tokens, layers, _ = expert_TLK.shape
    convention = Convention(look_up="batch", batch=batch)
    caches = look_ups_of(expert_TLK[: tokens - tokens % batch], num_experts, convention)
    return np.array([len(cache.id_N) / max(tokens // batch, 1) for cache in caches]) if caches else np.zeros(layers)


def reuse_probability(expert_TLK: AnyArray, num_experts: int, sequence_T: IntArray | None = None) -> FloatArray:
    """Probability that a choice was among the choices of the token before it in the same layer and sequence, float64
    [L]; the first token of a sequence is not asked. Chance: K / E where experts are equally popular."""
    now, before = np.asarray(expert_TLK[1:]), np.asarray(expert_TLK[:-1])
    same_T: BoolArray = np.ones(len(now), bool) if sequence_T is None else sequence_T[1:] == sequence_T[:-1]
    now, before = now[same_T], before[same_T]
    real_TLK = (now >= 0) & (now < num_experts)
    again_TLK = np.zeros(now.shape, bool)
    for k in range(now.shape[2]):
        again_TLK |= now == before[:, :, k : k + 1]
    return np.asarray((again_TLK & real_TLK).sum(axis=(0, 2)) / np.maximum(real_TLK.sum(axis=(0, 2)), 1), np.float64)
