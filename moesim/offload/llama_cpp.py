"""llama.cpp: layers' expert tensors are put where flags say, by name; those in host memory are computed on the CPU.

A layer's experts are three tensors, `blk.N.ffn_gate_exps.weight`, `..._up_...`, `..._down_...`, N the block's number
in the model, dense blocks counted (`OffloadContext.block_L`). `--override-tensor` (`-ot`) is a list of `regex=buffer`;
`--n-cpu-moe N` (pull request 15077) stands for one such override a block, `EXPERTS` of the first N, to the CPU, and
`--cpu-moe` for that of all blocks. The first pattern that is found in a name decides, and `-ot` comes first.

Ours: an expert is computed in one place, so the three tensors of a layer must be in one. Left out: prompts of 32 tokens
and more, whose products llama.cpp may do on the GPU with weights copied over for once (`--no-op-offload`).
"""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from moesim.arrays import BoolArray, IntArray
from moesim.errors import BadInput
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import empty_capacity, too_much
from moesim.spec import Spec

__all__ = ["Policy"]

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""common/common.h"""
TENSORS = ("gate", "up", "down")
Overrides = Annotated[
    tuple[Annotated[str, Field(min_length=3, max_length=300)], ...], Field(strict=False, max_length=4096)
]


def _split(text: str) -> tuple[re.Pattern[str], bool]:
    """The pattern of an override and whether its buffer is in host memory (`CPU`, `CUDA_Host`, ...)."""
    pattern, equals, buffer = text.rpartition("=")
    if not equals or not pattern or not buffer:
        raise ValueError(f"an override is REGEX=BUFFER, as in blk\\.(1|2)\\.ffn_.*_exps=CPU, not {text!r}")
    try:
        return re.compile(pattern), buffer == "CPU" or buffer.endswith("_Host")
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


class Policy(Spec):
    """n_cpu_moe: the experts of the first so many blocks are on the CPU. None, and neither cpu_moe nor override_tensor
    given: as few as the capacity asks for. cpu_moe: all are. override_tensor: `regex=buffer`, the first that is found
    in a tensor's name decides, before the other two; buffers whose name is CPU or ends in _Host are host memory, all
    others are the device's.
    """

    n_cpu_moe: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    cpu_moe: bool = False
    override_tensor: Overrides = ()

    @model_validator(mode="after")
    def _readable(self) -> Policy:
        for text in self.override_tensor:
            _split(text)
        return self

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Raises BadInput where a layer's tensors are parted, Infeasible where
        what is left for the device does not fit."""
        block_L = np.arange(context.num_layers) if context.block_L is None else context.block_L
        bytes_L = context.size_LE.sum(axis=1)
        # bytes of the layers from each one on; of the first layers, as many go as make the rest fit
        rest = np.append(np.cumsum(bytes_L[::-1])[::-1], 0)
        first = int(np.argmax(rest <= context.capacity_bytes))
        fewest = 0 if first == 0 else int(block_L[first - 1]) + 1
        if self.n_cpu_moe is None and not self.cpu_moe and not self.override_tensor:
            cpu_L = block_L < fewest
        else:
            cpu_L = self._placed(block_L)
        needed = int(bytes_L[~cpu_L].sum())
        if needed > context.capacity_bytes:
            raise too_much("llama_cpp", needed, context, f"Set n_cpu_moe to {fewest}, or put more layers on the CPU.")
        fixed = np.broadcast_to(~cpu_L[:, None], context.size_LE.shape).copy()
        return OffloadPlan(empty_capacity(context), fixed, np.zeros(fixed.shape, bool), ~fixed)

    def _placed(self, block_L: IntArray) -> BoolArray:
        """Which layers' experts are in host memory: bool [L]."""
        rules = [_split(text) for text in self.override_tensor]
        first = min(self.n_cpu_moe or 0, int(block_L.max(initial=-1)) + 1)
        rules += [(re.compile(rf"blk\.{i}{EXPERTS}"), True) for i in range(first)]
        if self.cpu_moe:
            rules.append((re.compile(EXPERTS), True))
        out = np.zeros(len(block_L), bool)
        parted = []
        for layer, block in enumerate(block_L.tolist()):
            names = [f"blk.{block}.ffn_{part}_exps.weight" for part in TENSORS]
            hosts = {next((host for pattern, host in rules if pattern.search(name)), False) for name in names}
            out[layer] = True in hosts
            if len(hosts) > 1:
                parted.append(block)
        if parted:
            raise BadInput(
                "policies.offload llama_cpp: an expert is computed in one place, so override_tensor must put the gate, "
                f"up and down tensors of a block into one; it parts those of block {parted[0]}"
                f"{f' and {len(parted) - 1} more' if len(parted) > 1 else ''}. Use ffn_(up|down|gate)_exps."
            )
        return out

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: whatever is in host memory."""
        return np.ones(len(experts), bool)
