"""What a step costs by a bare roofline: the bytes that it must move at the memory's rate and the products that it must
do at the device's, no efficiency, no launch, nothing measured but the two rates (Williams et al., CACM 2009, added up
instead of overlapped). A prediction that orders no better has earned nothing.

Legend: L MoE layers, S expert slots of all ranks, G ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.dtypes import dtype_bytes
from moesim.simulate import Prepared
from moesim_kernels.real.work import StepWork

__all__ = ["roofline_ns", "step_bytes", "step_flop"]


def roofline_ns(prepared: Prepared, work: StepWork) -> float:
    """ns of the slowest rank: bytes / rate + FLOP / rate."""
    profile, model = prepared.result.scenario.cluster.profile, prepared.result.scenario.model
    flop_per_s = profile.flop_rate(model.activation_dtype)
    per_rank = [
        step_bytes(prepared, work, g) / profile.hbm_bytes_per_s + step_flop(prepared, work, g) / flop_per_s
        for g in range(work.ranks)
    ]
    return max(per_rank) * 1e9


def step_bytes(prepared: Prepared, work: StepWork, rank: int) -> float:
    """Weights that are needed, read once (of the experts those that have a row), and keys and values of every request
    that attends, read once."""
    model = prepared.result.scenario.model
    mine = work.rank_N == rank
    gemms = [g for g in model.gemms(1) if g.phase != "prefill" and (g.where != "head" or work.sampled_N[mine].any())]
    dense = sum(g.n * g.k * g.batch * g.layers * dtype_bytes(g.dtype) for g in gemms)
    active = int((_rows_LS(work, rank) > 0).sum())
    last: dict[int, int] = {}
    for request, position in zip(work.request_N[mine].tolist(), work.position_N[mine].tolist(), strict=True):
        last[request] = max(last.get(request, 0), position + 1)
    return float(dense + active * model.expert_bytes() + sum(last.values()) * sum(model.kv_bytes_per_token(1)))


def step_flop(prepared: Prepared, work: StepWork, rank: int) -> float:
    """Two for each weight and row, and two products of every query with every key it sees."""
    model = prepared.result.scenario.model
    mine = work.rank_N == rank
    rows = {"head": int(work.sampled_N[mine].sum())}
    tokens = int(mine.sum())
    dense = sum(
        2.0 * g.n * g.k * g.batch * g.layers * rows.get(g.where, tokens) for g in model.gemms(1) if g.phase != "prefill"
    )
    a = model.attention
    pairs = float((work.position_N[mine] + 1).sum()) * model.num_layers
    return float(
        dense
        + 2.0 * model.expert_params() * float(_rows_LS(work, rank).sum())
        + 2.0 * pairs * a.num_heads * (a.head_dim + a.v_head_dim)
    )


def _rows_LS(work: StepWork, rank: int) -> np.ndarray:
    return work.rows_LS()[:, rank * work.slots_per_rank : (rank + 1) * work.slots_per_rank]
