"""A decoder with grouped-query attention and an MoE in every layer; the experts' work is really grouped.

Sizes are those of workloads/models/stdlib-moe-16e.yaml. Pre-norm, rotary positions (arXiv 2104.09864), SwiGLU experts,
input and output embeddings tied. The router is a linear layer in float32; what it chooses comes from outside (`Route`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from moesim_kernels.routers import NONE, Choice

__all__ = ["Cache", "LanguageModel", "Layer", "Route", "Sizes", "grouped_experts"]

Route = Callable[[torch.Tensor, int], Choice]
"""(scores [T, E], layer) -> choice"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of the model; `context` is the longest sequence."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    top_k: int = 2
    intermediate: int = 128
    vocabulary: int = 256
    context: int = 256


@dataclass(slots=True)
class Cache:
    """Keys and values of the tokens so far, one [B, kv heads, S, head_dim] each a layer."""

    key_L: list[torch.Tensor] = field(default_factory=list)
    value_L: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.key_L[0].shape[2] if self.key_L else 0

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one layer's keys and values; gives all of that layer's."""
        if layer == len(self.key_L):
            self.key_L.append(key)
            self.value_L.append(value)
        else:
            self.key_L[layer] = torch.cat([self.key_L[layer], key], 2)
            self.value_L[layer] = torch.cat([self.value_L[layer], value], 2)
        return self.key_L[layer], self.value_L[layer]


def grouped_experts(
    hidden_TH: torch.Tensor, choice: Choice, w13_E2IH: torch.Tensor, w2_EHI: torch.Tensor
) -> torch.Tensor:
    """Sum over each token's experts of gate * w2 (silu(w1 x) * w3 x), [T, H]; tokens are gathered expert by expert.

    Two matrix products an expert that has rows. Places that hold NONE cost nothing. Differentiable throughout.
    """
    width = choice.expert_TK.shape[1]
    flat_R = choice.expert_TK.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    order_R = order_R[int((flat_R == NONE).sum()) :]
    token_R = order_R // max(1, width)
    rows_E = torch.bincount(flat_R[order_R], minlength=len(w13_E2IH)).tolist()
    row_RH = hidden_TH.index_select(0, token_R)
    done = [
        functional.linear(_swiglu(functional.linear(part, w13)), w2)
        for part, w13, w2 in zip(row_RH.split(rows_E), w13_E2IH.unbind(0), w2_EHI.unbind(0), strict=True)
        if len(part)
    ]
    if not done:
        return torch.zeros_like(hidden_TH)
    out_RH = torch.cat(done) * choice.gate_TK.reshape(-1)[order_R].unsqueeze(1)
    return torch.zeros_like(hidden_TH).index_add(0, token_R, out_RH)


def _swiglu(x_R2I: torch.Tensor) -> torch.Tensor:
    gate_RI, up_RI = x_R2I.chunk(2, 1)
    return functional.silu(gate_RI) * up_RI


def _rotate(x_BNSD: torch.Tensor, first: int) -> torch.Tensor:
    """Rotary positions first, first + 1, ... (arXiv 2104.09864, eq. 34), halves of the head paired."""
    half = x_BNSD.shape[3] // 2
    frequency_D = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle_SD = torch.arange(first, first + x_BNSD.shape[2], dtype=torch.float32)[:, None] * frequency_D
    cos_SD, sin_SD = angle_SD.cos(), angle_SD.sin()
    low, high = x_BNSD[..., :half], x_BNSD[..., half:]
    return torch.cat([low * cos_SD - high * sin_SD, low * sin_SD + high * cos_SD], 3)


class Layer(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """Attention, then the experts, each after a norm and beside a residual."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.sizes, self.layer = sizes, layer
        wide, narrow = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.norm_attention = nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.qkv = nn.Linear(sizes.hidden, wide + 2 * narrow, bias=False)
        self.output = nn.Linear(wide, sizes.hidden, bias=False)
        self.norm_experts = nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.w13_E2IH = nn.Parameter(torch.empty(sizes.experts, 2 * sizes.intermediate, sizes.hidden))
        self.w2_EHI = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, sizes.intermediate))

    def forward(self, x_BSH: torch.Tensor, route: Route, cache: Cache | None) -> torch.Tensor:
        """[B, S, H] in and out."""
        x_BSH = x_BSH + self._attend(self.norm_attention(x_BSH), cache)
        hidden_TH = self.norm_experts(x_BSH).reshape(-1, self.sizes.hidden)
        choice = route(self.router(hidden_TH), self.layer)
        return x_BSH + grouped_experts(hidden_TH, choice, self.w13_E2IH, self.w2_EHI).view_as(x_BSH)

    def _attend(self, x_BSH: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        sizes, (sequences, length, _) = self.sizes, x_BSH.shape
        first = cache.key_L[self.layer].shape[2] if cache is not None and self.layer < len(cache.key_L) else 0
        heads = self.qkv(x_BSH).view(sequences, length, -1, sizes.head_dim).transpose(1, 2)
        query, key, value = heads.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        query, key = _rotate(query, first), _rotate(key, first)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        group = sizes.heads // sizes.kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed: torch.Tensor = self.output(out.transpose(1, 2).reshape(sequences, length, -1))
        return mixed


class LanguageModel(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """Bytes in, logits of the next byte out. The same `seed` gives the same initial weights."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.empty(sizes.vocabulary, sizes.hidden))
        self.blocks = nn.ModuleList(Layer(sizes, layer) for layer in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-6)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.5 * weight.shape[-1] ** -0.5, generator=draws)

    def forward(self, token_BS: torch.Tensor, route: Route, cache: Cache | None = None) -> torch.Tensor:
        """Logits [B, S, vocabulary]. With a `cache` the tokens follow those already in it, and are added to it."""
        x_BSH = functional.embedding(token_BS, self.embedding)
        for block in self.blocks:
            x_BSH = block(x_BSH, route, cache)
        return functional.linear(self.norm(x_BSH), self.embedding)

    def loss(self, window_BS: torch.Tensor, route: Route) -> torch.Tensor:
        """Mean nats per byte of windows [B, S + 1]: each byte from those before it."""
        logits_BSV = self(window_BS[:, :-1], route)
        return functional.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten())
