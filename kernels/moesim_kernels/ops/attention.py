"""Attention through torch's scaled_dot_product_attention (SDPA): grouped-query (GQA) and latent (MLA), CPU and CUDA.

Suffixes: B sequences, Q query heads, G key-value heads, L new tokens, S tokens attended to (prefix + new), D head
dimension, V value dimension, C latent dimension (lora rank + rope). Tensors lie [B, heads, tokens, dimension].

What SDPA runs: on CUDA in bf16, flash attention for GQA and for MLA prefill, or cuDNN's where torch puts that first (a
late torch with cuDNN past 9.15 on Hopper; TORCH_CUDNN_SDPA_DEPRIORITIZED=1 keeps to flash); a prefix takes flash
always. In fp32, the memory-efficient kernel or plain GEMMs. On the CPU its flash kernel, which needs equal query and
value dimensions.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

__all__ = [
    "attention_backward",
    "decode_gqa",
    "decode_mla",
    "prefill_gqa",
    "prefill_mla",
    "window_mask",
]


def window_mask(length: int, total: int, window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Bool [L, S]: the i-th of the last `length` tokens sees itself and the window - 1 tokens before it.

    Attention under such a mask does the work of all L x S pairs and reads L x S mask bytes, and on CUDA leaves the
    flash kernel: it is an upper bound on what a kernel that skips blocks outside the window would take.
    """
    row_L = torch.arange(total - length, total, device=device).unsqueeze(1)
    column_S = torch.arange(total, device=device)
    return (column_S <= row_L) & (column_S > row_L - window)


def prefill_gqa(
    query_BQLD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSV: torch.Tensor,
    mask_LS: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of the last L of S tokens, [B, Q, L, V]; query head h reads key-value head h // (Q/G).

    The prefix is S - L. Without a mask the causal kernels are kept: upper-left is lower-right when L = S; otherwise
    flash attention's lower-right rule on CUDA, and a mask of L x S on the CPU. `mask_LS` (from `window_mask`)
    replaces the causal rule. `scale` multiplies q.k, by default D^-1/2.
    """
    length, total = query_BQLD.shape[2], key_BGSD.shape[2]
    mask = mask_LS if mask_LS is not None else (None if length == total else causal_lower_right(length, total))
    return functional.scaled_dot_product_attention(
        query_BQLD,
        key_BGSD,
        value_BGSV,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query_BQLD.shape[1] != key_BGSD.shape[1],
    )


def decode_gqa(
    query_BQ1D: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSV: torch.Tensor,
    mask_B11S: torch.Tensor | None = None,
) -> torch.Tensor:
    """One new token a sequence against its context of S tokens (its own included), [B, Q, 1, V].

    mask_B11S: added to the scores, where sequences see fewer than S tokens.

    The Q/G query heads that share a key-value head are laid out as that head's query tokens, so each key is read
    once for all of them: with `enable_gqa` alone the CPU kernel reads it Q/G times.
    """
    batch, heads, _, dim = query_BQ1D.shape
    kv_heads = key_BGSD.shape[1]
    packed_BGND = query_BQ1D.reshape(batch, kv_heads, heads // kv_heads, dim)
    out_BGNV = functional.scaled_dot_product_attention(packed_BGND, key_BGSD, value_BGSV, attn_mask=mask_B11S)
    return out_BGNV.reshape(batch, heads, 1, -1)


def prefill_mla(query_BQLD: torch.Tensor, key_BQSD: torch.Tensor, value_BQSV: torch.Tensor) -> torch.Tensor:
    """Latent attention in expanded form (DeepSeek-V2, arXiv 2405.04434, 2.1): nope + rope heads, [B, Q, L, V].

    Values are padded with zeros to the query dimension (128 to 192), which keeps the flash kernels at 1.5 times the
    work of the second product; the padding is part of the operation.
    """
    value_dim = value_BQSV.shape[-1]
    padded_BQSD = functional.pad(value_BQSV, (0, query_BQLD.shape[-1] - value_dim))
    return prefill_gqa(query_BQLD, key_BQSD, padded_BQSD)[..., :value_dim]


def decode_mla(query_BQC: torch.Tensor, latent_BSC: torch.Tensor, value_dim: int, scale: float) -> torch.Tensor:
    """Latent attention in absorbed form: one latent head of C = lora + rope shared by all query heads, [B, Q, V].

    Values are the latent's first `value_dim` (lora) dimensions; `scale` is (nope + rope)^-1/2. On the CPU this is
    SDPA with the whole latent as values, cut afterwards (equal dimensions reach its flash kernel). On CUDA, where no
    flash kernel of torch takes 576 dimensions, it is two batched GEMMs around a float32 softmax, which read the
    latent twice.
    """
    if latent_BSC.device.type == "cpu":
        latent_B1SC = latent_BSC.unsqueeze(1)
        out_B1QC = functional.scaled_dot_product_attention(
            query_BQC.unsqueeze(1), latent_B1SC, latent_B1SC, scale=scale
        )
        return out_B1QC.squeeze(1)[..., :value_dim]
    weight_BQS = torch.softmax(torch.bmm(query_BQC, latent_BSC.transpose(1, 2)) * scale, dim=-1, dtype=torch.float32)
    return torch.bmm(weight_BQS.to(latent_BSC.dtype), latent_BSC[..., :value_dim])


def attention_backward(
    out: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of `inputs` (query, key, value) through autograd; the forward graph is kept for another call.

    `out` is what `prefill_gqa` or `prefill_mla` returned for inputs that require gradients, so that the backward can
    be run, and timed, without its forward.
    """
    grads: tuple[torch.Tensor, ...] = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    return grads
