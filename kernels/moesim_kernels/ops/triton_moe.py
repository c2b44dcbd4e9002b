"""One fused MoE layer in four Triton launches: block map; gather + gate and up + SwiGLU; down + gates; combine.

Rows are expert-sorted. A small first kernel turns the experts' ends into a map of blocks on the device, so the host
never waits and the whole layer can be captured in a CUDA graph. The second GEMM writes [R, H] and a last kernel adds
each token's rows in ascending order: unlike atomic additions this gives the same bits every time and needs no float32
[T, H] buffer. Gated (SwiGLU) experts in bf16, fp16 and fp32; products and sums are float32 (fp32 inputs are multiplied
in full float32, never in TF32). fp8 is not implemented.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import triton_kernels as kernels
from .triton_config import HOPPER_SHARED_BYTES, Config, Tile, choose_config, most_blocks

__all__ = ["DTYPE_NAMES", "fused_moe"]

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
GROUP = 8  # blocks that go through the columns together
CHUNK = 32  # blocks that one program of the map writes
COMBINED = 512  # columns that one program of the combination adds; one warp, so that finding rows needs no barrier
STEP = 4  # rows that it reads at once
INTERPRETED_SM_COUNT = 132  # an H200's, so that the interpreter takes the configurations that one would


def fused_moe(
    hidden_TH: torch.Tensor,
    token_R: torch.Tensor,
    gate_R: torch.Tensor,
    end_E: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """The rank-local MoE layer: out[t] = sum over t's rows of gate * w2[e] @ (silu(gate rows of w13[e] @ x) * up rows).

    hidden_TH [T, H]; token_R [R] int32 or int64, the rows' tokens, sorted by expert, a token at most once an expert;
    gate_R [R] float32; end_E [E] int32, the row past each expert's last (rows past end_E[-1] are left out);
    w13 [E, 2I, H], gate rows first; w2 [E, H, I]. All contiguous and on one device. out: [T, H] to write, else made.
    config: one of `triton_config.CONFIGS`, else chosen by `choose_config`. Values of token_R and end_E are not
    checked: that would make the host wait. Returns out. Raises ValueError for tensors that do not fit together.
    """
    _check(hidden_TH, token_R, gate_R, end_E, w13, w2, out)
    out = torch.empty_like(hidden_TH) if out is None else out
    tokens, hidden = hidden_TH.shape
    rows, slots, intermediate = token_R.numel(), end_E.numel(), w2.shape[2]
    if rows == 0 or tokens == 0:
        return out.zero_()
    if config is None:
        sm_count, shared_bytes = _limits(hidden_TH.device)
        dtype = DTYPE_NAMES[hidden_TH.dtype]
        config = choose_config(rows, slots, hidden, intermediate, dtype, sm_count, shared_bytes)
    blocks = most_blocks(rows, slots, config.block_rows)
    most = min(rows, slots)
    block_3B = torch.empty((3, blocks), dtype=torch.int32, device=out.device)
    count_T = torch.empty(tokens, dtype=torch.int32, device=out.device)
    slot_TS = torch.empty((tokens, most), dtype=torch.int32, device=out.device)
    act_RI = hidden_TH.new_empty((rows, intermediate))
    out_RH = hidden_TH.new_empty((rows, hidden))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernels.map_blocks[(triton.cdiv(max(blocks, tokens), CHUNK),)](
            end_E, block_3B, count_T, slots, blocks, tokens,
            BM=config.block_rows, SLOTS=max(16, triton.next_power_of_2(slots)), CHUNK=CHUNK,
        )  # fmt: skip
        kernels.gate_up[(blocks * triton.cdiv(intermediate, config.up.columns // 2),)](
            hidden_TH, token_R, w13, block_3B, act_RI, slot_TS, count_T, hidden, intermediate, blocks, most,
            **_meta(config.block_rows, config.up, hidden),
        )  # fmt: skip
        kernels.down[(blocks * triton.cdiv(hidden, config.down.columns),)](
            act_RI, gate_R, w2, block_3B, out_RH, hidden, intermediate, blocks,
            **_meta(config.block_rows, config.down, intermediate),
        )  # fmt: skip
        columns = min(COMBINED, triton.next_power_of_2(hidden))
        kernels.combine_rows[(tokens, triton.cdiv(hidden, columns))](
            out_RH, slot_TS, count_T, out, hidden, most,
            SLOTS=max(16, triton.next_power_of_2(most)), BH=columns, STEP=STEP, num_warps=1,
        )  # fmt: skip
    return out


def _meta(block_rows: int, tile: Tile, depth: int) -> dict[str, Any]:
    """Compile-time arguments of one GEMM whose reduction runs over `depth`."""
    return {
        "BM": block_rows,
        "COLS": tile.columns,
        "BK": tile.depth,
        "EVEN": depth % tile.depth == 0,
        "GROUP": GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of the device, and the shared memory in bytes that one block may have."""
    if device.type != "cuda":
        return INTERPRETED_SM_COUNT, HOPPER_SHARED_BYTES
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index)  # torch tells these only lately
    return facts["multiprocessor_count"], facts["max_shared_mem"]


def _check(
    hidden_TH: torch.Tensor,
    token_R: torch.Tensor,
    gate_R: torch.Tensor,
    end_E: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError where shapes, types, devices or strides do not fit; reads no value."""
    if w2.dim() != 3 or hidden_TH.dim() != 2:
        raise ValueError(f"hidden is [T, H] and w2 [E, H, I]: got {list(hidden_TH.shape)} and {list(w2.shape)}.")
    slots, hidden, intermediate = w2.shape
    dtype = hidden_TH.dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"the fused kernel computes in {', '.join(DTYPE_NAMES.values())}: hidden is {dtype}.")
    want = {
        "hidden": (hidden_TH, [hidden_TH.shape[0], hidden], [dtype]),
        "token_R": (token_R, [token_R.numel()], [torch.int32, torch.int64]),
        "gate_R": (gate_R, [token_R.numel()], [torch.float32]),
        "end_E": (end_E, [slots], [torch.int32]),
        "w13": (w13, [slots, 2 * intermediate, hidden], [dtype]),
        "w2": (w2, [slots, hidden, intermediate], [dtype]),
    }
    if out is not None:
        want["out"] = (out, [hidden_TH.shape[0], hidden], [dtype])
    for name, (tensor, shape, dtypes) in want.items():
        if list(tensor.shape) != shape or tensor.dtype not in dtypes:
            types = " or ".join(str(one) for one in dtypes)
            raise ValueError(f"{name} must be {shape} {types}: got {list(tensor.shape)} {tensor.dtype}.")
        if tensor.device != hidden_TH.device or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and on {hidden_TH.device}: it is on {tensor.device}.")
    if min(slots, hidden, intermediate) < 1 or 2 * intermediate * hidden >= 2**31:
        raise ValueError(f"one expert must have 1 to 2^31 - 1 weights in w13: w2 is {list(w2.shape)}.")
    if not (hidden_TH.is_cuda or isinstance(kernels.gate_up, InterpretedFunction)):
        raise ValueError(
            "the fused kernel needs a CUDA device (or TRITON_INTERPRET=1 before the import): use how='loop'."
        )
