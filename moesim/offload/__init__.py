"""Offload: which expert weights are where, and what is fetched when. Today: all of them in device memory."""

from __future__ import annotations

from typing import Protocol

from moesim.arrays import IntArray

__all__ = ["OffloadPolicy"]


class OffloadPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with this method."""

    def resident_slots(self, slots_per_rank: int, num_layers: int) -> IntArray:
        """How many of a rank's expert slots of each MoE layer stay in device memory: int64 [L]."""
        ...
