"""What was measured on: facts about the machine for the log, and which of them make a log another machine's."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from moesim_kernels.bench.pool import Device
from moesim_kernels.bench.pressure import cpu_pressure

__all__ = ["IDENTITY", "facts", "kernel_hash"]

# A log goes on only where these agree: other values measure something else.
IDENTITY = ("device", "cpu", "driver", "cuda", "torch", "triton", "threads", "kernel")
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def kernel_hash(folder: Path | None = None) -> str:
    """16 hex digits over the names and sources under `ops/`, which decide what a time means."""
    folder = folder or Path(__file__).resolve().parent.parent / "ops"
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def facts(device: Device) -> dict[str, Any]:
    """JSON facts: device, driver, cuda, cudnn, torch, triton, numpy, python, cpu, threads, kernel (hash of the sources
    under ops/), date (UTC), psi (percent, None where the kernel does not say), bytes of memory, clocks where nvidia-smi
    tells them."""
    import numpy
    import torch

    out: dict[str, Any] = {
        "device": "cpu" if device.kind == "cpu" else torch.cuda.get_device_name(device.index),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": device.threads,
        "cache_bytes": device.cache_bytes,
        "driver": None,
        "cuda": None,
        "cudnn": None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "kernel": kernel_hash(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "psi": cpu_pressure(),
        "host_memory_bytes": _host_memory_bytes(),
    }
    out["memory_bytes"] = out["host_memory_bytes"]
    if device.kind == "cuda":
        out["cuda"] = torch.version.cuda
        out["cudnn"] = torch.backends.cudnn.version()
        out["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device.index)))
        properties = torch.cuda.get_device_properties(device.index)
        out["memory_bytes"], out["sms"] = properties.total_memory, properties.multi_processor_count
        out["gpus"] = torch.cuda.device_count()
        out["driver"] = _nvidia_smi("driver_version", device.index)
        out["clocks"] = _nvidia_smi(_CLOCKS, device.index)
    return out


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _host_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def _nvidia_smi(query: str, index: int) -> str | None:
    """One line of nvidia-smi's answer, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603  the program that the user's PATH names, fixed arguments
            [program, f"--query-gpu={query}", "--format=csv,noheader", f"--id={index}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()[:500] or None
