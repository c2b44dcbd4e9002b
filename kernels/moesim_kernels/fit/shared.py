"""Residuals of MoE shapes that were never timed, from those that were: a Gaussian process over shapes and sizes.

ln(measured / physics) of one kernel is much alike between shapes: it steps where the kernel takes another tile (by
tokens, or by rows an expert), and drifts with the shape. The process (Rasmussen and Williams 2006, eq. 2.23) sums
    near(shapes) * [offset + slow(tokens) + rough(rows per expert) + rough(tokens)] + what is the shape's own + noise
with near = exp(-distance) over log sizes. Its scales are constants: by marginal likelihood on calibrated points of one
half of the public H100 shapes (`selected` in benchmarks/profiles/holdout.py), rounded. It runs when a profile is made
and ends in ordinary curves, graded extrapolated; a simulation never sees it.

Two facts of kernels are told, not learnt: an intermediate size that is no multiple of 16 cannot be loaded in whole
vectors and is far from one that is; and a shape whose kernel runs half as slow again as its peers has hit a bad choice
of kernel, which says nothing about its neighbours and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from moesim.hardware import EXTRAPOLATED, Curve, DeviceProfile
from moesim_kernels.fit.physics import physics_ns
from moesim_kernels.fit.samples import Key, Samples

__all__ = ["carry_over", "slow_shapes"]

FloatArray = NDArray[np.float64]
# distance over which likeness falls by e, in ln of hidden, intermediate, slots, top_k; in matrices; in alignment
_REACH = np.array([5.0, 5.0, 9.0, 3.0, 2.0, 1.0 / 3.0])
_OFFSET, _SLOW, _ROUGH_ROWS, _ROUGH_TOKENS, _OWN, _NOISE = 0.05, 0.15, 0.07, 0.03, 0.01, 0.004  # sigma of ln
_SLOW_REACH, _ROWS_REACH, _OWN_REACH = 3.0, 2.5, 1.2  # in ln of tokens, of rows per expert, of tokens
_ALIGNED = 16
_SLOWER = 0.5  # in ln of time
_MOST = 3000  # points a process is solved over: beyond, evenly spaced ones


def carry_over(
    s: Samples, values: Mapping[str, float], profile: DeviceProfile, keys: Sequence[Key], tokens: Sequence[float]
) -> list[Curve]:
    """Curves of MoE shapes `keys` at `tokens` token counts from the residuals of `s` over physics with `values`.

    s: timed points of other shapes, one variant. The curves' axis is rows (tokens * top_k), their grade extrapolated.
    Raises ValueError for samples that are not of MoE kernels.
    """
    if not s.op.startswith("moe"):
        raise ValueError(f"shapes are carried over for MoE kernels, not for {s.op}")
    ratio = np.log(s.ns / physics_ns(s, values, profile))
    slow = slow_shapes(s, ratio)
    used = np.flatnonzero([key not in slow for key in s.key])
    used = used[np.unique(np.linspace(0, len(used) - 1, min(_MOST, len(used))).astype(int))]
    known, own = _features(s.where(used))
    places = {key: i for i, key in enumerate(dict.fromkeys(s.key))}
    shape = np.array([places[s.key[i]] for i in used])
    same = shape[:, None] == shape[None]
    gap = np.abs(own[:, None, 0] - own[None, :, 0])
    kernel = _kernel(known, known, own, own) + same * _OWN**2 * (1.0 + np.exp(-gap / _OWN_REACH))
    solved = cho_solve(cho_factor(kernel + _NOISE**2 * np.eye(len(used))), ratio[used])
    out = []
    for key in keys:
        rows = np.array(sorted({float(t) * float(key[3]) for t in tokens}))
        at = Samples(s.op, s.variant, [tuple(key)] * len(rows), rows[:, None], np.ones(len(rows)))
        there, size = _features(at)
        found = _kernel(there, known, size, own) @ solved
        grade = np.full(len(rows), EXTRAPOLATED, np.uint8)
        out.append(Curve(tuple(key), s.variant, (rows,), np.round(found, 3), grade, s.source))
    return out


def slow_shapes(s: Samples, ratio: FloatArray) -> set[Key]:
    """Shapes whose median residual exceeds the median shape's, of their alignment, by more than half in ln."""
    level = {key: float(np.median(ratio[rows])) for key, rows in s.by_key().items()}
    out: set[Key] = set()
    for aligned in (True, False):
        group = {key: v for key, v in level.items() if (int(key[1]) % _ALIGNED == 0) == aligned}
        if group:
            usual = float(np.median(list(group.values())))
            out |= {key for key, v in group.items() if v - usual > _SLOWER}
    return out


def _features(s: Samples) -> tuple[FloatArray, FloatArray]:
    """Of every point: its shape [points, 6], and ln of its rows by top_k and by expert slots [points, 2]. Under expert
    parallelism the first counts the tokens that would bring as many rows alone.
    """
    key = np.array([[float(k[i]) for i in (0, 1, 2, 3, 5)] for k in s.key]).reshape(-1, 5)
    rows = s.size[:, 0]
    shape = np.concatenate([np.log(key[:, :4]), key[:, 4:], (key[:, 1:2] % _ALIGNED != 0) * 1.0], axis=1)
    return shape / _REACH, np.log(np.stack([rows / key[:, 3], rows / key[:, 2]], axis=1))


def _kernel(a: FloatArray, b: FloatArray, size_a: FloatArray, size_b: FloatArray) -> FloatArray:
    """Covariance of residuals that shapes share, [points of a, points of b]."""
    square = np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2.0 * a @ b.T, 0.0)
    tokens = np.abs(size_a[:, None, 0] - size_b[None, :, 0])
    rows = np.abs(size_a[:, None, 1] - size_b[None, :, 1])
    far = np.sqrt(3.0) * tokens / _SLOW_REACH
    sizes = _SLOW**2 * (1.0 + far) * np.exp(-far) + _ROUGH_ROWS**2 * np.exp(-rows / _ROWS_REACH)
    sizes = sizes + _OFFSET**2 + _ROUGH_TOKENS**2 * np.exp(-tokens / _SLOW_REACH)
    return np.asarray(np.exp(-np.sqrt(square)) * sizes)
