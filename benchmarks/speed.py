"""How fast the simulator is on the shipped scenarios: one table, on screen, in results/validation/speed.md and README.

python benchmarks/speed.py [-n 5] [--only NAME]

Each scenario runs `-n` times, each in a fresh process of `moesim simulate`, scenarios taking turns. Event-loop seconds
are the result's `provenance.elapsed.event_loop_s` (step pricing included); process seconds and peak memory are what the
operating system says of the whole process, from start to exit, results folder written; its CPU seconds beside them tell
how much of that the machine spent on other work. The scenarios on recorded data
need `../shared/data`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesim.traces.routing_npz import read
from moesim.workload.pool import RoutingSource, count_ids, count_steps
from moesim.workload.replay import Replay

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TABLE = ROOT / "results" / "validation" / "speed.md"
README = ROOT / "README.md"
_MARK, _END = "<!-- speed: written by benchmarks/speed.py -->\n", "<!-- end of speed -->"
_EVENTS = (
    "import json, sys; from moesim.scenario.load import load_scenario; from moesim.simulate import simulate;"
    "print(simulate(load_scenario(sys.argv[1], json.loads(sys.argv[2]))).outcome.events)"
)


class Case(NamedTuple):
    """A scenario with overrides, and the most it may take: seconds of event loop and process, MiB."""

    name: str
    file: str
    overrides: tuple[str, ...] = ()
    loop_s: float | None = None
    process_s: float | None = None
    rss_mib: float | None = None
    aim: str = ""


CASES = (
    Case("quickstart", "quickstart", process_s=10),
    Case("azure_code_dsv3_ep32", "azure_code_dsv3_ep32", loop_s=3, process_s=8, rss_mib=1024),
    Case("dsv3_ep256", "dsv3_ep256", loop_s=6, process_s=8, rss_mib=1024),
    Case("dsv3_ep256, 4 replicas (1,024 ranks)", "dsv3_ep256", ("cluster.nodes=128", "parallel.replicas=4")),
    Case("dense_8b_2000", "dense_8b_2000", loop_s=0.25, aim="aim 0.1"),
    Case("qwen3_235b_ep8_closed64", "qwen3_235b_ep8_closed64", loop_s=2, aim="aim 0.5"),
    Case("dsv2lite_replay_ep8", "dsv2lite_replay_ep8"),
)

PEERS = """\
## Other simulators, quoted

Not measured by us: figures that were noted for these tools on a 2-core machine of the same kind (2026-11-22). "Dense"
is the work of `dense_8b_2000`: 2,000 requests, 2.33 M prompt and 0.43 M output tokens; "closed loop" that of
`qwen3_235b_ep8_closed64`: 2,000 x (1024/256) at concurrency 64.

| tool | work | figure |
|---|---|---|
| Vidur | dense, Llama-2-7B, one A100 | 11.5 s; 4.67 s without metrics = 13.1k steps/s, 971 MB |
| Vidur | cold start: fitting its models | over 20 min |
| AISimulate 0.13 nightly | dense, Llama-3.1-8B, A100 | replay 0.56 s, process 1.99 s, about 155 MB |
| AISimulate 0.13 nightly | closed loop, Qwen3-235B EP8 H200 | replay 0.48 s, process 3.1 s |
| BLIS | dense, same mean lengths and rate | process 1.08 s, 97 MB |
| Frontier | tiny MoE EP2, 200 requests | 35 steps/s |
| LLMServingSim | 300 requests, by its own logs | 2.6-6.6 min; 10-37 s in a newer pull request |

None of them follows single experts, so the MoE rows compare different amounts of work.
"""


class Sample(NamedTuple):
    """One process: seconds of event loop and in all, peak MiB, seconds on a CPU, and its report."""

    loop_s: float
    process_s: float
    rss_mib: float
    cpu_s: float
    report: dict[str, Any]


def run_once(case: Case) -> Sample:
    """`moesim simulate` in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "moesim.cli",
            "simulate",
            f"workloads/{case.file}.yaml",
            "--json",
            "--out",
            out,
        ]
        command += [word for override in case.overrides for word in ("--set", override)]
        with (Path(out) / "stdout").open("w+b") as stdout:
            began = time.perf_counter()
            child = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            process_s = time.perf_counter() - began
            child.returncode = os.waitstatus_to_exitcode(status)
            stdout.seek(0)
            if child.returncode:
                raise SystemExit(f"exit code {child.returncode}: {' '.join(command[1:])}")
            report = json.loads(stdout.read())
    loop_s = report["provenance"]["elapsed"]["event_loop_s"]
    return Sample(loop_s, process_s, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime, report)


