"""Placements over time: how long a map of 58 layers takes, and how even it is."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moesim.placement import Placement, PlacementContext
from moesim.placement.bound import balance_bound
from moesim.policy import load_policy
from moesim.rng import generator


class Maps:
    """256 experts, Zipf 1.0, 32 redundant ones."""

    params: ClassVar[tuple[list[str], list[int]]] = (["eplb", "eplb_swap", "lina"], [32, 64])
    param_names: ClassVar[list[str]] = ["kind", "ranks"]

    def setup(self, kind: str, ranks: int) -> None:
        if ranks == 64 and kind != "eplb_swap":
            raise NotImplementedError("ranks do not divide the slots")
        share_E = 1.0 / np.arange(1, 257)
        self.weight_LE = np.stack([generator(1, "maps", layer).permutation(share_E) for layer in range(58)])
        value = {"kind": kind, "num_redundant_experts": 32}
        self.policy = load_policy("placement", value | ({"uneven": True} if kind == "eplb_swap" else {}))

    def _place(self, ranks: int) -> Placement:
        placement: Placement = self.policy.place(self.weight_LE, PlacementContext(ranks))
        return placement

    def time_place(self, kind: str, ranks: int) -> None:
        self._place(ranks)

    def track_gap(self, kind: str, ranks: int) -> float:
        """Mean of max/mean rank load over its proven bound."""
        balance_L = self._place(ranks).balance(self.weight_LE)
        return float((balance_L / balance_bound(self.weight_LE, 288, ranks)).mean())
