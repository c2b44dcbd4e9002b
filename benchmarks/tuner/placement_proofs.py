"""How far placements are from the best possible one: objective, bounds and CPU time of placement.proven beside others.

    python benchmarks/tuner/placement_proofs.py [--seed N] [--layers N] [--no-page]

Writes results/validation/tuner_placement.md. Loads drawn here are of other seeds than those that the method was made
on; the recorded counts (../shared/data/routing/deepseek_v3_counts_l3_18.csv) are one recording, seen while it was made.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "placement"))

from balance import machine
from moesim_tuner.placement.proven import Policy
from moesim_tuner.placement.solution import Solution

from moesim.placement import Placement, PlacementContext
from moesim.placement.bound import balance_bound
from moesim.policy import load_policy
from moesim.rng import generator

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT.parent / "shared" / "data" / "routing" / "deepseek_v3_counts_l3_18.csv"
TARGET = ROOT / "results" / "validation" / "tuner_placement.md"
EXPERTS, ASSIGNMENTS = 256, 8_000_000
CPSAT_LAYERS = 2
PAGE = """# Placements and how much better one could be

`python benchmarks/tuner/placement_proofs.py {command}` printed this on {machine}.

Largest over mean rank load, mean of all layers; 256 experts, {layers} layers ({recorded} of the recording), copies
share an expert's load evenly; where ranks do not divide the slots, they have S // G or one more. *counting*: the
bound of `moesim.placement.bound`; *proven*: the best bound of `placement.proven` (by counting, by the linear programme
over rank patterns, by trying all, by CP-SAT). The gap is (objective - proven bound) / objective. CPU seconds are of one
process on a shared machine, for all layers, and move with its load: compare them with each other. *LPs*: linear
programmes solved; *CP-SAT*: layers that it was asked about (its model is too large for these). `eplb_swap` with 20
kicks. EPLB refuses slots that ranks do not divide. `balance_cpsat` (2 units of deterministic time a layer) has the
first {cpsat} layers alone, beside `proven`'s objective for the same ones: it takes seconds a layer. It lets ranks have
fewer slots than S // G, which `proven` does not where ranks do not divide the slots.

{table}

## Targets

{targets}

## Small layers

