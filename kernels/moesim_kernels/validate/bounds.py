"""What a validation must reach, by the kind of machine it ran on: the one place where these figures stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BOUNDS", "LEAST_SETTINGS", "LEVEL", "MAX_PSI", "REGRET", "SERVED", "Bounds", "kind_of"]

LEVEL = 0.9
"""of the predicted intervals"""
MAX_PSI = 50.0
"""percent of the time in which some task waited for a CPU (Linux PSI, avg10), above which wall times judge nothing"""
LEAST_SETTINGS = 40
"""held-out settings without which a bound on errors or on the ranking does not bind"""
REGRET = 0.02
"""of the tuner's pick, against the best measured"""
SERVED: Mapping[str, float] = {"tpot": 0.08, "makespan": 0.08, "ttft_p50": 0.15}
"""errors of a served run"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of |predicted / measured - 1| over settings: its median and 90th percentile (None: not asked for); tau: least
    Kendall tau-b between predicted and measured times, ties apart."""

    title: str
    median: float
    p90: float | None
    tau: float


BOUNDS: Mapping[str, Bounds] = {
    "cpu": Bounds("one process on a CPU", 0.05, 0.12, 0.95),
    "cpu_ranks": Bounds("several processes on a CPU, gloo between them", 0.15, None, 0.85),
    "cuda": Bounds("one GPU", 0.03, 0.08, 0.97),
}


def kind_of(device: str, ranks: int) -> str:
    """Key of `BOUNDS`. device: cpu or cuda."""
    return device if device == "cuda" or ranks == 1 else "cpu_ranks"
