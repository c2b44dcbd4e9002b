"""The profile that predicts: one that is given, or one measured now for this very deployment; and what does not fit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim.hardware import DeviceProfile

__all__ = ["made_profile", "profile_facts", "strangeness"]

NAME = "profile.yaml"


def made_profile(
    scenario: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    device: str,
    threads: int,
    backend: str,
    seconds: float,
    seed: int,
    quiet: bool,
) -> Path:
    """Calibrate the scenario's deployment into `folder`, or go on with what a stopped run has measured; the profile's
    path. What is there already is taken as it is.

    Raises BadInput for what no kernel here runs, KeyboardInterrupt, SystemExit or `calibrate.run.Broken` as the
    measuring process ended.
    """
    from moesim_kernels.bench.errors import BadPlan
    from moesim_kernels.bench.log import begun_for, forget
    from moesim_kernels.bench.plan import load_plan, save_plan
    from moesim_kernels.calibrate.deployment import from_scenario
    from moesim_kernels.calibrate.fitted import calibrate_log
    from moesim_kernels.calibrate.plan import make_plan
    from moesim_kernels.calibrate.report import report
    from moesim_kernels.calibrate.run import bench_command, measure
    from moesim_kernels.calibrate.write import write_profile, written

    out, log, plan_path = folder / NAME, folder / "profile.log.jsonl", folder / "profile.plan.json"
    if out.exists():
        return out
    try:
        plan = make_plan([from_scenario(scenario, overrides)], device, threads=threads, backend=backend, seed=seed)
        if begun_for(log) not in (None, plan.plan_id):
            forget(log)  # begun by another version of moesim: its points are of other kernels
        with written(plan_path):
            save_plan(plan, plan_path)
        plan = load_plan(plan_path)
        if not quiet:
            print(f"calibrating: {len(plan.cases)} points on {device}, at most {seconds:g} s", file=sys.stderr)
        measure(bench_command(plan_path, log, seconds, device), log, True)
        made = calibrate_log(plan, log, out.stem, shlex.join(["moesim", *sys.argv[1:]]))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    write_profile(out, made.spec, made.curves)
    if not quiet:
        report(made.spec, file=sys.stderr)
    return out


def profile_facts(profile: DeviceProfile, source: str) -> dict[str, Any]:
    """What a prediction says of the profile it rests on. source: `measured for this run`, or the file."""
    said = profile.provenance
    versions = said.get("versions")
    return {
        "name": profile.name,
        "kind": profile.kind,
        "source": source,
        "hbm_gb_per_s": profile.hbm_bytes_per_s / 1e9,
        "errors": {k: float(v) for k, v in sorted(profile.errors.items())},
        "speed_error": profile.speed_error,
        "made_on": said.get("device"),
        "kernel": said.get("kernel"),
        "threads": said.get("threads"),
        "torch": versions.get("torch") if isinstance(versions, Mapping) else None,
        "date": None if said.get("date") is None else str(said["date"]),
        "psi_percent": said.get("psi_percent"),
        "reference_drift": said.get("reference_drift"),
        "reference_ns": said.get("reference_ns"),
    }


def strangeness(profile: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """What keeps a profile from being of the machine that measured. profile: of `profile_facts`; machine: of the
    record's head."""
    if profile["kind"] != "measured":
        return [f"the profile {profile['name']} is assumed: datasheet figures and typical efficiencies, not measured"]
    here = machine.get("device") if machine.get("device") != "cpu" else machine.get("cpu")
    pairs = (
        ("on", profile["made_on"], here),
        ("with kernels", profile["kernel"], machine.get("kernel")),
        ("with torch", profile["torch"], machine.get("torch")),
        ("with CPU threads", profile["threads"], machine.get("threads")),
    )
    return [
        f"the profile {profile['name']} was made {what} {theirs}, and the steps ran {what} {ours}"
        for what, theirs, ours in pairs
        if theirs is not None and ours is not None and str(theirs) != str(ours)
    ]