{small}
"""


class Case(NamedTuple):
    """A family of loads, slots beyond one an expert, ranks, and what was asked: (worst gap, CPU seconds)."""

    loads: str
    redundant: int
    ranks: int
    asked: tuple[float, float] | None = None


CASES = (
    Case("zipf 1.0", 32, 32, (0.001, 1.0)),
    Case("lognormal 0.5", 32, 32, (0.001, 1.0)),
    Case("recorded", 32, 32, (0.01, 30.0)),
    Case("recorded", 0, 32, (0.01, 30.0)),
    Case("recorded", 32, 64, (0.01, 30.0)),
    Case("recorded", 64, 64, (0.01, 30.0)),
    Case("recorded", 32, 144, (0.01, 30.0)),
    Case("zipf 1.2", 32, 64, (0.01, 30.0)),
    Case("zipf 1.5", 32, 64, (0.01, 30.0)),
    Case("zipf 1.2", 64, 64),
    Case("zipf 1.5", 64, 64),
    Case("zipf 1.5", 32, 32),
    Case("zipf 1.0", 32, 64),
    Case("lognormal 1.5", 32, 64),
    Case("zipf 1.0", 32, 144),
    Case("lognormal 0.5", 32, 144),
)


def loads(kind: str, seed: int, layers: int) -> Any:
    """Assignments by layer and expert [L, E]."""
    if kind == "recorded":
        return np.loadtxt(RECORDED, delimiter=",", skiprows=1)[:, 1:]
    name, number = kind.split()
    rows = []
    for layer in range(layers):
        rng = generator(seed, f"placement_proofs.{kind}", layer)
        power = 1.0 / np.arange(1, EXPERTS + 1) ** float(number)
        share = rng.permutation(power) if name == "zipf" else rng.lognormal(0, float(number), EXPERTS)
        rows.append(rng.multinomial(ASSIGNMENTS, share / share.sum()))
    return np.array(rows, np.float64)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its CPU seconds."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def row(case: Case, seed: int, layers: int) -> tuple[list[str], str]:
    """Cells of the table, and the line on the target."""
    weight = loads(case.loads, seed, layers)
    ctx, slots = PlacementContext(case.ranks), EXPERTS + case.redundant
    uneven = slots % case.ranks > 0

    def place(kind: str, weight: Any = weight, **told: Any) -> Placement:
        value = {"kind": kind, "num_redundant_experts": case.redundant, **told}
        placement: Placement = load_policy("placement", value).place(weight, ctx)
        return placement

    solution, spent = timed(lambda: Policy(num_redundant_experts=case.redundant).solve(weight, ctx))
    assert isinstance(solution, Solution)
    swap, swap_s = timed(lambda: place("eplb_swap", uneven=uneven))
    few = weight[:CPSAT_LAYERS]
    cpsat, cpsat_s = timed(lambda: place("balance_cpsat", few, uneven=uneven))
    same = np.mean([part.objective for part in solution.parts[:CPSAT_LAYERS]])
    gaps = np.array([part.gap for part in solution.parts])
    counting = balance_bound(weight, slots, case.ranks)
    cells = [
        f"{case.loads}, {slots} on {case.ranks}",
        "refused" if uneven else f"{place('eplb').balance(weight).mean():.5f}",
        f"{swap.balance(weight).mean():.5f}, {swap_s:.2f} s",
        f"{cpsat.balance(few).mean():.5f} ({same:.5f}), {cpsat_s:.1f} s",
        f"{solution.objective:.5f}",
        f"{counting.mean():.5f}",
        f"{solution.bound:.5f}",
        f"{100 * gaps.mean():.3f} %",
        f"{100 * gaps.max():.3f} %",
        f"{spent:.2f}",
        str(solution.linear_programmes),
        str(solution.solver_calls),
    ]
    told = f"- {cells[0]}: worst gap {100 * gaps.max():.3f} % in {spent:.2f} CPU s"
    if case.asked is None:
        return cells, f"{told}; no figure asked" + (", and above 1 %: open" if gaps.max() > 0.01 else "")
    worst, limit_s = case.asked
    fine = gaps.max() <= worst and spent <= limit_s
    return cells, f"{told}; asked {100 * worst:g} % in {limit_s:g} s: {'reached' if fine else 'MISSED'}"


def small(seed: int, instances: int = 500) -> str:
    """Layers of 2 to 12 experts on 2 to 4 ranks with 0 to 4 redundant ones: how many are proven optimal."""
    shapes = [s for s in itertools.product(range(2, 13), range(5), range(2, 5)) if s[0] + s[1] >= s[2]]
    rows: dict[tuple[int, int, int], list[Any]] = {}
    for number in range(instances):
        experts, redundant, ranks = shapes[number * 5 % len(shapes)]
        rng = generator(seed, "placement_proofs.small", number)
        kinds = [
            rng.lognormal(0, rng.uniform(0.2, 2), experts),
            rng.integers(0, 4, experts).astype(float),
            rng.integers(1, 100, experts).astype(float),
            np.where(rng.random(experts) < 0.5, 0, rng.exponential(size=experts)),
        ]
        rows.setdefault((experts, redundant, ranks), []).append(kinds[number % 4])
    parts, spent, asked = [], 0.0, 0
    for (_, redundant, ranks), weight in rows.items():
        policy = Policy(num_redundant_experts=redundant, tolerance=0.0)
        found, took = timed(lambda p=policy, w=weight, g=ranks: p.solve(np.array(w), PlacementContext(g)))
        parts += found.parts
        spent, asked = spent + took, asked + found.solver_calls
    proven = sum(part.status == "optimal" for part in parts)
    return (
        f"{proven} of {len(parts)} layers of 2 to 12 experts (2 to 4 ranks, 0 to 4 redundant experts, slots that ranks"
        f" divide or not; loads with ties and zeros among them) proven optimal at tolerance 0, in {spent:.1f} CPU s,"
        f" CP-SAT asked {asked} times. tests/oracle/test_proven_placement.py compares such layers with brute force."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--no-page", action="store_true", help="print alone")
    options = parser.parse_args()
    head = ["loads, slots on ranks", "eplb", "eplb_swap", f"balance_cpsat, {CPSAT_LAYERS} layers (proven)", "proven"]
    head += ["bound, counting", "bound, proven", "gap, mean", "gap, worst layer", "CPU s", "LPs", "CP-SAT"]
    table, targets = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)], []
    print("\n".join(table), flush=True)
    Policy(num_redundant_experts=4).solve(np.ones((1, 12)), PlacementContext(4))  # imports are not timed
    for case in CASES:
        if case.loads == "recorded" and not RECORDED.exists():
            print(f"{RECORDED.name} is not here: left out")
            continue
        cells, target = row(case, options.seed, options.layers)
        table.append("| " + " | ".join(cells) + " |")
        targets.append(target)
        print(table[-1], flush=True)
    said = small(options.seed)
    print("\n".join(["", *targets, "", said]))
    if not options.no_page:
        told = {"command": f"--seed {options.seed} --layers {options.layers}", "machine": machine(), "recorded": 16}
        told |= {"layers": options.layers, "cpsat": CPSAT_LAYERS, "table": "\n".join(table)}
        TARGET.write_text(PAGE.format(**told, targets="\n".join(targets), small=said), "utf-8")


if __name__ == "__main__":
    main()
