"""Batching: which tokens a data-parallel rank computes in its next step.

A policy is asked once a step, and only while the rank has prompts to compute or requests waiting. It looks at a
`RankView` and returns wishes in order; the engine grants them while blocks last (preempting the latest request when
a running one finds none) and never asks for a decode-only step, which repeats until something finishes or arrives.
For that to be exact a policy must obey one rule: **if it wishes for nothing now, it wishes for nothing while the
same requests decode and no request arrives, finishes or is preempted** (tests/conformance/test_batching.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["BatchingPolicy", "Plan", "Prompt", "RankView", "Wish"]


class Prompt(Protocol):
    """A request whose prompt (or, after a preemption, prompt and output so far) is not fully computed."""

    computed: int
    """tokens already in the KV cache"""
    target: int
    """tokens to compute before the next output token"""
    output: int
    """output tokens asked for"""
    generated: int
    """output tokens so far"""


class RankView(Protocol):
    """What a batching policy may look at. All are counts."""

    decoding: int
    """requests that produce one token a step"""
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def running(self) -> int:
        """Requests admitted, decoding or not."""
        ...

    @property
    def prefilling(self) -> Sequence[Prompt]: ...

    @property
    def waiting(self) -> Iterable[Prompt]: ...

    @property
    def free_tokens(self) -> int:
        """Tokens that the KV cache can still take, block rounding aside; never grows while requests decode."""
        ...

    def remaining_output(self) -> int:
        """Output tokens still to come from all running requests."""
        ...


class Wish(NamedTuple):
    """Compute `tokens` more of `prompt`; `admit` when it comes from the waiting queue."""

    prompt: Prompt
    tokens: int
    admit: bool


class Plan(NamedTuple):
    """Wishes in order, and whether the decoding requests take part in this step."""

    wishes: tuple[Wish, ...]
    decode: bool


NOTHING = Plan((), True)


class BatchingPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with this method."""

    def plan(self, view: RankView) -> Plan: ...
