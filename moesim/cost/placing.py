"""What a placement policy is told of a deployment: ranks, nodes, tokens of the traffic, and what experts cost there."""

from __future__ import annotations

import numpy as np

from moesim.arrays import IntArray
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.engine_spec import EngineSpec
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.memory import rank_memory
from moesim.model import MoEModel
from moesim.placement import PlacementContext, PlacementCosts, TokenSample
from moesim.reuse import reused
from moesim.workload.pool import RoutingSource

__all__ = ["placement_context", "placement_costs", "sample_rows", "token_sample"]

_SAMPLE_IDS = 1 << 22
"""expert ids of the sample, in whole sequences as far as one fits"""


def placement_context(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    engine: EngineSpec,
    ops: Operators,
    source: RoutingSource | None,
    mean_tokens: tuple[float, float],
    seed: int,
) -> PlacementContext:
    """source: the traffic that the placement is made for. mean_tokens: of a request, prompt and output."""
    return PlacementContext(
        num_ranks=layout.ep,
        num_nodes=max(1, min(layout.nodes, layout.ep)),
        num_groups=model.num_expert_groups,
        rank_to_node=layout.node_of_part,
        sample=None if source is None or source.ideal else token_sample(source),
        costs=placement_costs(model, cluster, layout, engine, ops, mean_tokens),
        seed=seed,
    )


def sample_rows(source: RoutingSource) -> IntArray:
    """Rows of the first tokens of evenly spaced sequences of the pool, at most 2^22 ids: int64 [T]."""
    room = max(1, _SAMPLE_IDS // (source.num_layers * source.top_k))
    length_Q = source.sequence_tokens_Q
    if source.num_tokens <= room:
        return np.arange(source.num_tokens)
    each = max(1, min(int(length_Q.mean()), room // max(1, min(len(length_Q), 256))))
    step = max(1, -(-len(length_Q) * each // room))
    return np.concatenate(
        [np.arange(source.sequence_start[q], source.sequence_start[q] + min(each, length_Q[q]))
         for q in range(0, len(length_Q), step)]
    )  # fmt: skip


def token_sample(source: RoutingSource) -> TokenSample:
    """The tokens of `sample_rows`. Runs may share them (`moesim.reuse`)."""
    return reused(
        "sample of a pool",
        lambda: (source.expert_TLK, source.sequence_start, source.num_experts, source.token_T),
        lambda: _token_sample(source),
    )


def _token_sample(source: RoutingSource) -> TokenSample:
    rows = sample_rows(source)
    sequence_T = np.searchsorted(source.sequence_start, rows, side="right") - 1
    token_T = None if source.token_T is None else source.token_T[rows]
    return TokenSample(source.expert_TLK[rows], sequence_T, source.num_experts, token_T)


def placement_costs(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    engine: EngineSpec,
    ops: Operators,
    mean_tokens: tuple[float, float],
) -> PlacementCosts:
    """Costs of decode steps in which every rank is full: `engine.max_num_seqs` requests, or what the KV cache holds."""
    slots = -(-model.num_experts // layout.ep)
    memory = rank_memory(model, cluster, layout, engine, slots)
    per_token = memory.kv_unit / engine.block_size * model.num_layers
    length = mean_tokens[0] + mean_tokens[1]
    held = int(memory.kv_unit * memory.kv_units / max(per_token * length, 1.0))
    running = max(1, min(engine.max_num_seqs, held))
    pairs = float(running * layout.dp * model.top_k)
    prices = ExpertPrices(model, layout, ops, slots)
    row, expert = _slopes(ops, prices, pairs / layout.ep, slots)
    shape = attention_shape(model, layout.tp, False)
    context = running * (mean_tokens[0] + mean_tokens[1] / 2)
    attention = float(ops.attention_decode(running, context, shape).ns) * model.num_layers
    dense = DenseTables(model, layout, engine, ops, layout.meets, np.array([running]))
    node = cluster.node
    return PlacementCosts(
        tokens=pairs,
        row_ns=row,
        expert_ns=expert,
        token_bytes=float(prices.dispatch_bytes + prices.combine_bytes),
        near_bytes_per_ns=node.nvlink_bytes_per_s * 1e-9,
        far_bytes_per_ns=node.nic_bytes_per_s * 1e-9,
        expert_bytes=int(model.expert_bytes()) // layout.expert_tp,
        own_ns=float(dense.total_N[0]) + attention,
        kv_bytes=memory.kv_unit * memory.kv_units,
        request_kv_bytes=per_token * length,
        requests=engine.max_num_seqs,
    )


def _slopes(ops: Operators, prices: ExpertPrices, rows: float, slots: int) -> tuple[float, float]:
    """ns of a further row and of a further expert in use on a rank, at `rows` rows over `slots` experts."""
    rows = max(rows, 1.0)
    dtype = prices.shape.dtype

    def priced(total: float, active: float) -> float:
        work = ops.moe_work(total / active, dtype) * active
        return float(ops.moe(total, active, work, 0.0, prices.shape).ns)

    active = max(1.0, min(float(slots), rows))
    more = priced(2 * rows, active) - priced(rows, active)
    fewer = max(1.0, active / 2)
    read = (priced(rows, active) - priced(rows, fewer)) / (active - fewer) if active > fewer else 0.0
    return max(more / rows, 0.0), max(read, 0.0)
