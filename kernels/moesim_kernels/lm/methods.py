"""The balancing methods that the model is trained under, one row each, and what each remembers from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import torch

from moesim_kernels import routers
from moesim_kernels.lm.model import Sizes
from moesim_kernels.routers import Choice

__all__ = ["METHODS", "Method", "Router", "Scoring"]

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS: `kind` is the mechanism, the rest its parameters."""

    kind: Literal["topk", "auxiliary_loss", "loss_free", "bip", "sinkhorn", "expert_choice", "hash"]
    scoring: Scoring = "softmax"
    alpha: float = 0.0
    rate: float = 0.0
    iterations: int = 0
    temperature: float = 1.0
    warm: bool = True
    """bip: prices of the batch before are the first of the next"""


METHODS: Final = {
    "none": Method("topk"),
    "auxiliary_loss": Method("auxiliary_loss", alpha=0.01),  # Switch, arXiv 2101.03961: alpha = 1e-2
    # arXiv 2408.15664: sigmoid gate, u = 1e-3 over 40,000 steps; over some hundred steps a bias must move faster
    "loss_free": Method("loss_free", scoring="sigmoid", rate=1e-2),
    "loss_free_slow": Method("loss_free", scoring="sigmoid", rate=1e-3),
    "bip": Method("bip", iterations=4),
    "bip_cold": Method("bip", iterations=14, warm=False),
    "sinkhorn": Method("sinkhorn", iterations=8),
    "sinkhorn_sharp": Method("sinkhorn", iterations=16, temperature=0.2),
    "expert_choice": Method("expert_choice"),
    "hash": Method("hash"),
}


@dataclass(slots=True)
class Router:
    """Routes all layers of one model under one method: `Route` of the model, with the method's state.

    `route(scores, layer)` chooses; after a training step `step()` moves the state on. `token_local` replaces a method
    whose choice depends on the rest of the batch by plain top-k, which is what a causal decoder can run.
    """

    method: Method
    sizes: Sizes
    training: bool = True
    token_local: bool = False
    state_L: dict[int, torch.Tensor] = field(default_factory=dict)
    choice_L: dict[int, Choice] = field(default_factory=dict)
    score_L: dict[int, torch.Tensor] = field(default_factory=dict)
    token_T: torch.Tensor | None = None
    """ids of the batch's tokens, for `hash`"""

    def __call__(self, score_TE: torch.Tensor, layer: int) -> Choice:
        choice = self._choose(score_TE, layer)
        self.score_L[layer], self.choice_L[layer] = score_TE, choice
        return choice

    def _choose(self, score_TE: torch.Tensor, layer: int) -> Choice:
        method, k = self.method, self.sizes.top_k
        if method.kind == "loss_free":
            return routers.loss_free(score_TE, k, self._bias(layer), scoring=method.scoring)
        if method.kind == "hash":
            if self.token_T is None:
                raise ValueError("hash routing needs the tokens' ids")
            return routers.table(self.token_T, torch.from_numpy(hash_table(self.sizes, layer)))
        if self.token_local or method.kind in ("topk", "auxiliary_loss"):
            return routers.softmax_topk(score_TE, k)
        if method.kind == "bip":
            before_E = self.state_L.get(layer) if method.warm else None
            choice, q_E = routers.bip(score_TE, k, before_E, iterations=method.iterations)
            if self.training:
                self.state_L[layer] = q_E
            return choice
        if method.kind == "sinkhorn":
            return routers.sinkhorn(score_TE, k, temperature=method.temperature, iterations=method.iterations)
        return routers.expert_choice(score_TE, k)

    def _bias(self, layer: int) -> torch.Tensor:
        return self.state_L.get(layer, torch.zeros(self.sizes.experts, dtype=torch.float64))

    def extra_loss(self) -> torch.Tensor | None:
        """What the method adds to the loss of the batch just routed: alpha times the sum of the layers' auxiliary
        losses, as Switch adds them up."""
        if not self.method.alpha:
            return None
        losses = [routers.auxiliary_loss(self.score_L[i], self.choice_L[i].expert_TK) for i in sorted(self.choice_L)]
        return self.method.alpha * torch.stack(losses).sum()

    def counts(self) -> torch.Tensor:
        """Tokens of each expert in the batch just routed, int64 [L, E]."""
        each = [routers.counts(self.choice_L[i].expert_TK, self.sizes.experts) for i in sorted(self.choice_L)]
        return torch.stack(each)

    def step(self) -> None:
        """After a training step: the loss-free bias follows the loads (bip moves its prices while it routes)."""
        if self.method.kind == "loss_free":
            for layer, choice in self.choice_L.items():
                self.state_L[layer] = routers.loss_free_step(self._bias(layer), choice.expert_TK, rate=self.method.rate)

    def frozen(self, token_local: bool = False) -> Router:
        """The same method and state for evaluation: nothing moves on."""
        return Router(self.method, self.sizes, False, token_local, dict(self.state_L))


def hash_table(sizes: Sizes, layer: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A fixed table of K distinct experts for every vocabulary id, int64 [V, K] (Roller et al., arXiv 2106.04426)."""
    draws = np.random.default_rng(np.random.SeedSequence([0x6861, layer]))
    return draws.random((sizes.vocabulary, sizes.experts)).argsort(1)[:, : sizes.top_k].astype(np.int64)
