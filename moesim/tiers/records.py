"""What a device of the simulator did, step by step: ns by part, bytes by link and reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.arrays import IntArray
from moesim.tiers.links import LANES, REASONS

__all__ = ["PARTS", "Records"]

PARTS = ("own", "experts", "cpu", "sync", "stall", "meet", "join", "end")
"""own: attention, router and the rest of a layer. experts: one grouped product over all of the layer's experts on the
device, as if every one were there. cpu: what experts on the CPU add to that. sync: what handing over to the CPU and
back adds. stall: what the layer takes beyond these: waiting for weights, and computing them in several products.
meet: waiting for the other ranks. join, end: see `moesim.tiers.LayerTimes`. They add up to the step exactly."""


@dataclass(slots=True)
class Records:
    """S steps, P parts (`PARTS`), X lanes of the device (`links.LANES`), R reasons (`links.REASONS`)."""

    start_ns: list[int] = field(default_factory=list)
    step_ns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    part_ns: list[list[int]] = field(default_factory=list)
    moved: list[IntArray] = field(default_factory=list)
    busy: list[IntArray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step_ns)

    def start_ns_S(self) -> IntArray:
        """When each step started, int64 [S]."""
        return np.array(self.start_ns, np.int64)

    def step_ns_S(self) -> IntArray:
        """How long each step took, int64 [S]."""
        return np.array(self.step_ns, np.int64)

    def tokens_S(self) -> IntArray:
        """Tokens of each step, int64 [S]."""
        return np.array(self.tokens, np.int64)

    def part_ns_SP(self) -> IntArray:
        """ns of each step by part, int64 [S, P]."""
        return np.array(self.part_ns, np.int64).reshape(-1, len(PARTS))

    def part_ns_S(self, part: str) -> IntArray:
        """One part of `PARTS`, int64 [S]."""
        return self.part_ns_SP()[:, PARTS.index(part)]

    def moved_bytes_SXR(self) -> IntArray:
        """Bytes that got through while a step ran, or between it and the one before, int64 [S, X, R]."""
        return np.array(self.moved, np.int64).reshape(-1, len(LANES), len(REASONS))

    def busy_ns_SX(self) -> IntArray:
        """ns each lane was busy in that time, int64 [S, X]."""
        return np.array(self.busy, np.int64).reshape(-1, len(LANES))
