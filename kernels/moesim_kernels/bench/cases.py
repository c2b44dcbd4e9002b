"""Builders: from a case to something that runs, for every operator. torch is imported by the builders.

Weights, caches and activations are views of the pool's arenas. Each rotation of a case reads other memory, or, where
one layer's experts exceed the cache, gives the same counts of rows to other experts. Suffixes: T tokens, E expert
slots, K choices a token, R rows, H hidden, I intermediate; attention as in `ops.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.floors import (
    activation_dtype,
    case_counts,
    floors,
    held_bytes,
    input_elements,
    norm_shape,
    output_elements,
    query_shape,
    weight_shapes,
)
from moesim_kernels.bench.io_cases import IO_BUILDERS
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import FP8_SCALE, Device, Pool, PoolFull, Prepared, torch_dtype
from moesim_kernels.ops.routing import assign

__all__ = ["BUILDERS", "build", "expert_how", "reserve"]

Builder = Callable[[Case, Device, Pool], Prepared]
_MOE_ROTATIONS = 64  # other experts at most so often: by then any cache is passed
_RESERVED = 0.8  # of the pool at most goes to one arena
_FP8 = ("gemm", "peak_gemm", "moe", "shared_expert", "copy_bandwidth")
_BACKWARD = ("loop", "grouped")


def build(case: Case, device: Device, pool: Pool) -> Prepared:
    """The case ready to run. Raises PoolFull, BadPlan where the device cannot run it, and what the operators raise."""
    if case.op not in IO_BUILDERS and held_bytes(case) > device.capacity_bytes:  # before anything is made
        raise PoolFull(held_bytes(case), device.capacity_bytes)
    return BUILDERS[case.op](case, device, pool)


def reserve(wanted: Iterable[Case], pool: Pool) -> None:
    """Make the arenas as large as the largest of these cases needs, so that none is replaced later.

    A case that would take more than the pool allows is left out here, and refused when it is built.
    """
    most: dict[tuple[str, Any], int] = {}
    for case in wanted:
        if case.op in IO_BUILDERS:
            continue
        weight, act = torch_dtype(case.dtype), torch_dtype(activation_dtype(case))
        for kind, dtype, elements in (
            ("weight", weight, pool.rotated_elements(weight, weight_shapes(case))),
            ("input", act, input_elements(case)),
            ("scratch", act, output_elements(case)),
        ):
            if elements * dtype.itemsize <= _RESERVED * pool.device.capacity_bytes:
                most[kind, dtype] = max(most.get((kind, dtype), 0), elements)
    for (kind, dtype), elements in sorted(most.items(), key=lambda item: -item[1]):
        if elements:
            try:
                pool.arena(kind, dtype, elements)
            except PoolFull:
                continue


def _prepared(case: Case, device: Device, run: Callable[[int], Any], rotations: int, graph: bool = True) -> Prepared:
    """Timed by events on CUDA (in a graph where nothing waits for the host), else by the thread's CPU time."""
    moved, flop = floors(case)
    cuda = device.kind == "cuda"
    return Prepared(run, rotations, moved, flop, "cuda" if cuda else "thread", graph=cuda and graph)


