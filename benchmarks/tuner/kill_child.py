"""What a killed process of the campaign runs: `moesim tune ...` itself, telling a pipe which trials were acknowledged,
and, where its death is to be at an exact place, dying there.

python benchmarks/tuner/kill_child.py FD PLAN ARGUMENTS... (PLAN is JSON, see `Plan`)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["Plan", "run", "seal"]


@dataclass(frozen=True)
class Plan:
    """Where a process dies.

    at: `start`, after_s after it began, whatever it does by then; `search`, after_s after its count-th trial was
    acknowledged; `coordinator`, the same, and only the one process is killed, so that its workers must notice; `write`,
    in the count-th record of the journal, when `share` of its bytes are written; `tables`, in the count-th transaction
    of Optuna's tables, with its rows written and not committed, or (share 1) right after the commit; `never`. hold: the
    search goes no further than the count-th trial, however late its death comes.
    """

    at: str = "never"
    count: int = 1
    after_s: float = 0.0
    share: float = 0.0
    hold: bool = False


def seal(trial: Any) -> str:
    """A trial in short: equal only for equal content, clocks included."""
    from moesim_tuner.records import canonical

    return hashlib.blake2b(canonical(trial.to_json()).encode(), digest_size=8).hexdigest()


def _die() -> NoReturn:
    os.killpg(os.getpgrp(), signal.SIGKILL)
    signal.pause()
    raise AssertionError


def arm(plan: Plan, told: int) -> None:
    """Report acknowledged trials on descriptor `told`, and set the trap."""
    from moesim_tuner.store import mirror as mirror_module
    from moesim_tuner.store.durable import DurableStore
    from moesim_tuner.store.journal import Journal
    from moesim_tuner.store.mirror import Mirror

    append = DurableStore.append
    calls = 0

    def acknowledged(self: DurableStore, trials: Any) -> None:
        append(self, trials)
        lines = [f"{trial.number} {seal(self.kept.by_number[trial.number])}\n" for trial in trials]
        os.write(told, "".join(lines).encode())
        nonlocal calls
        calls += plan.at in ("search", "coordinator")
        if plan.hold and calls >= plan.count:
            time.sleep(60)

    DurableStore.append = acknowledged  # type: ignore[method-assign]
    if plan.at == "write":
        record, write = Journal.append, os.write

        def recorded(self: Journal, kind: str, data: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == plan.count:
                os.write = torn  # type: ignore[assignment]
            record(self, kind, data)

        def torn(file: int, data: Any) -> int:
            os.write = write
            write(file, data[: int(plan.share * len(data))])
            _die()

        Journal.append = recorded  # type: ignore[method-assign]
    elif plan.at == "tables":
        mirror_module.EVERY_S = 0.02
        name = "_write" if plan.share == 1 else "_insert"
        real = getattr(Mirror, name)

        def wrote(self: Mirror, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            out = real(self, *arguments)
            if calls == plan.count:
                _die()
            return out

        setattr(Mirror, name, wrote)


def run(told: int, plan: Plan, arguments: list[str]) -> NoReturn:
    """Be `moesim ARGUMENTS`."""
    arm(plan, told)
    from moesim.cli import main

    main(arguments)


def command(told: int, plan: Plan, arguments: list[str]) -> list[str]:
    """The command line of this file."""
    return [sys.executable, str(Path(__file__).resolve()), str(told), json.dumps(asdict(plan)), *arguments]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tuner")]
    run(int(sys.argv[1]), Plan(**json.loads(sys.argv[2])), sys.argv[3:])
