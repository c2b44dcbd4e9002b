"""What numba does better than NumPy for `select`, and a second thread; imported where numba is there and work is large.

Keys come out the same and `sum_exp` agrees to a few ulp, so a choice never depends on whether numba is installed.
Compiled code is kept beside this file, else in the user's cache folder; where neither can be written each process
compiles anew. The second thread is a plain one that lives for one call: no fork harms it, and it needs no threading
layer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["at", "in_two_threads", "keys", "lower", "sum_exp"]

_TWO = (os.cpu_count() or 1) > 1
_REASSOCIATED = {"reassoc", "contract", "nsz"}
"""What a sum over a row may do to be vectorised; NaN and infinities keep their meaning."""


def _read(scalar: Any, axes: int) -> Any:
    """An array that may be read-only."""
    return numba.types.Array(scalar, axes, "C", readonly=True)


def _compiled(*types: Any, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for these types now, releasing the interpreter's lock; kept on disk where a folder can be written."""

    def compile_(function: Callable[..., None]) -> Callable[..., None]:
        signature = numba.void(*types)
        try:
            ready: Callable[..., None] = numba.njit(signature, nogil=True, cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder for the cache
            ready = numba.njit(signature, nogil=True, **options)(function)
        return ready

    return compile_


@_compiled(_read(numba.int32, 2), numba.int64[:, ::1])
def _keys(bits_NE: Any, key_NE: Any) -> None:
    """`select._keys` in one pass over the bits of the scores."""
    for n in range(bits_NE.shape[0]):
        for e in range(bits_NE.shape[1]):
            bits = bits_NE[n, e]
            if bits == np.int32(-2147483648):  # -0
                bits = np.int32(0)
            bits = ~(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            key_NE[n, e] = (np.int64(bits) << 32) | e


@_compiled(_read(numba.float32, 2), _read(numba.float32, 1), numba.float32[::1], fastmath=_REASSOCIATED)
def _sum_exp(score_NE: Any, most_N: Any, out_N: Any) -> None:
    """exp(x) = 2^k p(f), k + f = x / ln 2, p the polynomial of degree 5 fitted to 2^f on 0 .. 1 (within 2e-7)."""
    for n in range(score_NE.shape[0]):
        most, total = most_N[n], np.float32(0)
        for e in range(score_NE.shape[1]):
            x = max((score_NE[n, e] - most) * np.float32(1.4426950408889634), np.float32(-126))
            k = np.floor(x)
            f = x - k
            p = np.float32(1.8775767e-3)
            p = p * f + np.float32(8.9893397e-3)
            p = p * f + np.float32(5.5826318e-2)
            p = p * f + np.float32(2.4015361e-1)
            p = p * f + np.float32(6.9315308e-1)
            p = p * f + np.float32(9.9999994e-1)
            total += p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
        out_N[n] = total


@_compiled(_read(numba.int64, 2), numba.int32[:, ::1], numba.boolean[::1])
def _lower(key_NE: Any, out_NK: Any, flag_2: Any) -> None:
    last, top_k = key_NE.shape[1] - 1, out_NK.shape[1]
    for n in range(out_NK.shape[0]):
        for k in range(top_k):
            out_NK[n, k] = np.int32(key_NE[n, k] & 0x7FFFFFFF)
        flag_2[0] |= key_NE[n, 0] >> 32 < ~0x7F800000 or key_NE[n, last] >> 32 > 0x7F800000
        flag_2[1] |= key_NE[n, top_k - 1] >> 32 >= 0x7F800000


@_compiled(_read(numba.float32, 2), _read(numba.int32, 2), numba.float32[:, ::1])
def _at(value_TE: Any, expert_TW: Any, out_TW: Any) -> None:
    for t in range(out_TW.shape[0]):
        for w in range(out_TW.shape[1]):
            out_TW[t, w] = value_TE[t, max(expert_TW[t, w], 0)]


def lower(key_NE: NDArray[np.int64], out_NK: NDArray[np.int32]) -> tuple[bool, bool]:
    """As `select._lower`."""
    flag_2 = np.zeros(2, bool)
    _lower(key_NE, out_NK, flag_2)
    return bool(flag_2[0]), bool(flag_2[1])


def at(value_TE: NDArray[np.float32], expert_TW: NDArray[np.int32]) -> NDArray[np.float32]:
    """The values in each token's columns, [T, W]; any of them at NONE."""
    out_TW = np.empty(expert_TW.shape, np.float32)
    _at(np.ascontiguousarray(value_TE), np.ascontiguousarray(expert_TW), out_TW)
    return out_TW


def keys(score_NE: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 keys [N, E], as `select._keys`."""
    score_NE = np.ascontiguousarray(score_NE)
    key_NE = np.empty(score_NE.shape, np.int64)
    _keys(score_NE.view(np.int32), key_NE)
    return key_NE


def sum_exp(score_NE: NDArray[np.float32], most_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum over each row of exp(score - most), float32 [N]; no score lies above its row's `most`, which is finite."""
    out_N = np.empty(len(score_NE), np.float32)
    _sum_exp(np.ascontiguousarray(score_NE), np.ascontiguousarray(most_N), out_N)
    return out_N


def in_two_threads(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """`work` on every part, the second half of them in another thread; what is raised there is raised here."""
    middle = len(parts) // 2 if _TWO else 0
    raised: list[BaseException] = []

    def others() -> None:
        try:
            for part in parts[:middle]:
                work(part)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            raised.append(error)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for part in parts[middle:]:
            work(part)
    finally:
        thread.join()
    if raised:
        raise raised[0]
