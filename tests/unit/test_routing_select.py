"""The shared pieces of routers against plain definitions, in NumPy and compiled; both choose alike."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from moesim.policy import load_policy, policy_kinds
from moesim.routing import NONE, RoutingContext
from moesim.routing.select import (
    kth_highest,
    load_of,
    ranked,
    sigmoid,
    softmax,
    softmax_gates,
    top_ids,
)  # fmt: skip

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed (pip install moesim[fast])")
MODES = [pytest.param("0", id="numpy"), pytest.param("1", id="compiled", marks=needs_numba)]
LARGE = (4096, 64)  # just large enough to be compiled


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    monkeypatch.setenv("MOESIM_COMPILED", request.param)
    return request.param


def scores(shape, seed=0, dtype=np.float32, levels=None):
    score = np.random.default_rng(seed).normal(0, 1, shape)
    return (score if levels is None else np.round(score * levels) / levels).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 2, 0.5])
@pytest.mark.parametrize(
    ("shape", "k"), [(LARGE, 8), (LARGE, 64), ((50, 7), 1), ((0, 5), 2), ((3, 1), 1), ((9, 40), 40)]
)
def test_top_ids_is_a_stable_sort(mode, dtype, levels, shape, k):
    score = scores(shape, 1, dtype, levels)
    before = score.copy()
    ids = top_ids(score, k)
    np.testing.assert_array_equal(ids, np.argsort(-score, axis=1, kind="stable")[:, :k])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(score, before)
    score.setflags(write=False)
    np.testing.assert_array_equal(top_ids(score, k), ids)
    np.testing.assert_array_equal(top_ids(np.asfortranarray(score), k), ids)


def test_zeros_of_both_signs_infinities_and_denormals_keep_their_order(mode):
    row = np.array([-0.0, 0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, -0.0], np.float32)
    score = np.tile(row, (40_000, 1))
    assert (top_ids(score, 8) == [2, 6, 4, 0, 1, 8, 5, 7]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", [0, 4095])
def test_what_cannot_be_chosen_from_is_refused(mode, dtype, row):
    for nan in (np.nan, -np.nan):
        score = scores(LARGE, dtype=dtype)
        score[row, 5] = nan
        with pytest.raises(ValueError, match="NaN"):
            top_ids(score, 8)
    score = scores(LARGE, dtype=dtype)
    score[row, 7:] = -np.inf
    with pytest.raises(ValueError, match="-inf"):
        top_ids(score, 8)
    top_ids(score, 7)
    for k in (0, 65):
        with pytest.raises(ValueError, match="between 1 and 64"):
            top_ids(score, k)


@pytest.mark.parametrize("shape", [LARGE, (1024, 300), (5, 9), (0, 9)])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_kth_highest(mode, shape, k):
    score, less = scores(shape, 2, levels=4), scores(shape[1:], 3)
    np.testing.assert_array_equal(kth_highest(score, k), -np.sort(-score, axis=1)[:, k - 1])
    np.testing.assert_array_equal(kth_highest(score, k, less), -np.sort(-(score - less), axis=1)[:, k - 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_and_sigmoid(mode, dtype):
    score = scores(LARGE, dtype=dtype) * 20
    score[3] = -np.inf
    score[4, 1:] = -np.inf
    wide = score.astype(np.float64)
    tolerance = 1e-6 if dtype is np.float32 else 1e-12
    share = np.exp(np.delete(wide, 3, 0))
    share /= share.sum(1, keepdims=True)
    np.testing.assert_allclose(np.delete(softmax(score), 3, 0), share, atol=tolerance)
    assert (softmax(score)[3] == 0).all()
    np.testing.assert_allclose(sigmoid(score), 1 / (1 + np.exp(-wide)), atol=tolerance)
    assert softmax(score).dtype == sigmoid(score).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalise", [False, True])
def test_gates_of_the_chosen_alone(mode, dtype, normalise):
    score = scores(LARGE, dtype=dtype) * 20
    score[4, 8:] = -np.inf
    ids = top_ids(score, 8)
    gates = np.take_along_axis(softmax(score.astype(np.float64)), ids.astype(int), 1)
    if normalise:
        gates /= gates.sum(1, keepdims=True)
    out = softmax_gates(score, ids, normalise)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, gates, rtol=1e-5, atol=1e-6 if dtype is np.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranked_puts_a_mask_in_order(mode, dtype):
    score = scores(LARGE, dtype=dtype, levels=2)
    taken = np.random.default_rng(0).random(LARGE) < 0.2
    width = int(taken.sum(1).max())
    out = ranked(score, taken, width)
    for t in range(0, 4096, 37):
        mine = sorted(np.flatnonzero(taken[t]), key=lambda e: (-score[t, e], e))
        assert out[t].tolist() == mine + [NONE] * (width - len(mine))
    assert ranked(score, taken, 70)[:, 64:].max() == NONE
    np.testing.assert_array_equal(load_of(out, 64), taken.sum(0))


@needs_numba
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", policy_kinds("routing"))
def test_every_router_chooses_alike_compiled_or_not(kind, normalise, training, monkeypatch):
    routed = {}
    for mode in "01":
        monkeypatch.setenv("MOESIM_COMPILED", mode)
        policy, state = load_policy("routing", kind), {}
        for step in range(2):
            context = RoutingContext(
                8, norm_topk_prob=normalise, training=training, step=step, state=state, seed=1,
                token_T=np.arange(4096) % 997, sequence_T=np.arange(4096) // 512, position_T=np.arange(4096) % 512,
                class_T=np.arange(4096) // 512 % 2,
            )  # fmt: skip
            routed[mode] = policy.route(scores(LARGE, step, levels=64), context)
            state = routed[mode].state
    np.testing.assert_array_equal(routed["0"].expert_TK, routed["1"].expert_TK)
    np.testing.assert_allclose(routed["0"].gate_TK, routed["1"].gate_TK, rtol=0, atol=1e-6)
    assert routed["0"].state.keys() == routed["1"].state.keys()
    for name, array in routed["0"].state.items():
        np.testing.assert_array_equal(array, routed["1"].state[name])


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_numba_waits_until_it_is_needed():
    code = "import sys, numpy as np, moesim.routing as r; r.top_ids(np.zeros((9, 64), np.float32), 8)"
    assert run(f"{code}; print('numba' in sys.modules)") == "False"


@needs_numba
def test_compiled_code_needs_no_folder_to_write_to():
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import numpy as np; from moesim.routing import compiled\n"
        "print(compiled.keys(np.zeros((1, 2), np.float32)).tolist())"
    )
    assert run(code) == str([[-(1 << 32), -(1 << 32) + 1]])


@pytest.mark.parametrize("levels", [0.5, 2, 50])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(3000, 64, 8), (500, 16, 16), (500, 9, 1), (300, 200, 40)])
def test_doubles_that_float32_takes_for_equal_keep_their_order(levels, tokens, experts, k):
    rng = np.random.default_rng(5)
    near = np.round(rng.normal(0, 1, (tokens, experts)) * levels) / levels
    score = near + rng.integers(0, 3, near.shape) * 1e-12  # three values that one float32 stands for
    np.testing.assert_array_equal(top_ids(score, k), np.argsort(-score, axis=1, kind="stable")[:, :k])


def test_doubles_beyond_float32():
    score = np.array([[1e300, 2e300, -1e300, 0.0], [-1e300, -2e300, -np.inf, -3e300]])
    np.testing.assert_array_equal(top_ids(score, 3), [[1, 0, 3], [0, 1, 3]])
    with pytest.raises(ValueError, match="fewer than 4"):
        top_ids(score, 4)
