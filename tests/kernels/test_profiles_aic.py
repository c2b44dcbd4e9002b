"""`moesim profile import aic`: small tables of the package's layout, planted impossible rows, the real package."""

from __future__ import annotations

import importlib.util
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from moesim_kernels.profiles import aic_tables
from moesim_kernels.profiles.aic_import import base_profile, import_tables, write_profile
from moesim_kernels.profiles.aic_package import Package, datasheet
from moesim_kernels.profiles.shapes import Shape, floor_ns, price
from pyarrow import parquet

from moesim.cli import main
from moesim.cost.operators import Operators
from moesim.errors import BadInput
from moesim.scenario.load import load_profile

BYTES, FLOP = aic_tables.BYTES_REASON, aic_tables.FLOP_REASON
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def write(root: Path, place: str, rows: list[dict[str, Any]], backend: str = "vllm", version: str = "1.0.0") -> Path:
    folder, name = place.split("/")
    path = root / "systems" / "data" / "h100_sxm" / folder / backend / version / f"{name}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def slower(op: str, key: tuple[Any, ...], size: float, batch: int = 1) -> float:
    """A believable time in ms: 6 us and 1.4 times the floor."""
    return (6e3 + 1.4 * float(floor_ns(BASE, Shape(op, key, batch), np.array(float(size))))) / 1e6


def gemm_rows() -> list[dict[str, Any]]:
    rows = []
    for n, k in ((4096, 4096), (8192, 1024), (2048, 7168)):
        for m in TOKENS:
            ms = slower("gemm", (n, k, "bf16"), m)
            rows.append({"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": ms, "kernel_source": "linear"})
    return rows


