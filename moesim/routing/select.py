"""Choosing and normalising: the vectorised pieces that routers share. Legend: T tokens, E experts, K chosen, W places.

Pieces that take a while walk through the rows in chunks whose work stays in a core's second-level cache. Where numba is
installed and the work is large, `compiled` makes the keys and lends a second thread. Ids are the same with and without
it, because nothing that decides one is rounded differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moesim.optional import compiled

__all__ = [
    "NONE", "check_top_k", "chosen", "close_as", "each_chunk", "gates_of", "kth_highest", "load_of", "normalised",
    "ranked", "sigmoid", "softmax", "softmax_gates", "top_ids",
]  # fmt: skip

Floats = NDArray[Any]

NONE: Final = -1
"""In an assignment: no expert in this place."""
_CHUNK_CELLS = 1 << 15
"""Scores worked on at once: they and their keys take 384 KiB."""
_COMPILED_CELLS = 1 << 18
"""Fewer scores than this are not worth an import of numba."""
_LAST: Final = np.iinfo(np.int64).max
"""A key behind all others."""
_CLOSED: Final = 0x7F800000
_HIGHEST: Final = ~_CLOSED
"""The upper halves of the keys of -inf and inf; those of NaN lie outside."""
_PASSES = 32
"""Up to this many chosen of float64 scores, a pass for each costs less than sorting all."""


def _compiled(score_NM: Floats) -> Any:
    """The module `compiled` where it is there, wanted and worth it, else None. That depends on the size alone, so that
    one machine gives one answer."""
    if score_NM.size < _COMPILED_CELLS or score_NM.dtype != np.float32:
        return None
    return compiled("moesim.routing.compiled")


def each_chunk(score_NM: Floats, work: Callable[[slice], None]) -> None:
    """Call `work` on slices of rows of at most about `_CHUNK_CELLS` scores; maybe from two threads at once, so it must
    write to its own rows only."""
    rows, wide = score_NM.shape
    step = max(1, _CHUNK_CELLS // max(1, wide))
    parts = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
    fast = _compiled(score_NM)
    if fast is not None and len(parts) > 1:
        fast.in_two_threads(work, parts)
    else:
        for part in parts:
            work(part)


def check_top_k(k: int, experts: int) -> None:
    """Raises ValueError unless a token can take `k` of `experts`."""
    if not 1 <= k <= experts:
        raise ValueError(f"between 1 and {experts} experts a token can be chosen, got {k}")


def close_as(score_TE: Floats, choice_TE: Floats) -> Floats:
    """`choice_TE` with -inf wherever the scores are -inf; in place, and at the cost of one look where none is."""
    if score_TE.min(initial=0) == -np.inf:
        choice_TE[score_TE == -np.inf] = -np.inf
    return choice_TE


def top_ids(score_TE: Floats, k: int) -> NDArray[np.int32]:
    """Ids of the `k` highest scores of each row, highest first, int32 [T, k]; of equal scores the lowest id.

    Raises ValueError for NaN, and where a row has fewer than k scores above -inf.
    """
    check_top_k(k, score_TE.shape[1])
    if score_TE.dtype != np.float32:
        return _top_of_doubles(score_TE, k)
    expert_TK = np.empty((len(score_TE), k), np.int32)
    fast = _compiled(score_TE)
    make, take = (_keys, _lower) if fast is None else (fast.keys, fast.lower)

    def work(at: slice) -> None:
        key = make(score_TE[at])
        key.sort(1)
        has_nan, too_few = take(key, expert_TK[at])
        _check(has_nan, too_few, k)

    each_chunk(score_TE, work)
    return expert_TK


def _check(has_nan: bool, too_few: bool, k: int) -> None:
    if has_nan:
        raise ValueError("scores must not be NaN")
    if too_few:
        raise ValueError(f"a token has fewer than {k} experts with a score above -inf")


def _lower(key_NE: NDArray[np.int64], out_NK: NDArray[np.int32]) -> tuple[bool, bool]:
    """Ids from the lower halves of the first keys of sorted rows; whether a row holds NaN, or too few open ones."""
    k = out_NK.shape[1]
    out_NK[:] = key_NE[:, :k]
    edge = key_NE[:, [0, -1, k - 1]] >> 32
    return bool((edge[:, 0] < _HIGHEST).any() or (edge[:, 1] > _CLOSED).any()), bool((edge[:, 2] >= _CLOSED).any())


def _keys(score_NE: Floats) -> NDArray[np.int64]:
    """int64 keys that ascend as float32 scores descend and ids ascend: the order of scores above, the id below."""
    bits = (score_NE + np.float32(0)).view(np.int32)  # -0 becomes 0
    sign = bits >> 31
    sign &= 0x7FFFFFFF
    bits ^= sign  # ascends as the scores do
    np.invert(bits, out=bits)
    key: NDArray[np.int64] = bits.astype(np.int64)
    key <<= 32
    key |= np.arange(score_NE.shape[1])
    return key


def _top_of_doubles(score_TE: Floats, k: int) -> NDArray[np.int32]:
    """`top_ids` for scores that do not fit into a key with their id: rounded to float32 they rank alike but for what
    the rounding makes equal, and the few rows with such a tie are ranked exactly."""
    _check(bool(np.isnan(score_TE).any()), False, k)
    expert_TK = np.empty((len(score_TE), k), np.int32)
    unsure_T = np.zeros(len(score_TE), bool)

    def work(at: slice) -> None:
        with np.errstate(over="ignore"):
            key = _keys(score_TE[at].astype(np.float32))
        key.sort(1)
        expert_TK[at] = key[:, :k]  # the lower half
        value = key[:, : k + 1] >> 32
        tied_N = (value[:, 1:] == value[:, :-1]).any(1)
        closed_N = value[:, k - 1] >= _CLOSED
        tied_N[tied_N] = _rounded_alike(score_TE[at][tied_N], key[tied_N], k)
        unsure_T[at] = tied_N | closed_N

    each_chunk(score_TE, work)
    if unsure_T.any():
        expert_TK[unsure_T] = _exact(score_TE[unsure_T], k)
    return expert_TK


def _rounded_alike(score_NE: Floats, key_NE: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether neighbours among the first k of a row's sorted keys are equal as float32 only; true equals stand right,
    the lowest id first. Equals of the k-th that stand behind it are looked at too."""
    edge = key_NE[:, : k + 1] >> 32
    out = _unlike_equals(score_NE, key_NE[:, :k])
    over_N = ~out & (edge[:, -1] == edge[:, k - 1]) if edge.shape[1] > k else np.zeros(len(out), bool)
    out[over_N] = _unlike_equals(score_NE[over_N], key_NE[over_N])
    return out


