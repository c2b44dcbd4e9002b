"""Limits and overheads of the serving engine: the `engine` part of a scenario."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.spec import Spec
from moesim.units import GiB, Seconds, Us

__all__ = ["EngineSpec"]

_GRAPH_SIZES = (1, 2, 4, *range(8, 513, 8))


class EngineSpec(Spec):
    """Per data-parallel rank. Defaults are vLLM's where it has them.

    `host_overhead_us`: time a step costs on the host and does not overlap (scheduling, sampling hand-over).
    `graph_batch_sizes`: a batch within the largest is padded up to the next (CUDA graphs); `cuda_graph: false` pads
    nothing. `weights_from`: where weights are read before the first request is served. `bank_entries`: batches drawn
    for each size at count fidelity.
    """

    max_num_seqs: int = Field(default=256, ge=1, le=65536)
    max_num_batched_tokens: int = Field(default=8192, ge=1, le=1 << 20)
    max_model_len: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1, le=4096)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cuda_graph: bool = True
    graph_batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = _GRAPH_SIZES
    host_overhead_us: Us = 250.0
    runtime_memory_gib: GiB = 1.0
    weights_from: Literal["none", "host", "nvme"] = "none"
    run_ahead: bool = True
    bank_entries: int = Field(default=16, ge=1, le=1024)
    max_duration_s: Seconds | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EngineSpec:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                "max_num_seqs must not exceed max_num_batched_tokens (each decoding request takes one token a step): "
                f"{self.max_num_seqs} > {self.max_num_batched_tokens}; raise max_num_batched_tokens"
            )
        sizes = self.graph_batch_sizes
        if list(sizes) != sorted(set(sizes)):
            raise ValueError("graph_batch_sizes must increase: write them in order, each once")
        return self
