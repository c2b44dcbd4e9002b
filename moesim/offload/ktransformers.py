"""KTransformers (github.com/kvcache-ai/ktransformers, kt-kernel with its SGLang): some experts are on the GPU for good,
all others are computed by the CPU beside it, and never fetched.

Placements as in SGLang's `kt_ep_wrapper`: the flags name a number a layer, but only their total over all layers counts
(`--kt-num-gpu-experts` times layers), and a strategy lays experts out one after another until it is reached.

- uniform: expert 0 of every layer, expert 1 of every layer, ...: equally many a layer, those with the lowest numbers.
- frequency: by activations counted beforehand, over all layers at once, so layers with uneven use get more.
- front_loading: all experts of the first layer, then of the second, ...
- random: in a random order over all layers (torch's generator with seed 42 there, ours here).
- dynamic: frequency, and after a prompt of at least `update_tokens` tokens each layer's experts become as many of the
  most used ones of that prompt (`--kt-enable-dynamic-expert-update`).

Left out: with `--kt-gpu-prefill-token-threshold` long prompts are computed on the GPU altogether, layer after layer.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from moesim.arrays import BoolArray, IntArray
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import by_popularity, empty_capacity, largest_L, too_much
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """num_gpu_experts: on the GPU, a layer on average. gpu_experts_ratio: instead, a share of all experts (rounded
    down). Neither: as many as fit. strategy: see the module; uniform is the system's default. update_tokens: the
    tutorial's example. deferred_experts: the results of a token's so many last choices are added one layer later
    where the CPU computes them and no other token of the step has them among its first ones, so that they run beside
    the next layer (`--kt-max-deferred-experts-per-token`; it changes the model's results a little, so it is off unless
    asked for).
    """

    num_gpu_experts: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    gpu_experts_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    strategy: Literal["uniform", "frequency", "front_loading", "random", "dynamic"] = "uniform"
    update_tokens: Annotated[int, Field(ge=1, le=1 << 30)] = 512
    deferred_experts: Annotated[int, Field(ge=0, le=1024)] = 0

    @model_validator(mode="after")
    def _one_of_them(self) -> Policy:
        if self.num_gpu_experts is not None and self.gpu_experts_ratio is not None:
            raise ValueError("num_gpu_experts and gpu_experts_ratio both say how many experts are on the GPU; give one")
        return self

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Where experts may change (dynamic), each takes a slot as large as
        the layer's largest one. Raises Infeasible where they do not fit."""
        order = self._order(context)
        size_LE = context.size_LE
        if self.strategy == "dynamic":
            size_LE = np.broadcast_to(largest_L(context)[:, None], size_LE.shape)
        bytes_so_far = np.cumsum(size_LE.reshape(-1)[order])
        fits = int(np.searchsorted(bytes_so_far, context.capacity_bytes, side="right"))
        number = self._number(context)
        if number is None:
            number = fits
        elif number > fits:
            mend = f"{fits:,} fit: lower num_gpu_experts to {fits // context.num_layers}."
            raise too_much(f"ktransformers ({number:,} experts)", int(bytes_so_far[number - 1]), context, mend)
        on_gpu = np.zeros(context.num_keys, bool)
        on_gpu[order[:number]] = True
        fixed = on_gpu.reshape(context.size_LE.shape)
        update = self.update_tokens if self.strategy == "dynamic" else None
        none = np.zeros(fixed.shape, bool)
        return OffloadPlan(
            empty_capacity(context), fixed, none, ~fixed, deferred=self.deferred_experts, update_tokens=update
        )

    def _number(self, context: OffloadContext) -> int | None:
        if self.gpu_experts_ratio is not None:
            return int(context.num_keys * self.gpu_experts_ratio)
        if self.num_gpu_experts is not None:
            return min(self.num_gpu_experts, context.num_experts) * context.num_layers
        return None

    def _order(self, context: OffloadContext) -> IntArray:
        """Keys in the order in which they get onto the GPU."""
        keys = np.arange(context.num_keys, dtype=np.int64)
        if self.strategy == "uniform":
            return keys.reshape(context.size_LE.shape).T.reshape(-1)
        if self.strategy == "front_loading":
            return keys
        if self.strategy == "random":
            return generator(context.seed, "offload ktransformers random").permutation(keys)
        return by_popularity(context)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: whatever is not on the GPU."""
        return np.ones(len(experts), bool)
