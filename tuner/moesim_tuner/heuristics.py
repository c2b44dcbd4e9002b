"""What is tried first: the scenario as written, the user's own starts, the engines' defaults, the best known rules.

A rule is a row: fields and what they should be, with its source. It becomes a candidate by giving every parameter of
the space that sets one of these fields the value nearest to the row's; parameters that the row says nothing of stay as
the scenario has them. What does not fit together is tried all the same and comes out illegal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesim.scenario.fields import normal_value
from moesim.scenario.load import Scenario
from moesim.tune_spec import ParameterSpec, TuneSpec
from moesim.tune_values import Scalar, identity, label
from moesim_tuner.parameter import Parameter
from moesim_tuner.records import Candidate, Point
from moesim_tuner.space import Space
from moesim_tuner.standing import written_at

__all__ = ["ROWS", "Heuristic", "starts"]

Look = Callable[[str], Any]
"""Dotted path -> what stands there in the candidate, as far as it is made."""


@dataclass(frozen=True, slots=True)
class Heuristic:
    """fields: dotted path -> the value it should have, or a function of the scenario and of the candidate's fields so
    far (None: nothing to say). mode: of the scenarios it is for, None: both."""

    name: str
    source: str
    fields: Mapping[str, Any]
    mode: str | None = "serving"


def _large(s: Scenario) -> bool:
    """vLLM's line between devices: 70 GiB or more, and no A100."""
    return s.cluster.profile.memory_bytes >= 70 * 2**30 and "a100" not in s.cluster.profile.name.lower()


def _sglang_chunk(s: Scenario) -> int:
    gib = s.cluster.profile.memory_bytes / 2**30
    return next(chunk for below, chunk in ((35, 2048), (60, 4096), (160, 8192), (math.inf, 16384)) if gib < below)


