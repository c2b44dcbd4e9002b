"""Checks of what stands around the experts: router, attention, dense operators, fp8. See checks.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import attention, backward, dense, fp8, moe, reference
from .bounds import (
    UNIT,
    Ball,
    attention_weights,
    exact,
    factor,
    fp8_rounded,
    fp8_unit,
    rms_norm_ball,
    score_ball,
    swiglu_ball,
)
from .checks import DTYPES, LAYERS, Outcome, agreeing, compare, holds, normal, poisoned

__all__ = ["ATTENTIONS", "ROUTERS", "Attention", "Router", "acceptable", "around_checks"]

FP32 = UNIT[torch.float32]


@dataclass(frozen=True)
class Router:
    """A case of routing."""

    name: str
    tokens: int
    experts: int
    top_k: int
    score: moe.Score = "softmax"
    biased: bool = False
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0

    def bias_E(self, device: torch.device) -> torch.Tensor:
        """The correction bias: multiples of 1/8, so that biased scores tie where scores do; 0 without one."""
        bias_E = normal(4, self.experts, dtype=torch.float32, device=device)
        return (bias_E * 2).round() / 8 if self.biased else torch.zeros_like(bias_E)


ROUTERS = (
    Router("softmax", tokens=21, experts=8, top_k=2),
    Router("softmax-groups", tokens=17, experts=16, top_k=4, groups=4, top_groups=2, renormalise=False, scale=16.0),
    Router("sigmoid-bias", tokens=18, experts=12, top_k=3, score="sigmoid", biased=True),
    Router("sigmoid-groups", 30, 32, 6, score="sigmoid", biased=True, groups=8, top_groups=4, scale=2.5),
    Router("sigmoid-groups-of-1", tokens=9, experts=4, top_k=2, score="sigmoid", groups=4, top_groups=3),
    Router("top-1", tokens=11, experts=6, top_k=1, renormalise=False),
    Router("one-token", tokens=1, experts=8, top_k=8),
    Router("no-token", tokens=0, experts=8, top_k=2, groups=2, top_groups=1),
)


@dataclass(frozen=True)
class Attention:
    """A case of attention; `window` 0 is none."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    prefix: int
    dim: int
    value_dim: int
    window: int = 0


ATTENTIONS = (
    Attention("mha", 2, 3, 3, 17, 0, 32, 32),
    Attention("gqa", 2, 4, 2, 33, 0, 16, 16),
    Attention("gqa-prefix", 1, 6, 2, 9, 23, 32, 32),
    Attention("gqa-window", 1, 4, 1, 19, 6, 16, 16, window=5),
    Attention("one-token", 1, 2, 2, 1, 0, 16, 16),
    Attention("mla", 1, 3, 3, 18, 0, 48, 32),
    Attention("mla-prefix", 1, 2, 2, 5, 14, 48, 32),
)


def around_checks(device: torch.device) -> dict[str, Callable[[], Outcome]]:
    """Every check of this file, by name."""
    found: dict[str, Callable[[], Outcome]] = {}

    def add(part: Callable[..., Outcome], *case: object) -> None:
        words = [getattr(c, "name", str(c).removeprefix("torch.")) for c in case]
        words = [{"float32": "fp32", "bfloat16": "bf16"}.get(word, word) for word in words]
        name = "-".join([part.__name__.removeprefix("check_"), *words])
        found[name] = lambda: part(*case, device)

    for router, dtype in itertools.product(ROUTERS, DTYPES):
        add(check_choice, router, dtype)
        add(check_gates, router, dtype)
        add(check_router_backward, router, dtype)
    for case, dtype in itertools.product(ATTENTIONS, DTYPES):
        add(check_prefill, case, dtype)
        add(check_attention_backward, case, dtype)
    for dtype in DTYPES:
        for heads, kv_heads in ((4, 4), (8, 2), (6, 1)):
            add(check_decode_gqa, heads, kv_heads, dtype)
        add(check_decode_mla, dtype)
        for rows in (0, 1, 5, 70):
            add(check_gemm, rows, dtype)
            add(check_norm_residual, rows, dtype)
    pers: tuple[fp8.Per, ...] = ("row", "tensor")
    for per in pers:
        add(check_quantise, per)
        if fp8.why_no_fp8(device) is None:
            add(check_gemm_fp8, per)
    if fp8.why_no_fp8(device, grouped=True) is None:
        add(check_grouped_fp8)
    return found


