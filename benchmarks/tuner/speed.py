"""How fast the tuner is: 16 trials of 500 requests from start to end, two workers against one and beside two plain
processes, what a trial costs beyond its simulation, and a cluster's bytes against one process's.

    python benchmarks/tuner/speed.py [recommend|speedup|overhead|cluster ...] [--write]

--write: all of it, into results/validation/tuner_speed.md. Wall-clock times need a quiet machine; the load is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHED = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / f"moesim-tuner-speed-{os.getuid()}"),
}
"""compiled modules are there, as an installation has them"""
PAGE = ROOT / "results" / "validation" / "tuner_speed.md"
AISIMULATE_S = 71.7
"""`recommend`, 16 trials of 500 requests, on a machine like this (2 cores)"""

RECOMMEND = """
name: recommend
model: {name: qwen3-235b-a22b, weight_dtype: fp8_block, expert_dtype: fp8_block}
cluster: {device: h200_sxm, nodes: 1, gpus_per_node: 8}
parallel: {tp: 1, dp: 8, ep: 8}
requests: {format: closed_loop, concurrency: 64, num_requests: 500, prompt_tokens: 1024, output_tokens: 256}
routing: {popularity_zipf: 0.6, fidelity: count}
policies: {placement: {kind: eplb, num_redundant_experts: 0}}
engine: {max_num_seqs: 128, max_num_batched_tokens: 8192}
tune:
  space:
    layout:
      choices:
        dp8: {parallel: {tp: 1, dp: 8, ep: 8}}
        tp2dp4: {parallel: {tp: 2, dp: 4, ep: 8}}
        tp4dp2: {parallel: {tp: 4, dp: 2, ep: 8}}
        tp8: {parallel: {tp: 8, dp: 1, ep: 8}}
    policies.placement.num_redundant_experts: {choices: [0, 8, 16]}
    engine.max_num_seqs: {choices: [8, 16, 32, 64, 128]}
    engine.max_num_batched_tokens: {choices: [2048, 4096, 8192, 16384]}
  objectives: [output_tok_per_s]
  constraints: {ttft_p99_ms: {max: 2000}, tpot_p99_ms: {max: 50}}
  rungs: [{set: {}, seeds: 1}]
  trials: 16
  batch: 4
  judge: {fit_share: 0}
"""
"""What peers are measured on: 1,024 prompt and 256 output tokens, 64 at a time, on eight H200."""
REFERENCE = "workloads/qwen3_235b_ep8_closed64.yaml"
"""its event loop takes 0.10 s on results/validation/speed.md's quiet machine"""


def say(line: str = "") -> None:
    print(line, flush=True)


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load before {load:.1f}"


