"""The optional package aiconfigurator-core (NVIDIA, Apache-2.0): where its tables lie and what its systems are.

Only its data files are read: parquet tables and YAML. The package itself is never imported, so none of its code runs.
Layout: systems/data/SYSTEM/FAMILY/BACKEND/VERSION/TABLE_perf.parquet, and systems/SYSTEM.yaml with datasheet figures.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from moesim.errors import BadInput, Problem
from moesim_kernels.profiles.find import clean

__all__ = ["FAMILIES", "LICENCE", "Package", "TableRef", "datasheet", "installed"]

LICENCE = "Apache-2.0, NVIDIA"
_MAX_YAML_BYTES = 256 << 10

FAMILIES: dict[str, tuple[str, str]] = {
    # what is imported: (folder, file)
    "gemm": ("gemm", "gemm_perf"),
    "moe": ("moe", "moe_perf"),
    "attention_prefill": ("attention", "context_attention_perf"),
    "attention_decode": ("attention", "generation_attention_perf"),
    "mla_prefill": ("mla", "context_mla_perf"),
    "mla_decode": ("mla", "generation_mla_perf"),
    "custom_all_reduce": ("comm", "custom_allreduce_perf"),
    "nccl": ("comm", "nccl_perf"),
}
"""Kinds of table that are understood -> folder and file in the package."""

_SHEETS = {
    "a100_sxm": "a100_sxm_80gb",
    "b200_sxm": "b200_sxm",
    "h100_sxm": "h100_sxm_datasheet",
    "h200_sxm": "h200_sxm",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx_pro_6000_datasheet",
}
"""Systems of the package whose datasheet figures stand in our own hw_profiles/."""

_SMS = {80: 108, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}
_HOST = {
    "host_memory_gib": 2048,
    "host_gb_per_s": 614,
    "nvme_gb_per_s": 25,
    "nvme_gib": 27000,
    "cpu_cores": 112,
}


@dataclass(frozen=True, slots=True)
class TableRef:
    """One table of the package. name: its path below `systems`, as provenance states it."""

    path: Path
    backend: str
    version: str
    name: str


@dataclass(frozen=True, slots=True)
class Package:
    """The installed package: its `systems` folder and its version."""

    systems: Path
    version: str

    def names(self) -> list[str]:
        """Systems that have tables, sorted."""
        data = self.systems / "data"
        return sorted(p.name for p in data.iterdir() if p.is_dir() and self.backends(p.name)) if data.is_dir() else []

    def backends(self, system: str) -> list[str]:
        """Serving engines with a GEMM, MoE or attention table of a system, sorted."""
        found = (self.systems / "data" / system).glob("*/*/*/*_perf.parquet")
        wanted = {FAMILIES[kind] for kind in ("gemm", "moe", "attention_prefill", "attention_decode")}
        return sorted({p.parts[-3] for p in found if (p.parts[-4], p.stem) in wanted})

    def versions(self, system: str, backend: str, kind: str) -> list[str]:
        """Versions of a backend with a table of this kind, oldest first."""
        folder, file = FAMILIES[kind]
        found = (self.systems / "data" / system / folder / backend).glob(f"*/{file}.parquet")
        return sorted((p.parent.name for p in found), key=_order)

    def current(self, system: str, backend: str) -> str | None:
        """The version that the package itself serves by default: newer folders hold single tables of new models."""
        path = self.systems / "query_versions.yaml"
        data = _yaml(path) if path.is_file() else {}
        found = None
        for part in (data.get("defaults"), (data.get("overrides") or {}).get(system)):
            slot = part.get(backend) if isinstance(part, dict) else None
            found = slot.get("current", found) if isinstance(slot, dict) else found
        return found if isinstance(found, str) else None

    def table(self, system: str, backend: str, kind: str, version: str | None = None) -> TableRef | None:
        """The table of a kind: of `version`, else of the package's current one, else the newest; None without any."""
        known = self.versions(system, backend, kind)
        if not known or (version is not None and version not in known):
            return None
        current = self.current(system, backend)
        chosen = version or (current if current in known else known[-1])
        folder, file = FAMILIES[kind]
        path = self.systems / "data" / system / folder / backend / chosen / f"{file}.parquet"
        return TableRef(path, backend, chosen, path.relative_to(self.systems.parent).as_posix())

    def check(self, system: str, backend: str, version: str | None) -> None:
        """Raises BadInput with what there is, where the system, the backend or the version is not known."""
        _known("--system", "system", system, self.names())
        _known("--backend", f"backend of {system}", backend, self.backends(system))
        if version is not None:
            kinds = ("gemm", "moe", "attention_prefill", "attention_decode")
            known = {v for kind in kinds for v in self.versions(system, backend, kind)}
            _known("--version", f"version of {backend} on {system}", version, sorted(known, key=_order))


