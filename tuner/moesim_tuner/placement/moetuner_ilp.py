"""MoETuner's two integer programmes (arXiv:2502.06643), solved by CP-SAT, each with a proven bound.

Stage 1, each layer by itself: x[e, c] = 1 where expert e is in cluster c; minimise sum_c |load_c - mean load|. Stage 2:
y[l, c, g] = 1 where cluster c of layer l is on rank g, one to one; minimise sum_l z_l with z_l >= tokens * price for
every pair of clusters that stands on different ranks. Where all links cost the same, stage 2 needs no solver
(`moesim.placement.moetuner`). Clusters are of equal size, see there.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import check_sizes, load_shares, placement_of, transitions
from moesim.placement.moetuner import (
    Policy as Heuristic,
)
from moesim.placement.moetuner import (
    cluster_flows,
    clusters,
    dearest,
    deviation,
    link_prices,
    to_ranks,
)
from moesim.spec import Spec
from moesim_tuner.placement.solution import (
    Part,
    Solution,
    cp_model,
    first_come,
    joint_status,
    part_of,
    run,
    values_of,
    whole,
)

__all__ = ["Policy"]

_MOST_ROWS = 400_000


class Policy(Spec):
    """far_cost, starts, uneven: as of `moetuner`. deterministic_time: the solver's, for each layer of stage 1 and for
    stage 2 (a unit took 1 to 9 seconds)."""

    uses_sample: ClassVar[bool] = True

    exact: ClassVar[bool] = True

    far_cost: Annotated[float, Field(gt=0, le=1e6)] | None = None
    starts: Annotated[int, Field(ge=0, le=1000)] = 16
    uneven: bool = True
    deterministic_time: Annotated[float, Field(gt=0, le=1e6)] = 5.0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`."""
        return self.solve(weight_LE, ctx).placement

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> FloatArray:
        """Stage 1's, which comes first, by layer: sum over ranks of |load / mean - 1|, [L]."""
        return Heuristic().objective(placement, weight_LE, ctx)

    def solve(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Solution:
        """The placement; objective and bound are stage 2's, for the clusters that stage 1 found.

        parts: the layers of stage 1, then stage 2. Raises BadInput without OR-Tools.
        """
        weight_LE = check_weights(weight_LE)
        check_sizes(weight_LE.shape[1], ctx, self.uneven)
        share_LE, ranks = load_shares(weight_LE), ctx.num_ranks
        cluster_LE = clusters(share_LE, ranks)
        parts: list[Part] = []
        for layer in range(len(share_LE)):
            cluster_LE[layer], part = self._balance(f"layer {layer}", share_LE[layer], cluster_LE[layer], ranks)
            parts.append(part)
        flow_LCC = cluster_flows(transitions(weight_LE, ctx), cluster_LE, ranks)
        price_GG = link_prices(ctx, self.far_cost)
        rank_LC = to_ranks(flow_LCC, price_GG, len(share_LE), self.starts)
        rank_LC, part = self._spread(flow_LCC, price_GG, rank_LC)
        parts.append(part)
        placement = placement_of(np.take_along_axis(rank_LC, cluster_LE, axis=1), ctx)
        return Solution(placement, part.objective, part.bound, joint_status(parts), tuple(parts))

    def _balance(self, name: str, share_E: FloatArray, hint_E: IntArray, bins: int) -> tuple[IntArray, Part]:
        """Stage 1 of a layer. The load is counted in whole units, so that nothing but their rounding is inexact."""
        value = float(deviation(share_E[None], hint_E[None], bins)[0])
        if value <= 1e-12 or bins == 1:
            return hint_E, part_of(name, value, value)
        load_E, scale = whole(share_E)
        model = cp_model().CpModel()
        x_EC = _one_bin_each(model, len(load_E), bins, first_come(hint_E[None])[0])
        total = int(load_E.sum())
        off_C = [model.new_int_var(0, bins * total, "") for _ in range(bins)]
        start_C = np.bincount(first_come(hint_E[None])[0], weights=load_E, minlength=bins)
        for bin_, off in enumerate(off_C):
            over = bins * sum(int(w) * x for w, x in zip(load_E, x_EC[:, bin_], strict=True)) - total
            model.add(off >= over)
            model.add(off >= -over)
            model.add_hint(off, abs(int(bins * start_C[bin_]) - total))
        model.minimize(sum(off_C))
        solver, bound = run(model, self.deterministic_time, 0)
        if solver is not None:
            found = values_of(solver, x_EC).argmax(axis=1)
            if (now := float(deviation(share_E[None], found[None], bins)[0])) < value:
                hint_E, value = found, now
        # each of a cluster's experts may be off by half a unit, and the mean by as much
        return hint_E, part_of(name, value, (bound - bins * len(load_E)) / scale)

    def _spread(self, flow_LCC: FloatArray, price_GG: FloatArray, hint_LC: IntArray) -> tuple[IntArray, Part]:
        """Stage 2 of all layers."""
        name, bins = "stage 2", len(price_GG)
        value = dearest(flow_LCC, hint_LC, price_GG)
        away = price_GG[~np.eye(bins, dtype=bool)]
        if bins == 1 or not len(flow_LCC) or (away == away[0]).all():
            return hint_LC, part_of(name, value, value)
        # no layer can do better than with all links as cheap as the cheapest
        cheap = float(away.min()) * (1.0 - np.eye(bins))
        least_L = [dearest(flow[None], to_ranks(flow[None], cheap, 2, 0), cheap) for flow in flow_LCC]
        cost = flow_LCC[:, :, None, :, None] * price_GG[None, None, :, None, :]
        count = int((cost > np.array(least_L)[:, None, None, None, None]).sum())
        if count > _MOST_ROWS:
            return hint_LC, part_of(name, value, float(sum(least_L)), "too_large")
        coefficient, scale = whole(cost)
        model = cp_model().CpModel()
        y_LCG = np.stack([_one_bin_each(model, bins, bins, row, alike=False) for row in hint_LC])
        z_L = []
        for layer, cost_CGCG in enumerate(coefficient):
            floor = int(least_L[layer] * scale)
            z = model.new_int_var(max(0, floor - 1), int(cost_CGCG.max()), "")
            for c, g, d, h in np.argwhere(cost_CGCG > floor - 1).tolist():
                both = y_LCG[layer, c, g] + y_LCG[layer + 1, d, h] - 1
                model.add(z >= int(cost_CGCG[c, g, d, h]) * both)
            own = np.ix_(hint_LC[layer], hint_LC[layer + 1])
            model.add_hint(z, max(floor - 1, int(np.rint((flow_LCC[layer] * price_GG[own] * scale).max()))))
            z_L.append(z)
        model.minimize(sum(z_L))
        solver, bound = run(model, self.deterministic_time, 0)
        if solver is not None:
            found = values_of(solver, y_LCG).argmax(axis=2)
            if (now := dearest(flow_LCC, found, price_GG)) < value:
                hint_LC, value = found, now
        return hint_LC, part_of(name, value, max((bound - 0.5 * len(z_L)) / scale, float(sum(least_L))))


def _one_bin_each(model: Any, items: int, bins: int, hint_E: IntArray, alike: bool = True) -> AnyArray:
    """Variables [items, bins]: every item in one bin, equally many in each (one more in some), the hint given; bins
    that are alike numbered as the items come to them."""
    x = np.empty((items, bins), object)
    for at in np.ndindex(x.shape):
        x[at] = model.new_bool_var("")
        model.add_hint(x[at], int(hint_E[at[0]] == at[1]))
    size, more = divmod(items, bins)
    for item in range(items):
        model.add_exactly_one(list(x[item]))
    for bin_ in range(bins):
        model.add_linear_constraint(sum(x[:, bin_]), size, size + (more > 0))
        for item in range(items if alike and bin_ else 0):
            model.add(x[item, bin_] <= sum(x[:item, bin_ - 1]))
    return x
