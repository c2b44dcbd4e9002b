"""Every configuration compiled ahead of time, without a GPU: shared memory, registers, spills, instructions.

Triton compiles for a device that is not there, and the assembler it brings says what each kernel takes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moesim_kernels.ops.triton_config import CONFIGS, HOPPER_SHARED_BYTES, ITEM_BYTES, Config, Tile

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux", allow_module_level=True)
triton = pytest.importorskip("triton")

POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# What one block may have, bytes: CUDA C++ programming guide, technical specifications per compute capability
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: HOPPER_SHARED_BYTES, 100: HOPPER_SHARED_BYTES}
FIELDS = {
    "gate_up": "hidden_TH token_R:*i64 w13 block_3B:*i32 act_RI slot_TS:*i32 count_T:*i32 "
    "hidden:i32 intermediate:i32 blocks:i32 most:i32",
    "down": "act_RI gate_R:*fp32 w2 block_3B:*i32 out_RH hidden:i32 intermediate:i32 blocks:i32",
    "map_blocks": "end_E:*i32 block_3B:*i32 count_T:*i32 slots:i32 blocks:i32 tokens:i32",
    "combine_rows": "out_RH slot_TS:*i32 count_T:*i32 out_TH hidden:i32 most:i32",
}


def compiled(
    name: str, dtype: str, constants: dict[str, Any], capability: int, even: bool = True, **options: int
) -> Any:
    """Triton's result for one kernel. `even`: widths are multiples of 16, as a launch would find out."""
    from moesim_kernels.ops import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    types = dict(field.split(":") if ":" in field else (field, POINTER[dtype]) for field in FIELDS[name].split())
    aligned = [arg for arg, kind in types.items() if kind[0] == "*" or (even and arg in ("hidden", "intermediate"))]
    source = ASTSource(
        fn=kernel,
        signature={arg: types.get(arg, "constexpr") for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        attrs={(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def gemm(name: str, config: Config, dtype: str, capability: int, even: bool = True) -> Any:
    """One of a configuration's two GEMMs."""
    tile: Tile = config.up if name == "gate_up" else config.down
    constants = {"BM": config.block_rows, "COLS": tile.columns, "BK": tile.depth, "EVEN": even, "GROUP": 8}
    return compiled(name, dtype, constants, capability, even, num_warps=tile.warps, num_stages=tile.stages)


def assembled(kernel: Any, capability: int, folder: Path) -> dict[str, int]:
    """Registers of a thread and bytes of a thread's spills, as the assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers, log
    assert spills, log
    return {"registers": int(registers[1]), "spilled": sum(int(spills[i]) for i in (1, 2, 3))}


def check(
    config: Config, dtype: str, capability: int, folder: Path, names: tuple[str, ...] = ("gate_up", "down")
) -> None:
    """Shared memory is what `Config.buffer_bytes` says on Hopper and never above the limit; nothing is spilled."""
    shared = 0
    for name in names:
        kernel = gemm(name, config, dtype, capability)
        facts = assembled(kernel, capability, folder)
        print(f"sm_{capability} {config.name} {dtype} {name}: shared {kernel.metadata.shared}, {facts}")
        assert facts["spilled"] == 0
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        ptx = kernel.asm["ptx"]
        assert "cp.async.cg.shared.global" in ptx  # loads go to shared memory while products run
        if capability == 90:
            assert ("wgmma.mma_async" in ptx) == (config.block_rows >= 64 and dtype != "fp32")
        if capability == 90 and "wgmma" in ptx:
            # one product still runs while the next step's is issued
            assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", ptx)
        shared = max(shared, kernel.metadata.shared)
    if capability == 90 and len(names) == 2:
        assert shared == config.buffer_bytes(dtype)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["rows16", "wide128"])
def test_first_gemm_for_hopper(name: str, tmp_path: Path) -> None:
    check(CONFIGS[name], "bf16", 90, tmp_path, ("gate_up",))


def test_the_map_and_the_combination_for_hopper(tmp_path: Path) -> None:
    for kernel in (
        compiled("map_blocks", "bf16", {"BM": 16, "SLOTS": 256, "CHUNK": 32}, 90),
        compiled("combine_rows", "bf16", {"SLOTS": 256, "BH": 512, "STEP": 4}, 90, num_warps=1),
    ):
        assert assembled(kernel, 90, tmp_path)["spilled"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "dtype"), [(c.name, dtype) for c in CONFIGS.values() for dtype in c.items])
def test_every_configuration(name: str, dtype: str, capability: int, tmp_path: Path) -> None:
    check(CONFIGS[name], dtype, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_widths_that_no_tile_divides_compile_too(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    for kernel in (
        gemm("gate_up", config, config.items[0], 90, even=False),
        gemm("down", config, config.items[0], 90, even=False),
    ):
        assert kernel.metadata.shared <= HOPPER_SHARED_BYTES
        assert assembled(kernel, 90, tmp_path)["registers"] <= 255


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89])
def test_smaller_devices_are_given_what_fits(capability: int, tmp_path: Path) -> None:
    from moesim_kernels.ops.triton_config import choose_config

    for dtype in ITEM_BYTES:
        chosen = {
            choose_config(rows, 8, 4096, 14336, dtype, 108, SHARED_BYTES[capability]).name
            for rows in (1, 64, 128, 256, 65536)
        }
        for name in sorted(chosen):
            check(CONFIGS[name], dtype, capability, tmp_path, ("gate_up",))
