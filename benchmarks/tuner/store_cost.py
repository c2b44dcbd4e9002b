"""What keeping a trial costs: the journal, synced for each, and Optuna's tables behind it.

python benchmarks/tuner/store_cost.py [--trials 500] [--storage sqlite|postgres]

Every trial has 40 figures on each of two rungs and is appended by itself, batches of four are proposed. Printed are CPU
and wall time a trial, closing included, and what it takes to open the study again. Compare `optuna` in the same run:
as many trials given to Optuna's own `add_trials`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tuner")]

from benchmarks.tuner.postgres_server import postgres_server  # noqa: E402
from tests.build_study import candidate, definition  # noqa: E402


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--storage", choices=("sqlite", "postgres"), default="sqlite")
    args = parser.parse_args()
    import optuna
    from moesim_tuner.records import Trial
    from moesim_tuner.store import open_store

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    figures = {f"figure_{i}_ms": 1.234567891234 * i for i in range(39)}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moesim-cost-")))
        url = f"sqlite:///{folder}/tune.db"
        if args.storage == "postgres":
            url = stack.enter_context(postgres_server()).create("tune")
        store = open_store(url, "cost", definition(trials=args.trials), journals=folder / "journals")
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for first in range(0, args.trials, 4):
            batch = [candidate(n) for n in range(first, min(first + 4, args.trials))]
            store.propose(first, batch)
            for number, one in enumerate(batch, first):
                rung = {"output_tok_per_s": 1.1 * number, **figures}
                kept = Trial(number, one.point, one.origin, "complete", (1.1 * number,), {"ttft_p99_ms": -0.1},
                             (rung, rung), (), "0" * 16, time.time(), time.time())  # fmt: skip
                store.append([kept])
        store.close()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        each = 1000 / args.trials
        print(f"{args.storage}: {cpu_s * each:.2f} ms CPU, {wall_s * each:.2f} ms wall a trial, {args.trials} trials")
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        open_store(url, "cost", journals=folder / "journals").close()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        print(f"opened again: {cpu_s:.2f} s CPU, {wall_s:.2f} s wall")
        trials = optuna.load_study(study_name="cost", storage=url).trials[:100]
        other = optuna.create_study(storage=url, direction="maximize")
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        other.add_trials(trials)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        each = 1000 / len(trials)
        print(f"optuna: {cpu_s * each:.2f} ms CPU, {wall_s * each:.2f} ms wall a trial")


if __name__ == "__main__":
    main()
