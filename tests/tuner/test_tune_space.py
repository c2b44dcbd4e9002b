"""Search spaces against enumeration: what is counted, drawn, indexed and stepped to is what is listed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.space import Space

from moesim.errors import BadInput
from moesim.rng import generator
from moesim.scenario.yamlio import parse_yaml
from moesim.tune_spec import ParameterSpec
from moesim.tune_values import identity


def space(**parameters: Any) -> Space:
    """Parameters by name (`__` for a dot); a list is choices."""
    return Space(
        {
            name.replace("__", "."): ParameterSpec.model_validate({"choices": p} if isinstance(p, list) else p)
            for name, p in parameters.items()
        }
    )


def as_sets(points: Any) -> set[str]:
    return {json.dumps(point, sort_keys=True) for point in points}


VALUES = st.sampled_from([0, 1, 2, True, False, None, "a", "b", 2.5, "1", "true"])


@st.composite
def spaces(draw: st.DrawFn, conditions: bool = True) -> Space:
    """Up to 6 parameters of up to 4 values, each with up to two conditions on those before it."""
    specs: dict[str, ParameterSpec] = {}
    for i in range(draw(st.integers(1, 6))):
        values = draw(st.lists(VALUES, min_size=1, max_size=4, unique_by=identity))
        when = {}
        if conditions:
            for other in draw(st.lists(st.sampled_from(sorted(specs)), max_size=2, unique=True)) if specs else ():
                of = specs[other].values
                assert of is not None
                when[other] = draw(st.lists(st.sampled_from(of), min_size=1, max_size=3, unique_by=identity))
        specs[f"p{i}"] = ParameterSpec(choices=values, when=when or None)
    shuffled = draw(st.permutations(sorted(specs)))
    return Space({name: specs[name] for name in shuffled})


def brute_force(of: Space) -> list[dict[str, Any]]:
    """Every assignment of every parameter, without what means nothing in it, by the definition."""
    found: list[dict[str, Any]] = [{}]
    for p in of.parameters:
        grown = []
        for point in found:
            on = all(
                name in point and identity(point[name]) in {identity(v) for v in values}
                for name, values in (p.when or {}).items()
            )
            grown += [{**point, p.name: v} for v in p.values or ()] if on else [point]
        found = grown
    return found


@settings(max_examples=40, deadline=None)
@given(spaces())
def test_counted_listed_indexed_and_known(of: Space) -> None:
    points = list(of.points())
    assert as_sets(points) == as_sets(brute_force(of))
    assert of.size == of.count == len(points) == len(as_sets(points)) == len({of.key(p) for p in points})
    for i, point in enumerate(points[:50]):
        assert point in of
        assert of.index(point) == i
        assert of.at(i) == point
        assert [p.name for p in of.active(point)] == list(point)
        assert of.complete(point) == point
        assert json.loads(of.key(point)) == point
        assert {**point, "stranger": 1} not in of
        assert of.complete({**point, "stranger": 1}) == point
    with pytest.raises(IndexError):
        of.at(len(points))


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 1000))
def test_draws_and_neighbours_are_points(of: Space, seed: int) -> None:
    point = of.random(generator(seed, "test.space"))
    assert point in of
    assert of.random(generator(seed, "test.space")) == point
    for near in of.neighbours(point):
        assert near in of
        assert near != point or json.dumps(near) != json.dumps(point)


@settings(max_examples=30, deadline=None)
@given(spaces(conditions=False))
def test_neighbours_are_symmetric_where_nothing_is_conditional(of: Space) -> None:
    for point in list(of.points())[:20]:
        for near in of.neighbours(point):
            assert as_sets([point]) <= as_sets(of.neighbours(near))


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"range": [0, 32], "step": 8}, (0, 8, 16, 24, 32)),
        ({"range": [1, 4]}, (1, 2, 3, 4)),
        ({"range": [0.1, 1.0], "step": 0.1}, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ({"range": [0, 1], "step": 0.25}, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ({"log_range": [16, 1024], "factor": 2}, (16, 32, 64, 128, 256, 512, 1024)),
        ({"log_range": [0.001, 1], "factor": 10}, (0.001, 0.01, 0.1, 1.0)),
        ({"log_range": [1, 10], "factor": 1.5}, (1, 2, 3, 5, 8)),
        ({"log_range": [3, 6]}, (3, 4, 5, 6)),
        ({"range": [5, 5]}, (5,)),
        ({"range": [0.5, 0.9]}, None),
        ({"log_range": [0.5, 0.9]}, None),
        ({"range": [0, 1_000_000]}, None),
    ],
)
def test_values_of_ranges(spec: dict[str, Any], values: tuple[Any, ...] | None) -> None:
    found = space(a=spec).parameters[0].values
    assert found == values
    if found is not None and values is not None:
        assert [type(v) for v in found] == [type(v) for v in values]


def test_true_is_not_one_but_one_is_1_0() -> None:
    of = space(a=[1, True, 0, False], b={"choices": ["x", "y"], "when": {"a": True}})
    assert of.count == 3 + 2
    assert {"a": 1} in of
    assert {"a": 1, "b": "x"} not in of
    assert {"a": True, "b": "x"} in of
    assert of.overrides({"a": True, "b": "x"}) == ("a=true", 'b="x"')
    assert of.overrides({"a": 1.0}) == ("a=1",)
    assert of.key({"a": 1.0}) == of.key({"a": 1}) != of.key({"a": True})


@pytest.mark.parametrize(
    "wide", [{"range": [0.5, 0.9]}, {"log_range": [0.5, 8.0]}, {"range": [0, 10**9], "step": 1000}]
)
def test_continuous(wide: dict[str, Any]) -> None:
    of = space(a=wide, b=[1, 2])
    assert of.size is None
    assert of.count is None
    with pytest.raises(BadInput):
        list(of.points())
    p = of.named["a"]
    draws = [of.random(generator(i, "test.space")) for i in range(120)]
    assert all(point in of for point in draws)
    assert len({point["a"] for point in draws}) > 100
    assert all(near in of for point in draws[:20] for near in of.neighbours(point))
    middle = (p.low * p.high) ** 0.5 if p.log else (p.low + p.high) / 2
    assert 38 <= sum(point["a"] < middle for point in draws) <= 82  # a fair coin, 4 sigma
    assert p.low in p
    assert p.high + 1 not in p
    assert p.nearest(10**12) == p.high


def test_draws_are_uniform_over_points_not_over_branches() -> None:
    """One point under `a`, nine under `b`: each is a tenth."""
    of = space(kind=["a", "b"], knob={"range": [1, 9], "when": {"kind": "b"}})
    counts = Counter(of.key(of.random(generator(i, "test.space"))) for i in range(1000))
    assert len(counts) == of.count == 10
    assert all(50 <= n <= 150 for n in counts.values())  # 100 each, 6 sigma


def test_large_conditional_spaces_are_counted_and_reached() -> None:
    """20 switches with a knob of 9 values each: 10 ** 20 points, by multiplication."""
    specs: dict[str, Any] = {}
    for i in range(20):
        specs[f"s{i}"] = ["on", "off"]
        specs[f"k{i}"] = {"range": [1, 9], "when": {f"s{i}": "on"}}
    of = space(**specs)
    assert of.count == 10**20
    assert of.size is None
    assert of.index(of.at(12345678901234567890)) == 12345678901234567890
    chained = space(**{f"p{i}": {"choices": [0, 1], **({"when": {f"p{i - 1}": 1}} if i else {})} for i in range(60)})
    assert chained.count == 61  # the first 0 ends the chain


def test_neighbours_of_ordered_values_are_the_next_ones() -> None:
    of = space(a={"log_range": [16, 128], "factor": 2}, b=["x", "y", "z"])
    assert of.neighbours({"a": 32, "b": "x"}) == [
        {"a": 16, "b": "x"}, {"a": 64, "b": "x"}, {"a": 32, "b": "y"}, {"a": 32, "b": "z"}
    ]  # fmt: skip
    wide = space(a={"range": [0, 100]})
    assert [p["a"] for p in wide.neighbours({"a": 50})] == [45, 49, 51, 55]


def test_a_change_of_branch_is_filled_in() -> None:
    of = space(
        policies__placement=["contiguous", "eplb"],
        policies__placement__num_redundant_experts={"range": [0, 8], "step": 4, "when": {"policies.placement": "eplb"}},
    )
    redundant = "policies.placement.num_redundant_experts"
    assert of.neighbours({"policies.placement": "contiguous"}) == [{"policies.placement": "eplb", redundant: 0}]
    assert of.neighbours({"policies.placement": "contiguous"}, {redundant: 8}) == [
        {"policies.placement": "eplb", redundant: 8}
    ]
    assert of.complete({redundant: 4}) == {"policies.placement": "contiguous"}
    with pytest.raises(ValueError, match="does not take 3"):
        of.complete({"policies.placement": "eplb", redundant: 3})


def test_a_policy_is_set_before_its_parameters_whatever_the_order_of_the_file() -> None:
    of = space(policies__placement__num_redundant_experts=[8], policies__placement=["eplb"])
    assert of.overrides(of.at(0)) == ('policies.placement="eplb"', "policies.placement.num_redundant_experts=8")


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(bool), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(JSONISH)
def test_overrides_read_back_as_what_was_chosen(value: Any) -> None:
    of = space(a=[value])
    text = of.overrides(of.at(0))[0]
    assert json.dumps(parse_yaml(text.partition("=")[2], "t")[0]) == json.dumps(value)
