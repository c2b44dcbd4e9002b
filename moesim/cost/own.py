"""What a rank runs of one layer for its own tokens, around the attention kernel and the experts, part by part.

A step is priced with these parts (`cost/dense.py`), and calibration sets a whole block that it measured against their
sum, so both mean the same by it. A measured block is more than its parts: an executor launches some thirty kernels
there, of which products and passes over activations are only the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray
from moesim.cost.operators import BlockShape, Operators, Priced
from moesim.dtypes import dtype_bytes
from moesim.model import MoEModel

__all__ = ["OwnPart", "OwnSizes", "attention_parts", "block_ns", "block_shape", "moe_parts"]


class Product(NamedTuple):
    """A dense product with weights [n, k] in `dtype`."""

    n: int
    k: int
    dtype: str


class OwnPart(NamedTuple):
    """One part by the name that results show: its operator and what it is made of, each for every number of tokens."""

    name: str
    operator: str
    priced: tuple[Priced, ...]


@dataclass(frozen=True, slots=True)
class OwnSizes:
    """Sizes of one layer's own parts on one rank. rotated: elements of a token's queries, keys and values; scores:
    what the router gives a token."""

    hidden: int
    activation_bytes: float
    rotated: int
    projections: tuple[Product, ...]
    router: tuple[Product, ...]
    scores: int
    top_k: int

    @classmethod
    def of_model(cls, model: MoEModel, tp: int) -> OwnSizes:
        """Of one of `tp` ranks. MLA's absorbed up-projections serve prompt rows too: a token costs as many FLOP as in
        the expanded form."""
        a = model.attention
        heads, kv_heads = -(-a.num_heads // tp), model.kv_heads_per_rank(tp)
        gemms = [g for g in model.gemms(tp) if g.phase != "prefill"]
        return cls(
            hidden=model.hidden_size,
            activation_bytes=dtype_bytes(model.activation_dtype),
            rotated=heads * a.head_dim + kv_heads * (a.head_dim + a.v_head_dim),
            projections=tuple(Product(g.n * g.batch, g.k, g.dtype) for g in gemms if g.where == "attention"),
            router=tuple(Product(g.n * g.batch, g.k, g.dtype) for g in gemms if g.name == "router"),
            scores=model.num_scores if model.is_moe else 0,
            top_k=model.top_k,
        )

    @classmethod
    def of_block(cls, shape: BlockShape) -> OwnSizes:
        """Of a measured block; the same as `of_model` for a model that has this block."""
        wide = shape.heads * shape.head_dim
        rotated = wide + 2 * shape.kv_heads * shape.head_dim
        return cls(
            hidden=shape.hidden,
            activation_bytes=dtype_bytes(shape.dtype),
            rotated=rotated,
            projections=(Product(rotated, shape.hidden, shape.dtype), Product(shape.hidden, wide, shape.dtype)),
            router=(Product(shape.experts, shape.hidden, shape.router_dtype),),
            scores=shape.experts,
            top_k=shape.top_k,
        )


def block_shape(model: MoEModel, tp: int) -> BlockShape | None:
    """The block that a MoE layer of `model` is on one of `tp` ranks; None where kernels here have no such block (other
    attention than grouped-query, experts of another width than the hidden size, experts that are visited twice,
    weights in another format than the activations)."""
    a = model.attention
    if not model.is_moe or a.kind != "gqa" or model.expert_hidden_size or model.moe_iterations > 1:
        return None
    if model.weight_dtype != model.activation_dtype:
        return None
    return BlockShape(
        hidden=model.hidden_size,
        heads=model.heads_per_rank(tp),
        kv_heads=model.kv_heads_per_rank(tp),
        head_dim=a.head_dim,
        experts=model.num_scores,
        top_k=model.top_k,
        dtype=model.weight_dtype,
        router_dtype=model.router_dtype,
        score=model.scoring,
        groups=model.num_expert_groups,
        top_groups=model.top_groups,
        bias=int(a.qkv_bias),
        head_norm=int(a.qk_norm),
    )


def attention_parts(ops: Operators, tokens: FloatArray, sizes: OwnSizes) -> list[OwnPart]:
    """Of an attention block: residual add and norm (read both, write both), projections, rotary embedding in place with
    keys and values into the cache."""
    return [
        OwnPart("norm", "elementwise", (_rows(ops, tokens, sizes, 4 * sizes.hidden),)),
        OwnPart("attention_projections", "gemm", _products(ops, tokens, sizes.projections)),
        OwnPart("rope_kv_write", "elementwise", (_rows(ops, tokens, sizes, 2 * sizes.rotated),)),
    ]


def moe_parts(ops: Operators, tokens: FloatArray, sizes: OwnSizes) -> list[OwnPart]:
    """Of a MoE block: residual add and norm, router, choice (scores read, ids and gates written)."""
    return [
        OwnPart("norm", "elementwise", (_rows(ops, tokens, sizes, 4 * sizes.hidden),)),
        OwnPart("router", "gemm", _products(ops, tokens, sizes.router)),
        OwnPart("top_k", "elementwise", (_rows(ops, tokens, sizes, 2 * sizes.scores + 4 * sizes.top_k),)),
    ]


def block_ns(ops: Operators, tokens: FloatArray, shape: BlockShape) -> FloatArray:
    """What the parts of a block add up to, ns, as a step is priced: each is rounded to a nanosecond first."""
    sizes = OwnSizes.of_block(shape)
    parts = [*attention_parts(ops, tokens, sizes), *moe_parts(ops, tokens, sizes)]
    total: FloatArray = sum((np.rint(p.ns) for part in parts for p in part.priced), np.zeros(np.shape(tokens)))
    return total


def _products(ops: Operators, tokens: FloatArray, wanted: tuple[Product, ...]) -> tuple[Priced, ...]:
    return tuple(ops.gemm(tokens, p.n, p.k, p.dtype) for p in wanted)


def _rows(ops: Operators, tokens: FloatArray, sizes: OwnSizes, width: float) -> Priced:
    """A pass over [tokens, width] activations; `width` counts elements read and written."""
    return ops.elementwise(tokens * (width * sizes.activation_bytes))
