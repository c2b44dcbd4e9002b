"""A scenario file becomes a frozen `Scenario`, or one BadInput that lists everything wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moesim.batching import BatchingPolicy
from moesim.communication_spec import CommunicationSpec
from moesim.engine_spec import EngineSpec
from moesim.errors import BadInput, Problem
from moesim.hardware import Cluster, ClusterSpec, DeviceProfile, ProfileSpec
from moesim.model import ModelSpec, MoEModel, read_hf_config
from moesim.model_changes import ModelChanges, change_model
from moesim.offload import (
    EvictionPolicy,
    OffloadPolicy,
    PrecisionPolicy,
    PrefetchPolicy,
    RebatchingPolicy,
    ReroutingPolicy,
)
from moesim.placement import PlacementPolicy
from moesim.policy import load_policy, policy_class, policy_kinds, spec_problems
from moesim.rebalance_spec import RebalanceSpec
from moesim.reuse import file_key, reused
from moesim.routing.capacity import CapacitySpec
from moesim.scenario.checks import (
    communication_checks,
    cross_checks,
    overlap_checks,
    serving_checks,
    training_checks,
)
from moesim.scenario.fields import FAMILY_KEYS
from moesim.scenario.files import NAME, content_hash, find_named, profile_hash, shown
from moesim.scenario.presets import Preset, apply_preset, presets
from moesim.scenario.source import Source, rebase
from moesim.scenario.spec import (
    NOT_YET,
    ONLY_SERVING,
    SERVING_POLICIES,
    ModelRef,
    ParallelSpec,
    PlacementFromSpec,
    PoliciesSpec,
    ScenarioSpec,
    SloSpec,
)
from moesim.scenario.tier_checks import TIER_POLICIES, tier_checks
from moesim.scenario.tune_checks import tune_checks
from moesim.scenario.yamlio import Marks, YamlPath, load_yaml, parse_yaml
from moesim.spec import Spec
from moesim.tiers_spec import TiersSpec
from moesim.training_spec import TrainingSpec
from moesim.tune_spec import TuneSpec
from moesim.workload.requests import RequestsSpec
from moesim.workload.routing import RoutingSpec

__all__ = [
    "Policies",
    "Scenario",
    "load_model",
    "load_profile",
    "load_scenario",
    "load_scenario_text",
    "scenario_from_dict",
    "scenario_schema",
]


@dataclass(frozen=True, slots=True)
class Policies:
    """An instance of each family; `kinds` has their names."""

    routing: Any
    placement: PlacementPolicy
    dispatch: Any
    offload: OffloadPolicy
    eviction: EvictionPolicy
    prefetch: PrefetchPolicy
    precision: PrecisionPolicy
    rebatching: RebatchingPolicy
    rerouting: ReroutingPolicy
    batching: BatchingPolicy
    balancer: Any
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """Everything `simulate` needs. `base`: the folder that relative paths are named from. A serving scenario has
    `requests`, a training scenario `training`.

    raw: the mapping as written, with overrides, name and seed in it: what `scenario.yaml` of the results
    says. resolved: the same with every default, models and files by their content; `hash` is over its
    canonical JSON, so it does not depend on where files lie.
    """

    name: str
    seed: int
    model: MoEModel
    cluster: Cluster
    parallel: ParallelSpec
    requests: RequestsSpec | None
    training: TrainingSpec | None
    routing: RoutingSpec
    policies: Policies
    engine: EngineSpec
    slo: SloSpec | None
    base: Path
    raw: dict[str, Any]
    resolved: dict[str, Any]
    hash: str
    warnings: tuple[str, ...] = ()
    capacity: CapacitySpec | None = None
    placement_from: PlacementFromSpec | None = None
    communication: CommunicationSpec = field(default_factory=CommunicationSpec)
    rebalance: RebalanceSpec | None = None
    tiers: TiersSpec | None = None
    tune: TuneSpec | None = None
    """what `moesim tune` searches; no result depends on it"""
    cpu: DeviceProfile | None = None
    """the profile that `tiers.cpu.profile` names"""


def load_scenario(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Scenario:
    """Read `path`, apply `a.b=c` overrides and `seed`, check it all. Raises BadInput with every problem."""
    path = Path(path)
    data, marks = load_yaml(path)
    return _load(Source(data, marks), path.parent, path.stem, overrides, seed)


def load_scenario_text(
    text: str, base: Path, overrides: Sequence[str] = (), seed: int | None = None, name: str = "scenario"
) -> Scenario:
    """`load_scenario` of YAML text; relative paths are named from `base`."""
    data, marks = parse_yaml(text, f"{name}.yaml")
    return _load(Source(data, marks), base, name, overrides, seed)


def scenario_from_dict(
    data: Mapping[str, Any], base: Path, overrides: Sequence[str] = (), seed: int | None = None
) -> Scenario:
    """`load_scenario` of a mapping that is already in memory."""
    copied = json.loads(json.dumps(data, allow_nan=False))
    return _load(Source(copied, Marks("scenario")), base, "scenario", overrides, seed)


def _load(source: Source, base: Path, stem: str, overrides: Sequence[str], seed: int | None) -> Scenario:
    source.override(tuple(overrides))
    _rebase_overrides(source, base)
    if seed is not None:
        source.override((f"seed={seed}",))
    if source.data.get("name") is None:
        source.data["name"] = stem if NAME.fullmatch(stem) else "scenario"
    raw = json.loads(json.dumps(source.data))
    problems = _not_yet(source)
    training = _one_mode(source, problems)
    empty = [k for k, v in source.data.items() if v is None]
    for key in empty:
        del source.data[key]  # `engine:` with nothing under it says nothing, but for `capacity:` beside a preset's
    preset = apply_preset(source, problems, empty)
    spec = _validate(source, problems)
    policies = _policies(source, spec.policies, problems) if spec.policies is not None else None
    model, model_file = _find_model(source, spec.model, base, problems)
    cluster, profile_hash = _find_cluster(source, spec.cluster, base, problems)
    files = _input_files(source, spec, base, problems)
    cpu, cpu_hash = _find_cpu(source, spec.full, base, problems)
    if model is not None and cluster is not None and spec.parallel is not None:
        problems += _disagreements(source, spec, spec.parallel, model, cluster, policies, training)
    problems += tune_checks(source, spec.tune, base, training)
    if problems:
        raise BadInput(_sorted(problems))
    assert model is not None
    assert cluster is not None
    assert policies is not None
    assert spec.full is not None
    if policies.routing is None:
        kind = "grouped_topk" if model.num_expert_groups > 1 else "topk"
        policies = dataclasses.replace(
            policies, routing=load_policy("routing", kind), kinds={**policies.kinds, "routing": kind}
        )
    elif preset is not None:
        policies = dataclasses.replace(policies, kinds={**policies.kinds, "routing": preset.name})
    if training:
        kinds = {key: kind for key, kind in policies.kinds.items() if key not in SERVING_POLICIES}
        policies = dataclasses.replace(policies, kinds=kinds)
    elif spec.full.tiers is None:  # nothing for them to decide
        kinds = {key: kind for key, kind in policies.kinds.items() if key not in TIER_POLICIES}
        policies = dataclasses.replace(policies, kinds=kinds)
    resolved = _resolved(spec.full, model, policies, files)
    resolved["cluster"]["device"] = {"name": cluster.profile.name, "blake2b": profile_hash}
    resolved["model"]["file"] = model_file.name if model_file else ""
    if cpu is not None:
        resolved["tiers"]["cpu"]["profile"] = {"name": cpu.name, "blake2b": cpu_hash}
    canonical = json.dumps(resolved, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return Scenario(
        name=spec.full.name or "scenario",
        seed=spec.full.seed,
        model=model,
        cluster=cluster,
        parallel=spec.full.parallel,
        requests=spec.full.requests,
        training=spec.full.training,
        routing=spec.full.routing,
        policies=policies,
        engine=spec.full.engine,
        slo=spec.full.slo,
        base=base,
        raw=raw,
        resolved=resolved,
        hash=hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest(),
        warnings=(*model.warnings, *_reconstructed(preset)),
        capacity=spec.full.capacity,
        placement_from=spec.full.placement_from,
        communication=spec.full.communication or CommunicationSpec(),
        rebalance=spec.full.rebalance,
        tiers=spec.full.tiers,
        tune=spec.full.tune,
        cpu=cpu,
    )


def _disagreements(
    source: Source, spec: _Parts, parallel: ParallelSpec, model: MoEModel, cluster: Cluster,
    policies: Policies | None, training: bool,
) -> list[Problem]:  # fmt: skip
    """What the parts of a scenario must agree on, as far as they could be read."""
    engine = spec.engine if spec.engine is not None else EngineSpec()
    placement = policies.placement if policies is not None else None
    router = policies.routing if policies is not None else None
    limits = spec.full.capacity if spec.full is not None else None
    problems = cross_checks(source.where, model, cluster, parallel, engine, placement, router, limits)
    if spec.full is not None and spec.full.communication is not None:
        how, mode = spec.full.communication, spec.full.mode
        problems += communication_checks(source.where, model, cluster, parallel, how, mode)
        problems += overlap_checks(source.where, model, cluster, parallel, how.overlap, training)
    if training and spec.training is not None:
        capacity = spec.full.capacity if spec.full is not None else None
        routing = spec.routing if spec.routing is not None else RoutingSpec()
        problems += training_checks(source.where, model, parallel, spec.training, placement, capacity, routing)
    if spec.full is not None and not training:
        problems += serving_checks(
            source.where, model, spec.full, placement, None if policies is None else policies.balancer
        )
        problems += tier_checks(source.where, model, cluster, spec.full, policies, source.data.get("policies") or {})
    if source.data.get("routing") and not model.is_moe:
        message = f"routing: {model.name} is a dense model, so nothing is routed; remove routing"
        problems.append(Problem(source.where(("routing",), key=True), message))
    return problems


def _reconstructed(preset: Preset | None) -> tuple[str, ...]:
    told = f"routing {preset.name} is a reconstruction: {preset.reconstruction}" if preset is not None else ""
    return (told,) if preset is not None and preset.reconstruction else ()


# ---- the mapping


def _rebase_overrides(source: Source, base: Path) -> None:
    """Relative paths given by `--set` may be named from the current folder."""
    for path in source.overridden:
        into: Any = source.data
        for key in path[:-1]:
            into = into[key]
        value = into[path[-1]]
        named = path in (("model",), ("model", "name"), ("cluster", "device"), ("tiers", "cpu", "profile"))
        if isinstance(value, str) and (path[-1] == "path" or (named and "/" in value)):
            into[path[-1]] = rebase(value, base)


def _not_yet(source: Source) -> list[Problem]:
    """Refuse what is not simulated yet, one sentence each; such keys are taken out."""
    problems = []
    parts: list[tuple[YamlPath, dict[str, Any]]] = [((), source.data)]
    parts += [((k,), source.data[k]) for k in ("parallel", "engine") if isinstance(source.data.get(k), dict)]
    for prefix, part in parts:
        for key in [k for k in part if k in NOT_YET]:
            value = part.pop(key)
            off = value in (None, False, 0, "none", "off") or (NOT_YET[key].startswith("pipe") and value == 1)
            if not off or isinstance(value, float):
                path = (*prefix, key)
                dotted = ".".join(str(p) for p in path)
                message = f"{dotted}: {NOT_YET[key]} is not simulated yet; remove {dotted}"
                problems.append(Problem(source.where(path, key=True), message))
    return problems


def _one_mode(source: Source, problems: list[Problem]) -> bool:
    """Whether this is a training scenario. Refuses and takes out what the other mode alone has a use for."""
    data = source.data
    if data.get("mode") == "training":
        for key in [k for k in ONLY_SERVING if data.pop(k, None) is not None]:
            message = f"{key}: {ONLY_SERVING[key]}; remove {key}, or set mode to serving"
            problems.append(Problem(source.where((key,), key=True), message))
        policies = data.get("policies")
        for key in [k for k in SERVING_POLICIES if isinstance(policies, dict) and policies.pop(k, None) is not None]:
            message = f"policies.{key}: training has nothing that it decides; remove policies.{key}"
            problems.append(Problem(source.where(("policies", key), key=True), message))
        if data.get("training") is None:
            problems.append(Problem(source.where(("mode",)), "training: is required in mode training and not given"))
        return True
    if data.pop("training", None) is not None:
        message = "training: is read in mode training only; add `mode: training`, or remove training"
        problems.append(Problem(source.where(("training",), key=True), message))
    if data.get("requests") is None and data.get("mode", "serving") in (None, "serving"):
        problems.append(Problem(source.where(("requests",)), "requests: is required and not given"))
    return False


class _Parts:
    """The parts of a scenario that could be read; `full` when all could."""

    def __init__(self) -> None:
        self.full: ScenarioSpec | None = None
        self.model: ModelRef | None = None
        self.cluster: ClusterSpec | None = None
        self.parallel: ParallelSpec | None = None
        self.requests: RequestsSpec | None = None
        self.training: TrainingSpec | None = None
        self.routing: RoutingSpec | None = None
        self.policies: PoliciesSpec | None = None
        self.engine: EngineSpec | None = None
        self.tune: TuneSpec | None = None


_PART_SPECS: dict[str, type[Spec]] = {
    "model": ModelRef,
    "cluster": ClusterSpec,
    "parallel": ParallelSpec,
    "requests": RequestsSpec,
    "training": TrainingSpec,
    "routing": RoutingSpec,
    "policies": PoliciesSpec,
    "engine": EngineSpec,
    "tune": TuneSpec,
}


def _validate(source: Source, problems: list[Problem]) -> _Parts:
    """Validate the whole; where that fails, still return each part that is right by itself."""
    parts = _Parts()
    try:
        parts.full = ScenarioSpec.model_validate(source.data)
    except ValidationError as error:
        problems += _located(error, source, ScenarioSpec)
    for name, cls in _PART_SPECS.items():
        part: Spec | None = getattr(parts.full, name) if parts.full is not None else None
        if parts.full is None and (name in source.data or name in ("parallel", "routing", "policies", "engine")):
            value = source.data.get(name, {})
            try:
                part = cls.model_validate({"name": value} if name == "model" and isinstance(value, str) else value)
            except ValidationError:
                part = None
        setattr(parts, name, part)
    return parts


def _located(error: ValidationError, source: Source, cls: type[BaseModel], prefix: YamlPath = ()) -> list[Problem]:
    """pydantic's errors with their places: of the key where it is unknown, else of the value."""
    unknown = {e["loc"][-1] for e in error.errors() if e["type"] == "extra_forbidden"}
    return spec_problems(error, lambda loc: source.where(loc, key=bool(loc) and loc[-1] in unknown), cls, prefix)


