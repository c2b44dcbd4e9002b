"""The choice of a configuration: pure, total, and within the device's shared memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.ops.triton_config import (
    CONFIGS,
    HOPPER_SHARED_BYTES,
    ITEM_BYTES,
    active_slots,
    choose_config,
    most_blocks,
)

SMALLEST_SHARED = 99 * 1024  # compute capability 8.9
H200 = 132
SIZES = st.integers(1, 1 << 17)


def chosen(rows: int, slots: int, hidden: int, intermediate: int) -> str:
    return choose_config(rows, slots, hidden, intermediate, "bf16", H200).name


@given(SIZES, st.integers(1, 512), SIZES, SIZES, st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 200))
def test_every_choice_takes_the_dtype_and_fits(rows, slots, hidden, intermediate, dtype, sm_count) -> None:  # type: ignore[no-untyped-def]
    for shared in (SMALLEST_SHARED, HOPPER_SHARED_BYTES):
        config = choose_config(rows, slots, hidden, intermediate, dtype, sm_count, shared)
        assert dtype in config.items
        assert config.buffer_bytes(dtype) <= shared


def test_every_configuration_is_chosen_somewhere_and_they_are_few() -> None:
    grid = itertools.product((1, 8, 64, 128, 256, 512, 1024, 65536), (1, 8, 128), (256, 4096), (256, 14336), ITEM_BYTES)
    names = {choose_config(*sizes, dtype, H200).name for *sizes, dtype in grid}
    assert names == set(CONFIGS)
    assert len(CONFIGS) <= 8


@pytest.mark.parametrize(
    ("layer", "top_k", "names"),
    [
        ((8, 4096, 14336), 2, {1: "rows16", 16: "rows16", 64: "rows32", 128: "rows64", 1024: "wide128"}),
        ((128, 2048, 768), 8, {1: "thin16", 16: "rows16", 256: "rows32", 512: "rows64", 4096: "wide128"}),
        ((32, 7168, 2048), 1, {1: "thin16", 256: "rows16", 1024: "rows64", 4096: "wide128"}),
    ],
)
def test_blocks_grow_with_the_rows_of_an_expert(layer, top_k, names) -> None:  # type: ignore[no-untyped-def]
    slots, hidden, intermediate = layer
    assert {tokens: chosen(tokens * top_k, slots, hidden, intermediate) for tokens in names} == names


def test_too_few_tiles_for_the_device_are_made_narrower() -> None:
    assert chosen(8, 8, 2048, 768) == "thin16"
    assert chosen(8, 8, 2048, 7680) == "rows16"
    assert chosen(512, 1, 512, 4096) == "rows128"
    assert chosen(2048, 1, 2048, 4096) == "rows128"  # 16 blocks x 8 columns of tiles
    assert chosen(2176, 1, 2048, 4096) == "wide128"  # 17 x 8 give each of 132 multiprocessors one


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([16, 32, 64, 128]))
def test_no_split_of_the_rows_needs_more_blocks(counts: list[int], block_rows: int) -> None:
    needed = sum(-(-count // block_rows) for count in counts)
    assert needed <= most_blocks(sum(counts), len(counts), block_rows)


@pytest.mark.parametrize("block_rows", [2, 3])
def test_some_split_needs_that_many_blocks(block_rows: int) -> None:
    for rows, slots in itertools.product(range(1, 8), range(1, 4)):
        splits = (c for c in itertools.product(range(rows + 1), repeat=slots) if sum(c) == rows)
        assert most_blocks(rows, slots, block_rows) == max(sum(-(-n // block_rows) for n in c) for c in splits)


def test_active_slots_is_the_mean_over_all_draws() -> None:
    for rows, slots in ((1, 5), (3, 2), (4, 3), (2, 1)):
        draws = list(itertools.product(range(slots), repeat=rows))
        assert active_slots(rows, slots) == pytest.approx(sum(len(set(d)) for d in draws) / len(draws))


@pytest.mark.parametrize(("change", "message"), [({"dtype": "fp8"}, "fp8"), ({"rows": 0}, "at least 1")])
def test_what_it_cannot_serve_is_refused(change: dict[str, object], message: str) -> None:
    sizes = {"rows": 8, "slots": 8, "hidden": 8, "intermediate": 8, "dtype": "bf16", "sm_count": 132}
    with pytest.raises(ValueError, match=message):
        choose_config(**(sizes | change))  # type: ignore[arg-type]
