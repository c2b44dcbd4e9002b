"""What a placement is worth on recorded traffic: how even its planned loads are, a bound, and its policy's own aim.

Scores are of planned loads: an expert's load is shared evenly by its replicas. `of_steps` is the mean over rows (steps)
and layers of largest over mean rank load, `of_total` the same of the loads of all rows together; `lockstep` is the sum
over layers and rows of the largest rank load over that of the mean (what ranks wait for that meet in every layer).
`crossings`, where whole tokens are known: the share of (expert, expert of the next layer) pairs of a token that lie on
two ranks, an expert being where its first replica is; what placements by affinity minimise.

Legend as in `moesim.placement`; S rows of a recording.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from moesim.cost.placing import token_sample
from moesim.placement import Placement, PlacementContext, PlacementPolicy
from moesim.placement.bound import balance_bound
from moesim.placement.crossings import contiguous_ranks, crossing_cost, placement_of, rank_of, transitions
from moesim.placement.eplb import is_hierarchical
from moesim.workload.loads import ExpertLoads

__all__ = ["Aim", "Score", "Solution", "aim", "by_groups", "gap", "place_by", "score", "total_bound"]

_CELLS = 1 << 24
"""(row, layer, slot) scored at once"""


@dataclass(frozen=True)
class Score:
    """Of one placement on one traffic; see the head of this module. worst: the highest `of_total`, in `worst_layer`."""

    of_steps: float
    of_total: float
    lockstep: float
    worst: float
    worst_layer: int
    crossings: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """Rounded to six digits."""
        return {
            "of_steps": round(self.of_steps, 6),
            "of_total": round(self.of_total, 6),
            "lockstep": round(self.lockstep, 6),
            "worst_layer_of_total": round(self.worst, 6),
            "worst_layer": self.worst_layer,
            "crossings": None if self.crossings is None else round(self.crossings, 6),
        }


class Solution(Protocol):
    """What a policy with a solver returns from `solve`: its placement and what is proven of it (as of moesim_tuner)."""

    @property
    def placement(self) -> Placement:
        """The placement that `place` would return."""

    @property
    def objective(self) -> float:
        """Less is better."""

    @property
    def bound(self) -> float:
        """No placement that the policy chooses from has less."""

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""

    @property
    def status(self) -> str:
        """optimal, feasible or too_large."""


@dataclass(frozen=True)
class Aim:
    """The policy's own objective, less is better, on the rows that were fitted to: of its placement, and of experts in
    order without replicas. bound: proven for it, None: none is known."""

    value: float
    in_order: float
    bound: float | None

    def to_json(self) -> dict[str, float | None]:
        """Rounded to six digits."""
        bound = None if self.bound is None else round(self.bound, 6)
        return {"value": round(self.value, 6), "in_order": round(self.in_order, 6), "bound": bound}

    def __str__(self) -> str:
        told = "no bound known" if self.bound is None else f"proven bound {self.bound:.6g}"
        text = f"{self.value:.6g}, of experts in order without replicas {self.in_order:.6g}; {told}"
        return text if self.bound is None else f"{text}, gap {gap(self.value, self.bound):.2%}"


# ------------------------------------------------------------------------------------------------------------ scores


def score(placement: Placement, loads: ExpertLoads) -> Score:
    """How evenly `placement` spreads the traffic of `loads` over ranks."""
    step = max(1, _CELLS // max(1, placement.num_layers * placement.num_slots))
    sums_SL, of_SL = np.zeros((loads.num_rows, placement.num_layers)), np.ones((loads.num_rows, placement.num_layers))
    top_SL = np.zeros_like(sums_SL)
    for at in range(0, loads.num_rows, step):
        load_SLG = placement.planned_load(loads.count_SLE[at : at + step])
        mean_SL, most_SL = load_SLG.mean(axis=2), load_SLG.max(axis=2)
        np.divide(most_SL, mean_SL, out=of_SL[at : at + step], where=mean_SL > 0)
        sums_SL[at : at + step], top_SL[at : at + step] = mean_SL, most_SL
    balance_L = placement.balance(loads.total_LE)
    worst = int(balance_L.argmax())
    index = loads.layer_index or tuple(range(loads.num_layers))
    return Score(
        of_steps=float(of_SL[sums_SL > 0].mean()),
        of_total=float(balance_L.mean()),
        lockstep=float(top_SL.sum() / sums_SL.sum()),
        worst=float(balance_L[worst]),
        worst_layer=index[worst],
        crossings=_crossings(placement, loads),
    )


def _crossings(placement: Placement, loads: ExpertLoads) -> float | None:
    """Share of a token's steps from expert to expert that leave a rank; None without tokens or with one layer."""
    if loads.tokens is None or loads.num_layers < 2:
        return None
    ranks = placement.num_ranks
    share_LEE = transitions(loads.total_LE, PlacementContext(ranks, sample=token_sample(loads.tokens)))
    return crossing_cost(share_LEE, rank_of(placement), 1 - np.eye(ranks))


# ------------------------------------------------------------------------------------------------- bounds, objectives


def gap(value: float, bound: float) -> float:
    """How far a figure lies above its bound, as a share of the figure."""
    return max(0.0, (value - bound) / value) if value > 0 else 0.0


def by_groups(policy: PlacementPolicy, experts: int, slots: int, ctx: PlacementContext) -> bool:
    """Whether the policy has EPLB's modes, and the one told keeps every expert group on a node here."""
    mode = getattr(policy, "mode", None)
    return mode in ("auto", "hierarchical", "global") and is_hierarchical(mode, experts, slots, ctx)


def total_bound(placement: Placement, loads: ExpertLoads, ctx: PlacementContext, grouped: bool) -> float:
    """Mean over layers of the least largest over mean rank load on the sum of the rows: no map with as many slots does
    better; `grouped`: none of those that keep every expert group on a node."""
    filled = int(placement.held_LS.sum(axis=1).max(initial=0))
    groups, nodes = (ctx.num_groups, ctx.num_nodes) if grouped else (1, 1)
    return float(balance_bound(loads.total_LE, filled, placement.num_ranks, groups, nodes).mean())


def aim(
    policy: PlacementPolicy, placement: Placement, loads: ExpertLoads, ctx: PlacementContext, solution: Solution | None
) -> Aim | None:
    """None for a policy that states no `objective`. Objectives by layer count as their mean.

    The bound is the solver's where its objective is this one, or the value itself where an exact method reached it.
    """
    objective = getattr(policy, "objective", None)
    if objective is None:
        return None
    plain = placement_of(contiguous_ranks(loads.num_layers, loads.num_experts, ctx.num_ranks), ctx)
    value, in_order = (float(np.mean(objective(p, loads.total_LE, ctx))) for p in (placement, plain))
    bound = None
    if solution is None:
        bound = value if getattr(policy, "exact", False) else None
    elif np.isclose(solution.objective, value, rtol=1e-6, atol=1e-12):
        bound = min(solution.bound, value)
    return Aim(value, in_order, bound)


def place_by(policy: PlacementPolicy, loads: ExpertLoads, ctx: PlacementContext) -> tuple[Placement, Solution | None]:
    """The policy's map for these loads, and what its solver says of it, if it has one; the policy is asked once."""
    solve = getattr(policy, "solve", None)
    if solve is None:
        return policy.place(loads.total_LE, ctx), None
    solution = cast(Solution, solve(loads.total_LE, ctx))
    return solution.placement, solution
