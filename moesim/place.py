"""`moesim place`: a placement fitted to the first part of a recording, scored on the rest, and written for engines.

Scores, bounds and objectives: `moesim.place_scores`.

Legend as in `moesim.placement`; S rows of a recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cost.operators import Operators
from moesim.cost.placing import placement_costs, token_sample
from moesim.errors import BadInput, Problem
from moesim.exports import Emitted, Target, emit, load_map
from moesim.exports.apart import keep_apart
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.place_scores import Aim, Score, Solution, aim, by_groups, gap, place_by, score, total_bound
from moesim.placement import Placement, PlacementContext, PlacementCosts, initial_map
from moesim.policy import load_policy
from moesim.results import json_text, write_texts
from moesim.scenario.files import find_named
from moesim.scenario.load import Scenario, load_model, load_scenario
from moesim.scenario.yamlio import parse_yaml
from moesim.traces.expert_loads import load_expert_loads
from moesim.workload.loads import ExpertLoads
from moesim.workload.requests import build_requests

__all__ = ["MARKER", "Ask", "Placed", "check_options", "place", "render", "write"]

MARKER = "placement.json"
"""the report beside the engines' files"""


@dataclass(frozen=True)
class Ask:
    """What is asked for, as on the command line. ep None: that of `cluster`, a scenario. current: an engine's map that
    is in use, to compare with. score_on: another recording to score on, in place of a part of `dump`. held_out: share
    of the rows that is not fitted to, None: half of them where there are two, else nothing. interval, window: steps
    between rebalances and steps whose counts they use, of engines that make maps themselves; None: theirs."""

    dump: Path
    ep: int | None = None
    fmt: str | None = None
    model: str | None = None
    nodes: int | None = None
    cluster: Path | None = None
    policy: str = "eplb_swap"
    parameters: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    current: Path | None = None
    score_on: Path | None = None
    held_out: float | None = None
    tokens_per_row: int = 4096
    interval: int | None = None
    window: int | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Placed:
    """The placement, and what it is worth. before: what engines start with (`before_name`). held_out: (before, after)
    on the rows that were not fitted to, None where nothing was held out. bound: no map of as many slots (`grouped`: and
    with every expert group on a node) has a lower `of_total` on the fitted rows, on those held out, whatever it is
    fitted to. aim: the policy's own objective, if it states one. solution: what its solver said, if it has one."""

    loads: ExpertLoads
    placement: Placement
    target: Target
    kind: str
    parameters: dict[str, Any]
    context: PlacementContext
    before_name: str
    fitted_rows: int
    scored_rows: int
    scored_source: str
    fitted: tuple[Score, Score]
    held_out: tuple[Score, Score] | None
    bound: tuple[float, float | None]
    grouped: bool
    aim: Aim | None
    solution: Solution | None
    warnings: tuple[str, ...]

    def to_json(self, emitted: Sequence[Emitted] = ()) -> dict[str, Any]:
        """The report."""
        loads, placement = self.loads, self.placement
        pairs = {"fitted": self.fitted, "held_out": self.held_out}
        bounds = dict(zip(pairs, self.bound, strict=True))
        scores = {
            name: None
            if pair is None
            else {
                "before": pair[0].to_json(),
                "after": pair[1].to_json(),
                "bound_of_total": round(bounds[name] or 1.0, 6),
                "gap_of_total": round(gap(pair[1].of_total, bounds[name] or 1.0), 6),
            }
            for name, pair in pairs.items()
        }
        return {
            "schema_version": 1,
            "recording": {
                "source": loads.source,
                "rows": loads.num_rows,
                "rows_fitted": self.fitted_rows,
                "rows_scored": self.scored_rows,
                "scored_source": self.scored_source,
                "layers": loads.num_layers,
                "experts": loads.num_experts,
                "in_time_order": loads.ordered,
                "tokens_per_step": loads.tokens_per_step,
            },
            "policy": {"kind": self.kind, **self.parameters},
            "ranks": placement.num_ranks,
            "nodes": self.context.num_nodes,
            "slots": placement.num_slots,
            "redundant_experts": self.target.redundant,
            "before": self.before_name,
            "held_out": scores["held_out"],
            "fitted": scores["fitted"],
            "bound_keeps_groups_on_nodes": self.grouped,
            "objective": None if self.aim is None else self.aim.to_json(),
            "solver": None if self.solution is None else _solver(self.solution),
            "files": [
                {"engine": e.engine, "file": e.file, "command": e.command, "notes": list(e.notes)} for e in emitted
            ],
            "warnings": list(self.warnings),
        }


