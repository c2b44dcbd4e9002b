"""How near to a proven bound bit widths and resident experts are, what that costs, and what it is worth beside the
heuristics: `python benchmarks/tuner/inner_solvers.py` rewrites results/validation/tuner_inner.md (ten minutes; the
last table needs the recorded routes of ../shared/data)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from moesim_tuner.knapsack import Choices, choose, greedy, prices
from moesim_tuner.offload import resident
from moesim_tuner.offload.split_ilp import Policy as Split
from moesim_tuner.precision.bits_ilp import Policy as Bits

from moesim.offload import CacheSemantics, MissCosts, OffloadContext, RouteSample
from moesim.offload.expert_split import Policy as ExpertSplit
from moesim.offload.precision.allocation import allocate
from moesim.offload.precision.edgemoe import lower
from moesim.offload.precision.significance import mean_weight, significance
from moesim.policy import load_plugin
from moesim.rng import generator
from moesim.scenario.load import load_scenario
from moesim.simulate import simulate

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "results" / "validation" / "tuner_inner.md"
ROUTES = ROOT.parent / "shared" / "data" / "routing"
UNITS = 0.1
"""deterministic time of the solver for an instance"""
WIDTHS = np.array([1.58, 2.0, 3.0, 4.0, 8.0])
POLICIES = {"offload.split_ilp": Split, "precision.bits_ilp": Bits}
"""so that the page needs no installation"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    print(f"{time.process_time():.0f} s: {len(rows)} rows", file=sys.stderr, flush=True)
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def spread(gaps: Sequence[float]) -> list[str]:
    return [percent(float(np.quantile(gaps, q))) for q in (0.5, 0.9, 1.0)]


def cpu_s(work: Callable[[], Any], calls: int = 3) -> float:
    """The least of some calls."""
    took = []
    for _ in range(calls):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


# ---- bit widths


def widths_of(rng: np.random.Generator, layers: int, experts: int, average: float) -> Choices:
    """Lognormal importance, errors 4^-b with a tenth of noise, experts of equal size."""
    keys = layers * experts
    cost = rng.lognormal(0, 1.5, (keys, 1)) * 4.0**-WIDTHS * rng.lognormal(0, 0.1, (keys, len(WIDTHS)))
    size = np.tile(np.ceil(1000 * (WIDTHS + 0.25)).astype(np.int64), (keys, 1))
    return Choices(cost, size, int(average * 1000 * keys))


def bit_gaps() -> str:
    rows = []
    for layers, experts in ((1, 8), (1, 64), (32, 8), (26, 64)):
        first, left, units, proven, asked = [], [], [], 0, 0
        for number in range(100):
            rng = generator(number, "benchmark bits", layers, experts)
            choices = widths_of(rng, layers, experts, float(rng.uniform(2.0, 6.0)))
            option = greedy(choices)
            assert option is not None
            cost = choices.cost(option)
            first.append((cost - prices(choices)[1]) / cost)
            _, part = choose(choices, "bits", 1e-4, UNITS)
            left.append(part.gap)
            units.append(part.units)
            proven += part.status == "optimal"
            asked += part.units > 0
        rows.append([f"{layers} x {experts}", *spread(first), *spread(left), proven, asked, f"{max(units):.2g}"])
    head = ["layers x experts", "greedy median", "p90", "most", "after median", "p90", "most", "proven optimal",
            "solver asked", "most units"]  # fmt: skip
    return table(head, rows)


def bit_speed() -> str:
    rows = []
    for average in (2.5, 3.0, 4.0):
        choices = widths_of(generator(0, "benchmark bits at size"), 58, 256, average)
        option = greedy(choices)
        assert option is not None
        gap = (choices.cost(option) - prices(choices)[1]) / choices.cost(option)
        took = cpu_s(lambda choices=choices: choose(choices, "bits", 1e-4, 1.0))  # type: ignore[misc]
        importance = choices.cost_NB[:, -1:].reshape(58, 256) * 4.0**8
        size = np.ones((58, 256), np.int64)
        edge = cpu_s(
            lambda i=importance, s=size, a=average: lower(i, s, WIDTHS[::-1], a - 0.25),
            1,  # type: ignore[misc]
        )
        rows.append([average, percent(gap), f"{took:.2f}", f"{edge:.2f}"])
    return table(["bits a weight", "gap, no solver asked", "CPU s", "CPU s of `edgemoe`"], rows)


