"""From what the command line says to a scenario and its traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesim.cost.routed import route_source
from moesim.errors import BadInput, Problem
from moesim.scenario.files import find_named
from moesim.scenario.load import Scenario, load_profile, load_scenario, scenario_from_dict
from moesim.traces.expert_loads import from_tokens, load_expert_loads
from moesim.workload.loads import ExpertLoads

__all__ = ["Deployment", "placement_kind", "read_loads"]


@dataclass(frozen=True, slots=True)
class Deployment:
    """cluster: a scenario file, or a device profile, which then needs a model and an EP degree. The others change what
    a scenario says; prompt_tokens, output_tokens: lengths of requests."""

    cluster: str
    model: str | None = None
    nodes: int | None = None
    tp: int | None = None
    dp: int | None = None
    ep: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    overrides: tuple[str, ...] = ()

    def scenario(self) -> Scenario:
        """The deployment as a scenario. Raises BadInput."""
        if self.cluster.endswith((".yaml", ".yml")):
            changes = {
                "model": self.model, "cluster.nodes": self.nodes, "parallel.tp": self.tp, "parallel.dp": self.dp,
                "parallel.ep": self.ep, "requests.prompt_tokens": self.prompt_tokens,
                "requests.output_tokens": self.output_tokens,
            }  # fmt: skip
            given = [f"{key}={value}" for key, value in changes.items() if value is not None]
            return load_scenario(Path(self.cluster), (*given, *self.overrides))
        missing = [name for name in ("model", "ep") if getattr(self, name) is None]
        if missing:
            told = " and ".join(f"--{name}" for name in missing)
            raise BadInput(
                Problem("--cluster", f"{self.cluster} is no scenario file, so {told} must be given beside it")
            )
        assert self.ep is not None
        tp = self.tp or 1
        dp = self.dp or max(1, self.ep // tp)
        data: dict[str, Any] = {
            "name": "explain",
            "model": self.model,
            "cluster": {"device": self.cluster, "nodes": self.nodes or 1},
            "parallel": {"tp": tp, "dp": dp, "ep": self.ep},
            "requests": {
                "format": "closed_loop",
                "concurrency": 1,
                "num_requests": 1,
                "prompt_tokens": self.prompt_tokens or 1000,
                "output_tokens": self.output_tokens or 250,
            },
        }
        return scenario_from_dict(data, Path.cwd(), [*self._enough(tp * dp), *self.overrides])

    def _enough(self, ranks: int) -> list[str]:
        """As many nodes as the ranks fill, where nobody said."""
        if self.nodes is not None:
            return []
        profile = load_profile(find_named(self.cluster, "hw_profiles", Path.cwd(), "--cluster", "device"))
        return [f"cluster.nodes={-(-ranks // profile.node.gpus_per_node)}"]


def placement_kind(scenario: Scenario, asked: str | None) -> str:
    """The placement to try: the one asked for, the scenario's own where it replicates by load, else eplb."""
    if asked is not None:
        return asked
    own = scenario.policies.placement
    replicates = hasattr(own, "num_redundant_experts") and getattr(own, "uses_traffic", True)
    return scenario.policies.kinds["placement"] if replicates else "eplb"


def read_loads(
    scenario: Scenario, dump: Path | None = None, fmt: str | None = None, steps_per_row: int | None = None
) -> ExpertLoads:
    """The recording, or the tokens of the scenario's own routing, a row for each batch of decoding requests."""
    batch = scenario.parallel.dp * scenario.engine.max_num_seqs
    steps = steps_per_row or 1
    if dump is not None:
        experts = scenario.model.num_experts or None
        return load_expert_loads(dump, fmt, tokens_per_row=batch, steps_per_row=steps, num_experts=experts)
    if not scenario.model.is_moe:
        raise BadInput(f"{scenario.model.name} is dense: it has no experts to balance", "--cluster")
    loads = from_tokens(route_source(scenario, scenario.seed)[0], batch)
    return replace(loads, steps_per_row=steps)
