"""Which sizes of an operator are measured: grids up to the deployment's limits, and held-out points drawn at random.

Grids follow one rule: steps of 4, the largest size always among them, then the middle of the widest gap until there are
enough. Held-out points are drawn independently from one distribution an operator (log-uniform sizes, a random family of
histograms), so that they are exchangeable, which split-conformal intervals need (Vovk et al., Algorithmic Learning in a
Random World, 2005, section 2.1).

Legend: T tokens of a rank, R rows = (token, expert) pairs of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from moesim.cost.operators import AttentionShape
from moesim.dtypes import dtype_bytes
from moesim_kernels.bench.plan import Case
from moesim_kernels.calibrate.deployment import Deployment

__all__ = [
    "attention_cases",
    "block_cases",
    "ladder",
    "layer_cases",
    "moe_cases",
    "random_histogram",
    "stream_cases",
    "training_cases",
]

HELD_OUT_MOE = 30
HELD_OUT = 10  # of every other operator with intervals
_CONTEXT_FROM = 16
_KV_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # the largest cache that one decode point reads
_MICRO_EXPERTS = 4
_Sizes = dict[str, Any]


def ladder(most: int, count: int, least: int = 1) -> list[int]:
    """`count` whole sizes from `least` to `most` (or as many as there are): steps of 4, then widest gaps halved."""
    most = max(most, least)
    sizes = {least, most}
    step = least * 4
    while step <= most / 1.5 and len(sizes) < count:
        sizes.add(step)
        step *= 4
    while len(sizes) < count:
        gaps = [(b / a, a, b) for a, b in pairwise(sorted(sizes)) if b - a > 1]
        if not gaps:
            break
        _, low, high = max(gaps)
        sizes.add(min(max(round(math.sqrt(low * high)), low + 1), high - 1))
    return sorted(sizes)


def moe_cases(d: Deployment, device: str, backend: str, rng: np.random.Generator) -> Iterator[Case]:
    """The routed experts of one rank: uniform routing at 12 token counts, Zipf 1.2 at three, few experts with n rows
    each (for the row-work table), random held-out points.
    """
    if d.moe is None:
        return
    counts = ladder(d.max_tokens, 12)
    for tokens in counts:
        yield _moe(d, "moe", backend, tokens, "uniform")
    many = [t for t in counts if t >= 8] or counts
    for tokens in sorted({many[len(many) // 3], many[(2 * len(many)) // 3], many[-1]}):
        yield _moe(d, "moe", backend, tokens, "zipf:1.2")
    yield from _micro(d, backend)
    if d.layout.ep > 1:  # parts have fewer rows than an even share, down to one, and hot ones more
        for rows in sorted({1, max(1, d.rows_of(1) // 2)} - {d.rows_of(1)}):
            yield _moe(d, "moe", backend, 1, "uniform", rows=rows)
        rows = min(2 * d.rows_of(d.max_tokens), d.group_tokens(d.max_tokens) * min(d.model.top_k, d.slots))
        yield _moe(d, "moe", backend, d.max_tokens, "uniform", rows=rows)
    for i in range(HELD_OUT_MOE):
        tokens = _log_uniform(rng, 1, d.max_tokens)
        yield _moe(d, "moe", backend, tokens, random_histogram(rng, d.slots, d.model.top_k), role="heldout", seed=i + 1)


def _micro(d: Deployment, backend: str) -> Iterator[Case]:
    """A few experts with n rows each, n in powers of 2 up to all tokens of the rank."""
    assert d.moe is not None
    experts = min(_MICRO_EXPERTS, d.model.top_k, d.slots)
    shape = _moe_shape(d)
    most = d.group_tokens(d.max_tokens)
    for n in sorted({*(2**i for i in range(most.bit_length())), most}):
        size: _Sizes = {"tokens": n, "rows": n * experts, "histogram": f"few:{experts}"}
        yield Case("moe", shape, size, _name(d.moe.dtype), backend)


def _moe_shape(d: Deployment) -> dict[str, Any]:
    assert d.moe is not None
    m = d.moe
    return {"hidden": m.hidden, "intermediate": m.intermediate, "slots": m.local_experts, "top_k": m.top_k}


def _moe(
    d: Deployment,
    op: str,
    backend: str,
    tokens: int,
    histogram: str,
    *,
    rows: int = 0,
    role: str = "grid",
    seed: int = 0,
) -> Case:
    assert d.moe is not None
    rows = rows or d.rows_of(tokens)
    size: _Sizes = {"tokens": d.tokens_of(tokens, rows), "rows": rows, "histogram": histogram}
    return Case(op, _moe_shape(d), size, _name(d.moe.dtype), backend, role, seed)


def random_histogram(rng: np.random.Generator, slots: int, top_k: int) -> str:
    """A random kind of histogram: even, drawn evenly, or skewed by a random exponent, or few experts busy."""
    kind = rng.choice(["uniform", "zipf", "balanced", "few"], p=[0.35, 0.45, 0.1, 0.1])
    if kind == "zipf":
        return f"zipf:{rng.uniform(0.4, 1.4):.2f}"
    if kind == "few":
        return f"few:{int(rng.integers(min(top_k, slots), slots + 1))}"
    return str(kind)


def layer_cases(d: Deployment, device: str, rng: np.random.Generator) -> Iterator[Case]:
    """What else a layer runs: products by distinct (n, k, dtype), router, permute, combine, shared expert and
    elementwise passes.
    """
    needs = d.gemms()
    for need in needs:
        for m in ladder(need.rows, 12):
            yield Case("gemm", {"n": need.n, "k": need.k}, {"m": m}, need.dtype)
    for i in range(HELD_OUT):
        need = needs[int(rng.integers(len(needs)))]
        m = _log_uniform(rng, 1, need.rows)
        yield Case("gemm", {"n": need.n, "k": need.k}, {"m": m}, need.dtype, role="heldout", seed=i + 1)
    if d.moe is not None:
        act = _name(d.model.activation_dtype)
        share: _Sizes = {"hidden": d.moe.hidden, "slots": d.moe.local_experts, "top_k": d.moe.top_k}
        for tokens in ladder(d.max_tokens, 5):
            yield _router(d, "router", tokens)
            rows = d.rows_of(tokens)
            size: _Sizes = {"tokens": d.tokens_of(tokens, rows), "rows": rows, "histogram": "uniform"}
            yield Case("permute", share, size, act)
            yield Case("combine", share, size, act)
            if d.model.shared_intermediate_size:
                inter = -(-d.model.shared_intermediate_size // d.layout.tp)
                shape: _Sizes = {"hidden": d.model.hidden_size, "intermediate": inter}
                yield Case("shared_expert", shape, {"tokens": tokens}, _name(d.model.weight_dtype))
    least, most = d.elementwise_bytes()
    act = _name(d.model.activation_dtype)
    for moved in ladder(most, 8, least):
        yield Case("elementwise", {}, {"bytes": moved}, act)
    for i in range(HELD_OUT):
        yield Case("elementwise", {}, {"bytes": _log_uniform(rng, least, most)}, act, role="heldout", seed=i + 1)


def block_cases(d: Deployment, rng: np.random.Generator) -> Iterator[Case]:
    """A MoE layer's own part as a whole: 10 token counts, and held-out ones."""
    s = d.block()
    if s is None:
        return
    shape: _Sizes = {
        "hidden": s.hidden,
        "heads": s.heads,
        "kv_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "experts": s.experts,
        "top_k": s.top_k,
        "router_dtype": _name(s.router_dtype),
        "score": s.score,
        "groups": s.groups,
        "top_groups": s.top_groups,
        "bias": bool(s.bias),
        "head_norm": bool(s.head_norm),
    }
    for tokens in ladder(d.max_tokens, 10):
        yield Case("block", shape, {"tokens": tokens}, _name(s.dtype))
    for i in range(HELD_OUT):
        tokens = _log_uniform(rng, 1, d.max_tokens)
        yield Case("block", shape, {"tokens": tokens}, _name(s.dtype), role="heldout", seed=i + 1)