def _sorted(problems: list[Problem]) -> list[Problem]:
    """By line and column, each once."""

    def key(problem: Problem) -> tuple[str, int, int]:
        name, *numbers = problem.where.rsplit(":", 2)
        if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
            return name, int(numbers[0]), int(numbers[1])
        return problem.where, 0, 0

    return sorted(dict.fromkeys(problems), key=key)


# ---- what it names


def _policies(source: Source, spec: PoliciesSpec, problems: list[Problem]) -> Policies | None:
    made: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for family, key in FAMILY_KEYS.items():
        value = getattr(spec, key)
        if value is None:
            value = PoliciesSpec.model_fields[key].default
        if value is None:  # routing: chosen by the model, below
            made[key] = None
            continue

        def where(loc: YamlPath, key: str = key, short: bool = isinstance(value, str)) -> str:
            return source.where(("policies", key) if short else ("policies", key, *loc))

        try:
            made[key] = load_policy(family, value, where)
            kinds[key] = value if isinstance(value, str) else value["kind"]
        except BadInput as error:
            problems += [Problem(p.where, f"policies.{key}: {p.message}") for p in error.problems]
    return Policies(**made, kinds=kinds) if len(made) == len(FAMILY_KEYS) else None


def _find_model(
    source: Source, ref: ModelRef | None, base: Path, problems: list[Problem]
) -> tuple[MoEModel | None, Path | None]:
    if ref is None:
        return None, None
    as_text = isinstance(source.data.get("model"), str)
    where = source.where(("model",) if as_text else ("model", "name"))
    try:
        path = find_named(ref.name, "workloads/models", base, where, "model")
        model = load_model(path)
    except BadInput as error:
        problems += error.problems
        return None, None
    dtypes = {"weight_dtype", "expert_dtype", "kv_dtype", "activation_dtype"}
    given = ref.model_dump(include=dtypes, exclude_none=True)
    changes = ModelChanges(**ref.model_dump(exclude={"name"} | dtypes, exclude_none=True))
    try:
        return change_model(model.with_dtypes(**given) if given else model, changes), path
    except BadInput as error:
        problems += [Problem(source.where(("model",)), f"model: {p.message}") for p in error.problems]
        return None, None


