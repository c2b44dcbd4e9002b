"""`python -m moesim_kernels.bench`: measure a plan on this machine. Needs torch and numpy alone."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.plan import DEVICES, Plan, load_plan, save_plan
from moesim_kernels.bench.progress import Progress, Status, span

if TYPE_CHECKING:
    from moesim_kernels.bench.harness import Summary

__all__ = ["budget_seconds", "main"]

EXIT_BAD_INPUT = 2
EXIT_RESOURCES = 5
_MOST_LINES = 12
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def budget_seconds(text: str) -> float:
    """Seconds of `300`, `30s`, `5m` or `1.5h`. Raises BadPlan."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= 7 * 24 * 3600:
        raise BadPlan(f"a budget is a time above 0 and at most a week, as 30s, 5m or 1h; got {text!r:.40}", "--budget")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.bench", description="Measure operators.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--plan", type=Path, help="plan to measure, a JSON file")
    which.add_argument("--default", choices=DEVICES, help="the default plan for this kind of device")
    parser.add_argument("--save-plan", type=Path, help="write the plan to this file")
    parser.add_argument("--log", type=Path, help="log to begin or to go on with; without one nothing is measured")
    parser.add_argument("--budget", default="5m", help="time to use, setup included: 30s, 5m, 1h (default 5m)")
    parser.add_argument("--device", choices=DEVICES, help="refuse a plan for another kind of device")
    parser.add_argument("--target", type=int, default=30, help="samples a case (default 30)")
    parser.add_argument("--minimum", type=int, default=5, help="samples that come first for every case (default 5)")
    parser.add_argument("--parent", type=int, help="end, everything kept, once this process is no longer our parent")
    parser.add_argument("--seed", type=int, default=0, help="order of the rounds (default 0)")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    if options.default is not None:
        from moesim_kernels.bench.default_plan import default_plan

        plan = default_plan(options.default)
    else:
        plan = load_plan(options.plan)
    if options.device is not None and options.device != plan.device:
        raise BadPlan(f"the plan is for {plan.device}, --device says {options.device}; name another plan", "--device")
    return plan


def _go(options: argparse.Namespace) -> int:
    plan = _plan(options)
    if options.save_plan is not None:
        save_plan(plan, options.save_plan)
    if options.log is None:
        if options.save_plan is None:
            raise BadPlan("name a log to measure into, or --save-plan to write the plan alone", "--log")
        print(f"{len(plan.cases)} cases for {plan.device} written to {options.save_plan}")
        return 0
    budget_s = budget_seconds(options.budget)
    from moesim_kernels.bench.harness import run

    progress = Progress()

    def turn(status: Status) -> None:
        if options.parent is not None and os.getppid() != options.parent:
            os.kill(os.getpid(), signal.SIGTERM)
        progress(status)

    try:
        summary = run(
            plan, options.log, budget_s, turn, target=options.target, minimum=options.minimum, seed=options.seed
        )
    finally:
        progress.end()
    try:
        _tell(plan, summary, options)
    except BrokenPipeError:  # what was measured counts, whether or not anybody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if summary.stopped == "broken":
        print("error: a case broke the device; run this again to go on without it", file=sys.stderr)
        return 1
    return 128 + summary.signal if summary.signal is not None else 0


def _tell(plan: Plan, summary: Summary, options: argparse.Namespace) -> None:
    """How the run ended, and the cases that it could not run or has too few samples of."""
    print(
        f"{summary.stopped}: {summary.finished} of {summary.cases} cases have their {options.target} samples; "
        f"{summary.samples} samples in {span(summary.seconds)}"
    )
    names = {case.id: f"{case.op} {case.shape | case.size} {case.dtype}" for case in plan.cases}
    short = [key for key in summary.short if key not in summary.refused]
    _list([f"refused: {names[key]}: {reason}" for key, reason in summary.refused.items()])
    if summary.signal is None:
        _list([f"fewer than {options.minimum} samples: {names[key]}" for key in short])
    sys.stdout.flush()


def _list(lines: list[str]) -> None:
    """Print lines, a long list cut; the log's last line names them all by id."""
    for line in lines[:_MOST_LINES]:
        print(line)
    if len(lines) > _MOST_LINES:
        print(f"... and {len(lines) - _MOST_LINES} more")


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code: 0 measured, 1 the device broke, 2 bad input, 130 or 143 interrupted (the log stays)."""
    options = _parser().parse_args(arguments)
    try:
        return _go(options)
    except (BadPlan, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed, and measuring needs it; pip install {error.name}", file=sys.stderr
        )
        return EXIT_BAD_INPUT
    except MemoryError as error:
        print(f"error: out of memory ({error or 'no more is told'}); what was measured is kept", file=sys.stderr)
        return EXIT_RESOURCES
    except KeyboardInterrupt:  # before the run catches signals itself
        return 130
    except OSError as error:
        where = error.filename or options.log
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: {where}: {error.strerror}; make room and start again, nothing is lost", file=sys.stderr)
            return EXIT_RESOURCES
        print(f"error: {where}: {error.strerror}; name another file", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
