"""The comparison of MoE back ends: what it asks for, and its floors, table and verdicts, on CPU back ends."""

from __future__ import annotations

import json
import math

import pytest
import torch
from moesim_kernels.bench import compare_moe
from moesim_kernels.bench.compare_moe import LAYERS, Ceilings, Layer, Row, ceilings, compare, main, summary, table
from moesim_kernels.bench.pool import Device, Pool
from moesim_kernels.ops.moe import has_grouped

TINY = Layer("tiny", 32, 16, 4, 2)
ONE = Ceilings(1e9, 1e9)  # a nanosecond a byte, a nanosecond an operation


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def row(layer: str, tokens: int, floors_ns: tuple[float, float], ns: float, histogram: str = "uniform") -> Row:
    times = {"grouped": (2 * ns, 2 * ns, 2 * ns), "triton": (ns, ns, ns)}
    return Row(layer, tokens, tokens, histogram, *floors_ns, times, {}, {"grouped": 0.0, "triton": 0.0})


def test_two_back_ends_are_timed_on_the_same_work() -> None:
    if not has_grouped():
        pytest.skip("this torch has no grouped_mm")
    device = Device("cpu", cache_bytes=1 << 16, capacity_bytes=1 << 26)
    got = compare(TINY, 8, "zipf:1.2", ("loop", "grouped"), device, ONE, samples=3)
    assert got.rows == 16
    assert set(got.ns) == {"loop", "grouped"}
    assert all(0 < low <= middle <= high for middle, low, high in got.ns.values())
    assert got.difference["loop"] == 0.0
    assert got.difference["grouped"] <= compare_moe.MOST_DIFFERENCE
    assert compare_moe._wrong(got) == []
    # 6 H I operations a row; at least one active expert's weights, tokens in and out, 2 bytes each
    assert got.flop_floor_ns == 6 * 32 * 16 * 16
    assert got.bytes_floor_ns in [2.0 * (3 * 32 * 16 * active + 2 * 8 * 32) for active in range(1, 5)]
    json.dumps(compare_moe.asdict(got), allow_nan=False)


def test_ceilings_are_rates_of_this_machine() -> None:
    device = Device("cpu", cache_bytes=1 << 16, capacity_bytes=1 << 26)
    found = ceilings(device, Pool(device), 1 << 20, 64, samples=2)
    assert 1e6 < found.bytes_per_s < 1e14
    assert 1e6 < found.flop_per_s < 1e16


def test_a_back_end_that_writes_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim_kernels.ops import moe

    right = moe.moe_local
    lazy = lambda *args: args[-1] if args[-2] == "grouped" else right(*args)  # noqa: E731
    monkeypatch.setattr(moe, "moe_local", lazy)
    device = Device("cpu", cache_bytes=1 << 16, capacity_bytes=1 << 26)
    got = compare(TINY, 4, "uniform", ("loop", "grouped"), device, ONE, samples=1)
    assert math.isnan(got.difference["grouped"])
    assert compare_moe._wrong(got) == ["grouped"]


def test_one_rank_of_eight_has_an_eighth_of_the_rows() -> None:
    by_name = {layer.name: layer for layer in LAYERS}
    rows = {name: layer.case(64, "uniform", "triton", 0).size["rows"] for name, layer in by_name.items()}
    assert rows == {"Mixtral-8x7B": 128, "Qwen3-30B-A3B": 512, "DeepSeek-V3 EP8": 64}


def test_the_table_and_the_summary_say_parts_of_the_ceilings() -> None:
    rows = [row("A", 1, (120_000.0, 10.0), 150_000.0), row("A", 4096, (100.0, 300_000.0), 400_000.0)]
    lines = list(table(rows))
    assert lines[2].split(" | ")[2].split() == ["150.0", "80.0%", "0.0%", "2.00"]
    assert lines[3].split(" | ")[1].split() == ["800.0", "0.0%", "37.5%", "1.00"]
    assert list(summary(rows, "triton")) == [
        "triton, uniform: at least 80.0% of the byte floor (A, T=1)",
        "triton, uniform: A reaches 75.0% of the peak at T=4096",
    ]


def test_a_sweep_forces_the_configuration_and_gives_the_choice_back() -> None:
    triton_moe = pytest.importorskip("moesim_kernels.ops.triton_moe")
    chosen = triton_moe.choose_config
    assert "triton:wide128" in compare_moe._backends(sweep=True)
    with compare_moe._configured("wide128"):
        assert triton_moe.choose_config(1, 1, 1, 1, "bf16", 1, 1).name == "wide128"
    assert triton_moe.choose_config is chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert main(["--quick", "--out", str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "CUDA" in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.gpu
def test_the_fused_kernel_agrees_with_grouped_mm_while_timed() -> None:
    device = Device.find("cuda")
    got = compare(Layer("small", 1024, 512, 16, 4), 64, "zipf:1.2", ("grouped", "triton"), device, ONE, samples=3)
    assert compare_moe._wrong(got) == []
    assert got.remarks == {}


def test_a_whole_run_writes_what_it_prints(monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("triton")
    device = Device("cpu", cache_bytes=1 << 16, capacity_bytes=1 << 26)
    monkeypatch.setattr(compare_moe, "LAYERS", (TINY, Layer("too large", 1 << 13, 1 << 12, 4, 2)))
    monkeypatch.setattr(compare_moe, "QUICK_TOKENS", (1, 64))
    monkeypatch.setattr(compare_moe, "CEILING_BYTES", 1 << 20)
    monkeypatch.setattr(compare_moe, "CEILING_SIDE", 64)
    monkeypatch.setattr(compare_moe, "_backends", lambda sweep: ("torch", "loop"))
    monkeypatch.setattr(Device, "find", lambda kind: device)
    out = tmp_path / "new" / "out.json"
    assert main(["--quick", "--out", str(out)]) == 1  # a layer was skipped
    found = json.loads(out.read_text())
    assert [(r["layer"], r["tokens"], r["histogram"]) for r in found["rows"]] == [
        ("tiny", tokens, histogram) for histogram in compare_moe.HISTOGRAMS for tokens in (1, 64)
    ]
    assert len(found["skipped"]) == 4
    assert "GB" in found["skipped"][0]
    assert found["wrong"] == []
    printed = capsys.readouterr().out
    assert printed.count("tiny ") == 8  # each row when it is measured, and in the table
    assert list(out.parent.iterdir()) == [out]
