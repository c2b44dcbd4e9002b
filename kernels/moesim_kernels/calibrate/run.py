"""Measuring in a child process, so that a crash or a lack of memory there never takes the command line down."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from moesim.errors import BadInput, MoesimError, Problem

__all__ = ["Broken", "bench_command", "measure", "require_torch"]

_GRACE_S = 30.0  # to put the log on disk after an interrupt; a running case ends first


class Broken(MoesimError):
    """The measuring process died of something that is no input of the user's: `code` is what moesim exits with."""

    def __init__(self, message: str, code: int) -> None:
        self.exit_code = code
        super().__init__(message)


def require_torch() -> None:
    """Raise BadInput where torch, which runs the kernels, is not installed. Does not import it."""
    if importlib.util.find_spec("torch") is None:
        message = "torch, which runs the kernels, is not installed; install moesim[kernels]"
        raise BadInput(Problem("moesim calibrate", f"{message}, or fit another machine's log with --from PLAN LOG"))


def bench_command(plan: Path, log: Path, budget_s: float, device: str) -> list[str]:
    """The command that measures `plan` into `log`; it needs torch, triton and numpy alone."""
    options = ["--plan", str(plan), "--log", str(log), "--budget", f"{budget_s:g}s", "--device", device]
    options += ["--parent", str(os.getpid())]  # else it would go on, the log in its hands, where we are killed
    return [sys.executable, "-m", "moesim_kernels.bench", *options]


def measure(command: list[str], log: Path, quiet: bool) -> None:
    """Run a `bench_command` to its end; its progress goes to our terminal. An interrupt is passed on.

    Raises KeyboardInterrupt once the child has put its log on disk, SystemExit with the child's code where it said
    itself what was wrong (2: input, 5: resources), and Broken where it crashed.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    silent = subprocess.DEVNULL if quiet else None
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=silent)  # noqa: S603
    try:
        code = child.wait()
    except KeyboardInterrupt:
        _end(child)
        code = 130
    finally:
        if child.poll() is None:
            child.terminate()
            _end(child)
    if code in (130, 143):
        again = f"nothing measured is lost: run the same command again to go on (log: {log})"
        print(f"\n{again}", file=sys.stderr)
        raise KeyboardInterrupt
    if code in (2, 5):
        raise SystemExit(code)
    if code:
        raise _crash(code, log)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let an interrupted child finish. A terminal interrupts both of us; a `kill` only us, so it is passed on."""
    for wait_s, number in ((1.0, signal.SIGINT), (_GRACE_S, signal.SIGKILL)):
        try:
            child.wait(wait_s)
        except subprocess.TimeoutExpired:
            child.send_signal(number)
        else:
            return
    child.wait()


def _crash(code: int, log: Path) -> Broken:
    """What a child's unexpected end means."""
    again = f"what was measured is in {log}: the same command goes on from there"
    if code == -signal.SIGKILL:
        return Broken(f"the measuring process was killed, most likely for lack of memory; {again}", 5)
    if code < 0:
        name = signal.Signals(-code).name if -code in {int(s) for s in signal.Signals} else f"signal {-code}"
        return Broken(f"the measuring process died of {name}; {again}", 1)
    return Broken(f"the measuring process ended with code {code}; {again}", 1)