def bit_value() -> str:
    """Fitted to the first half of the routes; errors by the use of the first half, and of the other."""
    rows = []
    for task in ("intent", "summary"):
        fit, held = (sample_context(task, half) for half in (0, 1))
        weigh = [significance(c.popularity_LE, mean_weight(c), 1.0, 1.5) for c in (fit, held)]

        def errors(width_LE: np.ndarray, weigh: list[Any] = weigh) -> list[float]:
            return [float((w * 4.0**-width_LE).sum()) for w in weigh]

        for average in (1.75, 2.0, 2.5):
            each = np.array(
                [allocate(w[:, None] * 4.0 ** -np.arange(1.0, 4.0), (1, 2, 3), int(average * 64)) for w in weigh[0]]
            )
            step = lower(weigh[0], fit.size_LE, np.array([3.0, 2.0, 1.0]), average)
            policy = Bits(widths=(1.0, 2.0, 3.0), average=average, group=None)
            found, part = policy.solve(fit, 16.0)
            mine, base = errors(found), errors(each)
            rows.append(
                [task, average, part.status, percent(part.gap)]
                + [f"{e / b - 1:+.1%}" for e, b in zip(mine, base, strict=True)]
                + [f"{e / b - 1:+.1%}" for e, b in zip(errors(step), base, strict=True)]
            )
    head = [
        "routes",
        "bits",
        "status",
        "gap",
        "`bits_ilp`, fitted",
        "held out",
        "`edgemoe`'s steps, fitted",
        "held out",
    ]
    return table(head, rows)


