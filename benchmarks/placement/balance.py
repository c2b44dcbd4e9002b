"""Balance of rank loads by placement: largest over mean, mean of 58 layers, beside a proven bound and CPU seconds.

    python benchmarks/placement/balance.py [--eplb PATH] [--seed N] [--effort N ...] [--page]

256 experts, 8 million assignments a layer, popularity Zipf 1.0 or lognormal 0.5, in the shapes of DeepSeek's units and
in two that they do not have (288 slots on 64 ranks do not divide). `--eplb`: eplb.py of github.com/deepseek-ai/EPLB,
run in the same process (it needs torch) for its balance and its time; without it that column is empty. Seconds are of
this process's CPU, the least of three; the machine's load moves them all alike, so compare them with each other.
`--page` writes results/validation/placement_balance.md, which benchmarks/placement/claims.py reads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesim.placement import Placement, PlacementContext
from moesim.placement.bound import balance_bound
from moesim.policy import load_policy
from moesim.rng import generator

LAYERS, EXPERTS, GROUPS, ASSIGNMENTS = 58, 256, 8, 8_000_000
TARGET = Path(__file__).resolve().parents[2] / "results" / "validation" / "placement_balance.md"
PAGE = """# Balance of rank loads by placement, and its CPU time

`python benchmarks/placement/balance.py {command}` printed this on {machine}.
`eplb.py` is that of github.com/deepseek-ai/EPLB (commit d52c72d when this page was made), on one thread.