def _inputs(case: Case, pool: Pool, *shapes: tuple[int, ...]) -> list[Any]:
    """Activations: the head of the input arena, the same for all cases, one tensor behind the other."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = pool.arena("input", torch_dtype(activation_dtype(case)), sum(sizes))
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def _input(case: Case, pool: Pool, *shape: int) -> Any:
    return _inputs(case, pool, shape)[0]


def _scratch(case: Case, pool: Pool, *shape: int) -> Any:
    """Memory to write a result to, the same for all: nobody reads it."""
    return pool.arena("scratch", torch_dtype(activation_dtype(case)), math.prod(shape))[: math.prod(shape)].view(shape)


def _weights(case: Case, pool: Pool) -> list[list[Any]]:
    """One list of tensors a rotation. Raises BadPlan where the operator has no fp8 form."""
    if case.dtype == "fp8" and case.op not in _FP8:
        raise BadPlan(f"{case.op} has no fp8 operator; use bf16", f"case {case.id}")
    return pool.rotate(torch_dtype(case.dtype), weight_shapes(case))


def _quantised(sets: list[list[Any]]) -> list[list[Any]]:
    """fp8 weights with a scale a row, which makes them as large as the others."""
    from moesim_kernels.ops.fp8 import Quantised

    scales = [weight.new_full((*weight.shape[:-1], 1), FP8_SCALE, dtype=torch_dtype("fp32")) for weight in sets[0]]
    return [[Quantised(data, scale) for data, scale in zip(views, scales, strict=True)] for views in sets]


def _gemm(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.dense import gemm
    from moesim_kernels.ops.fp8 import gemm_fp8

    sets = _weights(case, pool)
    n, k = sets[0][0].shape
    x_MK = _input(case, pool, int(case.size["m"]), k)
    if case.dtype == "fp8":
        weights = _quantised(sets)
        return _prepared(case, device, lambda i: gemm_fp8(x_MK, weights[i][0]), len(sets))
    out_MN = _scratch(case, pool, x_MK.shape[0], n)
    return _prepared(case, device, lambda i: gemm(x_MK, sets[i][0], out_MN), len(sets))


def _peak_gemm(case: Case, device: Device, pool: Pool) -> Prepared:
    """A square product and nothing else: in fp8 both operands are quantised ahead, unlike in `gemm`."""
    import torch

    from moesim_kernels.ops.dense import gemm
    from moesim_kernels.ops.fp8 import quantise, why_no_fp8

    sets = _weights(case, pool)
    x_NN = _input(case, pool, *sets[0][0].shape)
    if case.dtype != "fp8":
        out_NN = _scratch(case, pool, *x_NN.shape)
        return _prepared(case, device, lambda i: gemm(x_NN, sets[i][0], out_NN), len(sets))
    reason = why_no_fp8(device.torch_device)
    if reason is not None:
        raise BadPlan(reason, f"case {case.id}")
    x, weights = quantise(x_NN), _quantised(sets)
    scales = [(x.scale, weight.scale.t()) for (weight,) in weights]

    def run(i: int) -> Any:
        left, right = scales[i]
        return torch._scaled_mm(x.data, sets[i][0].t(), left, right, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _prepared(case, device, run, len(sets))


def expert_how(case: Case, device: Device) -> Any:
    """What runs the experts: the backend, and for `torch` grouped_mm where it is one kernel, else the loop."""
    from moesim_kernels.ops.moe import grouped_is_native

    if case.backend != "torch":
        return case.backend
    return "grouped" if grouped_is_native(device.torch_device, torch_dtype(case.dtype)) else "loop"


def _waits(how: str, case: Case, device: Device) -> bool:
    """Whether the host waits for the device inside the call, which a CUDA graph cannot hold."""
    from moesim_kernels.ops.moe import grouped_is_native

    native = grouped_is_native(device.torch_device, torch_dtype(case.dtype))
    return how == "loop" or (how == "grouped" and not native)


class _Rows:
    """Rows of an expert case on the device, one set a rotation: the same counts given to other slots each.

    Rotation j takes weight set j mod sets; with every full round of the sets the busy slots move on by their number.
    """

    def __init__(self, case: Case, device: Device, pool: Pool, sets: int = 1) -> None:
        import torch

        count_E = case_counts(case)
        slots, tokens = len(count_E), int(case.size["tokens"])
        rng = np.random.default_rng(np.random.SeedSequence([case.seed, 7]))
        order_E, place_E = np.argsort(-count_E, kind="stable"), rng.permutation(slots)
        active = max(1, int(np.count_nonzero(count_E)))
        turns = -(-slots // active)
        call_bytes = max(1.0, floors(case)[0])
        self.rotations = sets * max(1, min(turns, -(-pool.rotations(call_bytes) // sets), _MOE_ROTATIONS // sets))
        self.token_R: list[Any] = []
        self.expert_R: list[Any] = []
        self.end_E: list[Any] = []
        where = device.torch_device
        for turn in range(self.rotations // sets):
            moved_E = np.zeros_like(count_E)
            moved_E[place_E[(np.arange(slots) + turn * active) % slots]] = count_E[order_E]
            token_R, expert_R = assign(moved_E, tokens, case.seed + turn)
            self.token_R.append(torch.from_numpy(token_R).to(where))
            self.expert_R.append(torch.from_numpy(expert_R).to(where))
            self.end_E.append(torch.from_numpy(np.cumsum(moved_E).astype(np.int32)).to(where))
        generator = torch.Generator().manual_seed(case.seed % (1 << 62))
        self.gate_R = torch.rand(int(case.size["rows"]), generator=generator).to(where)


def _moe(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.moe import moe_local

    sets = _weights(case, pool)
    rows = _Rows(case, device, pool, len(sets))
    if case.dtype == "fp8":
        return _moe_fp8(case, device, pool, sets, rows)
    how = expert_how(case, device)
    x_TH = _input(case, pool, int(case.size["tokens"]), int(case.shape["hidden"]))
    out_TH = _scratch(case, pool, *x_TH.shape)
    count = len(sets)

    def run(i: int) -> Any:
        w13, w2 = sets[i % count]
        turn = i // count
        return moe_local(x_TH, rows.token_R[turn], rows.gate_R, rows.end_E[turn], w13, w2, how, out_TH)

    return _prepared(case, device, run, rows.rotations, graph=not _waits(how, case, device))


def _moe_fp8(case: Case, device: Device, pool: Pool, sets: list[list[Any]], rows: _Rows) -> Prepared:
    """As `moe_local` runs with grouped_mm, the products in fp8."""
    from moesim_kernels.ops.fp8 import grouped_swiglu_fp8
    from moesim_kernels.ops.moe import combine

    if case.backend not in ("torch", "grouped"):
        raise BadPlan(f"backend {case.backend} has no fp8 experts; use torch", f"case {case.id}")
    weights, count = _quantised(sets), len(sets)
    x_TH = _input(case, pool, int(case.size["tokens"]), int(case.shape["hidden"]))
    out_TH = _scratch(case, pool, *x_TH.shape)

    def run(i: int) -> Any:
        token_R, end_E = rows.token_R[i // count], rows.end_E[i // count]
        w13, w2 = weights[i % count]
        y_RH = grouped_swiglu_fp8(x_TH.index_select(0, token_R), w13, w2, end_E)
        return combine(y_RH, rows.gate_R, token_R, x_TH.shape[0], out_TH)

    return _prepared(case, device, run, rows.rotations)


def _moe_gradient(case: Case, device: Device, pool: Pool) -> Prepared:
    """Gradients of the rows (moe_dgrad) or of the weights (moe_wgrad), from what a forward pass would have kept."""
    from moesim_kernels.ops.backward import grouped_dgrad, grouped_wgrad

    sets = _weights(case, pool)
    rows = _Rows(case, device, pool, len(sets))
    how, count = expert_how(case, device), len(sets)
    if how not in _BACKWARD:
        raise BadPlan(f"backend {how} has no backward; use torch", f"case {case.id}")
    graph = not _waits(how, case, device)
    hidden, inner, pairs = int(case.shape["hidden"]), int(case.shape["intermediate"]), int(case.size["rows"])
    wide = ((pairs, hidden), (pairs, 2 * inner))
    grad_RH, x_R2I, row_RH, act_RI = _inputs(case, pool, *wide, (pairs, hidden), (pairs, inner))

    def run(i: int) -> Any:
        (w13, w2), end_E = sets[i % count], rows.end_E[i // count]
        if case.op == "moe_dgrad":
            return grouped_dgrad(grad_RH, x_R2I, w13, w2, end_E, how)
        return grouped_wgrad(grad_RH, act_RI, x_R2I, row_RH, end_E, how)

    return _prepared(case, device, run, rows.rotations, graph)


def _router_options(case: Case, device: Device) -> dict[str, Any]:
    import torch

    s = case.shape
    bias_E = torch.zeros(int(s["experts"]), device=device.torch_device) if s["score"] == "sigmoid" else None
    groups = {"groups": int(s["groups"]), "top_groups": int(s["top_groups"])}
    return {"score": s["score"], "bias_E": bias_E, **groups}


def _router(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.moe import route

    sets, top_k = _weights(case, pool), int(case.shape["top_k"])
    x_TH = _input(case, pool, int(case.size["tokens"]), int(case.shape["hidden"]))
    options = _router_options(case, device)
    return _prepared(case, device, lambda i: route(x_TH, sets[i][0], top_k, **options), len(sets))


def _block(case: Case, device: Device, pool: Pool) -> Prepared:
    """A MoE layer's own part: `ops.block`."""
    from moesim_kernels.bench.block_case import block_call

    sets, tokens, hidden = _weights(case, pool), int(case.size["tokens"]), int(case.shape["hidden"])
    wide = int(case.shape["heads"]) * int(case.shape["head_dim"])
    hidden_TH, attended_TM = _inputs(case, pool, (tokens, hidden), (tokens, wide))
    scratch = _scratch(case, pool, output_elements(case))
    prepared = _prepared(
        case, device, block_call(case, device, pool, sets, (hidden_TH, attended_TM, scratch)), len(sets)
    )
    prepared.follows = True
    return prepared