def sample_context(task: str, half: int) -> OffloadContext:
    found = np.load(ROUTES / f"esft_dsv2lite_{task}.npz")
    rows = slice(0, len(found["expert_ids"]) // 2) if half == 0 else slice(len(found["expert_ids"]) // 2, None)
    sample = RouteSample(found["expert_ids"][rows], found["sequence_id"][rows], found["weights"][rows])
    size = np.full((26, 64), 16_000, np.int64)
    costs = MissCosts(1.0, lambda rows: 0.0, lambda rows: 0.0, 0.0, 1.0)
    return OffloadContext(
        26, 64, 6, size, int(size.sum()), 2, sample.count_LE(64), CacheSemantics(), costs, 0, fit=sample
    )


# ---- resident experts


def synthetic(number: int, layers: int, experts: int, top_k: int, tokens: int = 4096) -> OffloadContext:
    """Routes with popular experts; link, CPU and hand-over in the proportions of desks and servers."""
    rng = generator(number, "benchmark residents", layers, experts)
    popular_LE = rng.normal(0, 0.8, (layers, experts))
    ids = np.stack(
        [np.argsort(-(p + rng.gumbel(size=(tokens, experts))), axis=1)[:, :top_k] for p in popular_LE], axis=1
    )
    size = np.full((layers, experts), 17_301_504, np.int64)
    cpu, sync, gpu = rng.uniform(0.1, 1.0) * 690_000, rng.uniform(0.02, 0.6) * 690_000, 20_000.0
    costs = MissCosts(
        690_000.0, lambda rows: gpu, lambda rows: float(cpu), float(sync), 2e5,
        lambda rows: 10_000 + gpu * len(rows), 1,
    )  # fmt: skip
    sample = RouteSample(ids, np.zeros(tokens, np.int64))
    capacity = int(size.sum() * rng.uniform(0.1, 0.8))
    return OffloadContext(
        layers, experts, top_k, size, capacity, 2, sample.count_LE(experts), CacheSemantics(), costs, number, fit=sample
    )


def resident_gaps() -> str:
    rows = []
    for layers, experts, top_k, instances in ((32, 8, 2, 100), (26, 64, 6, 100), (58, 256, 8, 3)):
        gaps, took, popular, proven, asked = [], [], [], 0, 0
        for number in range(instances):
            ctx = synthetic(number, layers, experts, top_k, 2048 if experts <= 64 else 4096)
            problem = Split().problem(ctx)
            assert problem is not None
            began = time.process_time()
            found = resident.solve(problem, 1e-4, UNITS)
            took.append(time.process_time() - began)
            gaps.append(found.part.gap)
            heuristic = resident.expected_ns(problem, ExpertSplit().plan(ctx).fixed_LE)
            popular.append(heuristic / found.part.objective - 1)
            proven += found.part.status == "optimal"
            asked += found.part.units > 0
        rows.append([f"{layers} x {experts}, top {top_k}", instances, *spread(gaps), *spread(popular), proven, asked,
                     f"{np.median(took):.2f}"])  # fmt: skip
    head = ["layers x experts", "instances", "gap median", "p90", "most", "`expert_split` above it, median", "p90",
            "most", "proven optimal", "solver asked", "CPU s, median"]  # fmt: skip
    return table(head, rows)


OTHERS = {
    "`expert_split`": "expert_split",
    "entropy": "{kind: expert_split, share: entropy}",
    "`fiddler`, max": "{kind: fiddler, objective: max}",
    "KTransformers frequency": "{kind: ktransformers, strategy: frequency}",
    "front loading": "{kind: ktransformers, strategy: front_loading}",
}


def resident_value() -> str:
    rows = []
    for task in ("intent", "summary"):
        for sync_us, concurrency in ((40, 1), (300, 1), (40, 4)):
            for gib in (4, 12):
                changes = (
                    f"routing.path={ROUTES / f'esft_dsv2lite_{task}.npz'}", "policies.prefetch=none",
                    "policies.eviction=lru", "tiers.pooled=false", "tiers.vram=24 GiB", "tiers.kv_tokens=null",
                    f"tiers.experts={gib} GiB", f"tiers.cpu.sync_us={sync_us}", f"requests.concurrency={concurrency}",
                    "requests.num_requests=8", "requests.prompt_tokens=16", "requests.output_tokens=64",
                )  # fmt: skip
                rows.append([task, sync_us, concurrency, f"{gib} GiB", *_played(task, changes)])
    head = ["routes", "hand-over us", "users", "experts", "gap", "objective held out beside `expert_split`",
            "tokens/s", *(f"{name}" for name in OTHERS)]  # fmt: skip
    return table(head, rows)


def _played(task: str, changes: tuple[str, ...]) -> list[str]:
    workload = ROOT / "workloads" / "offload_dsv2lite_12gb.yaml"

    def run(kind: str) -> tuple[Any, float]:
        result = simulate(load_scenario(workload, (*changes, f"policies.offload={kind}"), 1))
        return result.offload.ranks[0], float(result.to_json()["summary"]["throughput"]["output_tok_per_s"])  # type: ignore[union-attr]

    mine, rate = run("split_ilp")
    context: OffloadContext = mine.context
    ids = np.load(ROUTES / f"esft_dsv2lite_{task}.npz")["expert_ids"]
    assert context.fit is not None
    assert (context.fit.expert_TLK == ids[: len(context.fit.expert_TLK)]).all()
    rest = ids[len(context.fit.expert_TLK) :]
    problem = Split().problem(replace(context, fit=RouteSample(rest, np.zeros(len(rest), np.int64))))
    assert problem is not None
    theirs, _ = ExpertSplit().plan(context).fixed_LE, None
    held = resident.expected_ns(problem, mine.plan.fixed_LE) / resident.expected_ns(problem, theirs) - 1
    others = [run(kind)[1] for kind in OTHERS.values()]
    return [percent(mine.plan.proof.gap), f"{held:+.2%}", f"{rate:.2f}", *(f"{o / rate - 1:+.1%}" for o in others)]


def page() -> str:
    recorded = ROUTES.exists()
    return "\n".join(
        [
            "# Inner solvers: bit widths and resident experts",
            "",
            "`python benchmarks/tuner/inner_solvers.py` printed this. CPU seconds of one process; a gap is (objective -"
            " bound) / objective. Greedy first, the bound next, the solver (OR-Tools' CP-SAT, one worker, deterministic"
            " time) where more than 0.01 % is left.",
            "",
            "## Bit widths: gaps",
            "",
            "100 instances each: lognormal importance, five widths (1.58, 2, 3, 4, 8), budgets of 2 to 6 bits a weight;"
            " `choose` of `moesim_tuner.knapsack` with a tenth of a unit of the solver's time, which"
            " its presolve may overrun.",
            "",
            bit_gaps(),
            "## Bit widths: 58 layers of 256 experts, five widths",
            "",
            bit_speed(),
            *(
                [
                    "## Bit widths: recorded use",
                    "",
                    "Weighted error beside MC-MoE's programme for each layer by itself (exact, without its rule of one"
                    " expert of each width) at the same bytes, widths 1, 2 and 3; fitted to the first half of the"
                    " tokens, held out: the same widths by the use of the other half.",
                    "",
                    bit_value(),
                ]
                if recorded
                else []
            ),
            "## Resident experts: gaps",
            "",
            "Synthetic routes, a CPU of 1 to 10 times the link's rate, hand-overs of 2 to 60 % of a transfer, 10 to"
            " 80 % of the experts resident. Up to 8 experts a layer the bound is over all sets and the solver closes"
            " it; above, the bound is that of a relaxation. `expert_split`: its set, by the same objective.",
            "",
            resident_gaps(),
            *(
                [
                    "## Resident experts: recorded routes, simulated",
                    "",
                    "`workloads/offload_dsv2lite_12gb.yaml` without prefetch, device memory for experts as said; fitted"
                    " to the first half of the chats, which the requests do not take. Objective: expected time of a"
                    " step's experts on the tokens held out. Other kinds: tokens/s beside `split_ilp`'s. One run of one"
                    " seed each: below half a per cent nothing is said.",
                    "",
                    resident_value(),
                ]
                if recorded
                else []
            ),
        ]
    )


if __name__ == "__main__":
    sys.modules["inner_solvers"] = sys.modules["__main__"]
    load_plugin("inner_solvers")
    text = page()
    PAGE.write_text(text)
    sys.stdout.write(text)
