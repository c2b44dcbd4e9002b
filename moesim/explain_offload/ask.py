"""From what the command line says to the scenario that all candidates change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.engine_spec import EngineSpec
from moesim.errors import BadInput, Problem
from moesim.scenario.files import find_named
from moesim.scenario.load import Scenario, load_model, load_profile, load_scenario, scenario_from_dict
from moesim.scenario.tier_checks import TIER_POLICIES

__all__ = ["Ask", "Base", "Size"]

_SHORT_OUTPUT = 48
"""output tokens of a request while candidates are tried"""
_LONG_OUTPUT = 64
_LONG_REQUESTS = 8
"""of the runs that figures are taken from"""


@dataclass(frozen=True, slots=True)
class Size:
    """Requests of a run: how many, and their lengths."""

    requests: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Ask:
    """device: a device profile, which needs a model, or a scenario file. vram_gib: device memory that may be used,
    None: what an engine takes of it. trace: recorded routing; None: the scenario's, or the synthetic model's.
    concurrency: requests served at a time. prompt_tokens, output_tokens: of each. dram_gib: host memory for experts.
    home: the tier that holds all experts. kinds: offload kinds to try; empty: all that can be run. overrides: changes
    of the scenario. worth: a change of buffers must gain that much to be made."""

    device: str
    model: str | None = None
    vram_gib: float | None = None
    trace: Path | None = None
    concurrency: int = 1
    prompt_tokens: int = 512
    output_tokens: int = 256
    dram_gib: float | None = None
    home: str | None = None
    kinds: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    seed: int = 0
    worth: float = 0.01

    @property
    def kv_tokens(self) -> int:
        """Of all requests served at a time, to their last token, each in whole blocks of the engine's usual size."""
        block = int(EngineSpec().block_size)
        return self.concurrency * -(-(self.prompt_tokens + self.output_tokens) // block) * block

    @property
    def short(self) -> Size:
        """Requests that candidates are tried on: the whole prompt, fewer tokens of output."""
        return Size(max(self.concurrency, 2), self.prompt_tokens, min(self.output_tokens, _SHORT_OUTPUT))

    @property
    def long(self) -> Size:
        """Requests that figures are taken from: more of them, as many at a time."""
        requests = -(-_LONG_REQUESTS // self.concurrency) * self.concurrency
        return Size(requests, self.prompt_tokens, min(self.output_tokens, _LONG_OUTPUT))


class Base:
    """Makes scenarios of the deployment. Raises BadInput where it cannot be read."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._file = Path(ask.device) if ask.device.endswith((".yaml", ".yml")) else None
        if self._file is None and ask.model is None:
            message = f"{ask.device} is no scenario file, so --model must be given beside it"
            raise BadInput(Problem("--device", message))
        if ask.trace is not None and not ask.trace.exists():
            raise BadInput(Problem("--trace", f"no such file or folder: {ask.trace}"))
        if ask.model is not None:
            model = load_model(find_named(ask.model, "workloads/models", Path.cwd(), "--model", "model"))
            if not model.is_moe:
                raise BadInput(Problem("--model", f"{model.name} is a dense model: it has no experts to offload"))

    def scenario(self, changes: Sequence[str], size: Size, seed: int) -> Scenario:
        """With `changes` (`key=value`) on top of what was asked."""
        ask = self.ask
        whole = "policies.offload=none" in changes
        asked = tuple(o for o in ask.overrides if not (whole and _only_tiers(o)))
        requests = {
            "format": "closed_loop", "concurrency": ask.concurrency, "num_requests": size.requests,
            "prompt_tokens": size.prompt, "output_tokens": size.output,
        }  # fmt: skip
        given: dict[str, Any] = {
            "requests": json.dumps(requests),
            "routing.fidelity": "token",
            "engine.max_num_seqs": ask.concurrency,
            "routing.path": None if ask.trace is None else ask.trace.resolve(),
            **(self._whole() if whole else self._tiers()),
        }
        own = [f"{key}={value}" for key, value in given.items() if value is not None]
        if self._file is not None:
            named = [] if ask.model is None else [f"model={ask.model}"]
            return load_scenario(self._file, (*named, *own, *changes, *asked), seed)
        data: dict[str, Any] = {"name": "explain", "model": ask.model, "cluster": {"device": ask.device}}
        return scenario_from_dict(data, Path.cwd(), (*own, *changes, *asked), seed)

    def _tiers(self) -> dict[str, Any]:
        ask = self.ask
        return {
            "tiers.experts": "rest",
            "tiers.kv_tokens": ask.kv_tokens,
            "tiers.vram": None if ask.vram_gib is None else f"{ask.vram_gib} GiB",
            "tiers.dram": None if ask.dram_gib is None else f"{ask.dram_gib} GiB",
            "tiers.home": ask.home,
        }

    def _whole(self) -> dict[str, Any]:
        """No tiers, and no policies that only they have: the device holds all, in the same memory."""
        ask = self.ask
        out = {"tiers": "null", **{f"policies.{key}": idle for key, idle in TIER_POLICIES.items()}}
        if ask.vram_gib is None:
            return out
        if self._file is None:
            memory = load_profile(find_named(ask.device, "hw_profiles", Path.cwd(), "--device", "device")).memory_bytes
        else:
            named = () if ask.model is None else (f"model={ask.model}",)
            asked = (o for o in ask.overrides if not _only_tiers(o))
            changes = (*named, *(f"{key}={value}" for key, value in out.items()), "policies.offload=none", *asked)
            memory = load_scenario(self._file, changes).cluster.profile.memory_bytes
        if ask.vram_gib * 2**30 > memory:
            raise BadInput(
                Problem("--vram", f"{ask.vram_gib:g} GiB is more than {ask.device} has: {memory / 2**30:g} GiB")
            )
        return {**out, "engine.gpu_memory_utilization": f"{max(ask.vram_gib * 2**30 / memory, 1e-9):.9f}"}


def _only_tiers(override: str) -> bool:
    """A change that says something only where there are tiers."""
    key = override.partition("=")[0].strip()
    return key.split(".")[0] == "tiers" or any(
        key == name or key.startswith(f"{name}.") for name in (f"policies.{policy}" for policy in TIER_POLICIES)
    )
