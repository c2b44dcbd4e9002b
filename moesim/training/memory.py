"""What a rank keeps while it trains, to the byte, and what would make it fit.

Weights, gradients and optimizer states follow ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3.1 and figure 1):
AdamW keeps two float32 moments and, where weights are not float32 themselves, a float32 copy of them, so bf16 weights
with bf16 gradients take 2 + 2 + 12 bytes a parameter; stage 1 shares the states out over the ranks that hold the same
parameters, stage 2 the gradients too, stage 3 the weights too. Dense parameters are held by all data-parallel ranks
of all replicas, experts by their counterparts in the other replicas.

Activations are counted as in Korthikanti et al. (arXiv:2205.05198, section 4.1: what each operation needs for its
backward pass), for the operations of today's MoE layers: FlashAttention keeps its output and one number a row in
place of the scores, feed-forwards are gated, there is no dropout, and a MoE layer keeps the rows that its experts got.
Tensor parallelism splits what is inside attention and feed-forwards, not the residual stream (no sequence
parallelism). One micro-batch is in flight.

Legend: T tokens of a rank's micro-batch, L MoE layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moesim.arrays import FloatArray
from moesim.dtypes import dtype_bytes, tensor_bytes
from moesim.errors import Infeasible
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.training_spec import TrainingSpec

__all__ = ["TrainingMemory", "balanced_rows", "require_fit", "training_memory"]

_GIB = 2**30
_STATE_BYTES = 8
"""AdamW: two float32 moments"""
_MASTER_BYTES = 4
"""and a float32 copy of weights that are kept in less"""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of HBM on the fullest rank."""

    capacity: int
    usable: int
    by: dict[str, int]

    @property
    def used(self) -> int:
        return sum(self.by.values())

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 where it fits."""
        return max(0, self.used - self.usable)


def balanced_rows(model: MoEModel, layout: Layout, tokens: int) -> FloatArray:
    """(token, expert) pairs of one part in each MoE layer [L] when experts are loaded alike; `tokens` a rank."""
    return np.full(model.num_moe_layers, tokens * layout.dp * model.top_k / layout.ep)


def training_memory(
    model: MoEModel, cluster: Cluster, layout: Layout, training: TrainingSpec, replicas: int, rows_L: FloatArray
) -> TrainingMemory:
    """Memory of a rank whose experts run `rows_L` rows in each MoE layer."""
    tokens = training.micro_batch_sequences * training.sequence_tokens
    stage, copies = training.zero_stage, layout.dp * replicas
    grad = dtype_bytes(training.grad_dtype)
    dense = [(part.params, str(part.dtype)) for part in model.dense_parts_rank(layout.tp)]
    experts = [(expert_params_rank(model, layout), str(model.expert_dtype))] if model.is_moe else []
    by = dict.fromkeys(("dense_weights", "expert_weights", "gradients", "optimizer_states", "zero_buffers"), 0)
    for name, tensors, held_by in (("dense", dense, copies), ("expert", experts, replicas)):
        for params, dtype in tensors:
            shared = [-(-params // held_by) if stage >= least else params for least in (3, 2, 1)]
            by[f"{name}_weights"] += tensor_bytes(shared[0], dtype)
            by["gradients"] += int(shared[1] * grad)
            by["optimizer_states"] += shared[2] * (_STATE_BYTES + (_MASTER_BYTES if dtype != "fp32" else 0))
    if stage >= 2:
        # the gradients of one layer before they are shared out; stage 3: weights of the layer at work and of the next
        widest = max(layer_params(model, layout))
        weights = 2 * int(widest * max(dtype_bytes(dtype) for _, dtype in dense + experts)) if stage == 3 else 0
        by["zero_buffers"] = int(widest * grad) + weights
    by["activations"] = _activations(model, layout, training, tokens, rows_L)
    by["logits"] = 4 * tokens * -(-model.vocab_size // layout.tp)  # float32, in place of their gradient
    by["exchange_buffers"] = _buffers(model, layout, tokens, rows_L)
    by["runtime"] = int(training.runtime_memory_gib * _GIB)
    capacity = cluster.profile.memory_bytes
    return TrainingMemory(capacity, int(capacity * training.gpu_memory_utilization), by)


def expert_params_rank(model: MoEModel, layout: Layout) -> int:
    """Parameters of the routed experts on one rank, over all layers."""
    slots = model.num_experts // layout.ep
    return -(-model.num_moe_layers * slots * model.expert_params() // layout.expert_tp)


def layer_params(model: MoEModel, layout: Layout) -> list[int]:
    """Parameters of each layer on one rank, its experts included."""
    counts = {part.name: part.params for part in model.dense_parts_rank(layout.tp)}
    per_attention = (counts.get("attention", 0) + counts.get("attention_small", 0)) // model.num_layers
    per_dense = counts.get("dense_ffn", 0) // max(1, len(model.dense_layers))
    shared = sum(counts.get(name, 0) for name in ("router", "latent", "shared_experts", "shared_gate"))
    per_moe = (shared + expert_params_rank(model, layout)) // max(1, model.num_moe_layers) if model.is_moe else 0
    sparse = set(model.moe_layers)
    return [per_attention + (per_moe if i in sparse else per_dense) for i in range(model.num_layers)]


def _activations(model: MoEModel, layout: Layout, training: TrainingSpec, tokens: int, rows_L: FloatArray) -> int:
    """Of all layers, and the inputs of the final norm and of the head."""
    act, hidden = dtype_bytes(model.activation_dtype), model.hidden_size
    lean = training.recompute == "selective"
    attention, dense = _attention_kept(model, layout, lean), _dense_kept(model, layout, lean)
    own, per_row = _moe_kept(model, layout, lean)
    stream = tokens * hidden * act  # a layer's input
    kept = []
    turn = iter(rows_L.tolist())
    sparse = set(model.moe_layers)
    for layer in range(model.num_layers):
        inside = tokens * own + next(turn) * per_row if layer in sparse else tokens * dense
        kept.append(tokens * attention + inside)
    ends = 2 * stream
    if training.recompute == "full":
        # Korthikanti et al., section 5: 2sbh a layer; and all of the layer that is at work
        return math.ceil(model.num_layers * stream + max(kept) + ends)
    return math.ceil(sum(kept) + ends)


def _attention_kept(model: MoEModel, layout: Layout, lean: bool) -> float:
    """Bytes a token of an attention block."""
    a, act, hidden = model.attention, dtype_bytes(model.activation_dtype), model.hidden_size
    heads = -(-a.num_heads // layout.tp)
    kv_heads = heads if a.kind == "mla" else model.kv_heads_per_rank(layout.tp)
    elements = hidden  # the norm's input
    elements += 0 if lean else hidden  # its output: the projections' input
    elements += heads * a.head_dim + kv_heads * (a.head_dim + a.v_head_dim)  # query, key, value
    elements += heads * a.v_head_dim  # attention's output: the last projection's input
    if a.kind == "mla":
        elements += (a.q_lora_rank or 0) + a.kv_lora_rank  # latents: the up-projections' inputs
    return elements * act + 4 * heads  # log of the sum of exponentials (FlashAttention-2, algorithm 1)


def _dense_kept(model: MoEModel, layout: Layout, lean: bool) -> float:
    """Bytes a token of a dense feed-forward block."""
    act, hidden = dtype_bytes(model.activation_dtype), model.hidden_size
    return (hidden * (1 if lean else 2) + _ffn_kept(model, -(-model.dense_intermediate_size // layout.tp), lean)) * act


def _ffn_kept(model: MoEModel, wide: int, lean: bool) -> int:
    """Elements a row inside a feed-forward: what the activation reads, and what the last product reads."""
    return wide * ((2 if model.gated_mlp else 1) + (0 if lean else 1))


def _moe_kept(model: MoEModel, layout: Layout, lean: bool) -> tuple[float, float]:
    """Bytes a token of a MoE block's own part, and bytes a row that its experts got."""
    act, hidden = dtype_bytes(model.activation_dtype), model.hidden_size
    if not model.is_moe:
        return 0.0, 0.0
    own = (hidden * (1 if lean else 2) + _ffn_kept(model, -(-model.shared_intermediate_size // layout.tp), lean)) * act
    own += 4 * model.num_scores  # the router's float32 scores
    own += model.expert_hidden_size * act  # what the projection into the experts' width put out
    own += model.top_k * model.expert_hidden * act  # the K outputs that a token's gates weigh: for the gates' gradient
    wide = -(-model.moe_intermediate_size // layout.expert_tp)
    return own, (model.expert_hidden + _ffn_kept(model, wide, lean)) * act


def _buffers(model: MoEModel, layout: Layout, tokens: int, rows_L: FloatArray) -> int:
    """Of the largest exchange: what is sent and what is received; or all ranks' gathered tokens, and their sums."""
    if not layout.meets:
        return 0
    row = model.expert_hidden * dtype_bytes(model.activation_dtype)
    if not layout.exchanges:
        return math.ceil(2 * tokens * layout.dp * row)
    sent = tokens * min(model.top_k, layout.ep) / layout.tp
    return math.ceil((sent + float(rows_L.max(initial=0.0))) * row)


def require_fit(
    model: MoEModel,
    cluster: Cluster,
    layout: Layout,
    training: TrainingSpec,
    replicas: int,
    rows_L: FloatArray,
    when: str,
) -> TrainingMemory:
    """`training_memory`, or Infeasible with the bytes by use, what is missing, and the smallest changes that fit.
    `when`: what the rows rest on."""
    memory = training_memory(model, cluster, layout, training, replicas, rows_L)
    if not memory.short:
        return memory
    uses = ", ".join(f"{name} {size:,} B" for name, size in memory.by.items() if size)
    reasons = [
        f"What a rank keeps must fit into its memory: {memory.used:,} bytes are needed {when}, {memory.usable:,} are "
        f"usable ({memory.capacity / _GIB:.1f} GiB x {training.gpu_memory_utilization}), {memory.short:,} bytes a "
        f"rank are missing ({uses})."
    ]
    reasons += _mends(model, cluster, layout, training, replicas, rows_L)
    raise Infeasible(reasons, memory.short / max(memory.usable, 1))


def _mends(
    model: MoEModel, cluster: Cluster, layout: Layout, training: TrainingSpec, replicas: int, rows_L: FloatArray
) -> list[str]:
    """The smallest single change of each kind that fits, else the smallest of all together, found by trying."""

    def fits(**changes: object) -> bool:
        changed = training.model_copy(update=changes)
        rows = rows_L * (changed.micro_batch_sequences / training.micro_batch_sequences)
        return not training_memory(model, cluster, layout, changed, replicas, rows).short

    micro = training.micro_batch_sequences
    smaller = [m for m in range(micro - 1, 0, -1) if micro % m == 0]
    more = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[training.recompute]
    stages = range(training.zero_stage + 1, 4)
    singles: list[list[dict[str, object]]] = [
        [{"micro_batch_sequences": m} for m in smaller],
        [{"recompute": r} for r in more],
        [{"zero_stage": z} for z in stages],
    ]
    out = []
    for tries in singles:
        found = next((change for change in tries if fits(**change)), None)
        if found is not None:
            key, value = next(iter(found.items()))
            out.append(f"Smallest change of training.{key} that fits: {value}.")
    if out:
        return out
    together = (
        {"zero_stage": z, "recompute": r, "micro_batch_sequences": m}
        for z in (training.zero_stage, *stages)
        for r in (training.recompute, *more)
        for m in (micro, *smaller)
    )
    for change in together:
        if fits(**change):
            text = ", ".join(f"training.{k}={v}" for k, v in change.items() if v != getattr(training, k))
            return [f"Smallest changes that fit together: {text}."]
    return [
        "No micro-batch, recomputation or ZeRO stage fits; use more replicas or ranks, shorter sequences, or devices "
        "with more memory."
    ]