def _unlike_equals(score_NE: Floats, key_NJ: NDArray[np.int64]) -> NDArray[np.bool_]:
    value_NJ = np.take_along_axis(score_NE, key_NJ & 0xFFFFFFFF, 1)
    alike_NJ = key_NJ[:, 1:] >> 32 == key_NJ[:, :-1] >> 32
    out: NDArray[np.bool_] = (alike_NJ & (value_NJ[:, 1:] != value_NJ[:, :-1])).any(1)
    return out


def _exact(score_TE: Floats, k: int) -> NDArray[np.int32]:
    row = np.arange(len(score_TE))
    if k > _PASSES:
        ids = np.argsort(-score_TE, axis=1, kind="stable")[:, :k]
        _check(False, bool(np.isneginf(score_TE[row, ids[:, -1]]).any()), k)
        return ids.astype(np.int32)
    left = score_TE.copy()
    out = np.empty((len(score_TE), k), np.int32)
    for i in range(k):
        best = left.argmax(1)
        _check(False, bool(np.isneginf(left[row, best]).any()), k)
        out[:, i] = best
        left[row, best] = -np.inf
    return out


def ranked(score_TE: Floats, taken_TE: NDArray[np.bool_], width: int) -> NDArray[np.int32]:
    """The experts of each token's mask, highest score first (the lowest id of equals), NONE behind; int32 [T, width].

    `width`: at least the most experts any token has.
    """
    out = np.full((len(score_TE), width), NONE, np.int32)
    if score_TE.dtype != np.float32:
        order_TE = np.argsort(np.where(taken_TE, -score_TE, np.inf), axis=1, kind="stable")[:, :width]
        kept_TE = np.take_along_axis(taken_TE, order_TE, 1)
        out[:, : order_TE.shape[1]] = np.where(kept_TE, order_TE, NONE)
        return out
    fast = _compiled(score_TE)
    make = _keys if fast is None else fast.keys

    def work(at: slice) -> None:
        key = np.where(taken_TE[at], make(score_TE[at]), _LAST)
        key.sort(1)
        key = key[:, :width]
        out[at, : key.shape[1]] = np.where(key == _LAST, NONE, key)

    each_chunk(score_TE, work)
    return out


