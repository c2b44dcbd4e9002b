"""One body of checks for every operator, on any device: against float64 within the bounds of bounds.py.

`selftest` runs them bare, the test suite through pytest. Each check poisons what operators may leave unwritten with
NaN, and returns how near its bound it came.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from . import backward, moe, reference
from .bounds import UNIT, Ball, exact, swiglu_ball
from .routing import assign, histogram

__all__ = ["LAYERS", "Layer", "Outcome", "Rows", "agreeing", "compare", "holds", "layer_checks", "normal", "poisoned"]

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16)
POISON_BYTES = (1 << 20, 256 << 20)  # one block for each of the two pools of torch's CUDA allocator


@dataclass(frozen=True)
class Outcome:
    """The worst |operator - reference| / bound, with its two parts. NaN or an exact law broken: infinite."""

    ratio: float
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Within the bound everywhere."""
        return self.ratio <= 1.0


def compare(*pairs: tuple[torch.Tensor, Ball]) -> Outcome:
    """The worst element of all (operator's result, reference with bound). Shapes must agree."""
    worst = Outcome(0.0, 0.0, 0.0)
    for result, ball in pairs:
        if result.shape != ball.value.shape:
            raise AssertionError(f"shape {list(result.shape)}, expected {list(ball.value.shape)}")
        if result.numel() == 0:
            continue
        error = (result.detach().double().cpu() - ball.value).abs().flatten().nan_to_num(nan=float("inf"))
        bound = ball.error.flatten()
        if not bound.isfinite().all():
            raise AssertionError("a bound is not finite")
        ratio = torch.where(error == 0, 0.0, error / bound)
        at = int(ratio.argmax())
        worst = max(worst, Outcome(float(ratio[at]), float(error[at]), float(bound[at])), key=lambda x: x.ratio)
    return worst


