"""Recorded loads: windows, splits and the figures that follow from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces.expert_loads import from_tokens, load_expert_loads, recognise
from moesim.workload.loads import ExpertLoads
from moesim.workload.pool import RoutingSource


def pool(tokens: int = 23, seed: int = 0) -> RoutingSource:
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(7)[:2] for _ in range(3)] for _ in range(tokens)]).astype(np.uint8)
    return RoutingSource(ids, np.array([0, 4, 15, tokens]), 7, 2, True, "pool", layer_index=(1, 2, 5))


def loads(rows: int = 7) -> ExpertLoads:
    return ExpertLoads(np.random.default_rng(1).integers(1, 9, (rows, 3, 5)), "made")


def test_rows_of_a_token_trace_hold_every_token_once() -> None:
    made = from_tokens(pool(), 5)
    assert made.num_rows == 5
    assert made.row_tokens_S is not None
    assert made.row_tokens_S.tolist() == [4, 5, 4, 5, 5]  # five as equal rows as can be
    np.testing.assert_array_equal(made.count_SLE.sum(axis=(0, 2)), [46, 46, 46])
    np.testing.assert_array_equal(made.count_SLE[0], pool().counted(pool().expert_TLK[:4]))
    assert made.tokens_per_step == pytest.approx(23 / 5)
    assert made.tokens_per_rank is None


def test_windows_are_consecutive_rows_and_lose_nothing() -> None:
    whole = loads()
    window_WLE = whole.windows(3)
    np.testing.assert_array_equal(window_WLE[0], whole.count_SLE[:2].sum(axis=0))
    np.testing.assert_array_equal(window_WLE.sum(axis=0), whole.total_LE)
    assert whole.windows(100).shape == whole.count_SLE.shape


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_split_parts_rows_and_tokens_alike(share: float) -> None:
    first, rest = from_tokens(pool(), 3).split(share)
    assert first.num_rows + rest.num_rows == 8
    for part in (first, rest):
        assert part.tokens is not None
        np.testing.assert_array_equal(part.tokens.count_LE(), part.total_LE)
        assert part.tokens.sequence_start[-1] == part.tokens.num_tokens
        assert (np.diff(part.tokens.sequence_start) > 0).all()
    joined = np.concatenate([first.tokens.expert_TLK, rest.tokens.expert_TLK])  # type: ignore[union-attr]
    np.testing.assert_array_equal(joined, pool().expert_TLK)


def test_a_part_without_load_is_refused() -> None:
    count = np.ones((4, 2, 3), int)
    count[2:, 1] = 0
    with pytest.raises(BadInput, match="layer 9 has no load in the last 2 rows"):
        ExpertLoads(count, "made", layer_index=(4, 9)).split(0.5)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(BadInput, match="one row"):
        loads(1).split(0.5)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (np.zeros((2, 3)), "whole numbers"),
        (np.ones((2, 3, 4)), "whole numbers"),
        (np.array([[[3, -1]]]), "row 0, layer 0, expert 1 has -1"),
        (np.array([[[3, 1], [0, 0]]]), "layer 1 has none"),
    ],
)
def test_what_are_no_loads_is_refused(count: np.ndarray, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BadInput, match=words):
        ExpertLoads(count, "made")


def test_counts_files_are_one_row_and_shares_become_whole(tmp_path: Path) -> None:
    whole, shares = tmp_path / "whole.csv", tmp_path / "shares.csv"
    whole.write_text("layer,e0,e1\n3,5,7\n9,1,1\n")
    shares.write_text("layer,e0,e1\n0,0.25,0.75\n")
    read = load_expert_loads(whole)
    assert recognise(whole) == "counts"
    assert read.layer_index == (3, 9)
    assert read.steps_per_row == 0
    assert load_expert_loads(whole, steps_per_row=7).steps_per_row == 7
    assert any("nothing of it can be held out" in w for w in read.warnings)
    np.testing.assert_array_equal(read.count_SLE, [[[5, 7], [1, 1]]])
    share = load_expert_loads(shares).total_LE
    np.testing.assert_allclose(share / share.sum(), [[0.25, 0.75]])


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such recording"):
        load_expert_loads(tmp_path / "nothing.csv")
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(BadInput, match="that is known: routing, counts, sglang_recorder"):
        load_expert_loads(other)
    with pytest.raises(BadInput, match="unknown format 'pickle'"):
        load_expert_loads(other, "pickle")
