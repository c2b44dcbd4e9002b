"""`moesim profile compare`: planted ratios come back, errors make ties, pictures are whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from moesim_kernels.profiles.compare import compare, figure, render
from moesim_kernels.profiles.deployment import deployed_shapes, load_model_named
from moesim_kernels.profiles.find import load_named

from moesim.cli import main
from moesim.errors import BadInput
from moesim.hardware import OPERATORS, DeviceProfile

PROFILES = sorted(p.stem for p in (Path(__file__).parents[2] / "hw_profiles").glob("*.yaml"))
ROW_KEYS = {"size", "a_ns", "b_ns", "a_grade", "b_grade", "ratio", "interval90", "half_width90", "tie"}


def sure(profile: DeviceProfile, error: float) -> DeviceProfile:
    """The profile with this error for every operator."""
    return dataclasses.replace(
        profile, errors=MappingProxyType(dict.fromkeys(OPERATORS, error)), intervals=MappingProxyType({})
    )


@pytest.mark.parametrize("name", PROFILES)
def test_a_device_twice_as_fast_takes_half_as_long_everywhere(name: str) -> None:
    profile = load_named(name)
    report = compare(profile, profile.scaled(2.0), OPERATORS)
    assert any(shape["rows"] for op in report["operators"] for shape in op["shapes"])
    for op in report["operators"]:
        # a block is priced from parts that are whole nanoseconds, each up to half of one off, nine in 10 us and more
        near = 5e-4 if op["operator"] == "block" else 1e-12
        for shape in op["shapes"]:
            for row in shape["rows"]:
                assert row["ratio"] == pytest.approx(0.5, rel=near)
        assert op["geometric_mean"]["ratio"] == pytest.approx(0.5, rel=near)
        assert op["unpriced"] == 0


@pytest.mark.parametrize("other", [p for p in PROFILES if p != "h100_sxm"])
def test_every_profile_compares_with_h100(other: str) -> None:
    some = ("attention_decode", "elementwise", "all_reduce", "all_to_all")
    report = json.loads(json.dumps(compare(load_named("h100_sxm"), load_named(other), some), allow_nan=False))
    assert set(report) == {"schema_version", "a", "b", "operators"}
    for op in report["operators"]:
        assert set(op) == {"operator", "shapes", "unpriced", "geometric_mean"}
        for shape in op["shapes"]:
            assert set(shape) == {"label", "key", "batch", "axis", "rows"}
            for row in shape["rows"]:
                assert set(row) == ROW_KEYS
                assert row["a_ns"] > 0
                assert row["b_ns"] > 0
                low, high = row["interval90"]
                assert low < row["ratio"] < high
                assert row["tie"] == (low <= 1 <= high)


def test_a_tie_is_what_the_two_errors_together_explain() -> None:
    profile = load_named("h100_sxm")
    a, faster = sure(profile, 0.03), sure(profile.scaled(1.2), 0.04)
    # 90 % of both: 1.645 hypot(0.03, 0.04) = 0.082 in log, below ln 1.2 = 0.182
    report = compare(a, faster, ("all_gather",))
    mean = report["operators"][0]["geometric_mean"]
    assert mean["half_width90"] == pytest.approx(1.6449 * 0.05, rel=1e-3)
    assert not mean["tie"]
    # three times the errors: 0.247
    assert compare(sure(a, 0.09), sure(faster, 0.12), ("all_gather",))["operators"][0]["geometric_mean"]["tie"]


def test_swapped_profiles_give_the_inverse() -> None:
    a, b = load_named("h100_sxm"), load_named("l40s")
    there = compare(a, b, ("attention_decode", "all_reduce"))
    back = compare(b, a, ("attention_decode", "all_reduce"))
    for one, other in zip(there["operators"], back["operators"], strict=True):
        assert one["geometric_mean"]["ratio"] * other["geometric_mean"]["ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    report = compare(load_named("h100_sxm"), load_named("h200_sxm"), ("attention_prefill", "all_reduce"))
    out = io.StringIO()
    render(report, file=out, width=width)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("within error" in line for line in lines)
    assert ("A measured, B assumed" in out.getvalue()) == (width >= 110)


def test_a_deployment_is_compared_at_its_own_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model_named("deepseek-v3")
    shapes = deployed_shapes(model, tp=1, dp=8, ep=8, gpus_per_node=8)
    moe = [(shape, size) for shape, size in shapes if shape.op == "moe"]
    assert [shape.key for shape, _ in moe] == [(7168, 2048, 32, 8, "fp8_block", 3)]
    assert moe[0][1][2] == 128 * 8 * 8 / 8  # 128 tokens on each of 8 ranks, top 8, over 8 parts
    assert {shape.op for shape, _ in shapes} >= {"gemm", "attention_decode", "all_to_all"}
    assert "all_reduce" not in {shape.op for shape, _ in shapes}
    split = deployed_shapes(model, tp=8, dp=1, ep=1, gpus_per_node=8)
    assert next(s.key for s, _ in split if s.op == "moe") == (7168, 256, 256, 8, "fp8_block", 3)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "compare", "h100_sxm", "b200_sxm", "--model", "mixtral-8x7b", "--tp", "2", "--json"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    labels = [s["label"] for op in report["operators"] for s in op["shapes"] if op["operator"] == "moe"]
    assert labels == ["experts: 4 experts 4096 x 14336, top 2, bf16"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["h100_sxm", "nope"], "unknown device profile"),
        (["h100_sxm", "h200_sxm", "--operator", "moee"], "Did you mean 'moe'?"),
        (["h100_sxm", "h200_sxm", "--operator", "host"], "nothing to compare: host"),
        (["h100_sxm", "h200_sxm", "--tp", "2"], "name it with --model"),
        (["h100_sxm", "h200_sxm", "--model", "mixtral-8x7b", "--tp", "4", "--ep", "3"], "ep must divide tp * dp"),
        (["h100_sxm", "h200_sxm", "--model", "mixtral-8x7b", "--tp", "16"], "tp must fit into a node"),
        (["h100_sxm", "h200_sxm", "--plot", "x.gif"], "must end in .png, .svg or .pdf"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", "compare", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
@pytest.mark.parametrize("verb", ["show", "compare"])
def test_pictures_are_valid_files(kind: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"p.{kind}"
    names = ["l40s"] if verb == "show" else ["l40s", "rtx_4090"]
    with pytest.raises(SystemExit) as ended:
        main(["profile", verb, *names, "--operator", "moe", "--plot", str(path)])
    assert ended.value.code == 0
    assert f"plot: {path}" in capsys.readouterr().out
    data = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if kind == "png":
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
    elif kind == "pdf":
        assert data.startswith(b"%PDF-")
        assert data.rstrip().endswith(b"%%EOF")
    else:
        text = " ".join(ElementTree.fromstring(data).itertext())
        assert "8 experts 4096 x 14336, top 2, bf16" in text
        assert "(token, expert) pairs" in text


def test_the_same_picture_is_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from moesim_kernels.profiles.figure import draw_comparison

    a, b = load_named("l40s"), load_named("rtx_4090")
    for name in ("one.svg", "two.svg"):
        draw_comparison(a, b, ("gemm",), None, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_nothing_is_left_of_a_picture_that_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from moesim_kernels.profiles.figure import draw_comparison

    a, b = load_named("l40s"), load_named("rtx_4090")
    with pytest.raises(BadInput, match="cannot be written"):
        draw_comparison(a, b, ("gemm",), None, tmp_path / "none" / "p.png")
    old = tmp_path / "p.png"
    old.write_bytes(b"old")

    def half(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"\x89PNG")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(BadInput, match="Input/output error"):
        draw_comparison(a, b, ("gemm",), None, old)
    assert old.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_without_matplotlib_the_mend_is_told(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "compare", "l40s", "rtx_4090", "--plot", "x.png"])
    assert ended.value.code == 2
    assert "pip install 'moesim[plot]'" in capsys.readouterr().err
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.5, "0.500"), (1.0, "1.00"), (12.34, "12.3"), (1234.0, "1,234"), (0.00123, "0.00123")]
)
def test_figures(ratio: float, text: str) -> None:
    assert figure(ratio) == text
