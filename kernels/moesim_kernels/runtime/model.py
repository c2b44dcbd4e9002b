"""The layers of the model on torch: everything but who has the experts' weights.

RMS norm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245) with a KV
cache of each sequence, gated experts (SwiGLU, arXiv:2002.05202). Every expert's result goes into the rows of its own
choices and is added up in the order of the choices, so what comes out does not depend on who computed first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.offload import StepRoutes
from moesim.rng import generator
from moesim_kernels.runtime.weights import WeightFile

__all__ = ["Decoder", "expert_out"]

_EPSILON = 1e-6
_ROTARY_BASE = 10_000.0


def expert_out(x_NH: Any, w13: Any, w2: Any) -> Any:
    """One expert on its rows: (silu(x G^T) * x U^T) D^T, [N, H]."""
    import torch

    gate, up = (x_NH @ w13.t()).chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up) @ w2.t()


class Decoder:
    """Weights, KV caches and the residual stream of the step that runs. device: of torch."""

    def __init__(self, file: WeightFile, device: Any) -> None:
        import torch

        self.torch, self.device = torch, device
        self.file, self.sizes, self.seed = file, file.sizes, file.seed
        flat = torch.from_numpy(file.read(file.dense, "the dense part").copy()).view(getattr(torch, file.sizes.dtype))
        self.weight: dict[str, Any] = {}
        at = 0
        for name, shape in file.sizes.dense_shapes.items():
            count = int(np.prod(shape))
            self.weight[name] = flat[at : at + count].view(shape).to(device)
            at += count
        s = file.sizes
        turn = _ROTARY_BASE ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim)
        angle = torch.arange(s.max_context, dtype=torch.float32)[:, None] * turn[None, :]
        kind = getattr(torch, s.dtype)
        self._cos, self._sin = (f(angle).to(kind).to(device) for f in (torch.cos, torch.sin))
        self.reset()

    def reset(self) -> None:
        """Forget all sequences."""
        self._cache: dict[int, Any] = {}
        """sequence -> [L, 2, kv heads, max_context, head_dim]"""
        self._length: dict[int, int] = {}
        self._next: dict[int, int] = {}
        self.x_TH: Any = None
        self.normed_TH: Any = None

    def forget(self, sequence: int) -> None:
        """A sequence has ended: its KV cache is free."""
        for facts in (self._cache, self._length, self._next):
            facts.pop(sequence, None)

    # -- a step -------------------------------------------------------------------------------------------------
    def begin(self, step: StepRoutes) -> None:
        """Embed the step's tokens: what the model said last of the sequence where it decodes, drawn ones in a prompt.

        Raises BadInput where a sequence outgrows max_context.
        """
        torch = self.torch
        sequence_T = np.asarray(step.sequence_T).tolist()
        tokens, self._runs = [], []
        for sequence in dict.fromkeys(sequence_T):
            rows = [i for i, one in enumerate(sequence_T) if one == sequence]
            start = self._length.get(sequence, 0)
            if start + len(rows) > self.sizes.max_context:
                raise BadInput(
                    f"sequence {sequence} has {start + len(rows)} tokens; the model holds max_context "
                    f"{self.sizes.max_context}. Write a model with a larger one, or run fewer steps"
                )
            self._length[sequence] = start + len(rows)
            if sequence not in self._cache:
                s = self.sizes
                shape = (s.layers, 2, s.kv_heads, s.max_context, s.head_dim)
                self._cache[sequence] = torch.zeros(shape, dtype=getattr(torch, s.dtype), device=self.device)
            self._runs.append((sequence, rows, start))
        drawn = self._drawn(step)
        for row, sequence in enumerate(sequence_T):
            tokens.append(drawn[row] if step.prompt or sequence not in self._next else self._next[sequence])
        self.x_TH = self.weight["embedding"][torch.tensor(tokens, device=self.device)]

    def _drawn(self, step: StepRoutes) -> list[int]:
        draw = generator(self.seed, "runtime/tokens", step.number)
        return [int(i) for i in draw.integers(self.sizes.vocabulary, size=len(step.expert_TLK))]

    def own(self, layer: int) -> Any:
        """Attention, norms, router and the shared expert of a layer. Returns the router's choice [T, K], which a replay
        reads as an engine does, and then takes the trace's."""
        torch, w = self.torch, self.weight
        x = self.x_TH
        x = x + self._attention(layer, self._norm(x, w[f"{layer}.norm1"])) @ w[f"{layer}.out"].t()
        normed = self._norm(x, w[f"{layer}.norm2"])
        logit_TE = normed @ w[f"{layer}.router"].t()
        chosen_TK = torch.topk(torch.softmax(logit_TE.float(), 1), self.sizes.top_k, 1).indices
        if self.sizes.shared_inner:
            x = x + expert_out(normed, w[f"{layer}.shared13"], w[f"{layer}.shared2"])
        self.x_TH, self.normed_TH = x, normed
        return chosen_TK

    def end(self) -> Any:
        """Final norm and head: logits [T, vocabulary]. The largest logit of a sequence's last row is its next token."""
        logit_TV = self._norm(self.x_TH, self.weight["norm"]) @ self.weight["head"].t()
        best_T = logit_TV.argmax(1).tolist()
        for sequence, rows, _ in self._runs:
            self._next[sequence] = best_T[rows[-1]]
        return logit_TV

    # -- parts --------------------------------------------------------------------------------------------------
    def _norm(self, x: Any, weight: Any) -> Any:
        return self.torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, _EPSILON)

    def _attention(self, layer: int, normed_TH: Any) -> Any:
        s, torch = self.sizes, self.torch
        tokens = normed_TH.shape[0]
        qkv = (normed_TH @ self.weight[f"{layer}.qkv"].t()).view(tokens, s.heads + 2 * s.kv_heads, s.head_dim)
        out = torch.empty((tokens, s.heads, s.head_dim), dtype=qkv.dtype, device=self.device)
        for sequence, rows, start in self._runs:
            end = start + len(rows)
            part = qkv[rows].transpose(0, 1)  # heads, tokens, width
            turned = self._turned(part[: s.heads + s.kv_heads], start, end)
            cache = self._cache[sequence][layer]
            cache[0, :, start:end] = turned[s.heads :]
            cache[1, :, start:end] = part[s.heads + s.kv_heads :]
            key, value = (cache[i, :, :end].repeat_interleave(s.heads // s.kv_heads, 0) for i in (0, 1))
            mask = None
            if len(rows) > 1:
                at = torch.arange(start, end, device=self.device)
                mask = torch.arange(end, device=self.device)[None, :] <= at[:, None]
            found = torch.nn.functional.scaled_dot_product_attention(turned[: s.heads], key, value, attn_mask=mask)
            out[rows] = found.transpose(0, 1)
        return out.view(tokens, s.heads * s.head_dim)

    def _turned(self, x: Any, start: int, end: int) -> Any:
        """Rotary positions: halves of each head turned by the angle of the position."""
        cos, sin = self._cos[start:end], self._sin[start:end]
        first, second = x.chunk(2, -1)
        return self.torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
