"""Routers with a variable number of experts a token: the experts choose."""

from __future__ import annotations

import torch

from moesim_kernels.routers.select import NONE, Choice, probabilities, take

__all__ = ["expert_choice"]


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
    width = max(1, int(taken_TE.sum(1).max())) if tokens else 1
    wanted_TE = share_TE.masked_fill(~taken_TE, -1.0)
    order_TE = wanted_TE.sort(dim=1, descending=True, stable=True).indices[:, :width]
    expert_TK = order_TE.masked_fill(~taken_TE.gather(1, order_TE), NONE)
    return Choice(expert_TK, take(torch.softmax(score_TE, 1), expert_TK))
