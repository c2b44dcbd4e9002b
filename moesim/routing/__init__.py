"""Routing: which experts each token takes, and with what gate weights.

A policy is a pure function from scores [T, E] (the router's logits), what a context tells about the tokens, and the
state it was handed, to an assignment and a new state; it knows no clock and no file. Draws are keyed by (seed, step,
layer), so a policy gives the same answer in any order of calls. A token may take fewer experts than its row has
places: the places left hold `NONE` and a gate of 0. Papers that differ in parameters are rows of `presets.yaml`.

Legend: T tokens, L MoE layers, E experts, K experts a token, W places a token has in an assignment (K unless the
policy says otherwise), C the most tokens an expert takes (its capacity), D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.routing.select import NONE, sigmoid, softmax, top_ids
from moesim.spec import Spec
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups

__all__ = [
    "NONE", "Arrays", "Routed", "Router", "RoutingContext", "sigmoid", "softmax", "top_ids",
]  # fmt: skip

Floats = NDArray[Any]
"""float32 or float64"""
Arrays = Mapping[str, NDArray[Any]]
_NOTHING: Arrays = MappingProxyType({})


def _nothing() -> Arrays:
    return _NOTHING


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What a router knows besides the scores: fields of the model, the key of its draws, and facts about the tokens.

    `state`: what it returned for this layer in the step before (empty at first). `carry`: what it returned for the
    layer below in this step (empty in the first). Arrays over tokens are None where nobody knows them.
    """

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    bias_E: Floats | None = None
    """added to the scores for choosing, not for the gates (DeepSeek-V3's balancing bias)"""
    seed: int = 0
    step: int = 0
    layer: int = 0
    num_layers: int = 1
    """L: for schedules over depth; `layer` counts MoE layers from 0"""
    training: bool = False
    progress: float = 1.0
    """share of the training run (or of the denoising steps of a diffusion model) that is done, 0 .. 1"""
    token_T: NDArray[np.int64] | None = None
    """vocabulary ids"""
    sequence_T: NDArray[np.int64] | None = None
    """number of each token's sequence; tokens of one sequence stand together, in order"""
    position_T: NDArray[np.int64] | None = None
    """place in its sequence, from 0"""
    class_T: NDArray[np.int64] | None = None
    """modality, language or domain"""
    feature_TD: Floats | None = None
    """hidden states; where there are none, a policy that needs them takes the scores' rows in their place"""
    state: Arrays = field(default_factory=_nothing)
    carry: Arrays = field(default_factory=_nothing)

    def generator(self, component: str) -> np.random.Generator:
        """Draws of `component` for this seed, step and layer."""
        return generator(self.seed, component, self.step, self.layer)


@dataclass(frozen=True, slots=True)
class Routed:
    """`expert_TK`: int32 ids [T, W], most wanted first where the policy ranks, `NONE` in the last places of a token
    that takes fewer; `gate_TK`: float weights of their outputs, 0 at NONE, of the scores' dtype. `state`, `carry`: for
    the next step of this layer and for the next layer of this step.
    """

    expert_TK: NDArray[np.int32]
    gate_TK: Floats
    state: Arrays = field(default_factory=_nothing)
    carry: Arrays = field(default_factory=_nothing)


class Router(Spec):
    """A mechanism, one file: `class Policy(Router)`. Its fields are its YAML parameters; it writes `route`, and what
    else differs from here. The class variables are promises that tests/conformance/test_routing.py holds it to.
    """

    from_scores: ClassVar[bool] = True
    """a simulation runs `route` on scores; else the pool's own ids stand for what it would do, or `draw` makes them"""
    replaces_ids: ClassVar[bool] = True
    """takes the place of a trace's recorded ids (else they stand for what the policy would do)"""
    ideal: ClassVar[bool] = False
    """loads count as equal in every step"""
    normalised: ClassVar[bool] = False
    """gates add up to 1 for every token that takes an expert, whatever the context says; where it is False they do
    when `context.norm_topk_prob` is True (times `scaling_factor` where there is one), unless `free_gates`"""
    free_gates: ClassVar[bool] = False
    """gates are finite and not negative, and that is all that is said of their sum"""
    couples: ClassVar[bool] = False
    """a token's experts depend on the other tokens of its batch"""
    equivariant: ClassVar[bool] = True
    """relabelling experts (columns of scores and of what the state holds) relabels the choice"""
    ragged: ClassVar[bool] = False
    """tokens may take fewer experts than `context.top_k` (or more, up to `width`)"""
    stateful: ClassVar[bool] = False
    """`route` reads `context.state` and returns a state"""
    asks_for: ClassVar[tuple[str, ...]] = ()
    """fields of the context over tokens that it reads: `token_T`, `class_T`, ..."""
    denoises: ClassVar[bool] = False
    """a diffusion model's router: `context.progress` is the share of denoising steps done"""

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Experts and gates of T tokens, distinct experts for each. T may be 0.

        Scores are finite or -inf (an expert that must not be taken). Raises ValueError when a token has too few for
        a mechanism that gives each token a fixed number, and where parameters and context do not go together; a
        simulation turns it into bad input.
        """
        raise NotImplementedError

    def width(self, top_k: int, num_experts: int) -> int:
        """W: the most experts any token can take, at most `num_experts`."""
        return min(top_k, num_experts)

    def score_columns(self, num_experts: int) -> int:
        """Columns of scores that `route` wants for a layer of so many experts: one each."""
        return num_experts

    def groups(self, num_groups: int, top_groups: int) -> Groups:
        """The groups it limits a token to, given the model's: none."""
        return Groups()

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Experts [T, L, K] of independent tokens for a synthetic pool, popularity `weight_LE` where it is heeded.

        Called only where `from_scores` is False.
        """
        raise NotImplementedError