def holds(law: bool) -> Outcome:
    """An exact law, kept or broken."""
    return Outcome(0.0, 0.0, 0.0) if law else Outcome(float("inf"), float("inf"), 0.0)


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Memory that torch hands out unwritten holds NaN: always on the CPU, from freed blocks on CUDA."""
    if device.type == "cuda":
        for size_bytes in POISON_BYTES:
            torch.full((size_bytes // 4,), float("nan"), device=device)  # freed at once, and handed out again
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def normal(seed: int, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Normal random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


@dataclass(frozen=True)
class Layer:
    """A case of expert work: sizes, and how rows spread over the slots."""

    name: str
    tokens: int
    slots: int
    rows: int
    hidden: int
    intermediate: int
    histogram: str = "uniform"

    @property
    def takes_grouped(self) -> bool:
        """Whether rows are multiples of 16 bytes in bf16 and fp32."""
        return self.hidden % 8 == 0 and self.intermediate % 8 == 0

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Rows:
        """Random weights, hidden states, gates and routing."""
        count_E = histogram(self.histogram, self.rows, self.slots, self.tokens, seed)
        token_R, expert_R = assign(count_E, self.tokens, seed)
        hidden, intermediate = self.hidden, self.intermediate
        make = {"dtype": dtype, "device": device}
        return Rows(
            hidden_TH=normal(seed, self.tokens, hidden, **make),
            token_R=torch.from_numpy(token_R).to(device),
            expert_R=torch.from_numpy(expert_R).to(device),
            gate_R=normal(seed + 1, self.rows, dtype=torch.float32, device=device),
            end_E=torch.from_numpy(np.cumsum(count_E).astype(np.int32)).to(device),
            w13=normal(seed + 2, self.slots, 2 * intermediate, hidden, scale=hidden**-0.5, **make),
            w2=normal(seed + 3, self.slots, hidden, intermediate, scale=intermediate**-0.5, **make),
        )


LAYERS = (
    Layer("uniform", tokens=33, slots=8, rows=66, hidden=64, intermediate=48),
    Layer("one-token", tokens=1, slots=8, rows=3, hidden=64, intermediate=32),
    Layer("no-token", tokens=0, slots=4, rows=0, hidden=32, intermediate=32),
    Layer("no-row", tokens=5, slots=4, rows=0, hidden=32, intermediate=32),
    Layer("one-expert-takes-all", tokens=40, slots=6, rows=40, hidden=32, intermediate=64, histogram="one"),
    Layer("empty-experts", tokens=20, slots=16, rows=40, hidden=32, intermediate=32, histogram="few:2"),
    Layer("top-1", tokens=24, slots=4, rows=24, hidden=48, intermediate=16, histogram="balanced"),
    Layer("share-of-a-rank", tokens=50, slots=8, rows=31, hidden=32, intermediate=40, histogram="zipf:1.2"),
    Layer("every-expert", tokens=37, slots=3, rows=111, hidden=136, intermediate=72),
    Layer("odd-sizes", tokens=19, slots=5, rows=38, hidden=37, intermediate=23),
)


@dataclass(frozen=True)
class Rows:
    """The tensors of a `Layer`; suffixes as in moe.py."""

    hidden_TH: torch.Tensor
    token_R: torch.Tensor
    expert_R: torch.Tensor
    gate_R: torch.Tensor
    end_E: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor

    @property
    def row_RH(self) -> torch.Tensor:
        """Hidden states of the rows."""
        return self.hidden_TH.index_select(0, self.token_R)

    def each(self) -> Iterator[tuple[int, slice]]:
        """Every expert with rows, and where they are."""
        for expert in self.expert_R.unique().tolist():
            place_r = (self.expert_R == expert).nonzero()
            yield expert, slice(int(place_r.min()), int(place_r.max()) + 1)

    def double(self) -> Rows:
        """The same on the host in float64, as the references take it."""
        host = {name: getattr(self, name).cpu() for name in ("token_R", "expert_R", "end_E")}
        real = {name: getattr(self, name).double().cpu() for name in ("hidden_TH", "gate_R", "w13", "w2")}
        return replace(self, **host, **real)


def layer_checks(device: torch.device, hows: tuple[moe.HowLayer, ...]) -> dict[str, Callable[[], Outcome]]:
    """Every check of expert work, by name; "triton" among `hows` covers the fused layer alone."""
    found: dict[str, Callable[[], Outcome]] = {}
    for layer, dtype, how in itertools.product(LAYERS, DTYPES, hows):
        if how == "grouped" and not (moe.has_grouped() and layer.takes_grouped):
            continue
        tail = f"{layer.name}-{_short(dtype)}-{how}"
        found[f"layer-{tail}"] = partial(check_layer, layer, dtype, device, how)
        if how != "triton":
            found[f"experts-{tail}"] = partial(check_experts, layer, dtype, device, how)
            found[f"backward-{tail}"] = partial(check_backward, layer, dtype, device, how)
    for layer in LAYERS:
        found[f"permute-{layer.name}"] = partial(check_permute, layer, device)
        for dtype in DTYPES:
            found[f"combine-{layer.name}-{_short(dtype)}"] = partial(check_combine, layer, dtype, device)
            found[f"shared-{layer.name}-{_short(dtype)}"] = partial(check_shared, layer, dtype, device)
    if device.type == "cuda":
        captured = [
            how for how in hows if how == "triton" or (how == "grouped" and moe.grouped_is_native(device, BF16))
        ]
        found |= {f"graph-bf16-{how}": partial(check_graph, device, how) for how in captured}
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def check_layer(layer: Layer, dtype: torch.dtype, device: torch.device, how: moe.HowLayer, seed: int = 0) -> Outcome:
    """`moe_local` into a poisoned buffer, against the reference row by row."""
    rows = layer.make(dtype, device, seed)
    out = torch.full_like(rows.hidden_TH, float("nan"))
    with poisoned(device):
        moe.moe_local(rows.hidden_TH, rows.token_R, rows.gate_R, rows.end_E, rows.w13, rows.w2, how, out)
    host = rows.double()
    expected = reference.moe_reference(host.hidden_TH, host.token_R, host.expert_R, host.gate_R, host.w13, host.w2)
    ball = _combine_ball(_experts_ball(rows, UNIT[dtype])[1], rows, layer.tokens, UNIT[dtype])
    return compare((out, agreeing(ball, expected)))


def check_experts(layer: Layer, dtype: torch.dtype, device: torch.device, how: moe.How) -> Outcome:
    """`grouped_swiglu` into a poisoned buffer, against each row's own expert."""
    rows = layer.make(dtype, device)
    out = torch.full_like(rows.row_RH, float("nan"))
    with poisoned(device):
        moe.grouped_swiglu(rows.row_RH, rows.w13, rows.w2, rows.end_E, how, out)
    return compare((out, agreeing(_experts_ball(rows, UNIT[dtype])[1], _experts_reference(rows.double()))))


