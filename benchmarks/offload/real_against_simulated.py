"""The mini-runtime against the simulator: events, hit rates, step times and the ranking of policies.

python benchmarks/offload/real_against_simulated.py [--link disk] [--folder results/offload-real] [--quick]

Three parts, in this order, with rules that stand here before anything is looked at:

1. *Events*: every eviction policy on demand, and every prefetch policy under logical completion, on a small model with
   real reads: the look-ups' events must be those of the simulator, one by one.
2. *Times*: the runtime's parts are measured once, on other routes and at other cache sizes than those judged; all
   cases are predicted; then each is run once a round, in a fresh order each round. A case's step time is the median
   over its steps; the measured one is the median of that over the rounds. Wanted: median |error| <= 10 % (cuda: 5 %)
   and tau-b >= 0.9 (cuda: 0.95). Beside them stand the spread of the rounds, and tau-b between odd and even rounds,
   which is what the machine lets any prediction reach.
3. *Races*: prefetch with raced completion, ten runs of each case: the mean hit rate within 2 points of the simulated.

Nothing is fitted to the judged cases. The model's file is written once into the folder (400 MB) and kept. On cuda the
experts are larger; the cases are twenty everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from moesim_kernels.bench.machine import facts
from moesim_kernels.bench.pool import Device
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.runtime.backings import make_home
from moesim_kernels.runtime.compare import Case, Comparison, Measured, calibrate, first_difference, measure, predict
from moesim_kernels.runtime.predict import run_simulated
from moesim_kernels.runtime.replay import make_replay, sample, synthetic_routes
from moesim_kernels.runtime.run import Settings, run_real
from moesim_kernels.runtime.sizes import ModelSizes
from moesim_kernels.runtime.weights import WeightFile, open_weights, write_weights

from moesim.errors import MoesimError
from moesim.policy import policy_kinds
from moesim.workload.synthetic import SyntheticSpec

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "validation"
SIZES = {
    "disk": ModelSizes(max_context=128),
    "memory": ModelSizes(max_context=128),
    "cuda": ModelSizes(
        layers=4, hidden=2048, inner=1408, experts=64, top_k=6, heads=16, kv_heads=16, head_dim=128, max_context=128,
        dtype="bfloat16",
    ),
}  # fmt: skip
SMALL = ModelSizes(
    layers=4, hidden=64, inner=32, experts=16, top_k=3, heads=2, kv_heads=1, head_dim=16, vocabulary=64, max_context=64
)
ROUTES = SyntheticSpec(popularity_zipf=0.5, repeat=0.25, pool_tokens=8192, sequence_tokens=128)
POLICIES = ("lru", "lfu", "belady", "lru+markov", "lru+next_layer")
CACHES = (0.25, 0.4, 0.6, 0.8)
CALIBRATED_AT = (0.2, 0.5, 0.7)
BATCH = 2
LEARN = 16  # first sequences of the judged routes, which policies learn from and nobody replays
WANTED = {"disk": (0.10, 0.9), "memory": (0.10, 0.9), "cuda": (0.05, 0.95)}
RACED_RUNS = 10
QUIET_PSI, QUIET_RUNNING = 20.0, 0.9
"""Beyond these (percent of CPU pressure, share of the time that the computing thread had a CPU) the page says so."""


def model(path: Path, sizes: ModelSizes) -> WeightFile:
    """The file, written where it is not there, checked once as a whole."""
    try:
        file = open_weights(path)
        if file.sizes == sizes:
            return file
    except MoesimError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, sizes, 0)
    file = open_weights(path)
    file.check()
    return file


def event_rows(folder: Path, link: str, steps: int) -> list[dict[str, Any]]:
    """Part 1. The calibration that the simulator needs is taken on the way; no decision may depend on it."""
    file = model(folder / "small.moe", SMALL)
    routes = synthetic_routes(ROUTES.model_copy(update={"sequence_tokens": 32, "pool_tokens": 2048}), SMALL, 3)
    replay, fit = make_replay(routes, SMALL, 3, steps, 8), sample(routes, SMALL, range(8))
    whole = SMALL.num_keys * SMALL.slot_bytes
    found = calibrate(file, replay, (0.3,), link, repeats=1)
    sets = []
    for eviction in policy_kinds("eviction"):
        for miss, pooled in (("evict", False), ("evict", True), ("bypass", True)):
            name = f"{eviction}, {miss}, {'pooled' if pooled else 'per layer'}"
            sets.append((name, Settings(whole // 3, eviction=eviction, miss=miss, pooled=pooled)))
    for prefetch in policy_kinds("prefetch"):
        for eviction in ("lru", "lfu"):
            settings = Settings(whole // 3, eviction=eviction, prefetch=prefetch, completion="logical")
            sets.append((f"{eviction} + {prefetch}, logical", settings))
    rows = []
    for name, settings in sets:
        real = run_real(file, settings, replay, link, fit, check="never")
        simulated = run_simulated(found, settings, SMALL, replay, link, fit)
        same = real.driver.counters == simulated.driver.counters
        rows.append(
            {
                "setting": name,
                "events": len(real.events),
                "difference": first_difference(real, simulated) or ("" if same else "counters differ"),
                "prefetched": real.driver.counters.prefetched,
            }
        )
    return rows


def cases_of(sizes: ModelSizes, policies: tuple[str, ...], caches: tuple[float, ...]) -> list[Case]:
    """Every policy at every cache size."""
    whole = sizes.num_keys * sizes.slot_bytes
    sets = [(name, share, *name.partition("+")[::2]) for name in policies for share in caches]
    return [
        Case(f"{name} at {share:g}", Settings(int(whole * share), eviction, prefetch or "none"))
        for name, share, eviction, prefetch in sets
    ]


def campaign(link: str, folder: Path, steps: int, rounds: int, raced_runs: int) -> tuple[Comparison, WeightFile]:
    """Parts 2 and 3."""
    sizes = SIZES[link]
    file = model(folder / f"{link}.moe", sizes)
    judged, other = synthetic_routes(ROUTES, sizes, 21), synthetic_routes(ROUTES, sizes, 12)
    replay, fit = make_replay(judged, sizes, BATCH, steps, LEARN), sample(judged, sizes, range(LEARN))
    before = make_replay(other, sizes, BATCH, steps)
    cases = cases_of(sizes, POLICIES, CACHES)
    say("calibrating")
    home = make_home(link, file)
    found = calibrate(file, before, CALIBRATED_AT, link, cases[0].settings, home=home)
    say("predicting")
    measured = predict(found, file, cases, replay, before, link, fit, home)
    remark = measure(file, measured, replay, rounds, link, fit, say, home=home)
    raced = [one for one in measured if one.case.settings.prefetch != "none"]
    extra = [Measured(one.case, one.prediction, one.deciding) for one in raced]
    measure(file, extra, replay, max(0, raced_runs - rounds), link, fit, say, 1, home)
    for one, more in zip(raced, extra, strict=True):
        one.hit_rate_R += more.hit_rate_R  # step times stay those of the rounds in which all cases ran
    return Comparison(found, measured, remark), file


def say(text: str) -> None:
    """To stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}, PSI {cpu_pressure()}", file=sys.stderr, flush=True)