Largest over mean rank load, mean of 58 layers (worst layer in brackets), and CPU seconds for all 58: 256 experts,
8 million assignments a layer, popularity Zipf 1.0 or lognormal 0.5. Effort: kicks a layer out of a local optimum, 0 is
swaps alone. Seconds are the least of three runs (two of EPLB's, one of effort 50 and more) in one process on a shared
machine: compare them with each other. The gap to the proven bound is that of the largest effort.

{table}
"""


class Shape(NamedTuple):
    """Slots beyond one an expert, ranks, nodes, and how they are filled."""

    redundant: int
    ranks: int
    nodes: int
    mode: str

    @property
    def slots(self) -> int:
        return EXPERTS + self.redundant

    @property
    def uneven(self) -> bool:
        return self.slots % self.ranks > 0

    @property
    def name(self) -> str:
        return f"{self.slots}/{self.ranks} {self.mode}"


SHAPES = (
    Shape(32, 32, 4, "hierarchical"),
    Shape(32, 32, 4, "global"),
    Shape(64, 64, 8, "hierarchical"),
    Shape(64, 64, 8, "global"),
    Shape(32, 144, 18, "global"),
    Shape(0, 64, 8, "global"),
    Shape(32, 64, 8, "global"),
)
LOADS = ("zipf", "lognormal")


def loads(kind: str, seed: int = 1, layers: int = LAYERS) -> np.ndarray:
    """Assignments by layer and expert [L, E]: multinomial draws of a popularity drawn for each layer."""
    rows = []
    for layer in range(layers):
        rng = generator(seed, f"balance.{kind}", layer)
        zipf = kind == "zipf"
        share = rng.permutation(1.0 / np.arange(1, EXPERTS + 1)) if zipf else rng.lognormal(0, 0.5, EXPERTS)
        rows.append(rng.multinomial(ASSIGNMENTS, share / share.sum()))
    return np.array(rows, np.float64)


def context(shape: Shape) -> PlacementContext:
    return PlacementContext(shape.ranks, shape.nodes, GROUPS)


def place(kind: str, weight_LE: np.ndarray, shape: Shape, **parameters: Any) -> Placement:
    if kind == "eplb_swap":
        parameters["uneven"] = shape.uneven
    value = {"kind": kind, "num_redundant_experts": shape.redundant, "mode": shape.mode, **parameters}
    placement: Placement = load_policy("placement", value).place(weight_LE, context(shape))
    return placement


def bound(weight_LE: np.ndarray, shape: Shape) -> np.ndarray:
    """Proven least max/mean rank load of each layer."""
    of_nodes = (GROUPS, shape.nodes) if shape.mode == "hierarchical" else (1, 1)
    return balance_bound(weight_LE, shape.slots, shape.ranks, *of_nodes)


def cpu_s(work: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU seconds of a few runs."""
    least = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        least = min(least, time.process_time() - began)
    return least


def original(path: Path) -> Callable[[np.ndarray, Shape], Any]:
    """`rebalance_experts` of an eplb.py, on the shapes here: the expert of each slot [L, S]."""
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("original_eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(weight_LE: np.ndarray, shape: Shape) -> Any:
        groups, nodes = (GROUPS, shape.nodes) if shape.mode == "hierarchical" else (1, 1)
        return module.rebalance_experts(torch.from_numpy(weight_LE), shape.slots, groups, nodes, shape.ranks)[0].numpy()

    return run


def lines(seed: int, efforts: Sequence[int], eplb: Path | None) -> list[str]:
    """The table."""
    run = None if eplb is None else original(eplb)
    head = ["loads", "slots/ranks", "bound", "contiguous", "EPLB original", "eplb"]
    head += [f"eplb_swap, effort {effort}" for effort in efforts]
    head += ["gap to bound", "CPU of EPLB / greedy + swap"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in LOADS:
        weight_LE = loads(kind, seed)
        out += [f"| {' | '.join([kind, s.name, *_cells(weight_LE, s, efforts, run)])} |" for s in SHAPES]
    return out


def _cells(
    weight_LE: np.ndarray, shape: Shape, efforts: Sequence[int], run: Callable[[np.ndarray, Shape], Any] | None
) -> list[str]:
    least_L = bound(weight_LE, shape)
    cells = [f"{least_L.mean():.4f}", "-", "refused" if shape.uneven else "-", "refused" if shape.uneven else "-"]
    theirs_s = 0.0
    if not shape.uneven:
        value = {"kind": "contiguous", "num_redundant_experts": shape.redundant}
        plain = load_policy("placement", value).place(weight_LE, context(shape))
        cells[1] = f"{plain.balance(weight_LE).mean():.3f}"
        cells[3] = _cell(place("eplb", weight_LE, shape), weight_LE, cpu_s(lambda: place("eplb", weight_LE, shape)))
        if run is not None:
            theirs_s = cpu_s(lambda: run(weight_LE, shape), 2)
            cells[2] = _cell(context(shape).placement(run(weight_LE, shape), EXPERTS), weight_LE, theirs_s)
    spent, gap = [], 0.0
    for effort in efforts:
        placement = place("eplb_swap", weight_LE, shape, effort=effort)
        spent.append(cpu_s(lambda e=effort: place("eplb_swap", weight_LE, shape, effort=e), 1 + 2 * (effort < 50)))
        cells.append(_cell(placement, weight_LE, spent[-1]))
        gap = float((placement.balance(weight_LE) / least_L - 1).mean())
    return [*cells, f"{100 * gap:.3f} %", f"{theirs_s / spent[0]:.0f}" if theirs_s else "-"]


def _cell(placement: Placement, weight_LE: np.ndarray, spent_s: float) -> str:
    balance_L = placement.balance(weight_LE)
    return f"{balance_L.mean():.5f} (worst {balance_L.max():.4f}), {spent_s:.2f} s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eplb", type=Path, help="eplb.py of deepseek-ai/EPLB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--effort", type=int, nargs="+", default=[0, 20, 100], help="of eplb_swap; 0 is swaps alone")
    parser.add_argument("--page", action="store_true", help="write results/validation/placement_balance.md too")
    options = parser.parse_args()
    found = "\n".join(lines(options.seed, options.effort, options.eplb))
    print(found)
    if options.page:
        given = ["--eplb eplb.py"] if options.eplb else []
        given += [f"--seed {options.seed}", "--effort " + " ".join(map(str, options.effort))]
        TARGET.write_text(PAGE.format(command=" ".join(given), machine=machine(), table=found), "utf-8")


def machine() -> str:
    """Cores, CPU, and versions; no name of a host."""
    facts = dict.fromkeys(("model name",), platform.processor() or "unknown CPU")
    info = Path("/proc/cpuinfo")
    if info.is_file():
        pairs = (line.partition(":") for line in info.read_text().splitlines())
        facts |= {key.strip(): value.strip() for key, _, value in pairs if key.strip() == "model name"}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch", "numba") if _has(name)]
    return (
        f"{os.cpu_count()} cores of {facts['model name']}, {platform.system()} {platform.machine()}, Python"
        f" {platform.python_version()}, {', '.join(versions)}, load average {os.getloadavg()[0]:.1f} at the end"
    )


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