def check_backward(layer: Layer, dtype: torch.dtype, device: torch.device, how: moe.How) -> Outcome:
    """The experts' data and weight gradients and the combine's, against autograd of the float64 reference."""
    rows, unit = layer.make(dtype, device), UNIT[dtype]
    grad_TH = normal(9, *rows.hidden_TH.shape, dtype=dtype, device=device)
    with poisoned(device):
        x_R2I = moe.grouped_rows(rows.row_RH, rows.w13.transpose(1, 2), rows.end_E, how)
        out_RH = moe.grouped_swiglu(rows.row_RH, rows.w13, rows.w2, rows.end_E, how)
        grad_RH, grad_gate_R = backward.combine_backward(grad_TH, out_RH, rows.gate_R, rows.token_R)
        grads = backward.grouped_backward(grad_RH, rows.row_RH, x_R2I, rows.w13, rows.w2, rows.end_E, how)
    host = rows.double()
    leaves = (host.row_RH, host.w13, host.w2, host.gate_R)
    row_RH, w13, w2, gate_R = (leaf.detach().clone().requires_grad_(True) for leaf in leaves)
    out = _experts_reference(replace(host, w13=w13, w2=w2), row_RH)
    loss = (gate_R.unsqueeze(1) * out * grad_TH.double().cpu()[host.token_R]).sum()
    expected = torch.autograd.grad(loss, (row_RH, w13, w2, gate_R), allow_unused=True, materialize_grads=True)
    x_ball, y_ball = _experts_ball(rows, unit)
    back = exact(grad_TH)[host.token_R]
    grad_ball = back.times(exact(rows.gate_R.unsqueeze(1)), unit)
    gate_ball = back.times(y_ball, 0.0).sum(1)[:, 0]
    balls = (*_backward_ball(rows, x_ball, grad_ball, unit), gate_ball)
    results = (grads.row_RH, grads.w13, grads.w2, grad_gate_R)
    return compare(*((r, agreeing(b, e)) for r, b, e in zip(results, balls, expected, strict=True)))


