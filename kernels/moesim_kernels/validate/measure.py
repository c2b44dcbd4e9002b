"""Measuring in a child process that is told configurations and a seal, and no price.

It gets the scenario as written (its own device, never the profile that predicts), a file of settings, and the SHA-256
of the predictions, which it writes into the head of its record.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moesim.results import replacing_file
from moesim_kernels.real.work import Setting

__all__ = ["measure_command", "read_settings", "write_settings"]


def write_settings(path: Path, settings: Sequence[Setting]) -> None:
    """Settings as JSON, whole or not at all."""
    with replacing_file(path) as hidden:
        hidden.write_text(json.dumps([s.to_json() for s in settings]) + "\n", encoding="utf-8")


def read_settings(path: Path) -> list[Setting]:
    """Raises BadInput for a file that holds none."""
    from moesim.errors import BadInput, Problem
    from moesim_kernels.bench.errors import BadPlan
    from moesim_kernels.bench.strict import parse, read_bytes

    try:
        given = parse(read_bytes(path, 64 << 20), str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    if not isinstance(given, list):
        raise BadInput(Problem(str(path), "a list of settings is needed"))
    return [Setting.from_json(one) for one in given]


def measure_command(
    scenario: Path,
    settings: Path,
    record: Path,
    seal: str,
    *,
    device: str,
    threads: int,
    backend: str,
    rounds: int,
    seed: int,
) -> list[str]:
    """The command that measures the settings round by round into `record`."""
    options = ["--scenario", str(scenario), "--settings", str(settings), "--log", str(record), "--seal", seal]
    options += ["--device", device, "--threads", str(threads), "--backend", backend, "--rounds", str(rounds)]
    options += ["--seed", str(seed)]
    options += ["--parent", str(os.getpid())]  # else it would go on where we are killed
    return [sys.executable, "-m", "moesim_kernels.real", *options]
