"""The default grid for a machine without a model at hand: ceilings and a few known layers. Standard library alone.

After the table "What a calibration measures" of the project's notes on kernels: token counts in steps of 4 up to the
largest batch, uniform routing everywhere and Zipf 1.2 at three sizes, decode by bytes of keys and values. Held-out
points are drawn at random (log-uniform sizes, a random histogram), for judging a fit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moesim_kernels.bench.plan import Case, Plan

__all__ = ["default_plan"]

_HELD_OUT = 12


@dataclass(frozen=True)
class _Layer:
    """One layer as one rank runs it: sizes after sharding, MoE and attention.

    `ranks`: over how many ranks the experts are spread (`slots` is one rank's part).
    """

    name: str
    hidden: int
    intermediate: int
    slots: int
    top_k: int
    attention: dict[str, Any]
    dtype: str
    tokens: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    lengths: tuple[int, ...]
    score: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    ranks: int = 1
    shared: int = 0
    expert_dtype: str = ""

    @property
    def experts(self) -> int:
        """Experts of the whole layer."""
        return self.slots * self.ranks


def _gqa(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "v_head_dim": dim, "window": 0}


_MLA = {"kind": "mla", "heads": 128, "kv_dim": 576, "rope_dim": 64, "nope_dim": 128, "v_head_dim": 128}
_MB = 1_000_000
_GPU: dict[str, Any] = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096, 16384),
    "kv_bytes": (_MB // 10, _MB, 10 * _MB, 60 * _MB, 300 * _MB, 2000 * _MB),
    "lengths": (512, 2048, 8192),
}
# dimensions as the publishers' config.json give them; see workloads/models/ for the sources
_LAYERS = {
    "cuda": (
        _Layer("Mixtral 8x7B", 4096, 14336, 8, 2, _gqa(32, 8, 128), "bf16", **_GPU),
        _Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, _gqa(32, 4, 128), "bf16", **_GPU),
        _Layer(
            "DeepSeek-V3, experts over 8 ranks", 7168, 2048, 32, 8, _MLA, "bf16", **_GPU,
            score="sigmoid", groups=8, top_groups=4, ranks=8, shared=2048, expert_dtype="fp8",
        ),
    ),
    "cpu": (
        _Layer(
            "OLMoE 1B-7B", 2048, 1024, 64, 8, _gqa(16, 16, 128), "fp32",
            tokens=(1, 4, 16, 64, 256), kv_bytes=(_MB, 16 * _MB, 64 * _MB), lengths=(64, 512),
        ),
        _Layer(
            "small", 1024, 2048, 8, 2, _gqa(16, 4, 64), "fp32",
            tokens=(1, 2, 4, 8, 16, 32, 64, 128, 512), kv_bytes=(_MB, 16 * _MB, 64 * _MB), lengths=(64, 256, 1024),
        ),
    ),
}  # fmt: skip


def default_plan(device: str, threads: int = 1, seed: int = 0) -> Plan:
    """The plan for `cpu` or `cuda`. Raises BadPlan for another device."""
    layers = _LAYERS.get(device, ())
    cases = [*_ceilings(device), *(case for layer in layers for case in _layer(layer, seed))]
    unique = {case.id: case for case in reversed(cases)}  # the first of equal ones is kept
    ordered = tuple(case for case in cases if unique[case.id] is case)
    return Plan(device, ordered, threads, {"plan": "default", "layers": [layer.name for layer in layers]})


def _ceilings(device: str) -> Iterator[Case]:
    cuda = device == "cuda"
    moved, side = (8 << 30, 8192) if cuda else (256 << 20, 1024)
    for op in ("read_bandwidth", "copy_bandwidth"):
        yield Case(op, {}, {"bytes": moved}, "fp32", role="ceiling")
    for dtype in ("bf16", "fp8") if cuda else ("fp32",):
        yield Case("peak_gemm", {}, {"n": side}, dtype, role="ceiling")
    yield Case("launch", {}, {}, "fp32", role="ceiling")
    if cuda:
        yield Case("launch", {"graph": True}, {}, "fp32", role="ceiling")
        for direction in ("h2d", "d2h"):
            for memory in ("pinned", "pageable"):
                shape: dict[str, Any] = {"direction": direction, "memory": memory, "streams": 1, "busy": False}
                for size in (1 << 16, 1 << 22, 1 << 28):
                    yield Case("copy", shape, {"bytes": size})
    else:
        shape = {"direction": "host", "memory": "pageable", "streams": 1, "busy": False}
        yield Case("copy", shape, {"bytes": 64 << 20})
    for moved in (1 << 16, 1 << 20, 1 << 24, (1 << 28) if cuda else (1 << 26)):
        yield Case("elementwise", {}, {"bytes": moved}, "bf16" if cuda else "fp32")


def _layer(layer: _Layer, seed: int) -> Iterator[Case]:
    rng = random.Random(f"{seed} {layer.name}")  # noqa: S311  a choice of sizes to measure, no secret
    for tokens in layer.tokens:
        for backend in _backends(layer):
            yield _moe(layer, tokens, "uniform", backend)
    some = [t for t in layer.tokens if t >= 16]
    for tokens in (some[0], some[len(some) // 2], some[-1]):
        yield _moe(layer, tokens, "zipf:1.2", _backends(layer)[-1])
    for i in range(_HELD_OUT):
        tokens = _log_uniform(rng, 1, layer.tokens[-1])
        kind = rng.choice(("uniform", "uniform", "balanced", f"zipf:{rng.uniform(0.4, 1.4):.2f}"))
        yield _moe(layer, tokens, kind, _backends(layer)[-1], "heldout", seed + i + 1)
    yield from _around(layer)
    yield from _attention(layer)


def _backends(layer: _Layer) -> tuple[str, ...]:
    """The fused kernel beside torch's own where the weights allow it."""
    return ("torch", "triton") if layer.dtype == "bf16" and not layer.expert_dtype else ("torch",)


def _moe(layer: _Layer, tokens: int, kind: str, backend: str, role: str = "grid", seed: int = 0) -> Case:
    """`tokens` are those of the rank's own batch: with experts spread over ranks, as many rows come from each."""
    shape: dict[str, Any] = {
        "hidden": layer.hidden,
        "intermediate": layer.intermediate,
        "slots": layer.slots,
        "top_k": layer.top_k,
    }
    rows = tokens * layer.top_k  # even traffic: this rank gets 1/ranks of what ranks x tokens send out
    size: dict[str, Any] = {"tokens": tokens * layer.ranks, "rows": rows, "histogram": kind}
    return Case("moe", shape, size, layer.expert_dtype or layer.dtype, backend, role, seed)


def _around(layer: _Layer) -> Iterator[Case]:
    """Router, permute, combine, shared expert and the dense products of attention."""
    router: dict[str, Any] = {
        "hidden": layer.hidden,
        "experts": layer.experts,
        "top_k": layer.top_k,
        "score": layer.score,
    }
    router |= {"groups": layer.groups, "top_groups": layer.top_groups}
    share: dict[str, Any] = {"hidden": layer.hidden, "slots": layer.slots, "top_k": layer.top_k}
    for tokens in layer.tokens[::2]:
        yield Case("router", router, {"tokens": tokens}, layer.dtype)
        size: dict[str, Any] = {"tokens": tokens * layer.ranks, "rows": tokens * layer.top_k, "histogram": "uniform"}
        yield Case("permute", share, size, layer.dtype)
        yield Case("combine", share, size, layer.dtype)
        if layer.shared:
            expert: dict[str, Any] = {"hidden": layer.hidden, "intermediate": layer.shared}
            yield Case("shared_expert", expert, {"tokens": tokens}, layer.expert_dtype or layer.dtype)
    a = layer.attention
    width = a["heads"] * a["v_head_dim"]
    fused = (a["heads"] + 2 * a["kv_heads"]) * a["head_dim"] if a["kind"] == "gqa" else a["kv_dim"]
    for n, k in ((fused, layer.hidden), (layer.hidden, width)):
        for m in layer.tokens[::2]:
            yield Case("gemm", {"n": n, "k": k}, {"m": m}, layer.dtype)


def _attention(layer: _Layer) -> Iterator[Case]:
    a = layer.attention
    width = 2 if layer.dtype == "bf16" else 4
    token_bytes = width * (a["kv_dim"] if a["kind"] == "mla" else 2 * a["kv_heads"] * a["head_dim"])
    for moved in layer.kv_bytes:
        for batch in (1, 8, 64):
            context = moved // (token_bytes * batch)
            if 16 <= context <= 131_072:
                yield Case("attention_decode", a, {"batch": batch, "context": context}, layer.dtype)
    for length in layer.lengths:
        for prefix in (0, layer.lengths[-1]):
            size: dict[str, Any] = {"batch": 1, "length": length, "prefix": prefix}
            yield Case("attention_prefill", a, size, layer.dtype)


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return max(least, min(most, int(math.exp(rng.uniform(math.log(least), math.log(most + 1))))))