def moe_rows(ep: int = 1) -> list[dict[str, Any]]:
    rows = []
    for hidden, inter, experts, top_k in ((4096, 14336, 8, 2), (2048, 768, 128, 8), (4096, 1536, 64, 4)):
        for tokens in TOKENS:
            pairs = tokens * top_k / ep
            key = (hidden, inter, experts // ep, top_k, "bf16", 3)
            row = {"moe_dtype": "bfloat16", "num_tokens": tokens, "hidden_size": hidden, "inter_size": inter}
            row |= {"topk": top_k, "num_experts": experts, "moe_tp_size": 1, "moe_ep_size": ep}
            row |= {"distribution": "balanced", "kernel_source": "triton", "latency": slower("moe", key, pairs)}
            rows.append(row)
    return rows


def decode_rows() -> list[dict[str, Any]]:
    out = []
    for batch in (1, 4, 16, 64):
        for step in (1, 15, 127, 1023, 8191, 32767):
            row = {"batch_size": batch, "isl": 1, "step": step, "num_heads": 32, "num_key_value_heads": 8}
            row |= {"head_dim": 128, "kv_cache_dtype": "bfloat16", "attn_dtype": "bfloat16", "window_size": 0}
            ms = slower("attention_decode", ("gqa", 32, 8, 128, 128, 0, "bf16"), step + 1, batch)
            out += [{**row, "latency": ms}, {**row, "num_heads": 64, "latency": 2 * ms}]
    return out


def nccl_rows() -> list[dict[str, Any]]:
    out = []
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        for ranks in (2, 8):
            for elements in 2 ** np.arange(7, 28):
                size = float(elements) * 2 / (1 if op == "all_reduce" else ranks)
                row = {"op_name": op, "nccl_dtype": "half", "num_gpus": ranks, "message_size": int(elements)}
                out.append({**row, "latency": slower(op, (ranks,), size)})
    return out


BASE = base_profile(datasheet(Package(Path(), "0"), "h100_sxm"))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package with GEMM, MoE, decode and NCCL tables of one backend."""
    root = tmp_path / "aiconfigurator_core"
    write(root, "gemm/gemm", gemm_rows())
    write(root, "moe/moe", moe_rows())
    write(root, "attention/generation_attention", decode_rows())
    write(root, "comm/nccl", nccl_rows(), "nccl", "2.29.2")
    return Package(root / "systems", "0.0.0")


def quietly(text: str) -> None:
    """Progress that nobody reads."""


def left_out(package: Package, name: str) -> dict[str, int]:
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    return dict(found.tables[name]["left_out"])


def test_times_at_the_tables_sizes_come_back(package: Package, tmp_path: Path) -> None:
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    assert {p.samples.op for p in found.parts} == {
        "gemm", "moe", "attention_decode", "all_reduce", "all_gather", "reduce_scatter"
    }  # fmt: skip
    assert all(sum(row["left_out"].values()) == 0 for name, row in found.tables.items() if name)
    assert any("attention_prefill" in note for note in found.notes)
    out = tmp_path / "mine.yaml"
    files = write_profile(found, package, "h100_sxm", out, "moesim profile import aic")
    assert [f.name for f in files] == [
        "mine.yaml", "mine.gemm.json", "mine.moe.json", "mine.attention.json", "mine.links.json"
    ]  # fmt: skip
    profile = load_profile(out)
    ops = Operators(profile)
    for shape, rows in (
        (Shape("gemm", (8192, 1024, "bf16")), TOKENS[:-1]),
        (Shape("moe", (2048, 768, 128, 8, "bf16", 3)), [8 * t for t in TOKENS]),
        (Shape("attention_decode", ("gqa", 32, 8, 128, 128, 0, "bf16"), 16), [16, 128, 1024, 8192]),
        (Shape("all_gather", (8,)), [2.0**7, 2.0**12, 2.0**20]),
    ):
        size = np.array(rows, float)
        wanted = np.array([slower(shape.op, shape.key, s, shape.batch) * 1e6 for s in size])
        np.testing.assert_allclose(price(ops, shape, size).ns, wanted, rtol=2e-3)
    known = profile.provenance
    assert known["operators"]["gemm"]["table"] == "systems/data/h100_sxm/gemm/vllm/1.0.0/gemm_perf.parquet"
    assert known["operators"]["gemm"]["kernels"] == ["linear"]
    assert "Apache-2.0" in known["tables"]
    assert profile.interval("gemm", 1) is not None
    assert set(profile.errors) == set(found.errors())
    assert max(profile.errors.values()) < 0.2  # the held-out points follow the same formula


def test_impossible_gemm_rows_are_refused_and_counted(package: Package) -> None:
    rows = gemm_rows()
    small = next(r for r in rows if r["m"] == 1)
    large = next(r for r in rows if r["m"] == 8192)
    small["latency"] = 4096 * 4096 * 2 / 3.35e12 * 1e3 * 0.9  # 90 % of reading its weights at 3.35 TB/s
    large["latency"] = 2 * 8192 * 4096 * 4096 / 989e12 * 1e3 * 0.9
    rows[5]["latency"] = float("nan")
    rows[6]["latency"] = -1.0
    extra = [
        {**rows[1], "n": 64},
        {**rows[1], "gemm_dtype": "fp6"},
        {**rows[1], "gemm_dtype": "nvfp4"},
        {**rows[1], "m": -4},
    ]
    write(package.systems.parent, "gemm/gemm", rows + extra)
    assert Counter(left_out(package, "gemm")) == {
        BYTES: 1,
        FLOP: 1,
        "no positive time, or a size below zero": 3,
        "narrower than 128 columns or rows": 1,
        "number format fp6": 1,
    }


def test_a_moe_shape_is_not_believed_past_its_first_impossible_row(package: Package) -> None:
    rows = moe_rows()
    at = next(r for r in rows if r["hidden_size"] == 2048 and r["num_tokens"] == 64)
    at["latency"] *= 0.4
    skewed = [{**r, "distribution": "power_law_1.2"} for r in rows[:7]]
    ranks = moe_rows(ep=8)
    write(package.systems.parent, "moe/moe", rows + skewed + ranks)
    assert left_out(package, "moe") == {
        "EP rank: its time does not shrink with its share of the rows": len(ranks),
        "skewed routing, its histogram not in the table": 7,
        aic_tables.LATER_REASON: 7,  # 128 to 8192 tokens
        BYTES: 1,
    }


def test_what_a_kernel_pays_for_rows_of_other_ranks_is_learnt(package: Package) -> None:
    """EP ranks timed as their own share plus 5 hidden-sized bytes a pair of another rank."""
    rows = []
    for ep in (8, 16):
        for own in moe_rows(ep=8):
            hidden, other = own["hidden_size"], own["num_tokens"] * own["topk"] * (1 - 1 / ep)
            key = (hidden, own["inter_size"], own["num_experts"] // ep, own["topk"], "bf16", 3)
            if own["num_experts"] >= ep and own["num_tokens"] >= 4096:
                ms = slower("moe", key, own["num_tokens"] * own["topk"] / ep) + other * hidden * 5 / 3.35e12 * 1e3
                rows += [{**own, "moe_ep_size": ep, "latency": ms}] * 4
    assert len(rows) >= 30
    write(package.systems.parent, "moe/moe", moe_rows() + rows)
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    part = next(p for p in found.parts if p.samples.op == "moe")
    assert part.fitted.values["nonlocal_hidden"] == pytest.approx(5.0, rel=0.35)


def test_kernels_launched_by_the_host_get_both_ways_of_running(package: Package) -> None:
    rows = gemm_rows()
    for n, k in ((4096, 4096), (8192, 4096), (4096, 8192), (8192, 8192), (16384, 4096), (4096, 16384)):
        for m in (1, 4, 16, 32, 64, 256, 1024, 4096, 6144, 8192, 12288, 16384, 32768):
            fp8, size = slower("gemm", (n, k, "fp8"), m), {"m": m, "n": n, "k": k, "kernel_source": "x"}
            rows.append({**size, "gemm_dtype": "fp8", "latency": fp8})
            rows.append({**size, "gemm_dtype": "fp8_block", "latency": max(1.25 * fp8, 0.06)})
    write(package.systems.parent, "gemm/gemm", rows)
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    variants = {p.samples.variant: p for p in found.parts if p.samples.op == "gemm"}
    assert set(variants) == {"bf16", "fp8", "fp8_block", "fp8_block@eager"}
    graph = variants["fp8_block"].samples
    assert graph.ns.min() < 30e3 < 59e3 < variants["fp8_block@eager"].samples.ns.min()
    weak = [c for c in variants["fp8_block"].fitted.curves if c.grade is not None]
    assert weak
    assert all(c.grade is not None and c.grade[0] == 2 and c.grade[-1] == 0 for c in weak)


@pytest.mark.parametrize("broken", ["column", "text", "pickle", "torn"])
def test_broken_tables_are_told_by_name(package: Package, broken: str) -> None:
    path = package.systems / "data/h100_sxm/gemm/vllm/1.0.0/gemm_perf.parquet"
    if broken == "column":
        write(package.systems.parent, "gemm/gemm", [{k: v for k, v in r.items() if k != "n"} for r in gemm_rows()])
    elif broken == "text":
        write(package.systems.parent, "gemm/gemm", [{**r, "m": "many"} for r in gemm_rows()])
    elif broken == "pickle":
        path.write_bytes(pickle.dumps({"m": 1}))
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match=r"gemm_perf\.parquet"):
        import_tables(package, "h100_sxm", "vllm", None, quietly)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("h100", "vllm", None), "Did you mean 'h100_sxm'?"),
        (("h100_sxm", "vlm", None), "Did you mean 'vllm'?"),
        (("h100_sxm", "vllm", "0.9"), "unknown version of vllm on h100_sxm '0.9'"),
        (("../../etc", "vllm", None), "unknown system"),
    ],
)
def test_unknown_names_are_answered_with_the_known(package: Package, arguments: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said.replace("?", r"\?")):
        import_tables(package, *arguments, quietly)


def test_the_version_the_package_serves_comes_before_a_newer_folder(package: Package) -> None:
    write(package.systems.parent, "gemm/gemm", gemm_rows()[:3], version="1.1.0rc2")
    assert package.versions("h100_sxm", "vllm", "gemm") == ["1.0.0", "1.1.0rc2"]
    newest = package.table("h100_sxm", "vllm", "gemm")
    assert newest is not None
    assert newest.version == "1.1.0rc2"
    (package.systems / "query_versions.yaml").write_text(
        yaml.safe_dump(
            {"defaults": {"vllm": {"current": "9"}}, "overrides": {"h100_sxm": {"vllm": {"current": "1.0.0"}}}}
        )
    )
    served = package.table("h100_sxm", "vllm", "gemm")
    assert served is not None
    assert served.version == "1.0.0"
    asked = package.table("h100_sxm", "vllm", "gemm", "1.1.0rc2")
    assert asked is not None
    assert asked.version == "1.1.0rc2"


def test_a_system_without_a_sheet_of_ours_takes_the_packages_own(package: Package) -> None:
    gpu = {"mem_bw": 300 * 10**9, "mem_capacity": 24 << 30, "bfloat16_tc_flops": 121 * 10**12, "sm_version": 89}
    link = {"inter_node_bw": 25 * 10**9, "intra_node_bw": 32 * 10**9, "pcie_bw": 32 * 10**9}
    sheet = {"gpu": gpu, "node": {"num_gpus_per_node": 8, **link}, "misc": {"nccl_mem": {1: 0}}}
    (package.systems / "l4.yaml").write_text(yaml.safe_dump(sheet))
    profile = base_profile(datasheet(package, "l4"))
    assert (profile.hbm_bytes_per_s, profile.memory_bytes) == (300e9, 24 << 30)
    assert profile.flop_rate("bf16") == 121e12
    assert profile.node.nvlink_bytes_per_s == 32e9
    (package.systems / "l4.yaml").write_text("gpu: {mem_bw: much}\nnode: {}\n")
    with pytest.raises(BadInput, match=r"l4.yaml: a figure is missing"):
        datasheet(package, "l4")


def test_nothing_is_left_of_a_profile_that_cannot_be_written(
    package: Package, tmp_path: Path, monkeypatch: Any
) -> None:
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    folder = tmp_path / "out"
    folder.mkdir()

    def full(path: Path, text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moesim_kernels.profiles.aic_import.write_whole", full)
    with pytest.raises(BadInput, match="cannot be written"):
        write_profile(found, package, "h100_sxm", folder / "p.yaml", "")
    assert not list(folder.iterdir())


def test_the_verb_says_what_is_missing(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["profile", "import", "aic", *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "aiconf" in name else found(name, *a))
    assert "pip install 'moesim[aic]'" in run("--list")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / "aiconfigurator_core" / "systems" / "data"
    data.mkdir(parents=True)
    (tmp_path / "aiconfigurator_core" / "__init__.py").write_text("raise SystemExit('imported')")
    importlib.invalidate_caches()
    assert "--system, --backend, --out missing" in run()
    assert "must end in .yaml" in run("--system", "a", "--backend", "b", "--out", str(tmp_path / "x.json"))
    assert "there is no folder" in run("--system", "a", "--backend", "b", "--out", str(tmp_path / "no" / "x.yaml"))
    assert "unknown system 'a'. Known: none" in run(
        "--system", "a", "--backend", "b", "--out", str(tmp_path / "x.yaml")
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None,
    reason="the optional package aiconfigurator-core (extra `aic`, an 82 MB wheel) is not installed",
)
def test_the_real_package_gives_the_committed_h100(tmp_path: Path) -> None:
    from moesim_kernels.profiles.aic_package import installed
    from moesim_kernels.profiles.compare import compare
    from moesim_kernels.profiles.find import load_named

    package = installed()
    found = import_tables(package, "h100_sxm", "vllm", None, quietly)
    out = tmp_path / "h100.yaml"
    write_profile(found, package, "h100_sxm", out, "")
    report = compare(load_named("h100_sxm"), load_profile(out), ("gemm", "moe", "attention_decode", "all_gather"))
    for row in report["operators"]:
        assert row["geometric_mean"]["ratio"] == pytest.approx(1.0, abs=0.08)
    assert found.errors()["moe"] < 0.2
