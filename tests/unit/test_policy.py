"""Policies are found by name and by nothing else; what is wrong is said with its place and the nearest right name."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

import moesim
from moesim import policy as policies
from moesim.errors import BadInput
from moesim.policy import FAMILIES, load_plugin, load_policy, policy_class, policy_kinds, spec_problems
from moesim.spec import Spec


def message(*arguments, **keywords):
    with pytest.raises(BadInput) as error:
        load_policy(*arguments, **keywords)
    return str(error.value)


@pytest.fixture
def plugin(monkeypatch):
    """Install a module `plug` with the given attributes; nothing stays registered."""
    monkeypatch.setattr(policies, "_plugins", {})

    def install(**attributes):
        module = types.ModuleType("plug")
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "plug", module)
        return "plug"

    return install


class Mine(Spec):
    share: float = 0.5


# ---- finding


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_with_a_policy_is_a_kind_and_loads(family):
    folder = Path(moesim.__file__).parent / family
    files = {f.stem for f in folder.glob("*.py") if "\nclass Policy(" in f.read_text()}
    assert files <= set(policy_kinds(family))
    assert policy_kinds(family) == sorted(policy_kinds(family))
    assert not any(kind.startswith("_") for kind in policy_kinds(family))
    for kind in policy_kinds(family):
        assert issubclass(policy_class(family, kind), Spec)


def test_a_name_and_a_mapping():
    assert load_policy("placement", "eplb") == load_policy("placement", {"kind": "eplb"})
    built = load_policy("placement", {"kind": "eplb", "num_redundant_experts": 32, "mode": "global"})
    assert (built.num_redundant_experts, built.mode) == (32, "global")
    assert load_policy("placement", built) is built


@pytest.mark.parametrize(
    "kind",
    ["../x", "__init__", "..", ".", "", "/etc/passwd", "eplb.py", "placement.eplb", "os", "sys", "eplb\n", "EPLB",
     "eplb ", "../dispatch/first", "..dispatch.first", "\x00", "_private", "a" * 10_000],
)  # fmt: skip
def test_no_name_imports_anything_else(kind):
    before = set(sys.modules)
    assert "unknown placement policy" in message("placement", kind)
    assert set(sys.modules) <= before | {"difflib"}
    assert len(message("placement", kind)) < 300


@pytest.mark.parametrize("kind", [None, 3, True, ["eplb"], {"a": 1}, 1.5])
def test_a_kind_is_a_name(kind):
    assert "unknown placement policy" in message("placement", {"kind": kind})


@pytest.mark.parametrize("value", [None, 3, ["eplb"], 2.5, True])
def test_a_policy_is_a_name_or_a_mapping(value):
    assert "a placement policy is a name or a mapping with `kind`" in message("placement", value)


def test_a_wrong_name_gets_the_nearest():
    text = message("placement", "epbl", "run.yaml:7:13")
    assert text.startswith("run.yaml:7:13: unknown placement policy 'epbl'. Did you mean 'eplb'? Known: affinity, ")
    assert "needs `kind`: one of affinity" in message("placement", {"mode": "global"})
    assert "unknown policy family 'placment'. Did you mean 'placement'?" in message("placment", "eplb")
    with pytest.raises(BadInput, match="family"):
        policy_kinds("../placement")


def test_all_wrong_parameters_at_once_each_at_its_place():
    value = {"kind": "eplb", "num_redundant_expert": 3, "mode": "gobal", "num_redundant_experts": -1}
    with pytest.raises(BadInput) as error:
        load_policy("placement", value, where=lambda loc: "run.yaml:" + "/".join(map(str, loc)))
    told = {p.where: p.message for p in error.value.problems}
    assert set(told) == {"run.yaml:num_redundant_expert", "run.yaml:mode", "run.yaml:num_redundant_experts"}
    assert "Did you mean 'num_redundant_experts'?" in told["run.yaml:num_redundant_expert"]
    assert "got 'gobal'. Did you mean 'global'?" in told["run.yaml:mode"]
    assert "greater than or equal to 0, got -1" in told["run.yaml:num_redundant_experts"]


@pytest.mark.parametrize("bad", ["4", 4.0, True, None, [4], float("nan"), float("inf"), 10**30])
def test_a_parameter_of_another_type_is_refused(bad):
    assert "num_redundant_experts: " in message("placement", {"kind": "eplb", "num_redundant_experts": bad})


def test_a_key_that_is_no_text():
    assert message("placement", {"kind": "eplb", 3: 4})


# ---- from outside


def test_a_plugin_adds_kinds(plugin):
    name = plugin(POLICIES={"placement.mine": Mine, "dispatch.by-load": Mine})
    assert load_plugin(name) == ["dispatch.by-load", "placement.mine"]
    assert load_plugin(name) == ["dispatch.by-load", "placement.mine"]
    assert "mine" in policy_kinds("placement")
    assert "mine" not in policy_kinds("dispatch")
    assert load_policy("placement", {"kind": "mine", "share": 0.25}) == Mine(share=0.25)
    assert "Did you mean 'share'?" in message("placement", {"kind": "mine", "shard": 0.25})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "needs POLICIES"),
        ({"POLICIES": []}, "needs POLICIES"),
        ({"POLICIES": {}}, "needs POLICIES"),
        ({"POLICIES": {"placement.eplb": Mine}}, "exists already"),
        ({"POLICIES": {"placement": Mine}}, "a name is family.kind"),
        ({"POLICIES": {"place.mine": Mine}}, "a name is family.kind"),
        ({"POLICIES": {"placement.../x": Mine}}, "a name is family.kind"),
        ({"POLICIES": {3: Mine}}, "a name is family.kind"),
        ({"POLICIES": {"placement.mine": Mine()}}, r"derived from moesim\.spec\.Spec"),
        ({"POLICIES": {"placement.mine": int}}, r"derived from moesim\.spec\.Spec"),
    ],
)
def test_a_wrong_plugin_is_refused_and_adds_nothing(plugin, content, told):
    name = plugin(**content)
    with pytest.raises(BadInput, match=told):
        load_plugin(name)
    assert "mine" not in policy_kinds("placement")


def test_two_plugins_cannot_share_a_name(plugin):
    load_plugin(plugin(POLICIES={"placement.mine": Mine}))

    class Other(Spec):
        pass

    name = plugin(POLICIES={"placement.mine": Other})
    with pytest.raises(BadInput, match="exists already"):
        load_plugin(name)


@pytest.mark.parametrize("body", ["1 / 0", "import nothing_of_this_name", "def f(:", "raise RuntimeError('no')"])
def test_a_plugin_that_cannot_be_imported(tmp_path, monkeypatch, body):
    (tmp_path / "broken_plugin.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match="the plugin 'broken_plugin' cannot be imported"):
        load_plugin("broken_plugin")
    for name in ("no_such_module_here", "", "..x", ".x"):
        with pytest.raises(BadInput, match="cannot be imported"):
            load_plugin(name)


def test_entry_points_add_kinds_and_a_broken_one_is_told(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("placement.solver", f"{__name__}:Mine", policies.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("placement.broken", "no_such_module_here:Policy", policies.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("placement.wrong", "json:loads", policies.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("placement.eplb", "json:loads", policies.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(policies, "_entry_points", lambda: {p.name: p for p in points})
    assert {"solver", "broken", "wrong"} <= set(policy_kinds("placement"))
    assert load_policy("placement", "solver").share == 0.5
    assert "cannot be imported (ModuleNotFoundError" in message("placement", "broken", "run.yaml:3")
    assert message("placement", "broken", "run.yaml:3").startswith("run.yaml:3: ")
    assert "derived from moesim.spec.Spec" in message("placement", "wrong")
    assert type(load_policy("placement", "eplb")).__module__ == "moesim.placement.eplb"


# ---- errors of specs in words


class Inner(Spec):
    size: int = 1
    names: dict[str, int] = Field(default_factory=dict)


class Named(Spec):
    name: str


class Outer(Spec):
    inner: Inner = Inner()
    items: list[Inner] = Field(default_factory=list)
    either: int | Named | None = None
    pair: Annotated[tuple[Inner, ...], Field(strict=False)] = ()
    mode: Literal["fast", "slow"] = "fast"
    needed: int


def problems(data, **keywords):
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(data)
    return [str(p) for p in spec_problems(error.value, model=Outer, **keywords)]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "needed: is required and not given"),
        (
            {"needed": 1, "inner": {"sise": 2}},
            "inner.sise: unknown key 'sise'. Did you mean 'size'? Known: names,",
        ),
        ({"needed": 1, "items": [{}, {"size": "x"}]}, "items[1].size: should be a valid integer, got 'x'"),
        (
            {"needed": 1, "pair": [{"siz": 1}]},
            "pair[0].siz: unknown key 'siz'. Did you mean 'size'? Known: names,",
        ),
        ({"needed": 1, "mode": "slo"}, "mode: should be 'fast' or 'slow', got 'slo'. Did you mean 'slow'?"),
        ({"needed": 1, "inner": {"names": {"a": "b"}}}, "inner.names.a: should be a valid integer, got 'b'"),
        ({"needed": 1, "either": {"nam": "x"}}, "either.nam: unknown key 'nam'. Did you mean 'name'? Known: name."),
        ({"needd": 1, "needed": 1}, "needd: unknown key 'needd'. Did you mean 'needed'?"),
    ],
)
def test_each_error_names_its_path_and_the_mend(data, told):
    assert any(line.startswith(told) for line in problems(data)), problems(data)


def test_a_long_value_is_cut():
    (line,) = problems({"needed": "x" * 500})
    assert line.startswith("needed: should be a valid integer, got 'xxx")
    assert line.endswith("...")
    assert len(line) < 110


def test_union_tags_stay_out_of_paths_and_places():
    seen = []
    lines = problems({"needed": 1, "either": {"nam": "x"}}, where=lambda loc: seen.append(loc) or "f.yaml:1:1")
    assert all(set(loc) <= {"either", "nam", "name"} for loc in seen)
    assert "f.yaml:1:1: either.name: is required and not given" in lines


def test_prefix_is_put_before_and_one_thing_is_said_once():
    lines = problems({"needed": None}, where="f.yaml", prefix=("a", 3))
    assert lines == ["f.yaml: a[3].needed: should be a valid integer, got None"]


def test_without_the_model_the_path_is_pydantics():
    with pytest.raises(ValidationError) as error:
        Inner.model_validate({"sise": 1})
    assert [str(p) for p in spec_problems(error.value)] == ["sise: unknown key 'sise'."]