def _before(
    ask: Ask, loads: ExpertLoads, model: MoEModel | None, context: PlacementContext, slots: int
) -> tuple[Placement, str]:
    """The map in use, or what engines start with: experts in order without replicas or, where ranks do not divide them,
    in order with as many replicas as the placement has."""
    experts, ranks = loads.num_experts, context.num_ranks
    if ask.current is not None:
        assert loads.layer_index is not None
        moe_layers = loads.layer_index if model is None else model.moe_layers
        return load_map(ask.current, experts, ranks, loads.layer_index, moe_layers), f"as in {ask.current.name}"
    if experts % ranks == 0:
        return context.placement(np.tile(initial_map(experts, experts), (loads.num_layers, 1)), experts), "in order"
    slots = max(slots, experts + -experts % ranks)
    table = np.tile(initial_map(experts, slots), (loads.num_layers, 1))
    return context.placement(table, experts), f"in order, {slots - experts} replicas"


def _solver(solution: Solution) -> dict[str, float | str]:
    """What the solver said, as JSON."""
    numbers = {name: round(float(getattr(solution, name)), 9) for name in ("objective", "bound", "gap")}
    return {**numbers, "status": solution.status}


# --------------------------------------------------------------------------------------------------------- placement


def place(ask: Ask) -> Placed:
    """Read the recording, fit, score. Raises BadInput with what cannot be read, does not agree, or is not legal."""
    scenario = None if ask.cluster is None else load_scenario(ask.cluster)
    model, name = _model(ask, scenario)
    loads = _recording(ask, ask.dump, model)
    warnings = list(loads.warnings) + ([] if scenario is None else list(scenario.warnings))
    layer_index = loads.layer_index
    assert layer_index is not None
    fit, rest = _parts(ask, loads, model)
    context = _context(ask, scenario, model, fit)
    if scenario is not None and context.costs is None:
        warnings.append(
            f"{scenario.name} serves {scenario.model.name} on ep {scenario.parallel.ep}: what experts cost here is not"
            " known to the policy."
        )
    if model is None:
        warnings.append("no model is named: expert groups are taken as one. Give --model where it routes by groups.")
    kind, parameters = _policy(ask)
    policy = load_policy("placement", {"kind": kind, **parameters}, "--policy")
    placement, solution = place_by(policy, fit, context)
    grouped = by_groups(policy, loads.num_experts, placement.num_slots, context)
    if "vllm-ascend" in ask.engines:
        placement, moved = keep_apart(placement, fit.total_LE)
        if moved:
            grouped = False
            warnings.append(f"{moved} slots changed places, so that no rank holds an expert twice (vllm-ascend).")
    before, before_name = _before(ask, loads, model, context, placement.num_slots)
    complete, numbers, note = _complete(placement, layer_index, model)
    if note:
        warnings.append(note)
    if rest is not None and ask.score_on is None and not loads.ordered:
        warnings.append("rows are not in time order: the held-out rows are others, not later ones.")
    layers = model.num_layers if model is not None else loads.model_layers
    return Placed(
        loads=loads,
        placement=placement,
        target=Target(complete, numbers, layers, name, ask.interval, ask.window),
        kind=kind,
        parameters=parameters,
        context=context,
        before_name=before_name,
        fitted_rows=fit.num_rows,
        scored_rows=0 if rest is None else rest.num_rows,
        scored_source="" if rest is None else rest.source,
        fitted=(score(before, fit), score(placement, fit)),
        held_out=None if rest is None else (score(before, rest), score(placement, rest)),
        bound=(
            total_bound(placement, fit, context, grouped),
            None if rest is None else total_bound(placement, rest, context, grouped),
        ),
        grouped=grouped,
        aim=aim(policy, placement, fit, context, solution),
        solution=solution,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _model(ask: Ask, scenario: Scenario | None) -> tuple[MoEModel | None, str]:
    """The model, and what to call it; None where nobody named one."""
    if ask.model is not None:
        return load_model(find_named(ask.model, "workloads/models", Path(), "--model", "model")), ask.model
    return (None, "MODEL") if scenario is None else (scenario.model, scenario.model.name)


def _recording(ask: Ask, path: Path, model: MoEModel | None) -> ExpertLoads:
    """A recording whose layers have the model's numbers."""
    experts = None if model is None else model.num_experts
    fmt = ask.fmt if path == ask.dump else None
    loads = load_expert_loads(path, fmt, tokens_per_row=ask.tokens_per_row, num_experts=experts)
    return replace(loads, layer_index=_agree(loads, model))


def _agree(loads: ExpertLoads, model: MoEModel | None) -> tuple[int, ...]:
    """The recorded layers' numbers in the model (0, 1, ... where neither says). Raises BadInput where they disagree."""
    if model is None:
        return loads.layer_index or tuple(range(loads.num_layers))
    if not model.is_moe or loads.num_experts != model.num_experts:
        raise BadInput(f"{loads.source} has {loads.num_experts} experts, {model.name} {model.num_experts}", "--model")
    if loads.model_layers and loads.model_layers != model.num_layers:
        raise BadInput(f"{loads.source} has {loads.model_layers} layers, {model.name} {model.num_layers}", "--model")
    if loads.layer_index is None:
        if loads.num_layers != len(model.moe_layers):
            raise BadInput(
                f"{loads.source} has {loads.num_layers} layers without numbers, {model.name} {len(model.moe_layers)}"
                " MoE layers. Name the model it was recorded on",
                "--model",
            )
        return tuple(model.moe_layers)
    strange = sorted(set(loads.layer_index) - set(model.moe_layers))
    if strange:
        raise BadInput(f"layer {strange[0]} of {loads.source} is no MoE layer of {model.name}", "--model")
    return loads.layer_index


def _parts(ask: Ask, loads: ExpertLoads, model: MoEModel | None) -> tuple[ExpertLoads, ExpertLoads | None]:
    """What is fitted to, and what is scored: another recording, or the rows held out of this one."""
    held_out = ask.held_out
    if ask.score_on is not None:
        if held_out is not None:
            raise BadInput("the other recording is what is held out; leave --held-out out", "--score-on")
        other = _recording(ask, ask.score_on, model)
        if other.num_experts != loads.num_experts or other.layer_index != loads.layer_index:
            raise BadInput(
                f"{other.source} has {other.num_layers} layers of {other.num_experts} experts, {loads.source}"
                f" {loads.num_layers} of {loads.num_experts}, or others of the model; they are of one model",
                "--score-on",
            )
        return loads, other
    if held_out is None:
        held_out = 0.5 if loads.num_rows > 1 else 0.0
    if not 0 <= held_out < 1:
        raise BadInput(f"a share from 0 to below 1 is needed, got {held_out}", "--held-out")
    return (loads, None) if held_out == 0 else loads.split(1 - held_out)


def _context(ask: Ask, scenario: Scenario | None, model: MoEModel | None, fit: ExpertLoads) -> PlacementContext:
    """What the policy is told: ranks and nodes as asked for, tokens of the fitted part, costs in the scenario."""
    ep = ask.ep if ask.ep is not None else None if scenario is None else scenario.parallel.ep
    if ep is None:
        raise BadInput("how many ranks? Give --ep, or a scenario by --cluster", "--ep")
    nodes, costs = ask.nodes or 1, None
    rank_to_node: tuple[int, ...] = ()
    if scenario is not None:
        if ask.nodes is None:
            each = scenario.cluster.gpus_per_node
            nodes, rank_to_node = -(-ep // each), tuple(rank // each for rank in range(ep))
        costs = _costs(scenario, model, ep)
    return PlacementContext(
        num_ranks=ep,
        num_nodes=nodes,
        num_groups=1 if model is None else model.num_expert_groups,
        rank_to_node=rank_to_node,
        sample=None if fit.tokens is None else token_sample(fit.tokens),
        costs=costs,
        seed=ask.seed,
    )


def _costs(scenario: Scenario, model: MoEModel | None, ep: int) -> PlacementCosts | None:
    """What experts cost in the scenario, where it is a serving run of this model on as many ranks."""
    parallel = scenario.parallel
    if model is None or model.name != scenario.model.name or ep != parallel.ep or scenario.requests is None:
        return None
    stream = build_requests(scenario.requests, scenario.base, scenario.seed)
    mean_tokens = float(stream.prompt_tokens.mean()), float(stream.output_tokens.mean())
    degrees = (parallel.tp, parallel.dp, parallel.ep)
    layout = Layout.of(model, scenario.cluster, *degrees, scenario.communication)
    ops = Operators(scenario.cluster.profile, scenario.engine.cuda_graph)
    return placement_costs(model, scenario.cluster, layout, scenario.engine, ops, mean_tokens)


def _policy(ask: Ask) -> tuple[str, dict[str, Any]]:
    """Kind and parameters: `--policy KIND` or `--policy "{kind: KIND, ...}"`, and each `--set KEY=VALUE`."""
    value, _ = parse_yaml(ask.policy, "--policy")
    parameters: dict[str, Any] = dict(value) if isinstance(value, dict) else {"kind": value}
    for given in ask.parameters:
        key, equals, text = given.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"KEY=VALUE is needed, such as num_redundant_experts=32, got {given!r}", "--set")
        parameters[key.strip()] = parse_yaml(text, f"--set {key.strip()}")[0]
    kind = parameters.pop("kind", None)
    if not isinstance(kind, str):
        raise BadInput("the name of a placement is needed, such as eplb", "--policy")
    return kind, parameters


def _complete(
    placement: Placement, layer_index: tuple[int, ...], model: MoEModel | None
) -> tuple[Placement, tuple[int, ...], str]:
    """The placement of all MoE layers of the model: those without a record get the engines' initial map."""
    missing = [] if model is None else sorted(set(model.moe_layers) - set(layer_index))
    if not missing:
        return placement, layer_index, ""
    numbers = tuple(sorted({*layer_index, *missing}))
    table = np.tile(initial_map(placement.num_experts, placement.num_slots), (len(numbers), 1))
    table[[numbers.index(i) for i in layer_index]] = placement.slot_to_expert_LS
    whole = Placement(table, placement.num_experts, placement.num_ranks, placement.rank_to_node)
    return whole, numbers, f"{len(missing)} MoE layers are not in the recording: files give them experts in order."


# ----------------------------------------------------------------------------------------------------------- output


def write(placed: Placed, engines: Sequence[str], out: Path) -> tuple[Emitted, ...]:
    """Write the engines' files and the report into the folder `out`, whole or not at all.

    Raises BadInput where an engine cannot express the placement, and where the folder cannot be written.
    """
    emitted = emit(placed.target, engines, str(out))
    files = {e.file: e.text for e in emitted} | {MARKER: json_text(placed.to_json(emitted))}
    write_texts(out, files, MARKER)
    return emitted


def render(placed: Placed, emitted: Sequence[Emitted] = ()) -> str:
    """The summary on screen: held-out figures first."""
    loads, placement = placed.loads, placed.placement
    parameters = "".join(f", {key} {value}" for key, value in placed.parameters.items())
    lines = [
        f"{placed.kind}{parameters}: {loads.num_layers} layers of {loads.num_experts} experts in {placement.num_slots}"
        f" slots on {placement.num_ranks} ranks, {_nodes(placed.context.num_nodes)} ({placement.slots_per_rank} a rank,"
        f" {placed.target.redundant} redundant)",
        f"fitted to {placed.fitted_rows} of {loads.num_rows} rows of {loads.source}"
        + (f", scored on {placed.scored_rows} of {placed.scored_source}" if placed.held_out else ""),
        "",
        f"{'largest over mean load of a rank':<33} {'before':>14} {'after':>8}",
    ]
    if placed.held_out is None:
        lines.append("  held out: nothing, so what it is worth on other traffic is not known")
    else:
        bound = placed.bound[1] or 1.0
        lines += _rows("held out", placed.held_out, f"proven bound {bound:.3f}", placed.scored_rows)
    over = gap(placed.fitted[1].of_total, placed.bound[0])
    known = f"proven bound {placed.bound[0]:.3f}, gap {over:.2%}"
    lines += _rows("fitted", placed.fitted, known, placed.fitted_rows)
    if placed.grouped:
        lines.append("proven bound: of maps that keep every expert group on a node")
    if placed.aim is not None:
        lines.append(f"what {placed.kind} makes small, on the fitted rows: {placed.aim}")
    if placed.solution is not None:
        lines.append(f"solver: {placed.solution}")
    lines.append(f"before: experts {placed.before_name}. The fitted rows are those it was made for: no claim.")
    for one in emitted:
        lines += ["", f"{one.engine}: {one.file}", *(f"  {line}" for line in one.command.splitlines())]
        lines += [f"  note: {note}" for note in one.notes]
    return "\n".join(lines) + "\n"


def _nodes(number: int) -> str:
    return f"{number} node" + ("s" if number != 1 else "")


def _rows(name: str, pair: tuple[Score, Score], known: str, number: int) -> list[str]:
    before, after = pair
    rows = [
        ("each step", before.of_steps, after.of_steps),
        ("in lockstep", before.lockstep, after.lockstep),
        ("all steps together", before.of_total, after.of_total),
    ]
    lines = [f"  {f'{name}, {what}':<31} {b:14.3f} {a:8.3f}" for what, b, a in rows]
    lines[-1] += f"   ({known})"
    if before.crossings is not None and after.crossings is not None:
        lines.append(f"  {name + ', leaving the rank':<31} {before.crossings:14.1%} {after.crossings:8.1%}")
    return lines if number > 1 else lines[len(rows) - 1 :]


def check_options(ask: Ask, out: Path | None) -> None:
    """Raises BadInput for options that do not go together."""
    if out is not None and not ask.engines:
        raise BadInput(Problem("--out", "which engines' files? --emit sglang,trtllm,vllm,vllm-ascend"))
    for option, value in (("--interval", ask.interval), ("--window", ask.window)):
        if value is not None and "vllm" not in ask.engines:
            raise BadInput(Problem(option, "it goes into vLLM's --eplb-config: add vllm to --emit"))