def check_choice(case: Router, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Experts chosen among plenty of ties: logits are small multiples of 1/4, exact in either dtype."""
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randint(-2, 3, (case.tokens, 16), generator=generator).to(dtype).to(device)
    router_EH = (torch.randint(-1, 2, (case.experts, 16), generator=generator) / 4).to(dtype).to(device)
    with poisoned(device):
        expert_TK, _ = _route(case, hidden_TH, router_EH)
    score_TE = reference.scores_reference(hidden_TH.double().cpu() @ router_EH.double().cpu().t(), case.score)
    biased_TE = score_TE + case.bias_E(device).double().cpu()
    return holds(
        all(acceptable(biased_TE[t].tolist(), chosen, case) for t, chosen in enumerate(expert_TK.tolist()))
        and expert_TK.dtype == torch.int64
    )


def _route(case: Router, hidden_TH: torch.Tensor, router_EH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bias_E = case.bias_E(hidden_TH.device) if case.biased else None
    return moe.route(
        hidden_TH,
        router_EH,
        case.top_k,
        score=case.score,
        bias_E=bias_E,
        groups=case.groups,
        top_groups=case.top_groups,
        renormalise=case.renormalise,
        scale=case.scale,
    )


def acceptable(biased_E: list[float], chosen: list[int], case: Router, slack: float = 1e-5) -> bool:
    """Brute force over all sets of groups: some set among the best gives this choice, up to ties within `slack`."""
    size = len(biased_E) // case.groups
    best = 2 if case.score == "sigmoid" else 1
    worth = [sum(sorted(biased_E[g * size : (g + 1) * size])[-best:]) for g in range(case.groups)]
    sets = list(itertools.combinations(range(case.groups), case.top_groups))
    most = max(sum(worth[g] for g in kept) for kept in sets)
    for kept in sets:
        eligible = [e for e in range(len(biased_E)) if e // size in kept]
        ideal = sorted((biased_E[e] for e in eligible), reverse=True)[: case.top_k]
        got = [biased_E[e] for e in chosen]
        near = all(abs(a - b) <= slack for a, b in zip(ideal, got, strict=True))
        if sum(worth[g] for g in kept) >= most - slack and set(chosen) <= set(eligible) and near:
            return len(set(chosen)) == case.top_k
    return False


def check_gates(case: Router, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Gates of the chosen experts on random logits, and the order: best biased score first, within its error."""
    hidden_TH = normal(1, case.tokens, 40, dtype=dtype, device=device)
    router_EH = normal(2, case.experts, 40, dtype=dtype, device=device, scale=0.25)
    with poisoned(device):
        expert_TK, gate_TK = _route(case, hidden_TH, router_EH)
    chosen = expert_TK.cpu()
    logit = exact(hidden_TH).matmul(exact(router_EH).t, UNIT[dtype])
    score = score_ball(logit, case.score)
    gate = Ball(score.value.gather(1, chosen), score.error.gather(1, chosen))
    if case.renormalise:
        gate = gate.over(gate.sum(1), FP32)
    gate = gate.times(factor(case.scale), FP32)
    expected = reference.gates_reference(
        reference.scores_reference(logit.value, case.score), chosen, case.renormalise, case.scale
    )
    agreeing(gate, expected)
    biased = (score.value + case.bias_E(device).double().cpu()).gather(1, chosen)
    rises = biased.diff(dim=1) <= 2 * score.error.amax(dim=1, keepdim=True) if case.tokens else torch.ones(1)
    return compare((gate_TK, gate)) if gate_TK.dtype == torch.float32 and bool(rises.all()) else holds(False)


def check_router_backward(case: Router, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Gradients of hidden states and router against autograd of the float64 reference, from the kept logits."""
    hidden_TH = normal(1, case.tokens, 40, dtype=dtype, device=device)
    router_EH = normal(2, case.experts, 40, dtype=dtype, device=device, scale=0.25)
    grad_TK = normal(5, case.tokens, case.top_k, dtype=torch.float32, device=device)
    logit_TE = moe.router_logits(hidden_TH, router_EH)
    expert_TK, _ = _route(case, hidden_TH, router_EH)
    with poisoned(device):
        results = backward.router_backward(
            grad_TK,
            hidden_TH,
            router_EH,
            logit_TE,
            expert_TK,
            score=case.score,
            renormalise=case.renormalise,
            scale=case.scale,
        )
    leaf_TE = logit_TE.double().cpu().requires_grad_(True)
    gate_TK = reference.gates_reference(
        reference.scores_reference(leaf_TE, case.score), expert_TK, case.renormalise, case.scale
    )
    (grad_TE,) = torch.autograd.grad(
        (gate_TK * grad_TK.double().cpu()).sum() + 0.0 * leaf_TE.sum(), leaf_TE, materialize_grads=True
    )
    ball = _logit_grad_ball(case, exact(logit_TE), expert_TK.cpu(), exact(grad_TK))
    stored = agreeing(ball, grad_TE).rounded(UNIT[dtype])
    return compare(
        (results[0], stored.matmul(exact(router_EH), UNIT[dtype])),
        (results[1], stored.t.matmul(exact(hidden_TH), UNIT[dtype])),
    )


def _logit_grad_ball(case: Router, logit: Ball, chosen: torch.Tensor, grad: Ball) -> Ball:
    """The formulas of `router_backward`, carried with their errors."""
    every = score_ball(logit, case.score)
    score = Ball(every.value.gather(1, chosen), every.error.gather(1, chosen))
    if case.renormalise:
        total = score.sum(1)
        grad = grad.minus(grad.times(score, FP32).sum(1).over(total, FP32), FP32).over(total, FP32)
    grad = grad.times(score, FP32).times(factor(case.scale), 2 * FP32)
    if case.score == "sigmoid":
        grad = grad.times(exact(torch.ones(())).minus(score, FP32), FP32)
    full = exact(torch.zeros_like(logit.value))
    full.value.scatter_(1, chosen, grad.value)
    full.error.scatter_(1, chosen, grad.error)
    return full if case.score == "sigmoid" else full.minus(every.times(grad.sum(1), FP32), FP32)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value


def _attention_inputs(case: Attention, dtype: torch.dtype, device: torch.device) -> Inputs:
    total = case.prefix + case.length
    make = {"dtype": dtype, "device": device}
    return (
        normal(1, case.batch, case.heads, case.length, case.dim, **make),
        normal(2, case.batch, case.kv_heads, total, case.dim, **make),
        normal(3, case.batch, case.kv_heads, total, case.value_dim, **make),
    )


def _prefill(case: Attention, inputs: Inputs) -> torch.Tensor:
    query, key, value = inputs
    if case.dim != case.value_dim:
        return attention.prefill_mla(query, key, value)
    total = case.prefix + case.length
    mask = attention.window_mask(case.length, total, case.window, query.device) if case.window else None
    return attention.prefill_gqa(query, key, value, mask)


def _attention_balls(inputs: Inputs, scale: float, window: int, score_unit: float) -> tuple[Ball, Ball]:
    """(weights [B, Q, L, S], output [B, Q, L, V]), key-value heads repeated for their query heads."""
    query, key, value = inputs
    unit, repeats = UNIT[query.dtype], query.shape[1] // key.shape[1]
    keys, values = (exact(x.repeat_interleave(repeats, dim=1)) for x in (key, value))
    score = exact(query).matmul(keys.t, score_unit).times(factor(scale), 2 * FP32)
    length, total = score.value.shape[-2:]
    visible = attention.window_mask(length, total, window or total)
    weight = attention_weights(score, visible)
    return weight, weight.rounded(unit).matmul(values, unit)


def check_prefill(case: Attention, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Prefill against attention query by query."""
    inputs = _attention_inputs(case, dtype, device)
    with poisoned(device):
        out = _prefill(case, inputs)
    ball = _attention_balls(inputs, case.dim**-0.5, case.window, FP32)[1]
    query, key, value = (x.cpu() for x in inputs)
    expected = reference.attention_reference(query, key, value, window=case.window or None)
    return compare((out, agreeing(ball, expected)))


def check_attention_backward(case: Attention, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Gradients of query, key and value, taken twice from one graph, against autograd of the reference."""
    inputs = _attention_inputs(case, dtype, device)
    for x in inputs:
        x.requires_grad_(True)
    out = _prefill(case, inputs)
    grad_out = normal(4, *out.shape, dtype=dtype, device=device)
    attention.attention_backward(out, inputs, grad_out)
    with poisoned(device):
        results = attention.attention_backward(out, inputs, grad_out)
    query, key, value = (x.detach().double().cpu().requires_grad_(True) for x in inputs)
    plain = reference.attention_reference(query, key, value, window=case.window or None)
    expected = torch.autograd.grad(plain, (query, key, value), grad_out.double().cpu())
    balls = _attention_grad_balls(case, inputs, exact(grad_out))
    return compare(*((r, agreeing(b, e)) for r, b, e in zip(results, balls, expected, strict=True)))


def _attention_grad_balls(case: Attention, inputs: Inputs, grad_out: Ball) -> tuple[Ball, ...]:
    """dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K scale, dK = dS^T Q scale (arXiv 2205.14135, B.2)."""
    unit, scale, repeats = UNIT[inputs[0].dtype], case.dim**-0.5, case.heads // case.kv_heads
    weight, out = _attention_balls(inputs, scale, case.window, FP32)
    keys, values = (exact(x.repeat_interleave(repeats, dim=1)) for x in inputs[1:])
    inner = grad_out.times(out, FP32).sum(-1)
    grad_score = weight.times(grad_out.matmul(values.t, FP32).minus(inner, FP32), unit)
    grad_query = grad_score.matmul(keys, unit).times(factor(scale), unit)
    grad_keys = grad_score.t.matmul(exact(inputs[0]), unit).times(factor(scale), unit)
    grad_values = weight.rounded(unit).t.matmul(grad_out, unit)
    return (grad_query, *(_by_kv_head(grad, repeats, unit) for grad in (grad_keys, grad_values)))


def _by_kv_head(grad: Ball, repeats: int, unit: float) -> Ball:
    """Sums the gradients of the query heads that share a key-value head, each stored before."""
    split = Ball(*(x.unflatten(1, (-1, repeats)) for x in (grad.value, grad.error)))
    return split.sum(2)[:, :, 0].rounded(unit)


def check_decode_gqa(heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Outcome:
    """One token a sequence against its context."""
    case = Attention("", 3, heads, kv_heads, 1, 40, 32, 32)
    inputs = _attention_inputs(case, dtype, device)
    with poisoned(device):
        out = attention.decode_gqa(inputs[0], inputs[1], inputs[2])
    ball = _attention_balls(inputs, case.dim**-0.5, 0, FP32)[1]
    query, key, value = (x.cpu() for x in inputs)
    return compare((out, agreeing(ball, reference.attention_reference(query, key, value))))


def check_decode_mla(dtype: torch.dtype, device: torch.device) -> Outcome:
    """The absorbed form: values are the first dimensions of the one latent head."""
    query_BQC = normal(1, 2, 5, 40, dtype=dtype, device=device)
    latent_BSC = normal(2, 2, 37, 40, dtype=dtype, device=device)
    scale = 24**-0.5
    with poisoned(device):
        out = attention.decode_mla(query_BQC, latent_BSC, 32, scale)
    score_unit = FP32 if device.type == "cpu" else UNIT[dtype]  # bmm stores its scores
    latent_B1SC = latent_BSC.unsqueeze(1)
    # every head is a query of its own with one key-value head, so all contexts are visible
    query_BQ1C = query_BQC.unsqueeze(2)
    ball = _attention_balls((query_BQ1C, latent_B1SC, latent_B1SC[..., :32]), scale, 0, score_unit)[1][:, :, 0]
    expected = reference.decode_mla_reference(query_BQC.cpu(), latent_BSC.cpu(), 32, scale)
    return compare((out, agreeing(ball, expected)))


def check_gemm(rows: int, dtype: torch.dtype, device: torch.device) -> Outcome:
    """x w^T into a poisoned buffer; the widest spans two of the column blocks that are lifted."""
    x_MK, w_NK = normal(1, rows, 72, dtype=dtype, device=device), normal(2, 272, 72, dtype=dtype, device=device)
    out = torch.full((rows, 272), float("nan"), dtype=dtype, device=device)
    with poisoned(device):
        dense.gemm(x_MK, w_NK, out)
    return compare((out, exact(x_MK).matmul(exact(w_NK).t, UNIT[dtype])))


def check_norm_residual(rows: int, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Residual add and RMS norm, both results."""
    hidden, residual = (normal(seed, rows, 48, dtype=dtype, device=device) for seed in (1, 2))
    weight, unit, eps = normal(3, 48, dtype=dtype, device=device), UNIT[dtype], 1e-5
    expected = reference.norm_residual_reference(hidden.cpu(), residual.cpu(), weight.cpu(), eps)
    total = exact(hidden).plus(exact(residual), unit)
    with poisoned(device):
        out = dense.norm_residual(hidden, residual, weight, eps)
    return compare((out, agreeing(rms_norm_ball(total, exact(weight), eps, unit), expected)), (residual, total))


def check_quantise(per: fp8.Per, device: torch.device) -> Outcome:
    """What fp8 keeps of numbers of very different size: half a step of e4m3, of subnormals below 2^-6 scales."""
    x = normal(1, 30, 64, dtype=torch.bfloat16, device=device)
    x *= torch.logspace(-6, 3, 30, device=device).unsqueeze(1).to(x.dtype)
    x[3] = 0.0
    x[:, 5] *= 1e-3
    with poisoned(device):
        quantised = fp8.quantise(x, per)
    return compare((fp8.dequantise(quantised), fp8_rounded(exact(x), quantised.scale)))


def check_gemm_fp8(per: fp8.Per, device: torch.device) -> Outcome:
    """Quantise and multiply, against the product before quantising."""
    x = normal(1, 48, 256, dtype=torch.bfloat16, device=device)
    w = normal(2, 64, 256, dtype=torch.bfloat16, device=device)
    weight = fp8.quantise(w, per)
    with poisoned(device):
        out = fp8.gemm_fp8(x, weight, per)
    return compare((out, _fp8_product(exact(x), fp8.quantise(x, per).scale, exact(w), weight.scale)))


def check_grouped_fp8(device: torch.device) -> Outcome:
    """Experts in fp8, some without rows, against the same before quantising."""
    layer = LAYERS[0]
    rows = layer.make(torch.bfloat16, device)
    w13, w2 = fp8.quantise(rows.w13), fp8.quantise(rows.w2)
    with poisoned(device):
        out = fp8.grouped_swiglu_fp8(rows.row_RH, w13, w2, rows.end_E)
    expected = exact(torch.zeros_like(out))
    for expert, place in rows.each():
        row = rows.row_RH[place]
        x = _fp8_product(exact(row), fp8.quantise(row).scale, exact(rows.w13[expert]), w13.scale[expert])
        act = swiglu_ball(x, UNIT[torch.bfloat16])[3]
        scale = act.largest.amax(dim=-1, keepdim=True) / fp8.FP8_MAX  # at most
        y = _fp8_product(act, scale, exact(rows.w2[expert]), w2.scale[expert])
        expected.value[place], expected.error[place] = y.value, y.error
    return compare((out, expected))


def _fp8_product(x: Ball, x_scale: torch.Tensor, w: Ball, w_scale: torch.Tensor) -> Ball:
    return fp8_rounded(x, x_scale).matmul(fp8_rounded(w, w_scale).t, fp8_unit(x.value.shape[-1]))
