"""Choosing, counting and gating: what the routers share."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch

__all__ = [
    "NONE", "Choice", "counts", "detached_sigmoid", "kept_gates", "max_violation", "probabilities", "take", "top_ids",
]  # fmt: skip

NONE: Final = -1
"""In an assignment: no expert in this place."""

GATE_FLOOR: Final = 1e-20
"""Keeps gates finite where all of a token's underflow."""


class Choice(NamedTuple):
    """`expert_TK`: int64 ids [T, W], most wanted first, `NONE` in the last places. `gate_TK`: [T, W], 0 at NONE."""

    expert_TK: torch.Tensor
    gate_TK: torch.Tensor


def top_ids(score_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the `k` highest scores of each row, highest first, int64 [T, k]; of equal scores the lowest id.

    A stable sort, because `torch.topk` takes any of equals. Raises ValueError for k outside 1..E.
    """
    if not 1 <= k <= score_TE.shape[1]:
        raise ValueError(f"between 1 and {score_TE.shape[1]} experts a token can be chosen, got {k}")
    return score_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]


def probabilities(score_TE: torch.Tensor) -> torch.Tensor:
    """Softmax over each row without a gradient, float32, for choosing by.

    On a CPU it is NumPy's exp and sum, operation by operation as `moesim.routing` does it: methods that set thresholds
    at a score (BIP) leave exact ties at the margin, and there a difference in the last bit is another expert.
    """
    score_TE = score_TE.detach()
    if score_TE.device.type != "cpu" or score_TE.shape[0] == 0:
        return torch.softmax(score_TE, 1)
    raw_TE = score_TE.contiguous().numpy()
    out_TE = np.exp(raw_TE - raw_TE.max(1, keepdims=True))
    out_TE /= out_TE.sum(1, keepdims=True)
    return torch.from_numpy(out_TE)


def detached_sigmoid(score_TE: torch.Tensor) -> torch.Tensor:
    """Logistic function without a gradient, on a CPU with NumPy's exp (see `probabilities`)."""
    score_TE = score_TE.detach()
    if score_TE.device.type != "cpu":
        return torch.sigmoid(score_TE)
    raw_TE = score_TE.numpy()
    tail_TE = np.exp(-np.abs(raw_TE))
    return torch.from_numpy(np.where(raw_TE >= 0, 1 / (1 + tail_TE), tail_TE / (1 + tail_TE)).astype(raw_TE.dtype))


def take(gate_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """Each choice's gate [T, W], 0 at NONE; differentiable in `gate_TE`."""
    return gate_TE.gather(1, expert_TK.clamp(min=0)) * (expert_TK != NONE)


def kept_gates(gate_TK: torch.Tensor, normalise: bool, scale: float = 1.0) -> torch.Tensor:
    """Gates of the chosen, divided by their sum if `normalise`, times `scale`."""
    if normalise:
        gate_TK = gate_TK / gate_TK.sum(1, keepdim=True).clamp(min=GATE_FLOOR)
    return gate_TK * scale if scale != 1.0 else gate_TK


def counts(expert_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """Tokens of each expert, int64 [E]; NONE counts for nobody."""
    return torch.bincount(expert_TK.reshape(-1) + 1, minlength=experts + 1)[1:]


def max_violation(count_E: torch.Tensor) -> float:
    """MaxVio: the busiest expert's load over the mean, less 1 (Loss-Free Balancing, arXiv 2408.15664, 4.1)."""
    mean = float(count_E.sum()) / len(count_E)
    return float(count_E.max()) / mean - 1.0 if mean else 0.0
