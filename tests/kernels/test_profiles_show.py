"""`moesim profile show` over every shipped profile: the report, the terminal, and what broken input is told."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.profiles.find import clean, load_named, operators_of
from moesim_kernels.profiles.show import describe, half_width, render
from moesim_kernels.profiles.terminal_plot import Line, duration, percent, plot, size_text

from moesim.cli import main
from moesim.errors import BadInput
from moesim.hardware import OPERATORS
from moesim.scenario.files import home

PROFILES = sorted(p.stem for p in (Path(__file__).parents[2] / "hw_profiles").glob("*.yaml"))
KEYS = {"schema_version", "name", "kind", "device", "vendor", "ceilings", "links", "tiers", "operators", "provenance"}
OPERATOR_KEYS = {"operator", "basis", "curves", "points", "covered", "variants", "error", "error_stated", "intervals"}
OPERATOR_KEYS |= {"half_width90", "shapes"}
SHAPE_KEYS = {"label", "key", "batch", "axis", "size", "ns", "efficiency", "grade"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["profile", *arguments])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_described(name: str) -> None:
    profile = load_named(name)
    report = json.loads(json.dumps(describe(profile, OPERATORS), allow_nan=False))
    assert set(report) == KEYS
    assert report["schema_version"] == 1
    assert [row["operator"] for row in report["operators"]] == list(OPERATORS)
    drawn = 0
    for row in report["operators"]:
        assert set(row) == OPERATOR_KEYS
        assert row["curves"] == len(profile.curves.get(row["operator"], ()))
        assert (row["basis"] == "measured") == (row["curves"] > 0)
        for shape in row["shapes"]:
            drawn += 1
            assert set(shape) == SHAPE_KEYS
            lengths = {len(shape[k]) for k in ("size", "ns", "efficiency", "grade")}
            assert len(lengths) == 1
            assert min(shape["ns"]) > 0
            assert min(shape["efficiency"]) > 0
            # a pass of bytes may find its activations in a cache, and the rate of a link, copy or disk is the best of
            # what was timed: the model holds none of them at its rate
            floored = row["operator"] in ("gemm", "moe", "attention_prefill", "attention_decode")
            assert not floored or max(shape["efficiency"]) <= 1 + 1e-9, shape["label"]
    assert drawn >= 9


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_screen_fits_and_has_no_colour_in_a_file(name: str, width: int) -> None:
    report = describe(load_named(name), OPERATORS)
    for time in (False, True):
        out = io.StringIO()
        render(report, time, out, width)
        text = out.getvalue()
        assert "\x1b" not in text
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert not any(line.endswith(" ") for line in lines)
        assert report["device"] in text
        assert "●" in text or "o" in text


def test_measured_knots_are_what_the_curve_says() -> None:
    profile = load_named("h100_sxm")
    row = next(r for r in describe(profile, ("all_gather",))["operators"])
    shape = next(s for s in row["shapes"] if s["key"] == [8])
    curve = next(c for c in profile.curves["all_gather"] if c.key == (8,))
    node, fit = profile.node, profile.fits["all_gather"]
    at = float(curve.axes[0][0])
    wire = 7 * at / (node.nvlink_bytes_per_s * 1e-9 * fit["nvlink_eff"])
    ns = (fit["launch_ns"] + node.nvlink_latency_ns * 3 + wire) * np.exp(curve.log_ratio[0])
    assert shape["size"][0] == at
    assert shape["ns"][0] == pytest.approx(ns)
    assert shape["grade"][0] == "measured"


def test_intervals_of_the_profile_come_before_its_error() -> None:
    import dataclasses
    from types import MappingProxyType

    from moesim.hardware import Interval

    profile = load_named("h100_sxm")
    stated = {
        "moe": {
            "interpolated": Interval(level=0.9, half_width=0.05, n=20, method="split-conformal"),
            "measured": Interval(level=0.6827, half_width=0.1, n=20, method="empirical"),
        }
    }
    known = dataclasses.replace(profile, intervals=MappingProxyType(stated))
    assert half_width(known, "moe", "interpolated") == 0.05
    assert half_width(known, "moe", "measured") == pytest.approx(0.16449, rel=1e-3)  # 1 sigma stretched to 90 %
    assert half_width(profile, "moe", "interpolated") == pytest.approx(1.6449 * profile.error("moe"))
    assert half_width(known, "moe", "extrapolated") == pytest.approx(1.6449 * 0.30)  # held-out sizes say nothing of it


def test_by_name_by_path_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "hw_profiles" / "l40s.yaml"
    code, by_name, _ = run(capsys, "show", "l40s", "--json", "--operator", "moe")
    assert code == 0
    code, by_path, _ = run(capsys, "show", str(path), "--json", "--operator", "moe")
    assert (code, by_path) == (0, by_name)
    assert [row["operator"] for row in json.loads(by_name)["operators"]] == ["moe"]


def test_broken_input_is_one_line_with_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "h100_smx")
    assert code == 2
    assert "Did you mean 'h100_sxm'?" in err
    code, _, err = run(capsys, "show", str(tmp_path / "none.yaml"))
    assert (code, err.count("\n")) == (2, 1)
    assert "no such file" in err
    other = tmp_path / "scenario.yaml"
    other.write_text("name: x\nmodel: mixtral-8x7b\n")
    code, _, err = run(capsys, "show", str(other))
    assert code == 2
    assert "scenario.yaml" in err
    assert "Traceback" not in err
    none = tmp_path / "none.yaml"
    text = (home() / "hw_profiles" / "cpu_2core.yaml").read_text()
    none.write_text(text + "\nfits: {moe: {mem_eff: 0.0}}\n")
    code, _, err = run(capsys, "show", str(none))
    assert code == 2
    assert "fits.moe.mem_eff is a share of a rate and must be above 0" in err
    code, _, err = run(capsys, "show", "h100_sxm", "--operator", "atention_decode")
    assert code == 2
    assert "Did you mean 'attention_decode'?" in err


def test_operators_of_keeps_the_order_of_the_house() -> None:
    assert operators_of(["moe", "gemm"]) == ("gemm", "moe")
    assert operators_of([]) == OPERATORS
    with pytest.raises(BadInput, match="Operators:"):
        operators_of(["zzz"])


def test_text_of_a_file_cannot_drive_the_terminal() -> None:
    assert clean("a\x1b[31mb\nc\u202e") == "a [31mb c"
    assert clean("x" * 500, 10) == "xxxxxxx..."


def test_plot_puts_values_where_they_are() -> None:
    size = np.array([1.0, 1024.0])
    rows = plot([Line("low", size, np.array([0.25, 0.25])), Line("high", size, np.array([1.0, 1.0]))], 40, 9, percent,
                lambda v: size_text(v, False), 1.0, plain=True)  # fmt: skip
    text = [row.plain for row in rows]
    assert text[0].startswith("100% |^^^")  # the second line, at the top
    assert text[6].startswith(" 25% |ooo")  # the first, two of eight rows above the bottom
    assert set("".join(text[1:6])) <= set(" |%075")
    assert text[-2].strip() == "o low"
    assert text[-3].split() == ["1", "8", "64", "512"] or "1k" in text[-3]


@pytest.mark.parametrize(
    ("ns", "text"), [(0.5, "0.50 ns"), (999.6, "1.00 us"), (12_345, "12.3 us"), (2.5e9, "2.50 s"), (3e12, "3000 s")]
)
def test_durations(ns: float, text: str) -> None:
    assert duration(ns) == text


@pytest.mark.parametrize(
    ("size", "of_bytes", "text"),
    [(1, False, "1"), (1024, False, "1k"), (1536, False, "1.5k"), (65536, True, "64 KiB"), (3 << 30, True, "3 GiB")],
)
def test_sizes(size: float, of_bytes: bool, text: str) -> None:
    assert size_text(size, of_bytes) == text
