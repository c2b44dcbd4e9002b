"""The tensors of a compute case, and the least that one call of it must move and compute. Needs numpy alone.

Suffixes: T tokens, E expert slots, R rows, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim_kernels.bench.plan import Case
from moesim_kernels.ops.routing import histogram

__all__ = [
    "activation_dtype",
    "block_cache_shape",
    "case_counts",
    "context_of",
    "element_bytes",
    "floors",
    "guess_ns",
    "held_bytes",
    "input_elements",
    "norm_shape",
    "output_elements",
    "query_shape",
    "weight_shapes",
]

Shape = tuple[int, ...]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
MAX_SLOTS = 1 << 20
BLOCK_SEQUENCES = 16  # that the tokens of a block come from
BLOCK_CONTEXT = 512  # least room of each in the cache
NORM_HIDDEN = 4096  # the width of the elementwise case


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a plan's dtype."""
    return _BYTES[dtype]


def _int(values: dict[str, Any], *keys: str) -> list[int]:
    return [int(values[key]) for key in keys]


def case_counts(case: Case) -> NDArray[np.int64]:
    """Rows of each slot of an expert case, [E]: drawn from its own seed. Raises ValueError where they cannot exist."""
    tokens, rows = _int(case.size, "tokens", "rows")
    slots = int(case.shape["slots"])
    if slots > MAX_SLOTS:
        raise ValueError(f"a rank has at most {MAX_SLOTS:,} expert slots: slots={slots}. Use fewer")
    return histogram(str(case.size["histogram"]), rows, slots, tokens, case.seed)


def activation_dtype(case: Case) -> str:
    """The dtype of what flows between operators: fp8 weights meet bf16 activations, quantised inside the operator."""
    return "bf16" if case.dtype == "fp8" else case.dtype


