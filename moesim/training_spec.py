"""What a training run computes and keeps: the `training` part of a scenario with `mode: training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.spec import Spec
from moesim.units import GiB, Us

__all__ = ["Recompute", "TrainingSpec"]

Recompute = Literal["none", "selective", "full"]


class TrainingSpec(Spec):
    """Batches are counted in sequences of `sequence_tokens` tokens, all of that length (`packing: none`).

    micro_batch_sequences: of one data-parallel rank at once; gradients accumulate over as many micro-batches as
    `global_batch_sequences` needs. steps: how many are simulated, spread evenly over the part `progress_start` to
    `progress_end` of the training run; figures count from `measured_from_step` on. recompute: what the backward pass
    computes again: nothing, norms and activation functions, or whole layers. zero_stage: what data-parallel ranks
    share out (1 optimizer states, 2 and gradients, 3 and weights). routing_tokens: tokens routed for a micro-batch
    and layer at most (a sample that stands for all: whole ranks or sequences where a capacity or router couples
    theirs, see `moesim.training.sampling`); none: 8,192 on average over micro-batches, or fewer where a step of all
    layers would draw more than 2^29 scores. routing_scope: the tokens that a router which balances within a
    batch sees together.
    """

    sequence_tokens: int = Field(ge=1, le=1 << 22)
    global_batch_sequences: int = Field(ge=1, le=1 << 26)
    micro_batch_sequences: int = Field(default=1, ge=1, le=1 << 20)
    steps: int = Field(default=20, ge=1, le=100_000)
    measured_from_step: int = Field(default=0, ge=0)
    recompute: Recompute = "none"
    zero_stage: int = Field(default=0, ge=0, le=3)
    optimizer: Literal["adamw"] = "adamw"
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    progress_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    progress_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    packing: Literal["none"] = "none"
    routing_tokens: int | None = Field(default=None, ge=1, le=1 << 22)
    routing_scope: Literal["rank", "micro_batch"] = "rank"
    cuda_graph: bool = False
    host_overhead_us: Us = 250.0
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    runtime_memory_gib: GiB = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        if self.global_batch_sequences % self.micro_batch_sequences:
            raise ValueError(
                "micro_batch_sequences must divide global_batch_sequences: "
                f"{self.micro_batch_sequences} and {self.global_batch_sequences}"
            )
        if self.measured_from_step >= self.steps:
            raise ValueError(
                f"measured_from_step must lie below steps, so that something is measured: {self.measured_from_step} "
                f"and {self.steps}"
            )
        if self.progress_end < self.progress_start:
            raise ValueError(
                f"progress_end must not lie before progress_start: {self.progress_end} < {self.progress_start}"
            )
        return self

    def progress(self, step: int) -> float:
        """Share of the training run that is done at `step`: the middle of its stretch."""
        return self.progress_start + (self.progress_end - self.progress_start) * (step + 0.5) / self.steps
