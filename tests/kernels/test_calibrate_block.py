"""A MoE layer's own part, measured as a whole: planned, run with real kernels, and fitted on top of its parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.floors import block_cache_shape, floors, held_bytes, weight_shapes
from moesim_kernels.bench.log import Point
from moesim_kernels.bench.plan import Case
from moesim_kernels.calibrate.deployment import from_model, from_scenario
from moesim_kernels.calibrate.grid import HELD_OUT
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.calibrate.points import Ceilings, curve_key, floor_ns, sort_points
from moesim_kernels.fit.curves import write_curves
from moesim_kernels.fit.model import fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points
from moesim_kernels.profiles.shapes import floor_ns as least_ns
from moesim_kernels.profiles.shapes import measured_shapes, price

from moesim.cost.operators import BlockShape, Operators
from moesim.cost.own import block_ns, block_shape
from moesim.hardware import DeviceProfile
from moesim.hardware_curves import load_curves
from moesim.scenario.load import load_scenario

SCENARIO = Path("workloads/validate_cpu.yaml")
SHAPE: dict[str, Any] = {
    "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "experts": 8, "top_k": 2, "router_dtype": "fp32",
    "score": "softmax", "groups": 1, "top_groups": 1, "bias": False, "head_norm": False,
}  # fmt: skip
KNOTS = np.array([1.0, 4.0, 16.0, 64.0])


def case(tokens: int, dtype: str = "fp32", **changes: Any) -> Case:
    return Case("block", SHAPE | changes, {"tokens": tokens}, dtype)


def timed(tokens: int, ns: float, role: str = "grid", seed: int = 0) -> Point:
    return Point(Case("block", SHAPE, {"tokens": tokens}, "fp32", role=role, seed=seed), ns, ns, ns, 5, ns, 1.0)


def test_a_plan_measures_the_block_that_the_simulator_looks_up_to_its_last_token() -> None:
    scenario = load_scenario(SCENARIO)
    d = from_scenario(SCENARIO, [])
    found = [c for c in make_plan([d], "cpu").cases if c.op == "block"]
    shape = block_shape(scenario.model, 1)
    assert shape is not None
    assert {curve_key(c) for c in found} == {shape.key}
    sizes = [int(c.size["tokens"]) for c in found if c.role == "grid"]
    assert (min(sizes), max(sizes), len(sizes)) == (1, d.max_tokens, 10)
    held_out = [int(c.size["tokens"]) for c in found if c.role == "heldout"]
    assert len(held_out) == HELD_OUT
    assert 1 <= min(held_out) <= max(held_out) <= d.max_tokens


def test_points_that_were_planned_before_are_drawn_as_before() -> None:
    """Blocks draw from a stream of their own, so other operators keep their held-out points."""
    d = from_scenario(SCENARIO, [])
    rng = np.random.default_rng([0, 0])
    from moesim_kernels.calibrate.grid import moe_cases

    first = [c.id for c in moe_cases(d, "cpu", "torch", rng)]
    assert first == [c.id for c in make_plan([d], "cpu").cases if c.op == "moe"]


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "llama-3.1-8b"])
def test_models_without_such_a_block_plan_none(model: str) -> None:
    bf16 = [f"model.{k}_dtype=bf16" for k in ("weight", "expert", "kv", "activation")]
    assert all(c.op != "block" for c in make_plan([from_model(model, {}, bf16)], "cuda").cases)


def test_a_shape_is_checked() -> None:
    with pytest.raises(BadPlan, match="router_dtype"):
        case(1, router_dtype="int4")
    with pytest.raises(BadPlan, match="head_norm"):
        case(1, head_norm=1)
    with pytest.raises(BadPlan, match="tokens"):
        case(0)


@pytest.mark.parametrize(
    ("tokens", "dtype", "router"), [(1, "fp32", "fp32"), (40, "fp32", "bf16"), (17, "bf16", "bf16")]
)
def test_a_block_runs_and_writes_keys_and_values_of_its_tokens_alone(tokens: int, dtype: str, router: str) -> None:
    torch = pytest.importorskip("torch")
    from moesim_kernels.bench.cases import build, reserve
    from moesim_kernels.bench.pool import Device, Pool

    given = case(tokens, dtype, router_dtype=router, head_norm=True, bias=True, score="sigmoid", groups=2, top_groups=1)
    device = Device("cpu", cache_bytes=1 << 15, capacity_bytes=1 << 28)
    pool = Pool(device)
    reserve([given], pool)
    prepared = build(given, device, pool)
    assert prepared.rotations > 1
    assert prepared.follows
    shape = block_cache_shape(given)
    scratch = pool.arena("scratch", getattr(torch, "float32" if dtype == "fp32" else "bfloat16"), 1)
    cache = scratch[tokens * 32 :][: int(np.prod(shape))].view(shape)
    cache.zero_()
    out = prepared.run(0)
    assert tuple(out.shape) == (tokens, 32)
    assert bool(torch.isfinite(out).all())
    written_2SGC = (cache != 0).any(dim=-1)
    assert written_2SGC.sum() == 2 * 2 * tokens  # keys and values, two heads, once a token
    prepared.run(1)
    assert (cache != 0).any(dim=-1).sum() == 2 * 2 * 2 * tokens  # the next rotation takes other positions
    assert held_bytes(given) >= prepared.bytes / 2


def test_floors_count_weights_once_and_three_products() -> None:
    weights = 32 * 64 + 32 * 32 + 8 * 32 + 2 * 32 + 64 + 6 * 8
    moved, flop = floors(case(10))
    assert sum(int(np.prod(s)) for s in weight_shapes(case(10))) == weights
    assert flop == 2.0 * 10 * (32 * 64 + 32 * 32 + 8 * 32)
    assert moved == 4.0 * (weights + 10 * (7 * 32 + 2 * 6 * 8))
    assert sum(int(np.prod(s)) for s in weight_shapes(case(10, router_dtype="bf16"))) == weights - 8 * 32


def test_a_block_faster_than_reading_its_weights_is_refused() -> None:
    top = Ceilings(10.0, {"fp32": 1e12})
    least, why = floor_ns(case(1), top)
    assert least > 1000
    assert "the weights" in why
    found = sort_points([timed(1, least * 0.99), timed(2, least * 1.5), timed(3, 2 * least, "heldout", 1)], top)
    assert [r.case.size["tokens"] for r in found.refused] == [1]
    assert [s.size[:, 0].tolist() for s in (*found.grid, *found.held_out)] == [[2.0], [3.0]]


@pytest.fixture(scope="module")
def parts() -> DeviceProfile:
    """A machine whose products and passes are known: launches of 5 us, and residuals that no physics has."""
    base = load_scenario(SCENARIO).cluster.profile
    base = replace(base, kind="assumed", fits={}, curves={}, moe_row_work={})
    m = np.array([1.0, 8.0, 64.0])
    shapes = [(64, 32), (32, 32), (8, 32)]
    gemm = [(n, k, r) for n, k in shapes for r in m]
    times = [5e3 + r * n * k * 0.1 + 900.0 * (i % 2) for i, (n, k, r) in enumerate(gemm)]
    one = sample_points("gemm", "fp32", [(n, k, "fp32") for n, k, _ in gemm], [r for _, _, r in gemm], times)
    moved = np.array([1e2, 1e3, 1e4, 1e5])
    two = sample_points("elementwise", "", [(0,)] * 4, moved, 2e3 + moved * 0.3)
    return with_fits(base, [fit_operator(one, base), fit_operator(two, base)])


def block(ns: np.ndarray, tokens: np.ndarray) -> Samples:
    return sample_points("block", "fp32", [curve_key(case(1))] * len(tokens), tokens, ns, dtype="fp32")


def test_a_fitted_block_is_its_parts_times_what_was_measured(parts: DeviceProfile, tmp_path: Path) -> None:
    shape = BlockShape(*curve_key(case(1)))  # type: ignore[arg-type]
    sums = block_ns(Operators(parts), KNOTS, shape)
    slower = np.array([1.5, 1.6, 2.0, 1.9])
    fitted = fit_operator(block(sums * slower, KNOTS), parts)
    assert fitted.values == {}
    profile = with_fits(parts, [fitted])
    write_curves(tmp_path / "b.json", profile.curves)
    profile = replace(profile, curves=load_curves(tmp_path / "b.json", problems := []))
    assert not problems
    np.testing.assert_allclose(predict(profile, block(sums, KNOTS)), sums * slower, rtol=1e-3)
    # between two knots the factor is log-linear in tokens: at 8 tokens the geometric mean of its neighbours'
    eight = np.array([8.0])
    between = block_ns(Operators(parts), eight, shape) * np.sqrt(1.6 * 2.0)
    np.testing.assert_allclose(predict(profile, block(between, eight)), between, rtol=1e-3)
    # and so a table of the profile has it
    (shown,) = measured_shapes(profile, "block")
    assert shown.label == "hidden 32, GQA 4/2 heads of 8, 8 experts, top 2, softmax, fp32"
    np.testing.assert_allclose(price(Operators(profile), shown, KNOTS).ns, sums * slower, rtol=1e-3)
    assert (least_ns(profile, shown, KNOTS) < sums * slower).all()
    # the parts themselves are priced as before, so nothing is counted twice
    np.testing.assert_array_equal(block_ns(Operators(profile), KNOTS, shape), sums)


def test_without_a_curve_a_block_is_predicted_by_its_parts(parts: DeviceProfile) -> None:
    shape = BlockShape(*curve_key(case(1)))  # type: ignore[arg-type]
    sums = block_ns(Operators(parts), KNOTS, shape)
    np.testing.assert_array_equal(predict(parts, block(sums, KNOTS)), sums)
