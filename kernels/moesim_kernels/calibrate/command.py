"""`moesim calibrate`: options to a plan, the plan measured, the log fitted, the profile written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesim_kernels.bench.plan import Plan
    from moesim_kernels.calibrate.deployment import Deployment

__all__ = ["calibrate", "device_of", "seconds_of"]

DEFAULT_OUT = Path("hw_profiles/this_machine.yaml")

_Scenario = Annotated[
    Path | None,
    typer.Argument(help="A scenario whose deployment is calibrated; without it --model.", metavar="[SCENARIO]"),
]
_Model = Annotated[
    str | None, typer.Option("--model", help="A model by name, a model file or a Hugging Face config.json.")
]
_Parallel = Annotated[
    str | None, typer.Option("--parallel", help="Layout, such as tp=1,dp=8,ep=8.", metavar="tp=N,dp=N,ep=N")
]
_Tokens = Annotated[
    int | None, typer.Option("--max-batched-tokens", help="Most tokens a rank computes in a step.", min=1, metavar="N")
]
_Seqs = Annotated[int | None, typer.Option("--max-seqs", help="Most sequences a rank decodes.", min=1, metavar="N")]
_Context = Annotated[int | None, typer.Option("--max-context", help="Longest sequence.", min=1, metavar="N")]
_Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bf16 or fp32 for weights, cache and activations.", metavar="NAME")
]
_Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda. Default: cuda where torch finds it.")]
_Threads = Annotated[int, typer.Option("--threads", help="CPU threads of the kernels.", min=1, max=1024, metavar="N")]
_Backend = Annotated[
    str, typer.Option("--backend", help="Kernels of the routed experts: torch, loop, grouped or triton.")
]
_Training = Annotated[bool, typer.Option("--training", help="Measure the backward operators, too.")]
_Budget = Annotated[str, typer.Option("--budget", help="Time to measure, such as 90s, 5m or 1h.", metavar="TIME")]
_Out = Annotated[Path, typer.Option("--out", help="The profile to write.", metavar="FILE.yaml")]
_Log = Annotated[
    Path | None, typer.Option("--log", help="Where times go. Default: beside the profile.", metavar="FILE")
]
_PlanOnly = Annotated[
    Path | None, typer.Option("--plan-only", help="Write what would be measured, and stop.", metavar="FILE")
]
_From = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--from", help="Fit a plan's log that was measured elsewhere; needs no torch.", metavar="PLAN LOG"),
]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of the held-out points.", min=0, metavar="N")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run of this plan measured.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")]
_Json = Annotated[bool, typer.Option("--json", help="Print what was found as JSON instead of a table.")]


@dataclass(frozen=True)
class _Wanted:
    """What a plan is made from, as the options say it."""

    scenario: Path | None
    model: str | None
    parallel: str | None
    limits: tuple[int | None, int | None, int | None]
    dtype: str | None


def calibrate(
    scenario: _Scenario = None,
    model: _Model = None,
    parallel: _Parallel = None,
    max_batched_tokens: _Tokens = None,
    max_seqs: _Seqs = None,
    max_context: _Context = None,
    dtype: _Dtype = None,
    device: _Device = None,
    threads: _Threads = 1,
    backend: _Backend = "torch",
    training: _Training = False,
    budget: _Budget = "5m",
    out: _Out = DEFAULT_OUT,
    log: _Log = None,
    plan_only: _PlanOnly = None,
    from_log: _From = None,
    seed: _Seed = 0,
    fresh: _Fresh = False,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Measure the operators that a deployment needs on this machine, and write them as a hardware profile."""
    from moesim_kernels.calibrate.write import check_target

    wanted = _Wanted(scenario, model, parallel, (max_batched_tokens, max_seqs, max_context), dtype)
    with _as_bad_input():
        seconds = seconds_of(budget)
        if from_log is not None:
            _refuse_beside_from(wanted, plan_only, log, fresh)
            check_target(out)
            from moesim_kernels.bench.plan import load_plan

            _finish(load_plan(from_log[0]), from_log[1], out, quiet, as_json)
            return
        kind = device_of(device, needs_torch=plan_only is None)
        plan = _plan(wanted, kind, threads, _backend(backend, kind), training, seed)
        if plan_only is not None:
            _write_plan_only(plan, plan_only, seconds, quiet)
            return
        check_target(out)
        _measure(plan, out, log or out.with_suffix(".log.jsonl"), seconds, fresh, quiet or as_json)
        _finish(plan, log or out.with_suffix(".log.jsonl"), out, quiet, as_json)


