"""ExFlow's integer programme (arXiv:2401.08383), solved by CP-SAT, with a proven bound.

x[l, e, p] = 1 where expert e of layer l stands in place p, equally many in each; r[l, e, e'] = 1 where e and e' stand
apart; minimise the sum of r, each times the tokens that go from e to e'. Tokens that take the same way are one term.
Nodes first, then the ranks of every node, as in the paper, or both at once. Ours: no expert stands with more experts of
the next layer than a place holds, which the paper's rows imply but their relaxation does not (its bound is 0).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import (
    FAR_COST,
    NEAR_COST,
    alternate,
    check_sizes,
    contiguous_ranks,
    crossing_cost,
    distance,
    load_shares,
    placement_of,
    rank_of,
    transitions,
)
from moesim.placement.exflow import Policy as Heuristic
from moesim.placement.exflow import inside, staged
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
"""constraints of a model; above, the heuristic's answer stands without the solver"""


class Policy(Spec):
    """stages, uneven: as of `exflow`. deterministic_time: the solver's, for each programme (a unit took 1 to 9
    seconds). starts: of the heuristic that gives the hint. Optimal where it says so, for one node or both stages
    together."""

    uses_sample: ClassVar[bool] = True

    exact: ClassVar[bool] = True

    stages: Literal["nodes_first", "together"] = "nodes_first"
    deterministic_time: Annotated[float, Field(gt=0, le=1e6)] = 5.0
    starts: Annotated[int, Field(ge=0, le=1000)] = 16
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`."""
        return self.solve(weight_LE, ctx).placement

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """Mean cost of a transition: 0 on a rank, 1 on a node, 2 beyond."""
        return Heuristic().objective(placement, weight_LE, ctx)

    def solve(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Solution:
        """The placement, its cost as of `objective`, and the bound: of the staged programme where there are stages,
        each for what the one before decided. Raises BadInput without OR-Tools."""
        weight_LE = check_weights(weight_LE)
        share_LEE, load_LE = transitions(weight_LE, ctx), load_shares(weight_LE)
        layers, experts = weight_LE.shape
        check_sizes(experts, ctx, self.uneven)
        if not layers or self.stages == "together" or not staged(experts, ctx):
            cost_GG = distance(ctx)
            plain = contiguous_ranks(layers, experts, ctx.num_ranks)
            found = alternate(share_LEE, load_LE, cost_GG, 0.0, self.starts)
            hint = min((found, plain), key=lambda rank_LE: crossing_cost(share_LEE, rank_LE, cost_GG))
            rank_LE, part = self._minimise("ranks", share_LEE, cost_GG, ctx.rank_to_node, hint)
            return _solution(rank_LE, [part], share_LEE, ctx)
        nodes = ctx.rank_to_node[-1] + 1
        each = ctx.num_ranks // nodes
        apart = (FAR_COST * (1.0 - np.eye(nodes)), NEAR_COST * (1.0 - np.eye(each)))
        hint = alternate(share_LEE, load_LE, apart[0], 0.0, self.starts)
        node_LE, part = self._minimise("nodes", share_LEE, apart[0], (0,) * nodes, hint)
        parts, rank_LE = [part], np.empty_like(node_LE)
        for node in range(nodes):
            mine_LM, sub_LMM = inside(share_LEE, node_LE, node)
            load_LM = np.take_along_axis(load_LE, mine_LM, axis=1)
            hint = alternate(sub_LMM, load_LM, apart[1], 0.0, self.starts, 1 + node)
            found, part = self._minimise(f"ranks of node {node}", sub_LMM, apart[1], (0,) * each, hint)
            np.put_along_axis(rank_LE, mine_LM, found + node * each, axis=1)
            parts.append(part)
        return _solution(rank_LE, parts, share_LEE, ctx)

    def _minimise(
        self, name: str, share_LEE: FloatArray, cost_GG: FloatArray, node_G: tuple[int, ...], hint_LE: IntArray
    ) -> tuple[IntArray, Part]:
        """One programme: the better of the hint and what the solver finds, with the bound."""
        value = crossing_cost(share_LEE, hint_LE, cost_GG)
        least = _least(share_LEE, cost_GG, node_G)
        rows = int((share_LEE > 0).sum()) * len(cost_GG)
        if value <= least + 1e-12:
            return hint_LE, part_of(name, value, least)
        if rows > _MOST_ROWS:
            return hint_LE, part_of(name, value, least, "too_large")
        program = _Program(share_LEE, cost_GG, node_G, hint_LE)
        solver, bound = run(program.model, self.deterministic_time, 0)
        bound = max(least, (bound - program.rounding) / program.scale)
        if solver is not None:
            found = values_of(solver, program.x_LEG).argmax(axis=2)
            if crossing_cost(share_LEE, found, cost_GG) < value:
                hint_LE, value = found, crossing_cost(share_LEE, found, cost_GG)
        return hint_LE, part_of(name, value, bound)


def _least(share_LEE: FloatArray, cost_GG: FloatArray, node_G: tuple[int, ...]) -> float:
    """A bound without the solver: each expert stands with the next layer's experts that it shares most tokens with, as
    many as a place holds; and the other way round."""
    bins, experts = len(cost_GG), share_LEE.shape[1]
    away = cost_GG[~np.eye(bins, dtype=bool)]
    near, far = float(away.min(initial=np.inf)), float(cost_GG.max())
    nodes = np.bincount(np.array(node_G))
    room = -(-experts // bins)
    total = 0.0
    for price, most in ((near, room), (far - near, room * int(nodes.max()))):
        if bins == 1 or not price or not len(share_LEE):
            continue
        for share_EE in share_LEE:
            kept = min(float(np.sort(m, axis=1)[:, -min(most, experts) :].sum()) for m in (share_EE, share_EE.T))
            total += price * max(0.0, float(share_EE.sum()) - kept)
    return total


class _Program:
    """The integer programme over bins whose distance is one cost within a node and another beyond."""

    def __init__(self, share_LEE: FloatArray, cost_GG: FloatArray, node_G: tuple[int, ...], hint_LE: IntArray) -> None:
        self.model: Any = cp_model().CpModel()
        layers, experts = hint_LE.shape
        bins = len(cost_GG)
        alike = len(set(node_G)) == 1
        hint_LE = first_come(hint_LE, alike)
        self.x_LEG: AnyArray = np.empty((layers, experts, bins), object)
        size, more = divmod(experts, bins)
        for at in np.ndindex(self.x_LEG.shape):
            self.x_LEG[at] = self.model.new_bool_var("")
            self.model.add_hint(self.x_LEG[at], int(hint_LE[at[:2]] == at[2]))
        for layer in range(layers):
            for expert in range(experts):
                self.model.add_exactly_one(list(self.x_LEG[layer, expert]))
            for rank in range(bins):
                count = sum(self.x_LEG[layer, :, rank])
                self.model.add_linear_constraint(count, size, size + (more > 0))
        if alike:  # bins that are alike are numbered as the experts of the first layer come to them
            for expert in range(experts):
                for rank in range(1, bins):
                    self.model.add(self.x_LEG[0, expert, rank] <= sum(self.x_LEG[0, :expert, rank - 1]))
        near = float(cost_GG[~np.eye(bins, dtype=bool)].min(initial=np.inf))
        far = float(cost_GG.max())
        coefficient, self.scale = whole(np.stack([share_LEE * near, share_LEE * (far - near)]))
        room = -(-experts // bins)
        terms = self._apart(coefficient[0], self.x_LEG, hint_LE, room)
        if far > near:
            node = np.array(node_G)
            y_LEN = np.empty((layers, experts, node.max() + 1), object)
            for at in np.ndindex(y_LEN.shape):
                y_LEN[at] = sum(self.x_LEG[at[0], at[1], node == at[2]])
            terms += self._apart(coefficient[1], y_LEN, node[hint_LE], room * int(np.bincount(node).max()))
        self.rounding = 0.5 * len(terms)
        self.model.minimize(sum(terms))

    def _apart(self, coefficient_LEE: IntArray, x_LEG: AnyArray, hint_LE: IntArray, room: int) -> list[Any]:
        """r >= x[l, e, p] - x[l + 1, e', p] for every place p, times what it costs; at most `room` of an expert's r are
        0."""
        terms = []
        by_row: dict[tuple[int, int, int], list[Any]] = {}
        for layer, here, there in np.argwhere(coefficient_LEE > 0).tolist():
            apart = self.model.new_bool_var("")
            self.model.add_hint(apart, int(hint_LE[layer, here] != hint_LE[layer + 1, there]))
            for place in range(x_LEG.shape[2]):
                self.model.add(apart >= x_LEG[layer, here, place] - x_LEG[layer + 1, there, place])
            terms.append(apart * int(coefficient_LEE[layer, here, there]))
            by_row.setdefault((layer, 0, here), []).append(apart)
            by_row.setdefault((layer, 1, there), []).append(apart)
        for row in by_row.values():
            if len(row) > room:
                self.model.add(sum(row) >= len(row) - room)
        return terms


def _solution(rank_LE: IntArray, parts: list[Part], share_LEE: FloatArray, ctx: PlacementContext) -> Solution:
    placement = placement_of(rank_LE, ctx)
    value = crossing_cost(share_LEE, rank_of(placement), distance(ctx))
    bound = min(value, sum(part.bound for part in parts))
    status = joint_status(parts)
    return Solution(placement, value, value if status == "optimal" else bound, status, tuple(parts))