def raced_rows(found: Comparison) -> list[dict[str, Any]]:
    """Hit rates of the raced cases against the simulated ones, in points."""
    rows = []
    for one in found.cases:
        if one.case.settings.prefetch != "none":
            rates = np.array(one.hit_rate_R) * 100
            rows.append(
                {
                    "case": one.case.name,
                    "runs": len(rates),
                    "simulated": round(one.predicted_hit_rate * 100, 2),
                    "mean": round(float(rates.mean()), 2),
                    "least": round(float(rates.min()), 2),
                    "most": round(float(rates.max()), 2),
                    "apart": round(float(rates.mean()) - one.predicted_hit_rate * 100, 2),
                }
            )
    return rows


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    about, times, events, races = report["about"], report["times"], report["events"], report["races"]
    most_error, least_tau = WANTED[about["link"]]
    regret = regrets(times["cases"])
    different = [row for row in events if row["difference"]]
    apart = max((abs(row["apart"]) for row in races), default=0.0)
    worst = max(abs(one["error"]) for one in times["cases"])
    found = times["calibration"]
    halves = times["tau_b_of_halves"]
    demand = [c for c in times["cases"] if "+" not in c["case"]]
    demand_same = sum(sum(c["same_events"]) for c in demand)
    demand_runs = sum(len(c["same_events"]) for c in demand)
    running = np.median([x for c in times["cases"] for x in c["running"]])
    psi = [x for c in times["cases"] for x in c["psi"] if x is not None]
    busy = ""
    if (psi and np.median(psi) > QUIET_PSI) or running < QUIET_RUNNING:
        busy = (
            " **The machine was not quiet**: what stands here of times, ranking and races tells of other work on it; "
            "how far even and odd rounds agree with each other says what any prediction could reach."
        )
    lines = [
        "# The mini-runtime beside the simulator\n",
        f"Command: `python benchmarks/offload/real_against_simulated.py --link {about['link']} "
        f"--steps {about['steps']} --rounds {about['rounds']}`. {about['date']}, "
        f"{about['machine']['cpu']}, {about['machine']['cpus']} CPUs, {about['machine']['device']}, torch "
        f"{about['machine']['torch']}, one thread computes. Model: {about['sizes']}; {about['expert_bytes']:,} bytes "
        f"an expert, {about['whole_bytes']:,} in all; batch {BATCH}, {about['steps']} steps, synthetic routes. Link: "
        f"{about['link']}{', ' + times['remark'] if times['remark'] else ''}. {about['seconds']:.0f} s in all. "
        "The script's head states the rules.\n",
        f"While measuring: CPU pressure (PSI) median {np.median(psi) if psi else float('nan'):.1f} %; where it did not "
        f"wait, the computing thread had a CPU for {running:.0%} of the time; reads in the calibration took "
        f"{found['move'] / 1e6:.3f} ms, middle half {found['move_spread']:.0%} of that wide.{busy}\n",
        "| figure | found | wanted | verdict |",
        "|---|---|---|---|",
        f"| settings whose events differ, demand and logical prefetch (part 1) | {len(different)} of {len(events)}, "
        f"{sum(row['events'] for row in events):,} events | 0 | {verdict(not different)} |",
        f"| demand runs of part 2 whose events are the simulator's | {demand_same} of {demand_runs} | all | "
        f"{verdict(demand_same == demand_runs)} |",
        f"| different outputs (bits of all logits) among {times['runs']} runs | {len(times['digests'])} | 1 | "
        f"{verdict(len(times['digests']) == 1)} |",
        f"| step time, median of the cases' errors | {times['median_error']:.1%} (worst {worst:.1%}) | <= "
        f"{most_error:.0%} | {verdict(times['median_error'] <= most_error)} |",
        f"| the same of means over steps | {times['median_mean_error']:.1%} | | |",
        f"| spread of the rounds, median of the cases | {times['median_spread']:.1%} | | noise |",
        f"| ranking of {len(times['cases'])} cases, tau-b | {times['tau_b']:.3f} | >= {least_tau} | "
        f"{verdict(times['tau_b'] >= least_tau)} |",
        f"| tau-b of odd against even rounds | {'' if halves is None else f'{halves:.3f}'} | | noise |",
        f"| regret of the simulator's pick among the cases | {regret['pick']:.1%} | <= 2 % | "
        f"{verdict(regret['pick'] <= 0.02)} |",
        f"| regret of its picks at each cache size, mean and worst | {regret['by_cache_mean']:.1%}, "
        f"{regret['by_cache_worst']:.1%} | | |",
        f"| regret of a case at random; of LRU at the best one's cache size | {regret['random']:.1%}; "
        f"{regret['lru']:.1%} | | |",
        f"| raced prefetch, hit rate apart, worst case | {apart:.2f} points | <= 2 | {verdict(apart <= 2)} |\n",
        "## Step times\n",
        "Predicted before, measured in turns. Hit rates: simulated, then the mean of the rounds.\n",
        "| case | predicted ms | measured ms | error | spread | stall ms | hits % | real % | same events |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['case']} | {one['predicted_ms']:.2f} | {one['measured_ms']:.2f} | {one['error']:+.1%} | "
        f"{one['spread']:.1%} | {np.median(one['stall_ms']):.2f} | {one['predicted_hit_rate'] * 100:.2f} | "
        f"{np.mean(one['hit_rate']) * 100:.2f} | {sum(one['same_events'])}/{len(one['same_events'])} |"
        for one in times["cases"]
    ]
    lines += [
        "\n## Races\n",
        "| case | runs | simulated % | real, mean % | least | most | apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in races:
        lines.append(
            f"| {row['case']} | {row['runs']} | {row['simulated']:.2f} | {row['mean']:.2f} | {row['least']:.2f} | "
            f"{row['most']:.2f} | {row['apart']:+.2f} |"
        )
    lines += ["\n## Events\n", "| setting | events | prefetched | difference |", "|---|---|---|---|"]
    for row in events:
        lines.append(f"| {row['setting']} | {row['events']} | {row['prefetched']} | {row['difference'] or 'none'} |")
    return "\n".join(lines) + "\n"


def regrets(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Measured time over the best measured one, less 1: of the simulator's pick among all cases, the mean and the worst
    of its picks at each cache size, of a case at random (mean), and of LRU at the cache size of the best."""
    name = [case["case"] for case in cases]
    predicted, measured = (np.array([case[key] for case in cases]) for key in ("predicted_ms", "measured_ms"))
    share = np.array([text.rpartition(" at ")[2] for text in name])

    def regret(among: Any) -> float:
        at = np.flatnonzero(among)
        return float(measured[at[predicted[at].argmin()]] / measured[at].min() - 1.0)

    each = [regret(share == one) for one in sorted(set(share.tolist()))]
    best = int(measured.argmin())
    default = name.index(f"lru at {share[best]}")
    return {
        "pick": round(regret(np.ones(len(cases), bool)), 4),
        "by_cache_mean": round(float(np.mean(each)), 4),
        "by_cache_worst": round(max(each), 4),
        "random": round(float((measured / measured.min()).mean() - 1.0), 4),
        "lru": round(float(measured[default] / measured[best] - 1.0), 4),
    }


def verdict(reached: bool) -> str:
    """In a word."""
    return "reached" if reached else "missed"


def main() -> None:
    """Run all parts and write the page."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=sorted(SIZES), default="disk")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "offload-real", help="where models are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raced", type=int, default=RACED_RUNS, help="runs of each case in which prefetches race")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, to see that all parts run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.steps, options.rounds = 8, 2
    start = time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    events = event_rows(options.folder, options.link, 24)
    found, file = campaign(
        options.link, options.folder, options.steps, options.rounds, 2 if options.quick else options.raced
    )
    device = Device("cuda" if options.link == "cuda" else "cpu", 1)
    machine = facts(device)
    sizes = file.sizes
    report = {
        "about": {
            "link": options.link,
            "date": machine["date"],
            "machine": machine,
            "sizes": ", ".join(f"{k} {v}" for k, v in sizes.model_dump().items()),
            "expert_bytes": sizes.slot_bytes,
            "whole_bytes": sizes.num_keys * sizes.slot_bytes,
            "steps": options.steps,
            "rounds": options.rounds,
            "seconds": round(time.perf_counter() - start, 1),
        },
        "times": found.to_json(),
        "races": raced_rows(found),
        "events": events,
    }
    name = "offload_real" if options.link == "disk" else f"offload_real_{options.link}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(report, separators=(",", ":")) + "\n", "utf-8")
    (options.out / f"{name}.md").write_text(page(report), "utf-8")
    print(page(report).split("## Step times")[0])


if __name__ == "__main__":
    main()