@contextmanager
def _as_bad_input() -> Iterator[None]:
    """Errors of plans and logs, which know nothing of moesim, as bad input."""
    from moesim.errors import BadInput, Problem
    from moesim_kernels.bench.errors import BadPlan

    try:
        yield
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None


def _bad(option: str, message: str) -> Exception:
    from moesim.errors import BadInput, Problem

    return BadInput(Problem(option, message))


def seconds_of(text: str, option: str = "--budget") -> float:
    """`90s`, `5m`, `1h`, or a number of seconds. Raises BadInput."""
    units = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    number = text.strip().rstrip("smhin")
    unit = text.strip()[len(number) :].strip() or "s"
    try:
        seconds = float(number) * units[unit]
    except (KeyError, ValueError):
        raise _bad(option, f"a time such as 90s, 5m or 1h is needed, got {text!r:.60}") from None
    if not 1.0 <= seconds <= 86_400.0:
        raise _bad(option, f"from 1s to 24h can be spent, got {text!r:.60}; 5m is a good start")
    return seconds


def _refuse_beside_from(wanted: _Wanted, plan_only: Path | None, log: Path | None, fresh: bool) -> None:
    """With --from everything that chooses what to measure has been chosen already."""
    given = {
        "SCENARIO": wanted.scenario, "--model": wanted.model, "--parallel": wanted.parallel, "--dtype": wanted.dtype,
        "--plan-only": plan_only, "--log": log, "--fresh": fresh or None,
        "--max-batched-tokens, --max-seqs or --max-context": next((x for x in wanted.limits if x is not None), None),
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise _bad("--from", f"the plan says what was measured; leave out {', '.join(named)}")


def device_of(name: str | None, needs_torch: bool) -> str:
    """cpu or cuda; without a name, what torch finds (a plan alone is for a CPU then, and needs no torch)."""
    from moesim_kernels.calibrate.run import require_torch

    if name not in (None, "cpu", "cuda"):
        raise _bad("--device", f"cpu or cuda is needed, got {name!r:.60}")
    if not needs_torch:
        return name or "cpu"
    require_torch()
    if name == "cpu":
        return name
    import torch

    found = bool(torch.cuda.is_available())
    if name == "cuda" and not found:
        raise _bad("--device", "torch finds no CUDA device here; use --device cpu, or see that the driver is loaded")
    return "cuda" if found else "cpu"


def _backend(name: str, device: str) -> str:
    from moesim_kernels.bench.plan import BACKENDS

    if name not in BACKENDS:
        raise _bad("--backend", f"one of {', '.join(BACKENDS)} is needed, got {name!r:.60}")
    if name == "triton" and device == "cpu":
        raise _bad("--backend", "triton compiles for GPUs alone; use torch, loop or grouped on a CPU")
    return name


def _plan(wanted: _Wanted, device: str, threads: int, backend: str, training: bool, seed: int) -> Plan:
    from moesim_kernels.calibrate.plan import make_plan

    deployments = _deployments(wanted, device)
    return make_plan(deployments, device, threads=threads, backend=backend, training=training, seed=seed)


def _deployments(wanted: _Wanted, device: str) -> list[Deployment]:
    """The deployment that is named, or the default ones."""
    from moesim_kernels.calibrate import deployment

    if wanted.dtype not in (None, *deployment.MEASURED_DTYPES):
        raise _bad("--dtype", f"bf16 or fp32 is needed, got {wanted.dtype!r:.60}")
    keys = ("max_num_batched_tokens", "max_num_seqs", "max_model_len")
    overrides = [f"engine.{k}={v}" for k, v in zip(keys, wanted.limits, strict=True) if v is not None]
    if wanted.dtype is not None:
        overrides += [f"model.{k}_dtype={wanted.dtype}" for k in deployment.FORMATS]
    degrees = _degrees(wanted.parallel)
    if wanted.scenario is not None:
        if wanted.model is not None:
            raise _bad("--model", "the scenario names the model; leave out one of the two")
        overrides += [f"parallel.{k}={v}" for k, v in degrees.items()]
        return [deployment.from_scenario(wanted.scenario, overrides)]
    if wanted.model is not None:
        return [deployment.from_model(wanted.model, degrees, overrides)]
    if overrides or degrees:
        message = "limits, --dtype and --parallel belong to a model; name one with --model, or a scenario"
        raise _bad("moesim calibrate", message)
    return deployment.default_deployments(device)


def _degrees(text: str | None) -> dict[str, int]:
    """tp=1,dp=8,ep=8 as numbers. Raises BadInput."""
    out: dict[str, int] = {}
    for part in text.split(",") if text is not None else []:
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in ("tp", "dp", "ep") or name in out or not (value.isascii() and value.isdigit()):
            raise _bad("--parallel", f"a layout is written tp=1,dp=8,ep=8, each degree once; got {text!r:.60}")
        if not 1 <= int(value[:9]) <= 4096:
            raise _bad("--parallel", f"{name} must be from 1 to 4096, got {value[:20]}")
        out[name] = int(value[:9])
    return out


def _write_plan_only(plan: Plan, path: Path, seconds: float, quiet: bool) -> None:
    import shlex

    from moesim_kernels.bench.plan import save_plan
    from moesim_kernels.calibrate.write import written

    with written(path):
        save_plan(plan, path)
    if not quiet:
        print(f"plan: {path} ({len(plan.cases)} points for {plan.device})")
        print("measure it on a machine with torch, triton and numpy, with kernels/ of this repository:")
        run = f"python -m moesim_kernels.bench --plan {shlex.quote(path.name)} --log LOG --budget {seconds:g}s"
        print(f"  PYTHONPATH=kernels {run}")
        print(f"then fit here: moesim calibrate --from {shlex.quote(str(path))} LOG --out hw_profiles/NAME.yaml")


def _measure(plan: Plan, out: Path, log: Path, seconds: float, fresh: bool, quiet: bool) -> None:
    from moesim_kernels.bench.log import begun_for, forget
    from moesim_kernels.bench.plan import save_plan
    from moesim_kernels.calibrate.run import bench_command, measure
    from moesim_kernels.calibrate.write import written

    plan_path = out.with_suffix(".plan.json")
    if fresh:
        forget(log)
    elif begun_for(log) not in (None, plan.plan_id):
        message = "this log was begun for another plan: other options, or another version of moesim"
        raise _bad(str(log), f"{message}. Begin anew with --fresh, or name another --out or --log")
    with written(plan_path):
        save_plan(plan, plan_path)
    if not quiet:
        going_on = " (going on with it)" if log.exists() else ""
        print(f"{len(plan.cases)} points on {plan.device}, at most {seconds:g} s; times go to {log}{going_on}")
    sys.stdout.flush()
    measure(bench_command(plan_path, log, seconds, plan.device), log, quiet)


def _finish(plan: Plan, log: Path, out: Path, quiet: bool, as_json: bool) -> None:
    """Fit, write, tell."""
    import shlex

    from moesim_kernels.calibrate.fitted import calibrate_log
    from moesim_kernels.calibrate.write import write_profile

    made = calibrate_log(plan, log, out.stem, shlex.join(["moesim", *sys.argv[1:]]))
    write_profile(out, made.spec, made.curves)
    if as_json:
        from moesim.results import json_text

        sys.stdout.write(json_text(made.spec))
    elif not quiet:
        from moesim_kernels.calibrate.report import report

        report(made.spec)
        print(f"profile: {out}   use it: moesim simulate SCENARIO --set cluster.device={shlex.quote(str(out))}")
