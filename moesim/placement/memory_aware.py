"""Memory-aware: as many redundant experts as make a token cheapest, when their memory is taken from the KV cache.

A redundant expert on each rank evens loads out, so a step takes less time; but its weights, in every layer, take room
in which requests could be held, so a step serves fewer of them. For each legal number the time of a step over the
requests it serves is modelled from the context's prices, and the cheapest number is placed with eplb_swap. Ours; the
trade-off is what operators ask about, and no engine decides it.

Model: running = min(requests, KV bytes left / KV bytes of a request). A layer's time is that of its busiest rank: rows
at row_ns, experts in use at expert_ns, copies over the rank's link (the slower one where there are several nodes). The
rest of a step, own_ns, is that of a full batch, which leans against replicas where fewer run.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.errors import BadInput
from moesim.placement import Placement, PlacementContext, PlacementCosts, check_weights
from moesim.placement.eplb import Mode
from moesim.placement.eplb_swap import Policy as EplbSwap
from moesim.spec import Spec

__all__ = ["Policy", "token_ns"]


class Policy(Spec):
    """`mode`, `effort`: as of eplb_swap. `max_redundant_experts`: at most so many (null: as many as experts).
    `least_gain`: numbers that could at best be cheaper by less than this share are not looked at.
    """

    chooses_slots: ClassVar[bool] = True

    mode: Mode = "auto"
    effort: Annotated[int, Field(ge=0, le=10_000)] = 20
    max_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    least_gain: Annotated[float, Field(ge=0, lt=1)] = 1e-3

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Raises BadInput where nobody priced the deployment."""
        weight_LE = check_weights(weight_LE)
        costs = _priced(ctx)
        layers, experts = weight_LE.shape
        most = experts if self.max_redundant_experts is None else self.max_redundant_experts
        low = -experts % ctx.num_ranks
        best, best_ns = low, np.inf
        for number in range(low, max(most, low) + 1, ctx.num_ranks):
            room = (experts + number) // ctx.num_ranks
            ideal_ns = token_ns(np.ones(layers), room, experts, ctx.num_ranks, ctx.num_nodes, costs)
            if not ideal_ns < best_ns * (1 - self.least_gain):  # and more slots only take more memory
                break
            placement = self._swap(number, 0).place(weight_LE, ctx)
            now_ns = token_ns(placement.balance(weight_LE), room, experts, ctx.num_ranks, ctx.num_nodes, costs)
            if now_ns < best_ns * (1 - 1e-9):
                best, best_ns = number, now_ns
        return self._swap(best, self.effort).place(weight_LE, ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """Modelled ns of a token."""
        balance_L = placement.balance(check_weights(weight_LE))
        room, experts = placement.slots_per_rank, placement.num_experts
        return token_ns(balance_L, room, experts, ctx.num_ranks, ctx.num_nodes, _priced(ctx))

    def _swap(self, number: int, effort: int) -> EplbSwap:
        return EplbSwap(num_redundant_experts=number, mode=self.mode, effort=effort)


def _priced(ctx: PlacementContext) -> PlacementCosts:
    if ctx.costs is None:
        raise BadInput(
            "placement memory_aware weighs time against memory, so it needs the costs of a deployment, and the context"
            " has none. Use it in a scenario, or choose the number yourself: eplb_swap with num_redundant_experts."
        )
    return ctx.costs


def token_ns(
    balance_L: NDArray[np.float64], room: int, experts: int, ranks: int, nodes: int, costs: PlacementCosts
) -> float:
    """Modelled ns of a rank's step over the requests it serves, inf where not even one request's KV fits.

    balance_L: largest over mean rank load by layer. room: slots of a rank.
    """
    fewest = -(-experts // ranks)
    left = costs.kv_bytes - (room - fewest) * len(balance_L) * costs.expert_bytes

    def running(kv_bytes: float) -> float:
        return min(float(costs.requests), kv_bytes / max(costs.request_kv_bytes, 1e-300))

    number, full = running(left), max(running(costs.kv_bytes), 1.0)
    if number < 1:
        return float("inf")
    rows_L = balance_L * (costs.tokens / ranks * number / full)
    wire = costs.near_bytes_per_ns if nodes == 1 else costs.far_bytes_per_ns
    away = 1 - 1 / ranks  # of a rank's rows come from others
    layer_L = rows_L * (costs.row_ns + away * costs.token_bytes / wire)
    layer_L = layer_L + np.minimum(rows_L, room) * costs.expert_ns
    return float((costs.own_ns + layer_L.sum()) / number)