def _router(d: Deployment, op: str, tokens: int) -> Case:
    m = d.model
    shape: _Sizes = {
        "hidden": m.hidden_size,
        "experts": m.num_experts,
        "top_k": m.top_k,
        "score": m.scoring,
        "groups": m.num_expert_groups,
        "top_groups": m.top_groups,
    }
    return Case(op, shape, {"tokens": tokens}, _name(m.router_dtype))


def attention_cases(d: Deployment, device: str, rng: np.random.Generator) -> Iterator[Case]:
    """Decode over a grid of batches and contexts as far as one cache fits, prefill of whole prompts, and of chunks on a
    prefix, which are looked up at the prompt of the same area: whole prompts reach that far.
    """
    shapes = d.attention()
    for shape in shapes:
        for batch in ladder(d.engine.max_num_seqs, 3):
            for context in _contexts(d, shape):
                if batch == 1 or batch * context * _token_bytes(shape) <= _KV_BYTES[device]:
                    yield _decode(d, shape, batch, context)
        for length in _lengths(d, shape):
            yield _prefill(d, "attention_prefill", shape, length, 0)
        for length, prefix in _prefixes(d):
            yield _prefill(d, "attention_prefill", shape, length, prefix)
    for i in range(HELD_OUT):
        shape = shapes[int(rng.integers(len(shapes)))]
        contexts = _contexts(d, shape)
        batch = _log_uniform(rng, 1, d.engine.max_num_seqs)
        most = max(1, min(contexts[-1], int(_KV_BYTES[device] // (batch * _token_bytes(shape)))))
        context = _log_uniform(rng, min(contexts[0], most), most)
        yield _decode(d, shape, batch, context, role="heldout", seed=i + 1)
        length = _log_uniform(rng, min(_CONTEXT_FROM, d.max_tokens), min(d.max_tokens, d.max_context))
        room = d.max_context - length
        prefix = _log_uniform(rng, 1, room) if room > 0 and rng.random() < 0.5 else 0
        yield _prefill(d, "attention_prefill", shape, length, prefix, role="heldout", seed=i + 1)


def _token_bytes(shape: AttentionShape) -> float:
    """Bytes one token leaves in the cache of one layer."""
    if shape.kind == "mla":
        return shape.kv_dim * dtype_bytes(shape.kv_dtype)
    return shape.num_kv_heads * (shape.head_dim + shape.v_head_dim) * dtype_bytes(shape.kv_dtype)


def _contexts(d: Deployment, shape: AttentionShape) -> list[int]:
    """Contexts of decode: up to the longest sequence, cut to the window where there is one."""
    most = min(d.max_context, shape.window) if shape.window > 0 else d.max_context
    return ladder(most, 6, min(_CONTEXT_FROM, most))


def _lengths(d: Deployment, shape: AttentionShape) -> list[int]:
    """Prompts: steps up to the largest chunk, then on to the prompt whose causal area is that of the largest chunk on
    the longest prefix. Between the ends lengths are odd, as prompts are: kernels are quicker on whole tiles.
    """
    chunk = min(d.max_tokens, d.max_context)
    area = math.ceil(math.sqrt(chunk * (2 * d.max_context - chunk)))
    own = ladder(chunk, 8)
    odd = (min(round(n * 1.15) | 1, chunk) for n in own[1:-1])
    return sorted({own[0], *odd, own[-1], *(n for n in ladder(area, 3, chunk) if n > chunk)})


def _prefixes(d: Deployment) -> list[tuple[int, int]]:
    """(new tokens, cached tokens): small and largest chunks on short and longest prefixes."""
    chunk = min(d.max_tokens, d.max_context)
    out = []
    for length in sorted({max(1, chunk // 8), chunk}):
        room = d.max_context - length
        if room > 0:
            out += [(length, prefix) for prefix in ladder(room, 3, min(room, 64))]
    return out


def _attention_shape(d: Deployment, s: AttentionShape) -> dict[str, Any]:
    if s.kind == "gqa":
        return {
            "kind": "gqa",
            "heads": s.num_heads,
            "kv_heads": s.num_kv_heads,
            "head_dim": s.head_dim,
            "v_head_dim": s.v_head_dim,
            "window": s.window,
        }
    a = d.model.attention
    return {
        "kind": "mla",
        "heads": s.num_heads,
        "kv_dim": s.kv_dim,
        "rope_dim": a.qk_rope_head_dim,
        "nope_dim": a.qk_nope_head_dim,
        "v_head_dim": s.v_head_dim,
    }


def _decode(d: Deployment, s: AttentionShape, batch: int, context: int, role: str = "grid", seed: int = 0) -> Case:
    size: _Sizes = {"batch": batch, "context": context}
    return Case("attention_decode", _attention_shape(d, s), size, _name(s.dtype), role=role, seed=seed)


def _prefill(
    d: Deployment, op: str, s: AttentionShape, length: int, prefix: int, role: str = "grid", seed: int = 0
) -> Case:
    size: _Sizes = {"batch": 1, "length": length, "prefix": prefix}
    return Case(op, _attention_shape(d, s), size, _name(s.dtype), role=role, seed=seed)


def training_cases(d: Deployment, backend: str, rng: np.random.Generator) -> Iterator[Case]:
    """The backward operators of a training step: both gradients of the experts, attention, router.

    The fused Triton kernel has no backward: torch's stands in.
    """
    backend = "torch" if backend == "triton" else backend
    for tokens in ladder(d.max_tokens, 5):
        if d.moe is not None:
            yield _moe(d, "moe_dgrad", backend, tokens, "uniform")
            yield _moe(d, "moe_wgrad", backend, tokens, "uniform")
            yield _router(d, "router_backward", tokens)
    for shape in d.attention():
        for length in ladder(min(d.max_tokens, d.max_context), 4):
            yield _prefill(d, "attention_backward", shape, length, 0)
    for i in range(HELD_OUT if d.moe is not None else 0):
        tokens, kind = _log_uniform(rng, 1, d.max_tokens), random_histogram(rng, d.slots, d.model.top_k)
        yield _moe(d, "moe_dgrad", backend, tokens, kind, role="heldout", seed=i + 1)
        yield _moe(d, "moe_wgrad", backend, tokens, kind, role="heldout", seed=i + 1)


def stream_cases(device: str, dtypes: Iterable[str]) -> Iterator[Case]:
    """What belongs to the machine and not to a model: ceilings, launch, copies, storage."""
    cuda = device == "cuda"
    big = (8 << 30) if cuda else (256 << 20)
    yield Case("read_bandwidth", {}, {"bytes": big}, "fp32", role="ceiling")
    yield Case("copy_bandwidth", {}, {"bytes": big}, "fp32", role="ceiling")
    for dtype in sorted(set(dtypes)):
        side = 8192 if cuda else (256 if dtype == "bf16" else 1024)
        yield Case("peak_gemm", {}, {"n": side}, dtype, role="ceiling")
    yield Case("launch", {}, {}, "fp32", role="ceiling")
    if cuda:
        yield Case("launch", {"graph": True}, {}, "fp32", role="ceiling")
    yield from _copies(cuda)
    yield from _reads((512 << 20) if cuda else (64 << 20))


def _fours(least: int, most: int) -> list[int]:
    """2^least to 2^most in steps of 4, the last included."""
    return sorted({*(1 << i for i in range(least, most + 1, 2)), 1 << most})


def _reads(most: int) -> Iterator[Case]:
    """Storage: blocks and queue depths past the page cache, and through it; a small load each to tell the start."""
    ways = [("direct", block, depth) for block in (1 << 17, 1 << 20, 1 << 23) for depth in (1, 4, 16)]
    for mode, block, depth in (*ways, ("buffered", 1 << 20, 1), ("buffered", 1 << 20, 4)):
        shape: _Sizes = {"mode": mode, "block_bytes": block, "depth": depth}
        for moved in (1 << 23, most):
            yield Case("storage", shape, {"bytes": moved}, "fp32")


def _copies(cuda: bool) -> Iterator[Case]:
    ways = [("h2d", "pinned"), ("h2d", "pageable"), ("d2h", "pinned"), ("d2h", "pageable")]
    for direction, memory in ways if cuda else [("host", "pageable")]:
        for moved in _fours(16, 30 if cuda else 27):
            shape: _Sizes = {"direction": direction, "memory": memory, "streams": 1, "busy": False}
            yield Case("copy", shape, {"bytes": moved}, "fp32")
    if cuda:
        for streams, busy in ((2, False), (4, False), (1, True)):
            shape = {"direction": "h2d", "memory": "pinned", "streams": streams, "busy": busy}
            yield Case("copy", shape, {"bytes": 1 << 28}, "fp32")


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """A whole number from `least` to `most`, its logarithm uniform."""
    low, high = math.log(max(least, 1)), math.log(max(most, least, 1) + 1)
    return max(least, min(max(most, least), int(math.exp(rng.uniform(low, high)))))


def _name(dtype: str) -> str:
    """The dtype that is measured for it."""
    return "bf16" if dtype == "fp16" else dtype