def kth_highest(score_NM: Floats, k: int, less_M: Floats | None = None) -> Floats:
    """The `k`-th highest of each row (of each row minus `less_M`), [N], 1 <= k <= M, equals counted one by one."""
    rows, wide = score_NM.shape
    out = np.empty(rows, score_NM.dtype)

    def work(at: slice) -> None:
        block = score_NM[at].copy() if less_M is None else score_NM[at] - less_M
        if wide <= 128:  # short rows sort faster than they part
            block.sort(1)
        else:
            block.partition(wide - k, 1)
        out[at] = block[:, wide - k]

    each_chunk(score_NM, work)
    return out


def softmax(score_TE: Floats) -> Floats:
    """Softmax over each row, stable; a row of -inf gives zeros."""
    out: Floats = np.empty_like(score_TE, order="C")

    def work(at: slice) -> None:
        block = out[at]
        most = score_TE[at].max(1, keepdims=True)
        most[most == -np.inf] = 0
        np.exp(np.subtract(score_TE[at], most, out=block), out=block)
        total = block.sum(1, keepdims=True)
        total[total == 0] = 1
        block /= total

    each_chunk(score_TE, work)
    return out


def softmax_gates(score_TE: Floats, expert_TK: NDArray[np.int32], normalise: bool) -> Floats:
    """`softmax` of the chosen alone, [T, K], divided by their sum where asked; as a whole softmax to some ulp.

    Each token's first expert must have its highest score. Normalised, the other experts cancel out.
    """
    chosen_TK = chosen(score_TE, expert_TK)
    most_T1 = chosen_TK[:, :1]
    out: Floats = np.exp(chosen_TK - most_T1)
    if normalise:
        out /= out.sum(1, keepdims=True)
        return out
    fast = _compiled(score_TE)

    def work(at: slice) -> None:
        if fast is None:
            out[at] /= np.exp(score_TE[at] - most_T1[at]).sum(1, keepdims=True)
        else:
            out[at] /= fast.sum_exp(score_TE[at], most_T1[at, 0])[:, None]

    each_chunk(score_TE, work)
    return out


def sigmoid(score_TE: Floats) -> Floats:
    """Logistic function of each score, without overflow."""
    out: Floats = np.empty_like(score_TE, order="C")

    def work(at: slice) -> None:
        score = score_TE[at]
        tail = np.exp(-np.abs(score))
        np.divide(np.where(score >= 0, score.dtype.type(1), tail), 1 + tail, out=out[at])

    each_chunk(score_TE, work)
    return out


def chosen(value_TE: Floats, expert_TW: NDArray[np.int32]) -> Floats:
    """The values in the columns that each token's ids name, [T, W]; any of its values at NONE."""
    fast = _compiled(value_TE)
    out: Floats
    if fast is not None:
        out = fast.at(value_TE, expert_TW)
        return out
    tokens, experts = value_TE.shape
    place_TW = expert_TW + (np.arange(tokens, dtype=np.int64) * experts)[:, None]
    out = value_TE.ravel().take(place_TW, mode="wrap")
    return out


def normalised(gate_TW: Floats) -> Floats:
    """Each row divided by its sum; a row of zeros stays one."""
    out: Floats = gate_TW / np.maximum(gate_TW.sum(1, keepdims=True), gate_TW.dtype.type(1e-20))
    return out


def gates_of(gate_TE: Floats, expert_TW: NDArray[np.int32], normalise: bool, scale: float = 1.0) -> Floats:
    """The chosen columns of `gate_TE` [T, W], 0 at NONE, divided by their sum where asked, times `scale`."""
    gate_TW = chosen(gate_TE, expert_TW)
    gate_TW[expert_TW == NONE] = 0
    out: Floats = normalised(gate_TW) if normalise else gate_TW
    return out if scale == 1 else out * out.dtype.type(scale)


def load_of(expert_TW: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
    """Tokens of each expert, int64 [E]; NONE counts for nobody."""
    return np.bincount(expert_TW.ravel() + 1, minlength=experts + 1)[1:]
