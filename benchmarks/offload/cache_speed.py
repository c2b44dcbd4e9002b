"""Speed of the cache cores on recorded routes, one core: `python benchmarks/offload/cache_speed.py -n 20 --write` makes
results/validation/offload_speed.md. Process CPU time, the least of N calls; compiled code is warm."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import DATA, TARGET, table

from moesim.offload import compiled
from moesim.offload.conventions import MOE_LRC, TEXTBOOK, Convention, hit_curve, look_ups_of, segment_routing
from moesim.offload.fast import LookUps, found, next_uses
from moesim.offload.stacks import hits_by_slots

PAGE = TARGET / "offload_speed.md"
TASKS = ("intent", "summary")
TARGETS = {"LRU": 50, "LFU": 20, "MIN": 20, "MIN with bypass": 20, "LRU, every size": 20, "MIN, every size": 8}
"""millions of look-ups a second"""


def least(call: Callable[[], object], times: int) -> float:
    """CPU seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def kernels(caches: list[LookUps], slots: int) -> dict[str, Callable[[], object]]:
    """What is timed: all caches of a trace, one after the other, from look-ups that are cut already."""

    def one(policy: str, **how: object) -> Callable[[], object]:
        return lambda: [found(cache, slots, policy, **how) for cache in caches]  # type: ignore[arg-type]

    def every(policy: str, **how: object) -> Callable[[], object]:
        return lambda: [hits_by_slots(cache, policy, **how) for cache in caches]  # type: ignore[arg-type]

    return {
        "LRU": one("lru"),
        "LFU": one("lfu"),
        "LFU, counts of residents": one("lfu", counts="resident"),
        "MIN": one("opt"),
        "MIN with bypass": one("opt", bypass=True),
        "random": one("random"),
        "LRU, every size": every("lru"),
        "MIN, every size": every("opt"),
        "MIN with bypass, every size": every("opt", bypass=True),
        "LFU, every size": every("lfu"),
    }


def bare(caches: list[LookUps]) -> Callable[[], object]:
    """The yardstick: count the ids, nothing else."""
    count = np.zeros(caches[0].experts, np.int64)
    return lambda: [compiled.bare(cache.id_N, count) for cache in caches]


def measured(times: int) -> list[str]:
    """The tables, as Markdown lines."""
    routes = [np.load(DATA / "routing" / f"esft_dsv2lite_{task}.npz")["expert_ids"] for task in TASKS]
    lines = []
    for title, convention, slots in (
        ("A cache a layer (26 of 64 experts, 12 slots each), look-ups one by one", TEXTBOOK, 12),
        ("One cache (1,664 experts, 312 slots), look-ups one by one", Convention(True, "each", order="choice"), 312),
    ):
        caches = [cache for ids in routes for cache in look_ups_of(ids, 64, convention)]
        total = sum(len(cache.id_N) for cache in caches)
        counting = least(bare(caches), times + 1)
        rows = []
        for name, call in kernels(caches, slots).items():
            call()
            seconds = least(call, times)
            speed = total / seconds / 1e6
            target = TARGETS.get(name) if not convention.pooled else None
            verdict = "" if target is None else "met" if speed >= target else "not met"
            rows.append(
                (name, f"{1e3 * seconds:.1f}", f"{speed:.1f}", target or "", verdict, f"{seconds / counting:.0f}")
            )
        lines += [f"## {title}", "", f"{total:,} look-ups of both traces; counting their ids takes"
                  f" {1e3 * counting:.2f} ms.", ""]  # fmt: skip
        lines += table(("policy", "CPU ms", "M look-ups/s", "target", "", "times counting"), rows)
    lines += ["## From recorded routes to the answer", "", *table(("call", "CPU ms"), _whole(routes, times))]
    return lines


def _whole(routes: list[np.ndarray], times: int) -> list[tuple[str, str]]:
    calls: dict[str, Callable[[], object]] = {
        "`look_ups_of`, a cache a layer": lambda: [look_ups_of(ids, 64, TEXTBOOK) for ids in routes],
        "`next_uses` of them": lambda: [next_uses(c) for ids in routes for c in look_ups_of(ids, 64, TEXTBOOK)],
        "`hit_curve` lru, a cache a layer": lambda: [hit_curve(ids, 64, "lru", TEXTBOOK) for ids in routes],
        "`hit_curve` opt, a cache a layer": lambda: [hit_curve(ids, 64, "opt", TEXTBOOK) for ids in routes],
        "`hit_curve` lru, moe-lrc's convention": lambda: [hit_curve(ids, 64, "lru", MOE_LRC) for ids in routes],
        "`hit_curve` opt, moe-lrc's convention": lambda: [hit_curve(ids, 64, "opt", MOE_LRC) for ids in routes],
        "`segment_routing`, m = 16": lambda: [segment_routing(ids, 64, 16) for ids in routes],
    }
    out = []
    for name, call in calls.items():
        call()
        out.append((name, f"{1e3 * least(call, max(1, times // 4)):.0f}"))
    return out


def machine() -> str:
    """What it ran on."""
    import numba

    cpu = platform.processor() or "an unknown CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    return (
        f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, NumPy {np.__version__}, numba"
        f" {numba.__version__}; load average {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=20, help="calls of each, the least counts")
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE.name}")
    given = parser.parse_args()
    command = f"python benchmarks/offload/cache_speed.py -n {given.n}"
    head = [
        "# Speed of the cache cores",
        "",
        f"`{command}` printed this on {machine()}. CPU time of the process, one thread, the least of {given.n} calls,"
        " code compiled before; the routes are those of ESFT (DeepSeek-V2-Lite's shape, two tasks,"
        " 8,222 and 8,479 tokens).",
        "",
    ]
    page = "\n".join([*head, *measured(given.n)]).rstrip("\n") + "\n"
    print(page)
    if given.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
