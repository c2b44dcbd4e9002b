"""A MoE layer's own part as a whole: what its parts add up to, and what a measured block makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.dense import DenseTables, Part
from moesim.cost.operators import BlockShape, Operators
from moesim.cost.own import block_ns, block_shape
from moesim.hardware import Curve, DeviceProfile
from moesim.hardware_curves import OPERATORS
from moesim.layout import Layout
from moesim.scenario.load import Scenario, scenario_from_dict

OWN = ("norm", "attention_projections", "rope_kv_write", "router", "top_k")
MODELS = ["qwen3-30b-a3b", "mixtral-8x7b", "qwen1.5-moe-a2.7b"]
MEASURED, INTERPOLATED, EXTRAPOLATED = range(3)
KNOTS, RATIOS = (1.0, 16.0, 64.0), (1.0, 0.5, 0.25)


def scenario(model: str, tp: int = 1) -> Scenario:
    data: dict[str, Any] = {
        "model": model,
        "cluster": {"device": "h100_sxm", "gpus_per_node": 8},
        "parallel": {"tp": tp},
        "requests": {"format": "poisson", "rate_per_s": 1.0, "num_requests": 1, "prompt_tokens": 1, "output_tokens": 1},
        "engine": {"max_num_batched_tokens": 128, "max_num_seqs": 16, "cuda_graph": True, "graph_batch_sizes": []},
    }
    return scenario_from_dict(data, Path(), [f"model.{k}_dtype=bf16" for k in ("weight", "expert", "kv", "activation")])


def shape_of(s: Scenario, tp: int = 1) -> BlockShape:
    shape = block_shape(s.model, tp)
    assert shape is not None
    return shape


def knowing(profile: DeviceProfile, shape: BlockShape) -> DeviceProfile:
    """The profile with a curve of this block."""
    curve = Curve(shape.key, shape.dtype, (np.array(KNOTS),), np.array(RATIOS))
    return replace(profile, curves=MappingProxyType({**profile.curves, "block": (curve,)}))


def tables(s: Scenario, profile: DeviceProfile, tp: int = 1) -> DenseTables:
    layout = Layout.of(s.model, s.cluster, tp, 1, 1, s.communication)
    return DenseTables(s.model, layout, s.engine, Operators(profile), layout.meets)


def own(t: DenseTables) -> list[Part]:
    return [p for name in ("attention", "moe") for p in t.blocks[name] if p.name in OWN]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp", [1, 4])
def test_a_block_is_the_sum_of_the_parts_that_a_step_is_priced_with(model: str, tp: int) -> None:
    s = scenario(model, tp)
    t = tables(s, s.cluster.profile, tp)
    total_N = np.sum([p.ns_N for p in own(t)], axis=0)
    found_N = block_ns(Operators(s.cluster.profile), np.arange(len(total_N), dtype=float), shape_of(s, tp))
    np.testing.assert_array_equal(found_N, total_N)


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "llama-3.1-8b"])
def test_models_whose_block_no_kernel_here_runs_have_none(model: str) -> None:
    assert block_shape(scenario(model).model, 1) is None


def test_a_key_names_the_whole_shape() -> None:
    shape = shape_of(scenario("qwen3-30b-a3b"))
    assert BlockShape(*shape.key) == shape  # type: ignore[arg-type]
    assert "block" in OPERATORS


def test_without_a_curve_nothing_is_known_of_a_block() -> None:
    s = scenario("qwen3-30b-a3b")
    assert Operators(s.cluster.profile).block(4, 1e4, shape_of(s)) is None
    assert {p.operator for p in own(tables(s, s.cluster.profile))} == {"gemm", "elementwise"}
    other = replace(shape_of(s), dtype="fp32", router_dtype="fp32")
    known = tables(s, knowing(s.cluster.profile, other))
    np.testing.assert_array_equal(known.total_N, tables(s, s.cluster.profile).total_N)


@pytest.mark.parametrize("tp", [1, 2])
def test_parts_are_scaled_to_the_block_and_all_else_stays(tp: int) -> None:
    s = scenario("qwen1.5-moe-a2.7b", tp)  # has a shared expert, and all-reduces under tensor parallelism
    bare = tables(s, s.cluster.profile, tp)
    known = tables(s, knowing(s.cluster.profile, shape_of(s, tp)), tp)
    n = np.arange(len(bare.total_N))
    ratio_N = np.interp(np.log(np.maximum(n, 1)), np.log(KNOTS), RATIOS)
    parts_N = np.sum([p.ns_N for p in own(bare)], axis=0)
    whole_N = np.sum([p.ns_N for p in own(known)], axis=0)
    assert np.abs(whole_N - parts_N * np.exp(ratio_N)).max() <= len(own(known)) / 2 + 1e-6  # each part is rounded
    layers = s.model.num_layers
    np.testing.assert_array_equal(known.total_N - bare.total_N, layers * (whole_N - parts_N))
    for name, parts in known.blocks.items():
        assert len(parts) == len(bare.blocks[name])
        for part, was in zip(parts, bare.blocks[name], strict=True):
            if name in ("attention", "moe") and part.name in OWN:
                assert (part.name, part.operator) == (was.name, "block")
                assert set(part.grade_N[[1, 16, 64]]) == {MEASURED}
                assert set(part.grade_N[2:16]) == {INTERPOLATED}
                assert set(part.grade_N[65:]) == {EXTRAPOLATED}
            else:
                np.testing.assert_array_equal(part.ns_N, was.ns_N)
                np.testing.assert_array_equal(part.grade_N, was.grade_N)
                assert part.operator == was.operator
    # a part's name has one operator, by which its error is found
    operator = {p.name: p.operator for p in known.parts}
    assert all(operator[p.name] == p.operator for p in known.parts)


def test_a_block_is_no_faster_than_reading_its_weights() -> None:
    s = scenario("mixtral-8x7b")
    shape = shape_of(s)
    profile = knowing(s.cluster.profile, shape)
    found = Operators(profile).block(np.array([0.0, 1.0]), np.array([0.0, 1e-6]), shape)
    assert found is not None
    weights = 4096 * (2 * 4096 + 2 * 1024 + 8) * 2
    np.testing.assert_allclose(found.ns, [0.0, weights / profile.hbm_bytes_per_s * 1e9])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2.0, 3.0), min_size=3, max_size=3))
def test_a_block_of_any_curve_adds_up_and_never_costs_nothing(ratios: list[float]) -> None:
    s = scenario("qwen3-30b-a3b")
    shape = shape_of(s)
    curve = Curve(shape.key, shape.dtype, (np.array(KNOTS),), np.array(ratios))
    profile = replace(s.cluster.profile, curves=MappingProxyType({"block": (curve,)}))
    t = tables(s, profile)
    np.testing.assert_array_equal(t.total_N, np.sum([p.ns_N for p in t.parts], axis=0))
    assert (t.total_N[1:] > 0).all()
