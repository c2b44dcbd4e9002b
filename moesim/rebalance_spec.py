"""When experts move while a deployment serves: the `rebalance` block of a scenario."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moesim.spec import Spec
from moesim.units import Ms

__all__ = ["RebalanceSpec"]

_Steps = Annotated[int, Field(ge=1, le=1 << 31)]


class RebalanceSpec(Spec):
    """The placement policy is asked again every `interval_steps` steps with the loads of the last `window_steps` ones
    (vLLM: 3000 and 1000).

    threshold: mean over max load of ranks at which nothing is moved, because it is balanced enough (SGLang's
    `eplb_min_rebalancing_utilization_threshold`; 1: always moved). layers_per_chunk: layers moved between two steps
    (SGLang's `eplb_rebalance_layers_per_chunk`); None: all at once. asynchronous: weights travel while steps go on, a
    layer takes its new map when its weights are there; else steps wait. first_after_steps: when the first one is; None:
    a quarter of the interval, as vLLM does. host_ms: time that planning takes, which a synchronous rebalance
    waits for, too; None: 17 ms a layer (about a second for DeepSeek-V3's 58, sgl-project/sglang#7879). layer_ms: time
    that a layer's update takes besides its bytes (20 ms a layer in all are reported there). relabel_ranks: a rank may
    take another's experts where that moves fewer weights. start: `initial`: with the map that engines start with (slot
    i holds expert i mod E); `fitted`: with one made for the traffic.
    """

    interval_steps: _Steps = 3000
    window_steps: _Steps = 1000
    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    layers_per_chunk: Annotated[int, Field(ge=1, le=4096)] | None = None
    asynchronous: bool = False
    first_after_steps: _Steps | None = None
    host_ms: Annotated[Ms, Field(ge=0, le=1e6)] | None = None
    layer_ms: Annotated[Ms, Field(ge=0, le=1e6)] = 0.0
    relabel_ranks: bool = False
    start: Literal["initial", "fitted"] = "initial"