def python(*arguments: str) -> tuple[str, float, float]:
    """What a fresh interpreter prints, its wall-clock and its CPU seconds (its children's, too)."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *arguments], check=True, text=True, stdout=subprocess.PIPE,
        env={**os.environ, **CACHED, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tuner")))},
    )  # fmt: skip
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, time.perf_counter() - began, cpu


# ---- 16 trials, from start to end


def recommend() -> list[str]:
    lines = [
        f"Event loop of `{REFERENCE}` in the same run: {python('_loop')[0].strip()} s (0.10 s on the quiet machine of"
        " results/validation/speed.md). Least of 3 runs.",
        "",
        "| workers | trials | feasible | process start to end | CPU | AISimulate `recommend` |",
        "|---|---|---|---|---|---|",
    ]
    say(lines[0])
    for workers in (1, 2):
        runs = [python("_search", str(workers)) for _ in range(3)]
        told = json.loads(runs[0][0])
        wall, cpu = min(run[1] for run in runs), min(run[2] for run in runs)
        row = f"| {workers} | {told['trials']} | {told['feasible']} | {wall:.1f} s | {cpu:.1f} s | {AISIMULATE_S} s |"
        lines.append(row)
        say(row)
    return lines


def _loop() -> None:
    from moesim.scenario.load import load_scenario
    from moesim.simulate import simulate

    scenario = load_scenario(ROOT / REFERENCE)
    say(f"{min(simulate(scenario).loop_s for _ in range(2)):.2f}")


def _search(workers: int) -> None:
    """A real study in a fresh process: definition, strategy, store and workers as `moesim tune` has them."""
    from moesim_tuner.heuristics import starts
    from moesim_tuner.judge import base_scenario
    from moesim_tuner.ladder import Rungs
    from moesim_tuner.search import strategy
    from moesim_tuner.study import run_study
    from moesim_tuner.tune import begin, define
    from moesim_tuner.workers import make_workers

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recommend.yaml"
        file.write_text(RECOMMEND)
        definition, _ = define(file, (), (), {}, False)
        pool = make_workers(workers, 600)
        with begin(definition, "recommend", f"sqlite:///{folder}/study.db") as session:
            first = starts(base_scenario(definition), definition.space, definition.spec)
            trials = run_study(definition, strategy(definition, first), Rungs(definition), pool, session.store)
        pool.close()
    bad = [t.reasons for t in trials if t.state not in ("complete", "infeasible")]
    assert not bad, bad
    say(json.dumps({"trials": len(trials), "feasible": sum(t.feasible for t in trials)}))


# ---- two workers


def speedup() -> list[str]:
    """Rounds of: one worker, two workers, one plain process, two plain processes at once; the same tasks each."""
    times: dict[str, list[float]] = {"1 worker": [], "2 workers": [], "1 process": [], "2 processes": []}
    each = float(python("_plain", "0", "1")[0])
    for _ in range(3):
        for number in (1, 2):
            times[f"{number} worker{'s' * (number > 1)}"].append(float(python("_pooled", str(number))[0]))
            times[f"{number} process{'es' * (number > 1)}"].append(_plain_together(number))
    best = {name: statistics.median(found) for name, found in times.items()}
    pool, plain = best["1 worker"] / best["2 workers"], best["1 process"] / best["2 processes"]
    for name, found in times.items():
        say(f"{name}: {', '.join(f'{t:.1f}' for t in found)} s")
    return [
        f"Trials of {each:.1f} s, {len(_tasks())} of them, medians of 3 interleaved rounds.",
        "",
        "| | one | two | speed-up | of ideal |",
        "|---|---|---|---|---|",
        f"| workers | {best['1 worker']:.1f} s | {best['2 workers']:.1f} s | {pool:.2f} | {pool / 2:.0%} |",
        f"| processes | {best['1 process']:.1f} s | {best['2 processes']:.1f} s | {plain:.2f} | {plain / 2:.0%} |",
    ]


def _tasks() -> list[Any]:
    """Ten trials of the same length, of more than a second, that share nothing (a seed each)."""
    from moesim_tuner.records import Task

    text = RECOMMEND.partition("tune:")[0]
    return [Task(text, "t", str(ROOT), (), seed) for seed in range(1, 11)]


def _pooled(number: int) -> None:
    from moesim_tuner.workers.pool import PoolWorkers

    tasks, pool = _tasks(), PoolWorkers(number, 600)
    while len(pool.pids()) < number:  # their start is told by `recommend`
        time.sleep(0.01)
    began = time.perf_counter()
    rows = [future.result() for future in [pool.submit(task) for task in tasks]]
    say(str(time.perf_counter() - began))
    assert all(row.state == "done" for row in rows)
    pool.close()


def _plain(part: int, parts: int) -> None:
    """Every `parts`-th task; waits for a line on standard input to begin. One part alone: seconds a task."""
    from moesim_tuner.evaluate import evaluate

    tasks = _tasks()[part::parts] if parts > 1 or part else _tasks()[:2]
    began = time.perf_counter()
    for task in tasks:
        evaluate(task)
    say(str((time.perf_counter() - began) / (len(tasks) if parts == 1 else 1)))


def _plain_together(number: int) -> float:
    code = (
        "import sys; sys.path[:0] = [{0!r}, {0!r} + '/kernels', {0!r} + '/tuner', {0!r} + '/benchmarks/tuner'];"
        " import speed; from moesim_tuner.evaluate import evaluate; tasks = speed._tasks()[{1}::{2}];"
        " print('ready', flush=True); input(); [evaluate(t) for t in tasks]"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code.format(str(ROOT), part, number)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, env=environment)
        for part in range(number)
    ]  # fmt: skip
    for one in started:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in started:
        assert one.wait() == 0
    return time.perf_counter() - began


# ---- beyond the simulation

TRIALS = 500


def looked_up(task: Any) -> Any:
    """In place of a simulation: figures that are a function of the overrides."""
    from moesim_tuner.records import Row

    digest = hashlib.blake2b("|".join(task.overrides).encode(), digest_size=8).digest()
    figures = {"output_tok_per_s": 2000 + digest[0] * 4.0, "ttft_p99_ms": 100.0 + digest[1] * 10, "tpot_p99_ms": 30.0}
    return Row("done", figures, scenario_hash=digest.hex())


def overhead() -> list[str]:
    lines = [f"| {TRIALS} trials of no length | wall a trial | CPU a trial |", "|---|---|---|"]
    for what in ("workers", "coordinator", "search", "store", "whole"):
        found = json.loads(python("_overhead", what)[0])
        row = f"| {found['label']} | {found['wall_ms']:.2f} ms | {found['cpu_ms']:.2f} ms |"
        lines.append(row)
        say(row)
    return lines


def _overhead(what: str) -> None:
    from moesim_tuner.heuristics import starts
    from moesim_tuner.judge import base_scenario
    from moesim_tuner.ladder import Rungs
    from moesim_tuner.search import strategy
    from moesim_tuner.study import run_study
    from moesim_tuner.tune import begin, define
    from moesim_tuner.workers.pool import PoolWorkers

    labels = {
        "workers": "a pool of 2: task there, row back, in batches of 4",
        "coordinator": "the coordinator, with drawn points, rows at once, nothing kept",
        "search": "the same with the strategy that `auto` chooses",
        "store": "the same with drawn points and the SQLite store",
        "whole": "strategy, store and a pool of 2 together",
    }
    sys.path.insert(0, str(ROOT / "benchmarks" / "tuner"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "overhead.yaml"
        more = "    engine.gpu_memory_utilization: {range: [0.7, 0.95], step: 0.001}\n  objectives"
        file.write_text(RECOMMEND.replace("  objectives", more))
        definition, _ = define(file, (), (), {"trials": TRIALS}, False)
        if what in ("workers", "coordinator", "store"):
            from dataclasses import replace

            definition = replace(definition, sampler="random")
        pool: Any = PoolWorkers(2, 600, function="speed:looked_up") if what in ("workers", "whole") else AtOnce()
        first = starts(base_scenario(definition), definition.space, definition.spec)
        found = strategy(definition, first)
        number = TRIALS if what == "workers" else 1
        tasks = [task for c in strategy(definition, first).propose(number) for task in definition.tasks(c.point, 0)]
        pool.submit(tasks[0]).result()
        if what == "workers":
            timed = clock(lambda: in_fours(pool, tasks))
        elif what in ("store", "whole"):
            with begin(definition, "overhead", f"sqlite:///{folder}/study.db") as session:
                timed = clock(lambda: run_study(definition, found, Rungs(definition), pool, session.store))
        else:
            timed = clock(lambda: run_study(definition, found, Rungs(definition), pool, Nowhere()))
        pool.close()
    say(json.dumps({"label": labels[what], "wall_ms": timed[0] * 1e3 / TRIALS, "cpu_ms": timed[1] * 1e3 / TRIALS}))


def in_fours(pool: Any, tasks: Sequence[Any]) -> None:
    for i in range(0, len(tasks), 4):
        for future in [pool.submit(task) for task in tasks[i : i + 4]]:
            future.result()


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process."""
    began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began[0], time.process_time() - began[1]


