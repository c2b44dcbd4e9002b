"""Routers with a variable number of experts a token: experts that choose, a probability to exceed, null experts."""

from __future__ import annotations

import numpy as np
import torch

from moesim_kernels.routers.select import NONE, Choice, kept_gates, probabilities, take, top_ids

__all__ = ["expert_choice", "null_experts", "top_p"]


def expert_choice(score_TE: torch.Tensor, per_token: float, *, sequence_T: torch.Tensor | None = None) -> Choice:
    """Each expert takes the C = max(1, floor(T * per_token / E)) tokens that score it highest (arXiv 2202.09368).

    Scores are softmax over the experts; of equal ones the lowest token. With `sequence_T` (tokens of a sequence
    together) every sequence is chosen from by itself. Gates are the scores. W is the most experts any token got, at
    least 1.
    """
    tokens, experts = score_TE.shape
    share_TE = probabilities(score_TE)
    taken_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=score_TE.device)
    lengths = [tokens] if sequence_T is None else torch.unique_consecutive(sequence_T, return_counts=True)[1].tolist()
    first = 0
    for length in lengths if tokens else []:
        capacity = min(length, max(1, int(length * per_token / experts)))
        order_TE = share_TE[first : first + length].sort(dim=0, descending=True, stable=True).indices[:capacity]
        taken_TE[first : first + length].scatter_(0, order_TE, True)
        first += length
    expert_TW = _ranked(share_TE, taken_TE)
    return Choice(expert_TW, take(torch.softmax(score_TE, 1), expert_TW))


def top_p(score_TE: torch.Tensor, p: float = 0.4, *, most: int | None = None, normalise: bool = False) -> Choice:
    """The likeliest experts until their probabilities exceed p, the last included (arXiv 2403.07652).

    At most `most`, all where the sum never exceeds p. W is the most any token takes, at least 1.
    """
    tokens, experts = score_TE.shape
    order_TE = top_ids(score_TE, min(most or experts, experts))
    sorted_TE = probabilities(score_TE).gather(1, order_TE)
    before_TE = torch.zeros_like(sorted_TE)
    if sorted_TE.device.type == "cpu":  # NumPy adds in float32 one by one, torch in float64: a sum that meets p tells
        np.cumsum(sorted_TE[:, :-1].numpy(), axis=1, out=before_TE[:, 1:].numpy())
    else:
        before_TE[:, 1:] = sorted_TE[:, :-1].cumsum(1)
    taken_TE = before_TE <= p if p < 1 else torch.ones_like(before_TE, dtype=torch.bool)
    width = max(1, int(taken_TE.sum(1).max())) if tokens else 1
    expert_TW = order_TE.masked_fill(~taken_TE, NONE)[:, :width]
    return Choice(expert_TW, kept_gates(take(torch.softmax(score_TE, 1), expert_TW), normalise))


def null_experts(score_TN: torch.Tensor, k: int, true_experts: int) -> Choice:
    """The k best of all columns, of which those from `true_experts` on do nothing (AdaMoE, arXiv 2406.13233, 3.3-3.4).

    Gates are normalised over a token's true experts; a token may have none, and where it has one alone its gate is 1
    and gives the router no gradient. W = min(k, true_experts).
    """
    picked_TK = top_ids(score_TN, k)
    order_TK = (picked_TK >= true_experts).sort(dim=1, stable=True).indices
    expert_TW = picked_TK.gather(1, order_TK)[:, : min(k, true_experts)]
    expert_TW = expert_TW.masked_fill(expert_TW >= true_experts, NONE)
    return Choice(expert_TW, kept_gates(take(torch.softmax(score_TN, 1), expert_TW), True))


def _ranked(share_TE: torch.Tensor, taken_TE: torch.Tensor) -> torch.Tensor:
    """Each token's taken experts, highest share first, NONE behind; as wide as the busiest token, at least 1."""
    width = max(1, int(taken_TE.sum(1).max())) if len(taken_TE) else 1
    key_TE = share_TE.masked_fill(~taken_TE, -torch.inf)
    order_TW = key_TE.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order_TW.masked_fill(~taken_TE.gather(1, order_TW), NONE)
