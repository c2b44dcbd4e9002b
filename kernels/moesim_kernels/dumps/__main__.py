"""`python -m moesim_kernels.dumps SRC.pt ... --into DIR`: a DIR/SRC.npz each, or exit 2 and one line on stderr.

torch unpickles only tensors, numbers and containers (`weights_only`). The limit of the address space is set after
torch is imported (its own libraries alone map gigabytes) and before the file is opened.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import resource
import sys
from pathlib import Path
from typing import Any

from moesim_kernels.dumps.sglang import MOST_BYTES, Refused, check_archive, to_arrays

__all__ = ["NO_TORCH", "main"]

NO_TORCH = 3
"""exit code where torch is not installed"""
_GIB = 1 << 30


def _limit(memory_bytes: int, seconds: int, file_bytes: int) -> None:
    """This process gets so much more memory than it has now, so much CPU time, and writes no larger file."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux the present size is not known: no limit of memory
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for what, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, file_bytes), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (value, value))


def _convert(source: Path, target: Path, torch: Any) -> None:
    """Write the arrays of `source`, whole or not at all."""
    import numpy as np

    made = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        arrays = to_arrays(torch, torch.load(source, map_location="cpu", weights_only=True))
        with made.open("wb") as file:
            np.savez(file, **arrays)
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)


def _problem(error: BaseException, memory_gib: int) -> str:
    """What `error` means to whoever gave the file."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors, numbers and containers; nothing of it was run"
    if isinstance(error, MemoryError):
        return f"reading it takes more than {memory_gib} GiB of memory"
    first = (str(error).splitlines() or [""])[0][:200]
    return f"damaged, or not what torch.save writes ({type(error).__name__}: {first})"


def main(arguments: list[str] | None = None) -> int:
    """Convert the files. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.dumps", description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="SRC.pt")
    parser.add_argument("--into", type=Path, default=Path(), metavar="DIR", help="where SRC.npz goes")
    parser.add_argument("--memory-gib", type=int, default=8, help="beyond what torch itself takes")
    parser.add_argument("--seconds", type=int, default=300, help="of CPU time")
    given = parser.parse_args(arguments)
    source = given.sources[0]
    try:
        for source in given.sources:
            check_archive(source)
        try:
            import torch
        except ImportError as error:
            print(f"torch cannot be imported ({error})", file=sys.stderr)
            return NO_TORCH
        torch.set_num_threads(1)
        _limit(given.memory_gib * _GIB, given.seconds, MOST_BYTES + _GIB)
        for source in given.sources:
            _convert(source, given.into / f"{source.stem}.npz", torch)
    except Exception as error:  # noqa: BLE001 - whatever a broken file makes torch raise is about that file
        print(f"{source}: {_problem(error, given.memory_gib)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
