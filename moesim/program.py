"""The step program: which operations one forward pass runs on a rank, in which order, and where ranks meet.

A program is data. Operations between two meetings (`Stage`) add up on each rank; a meeting is a collective of the
expert-parallel group, which starts when the last rank gets there. `fold` groups equal stages so that a step is priced
from a handful of them; `play` is the reference that walks every layer, and a test holds the two against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.arrays import IntArray
from moesim.model import MoEModel

__all__ = ["Stage", "fold", "play", "stages"]


@dataclass(frozen=True, slots=True, order=True)
class Stage:
    """What a rank runs between two meetings, as counts of layer parts.

    `full`, `window`: attention blocks by kind. `dense`: dense feed-forward blocks. `moe`: MoE blocks' own part on the
    rank (norm, router, shared expert). `first`, `last`: the embedding and the final norm run here. `again`: further
    passes of a layer through its experts (norm, router).
    """

    full: int
    window: int
    dense: int
    moe: int
    first: bool
    last: bool
    again: int = 0

    @property
    def attention(self) -> int:
        """Attention blocks of either kind."""
        return self.full + self.window


def stages(model: MoEModel, meet: bool) -> list[Stage]:
    """The stages of one pass in order. `meet`: ranks meet at every MoE layer (attention data parallelism)."""
    out: list[Stage] = []
    full = window = dense = moe = again = 0
    first = True
    moe_layers = set(model.moe_layers)
    for layer in range(model.num_layers):
        if model.attention_kind_of_layer[layer] == "full":
            full += 1
        else:
            window += 1
        if layer not in moe_layers:
            dense += 1
            continue
        moe += 1
        if meet:
            out.append(Stage(full, window, dense, moe, first, False))
            out += [Stage(0, 0, 0, 0, False, False, 1)] * (model.moe_iterations - 1)
            full = window = dense = moe = 0
            first = False
        else:
            again += model.moe_iterations - 1
    out.append(Stage(full, window, dense, moe, first, True, again))
    return out


def fold(program: list[Stage]) -> list[tuple[int, Stage]]:
    """Equal stages once each, with how often they occur. Order does not matter: every stage ends in a meeting."""
    return [(times, stage) for stage, times in Counter(program).items()]


def play(
    program: list[Stage],
    stage_ns: Callable[[Stage], IntArray],
    meeting_ns: Callable[[int], tuple[int, IntArray, int]],
) -> tuple[IntArray, IntArray]:
    """Walk one step stage by stage.

    `stage_ns(stage)` gives each rank's time [G]; `meeting_ns(l)` the l-th MoE layer's (dispatch, expert time [G],
    combine). Returns (end [G], idle [L + 1, G]): when each rank ends, and how long it waited in each stage and layer.
    A collective starts when its last member is ready: the maximum over ranks of sums, not the sum of maxima.
    """
    ready = np.zeros_like(stage_ns(program[0]))
    idle = []
    for index, stage in enumerate(program):
        ready = ready + stage_ns(stage)
        waited = ready.max() - ready
        if index < len(program) - 1:
            dispatch, expert_G, combine = meeting_ns(index)
            waited = waited + (expert_G.max() - expert_G)
            ready = np.full_like(ready, ready.max() + dispatch + expert_G.max() + combine)
        idle.append(waited)
    return ready, np.stack(idle)