def _known(option: str, what: str, given: str, known: list[str]) -> None:
    if given in known:
        return
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    message = f"unknown {what} {clean(given, 60)!r}. {hint}Known: {', '.join(known) or 'none'}"
    raise BadInput(Problem(option, message))


def _order(version: str) -> tuple[tuple[int, ...], str]:
    """Versions by their numbers: 0.5.9 before 0.5.14."""
    return tuple(int(n) for n in re.findall(r"\d+", version)), version


def installed() -> Package:
    """Find the package without importing it. Raises BadInput with the mend if it or its data are not there."""
    mend = "Run: pip install 'moesim[aic]' (an 82 MB wheel; it brings pandas)"
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            Problem("moesim profile import aic", f"the package aiconfigurator-core is not installed. {mend}")
        )
    systems = Path(next(iter(spec.submodule_search_locations))) / "systems"
    if not (systems / "data").is_dir():
        raise BadInput(Problem(str(systems), f"the package has no tables here (systems/data is missing). {mend}"))
    try:
        version = metadata.version("aiconfigurator-core")
    except metadata.PackageNotFoundError:
        version = "unknown version"
    return Package(systems, version)


def _yaml(path: Path) -> dict[str, Any]:
    """A mapping of plain values (its integer keys are why this is not our own stricter reader). Raises BadInput."""
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise BadInput(Problem(str(path), f"may hold {_MAX_YAML_BYTES >> 10} KiB, this one is larger"))
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise BadInput(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(Problem(str(path), f"is not YAML: {clean(error, 200)}")) from None
    if not isinstance(data, dict):
        raise BadInput(Problem(str(path), "must be a mapping"))
    return data


# ---- datasheets


def datasheet(package: Package, system: str) -> dict[str, Any]:
    """Facts of a system as `ProfileSpec` keys: those of our own hw_profiles where there are, else the package's.

    Raises BadInput where the package's file misses a figure.
    """
    from moesim.scenario.files import home
    from moesim.scenario.yamlio import load_yaml

    facts = ["device", "vendor", "memory_gib", "hbm_gb_per_s", "flop_per_s", "num_sms", "graph_launch_us"]
    if system in _SHEETS:
        name = _SHEETS[system]
        data, _ = load_yaml(home() / "hw_profiles" / f"{name}.yaml")
        sheet = {key: data[key] for key in [*facts, "eager_launch_us", "node", "provenance"]}
        sheet["provenance"] = {"sheet": f"hw_profiles/{name}.yaml", **sheet["provenance"]}
        return sheet
    path = package.systems / f"{system}.yaml"
    data = _yaml(path)
    try:
        return _sheet(data["gpu"], data["node"], system, package.version)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(Problem(str(path), f"a figure is missing or no number: {clean(error)}")) from None


def _sheet(gpu: dict[str, Any], node: dict[str, Any], system: str, version: str) -> dict[str, Any]:
    """The package's own figures; what it does not state is typical of the class and says `assumed`."""
    rates = {"bf16": "bfloat16_tc_flops", "fp8": "fp8_tc_flops", "int8": "int8_tc_flops", "nvfp4": "fp4_tc_flops"}
    flop = {dtype: float(gpu[key]) / 1e12 for dtype, key in rates.items() if key in gpu}
    flop |= {"fp16": flop["bf16"]} | ({"mxfp4": flop["nvfp4"]} if "nvfp4" in flop else {})
    file = f"PyPI aiconfigurator-core {version} systems/{system}.yaml"
    assumed = "num_sms, launch, latencies, host_memory_gib, host_gb_per_s, nvme_gb_per_s, nvme_gib, cpu_cores"
    return {
        "device": system,
        "vendor": "NVIDIA" if "sm_version" in gpu else "as the package says",
        "memory_gib": float(gpu["mem_capacity"]) / 2**30,
        "hbm_gb_per_s": float(gpu["mem_bw"]) / 1e9,
        "flop_per_s": {dtype: f"{tera:.6g} TFLOP/s" for dtype, tera in flop.items()},
        "num_sms": _SMS.get(gpu.get("sm_version", 0), 132),
        "graph_launch_us": 2.5,
        "eager_launch_us": 8,
        "node": {
            "gpus_per_node": int(node["num_gpus_per_node"]),
            "nvlink_gb_per_s": float(node["intra_node_bw"]) / 1e9,
            "nvlink_latency_us": 2.0,
            "nic_gb_per_s": float(node["inter_node_bw"]) / 1e9,
            "nic_latency_us": 10,
            "pcie_gb_per_s": float(node["pcie_bw"]) / 1e9,
            **_HOST,
        },
        "provenance": {
            "sheet": file,
            "sources": {"memory, rates, links": file, assumed: "typical of the class, assumed"},
        },
    }
