"""Search spaces against enumeration: what is counted, drawn, indexed and stepped to is what is listed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.space import Space

from moesim.rng import generator
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


@settings(max_examples=60, deadline=None)
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
