"""The shapes that one rank of a deployed model runs, and sizes to look at: a few token counts a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.arrays import FloatArray
from moesim.cost.dense import attention_shape
from moesim.dtypes import dtype_bytes
from moesim.errors import BadInput, Problem
from moesim.model import MoEModel
from moesim_kernels.profiles.shapes import Shape

__all__ = ["deployed_shapes", "load_model_named"]

_TOKENS = np.array([1.0, 16.0, 128.0, 1024.0, 8192.0])
_PROMPTS = np.array([128.0, 1024.0, 8192.0, 32768.0])
_CONTEXTS = np.array([512.0, 4096.0, 32768.0, 131072.0])
_BATCH = 32


def load_model_named(name: str) -> MoEModel:
    """A model of workloads/models, a file of that form, or a config.json. Raises BadInput."""
    from moesim.scenario.files import find_named
    from moesim.scenario.load import load_model

    return load_model(find_named(name, "workloads/models", Path(), "--model", "model"))


def deployed_shapes(model: MoEModel, tp: int, dp: int, ep: int, gpus_per_node: int) -> list[tuple[Shape, FloatArray]]:
    """Shapes and sizes of one rank: tp-way tensor parallel attention, dp data-parallel ranks, experts in ep parts.

    Sizes follow from 1 to 8,192 tokens a rank; pairs are those of a part when tokens spread evenly. Collectives within
    a node only. Raises BadInput where the degrees do not fit together or the node.
    """
    ranks = tp * dp
    if ranks % ep:
        raise BadInput(Problem("--ep", f"ep must divide tp * dp: ep={ep}, tp={tp}, dp={dp}. Use a divisor of {ranks}"))
    if tp > gpus_per_node:
        raise BadInput(Problem("--tp", f"tp must fit into a node: tp={tp}, {gpus_per_node} devices a node"))
    out: dict[Shape, FloatArray] = {}
    for g in model.gemms(tp):
        if g.phase != "prefill":
            out.setdefault(Shape("gemm", (g.n * g.batch, g.k, g.dtype), name=g.name), _TOKENS)
    if model.is_moe:
        inter = -(-model.moe_intermediate_size // (ranks // ep))
        key = (model.hidden_size, inter, -(-model.num_experts // ep), model.top_k, model.expert_dtype)
        pairs = np.maximum(_TOKENS * dp * model.top_k / ep, 1.0)
        out[Shape("moe", (*key, 3 if model.gated_experts else 2), name="experts")] = pairs
    for window in sorted({bool(w) for w in model.window_of_layer}):
        shape = attention_shape(model, tp, window)
        out[Shape("attention_prefill", shape.key)] = _PROMPTS
        out[Shape("attention_decode", shape.key, _BATCH)] = _CONTEXTS
    row = model.hidden_size * dtype_bytes(model.activation_dtype)
    if tp > 1:
        out[Shape("all_reduce", (tp,), name="tp")] = _TOKENS * row
    if model.is_moe and dp > 1 and ep == ranks <= gpus_per_node:
        copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** model.top_k)  # distinct other ranks of top_k even picks
        out[Shape("all_to_all", (ranks,), name="combine")] = _TOKENS * (copies * row)
    out[Shape("elementwise", (0,), name="norm")] = _TOKENS * (4 * row)
    return list(out.items())