def count_events(case: Case) -> int:
    """SimPy events of the run, which no report carries."""
    command = [sys.executable, "-c", _EVENTS, f"workloads/{case.file}.yaml", json.dumps(case.overrides)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def row(case: Case, samples: list[Sample]) -> str:
    """A line of the table; the verdict is on medians."""
    loop, process, rss, cpu = (statistics.median(s[i] for s in samples) for i in range(4))
    steps = samples[0].report["summary"]["steps"]
    pairs = ((case.loop_s, loop, "s loop"), (case.process_s, process, "s process"), (case.rss_mib, rss, "MiB"))
    target = ", ".join(f"< {limit:g} {unit}" for limit, _, unit in pairs if limit is not None) or "runs"
    missed = [f"{got:.2f} {unit}" for limit, got, unit in pairs if limit is not None and got >= limit]
    cells = (
        f"`{case.name}`",
        f"{min(s.loop_s for s in samples):.3f}",
        f"{loop:.3f}",
        f"{min(s.process_s for s in samples):.2f}",
        f"{process:.2f}",
        f"{cpu:.2f}",
        f"{rss:,.0f}",
        f"{count_events(case):,}",
        f"{steps:,}",
        f"{steps / loop:,.0f}",
        target + (f" ({case.aim})" if case.aim else ""),
        f"missed: {', '.join(missed)}" if missed else "met",
    )
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| scenario | loop s, least | loop s, median | process s, least | process s, median | CPU s, median | peak MiB | "
    "SimPy events | steps | steps/s of loop | target | |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|---|"
)


def speeds(cases: list[Case], rounds: int) -> str:
    """The table of scenarios; rounds take turns, so that a slow minute of the machine falls on all alike."""
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for turn in range(rounds):
        for case in cases:
            samples[case.name].append(run_once(case))
            print(f"{turn + 1}/{rounds} {case.name}: loop {samples[case.name][-1].loop_s:.3f} s", file=sys.stderr)
    return "\n".join([HEAD, *(row(case, samples[case.name]) for case in cases)])


# ---- counting


def ways_to_count(source: RoutingSource) -> dict[str, Callable[[], object]]:
    """Ways to count the ids of a whole trace; the first is the floor: no layers, no steps, no replay."""
    ids, experts = source.expert_TLK, source.num_experts
    tokens, layers, top_k = ids.shape
    key = np.repeat(np.arange(layers) * experts, top_k)
    length_Q = source.sequence_tokens_Q
    replay = Replay(source, length_Q, np.ones_like(length_Q), seed=1)
    request_T = np.repeat(np.arange(source.num_sequences), source.sequence_tokens_Q[replay.sequence_R])
    position_T = np.concatenate([np.arange(n) for n in source.sequence_tokens_Q[replay.sequence_R]])
    offsets = {size: np.append(np.arange(0, tokens, size), tokens) for size in (64, 512)}

    def replayed(size: int) -> object:
        return count_steps(source, replay.rows(request_T, position_T), offsets[size])

    brute_LE = np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    assert np.array_equal(count_ids(ids, experts), brute_LE)
    assert all(np.array_equal(np.sum(replayed(size), axis=0, dtype=np.int64), brute_LE) for size in offsets)
    return {
        "`np.bincount(ids)`: the floor, no layers": lambda: np.bincount(ids.ravel(), minlength=experts),
        "`np.bincount(ids + layer * E)`: by layer": lambda: np.bincount(
            (ids.reshape(tokens, -1) + key).ravel(), minlength=layers * experts
        ),
        "`count_ids`: by layer": lambda: count_ids(ids, experts),
        "replay rows and `count_steps`, 64 tokens a step": lambda: replayed(64),
        "replay rows and `count_steps`, 512 tokens a step": lambda: replayed(512),
    }


def counting(rounds: int = 21) -> str:
    """The table of counting: the median over rounds of each way's time over the floor's of the same round."""
    paths = sorted((DATA / "routing").glob("esft_*.npz"))
    lines = ["| trace | way | least ms | times the floor |", "|---|---|--:|--:|"]
    for path in paths:
        ways = ways_to_count(read(path))
        times = np.empty((rounds, len(ways)))
        for turn in range(rounds):
            for i, call in enumerate(ways.values()):
                began = time.perf_counter()
                call()
                times[turn, i] = time.perf_counter() - began
        ratio = np.median(times / times[:, :1], axis=0)
        for i, name in enumerate(ways):
            lines.append(f"| {path.stem} | {name} | {times[:, i].min() * 1e3:.1f} | {ratio[i]:.2f} |")
    return "\n".join(lines) if paths else "The traces of `../shared/data/routing` are not here."


def machine() -> str:
    """Cores, CPU, memory, Python, and how busy it was."""
    facts = dict.fromkeys(("model name",), platform.processor() or "unknown CPU")
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        facts |= {key.strip(): value.strip() for key, _, value in lines if key.strip() == "model name"}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {facts['model name']}, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}; "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    """Measure, print, and write the tables when every scenario was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, help="runs of each scenario (default 5)")
    parser.add_argument("--only", help="only scenarios whose name contains this; writes no file")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or options.only in case.name]
    on = machine()
    text = (
        f"`python benchmarks/speed.py -n {options.n}` printed this on {on}. "
        "Medians decide; the least shows what the machine can do undisturbed.\n\n"
        f"{speeds(cases, options.n)}\n"
    )
    if not options.only:
        text += (
            "\n## Counting recorded routing\n\n"
            "What counting every id of a trace costs beside one `np.bincount` over the same ids, "
            "ways taking turns; counts by layer equal a brute-force count exactly (asserted before measuring). "
            f"Target: replay within 2 times.\n\n{counting()}\n"
        )
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(f"# Speed\n\n{text}\n{PEERS}")
        before, _, rest = README.read_text().partition(_MARK)
        assert rest, "README.md has lost the mark of its table of speed"
        README.write_text(before + _MARK + text.replace("\n## ", "\n### ") + _END + rest.partition(_END)[2])
    print(text)


if __name__ == "__main__":
    main()
