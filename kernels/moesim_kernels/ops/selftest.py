"""Checks every operator against float64 on a bare machine: `python -m moesim_kernels.ops.selftest [--device cuda]`.

Needs torch and numpy; on CUDA the fused Triton layer is checked too where Triton is installed. One line a check: the
worst error as a part of its bound, the error and the bound there. Exit status 1 if any check fails, 2 without the
device.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch

from .checks import Outcome, layer_checks
from .checks_around import around_checks
from .checks_block import block_checks
from .moe import HowLayer

__all__ = ["all_checks", "main"]


def all_checks(device: torch.device) -> dict[str, Callable[[], Outcome]]:
    """Every check that this device can run, by name."""
    fused = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    hows: tuple[HowLayer, ...] = ("loop", "grouped", "triton") if fused else ("loop", "grouped")
    return {**layer_checks(device, hows), **around_checks(device), **block_checks(device)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the checks whose name holds --only; returns the exit status."""
    parser = argparse.ArgumentParser(description="check every operator against float64")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--only", default="", help="run only checks whose name holds this")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; use --device cpu, or see that the driver is loaded", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    torch.set_float32_matmul_precision("highest")  # some images turn TF32 on
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        chosen = {name: check for name, check in all_checks(device).items() if options.only in name}
        print(f"torch {torch.__version__} on {_device_name(device)}: {len(chosen)} checks")
        failed = [name for name, check in chosen.items() if not _line(name, check)]
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed or not chosen else 0


def _device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _line(name: str, check: Callable[[], Outcome]) -> bool:
    """Runs and prints one check; an exception is a failure, told in its line, so that the rest still runs."""
    try:
        outcome = check()
    except Exception as error:  # noqa: BLE001 - a kernel may fail in any way
        print(f"FAIL {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    told = f"{outcome.ratio:.3f} of the bound ({outcome.error:.2e} of {outcome.bound:.2e})"
    print(f"{'ok  ' if outcome.ok else 'FAIL'} {name}: {told}")
    return outcome.ok


if __name__ == "__main__":
    sys.exit(main())