def load_model(path: Path) -> MoEModel:
    """A model from a YAML file of `workloads/models`' form or a Hugging Face config.json. Raises BadInput."""

    def key() -> tuple[Any, ...] | None:
        beside = path.with_name("hf_quant_config.json")  # read with a config.json
        files = [file_key(path), *([file_key(beside)] if path.suffix == ".json" and beside.exists() else [])]
        return None if None in files else tuple(files)

    return reused("model", key, lambda: _load_model(path))


def _load_model(path: Path) -> MoEModel:
    name = shown(path)
    if path.suffix == ".json":
        return read_hf_config(path)
    data, marks = load_yaml(name)
    source = Source(data, marks)
    try:
        return ModelSpec.model_validate(source.data).build()
    except ValidationError as error:
        raise BadInput(_located(error, source, ModelSpec)) from None


def load_profile(path: Path) -> DeviceProfile:
    """A device profile from a YAML file of `hw_profiles`' form. Raises BadInput."""
    return DeviceProfile.from_spec(_profile_spec(path), path.parent, shown(path))


def _profile_spec(path: Path) -> ProfileSpec:
    data, marks = load_yaml(shown(path))
    source = Source(data, marks)
    try:
        return ProfileSpec.model_validate(source.data)
    except ValidationError as error:
        raise BadInput(_located(error, source, ProfileSpec)) from None