def _router_backward(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.backward import router_backward
    from moesim_kernels.ops.dense import gemm
    from moesim_kernels.ops.moe import route

    sets, top_k = _weights(case, pool), int(case.shape["top_k"])
    x_TH = _input(case, pool, int(case.size["tokens"]), int(case.shape["hidden"]))
    logit_TE = gemm(x_TH, sets[0][0]).float()
    options = _router_options(case, device)
    expert_TK, gate_TK = route(x_TH, sets[0][0], top_k, **options)
    score = options["score"]
    run = lambda i: router_backward(gate_TK, x_TH, sets[i][0], logit_TE, expert_TK, score=score)  # noqa: E731
    return _prepared(case, device, run, len(sets))


def _permute(case: Case, device: Device, pool: Pool) -> Prepared:
    """Tokens that all chose top_k of these slots are copied top_k times; else the rows arrive one by one."""
    from moesim_kernels.ops.moe import permute

    rows = _Rows(case, device, pool)
    tokens, count = int(case.size["tokens"]), int(case.size["rows"])
    each = count // tokens if count % tokens == 0 and count else 1
    chosen = [
        expert_R[token_R.argsort(stable=True)].view(-1, each)
        for token_R, expert_R in zip(rows.token_R, rows.expert_R, strict=True)
    ]
    x_TH = _input(case, pool, chosen[0].shape[0], int(case.shape["hidden"]))
    slots = int(case.shape["slots"])
    return _prepared(case, device, lambda i: permute(x_TH, chosen[i], slots), rows.rotations)


def _combine(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.moe import combine

    rows = _Rows(case, device, pool)
    tokens, hidden = int(case.size["tokens"]), int(case.shape["hidden"])
    y_RH = _input(case, pool, int(case.size["rows"]), hidden)
    out_TH = _scratch(case, pool, tokens, hidden)
    run = lambda i: combine(y_RH, rows.gate_R, rows.token_R[i], tokens, out_TH)  # noqa: E731  as in every builder
    return _prepared(case, device, run, rows.rotations)


def _shared_expert(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.fp8 import gemm_fp8
    from moesim_kernels.ops.moe import shared_expert, swiglu

    sets = _weights(case, pool)
    x_TH = _input(case, pool, int(case.size["tokens"]), int(case.shape["hidden"]))
    if case.dtype != "fp8":
        return _prepared(case, device, lambda i: shared_expert(x_TH, *sets[i]), len(sets))
    weights = _quantised(sets)

    def run(i: int) -> Any:
        w13, w2 = weights[i]
        return gemm_fp8(swiglu(gemm_fp8(x_TH, w13)), w2)

    return _prepared(case, device, run, len(sets))


def _mask(case: Case, device: Device, pool: Pool) -> Any:
    """The mask of a windowed prefill, or None where the causal rule does."""
    from moesim_kernels.ops.attention import window_mask

    window, length = int(case.shape.get("window", 0)), int(case.size["length"])
    total = length + int(case.size["prefix"])
    if not 0 < window < total:
        return None
    key = ("mask", length, total, window)
    return pool.get(key, length * total, lambda: window_mask(length, total, window, device.torch_device))


def _forward(case: Case, device: Device, pool: Pool) -> Callable[[Any, Any, Any], Any]:
    from moesim_kernels.ops.attention import prefill_gqa, prefill_mla

    if case.shape["kind"] == "mla":
        return prefill_mla
    mask_LS = _mask(case, device, pool)
    return lambda query, key, value: prefill_gqa(query, key, value, mask_LS)


def _prefill(case: Case, device: Device, pool: Pool) -> Prepared:
    sets, forward = _weights(case, pool), _forward(case, device, pool)
    query = _input(case, pool, *query_shape(case))
    return _cold(case, device, pool, _prepared(case, device, lambda i: forward(query, *sets[i]), len(sets)))


def _decode(case: Case, device: Device, pool: Pool) -> Prepared:
    from moesim_kernels.ops.attention import decode_gqa, decode_mla

    s = case.shape
    sets = _weights(case, pool)
    query = _input(case, pool, *query_shape(case))
    if s["kind"] == "gqa":
        return _cold(case, device, pool, _prepared(case, device, lambda i: decode_gqa(query, *sets[i]), len(sets)))
    rank, scale = int(s["kv_dim"]) - int(s["rope_dim"]), (int(s["nope_dim"]) + int(s["rope_dim"])) ** -0.5
    return _cold(
        case, device, pool, _prepared(case, device, lambda i: decode_mla(query, sets[i][0], rank, scale), len(sets))
    )


def _cold(case: Case, device: Device, pool: Pool, prepared: Prepared) -> Prepared:
    """On a CPU an attention call comes after a layer's experts, whose weights have passed through every cache: with a
    short context its own code takes longer to come back than it runs (123 us hot, 368 us in a step)."""
    if device.kind == "cpu":
        dtype = torch_dtype(case.dtype)
        flat = pool.arena("weight", dtype, max(1, device.cache_bytes // dtype.itemsize))
        prepared.cool = flat[: max(1, device.cache_bytes // dtype.itemsize)].sum
    return prepared


def _attention_backward(case: Case, device: Device, pool: Pool) -> Prepared:
    """The backward alone: the forward graph is made here and kept. One rotation, on activations of its own pass."""
    from moesim_kernels.ops.attention import attention_backward

    tensors = [_input(case, pool, *query_shape(case)), *_weights(case, pool)[0]]
    inputs = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = _forward(case, device, pool)(*inputs)
    grad_out = _input(case, pool, *out.shape)
    return _prepared(case, device, lambda i: attention_backward(out, inputs, grad_out), 1, graph=False)


def _elementwise(case: Case, device: Device, pool: Pool) -> Prepared:
    """Residual add and RMS norm on as many tokens as move the bytes."""
    from moesim_kernels.ops.dense import norm_residual

    hidden_TH = _input(case, pool, *norm_shape(case))
    residual_TH, weight_H = _scratch(case, pool, *hidden_TH.shape), hidden_TH[0]
    return _prepared(case, device, lambda i: norm_residual(hidden_TH, residual_TH, weight_H), 1)


def _launch(case: Case, device: Device, pool: Pool) -> Prepared:
    """One operation on one number. Eager: what the host takes to launch it; in a CUDA graph: from node to node."""
    import torch

    one = torch.zeros(1, device=device.torch_device)
    if case.shape.get("graph", False):
        if device.kind != "cuda":
            raise BadPlan("a launch in a graph needs a plan for cuda; leave `graph` out", f"case {case.id}")
        return Prepared(lambda i: one.add_(1.0), 1, 0.0, 0.0, "cuda", graph=True)
    return Prepared(lambda i: one.add_(1.0), 1, 0.0, 0.0, "wall" if device.kind == "cuda" else "thread")


def _read_bandwidth(case: Case, device: Device, pool: Pool) -> Prepared:
    sets = _weights(case, pool)
    return _prepared(case, device, lambda i: sets[i][0].sum(), len(sets))


def _copy_bandwidth(case: Case, device: Device, pool: Pool) -> Prepared:
    """`bytes` are those read and those written together, as everywhere."""
    sets = _weights(case, pool)
    to = _scratch(case, pool, *sets[0][0].shape)
    return _prepared(case, device, lambda i: to.copy_(sets[i][0]), len(sets))


BUILDERS: dict[str, Builder] = {
    "gemm": _gemm,
    "moe": _moe,
    "moe_dgrad": _moe_gradient,
    "moe_wgrad": _moe_gradient,
    "router": _router,
    "router_backward": _router_backward,
    "block": _block,
    "permute": _permute,
    "combine": _combine,
    "shared_expert": _shared_expert,
    "attention_prefill": _prefill,
    "attention_decode": _decode,
    "attention_backward": _attention_backward,
    "elementwise": _elementwise,
    "launch": _launch,
    "read_bandwidth": _read_bandwidth,
    "copy_bandwidth": _copy_bandwidth,
    "peak_gemm": _peak_gemm,
    **IO_BUILDERS,
}
