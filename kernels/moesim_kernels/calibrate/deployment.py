"""What is calibrated for: a deployment as one rank sees it, with the shapes and sizes that a simulation will price.

Every shape comes from the function that the simulator itself asks (`MoEModel.gemms`, `attention_shape`,
`ExpertPrices.shape`, `Layout`), so that what is measured is what is looked up.

Legend: T tokens of one rank in one step, R rows = (token, expert) pairs of one rank, E expert slots of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.cost.dense import attention_shape
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import AttentionShape, BlockShape, MoEShape, Operators
from moesim.cost.own import block_shape
from moesim.dtypes import dtype_bytes
from moesim.engine_spec import EngineSpec
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.scenario.load import Scenario, load_scenario, scenario_from_dict

__all__ = [
    "FORMATS",
    "MEASURED_DTYPES",
    "Deployment",
    "GemmNeed",
    "default_deployments",
    "deployment_of",
    "from_model",
    "from_scenario",
]

MEASURED_DTYPES = ("bf16", "fp32")
FORMATS = ("weight", "expert", "kv", "activation")
_STAND_IN = "h200_sxm"  # shapes do not depend on the device, but a scenario names one
_DEFAULTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "cpu": (
        {
            "model": {"name": "granite-powermoe-3b", **{f"{k}_dtype": "fp32" for k in FORMATS}},
            "engine": {"max_num_batched_tokens": 256, "max_num_seqs": 16, "max_model_len": 2048},
        },
    ),
    "cuda": (
        {"model": "mixtral-8x7b", "engine": {"max_num_batched_tokens": 8192, "max_model_len": 32768}},
        {"model": "qwen3-30b-a3b", "engine": {"max_num_batched_tokens": 8192, "max_model_len": 32768}},
    ),
}


@dataclass(frozen=True, slots=True)
class GemmNeed:
    """A product [rows, k] x [k, n] with weights in `dtype`, asked for with 1 to `rows` rows."""

    n: int
    k: int
    dtype: str
    rows: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model laid out over ranks, and the limits of its engine. `slots`: expert slots a rank and layer (0: dense)."""

    model: MoEModel
    layout: Layout
    engine: EngineSpec
    slots: int
    moe: MoEShape | None

    @property
    def max_tokens(self) -> int:
        """Most tokens a rank computes in a step, padding to the next CUDA graph included."""
        most = self.engine.max_num_batched_tokens
        sizes = self.engine.graph_batch_sizes if self.engine.cuda_graph else ()
        return min((s for s in sizes if s >= most), default=most)

    @property
    def max_context(self) -> int:
        """Longest sequence."""
        return self.engine.max_model_len or self.model.max_position_embeddings

    def gemms(self) -> list[GemmNeed]:
        """Distinct products of a step, each with the most rows it is asked for (lm_head: the sampled rows)."""
        rows: dict[tuple[int, int, str], int] = {}
        for g in self.model.gemms(self.layout.tp):
            if g.phase != "prefill":  # MLA's absorbed halves serve prompt rows too (moesim.cost.dense)
                key = (g.n * g.batch, g.k, "bf16" if g.dtype == "fp16" else g.dtype)
                most = self.engine.max_num_seqs if g.where == "head" else self.max_tokens
                rows[key] = max(rows.get(key, 0), most)
        return [GemmNeed(n, k, dtype, most) for (n, k, dtype), most in rows.items()]

    def attention(self) -> list[AttentionShape]:
        """The kernel of full-attention layers and that of layers with a window, as far as the model has them."""
        kinds = [kind != "full" for kind in self.model.attention_kind_of_layer]
        return [attention_shape(self.model, self.layout.tp, window) for window in sorted(set(kinds))]

    def block(self) -> BlockShape | None:
        """A MoE layer's own part on one rank; None where the model has none that kernels here run."""
        shape = block_shape(self.model, self.layout.tp)
        wanted = (*MEASURED_DTYPES, "fp16")
        return shape if shape is not None and {shape.dtype, shape.router_dtype} <= set(wanted) else None

    def group_tokens(self, tokens: int) -> int:
        """Tokens that enter an MoE layer together where every data-parallel rank holds `tokens`."""
        return tokens * (self.layout.dp if self.layout.meets else 1)

    def rows_of(self, tokens: int) -> int:
        """Rows of one part where each rank holds `tokens` tokens that choose evenly: at least 1."""
        return max(1, round(self.group_tokens(tokens) * self.model.top_k / self.layout.ep))

    def tokens_of(self, tokens: int, rows: int) -> int:
        """Tokens present on a rank for `rows` rows: those that travelled to it, else all tokens of the group."""
        here = self.group_tokens(tokens)
        least = -(-rows // max(1, min(self.model.top_k, self.slots)))
        if not self.layout.exchanges or self.layout.ep == 1:
            return max(here, least)
        reached = 1.0 - (1.0 - 1.0 / self.layout.ep) ** self.model.top_k
        return max(least, min(rows, round(here * reached)), 1)

    def elementwise_bytes(self) -> tuple[int, int]:
        """Fewest and most bytes that an elementwise pass of a step moves (one token; all tokens, or all logits)."""
        m, tp = self.model, self.layout.tp
        act = dtype_bytes(m.activation_dtype)
        heads = -(-m.attention.num_heads // tp)
        rotated = heads * m.attention.head_dim + m.kv_heads_per_rank(tp) * (
            m.attention.head_dim + m.attention.v_head_dim
        )
        widths = [4 * m.hidden_size, 2 * m.hidden_size, 2 * rotated]
        if m.is_moe:
            widths += [2 * m.num_experts + 4 * m.top_k] + [3 * m.shared_intermediate_size // tp] * bool(
                m.shared_intermediate_size
            )
        if m.dense_layers:
            widths.append(3 * (m.dense_intermediate_size // tp))
        logits = self.engine.max_num_seqs * m.vocab_size * 8
        return int(min(widths) * act), int(max(max(widths) * act * self.max_tokens, logits))

    def unmeasured(self, device: str) -> list[Problem]:
        """What no kernel here runs: quantised formats and experts without a gate. Each with its mend."""
        m = self.model
        named = {"weight_dtype": m.weight_dtype, "activation_dtype": m.activation_dtype, "kv_dtype": m.kv_dtype}
        if m.is_moe:
            named["expert_dtype"] = m.expert_dtype
        out = []
        for name, dtype in named.items():
            fine = dtype in (*MEASURED_DTYPES, "fp16") or (
                name == "weight_dtype" and dtype == "fp8" and device == "cuda"
            )
            if not fine:
                message = f"{m.name} has {name} {dtype}, and the kernels here run {' and '.join(MEASURED_DTYPES)}"
                out.append(Problem(f"model.{name}", f"{message}; add --dtype bf16 to calibrate it in bf16"))
        if m.is_moe and not m.gated_mlp:
            message = f"the experts of {m.name} have no gate (two matrices), and the kernels here are gated"
            out.append(Problem("model", f"{message}; calibrate another model"))
        return out


def deployment_of(scenario: Scenario) -> Deployment:
    """The deployment that a scenario describes."""
    model, p = scenario.model, scenario.parallel
    layout = Layout.of(model, scenario.cluster, p.tp, p.dp, p.ep, scenario.communication)
    slots, shape = 0, None
    if model.is_moe:
        redundant = getattr(scenario.policies.placement, "num_redundant_experts", 0)
        slots = -(-(model.num_experts + redundant) // p.ep)
        shape = ExpertPrices(model, layout, Operators(scenario.cluster.profile), slots).shape
    return Deployment(model, layout, scenario.engine, slots, shape)


def from_scenario(path: Path, overrides: Sequence[str]) -> Deployment:
    """The deployment of a scenario file with `a.b=c` overrides. Raises BadInput."""
    return deployment_of(load_scenario(path, overrides))


def from_model(name: str, parallel: Mapping[str, int], overrides: Sequence[str]) -> Deployment:
    """A deployment of a model of `workloads/models`, a model file or a Hugging Face config.json. Raises BadInput with
    what does not go together, named by option.
    """
    try:
        return deployment_of(_built({"model": name}, parallel, overrides))
    except BadInput as error:
        raise BadInput([Problem(_option(p), p.message) for p in error.problems]) from None


def default_deployments(device: str) -> list[Deployment]:
    """What is measured where no model is named: on a CPU a small MoE model, on a GPU one with few large experts and
    one with many small ones.
    """
    return [deployment_of(_built(part, {}, ())) for part in _DEFAULTS[device]]


def _built(part: Mapping[str, Any], parallel: Mapping[str, int], overrides: Sequence[str]) -> Scenario:
    """A scenario around a model, so that names, formats and layouts are checked as a scenario's are."""
    ranks = parallel.get("tp", 1) * parallel.get("dp", 1)
    data = {
        **part,
        "cluster": {"device": _STAND_IN, "nodes": -(-ranks // 8), "gpus_per_node": min(ranks, 8)},
        "parallel": dict(parallel),
        "requests": {"format": "poisson", "rate_per_s": 1.0, "num_requests": 1, "prompt_tokens": 1, "output_tokens": 1},
    }
    return scenario_from_dict(data, Path.cwd(), overrides)


def _option(problem: Problem) -> str:
    """The option that a problem of the scenario built around a model comes from."""
    if "max_num" in problem.message or "max_model_len" in problem.message:
        return "--max-batched-tokens, --max-seqs, --max-context"
    return "--parallel" if "parallel" in problem.message or "tp=" in problem.message else "--model"
