"""Batches drawn at count fidelity, and what travels to their ports under the replicas that single tokens or a plan
choose.

Legend: B batches, L MoE layers, S slots, G ranks, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray
from moesim.cost.exchange import Ports
from moesim.dispatch.plan import Plan
from moesim.layout import Layout

__all__ = ["DrawnBatches", "busiest_ports", "planned_ports"]


class DrawnBatches(NamedTuple):
    """Tokens per slot [B, L, S], and where tokens travel the copies that ranks receive, and nodes (or ranks, as of
    `moesim.cost.touch.Touch`)."""

    count_BLS: AnyArray
    in_BLG: AnyArray | None = None
    node_in_BLN: AnyArray | None = None


def busiest_ports(ranks_in: AnyArray, nodes_in: AnyArray, layout: Layout) -> Ports:
    """The busiest ports of copies received by rank [B, L, G], and by node or rank."""
    return Ports(
        nvlink=ranks_in.max(axis=-1),
        nic=nodes_in.max(axis=-1) / layout.nics_shared,
        nvlink_total=ranks_in.sum(axis=-1),
        nic_total=nodes_in.sum(axis=-1),
    )


def planned_ports(drawn: DrawnBatches, plan: Plan, layout: Layout, tokens: int) -> Ports | None:
    """Ports under a plan: a rank's copies for each of its pairs as under the stand-in, and what the shared expert
    alone makes travel."""
    if drawn.in_BLG is None or drawn.node_in_BLN is None:
        return None
    before_BLG, after_BLG = plan.placement.rank_load(drawn.count_BLS), plan.rows_BLG(shared=False)
    if layout.copies not in ("distinct", "coherent"):  # of pairs, by rank
        in_BLG = _scaled(drawn.in_BLG, before_BLG, after_BLG)
        return busiest_ports(in_BLG, _scaled(drawn.node_in_BLN, before_BLG, after_BLG), layout)
    node_G = np.arange(layout.ranks) // layout.gpus_per_node
    nodes = np.arange(drawn.node_in_BLN.shape[2]) == node_G[:, None]
    in_BLG = np.minimum(_scaled(drawn.in_BLG, before_BLG, after_BLG), tokens)
    node_in_BLN = np.minimum(_scaled(drawn.node_in_BLN, before_BLG @ nodes, after_BLG @ nodes), tokens)
    if plan.copies_BLG is not None and plan.copies_BLN is not None:
        in_BLG, node_in_BLN = in_BLG + plan.copies_BLG, node_in_BLN + plan.copies_BLN
    # what comes to a node goes on to one of its ranks
    return busiest_ports(in_BLG, np.minimum(node_in_BLN, in_BLG @ nodes), layout)


def _scaled(copies: AnyArray, before: FloatArray, after: FloatArray) -> FloatArray:
    """Copies for `after` pairs at each place, from those for `before`; where there were none, as everywhere in the
    mean."""
    mean = copies.sum(axis=-1, keepdims=True) / np.maximum(before.sum(axis=-1, keepdims=True), 1.0)
    each = np.where(before > 0, copies / np.where(before > 0, before, 1.0), mean)
    return np.asarray(each * after, np.float64)