def weight_shapes(case: Case) -> list[Shape]:
    """The tensors that one rotation takes from the weight arena: weights, keys and values, buffers to read."""
    s, z = case.shape, case.size
    if case.op == "gemm":
        return [(int(s["n"]), int(s["k"]))]
    if case.op in ("moe", "moe_dgrad", "moe_wgrad"):
        hidden, inner, slots = _int(s, "hidden", "intermediate", "slots")
        return [(slots, 2 * inner, hidden), (slots, hidden, inner)]
    if case.op in ("router", "router_backward"):
        return [(int(s["experts"]), int(s["hidden"]))]
    if case.op == "block":
        return _block_weights(case)
    if case.op == "shared_expert":
        hidden, inner = _int(s, "hidden", "intermediate")
        return [(2 * inner, hidden), (hidden, inner)]
    if case.op in ("attention_prefill", "attention_backward"):
        return list(_kv_shapes(s, int(z["batch"]), int(z["length"]) + int(z["prefix"])))
    if case.op == "attention_decode":
        batch, context = int(z["batch"]), context_of(case)
        return [(batch, context, int(s["kv_dim"]))] if s["kind"] == "mla" else list(_kv_shapes(s, batch, context))
    if case.op in ("read_bandwidth", "copy_bandwidth"):
        share = 2 if case.op == "copy_bandwidth" else 1
        return [(max(1, int(z["bytes"]) // share // element_bytes(case.dtype)),)]
    if case.op == "peak_gemm":
        return [(int(z["n"]), int(z["n"]))]
    return []


def _block_weights(case: Case) -> list[Shape]:
    """Two norms, two projections, their bias and head norm, and the router where it has their dtype."""
    s = case.shape
    hidden, heads, kv_heads, dim, experts = _int(s, "hidden", "heads", "kv_heads", "head_dim", "experts")
    fused = (heads + 2 * kv_heads) * dim
    out: list[Shape] = [(hidden,), (fused, hidden), (hidden, heads * dim), (hidden,), (fused,), (heads + kv_heads, dim)]
    return [*out, (experts, hidden)] if s["router_dtype"] == case.dtype else out


def block_cache_shape(case: Case) -> Shape:
    """[2, S, G, C, D] of a block case: room for its tokens in at most 16 sequences, and then other places as often."""
    tokens, kv_heads, dim = int(case.size["tokens"]), *_int(case.shape, "kv_heads", "head_dim")
    sequences = min(tokens, BLOCK_SEQUENCES)
    return 2, sequences, kv_heads, max(BLOCK_CONTEXT, 2 * -(-tokens // sequences)), dim


def _kv_shapes(s: dict[str, Any], batch: int, tokens: int) -> tuple[Shape, Shape]:
    """Keys and values of a prefill, or of decoding with grouped heads."""
    heads = int(s["kv_heads"] if s["kind"] == "gqa" else s["heads"])
    key_dim = int(s["head_dim"]) if s["kind"] == "gqa" else int(s["nope_dim"]) + int(s["rope_dim"])
    return (batch, heads, tokens, key_dim), (batch, heads, tokens, int(s["v_head_dim"]))


def input_elements(case: Case) -> int:
    """Elements that a case takes from the input arena: activations and their gradients."""
    s, z = case.shape, case.size
    if case.op in ("gemm", "peak_gemm"):
        return int(z["n"]) ** 2 if case.op == "peak_gemm" else int(z["m"]) * int(s["k"])
    if case.op in ("moe", "router", "router_backward", "shared_expert"):
        return int(z["tokens"]) * int(s["hidden"])
    if case.op == "block":
        return int(z["tokens"]) * (int(s["hidden"]) + int(s["heads"]) * int(s["head_dim"]))
    if case.op in ("moe_dgrad", "moe_wgrad"):
        return int(z["rows"]) * (2 * int(s["hidden"]) + 3 * int(s["intermediate"]))
    if case.op in ("permute", "combine"):
        return max(int(z["rows"]), int(z["tokens"]), 1) * int(s["hidden"])
    if case.op.startswith("attention"):
        return math.prod(query_shape(case))
    if case.op == "elementwise":
        return math.prod(norm_shape(case))
    return 0


def output_elements(case: Case) -> int:
    """Elements that a case writes to the scratch arena; operators without an `out` make their own."""
    s, z = case.shape, case.size
    if case.op == "gemm":
        return int(z["m"]) * int(s["n"])
    if case.op in ("moe", "combine"):
        return int(z["tokens"]) * int(s["hidden"])
    if case.op == "block":
        return int(z["tokens"]) * int(s["hidden"]) + math.prod(block_cache_shape(case))
    if case.op in ("peak_gemm", "elementwise"):
        return input_elements(case)
    return math.prod(weight_shapes(case)[0]) if case.op == "copy_bandwidth" else 0


def context_of(case: Case) -> int:
    """Tokens that one decoded token attends to: the context, cut to the window where there is one."""
    context, window = int(case.size["context"]), int(case.shape.get("window", 0))
    return min(context, window) if window else context


def query_shape(case: Case) -> Shape:
    """Queries of an attention case: [B, heads, L, D]; [B, heads, C] where MLA decodes."""
    s, z = case.shape, case.size
    batch, heads = int(z["batch"]), int(s["heads"])
    if case.op == "attention_decode":
        return (batch, heads, int(s["kv_dim"])) if s["kind"] == "mla" else (batch, heads, 1, int(s["head_dim"]))
    return batch, heads, int(z["length"]), _kv_shapes(s, 1, 1)[0][-1]


def norm_shape(case: Case) -> tuple[int, int]:
    """[T, H] of an elementwise case, which reads and writes two such tensors: 4,096 wide, or one narrower token."""
    elements = max(1, round(int(case.size["bytes"]) / (4 * element_bytes(case.dtype))))
    hidden = min(NORM_HIDDEN, elements)
    return max(1, round(elements / hidden)), hidden


def floors(case: Case) -> tuple[float, float]:
    """(bytes, FLOP) that one call must move and compute at least: inputs read once, results written once.

    Only experts with rows are read; attention counts the pairs that the mask keeps. A bound, not a prediction. Not
    for the operators of `io_cases`, which give their own. Raises ValueError for a histogram that cannot exist.
    """
    s, z, width = case.shape, case.size, element_bytes(case.dtype)
    if case.op == "gemm":
        m, n, k = int(z["m"]), *_int(s, "n", "k")
        return width * float(m * k + n * k + m * n), 2.0 * m * n * k
    if case.op == "peak_gemm":
        return 3.0 * width * int(z["n"]) ** 2, 2.0 * int(z["n"]) ** 3
    if case.op in ("moe", "moe_dgrad", "moe_wgrad"):
        return _expert_floors(case)
    if case.op in ("router", "router_backward"):
        tokens, hidden, experts = int(z["tokens"]), *_int(s, "hidden", "experts")
        times = 1 if case.op == "router" else 2
        return float(times * width * (tokens * hidden + experts * hidden)), 2.0 * times * tokens * hidden * experts
    if case.op == "block":
        return _block_floors(case)
    if case.op in ("permute", "combine"):
        rows, tokens, hidden = *_int(z, "rows", "tokens"), int(s["hidden"])
        return float(width * hidden * (rows + min(rows, tokens))), 0.0
    if case.op == "shared_expert":
        tokens, hidden, inner = int(z["tokens"]), *_int(s, "hidden", "intermediate")
        return width * float(3 * hidden * inner + 2 * tokens * hidden), 6.0 * tokens * hidden * inner
    if case.op.startswith("attention"):
        return _attention_floors(case)
    if case.op in ("elementwise", "read_bandwidth", "copy_bandwidth"):
        return float(int(z["bytes"])), 0.0
    return 0.0, 0.0


def _block_floors(case: Case) -> tuple[float, float]:
    """Weights read; hidden states and residual read and the residual written, twice; queries, keys and values written,
    what attention returns read, rows for the experts written."""
    s, tokens = case.shape, int(case.size["tokens"])
    hidden, heads, kv_heads, dim, experts = _int(s, "hidden", "heads", "kv_heads", "head_dim", "experts")
    weights = sum(math.prod(shape) for shape in weight_shapes(case))
    moved = tokens * (7 * hidden + 2 * (heads + kv_heads) * dim)
    products = hidden * (2 * (heads + kv_heads) * dim + experts)
    return element_bytes(case.dtype) * float(weights + moved), 2.0 * tokens * products


def _expert_floors(case: Case) -> tuple[float, float]:
    """Forward: weights of the active experts read, tokens in and out. dgrad: the same with rows. wgrad: weights
    written. Either gradient multiplies as much as the forward pass."""
    counts_E = case_counts(case)
    hidden, inner = _int(case.shape, "hidden", "intermediate")
    tokens, rows = _int(case.size, "tokens", "rows")
    active = int(np.count_nonzero(counts_E))
    moved = 2 * min(rows, tokens) if case.op == "moe" else 2 * rows
    return element_bytes(case.dtype) * float(3 * active * hidden * inner + moved * hidden), 6.0 * rows * hidden * inner


def _attention_floors(case: Case) -> tuple[float, float]:
    """Keys and values read once, queries in, results out; two products over the pairs kept, five backwards."""
    s, z, width = case.shape, case.size, element_bytes(case.dtype)
    query, kv = query_shape(case), weight_shapes(case)
    batch, heads = query[0], query[1]
    value_dim = int(s["v_head_dim"])
    window = int(s.get("window", 0))
    if case.op == "attention_decode":
        pairs = float(batch * heads * context_of(case))
        if s["kind"] == "mla":
            value_dim = int(s["kv_dim"]) - int(s["rope_dim"])
        out = batch * heads * value_dim
        moved = sum(math.prod(shape) for shape in kv)
        return float(width * (moved + math.prod(query) + out)), 2.0 * pairs * (query[-1] + value_dim)
    length, prefix = _int(z, "length", "prefix")
    whole = min(max(window - prefix, 0), length) if window else length  # new tokens whose window holds all before them
    pairs = batch * heads * float(whole * (2 * prefix + whole + 1) // 2 + (length - whole) * window)
    elements = math.prod(query) + batch * heads * length * value_dim + sum(math.prod(shape) for shape in kv)
    forward = 2.0 * pairs * (query[-1] + value_dim)
    return (2.0 * width * elements, 2.5 * forward) if case.op == "attention_backward" else (width * elements, forward)


def held_bytes(case: Case) -> int:
    """Memory that one call holds at least: tensors of one rotation, inputs, outputs, and what follows from its rows."""
    s, z, width = case.shape, case.size, element_bytes(activation_dtype(case))
    held = element_bytes(case.dtype) * sum(math.prod(shape) for shape in weight_shapes(case))
    held += width * (input_elements(case) + output_elements(case))
    if "rows" in z:
        held += 20 * int(z["rows"]) + 8 * int(s["slots"])  # token, slot and gate of each row; a count a slot
    if "experts" in s:
        held += 4 * int(z["tokens"]) * int(s["experts"])
    return held + (2 * width * int(z["tokens"]) * int(s["intermediate"]) if case.op == "shared_expert" else 0)


def guess_ns(case: Case, device: str) -> float:
    """A rough time of one call, to order first tries by: bytes and FLOP at rates of the right size."""
    bytes_per_ns, flop_per_ns = (10.0, 40.0) if device == "cpu" else (3000.0, 400_000.0)
    try:
        moved, flop = floors(case)
    except ValueError:  # a histogram that cannot be: refused when it is built
        return 0.0
    return float(moved or int(case.size.get("bytes", 0))) / bytes_per_ns + flop / flop_per_ns