class AtOnce:
    """Workers that know every row."""

    parallel = 1

    def submit(self, task: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(looked_up(task))
        return future

    def close(self) -> None:
        pass


class Nowhere:
    """A store that keeps nothing."""

    def trials(self) -> list[Any]:
        return []

    def proposed(self) -> list[Any]:
        return []

    def propose(self, first: int, candidates: Sequence[Any]) -> None:
        pass

    def append(self, trials: Sequence[Any]) -> None:
        pass

    def close(self) -> None:
        pass


# ---- a cluster


def cluster() -> list[str]:
    one, four = (json.loads(python("_cluster", number)[0]) for number in ("1", "4"))
    same = "the same bytes" if one["hash"] == four["hash"] else "DIFFERENT BYTES"
    line = (
        f"{one['trials']} trials: canonical export {one['hash']} in one process, {four['hash']} on a Dask cluster of"
        f" four worker processes: {same}."
    )
    say(line)
    return [line]


def _cluster(number: int) -> None:
    from moesim_tuner.heuristics import starts
    from moesim_tuner.judge import base_scenario
    from moesim_tuner.ladder import Rungs
    from moesim_tuner.records import canonical
    from moesim_tuner.search import strategy
    from moesim_tuner.study import run_study
    from moesim_tuner.tune import define
    from moesim_tuner.workers import make_workers

    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(RECOMMEND)
        definition, _ = define(file, ("requests.num_requests=100",), (), {}, False)
        found = strategy(definition, starts(base_scenario(definition), definition.space, definition.spec))
        if number == 1:
            pool = make_workers(1, 600)
            trials = run_study(definition, found, Rungs(definition), pool, Nowhere())
        else:
            from distributed import LocalCluster

            with LocalCluster(n_workers=number, threads_per_worker=1, dashboard_address=None) as local:
                pool = make_workers(cluster=local.scheduler_address, timeout_s=600)
                trials = run_study(definition, found, Rungs(definition), pool, Nowhere())
                pool.close()
    text = canonical([{**t.to_json(clocks=False)} for t in trials])
    say(json.dumps({"trials": len(trials), "hash": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}))


PARTS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "recommend": ("16 expert-level trials of 500 requests", recommend),
    "speedup": ("Two workers", speedup),
    "overhead": ("Beyond the simulation", overhead),
    "cluster": ("A Dask cluster", cluster),
}
INNER: dict[str, Callable[..., None]] = {
    "_loop": _loop,
    "_search": lambda n: _search(int(n)),
    "_pooled": lambda n: _pooled(int(n)),
    "_plain": lambda part, parts: _plain(int(part), int(parts)),
    "_overhead": _overhead,
    "_cluster": lambda n: _cluster(int(n)),
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in INNER:
        INNER[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--write", action="store_true", help="rewrite results/validation/tuner_speed.md")
    options = parser.parse_args()
    about = f"`python benchmarks/tuner/speed.py --write` printed this. Machine: {machine()}."
    page = ["# How fast the tuner is", "", about, ""]
    for name in options.parts or PARTS:
        title, run = PARTS[name]
        say(f"## {title}")
        page += [f"## {title}", "", *run(), ""]
    if options.write:
        PAGE.write_text("\n".join(page).rstrip() + "\n")
        say(f"written: {PAGE}")


if __name__ == "__main__":
    main()