def _gpus(s: Scenario, look: Look) -> int:
    return max(s.cluster.nodes * s.cluster.gpus_per_node // int(look("parallel.replicas") or 1), 1)


def _ranks(s: Scenario, look: Look) -> int:
    return int(look("parallel.tp") or 1) * int(look("parallel.dp") or 1)


_VLLM = "vllm/engine/arg_utils.py get_batch_defaults (API server); vllm/config/{cache,parallel}.py"
_SGLANG = "sgl-project/sglang python/sglang/srt/server_args.py, by device memory"
_TRTLLM = "NVIDIA/TensorRT-LLM tensorrt_llm/builder.py BuildConfig, tensorrt_llm/llmapi/llm_args.py KvCacheConfig"
_V3 = "DeepSeek-V3 report (arXiv 2412.19437), section 3.4.1"

ROWS: tuple[Heuristic, ...] = (
    # ---- engines as they come
    Heuristic("vllm defaults", _VLLM, {
        "engine.max_num_seqs": lambda s, look: 1024 if _large(s) else 256,
        "engine.max_num_batched_tokens": lambda s, look: 8192 if _large(s) else 2048,
        "engine.gpu_memory_utilization": 0.92,
        "engine.block_size": 16,
        "engine.cuda_graph": True,
        "policies.batching": "vllm_v1",
        "policies.placement": "contiguous",
        "policies.placement.num_redundant_experts": 0,
        "rebalance": None,
        "rebalance.interval_steps": 3000,
        "rebalance.window_steps": 1000,
        "parallel.ep": 1,
    }),
    Heuristic("sglang defaults", _SGLANG, {
        "engine.max_num_batched_tokens": lambda s, look: _sglang_chunk(s),
        "engine.gpu_memory_utilization": 0.88,
        "engine.cuda_graph": True,
        "policies.batching": "sglang",
        "policies.placement": "contiguous",
        "policies.placement.num_redundant_experts": 0,
        "rebalance": None,
        "rebalance.interval_steps": 1000,
        "rebalance.threshold": 1.0,
        "parallel.ep": 1,
    }),
    Heuristic("tensorrt-llm defaults", _TRTLLM, {
        "engine.max_num_seqs": 2048,
        "engine.max_num_batched_tokens": 8192,
        "engine.gpu_memory_utilization": 0.9,
        "policies.placement": "contiguous",
        "policies.placement.num_redundant_experts": 0,
        "parallel.ep": 1,
    }),
    # ---- parallelism
    Heuristic("ep over all ranks", _V3, {"parallel.ep": _ranks}, None),
    Heuristic("dp attention, ep over all", f"{_V3}; SGLang's large-scale EP, tp 1 for attention", {
        "parallel.tp": 1,
        "parallel.dp": _gpus,
        "parallel.ep": _gpus,
    }, None),
    Heuristic("tp inside the node", "Megatron-LM (arXiv 2104.04473), takeaway 1: tensor parallel up to the node", {
        "parallel.tp": lambda s, look: min(s.cluster.gpus_per_node, _gpus(s, look)),
        "parallel.dp": lambda s, look: max(_gpus(s, look) // s.cluster.gpus_per_node, 1),
        "parallel.ep": _gpus,
    }, None),
    # ---- placement
    Heuristic("eplb", "deepseek-ai/EPLB eplb.py, no redundant experts", {
        "policies.placement": "eplb",
        "policies.placement.num_redundant_experts": 0,
    }),
    Heuristic("eplb, one redundant expert a rank", f"{_V3}: 32 for 256 experts on 32 GPUs, one on each", {
        "policies.placement": "eplb",
        "policies.placement.num_redundant_experts": lambda s, look: look("parallel.ep"),
    }),
    Heuristic("eplb, one in eight redundant", f"{_V3}: 32 for 256 experts; EP144 decode keeps 32, too", {
        "policies.placement": "eplb",
        "policies.placement.num_redundant_experts": lambda s, look: s.model.num_experts // 8,
    }),
    Heuristic("rebalance every 3,000 steps", "vllm/config/parallel.py EPLBConfig", {
        "policies.placement": "eplb",
        "rebalance": {"interval_steps": 3000, "window_steps": 1000},
        "rebalance.interval_steps": 3000,
        "rebalance.window_steps": 1000,
        "rebalance.asynchronous": True,
    }),
    Heuristic("rebalance every 1,000 steps", "sglang server_args.py eplb_rebalance_num_iterations", {
        "policies.placement": "eplb",
        "rebalance": {"interval_steps": 1000, "window_steps": 1000},
        "rebalance.interval_steps": 1000,
        "rebalance.window_steps": 1000,
    }),
    # ---- batches
    Heuristic("chunks of 512", "Sarathi-Serve (arXiv 2403.02310), section 5: token budget for a strict SLO", {
        "engine.max_num_batched_tokens": 512,
    }),
    Heuristic("chunks of 2,048", "Sarathi-Serve (arXiv 2403.02310), section 5: token budget for a relaxed SLO", {
        "engine.max_num_batched_tokens": 2048,
    }),
    # ---- capacity
    Heuristic("capacity 1.25", "Switch (arXiv 2101.03961), section 2.2; ST-MoE (arXiv 2202.08906): training", {
        "capacity.factor": 1.25,
        "capacity.drop": "position",
    }, None),
    Heuristic("capacity 2.0", "GShard (arXiv 2006.16668); ST-MoE (arXiv 2202.08906): evaluation", {
        "capacity.factor": 2.0,
        "capacity.drop": "position",
    }, None),
    Heuristic("no drops", "MegaBlocks (arXiv 2211.15841): dropless", {"capacity.factor": None, "capacity": None}, None),
    # ---- experts between memories
    Heuristic("lru cache, next layer fetched", "Mixtral-offloading (arXiv 2312.17238): LRU and the next layer's gate", {
        "policies.offload": "cached",
        "policies.eviction": "lru",
        "policies.prefetch": "next_layer",
        "policies.prefetch.ahead": 1,
        "tiers.experts": math.inf,
        "policies.offload.slots_per_layer": math.inf,
    }),
    Heuristic("lfu cache", "MoE-Infinity (arXiv 2401.14361): the least activated expert leaves", {
        "policies.offload": "cached",
        "policies.eviction": "lfu",
        "policies.prefetch": "none",
        "tiers.experts": math.inf,
        "policies.offload.slots_per_layer": math.inf,
    }),
    Heuristic("popular experts stay, the CPU computes", "Fiddler (arXiv 2402.07033): one GPU", {
        "policies.offload": "fiddler",
        "policies.prefetch": "none",
    }),
    Heuristic("half the experts of a layer", "Mixtral-offloading (arXiv 2312.17238): offload_per_layer 4 of 8", {
        "policies.offload": "cached",
        "policies.offload.slots_per_layer": lambda s, look: s.model.num_experts // 2,
    }),
)  # fmt: skip


def starts(scenario: Scenario, space: Space, spec: TuneSpec) -> list[Candidate]:
    """What to try before any search, each point once: the scenario as written (`default`; without the parameters whose
    values are not in the space, which then stay as written), `tune.start` (`start`), and the rows that say something of
    this space (`heuristic: NAME`). All but the first are points of the space."""
    default = space.point_of(scenario.raw, scenario.resolved)
    base = space.complete(default, _near(scenario, space, default))
    found = [Candidate(default, "default")]
    for start in spec.start:
        given = {name: _value(space.named[name], spec.space[name], value) for name, value in start.items()}
        found.append(Candidate(space.complete({**base, **given}, base), "start"))
    mode = "serving" if scenario.training is None else "training"
    for row in ROWS:
        point = _applied(row, scenario, space, base) if row.mode in (None, mode) else None
        if point is not None:
            found.append(Candidate(point, f"heuristic: {row.name}"))
    seen: dict[str, Candidate] = {}
    for candidate in found:
        seen.setdefault(space.key(candidate.point), candidate)
    return list(seen.values())


def _near(scenario: Scenario, space: Space, default: Point) -> dict[str, Scalar]:
    """Values nearest to the scenario's, for parameters whose values are not in the space."""
    out: dict[str, Scalar] = {}
    for p in space.parameters:
        if p.name not in default:
            try:
                out[p.name] = p.nearest(written_at(p.name, scenario.raw, scenario.resolved))
            except ValueError:
                continue
    return out


def _value(p: Parameter, spec: ParameterSpec, given: Any) -> Scalar:
    """What a start names: the value, or the one choice of that kind."""
    if p.values is None:
        return p.nearest(given)
    matching = spec.matching([given])
    return matching[0] if matching else p.own(label(given))


def _applied(row: Heuristic, scenario: Scenario, space: Space, base: Point) -> dict[str, Scalar] | None:
    """The point of a row: `base` with every parameter the row speaks of at its nearest value. None: of none."""
    fields: dict[str, Any] = {}
    point: dict[str, Scalar] = {}
    spoken = False

    def look(path: str) -> Any:
        return fields[path] if path in fields else written_at(path, scenario.raw, scenario.resolved)

    for p in space.parameters:
        if p not in space.active(point):
            continue
        value = _choice(p, row, scenario, look, base.get(p.name))
        spoken = spoken or value is not None
        point[p.name] = value[0] if value is not None else space.complete({**base, **point}, base)[p.name]
        fields |= p.fields(point[p.name])
    return point if spoken else None


def _choice(p: Parameter, row: Heuristic, scenario: Scenario, look: Look, usual: Any) -> tuple[Scalar] | None:
    """The value of `p` (in a tuple) whose fields are nearest to the row's; of equals the one that moves fewest fields.
    None where the row says nothing of its fields, or wants what no value is."""

    def wanted(path: str, fields: Mapping[str, Any]) -> Any:
        want = row.fields[path]
        return want(scenario, lambda at: fields[at] if at in fields else look(at)) if callable(want) else want

    if p.values is None:
        if p.name not in row.fields:
            return None
        want = wanted(p.name, {})
        if isinstance(want, bool) or not isinstance(want, int | float):
            return None
        return (p.nearest(min(max(want, p.low), p.high)),)
    best: tuple[float, int, bool, Scalar] | None = None
    for value in p.values:
        fields = dict(_leaves(p.fields(value)))
        gaps = [_gap(fields[path], wanted(path, fields)) for path in fields if path in row.fields]
        if not gaps or any(gap is None for gap in gaps):
            continue
        moved = sum(_gap(v, look(path)) != 0 for path, v in fields.items())
        far = (sum(gap for gap in gaps if gap is not None), moved, identity(value) != identity(usual), value)
        if best is None or far[:3] < best[:3]:
            best = far
    return None if best is None else (best[3],)


def _leaves(fields: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Paths and values, a policy's kind at the policy's own path and its parameters below."""
    for path, value in fields.items():
        if path.startswith("policies.") and path.count(".") == 1:
            yield path, value.get("kind") if isinstance(value, Mapping) else value
            if isinstance(value, Mapping):
                yield from ((f"{path}.{key}", inner) for key, inner in value.items() if key != "kind")
        elif isinstance(value, Mapping):
            yield path, dict(value)
            yield from _leaves({f"{path}.{key}": inner for key, inner in value.items()})
        else:
            yield path, normal_value(path, value) if isinstance(value, str) and "." in path else value


def _gap(value: Any, want: Any) -> float | None:
    """How far a value is from what is wanted: by ratio where both are above 0; None where they cannot be compared and
    differ. Of a mapping only what is said to be wanted counts."""
    if isinstance(want, Mapping) and isinstance(value, Mapping):
        gaps = [_gap(value[key], want[key]) for key in want if key in value]
        return None if any(gap is None for gap in gaps) else sum(gap for gap in gaps if gap is not None)
    number = [isinstance(v, int | float) and not isinstance(v, bool) for v in (value, want)]
    if all(number):
        if want == math.inf:
            return -float(value)
        return abs(math.log(value / want)) if value > 0 and want > 0 else float(abs(value - want))
    return 0.0 if value == want and number[0] == number[1] else None
