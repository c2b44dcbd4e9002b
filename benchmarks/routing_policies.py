"""Routers and capacity: one layer of 8,192 tokens and 64 experts, K = 8, in NumPy alone and compiled."""

from __future__ import annotations

import importlib.util
import os

import numpy as np

from moesim.policy import load_policy, policy_kinds
from moesim.routing import RoutingContext, top_ids
from moesim.routing.capacity import CapacitySpec, capacity_of, limit

TOKENS, EXPERTS, TOP_K = 8192, 64, 8


def _scores() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (TOKENS, EXPERTS)) + 0.5 * rng.normal(0, 1, EXPERTS)).astype(np.float32)


class Route:
    """One call of a router, in training, without a state."""

    params = (policy_kinds("routing"), ["numpy", "compiled"])
    param_names = ("router", "mode")

    def setup(self, kind: str, mode: str) -> None:
        if mode == "compiled" and importlib.util.find_spec("numba") is None:
            raise NotImplementedError
        os.environ["MOESIM_COMPILED"] = "0" if mode == "numpy" else "1"
        token = np.arange(TOKENS)
        self.score, self.policy = _scores(), load_policy("routing", kind)
        self.context = RoutingContext(
            TOP_K, num_groups=8, top_groups=4, training=True, progress=0.5, token_T=token, sequence_T=token // 512,
            position_T=token % 512, class_T=token // 512 % 2,
        )  # fmt: skip
        self.policy.route(self.score, self.context)

    def time_route(self, kind: str, mode: str) -> None:
        self.policy.route(self.score, self.context)


class Limit:
    """Holding an assignment to a capacity of 1.25 times the even share."""

    params = (["position", "score", "reroute"], ["choice", "token"])
    param_names = ("drop", "order")

    def setup(self, drop: str, order: str) -> None:
        self.score = _scores()
        self.expert = top_ids(self.score, TOP_K)
        self.gate = np.take_along_axis(self.score, self.expert.astype(np.int64), 1) + 9
        self.spec = CapacitySpec.model_validate({"factor": 1.25, "drop": drop, "order": order})
        self.capacity = capacity_of(TOKENS, TOP_K, EXPERTS, 1.25)

    def time_limit(self, drop: str, order: str) -> None:
        limit(self.expert, self.gate, self.score, self.capacity, self.spec)

    def track_dropped_share(self, drop: str, order: str) -> float:
        limited = limit(self.expert, self.gate, self.score, self.capacity, self.spec)
        return limited.dropped / limited.wanted

    track_dropped_share.unit = "of the choices"  # type: ignore[attr-defined]