def _find_cluster(
    source: Source, spec: ClusterSpec | None, base: Path, problems: list[Problem]
) -> tuple[Cluster | None, str]:
    """The cluster, and the hash of its profile's files."""
    where = source.where(("cluster", "device"))
    part = source.data.get("cluster")
    name = part.get("device") if isinstance(part, dict) else None
    if not isinstance(name, str):
        return None, ""
    try:
        path = find_named(name, "hw_profiles", base, where, "device profile")
        if spec is None:
            return None, ""
        profile, digest = _hashed_profile(path)
        place = source.where(("cluster",))
        return reused("cluster", lambda: (spec, profile), lambda: Cluster.from_spec(spec, profile, place)), digest
    except BadInput as error:
        problems += error.problems
        return None, ""


def _hashed_profile(path: Path) -> tuple[DeviceProfile, str]:
    """A profile, and the hash of its files."""
    written = reused("profile file", lambda: file_key(path), lambda: _profile_spec(path))
    return reused("profile", lambda: _profile_key(path, written), lambda: _read_profile(path, written))


def _profile_key(path: Path, written: ProfileSpec) -> tuple[Any, ...] | None:
    """Its file, and the files of its curves."""
    files = [file_key(file) for file in (path, *(path.parent / name for name in written.curves))]
    return None if None in files else tuple(files)