def check_permute(layer: Layer, device: torch.device) -> Outcome:
    """Rows are the tokens' own, sorted by expert and stable; every choice stands once; putting back is the inverse."""
    top_k = min(layer.slots, 3)
    generator = torch.Generator().manual_seed(7)
    ranks = torch.rand(layer.tokens, layer.slots, generator=generator)
    expert_TK = ranks.argsort(dim=1)[:, :top_k].to(device)
    hidden_TH = normal(8, layer.tokens, layer.hidden, dtype=torch.bfloat16, device=device)
    with poisoned(device):
        row_RH, token_R, choice_R, end_E = moe.permute(hidden_TH, expert_TK, layer.slots)
    expert_R = expert_TK.flatten()[choice_R]
    place_R = expert_R * expert_TK.numel() + choice_R  # rises exactly if sorted by expert, then by choice
    back = torch.full((expert_TK.numel(), layer.hidden), float("nan"), dtype=torch.bfloat16, device=device)
    back[choice_R] = row_RH
    counts = np.bincount(expert_TK.flatten().cpu().numpy(), minlength=layer.slots)
    laws = (
        bool((place_R.diff() > 0).all()),
        torch.equal(token_R, choice_R // top_k),
        torch.equal(back, hidden_TH.repeat_interleave(top_k, dim=0)),
        end_E.dtype == torch.int32 and end_E.tolist() == counts.cumsum().tolist(),
    )
    return holds(all(laws))


def check_combine(layer: Layer, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Weighted rows summed by token into a poisoned buffer; zero where a token has no row."""
    rows = layer.make(dtype, device)
    out_RH = normal(5, layer.rows, layer.hidden, dtype=dtype, device=device)
    out = torch.full_like(rows.hidden_TH, float("nan"))
    with poisoned(device):
        moe.combine(out_RH, rows.gate_R, rows.token_R, layer.tokens, out)
    expected = torch.zeros(layer.tokens, layer.hidden, dtype=torch.float64)
    for row, token in enumerate(rows.token_R.tolist()):
        expected[token] += rows.gate_R[row].double().cpu() * out_RH[row].double().cpu()
    ball = _combine_ball(exact(out_RH), rows, layer.tokens, UNIT[dtype])
    return compare((out, agreeing(ball, expected)))


def check_shared(layer: Layer, dtype: torch.dtype, device: torch.device) -> Outcome:
    """The shared expert: every token through the first expert's weights."""
    rows = layer.make(dtype, device)
    with poisoned(device):
        out_TH = moe.shared_expert(rows.hidden_TH, rows.w13[0], rows.w2[0])
    every = replace(rows, token_R=torch.arange(layer.tokens), end_E=torch.tensor([layer.tokens]))
    host = replace(every.double(), expert_R=torch.zeros(layer.tokens, dtype=torch.int64))
    ball = _expert_ball(exact(rows.hidden_TH), rows.w13[0], rows.w2[0], UNIT[dtype])[1]
    return compare((out_TH, agreeing(ball, _experts_reference(host))))


def check_graph(device: torch.device, how: moe.HowLayer) -> Outcome:
    """Route, permute and layer captured in one CUDA graph, replayed on other inputs, give what they give launched.

    That nothing in them waits for the device is what capturing proves.
    """
    layer, top_k = LAYERS[0], 2
    rows = layer.make(torch.bfloat16, device)
    router_EH = normal(6, layer.slots, layer.hidden, dtype=torch.float32, device=device)
    hidden_TH, out = torch.empty_like(rows.hidden_TH), torch.empty_like(rows.hidden_TH)

    def run() -> tuple[torch.Tensor, moe.Permuted]:
        expert_TK, gate_TK = moe.route(hidden_TH, router_EH, top_k, score="sigmoid", groups=4, top_groups=2)
        permuted = moe.permute(hidden_TH, expert_TK, layer.slots)
        gate_R = gate_TK.flatten()[permuted.choice_R]
        moe.moe_local(hidden_TH, permuted.token_R, gate_R, permuted.end_E, rows.w13, rows.w2, how, out)
        return gate_R, permuted

    hidden_TH.copy_(rows.hidden_TH.flip(0))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()  # what is set up at the first call must not be captured
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gate_R, permuted = run()
    hidden_TH.copy_(rows.hidden_TH)
    out.fill_(float("nan"))
    graph.replay()
    each_E = permuted.end_E.long().diff(prepend=torch.zeros(1, dtype=torch.int64, device=device))
    expert_R = torch.arange(layer.slots, device=device).repeat_interleave(each_E)
    routed = replace(rows, token_R=permuted.token_R, gate_R=gate_R, end_E=permuted.end_E, expert_R=expert_R)
    unit = UNIT[torch.bfloat16]
    return compare((out, _combine_ball(_experts_ball(routed, unit)[1], routed, layer.tokens, unit)))


def agreeing(ball: Ball, expected: torch.Tensor) -> Ball:
    """The ball, once its values are those of the plain reference, float64's rounding apart."""
    if not torch.allclose(ball.value, expected.detach(), rtol=1e-9, atol=1e-9):
        raise AssertionError("the bound's own values disagree with the reference")
    return ball


def _experts_reference(host: Rows, row_RH: torch.Tensor | None = None) -> torch.Tensor:
    row_RH = host.row_RH if row_RH is None else row_RH
    w13, w2 = host.w13.unbind(), host.w2.unbind()
    pairs = zip(row_RH.unbind(), host.expert_R.tolist(), strict=True)
    out = [reference.expert_reference(x_H, w13[expert], w2[expert]) for x_H, expert in pairs]
    return torch.stack(out) if out else row_RH * 0.0


def _expert_ball(row_rH: Ball, w13: torch.Tensor, w2: torch.Tensor, unit: float) -> tuple[Ball, Ball]:
    """(first product, output) of one expert's rows."""
    x_r2I = row_rH.matmul(exact(w13).t, unit)
    return x_r2I, swiglu_ball(x_r2I, unit)[3].matmul(exact(w2).t, unit)


def _experts_ball(rows: Rows, unit: float) -> tuple[Ball, Ball]:
    """(first product [R, 2I], output [R, H]) of every row through its expert."""
    _, hidden, intermediate = rows.w2.shape
    x_R2I = exact(torch.zeros(len(rows.token_R), 2 * intermediate))
    y_RH = exact(torch.zeros(len(rows.token_R), hidden))
    for expert, place in rows.each():
        x, y = _expert_ball(exact(rows.row_RH[place]), rows.w13[expert], rows.w2[expert], unit)
        for whole, part in ((x_R2I, x), (y_RH, y)):
            whole.value[place], whole.error[place] = part.value, part.error
    return x_R2I, y_RH


def _combine_ball(y_RH: Ball, rows: Rows, tokens: int, unit: float) -> Ball:
    """Rows weighted in fp32, or rounded once more after it, summed in fp32 and stored."""
    weighted = y_RH.times(exact(rows.gate_R.unsqueeze(1)), unit)
    token_R = rows.token_R.cpu()
    value, error, size = (torch.zeros(tokens, y_RH.value.shape[1], dtype=torch.float64) for _ in range(3))
    value.index_add_(0, token_R, weighted.value)
    error.index_add_(0, token_R, weighted.error)
    size.index_add_(0, token_R, weighted.largest)
    most = int(torch.bincount(token_R, minlength=1).max())
    return Ball(value, error + 2 * most * UNIT[torch.float32] * size).rounded(unit)


def _zeros(like: torch.Tensor) -> Ball:
    return exact(torch.zeros_like(like))


def _backward_ball(rows: Rows, x_R2I: Ball, grad_RH: Ball, unit: float) -> tuple[Ball, Ball, Ball]:
    """Bounds of the gradients of rows, w13 and w2."""
    grads = (_zeros(rows.row_RH), _zeros(rows.w13), _zeros(rows.w2))
    for expert, place_r in rows.each():
        grad, row = grad_RH[place_r], exact(rows.row_RH[place_r])
        silu, slope, up, act = swiglu_ball(x_R2I[place_r], unit)
        grad_act = grad.matmul(exact(rows.w2[expert]), unit)
        grad_gate, grad_up = grad_act.times(up, unit).times(slope, unit), grad_act.times(silu, unit)
        grad_x = Ball(torch.cat((grad_gate.value, grad_up.value), 1), torch.cat((grad_gate.error, grad_up.error), 1))
        parts = (grad_x.matmul(exact(rows.w13[expert]), unit), grad_x.t.matmul(row, unit), grad.t.matmul(act, unit))
        places: tuple[int | slice, ...] = (place_r, expert, expert)
        for whole, part, place in zip(grads, parts, places, strict=True):
            whole.value[place], whole.error[place] = part.value, part.error
    return grads
