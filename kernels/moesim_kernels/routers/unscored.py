"""Routers that go by something else than a learned score: nearness to centroids, a table of token ids, a draw."""

from __future__ import annotations

import torch

from moesim_kernels.routers.select import Choice, counts, kept_gates, take, top_ids

__all__ = ["centroid", "centroid_step", "drawn", "table"]


def centroid(
    feature_TD: torch.Tensor,
    centroid_ED: torch.Tensor,
    k: int,
    *,
    temperature: float = 0.1,
    normalise: bool = True,
) -> Choice:
    """The k experts whose centroids have the highest cosine with the token's features; gates: softmax of the cosines
    over `temperature` (Chi et al., arXiv 2204.09179). Differentiable in features and centroids.
    """
    near_TE = unit(feature_TD) @ unit(centroid_ED).T.to(feature_TD)
    expert_TK = top_ids(near_TE, k)
    return Choice(expert_TK, kept_gates(take(torch.softmax(near_TE / temperature, 1), expert_TK), normalise))


def centroid_step(
    centroid_ED: torch.Tensor, feature_TD: torch.Tensor, expert_TK: torch.Tensor, *, memory: float = 0.99
) -> torch.Tensor:
    """Online K-means: an expert's centroid goes the (1 - memory)-th part of the way to the mean of its tokens' unit
    features; one without tokens stays. No gradient; of the centroids' dtype."""
    unit_TD = unit(feature_TD.detach())
    load_E1 = counts(expert_TK, len(centroid_ED))[:, None]
    sum_ED = torch.zeros(len(centroid_ED), unit_TD.shape[1], dtype=unit_TD.dtype, device=unit_TD.device)
    for place in range(expert_TK.shape[1]):
        sum_ED.index_add_(0, expert_TK[:, place], unit_TD)
    mean_ED = sum_ED.to(centroid_ED) / load_E1.clamp(min=1)
    return torch.where(load_E1 > 0, centroid_ED + (1 - memory) * (mean_ED - centroid_ED), centroid_ED)


def table(token_T: torch.Tensor, table_VK: torch.Tensor) -> Choice:
    """Hash routing (Roller et al., arXiv 2106.04426): a fixed table's experts for each vocabulary id, gates 1 / K."""
    expert_TK = table_VK.long()[token_T % len(table_VK)]
    return Choice(expert_TK, torch.full(expert_TK.shape, 1 / table_VK.shape[1], device=expert_TK.device))


def drawn(draw_TE: torch.Tensor, k: int) -> Choice:
    """Random experts (THOR, arXiv 2110.04260): the k highest of uniform draws made outside, gates 1 / K.

    One row of draws for each token, or for a sentence or batch repeated.
    """
    expert_TK = top_ids(draw_TE, k)
    return Choice(expert_TK, torch.full(expert_TK.shape, 1 / k, device=draw_TE.device))


def unit(row_ND: torch.Tensor) -> torch.Tensor:
    """Rows of length 1; a row of zeros stays one."""
    most_N1 = row_ND.abs().amax(1, keepdim=True)
    row_ND = row_ND / torch.where(most_N1 > 0, most_N1, 1)
    return row_ND / (row_ND * row_ND).sum(1, keepdim=True).sqrt().clamp(min=1e-20)
