"""What fits where, to the byte: weights, buffers and KV cache of one rank, and what would make it fit.

The rules, one term a line, are in `rank_memory`. Activations and communication buffers are estimates that lean high
(`assumed`): an engine's own profiling run would measure them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.engine_spec import EngineSpec
from moesim.errors import Infeasible
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.model import MoEModel, dtype_bytes

__all__ = ["RankMemory", "rank_memory", "require_fit"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of HBM on the fullest rank. `usable` = capacity * gpu_memory_utilization; KV gets what is left of it."""

    capacity: int
    usable: int
    dense_weights: int
    expert_weights: int
    activations: int
    exchange_buffers: int
    runtime: int
    kv_unit: int
    """bytes of one KV unit: one block of one layer"""
    kv_units: int

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.dense_weights + self.expert_weights + self.activations + self.exchange_buffers + self.runtime

    @property
    def kv_cache(self) -> int:
        return self.kv_unit * self.kv_units

    def by_use(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {
            "dense_weights": self.dense_weights,
            "expert_weights": self.expert_weights,
            "activations": self.activations,
            "exchange_buffers": self.exchange_buffers,
            "runtime": self.runtime,
            "kv_cache": self.kv_cache,
        }


def rank_memory(
    model: MoEModel, cluster: Cluster, layout: Layout, engine: EngineSpec, slots_per_part: float, copies: float = 0
) -> RankMemory:
    """Memory of one rank. `slots_per_part`: expert slots (replicas included) of one expert-parallel part and set of
    experts, smaller experts counted by their size. `copies`: of a token that
    are sent, where more than one to each of its K experts."""
    tokens = engine.max_num_batched_tokens
    act = dtype_bytes(model.activation_dtype)
    # residual, normed input, attention in and out, and the widest feed-forward intermediate, each [tokens, width]
    widest = max(
        4 * model.hidden_size,
        2 * model.dense_intermediate_size // layout.tp if len(model.moe_layers) < model.num_layers else 0,
        2 * model.moe_intermediate_size * model.top_k // layout.expert_tp if model.is_moe else 0,
        2 * model.shared_intermediate_size // layout.tp,
    )
    activations = int(tokens * act * (3 * model.hidden_size + widest))
    # float32 logits of the sampled rows of one vocabulary shard
    activations += 4 * engine.max_num_seqs * model.vocab_size // layout.tp
    # one buffer each for tokens received and sent: at most every token of a rank to every one of its K experts
    copies = max(min(model.top_k, layout.ep), copies)
    exchange = int(2 * tokens * copies * model.expert_hidden * act) if layout.exchanges else 0
    kv_layers = set(model.kv_bytes_per_token(layout.tp))
    per_layer = max(kv_layers)
    kv_unit = int(per_layer * engine.block_size)
    capacity = cluster.profile.memory_bytes
    usable = int(capacity * engine.gpu_memory_utilization)
    # engines keep the two absorbed halves of MLA's up-projection beside the projection itself
    dense_weights = model.weight_bytes_dense_rank(layout.tp) + model.mla_absorbed_bytes_rank(layout.tp)
    experts = 0
    if model.is_moe:
        experts = int(model.expert_sets_held * slots_per_part * model.expert_bytes()) // layout.expert_tp
    runtime = int(engine.runtime_memory_gib * _GIB)
    fixed = dense_weights + experts + activations + exchange + runtime
    return RankMemory(
        capacity=capacity,
        usable=usable,
        dense_weights=dense_weights,
        expert_weights=experts,
        activations=activations,
        exchange_buffers=exchange,
        runtime=runtime,
        kv_unit=kv_unit,
        kv_units=max(0, (usable - fixed) // kv_unit),
    )


def require_fit(
    model: MoEModel, cluster: Cluster, layout: Layout, engine: EngineSpec, slots_per_part: float, copies: float = 0
) -> RankMemory:
    """`rank_memory`, or Infeasible with the bytes by use and the smallest changes that would fit."""
    memory = rank_memory(model, cluster, layout, engine, slots_per_part, copies)
    least = model.num_layers  # one block of one sequence
    if memory.kv_units >= least:
        return memory
    short = memory.fixed + least * memory.kv_unit - memory.usable
    uses = ", ".join(f"{name} {size:,} B" for name, size in memory.by_use().items() if size and name != "kv_cache")
    reasons = [
        f"Weights and buffers must leave room for a KV cache on every rank: {memory.fixed:,} bytes are needed, "
        f"{memory.usable:,} are usable ({memory.capacity / _GIB:.1f} GiB x {engine.gpu_memory_utilization}), "
        f"{short:,} bytes a rank are missing ({uses})."
    ]
    reasons.extend(_mends(model, cluster, layout, engine, slots_per_part))
    raise Infeasible(reasons)


def _mends(model: MoEModel, cluster: Cluster, layout: Layout, engine: EngineSpec, slots_per_part: float) -> list[str]:
    """The smallest single change of each kind that fits, found by trying."""
    out: list[str] = []

    def fits(m: MoEModel, lay: Layout, eng: EngineSpec, slots: float) -> bool:
        return rank_memory(m, cluster, lay, eng, slots).kv_units >= m.num_layers

    if model.is_moe:
        slots_all = round(slots_per_part * layout.ep)
        for factor in (2, 4, 8, 16, 32, 64):
            ranks = layout.ranks * factor
            ep = max(e for e in range(1, min(ranks, slots_all) + 1) if ranks % e == 0)
            slots = -(-slots_all // ep)
            grown = Layout(layout.tp, layout.dp * factor, ep, layout.gpus_per_node, True)
            if fits(model, grown, engine, slots):
                nodes = -(-ranks // cluster.gpus_per_node)
                more = slots * ep - model.num_experts
                also = f", num_redundant_experts={more}" if slots * ep != slots_all else ""
                shape = f"dp={grown.dp}, ep={ep}{also}"
                out.append(f"Smallest change in ranks that fits: {ranks} ranks ({shape}) on {nodes} nodes.")
                break
    for dtype in ("fp8_block", "int4"):
        lighter = (
            model.with_dtypes(weight_dtype=dtype, expert_dtype=dtype)
            if dtype == "fp8_block"
            else model.with_dtypes(expert_dtype=dtype)
        )
        if lighter.expert_bytes() < model.expert_bytes() and fits(lighter, layout, engine, slots_per_part):
            also = " and weight_dtype" if dtype == "fp8_block" else ""
            out.append(f"Smallest change in precision that fits: model.expert_dtype{also} {dtype}.")
            break
    for tokens in (4096, 2048, 1024):
        if tokens < engine.max_num_batched_tokens:
            smaller = engine.model_copy(
                update={"max_num_batched_tokens": tokens, "max_num_seqs": min(engine.max_num_seqs, tokens)}
            )
            if fits(model, layout, smaller, slots_per_part):
                out.append(f"Or engine.max_num_batched_tokens={tokens}.")
                break
    if not out:
        out.append("No single change of ranks, precision or batch size fits; use devices with more memory.")
    return out
