"""How far ahead to prefetch: as many layers as the transfers of one layer take, corrected while serving (the ExpertFlow
of arXiv 2510.26730), around any policy that names experts.

S = N_e * E_bytes / (BW * T_layer): layers that pass while the experts of one layer travel. The paper corrects S at run
time; by how much and upon what is not published in detail, so the counters here are a reconstruction: every `window`
steps S grows by one layer where more of the experts that were asked for came too late than were fetched for nothing,
and shrinks by one where it is the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moesim.offload import OffloadContext, StepRoutes, Wanted
from moesim.offload.prefetch.naming import Ahead
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """inner: the policy that names experts; parameters: its own parameters, `ahead` aside, which is what this one sets.
    experts: N_e, experts that travel for a layer; None: as many as look-ups asked for, on average over the last window
    (a token's own number before the first). least, most: bounds of S, in layers; most None: as far as the inner policy
    says anything. window: steps between corrections; 0: S stays what the formula says.
    """

    inner: Literal["next_layer", "markov", "previous_token", "frequency", "predictor"] = "next_layer"
    parameters: dict[str, Any] = Field(default_factory=dict)
    experts: Annotated[float, Field(gt=0, le=1e6)] | None = None
    least: Annotated[int, Field(ge=1, le=512)] = 1
    most: Annotated[int, Field(ge=1, le=512)] | None = None
    window: Annotated[int, Field(ge=0, le=1 << 20)] = 4

    @model_validator(mode="after")
    def _inner_exists(self) -> Self:
        if "ahead" in self.parameters:
            raise ValueError(
                "the horizon decides how far ahead the inner policy looks; leave `ahead` out of parameters"
            )
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most must be at least least: most is {self.most}, least {self.least}")
        try:
            self.named()
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"parameters of {self.inner}: {at}: {first['msg']}") from error
        return self

    @property
    def oracle(self) -> bool:
        """See Limited: as the inner policy."""
        return bool(self.named().oracle)

    def named(self) -> Any:
        """The inner policy."""
        return import_module(f"moesim.offload.prefetch.{self.inner}").Policy.model_validate(self.parameters)

    def start(self, context: OffloadContext) -> _Horizon:
        """See `moesim.offload.PrefetchPolicy.start`. Raises BadInput where the inner policy does."""
        return _Horizon(context, self, self.named().start(context))


class _Horizon:
    def __init__(self, context: OffloadContext, policy: Policy, inner: Ahead) -> None:
        self._context, self._policy, self._inner = context, policy, inner
        furthest = min(inner.furthest, context.num_layers)
        self._most = max(policy.least, furthest if policy.most is None else min(policy.most, furthest))
        self._most = min(self._most, furthest)
        self._asked: dict[int, None] = {}
        self._steps = self._late = self._unused = self._look_ups = self._experts = 0
        self._correction = 0
        self._mean = float(context.top_k) if policy.experts is None else policy.experts
        inner.ahead = self.reach

    @property
    def reach(self) -> int:
        """S in layers: experts of one layer over the link, in times of a layer; arXiv 2510.26730, corrected."""
        layers = self._mean * self._context.costs.transfer_ns / self._context.costs.layer_ns
        return min(max(math.ceil(layers - 1e-9) + self._correction, self._policy.least), self._most)

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch."""
        self._unused += len(self._asked)
        self._asked.clear()
        if self._policy.window and self._steps and self._steps % self._policy.window == 0:
            self._correct()
        self._steps += 1
        self._inner.begin(step)
        self._inner.ahead = self.reach

    def _correct(self) -> None:
        before = self.reach
        self._correction += (self._late > self._unused) - (self._late < self._unused)
        if self.reach == before:  # at a bound: a correction that changes nothing must not pile up
            self._correction -= (self._late > self._unused) - (self._late < self._unused)
        if self._policy.experts is None and self._look_ups:
            self._mean = self._experts / self._look_ups
        self._late = self._unused = self._look_ups = self._experts = 0

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch. Looks at what the inner policy looks at."""
        wanted = self._inner.wanted(layer)
        for want in wanted:
            self._asked[want.layer * self._context.num_experts + want.expert] = None
        return wanted

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """See Prefetch."""
        self._look_ups += 1
        self._experts += len(found)
        for key, kind in found:
            if key in self._asked:
                del self._asked[key]
                self._late += kind in ("late", "load", "stream")
        stale = [key for key in self._asked if key // self._context.num_experts <= layer]
        for key in stale:
            del self._asked[key]
        self._unused += len(stale)
        self._inner.told(layer, found)
