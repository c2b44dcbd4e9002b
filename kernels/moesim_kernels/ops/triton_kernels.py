"""Triton kernels of the fused MoE layer. `triton_moe.fused_moe` launches them; nothing else should.

Letters: T tokens, R rows (token, expert) sorted by expert, E experts, H hidden, I intermediate, B blocks of at most
BM rows of one expert, S most rows of a token. Kernels take many arguments because a launch has no other way to pass
them. Offsets that can pass 2^31 are computed in 64 bits. Counts are not specialised, or each new one would compile.
"""
# mypy: ignore-errors
# (Triton's language looks like Python and is typed by its own compiler; tests compile every kernel.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_rows", "down", "gate_up", "map_blocks"]

NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["slots", "blocks", "tokens"])
def map_blocks(
    end_E, block_3B, count_T, slots, blocks, tokens, BM: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Which expert and which rows each block serves: block_3B = expert, first row, row past the last.

    Blocks that no expert needs get no rows. Each program writes CHUNK blocks, and zeroes CHUNK counters of count_T.
    """
    expert = tl.arange(0, SLOTS)
    end = tl.load(end_E + expert, mask=expert < slots, other=0)
    start = tl.load(end_E + expert - 1, mask=(expert > 0) & (expert < slots), other=0)
    past_E = tl.cumsum((end - start + BM - 1) // BM, 0)  # blocks up to and with this expert
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    before = past_E[None, :] <= block[:, None]
    owner = tl.sum(before.to(tl.int32), 1)  # as many experts end before this block
    block_in_owner = block - tl.max(tl.where(before, past_E[None, :], 0), 1)
    used = owner < slots
    owner_start = tl.load(end_E + owner - 1, mask=used & (owner > 0), other=0)
    owner_end = tl.load(end_E + owner, mask=used, other=0)
    first = tl.where(used, owner_start + block_in_owner * BM, 0)
    tl.store(block_3B + block, owner, mask=block < blocks)
    tl.store(block_3B + blocks + block, first, mask=block < blocks)
    tl.store(block_3B + 2 * blocks + block, tl.minimum(first + BM, owner_end), mask=block < blocks)
    tl.store(count_T + block, tl.zeros_like(block), mask=block < tokens)


@triton.jit
def _tile(blocks, tiles, GROUP: tl.constexpr):
    """This program's block and column tile. GROUP blocks go through all columns together, so that programs running
    at one time share weights (blocks of one expert) and rows (columns of one block) in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = program % (GROUP * tiles)
    return first + inside % size, inside // size


@triton.jit
def _product(a_MK, b_KN, used_M, depth, BM: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """[BM, COLS] in float32 from two tiles of pointers, walking `depth`. Unused rows are zeros and not read."""
    total = tl.zeros((BM, COLS), dtype=tl.float32)
    k = tl.arange(0, BK)
    for begin in range(0, depth, BK):
        if EVEN:
            a = tl.load(a_MK, mask=used_M[:, None], other=0.0)
            b = tl.load(b_KN)
        else:
            inside = k < depth - begin
            a = tl.load(a_MK, mask=used_M[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_KN, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_MK += BK
        b_KN += BK
    return total


@triton.jit(do_not_specialize=["blocks", "most"])
def gate_up(
    hidden_TH, token_R, w13, block_3B, act_RI, slot_TS, count_T,
    hidden, intermediate, blocks, most,
    BM: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act_RI = silu(x gate^T) * (x up^T), the rows x gathered from hidden_TH by token in the load itself.

    Columns of the tile alternate gate and up, so one product makes both and each thread holds the pairs it multiplies.
    The first column tile also enters its rows in their tokens' lists (slot_TS, in any order; count_T says how many).
    """
    block, tile = _tile(blocks, tl.cdiv(intermediate, COLS // 2), GROUP)
    expert = tl.load(block_3B + block)
    first = tl.load(block_3B + blocks + block)
    last = tl.load(block_3B + 2 * blocks + block)
    if first >= last:
        return
    row = first + tl.arange(0, BM)
    used = row < last
    token = tl.load(token_R + row, mask=used, other=0).to(tl.int64)
    column = tl.arange(0, COLS)
    channel = tl.minimum(tile * (COLS // 2) + column // 2, intermediate - 1)
    k = tl.arange(0, BK)
    a_MK = hidden_TH + token[:, None] * hidden + k[None, :]
    weight = w13 + expert.to(tl.int64) * (2 * intermediate * hidden)
    b_KN = weight + ((column % 2) * intermediate + channel)[None, :] * hidden + k[:, None]
    product = _product(a_MK, b_KN, used, hidden, BM, COLS, BK, EVEN)
    gate, up = tl.split(tl.reshape(product, (BM, COLS // 2, 2)))
    act = gate * tl.sigmoid(gate) * up
    out = tile * (COLS // 2) + tl.arange(0, COLS // 2)
    act_MN = act_RI + first.to(tl.int64) * intermediate + tl.arange(0, BM)[:, None] * intermediate + out[None, :]
    tl.store(act_MN, act.to(act_RI.dtype.element_ty), mask=used[:, None] & (out < intermediate)[None, :])
    if tile == 0:
        place = tl.atomic_add(count_T + token, 1, mask=used, sem="relaxed")
        tl.store(slot_TS + token * most + place, row, mask=used & (place < most))


@triton.jit(do_not_specialize=["blocks"])
def down(
    act_RI, gate_R, w2, block_3B, out_RH,
    hidden, intermediate, blocks,
    BM: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out_RH = gate_R * (act_RI w2^T): the second GEMM, each row scaled by its gate before it is rounded."""
    block, tile = _tile(blocks, tl.cdiv(hidden, COLS), GROUP)
    expert = tl.load(block_3B + block)
    first = tl.load(block_3B + blocks + block)
    last = tl.load(block_3B + 2 * blocks + block)
    if first >= last:
        return
    m = tl.arange(0, BM)
    used = first + m < last
    column = tile * COLS + tl.arange(0, COLS)
    k = tl.arange(0, BK)
    a_MK = act_RI + first.to(tl.int64) * intermediate + m[:, None] * intermediate + k[None, :]
    weight = w2 + expert.to(tl.int64) * (hidden * intermediate)
    b_KN = weight + tl.minimum(column, hidden - 1)[None, :] * intermediate + k[:, None]
    product = _product(a_MK, b_KN, used, intermediate, BM, COLS, BK, EVEN)
    gate = tl.load(gate_R + first + m, mask=used, other=0.0)
    out_MN = out_RH + first.to(tl.int64) * hidden + m[:, None] * hidden + column[None, :]
    tl.store(
        out_MN, (product * gate[:, None]).to(out_RH.dtype.element_ty), mask=used[:, None] & (column < hidden)[None, :]
    )


@triton.jit(do_not_specialize=["most"])
def combine_rows(
    out_RH, slot_TS, count_T, out_TH, hidden, most, SLOTS: tl.constexpr, BH: tl.constexpr, STEP: tl.constexpr
):
    """out_TH = sum of each token's rows, in ascending order of row whatever order they were entered in: the same bits
    every time. STEP rows are read at once."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    count = tl.load(count_T + token)
    place = tl.arange(0, SLOTS)
    row_S = tl.load(slot_TS + token * most + place, mask=place < tl.minimum(count, most), other=NO_ROW)
    total = tl.zeros((BH,), dtype=tl.float32)
    for _ in range(0, count, STEP):
        for _step in tl.static_range(STEP):
            row = tl.min(row_S, 0)
            row_S = tl.where(row_S == row, NO_ROW, row_S)
            limit = tl.where(row == NO_ROW, 0, hidden)
            total += tl.load(out_RH + row.to(tl.int64) * hidden + h, mask=h < limit, other=0.0).to(tl.float32)
    tl.store(out_TH + token * hidden + h, total.to(out_TH.dtype.element_ty), mask=h < hidden)