def _read_profile(path: Path, written: ProfileSpec) -> tuple[DeviceProfile, str]:
    profile = DeviceProfile.from_spec(written, path.parent, shown(path))
    return profile, profile_hash(path) + "".join(content_hash(path.parent / name) for name in written.curves)


def _find_cpu(
    source: Source, spec: ScenarioSpec | None, base: Path, problems: list[Problem]
) -> tuple[DeviceProfile | None, str]:
    """The profile that prices experts on the CPU, and the hash of its files, where one is named."""
    if spec is None or spec.tiers is None or spec.tiers.cpu.profile is None:
        return None, ""
    where = source.where(("tiers", "cpu", "profile"))
    try:
        path = find_named(spec.tiers.cpu.profile, "hw_profiles", base, where, "device profile")
        return _hashed_profile(path)
    except BadInput as error:
        problems += error.problems
        return None, ""


def _input_files(source: Source, spec: _Parts, base: Path, problems: list[Problem]) -> dict[str, str]:
    """Content hashes of files by the dotted block that names them; a missing file is a problem of its place."""
    hashes: dict[str, str] = {}
    other = spec.full.placement_from.routing if spec.full is not None and spec.full.placement_from else None
    named = (("requests", spec.requests), ("routing", spec.routing), ("placement_from.routing", other))
    for part, value in named:
        name = getattr(value, "path", None)
        if not isinstance(name, str):
            continue
        where = source.where((*part.split("."), "path"))
        try:
            path = base / name
            if not path.exists():
                problems.append(Problem(where, f"{part}.path: no such file: {shown(path)}"))
            else:
                hashes[part] = content_hash(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(Problem(where, f"{part}.path: cannot be read: {reason}"))
        except BadInput as error:
            problems += error.problems
    return hashes


def _resolved(spec: ScenarioSpec, model: MoEModel, policies: Policies, files: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the result, with no path in it."""
    training = spec.mode == "training"
    unused: dict[str, Any] = dict.fromkeys(("tune", *(ONLY_SERVING if training else ("mode", "training"))), True)
    if not training:
        unused["routing"] = {"training_scores"}
    for key in ("capacity", "placement_from", "communication", "rebalance", "tiers"):
        if getattr(spec, key) is None:
            unused[key] = True
    out: dict[str, Any] = spec.model_dump(mode="json", exclude=unused)
    for block in (out.get("routing"), (out.get("placement_from") or {}).get("routing")):
        if block is not None and block["sequences"] is None:
            del block["sequences"]  # the whole pool: what is not said is not in the hash
    for part, digest in files.items():
        block = out
        for key in part.split("."):
            block = block[key]
        block["path"] = {"name": Path(block["path"]).name, "blake2b": digest}
    out["model"] = json.loads(json.dumps(dataclasses.asdict(model)))
    out["policies"] = {
        key: {"kind": policies.kinds[key], **getattr(policies, key).model_dump(mode="json")}
        for key in FAMILY_KEYS.values()
        if key in policies.kinds
    }
    return out


# ---- JSON Schema


def scenario_schema() -> dict[str, Any]:
    """JSON Schema of a scenario file, for editors; policies list the kinds and their parameters."""
    schema = ScenarioSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "moesim scenario"
    schema["if"] = {"properties": {"mode": {"const": "training"}}, "required": ["mode"]}
    foreign = {"anyOf": [{"required": [key]} for key in ONLY_SERVING]}
    schema["then"] = {"required": ["training"], "not": foreign}
    schema["else"] = {"required": ["requests"], "not": {"required": ["training"]}}
    properties = schema["$defs"]["PoliciesSpec"]["properties"]
    for family, key in FAMILY_KEYS.items():
        kinds = policy_kinds(family)
        named = [*kinds, *presets()] if family == "routing" else kinds
        options: list[dict[str, Any]] = [{"enum": named}] if named else []
        for kind in kinds:
            option = policy_class(family, kind).model_json_schema(ref_template=f"#/$defs/{family}.{kind}.{{model}}")
            for name, definition in option.pop("$defs", {}).items():
                schema["$defs"][f"{family}.{kind}.{name}"] = definition
            option["properties"] = {"kind": {"const": kind}, **option.get("properties", {})}
            option["required"] = ["kind", *option.get("required", [])]
            options.append(option)
        properties[key] = {"anyOf": options, "default": properties[key].get("default")}
    return schema
