"""Shadowing: the hottest experts get a replica on every rank, as long as the modelled time of their layer falls.

He et al., "FasterMoE: Modeling and Optimizing Training of Large-Scale Dynamic Pre-Trained Models" (PPoPP'22), its
dynamic shadowing: time(i) = 3 comp C_i + 4 send B_i + i send_model with the i hottest experts shadowed, hottest first,
until the next one does not lower it. C_i: rows that the busiest rank computes, B_i: rows that it receives, those of
shadowed experts staying where they are; comp = 4 alpha d^2 / FLOP/s, send = 4 d / bandwidth, send_model = 8 alpha d^2 /
bandwidth.

Ours: ranks with several experts (their loads add up), tokens spread evenly over source ranks, and the serving form
where the context prices things: row_ns C_i + token_bytes / bandwidth B_i + i expert_bytes / bandwidth / `steps`. The
experts that are not shadowed lie in contiguous order. FasterMoE sends shadows anew in every iteration (`steps` = 1);
here they hold a slot on every rank, so memory bounds them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import EMPTY, Placement, PlacementContext, check_weights
from moesim.spec import Spec

__all__ = ["Policy"]

Floats = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0, le=1e18)]


class Policy(Spec):
    """`steps`: steps that a shadow serves before it is sent again. `max_shadows`: a layer, null: no limit. Without
    prices in the context, the paper's: `hidden_size` (d), `expansion` (alpha), `bandwidth_gbit_per_s`, `tflop_per_s`,
    and `tokens`, (token, expert) pairs a step.

    How many slots a rank has is the policy's choice: as many as the layer with most shadows needs.
    """

    chooses_slots: ClassVar[bool] = True

    steps: Positive = 1.0
    max_shadows: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    expansion: Positive = 2.0
    bandwidth_gbit_per_s: Positive = 50.0
    tflop_per_s: Positive = 11.5
    tokens: Positive = 16384.0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`."""
        weight_LE = check_weights(weight_LE)
        layers, experts = weight_LE.shape
        ranks, home_E = ctx.num_ranks, _homes(experts, ctx.num_ranks)
        order_LE = np.argsort(-weight_LE, axis=1, kind="stable")
        number_L = self._numbers(weight_LE, order_LE, ctx)
        rank_LE = np.empty((layers, experts), np.int64)  # how hot an expert is
        np.put_along_axis(rank_LE, order_LE, np.broadcast_to(np.arange(experts), (layers, experts)), axis=1)
        shadowed_LE = rank_LE < number_L[:, None]
        held_LGE = shadowed_LE[:, None, :] | (home_E == np.arange(ranks)[:, None])
        room = int(held_LGE.sum(axis=2).max(initial=-(-experts // ranks)))
        first_LGQ = np.argsort(~held_LGE, axis=2, kind="stable")[:, :, :room]
        table_LGQ = np.full((layers, ranks, room), EMPTY, np.int64)
        held_LGQ = np.take_along_axis(held_LGE, first_LGQ, axis=2)
        table_LGQ[:, :, : held_LGQ.shape[2]][held_LGQ] = first_LGQ[held_LGQ]
        return ctx.placement(table_LGQ.reshape(layers, ranks * room), experts)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Floats:
        """Modelled ns of each layer, [L]; a shadow is an expert with a replica on every rank."""
        weight_LE = self._rows(check_weights(weight_LE), ctx)
        shadowed_LE = placement.replica_count_LE >= ctx.num_ranks if ctx.num_ranks > 1 else weight_LE < 0
        alone_LE = np.where(shadowed_LE, 0.0, weight_LE)
        received_LG = placement.planned_load(alone_LE)
        computed_L = placement.planned_load(weight_LE).max(axis=1)
        return self._time_ns(computed_L, received_LG.max(axis=1), shadowed_LE.sum(axis=1), ctx)

    def _rows(self, weight_LE: Floats, ctx: PlacementContext) -> Floats:
        """Rows of each expert in a step."""
        tokens = self.tokens if ctx.costs is None else ctx.costs.tokens
        scaled_LE = weight_LE / np.maximum(weight_LE.max(axis=1, keepdims=True, initial=0.0), 1e-300)
        return np.asarray(scaled_LE * (tokens / np.maximum(scaled_LE.sum(axis=1, keepdims=True), 1e-300)))

    def _time_ns(self, computed_L: Floats, received_L: Floats, shadows: Floats | int, ctx: PlacementContext) -> Floats:
        costs = ctx.costs
        if costs is not None:
            wire = costs.near_bytes_per_ns if ctx.num_nodes == 1 else costs.far_bytes_per_ns
            shadow_ns = costs.expert_bytes / wire / self.steps
            return costs.row_ns * computed_L + costs.token_bytes / wire * received_L + shadow_ns * shadows
        wire = self.bandwidth_gbit_per_s / 8  # bytes a ns
        matrix = self.expansion * self.hidden_size**2
        row_ns = 3 * 4 * matrix / (self.tflop_per_s * 1e3)  # 3 comp: forward, and twice that backward
        sent_ns = 4 * 4 * self.hidden_size / wire  # 4 send: two exchanges each way
        return row_ns * computed_L + sent_ns * received_L + 8 * matrix / wire / self.steps * shadows

    def _numbers(self, weight_LE: Floats, order_LE: NDArray[np.int64], ctx: PlacementContext) -> NDArray[np.int64]:
        """Shadowed experts of each layer, [L]."""
        layers, experts = weight_LE.shape
        rows_LE, ranks = self._rows(weight_LE, ctx), ctx.num_ranks
        home_E, row_L = _homes(experts, ranks), np.arange(layers)
        received_LG = rows_LE @ (home_E[:, None] == np.arange(ranks)).astype(np.float64)
        spread_L = np.zeros(layers)
        number_L, open_L = np.zeros(layers, np.int64), np.ones(layers, bool)
        best_L = self._time_ns(received_LG.max(axis=1), received_LG.max(axis=1), 0, ctx)
        limit = experts if self.max_shadows is None else min(self.max_shadows, experts)
        for i in range(limit if ranks > 1 else 0):
            hot_L = order_LE[:, i]
            moved_L = rows_LE[row_L, hot_L]
            received_LG[row_L, home_E[hot_L]] -= moved_L
            spread_L += moved_L / ranks
            most_L = np.maximum(received_LG.max(axis=1), 0.0)
            now_L = self._time_ns(most_L + spread_L, most_L, i + 1, ctx)
            open_L &= now_L < best_L
            if not open_L.any():
                break
            number_L[open_L], best_L[open_L] = i + 1, now_L[open_L]
        return number_L


def _homes(experts: int, ranks: int) -> NDArray[np.int64]:
    """Rank of each expert in contiguous order; the first ones have one more where ranks do not divide experts."""
    low, more = divmod(experts, ranks)
    return np.repeat(np.arange(ranks), [low + (rank < more) for rank in range(ranks)])
