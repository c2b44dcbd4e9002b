"""What memory tiers ask of a scenario. Each message: the rule, the facts, the mend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moesim.errors import Problem
from moesim.hardware import Cluster
from moesim.model import MoEModel
from moesim.scenario.yamlio import YamlPath
from moesim.tiers_spec import TiersSpec

__all__ = ["TIER_POLICIES", "tier_checks"]

_Where = Callable[[YamlPath], str]

TIER_POLICIES = {
    "eviction": "lru", "prefetch": "none", "precision": "none", "rebatching": "none", "rerouting": "none"
}  # fmt: skip
"""Keys of `policies` that decide something only where there are tiers, and what is written where there are none."""


def tier_checks(
    where: _Where, model: MoEModel, cluster: Cluster, spec: Any, policies: Any, written: Mapping[str, Any]
) -> list[Problem]:
    """Disagreements of `tiers` and its policies with each other and the rest. spec: the whole `ScenarioSpec`. policies:
    `Policies`, or None where they could not be read. written: `policies` as the file has it."""
    kinds = {} if policies is None else policies.kinds
    offload = kinds.get("offload", "none")
    if spec.tiers is None:
        return _without(where, offload, kinds, written)
    if not model.is_moe:
        told = f"tiers: {model.name} is a dense model and has no experts to keep elsewhere; remove tiers"
        return [Problem(where(("tiers",)), told)]
    problems = []
    if policies is not None and offload == "none":
        told = (
            "tiers: policies.offload says which experts stay on the device, and it is none. Set it to cached, or "
            "remove tiers"
        )
        problems.append(Problem(where(("policies", "offload") if "offload" in written else ("tiers",)), told))
    problems += _sizes(where, cluster, spec.tiers)
    problems += _layout(where, cluster, spec)
    problems += _model(where, model)
    if policies is not None:
        problems += _policies(where, policies)
        problems += _apart(where, policies.kinds, spec.parallel)
    return problems


def _without(where: _Where, offload: str, kinds: Mapping[str, str], written: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if offload != "none":
        told = (
            f"policies.offload {offload} moves experts between memories, and nothing says how much there is of each. "
            "Add tiers (tiers: {kv_tokens: 8192} gives experts what that much KV cache leaves), or set it to none"
        )
        problems.append(Problem(where(("policies", "offload")), told))
        return problems
    for key, idle in TIER_POLICIES.items():
        if key in written and kinds.get(key, idle) != idle:
            told = (
                f"policies.{key} {kinds[key]} decides nothing while all experts stay on the device. Add tiers and "
                "policies.offload, or remove it"
            )
            problems.append(Problem(where(("policies", key)), told))
    return problems


def _sizes(where: _Where, cluster: Cluster, tiers: TiersSpec) -> list[Problem]:
    problems = []
    memory = cluster.profile.memory_bytes
    if tiers.vram is not None and tiers.vram * 2**30 > memory:
        told = (
            f"tiers.vram must not exceed the device's memory: {tiers.vram:g} GiB > {memory / 2**30:g} GiB of "
            f"{cluster.profile.name}. Lower it"
        )
        problems.append(Problem(where(("tiers", "vram")), told))
    host = cluster.node.host_memory_bytes
    if tiers.dram is not None and tiers.dram * 2**30 > host:
        told = (
            f"tiers.dram must not exceed the node's memory: {tiers.dram:g} GiB > {host / 2**30:g} GiB. Lower it or set "
            "cluster.host_memory_gib"
        )
        problems.append(Problem(where(("tiers", "dram")), told))
    if tiers.experts == "rest" and tiers.kv_tokens is None:
        told = (
            "tiers: experts and KV cache divide the device's memory, and nothing says how. Give kv_tokens (tokens to "
            "keep room for; experts get the rest) or experts (KV gets the rest)"
        )
        problems.append(Problem(where(("tiers",)), told))
    if tiers.cpu.cores is not None and tiers.cpu.cores > cluster.node.cpu_cores:
        told = f"tiers.cpu.cores must not exceed the node's: {tiers.cpu.cores} > {cluster.node.cpu_cores}. Lower it"
        problems.append(Problem(where(("tiers", "cpu", "cores")), told))
    return problems


def _layout(where: _Where, cluster: Cluster, spec: Any) -> list[Problem]:
    problems = []
    p = spec.parallel

    def refuse(path: YamlPath, message: str) -> None:
        problems.append(Problem(where(path), message))

    if p.dp > 1:
        refuse(
            ("parallel", "dp"),
            f"tiers with attention data parallelism are not simulated yet: dp={p.dp}. Use dp 1, and tp or replicas",
        )
    elif p.ep not in (1, p.tp):
        refuse(
            ("parallel", "ep"),
            f"with tiers experts are whole on one rank each (ep = tp) or split over all of them (ep = 1): ep={p.ep}, "
            f"tp={p.tp}. Use ep 1 or {p.tp}",
        )
    if p.tp > cluster.gpus_per_node:
        refuse(
            ("parallel", "tp"),
            f"tiers are those of one node, so a replica must fit in one: tp={p.tp}, gpus_per_node="
            f"{cluster.gpus_per_node}. Lower tp",
        )
    if spec.rebalance is not None:
        refuse(("rebalance",), "rebalance: experts that tiers move are not moved between ranks, too; remove rebalance")
    if spec.capacity is not None:
        refuse(("capacity",), "capacity: a capacity of experts under tiers is not simulated yet; remove capacity")
    if spec.routing.fidelity == "count":
        refuse(
            ("routing", "fidelity"),
            "routing.fidelity: what a cache holds depends on which experts tokens take, so tiers need fidelity token. "
            "Set it to token or auto",
        )
    return problems


def _model(where: _Where, model: MoEModel) -> list[Problem]:
    shapes = {
        "layers that go through their experts more than once (iterations)": model.moe_iterations > 1,
        "layers that share experts (pool_layers)": model.pool_layers > 1,
        "experts of different sizes (expert_widths)": bool(model.expert_widths),
        "experts read once for every token (expert_execution token_centric)": model.expert_execution == "token_centric",
    }
    found = [name for name, has in shapes.items() if has]
    return [
        Problem(where(("model",)), f"tiers: {name} are not simulated with tiers yet; remove tiers") for name in found
    ]


def _policies(where: _Where, policies: Any) -> list[Problem]:
    problems = []

    def refuse(key: str, message: str) -> None:
        problems.append(Problem(where(("policies", key)), message))

    place, kinds = policies.placement, policies.kinds
    if (
        getattr(place, "num_redundant_experts", 0)
        or getattr(place, "chooses_slots", False)
        or getattr(place, "uneven", False)
    ):
        refuse(
            "placement",
            f"policies.placement: with tiers every expert has one home, and {kinds['placement']} makes copies or "
            "uneven slots. Set num_redundant_experts to 0, or use contiguous",
        )
    if getattr(policies.dispatch, "couples", False):
        refuse(
            "dispatch",
            f"policies.dispatch {kinds['dispatch']} plans whole batches, which is not simulated with tiers yet. Use "
            "local_first",
        )
    if getattr(policies.routing, "ideal", False):
        refuse("routing", "policies.routing: balanced loads name no experts, and a cache is about which; remove it")
    elif getattr(policies.routing, "couples", False):
        refuse(
            "routing",
            f"policies.routing {kinds.get('routing', '')} routes whole batches, which is not simulated with tiers yet. "
            "Use one that looks at single tokens",
        )
    if getattr(policies.eviction, "knows_future", False):
        refuse(
            "eviction",
            f"policies.eviction {kinds['eviction']} knows the look-ups to come, which no engine does. Use another one: "
            "the result of every run holds its distance to this bound",
        )
    return problems


def _apart(where: _Where, kinds: Mapping[str, str], parallel: Any) -> list[Problem]:
    """What looks at all experts of a layer cannot be asked by ranks that hold some of them each."""
    if parallel.ep == 1:
        return []
    return [
        Problem(
            where(("policies", key)),
            f"policies.{key} {kinds[key]} looks at all experts of a layer, and with ep={parallel.ep} each rank holds "
            f"some. Set parallel.ep to 1 (experts split over all ranks), or policies.{key} to none",
        )
        for key in ("precision", "rerouting")
        if kinds.get(key, "none") != "none"
    ]
