"""Residuals carried over to shapes never timed; curve files; the rule of counts; all operators fitted and asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from moesim_kernels.fit.curves import curves, curves_text, monotone, spread, write_curves
from moesim_kernels.fit.model import Fitted, fit_operator, predict, profile_yaml, with_fits
from moesim_kernels.fit.physics import PARAMETERS, fit_physics, physics_ns
from moesim_kernels.fit.samples import Samples, sample_points
from moesim_kernels.fit.shared import carry_over, slow_shapes

from moesim.hardware import EXTRAPOLATED, DeviceProfile
from moesim.hardware_curves import load_curves

ROOT = Path(__file__).parents[2]
TOKENS = [1.0, 8.0, 64.0, 512.0, 4096.0]


def device(name: str = "h100_sxm_datasheet") -> DeviceProfile:
    path = ROOT / "hw_profiles" / f"{name}.yaml"
    return DeviceProfile.from_spec(yaml.safe_load(path.read_text()), path.parent, str(path))


def grid(shapes: list[tuple[int, int, int, int]], step: float = 0.2) -> Samples:
    """MoE shapes whose kernel takes 20 % longer than physics from 512 tokens on; times by a known physics."""
    keys: list[Any] = [(*shape, "bf16", 3) for shape in shapes for _ in TOKENS]
    size = [t * shape[3] for shape in shapes for t in TOKENS]
    s = sample_points("moe", "bf16", keys, size, np.ones(len(size)))
    values = {"launch_ns": 2e4, "mem_eff": 0.85, "flop_eff": 0.7, "row_hidden": 10.0, "row_inter": 10.0}
    ns = physics_ns(s, values, device()) * np.exp(step * (s.size[:, 0] / [k[3] for k in keys] >= 512))
    return replace(s, ns=ns)


SHAPES = [(h, i, e, 8) for h in (2048, 4096, 6144) for i in (512, 768, 1536) for e in (64, 128)]


def test_a_step_of_the_kernel_is_carried_over_to_a_new_shape() -> None:
    every = grid(SHAPES)
    new = (4096, 768, 128, 8, "bf16", 3)
    known = every.where(np.array([k != new for k in every.key]))
    rest = every.where(np.array([k == new for k in every.key]))
    values = fit_physics(known, device())
    (curve,) = carry_over(known, values, device(), [new], TOKENS)
    assert curve.grade is not None
    assert (curve.grade == EXTRAPOLATED).all()
    profile = with_fits(device(), [Fitted("moe", "bf16", "bf16", values, [curve])])
    assert np.abs(predict(profile, rest) / rest.ns - 1).max() < 0.03
    assert np.abs(physics_ns(rest, values, device()) / rest.ns - 1).max() > 0.05


def test_a_shape_with_a_bad_kernel_does_not_spread() -> None:
    every = grid(SHAPES)
    slow, new = (4096, 512, 128, 8, "bf16", 3), (4096, 768, 128, 8, "bf16", 3)
    times = np.where([k == slow for k in every.key], 4.0, 1.0)
    known = replace(every, ns=every.ns * times).where(np.array([k != new for k in every.key]))
    rest = every.where(np.array([k == new for k in every.key]))
    values = fit_physics(known, device())
    ratio = np.log(known.ns / physics_ns(known, values, device()))
    assert slow_shapes(known, ratio) == {slow}
    found = carry_over(known, values, device(), [new], TOKENS)
    profile = with_fits(device(), [Fitted("moe", "bf16", "bf16", values, found)])
    assert np.abs(predict(profile, rest) / rest.ns - 1).max() < 0.05


def test_sizes_that_do_not_load_in_vectors_are_judged_by_their_like() -> None:
    odd = [(h, i, 128, 8) for h in (2048, 4096) for i in (500, 700)]
    every, slowly = grid(SHAPES + odd), 2.0
    unaligned = np.array([k[1] % 16 != 0 for k in every.key])
    every = replace(every, ns=every.ns * np.where(unaligned, slowly, 1.0))
    values = fit_physics(every, device())
    level = np.median(np.log(every.ns / physics_ns(every, values, device()))[~unaligned])
    found = carry_over(
        every, values, device(), [(3072, 600, 128, 8, "bf16", 3), (3072, 640, 128, 8, "bf16", 3)], [64.0]
    )
    assert found[0].log_ratio[0] - level > 0.4
    assert abs(found[1].log_ratio[0] - level) < 0.15


def test_only_moe_shapes_are_carried_over() -> None:
    s = sample_points("gemm", "bf16", [(64, 64, "bf16")], [8], [1e4])
    with pytest.raises(ValueError, match="MoE"):
        carry_over(s, {"launch_ns": 1.0}, device(), [(64, 64, "bf16")], [8])


def test_counts_are_spread_by_one_rule() -> None:
    assert spread([1, 2, 4, 8, 16, 32, 64, 128, 256], 3) == [1, 16, 256]
    assert spread([1, 3, 9], 8) == [1, 3, 9]


def test_small_drops_are_noise_and_large_ones_are_switches() -> None:
    assert monotone(np.array([1.0, 2.0, 1.8, 3.0])).tolist() == pytest.approx([1.0, 1.9, 1.9, 3.0])
    assert monotone(np.array([1.0, 2.0, 1.5])).tolist() == [1.0, 2.0, 1.5]
    assert monotone(np.array([1.0, 2.0, 1.8]), most=0.1).tolist() == [1.0, 2.0, 1.8]


def points(op: str) -> Samples:
    """A few made-up points of an operator, two shapes."""
    if op in ("gemm", "router", "router_backward"):
        tail = ("bf16",) if op == "gemm" else (8, "bf16", "softmax", 1, 1)
        keys: list[Any] = [(n, 4096, *tail) for n in (64, 256) for _ in TOKENS]
        return sample_points(op, "bf16", keys, TOKENS * 2, np.linspace(1e4, 9e5, 10))
    if op.startswith("moe"):
        return replace(grid(SHAPES[:2]), op=op)
    if op.startswith("attention"):
        many = [("gqa", h, 8, 128, 128, w, "bf16") for h, w in ((32, 0), (64, 128)) for _ in TOKENS]
        size = [(2.0, t) for t in TOKENS] * 2
        return sample_points(op, "gqa_bf16", many, size, np.linspace(1e4, 9e5, 10))
    if op == "block":
        shape = (1024, 8, 2, 128, 32, 4, "bf16", "bf16", "softmax", 1, 1, 0, 0)
        return sample_points(op, "", [shape] * 5, TOKENS, np.linspace(1e5, 9e5, 5))
    known = {"copy": ("h2d", "pinned", 1, 0), "storage": ("direct", 1 << 20, 4), "elementwise": (0,)}
    key = known.get(op, ("pairwise", 8) if op == "all_to_all" else (8,))
    return sample_points(
        op, "pairwise" if op == "all_to_all" else "", [key] * 5, np.array(TOKENS) * 1e4, np.linspace(1e4, 9e5, 5)
    )


@pytest.mark.parametrize("op", [op for op in PARAMETERS if "@" not in op])
def test_what_is_fitted_is_what_is_priced(op: str) -> None:
    s = points(op)
    fitted = fit_operator(s, device())
    bare = with_fits(device(), [replace(fitted, curves=[])])
    # a block's physics are its parts' prices: those of the profile it is priced on
    physics = physics_ns(s, fitted.values, bare if op == "block" else device())
    priced = predict(bare, s)
    assert (priced >= physics * (1 - 1e-9)).all()  # the floor may lift a time; made-up times lie below it
    assert np.isclose(priced, physics, rtol=1e-9).any()
    whole = predict(with_fits(device(), [fitted]), s)
    assert np.isfinite(whole).all()
    assert np.abs(np.log(whole / s.ns)).mean() <= np.abs(np.log(priced / s.ns)).mean() + 1e-9


def test_curves_are_written_whole_and_read_back(tmp_path: Path) -> None:
    s = grid(SHAPES[:3])
    values = fit_physics(s, device())
    found = curves(s, values, device())
    path = tmp_path / "c.json"
    path.write_text("old")
    assert write_curves(path, {"moe": found}) == len(curves_text({"moe": found}).encode())
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    problems: list[Any] = []
    back = load_curves(path, problems)["moe"]
    assert not problems
    assert [c.key for c in back] == [c.key for c in found]
    assert all((a.log_ratio == b.log_ratio).all() for a, b in zip(back, found, strict=True))


def test_a_profile_is_written_as_it_is_loaded(tmp_path: Path) -> None:
    s = grid(SHAPES[:3])
    fitted = fit_operator(s, device())
    write_curves(tmp_path / "mine.json", {"moe": fitted.curves})
    sheet = yaml.safe_load((ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml").read_text())
    work = {"bf16": {"rows": [1.0, 2.0], "work": [4.0, 5.0]}}
    spec = sheet | {"kind": "measured", "fits": {"moe/bf16": fitted.values}, "curves": ["mine.json"]}
    text = profile_yaml(spec | {"moe_row_work": work}, "made by a test")
    assert text.startswith("# made by a test\nname: ")
    loaded = DeviceProfile.from_spec(yaml.safe_load(text), tmp_path, "mine.yaml")
    assert loaded.fits["moe/bf16"] == {k: float(f"{v:.5g}") for k, v in fitted.values.items()}
    assert loaded.moe_row_work["bf16"].at(2) == 5.0
    assert text == profile_yaml(spec | {"moe_row_work": work}, "made by a test")


def test_what_no_sample_depends_on_keeps_its_start() -> None:
    """Rows of other ranks cost nothing to samples that have none."""
    s = sample_points(
        "moe", "bf16", [(2048, 768, 8, 2, "bf16", 3)] * 6, [8, 16, 64, 256, 1024, 4096], np.arange(1, 7) * 1e5
    )
    assert fit_physics(s, device())["nonlocal_hidden"] == PARAMETERS["moe"]["nonlocal_hidden"][0]
