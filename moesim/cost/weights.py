"""Weights that dispatch sends along with tokens: what each port carries, and how long that takes.

A guest (`moesim.dispatch.plan`) is an expert that a rank computes though none of its slots holds it. Its weights come
from a rank that does, before the experts run: from the same node over NVLink, from another one from NIC to NIC, the
busiest port of either last. They share the links with the tokens' exchange, so their time is added to dispatch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray
from moesim.dispatch.plan import Plan
from moesim.hardware import DeviceProfile
from moesim.placement import Placement

__all__ = ["Guests", "Moves", "moves_of", "transfer_ns"]


class Moves(NamedTuple):
    """Experts sent, [..., L], in experts of relative size 1: through the busiest NVLink port and the busiest NIC, in
    all, and the most that one rank receives."""

    near: FloatArray
    far: FloatArray
    total: FloatArray
    most: FloatArray


def moves_of(plan: Plan, size_E: FloatArray | None = None) -> Moves | None:
    """What a plan sends, by batch and layer; None where it sends nothing. size_E: relative size of each expert, `EMPTY`
    last."""
    if plan.home_BLW is None:
        return None
    batches, layers, _ = plan.count_BLW.shape
    ranks, node_G = plan.placement.num_ranks, plan.placement.node_of_rank_G
    batch, layer, slot = np.nonzero((plan.home_BLW >= 0) & (plan.count_BLW > 0))
    to, home = slot // plan.slots_per_rank, plan.home_BLW[batch, layer, slot]
    size = np.ones(len(slot)) if size_E is None else size_E[plan.expert_BLW[batch, layer, slot]]
    far = node_G[to] != node_G[home]

    def by_rank(rank: AnyArray, weight: AnyArray) -> FloatArray:
        total = np.bincount((batch * layers + layer) * ranks + rank, weight, batches * layers * ranks)
        return total.reshape(batches, layers, ranks).astype(np.float64)

    received = by_rank(to, size)
    port = [np.maximum(by_rank(to, size * way), by_rank(home, size * way)).max(axis=2) for way in (~far, far)]
    return Moves(port[0], port[1], received.sum(axis=2), received.max(axis=2))


def transfer_ns(profile: DeviceProfile, moves: Moves, expert_bytes: float) -> FloatArray:
    """ns of sending, [..., L]. expert_bytes: weights of an expert of size 1 on one rank. Links run at the share of
    their rate that the profile states for gathers (0.75 and 0.85 where it states none), as moves of a rebalance do."""
    fit, node = profile.fits.get("all_gather", {}), profile.node
    near = moves.near * expert_bytes / (node.nvlink_bytes_per_s * fit.get("nvlink_eff", 0.75) * 1e-9)
    far = moves.far * expert_bytes / (node.nic_bytes_per_s * fit.get("nic_eff", 0.85) * 1e-9)
    start = np.where(moves.far > 0, node.nic_latency_ns, node.nvlink_latency_ns)
    start = start + fit.get("launch_ns", profile.graph_launch_ns)
    return np.asarray(np.where(moves.total > 0, start + np.maximum(near, far), 0.0))


class Guests:
    """What guests did in all that was priced: pairs they served by layer and part, and the most experts that one rank
    kept at once (a layer's guests are gone before the next one's come)."""

    def __init__(self, placement: Placement) -> None:
        self.load_LP = np.zeros((placement.num_layers, placement.num_ranks))
        self.most = 0.0

    def serve(self, plan: Plan, weight: float) -> None:
        """Add the plan's batches, `weight` times."""
        if plan.guests:
            own = plan.placement.rank_load(plan.own(plan.count_BLW))
            self.load_LP += (plan.rows_BLG() - own).sum(axis=0) * weight

    def sent(self, moves: Moves | None) -> None:
        """Weights came."""
        if moves is not None:
            self.most = max(self.most, float(moves.most.max(initial=0.0)))
