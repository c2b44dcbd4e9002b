"""Routing of every token of a trained model on held-out text, as an .npz that `moesim.traces.routing_npz` reads.

Two kinds of sequences: whole ones, all prefill; and prompts that the model goes on with, token by token from its cache
of keys and values, each byte drawn from its own predictions. Scores are rounded to float16 before the router sees
them, so that the stored scores give the stored choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim_kernels.lm.methods import Router
from moesim_kernels.lm.model import Cache, LanguageModel
from moesim_kernels.routers import Choice

__all__ = ["DECODE", "PREFILL", "Trace", "generate", "prefill", "record", "save_trace"]

PREFILL, DECODE = 0, 1
_TOKEN_LOCAL = ("topk", "auxiliary_loss", "loss_free")


@dataclass(slots=True)
class Trace:
    """Rows of tokens, in the order of their sequences; see `save_trace` for the arrays."""

    score_TLE: list[NDArray[np.float16]] = field(default_factory=list)
    expert_TLK: list[NDArray[np.uint8]] = field(default_factory=list)
    gate_TLK: list[NDArray[np.float16]] = field(default_factory=list)
    token_T: list[NDArray[np.uint8]] = field(default_factory=list)
    phase_T: list[NDArray[np.uint8]] = field(default_factory=list)
    sequence_T: list[NDArray[np.int32]] = field(default_factory=list)


def _rounded(router: Router) -> Any:
    def route(score_TE: torch.Tensor, layer: int) -> Choice:
        return router(score_TE.half().float(), layer)

    return route


def _rows(router: Router) -> tuple[NDArray[np.float16], NDArray[np.uint8], NDArray[np.float16]]:
    """Scores, ids and gates of the pass just made, [T, L, ...]."""
    layers = sorted(router.choice_L)
    return (
        np.stack([router.score_L[i].numpy().astype(np.float16) for i in layers], 1),
        np.stack([router.choice_L[i].expert_TK.numpy().astype(np.uint8) for i in layers], 1),
        np.stack([router.choice_L[i].gate_TK.numpy().astype(np.float16) for i in layers], 1),
    )


def _add(trace: Trace, token_T: NDArray[Any], phase: int, sequence: int, rows: tuple[Any, Any, Any]) -> None:
    trace.score_TLE.append(rows[0])
    trace.expert_TLK.append(rows[1])
    trace.gate_TLK.append(rows[2])
    trace.token_T.append(token_T.astype(np.uint8))
    trace.phase_T.append(np.full(len(token_T), phase, np.uint8))
    trace.sequence_T.append(np.full(len(token_T), sequence, np.int32))


def prefill(model: LanguageModel, router: Router, token_S: NDArray[Any], sequence: int, trace: Trace) -> torch.Tensor:
    """Adds one whole sequence in one pass; gives the logits [S, vocabulary]."""
    with torch.no_grad():
        logits_BSV = model(torch.from_numpy(token_S.astype(np.int64))[None], _rounded(router))
    _add(trace, token_S, PREFILL, sequence, _rows(router))
    return logits_BSV[0]


def generate(
    model: LanguageModel, router: Router, prompt_S: NDArray[Any], steps: int, sequence: int, trace: Trace, seed: int
) -> None:
    """Adds a prompt and `steps` bytes that the model makes of it, each fed back through the cache."""
    draws = torch.Generator().manual_seed(seed)
    cache, route = Cache(), _rounded(router)
    token_BS = torch.from_numpy(prompt_S.astype(np.int64))[None]
    with torch.no_grad():
        for step in range(steps + 1):
            logits_BSV = model(token_BS, route, cache)
            _add(trace, token_BS[0].numpy(), DECODE if step else PREFILL, sequence, _rows(router))
            token_BS = torch.multinomial(torch.softmax(logits_BSV[:, -1], 1), 1, generator=draws)


def record(
    model: LanguageModel,
    router: Router,
    held_out: NDArray[np.uint8],
    *,
    whole: int,
    prompts: int,
    length: int,
    prompt_length: int,
    seed: int,
) -> Trace:
    """`whole` sequences of `length` bytes, and `prompts` of `prompt_length` bytes continued to the same length.

    Windows are spread evenly over `held_out`. Raises ValueError for a method whose choice hangs on the batch.
    """
    if router.method.kind not in _TOKEN_LOCAL:
        raise ValueError(
            f"a trace of single tokens needs a router that chooses token by token ({', '.join(_TOKEN_LOCAL)}),"
            f" got {router.method.kind}"
        )
    start_Q = np.linspace(0, len(held_out) - length - 1, whole + prompts).astype(np.int64)
    trace = Trace()
    for sequence, start in enumerate(start_Q.tolist()):
        if sequence % (whole + prompts) < whole:
            prefill(model, router, held_out[start : start + length], sequence, trace)
        else:
            prompt_S = held_out[start : start + prompt_length]
            generate(model, router, prompt_S, length - prompt_length, sequence, trace, seed + sequence)
    return trace


def by_appearance(token_T: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tokens numbered in the order of their first appearance: a trace says which are alike, not what the text was."""
    _, first_V, which_T = np.unique(token_T, return_index=True, return_inverse=True)
    rank_V = np.empty(len(first_V), np.uint8)
    rank_V[np.argsort(first_V)] = np.arange(len(first_V))
    return rank_V[which_T]


def save_trace(trace: Trace, router: Router, path: Path) -> None:
    """Write [T, ...] arrays: expert_ids, weights (gates), scores (the router's logits), token_id, phase (0 prefill, 1
    decode), sequence_id; layer_index, num_experts, top_k; bias [L, E], added to the sigmoid of the scores for choosing,
    where the method is loss-free."""
    arrays: dict[str, Any] = {
        "expert_ids": np.concatenate(trace.expert_TLK),
        "weights": np.concatenate(trace.gate_TLK),
        "scores": np.concatenate(trace.score_TLE),
        "token_id": by_appearance(np.concatenate(trace.token_T)),
        "phase": np.concatenate(trace.phase_T),
        "sequence_id": np.concatenate(trace.sequence_T),
        "layer_index": np.arange(router.sizes.layers, dtype=np.int16),
        "num_experts": np.int32(router.sizes.experts),
        "top_k": np.int32(router.sizes.top_k),
    }
    if router.method.kind == "loss_free":
        arrays["bias"] = np.stack([router.state_L[i].numpy() for i in range(router.sizes.layers)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
