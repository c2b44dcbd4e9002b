"""Balancing: which target (data-parallel rank, or replica of the whole deployment) takes a request.

A policy is a pure function of what it is shown; ties go to the lowest index.

Legend: D targets.
"""

from __future__ import annotations

from typing import Protocol

from moesim.arrays import FloatArray, IntArray

__all__ = ["BalancingPolicy", "NearPolicy", "hash_64"]

_MASK_64 = (1 << 64) - 1


class BalancingPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with this method."""

    def pick(self, load_D: IntArray, request: int, session: int, count: int) -> int:
        """The target in [0, D) for a request.

        load_D: int64 [D], waiting * 4 + running requests of each target. request: its number in the stream.
        session: its session, -1 for none. count: requests this balancer has placed before this one.
        """
        ...


class NearPolicy(BalancingPolicy, Protocol):
    """A policy with `uses_affinity = True` is also told where a request's experts are, and then asked this instead."""

    @property
    def predict(self) -> str:
        """How that is known: see `moesim.cost.locality.nearness`."""
        ...

    def pick_near(self, load_D: IntArray, near_D: FloatArray) -> int:
        """The target in [0, D). near_D: [D], expected share of the request's activations that each target holds."""
        ...


def hash_64(value: int) -> int:
    """64 well-mixed bits of an integer: SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA'14)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
