"""KTransformers' table of placements (doc/en/kt-kernel/experts-sched-Tutorial.md): Qwen3-Next-80B-A3B-Instruct FP8 on
four RTX 4090 (TP 4) and a Xeon Gold 6454S, ShareGPT, tokens/s by share of experts on the GPU and placement strategy.

A step of one token through our own objects: the kind `ktransformers`, the driver, the simulated device, 48 layers of
512 experts of which 10 are chosen. Three constants are fitted, each to one cell of the random column: a layer's own
time (all on the GPU), what a layer pays for having any chosen expert on the CPU, and what an expert takes there. How
often a layer has one is not put in, it comes out of the routes. Not stated there and assumed here: one token a step.

What is not public is the popularity of that model's experts over that traffic. Its stand-in: the counts of DeepSeek-V3
(layers 3-18, 256 experts, each count twice), shuffled, which nothing was fitted to. What a request's own popularity
is, only the dynamic column can tell: its log weight has normal noise of standard deviation TILT, and its prompt counts
like PROMPT independent tokens; both were fitted to three cells of that column (`fit_dynamic`), after looking at all of
it, and the grid of the fit was made anew twice: results on the dynamic column are fits, not predictions.
"""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import DATA
from serial import Constants, Ran, context_of, run, top_k_by_weight

from moesim.arrays import FloatArray
from moesim.offload import StepRoutes
from moesim.rng import generator

LAYERS, EXPERTS, TOP_K = 48, 512, 10
EXPERT_BYTES = 3 * 2048 * 512
"""FP8: hidden size 2048, expert width 512"""
STRATEGIES = ("random", "uniform", "front_loading", "frequency", "dynamic")
COLUMNS = dict(
    zip(STRATEGIES, ("random", "uniform", "front_loading", "frequency", "dynamic_expert_update"), strict=True)
)
RATIOS = tuple(i / 10 for i in range(11))
FITTED_AT = (0.0, 0.6, 1.0)
ORDERED = ("random", "front_loading", "frequency", "dynamic")
TILT, PROMPT = 1.9, 10
"""of a request's log weights; tokens that a prompt counts for: from `fit_dynamic`"""
DYNAMIC_AT = (0.1, 0.3, 0.5)
REQUESTS, TOKENS, PLACEMENTS = 16, 2, 4
SEED = 11


@cache
def published() -> dict[str, FloatArray]:
    """Tokens/s by strategy and ratio."""
    with (DATA / "published" / "ktransformers_placement_table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gpu_expert_ratio"]) for row in rows] == list(RATIOS)
    return {name: np.array([float(row[column]) for row in rows]) for name, column in COLUMNS.items()}


@cache
def popularity() -> FloatArray:
    """[L, E]: DeepSeek-V3's counts, layer by layer over and over, shuffled within each."""
    with (DATA / "routing" / "deepseek_v3_counts_l3_18.csv").open(encoding="utf-8") as file:
        rows = [[float(x) for x in row[1:]] for row in list(csv.reader(file))[1:]]
    counts = np.repeat(np.array(rows), EXPERTS // len(rows[0]), axis=1)
    out = np.empty((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        order = generator(SEED, "kt popularity", layer).permutation(EXPERTS)
        out[layer] = np.maximum(counts[layer % len(counts)][order], 0.5)  # an expert seen never is not impossible
    return out


@dataclass(frozen=True)
class Request:
    """Its prompt, as far as it counts, and some tokens of its answer."""

    prompt: StepRoutes
    answer: tuple[StepRoutes, ...]


@cache
def requests(tilt: float = TILT, prompt: int = PROMPT, number: int = REQUESTS) -> tuple[Request, ...]:
    """The same traffic for every cell. The noise of a layer is the normal distribution's quantiles, dealt out to
    experts so that over all requests each expert, too, gets evenly spaced ones (a Latin square): few requests do then.
    """
    out = []
    order = np.stack([generator(SEED, "kt tilt", layer).permutation(EXPERTS) for layer in range(LAYERS)])
    for i in range(number):
        place = (order + i * EXPERTS // number) % EXPERTS
        log_weight = np.log(popularity()) + tilt * norm.ppf((place + 0.5) / EXPERTS)
        asked = top_k_by_weight(log_weight, TOP_K, prompt, SEED, "kt prompts", i)
        ids = top_k_by_weight(log_weight, TOP_K, TOKENS, SEED, "kt answers", i)
        answer = tuple(StepRoutes(j, ids[j][None], np.full(1, i)) for j in range(TOKENS))
        out.append(Request(StepRoutes(0, asked, np.full(prompt, i), prompt=True), answer))
    return tuple(out)


def simulate(strategy: str, ratio: float, times: Constants, traffic: tuple[Request, ...] | None = None) -> list[Ran]:
    """A cell. Random placements are drawn PLACEMENTS times, each for a part of the traffic, because theirs is not
    known. Dynamic ones are made anew from each prompt."""
    traffic = requests() if traffic is None else traffic
    if ratio in (0.0, 1.0):  # every token is the same then
        traffic = traffic[:1]
    parts = PLACEMENTS if strategy == "random" and len(traffic) > 1 else 1
    out = []
    for part in range(parts):
        steps = [
            step
            for request in traffic[part::parts]
            for step in (*((request.prompt,) if strategy == "dynamic" else ()), *request.answer)
        ]
        context = context_of(
            popularity(), TOP_K, EXPERT_BYTES, LAYERS * EXPERTS * EXPERT_BYTES, times.miss_costs(0.0), seed=part
        )
        kind: dict[str, object] = {"kind": "ktransformers", "strategy": strategy, "gpu_experts_ratio": ratio}
        if strategy == "dynamic":
            kind["update_tokens"] = len(traffic[0].prompt.expert_TLK)
        out.append(run(context, kind, steps, times))
    return out


def ms(ran: list[Ran]) -> float:
    """Of a token, on average over the parts."""
    return float(np.concatenate([one.step_ns for one in ran]).mean()) / 1e6


@cache
def fitted() -> Constants:
    """Three constants from three cells of the random column. What a step takes is linear in them, so a run with one of
    them alone gives its weight: how many layers of a token, on average, have any of its experts on the CPU, and how
    many experts are there."""
    rows, wanted = [], []
    for ratio in FITTED_AT:
        sync, cpu = (ms(simulate("random", ratio, Constants(**{name: 1e6}))) for name in ("sync", "cpu"))
        rows.append([LAYERS, sync, cpu])
        wanted.append(1e9 / published()["random"][RATIOS.index(ratio)])
    own, sync, cpu = np.linalg.solve(np.array(rows), np.array(wanted)).tolist()
    return Constants(own=own, sync=sync, cpu=cpu)


@cache
def table() -> dict[str, FloatArray]:
    """Tokens/s by strategy and ratio, simulated."""
    return {name: np.array([1e3 / ms(simulate(name, r, fitted())) for r in RATIOS]) for name in STRATEGIES}


def errors(name: str) -> FloatArray:
    """Of ms a token, relative to the measured ones, by ratio: terms of a step add up in ms."""
    out: FloatArray = published()[name] / table()[name] - 1
    return out


def noise() -> float:
    """How far the table's own columns are apart where all placements are one, at 1: relative."""
    at_one = [published()[name][-1] for name in ORDERED]
    return max(at_one) / min(at_one) - 1


def right_orders(tie: float = 0.0, dynamic: FloatArray | None = None) -> list[tuple[float, list[str]]]:
    """By ratio from 0.1 to 1: pairs of ORDERED that stand the other way round than in the table, or are equal. tie:
    pairs that the table puts no further apart than that (relative) are not asked. dynamic: its column, instead of
    `table()`'s."""
    theirs, ours = published(), dict(table())
    if dynamic is not None:
        ours["dynamic"] = dynamic
    out = []
    for i, ratio in enumerate(RATIOS[1:], start=1):
        asked = [
            (a, b)
            for a, b in itertools.combinations(ORDERED, 2)
            if abs(theirs[a][i] / theirs[b][i] - 1) > tie or not tie
        ]
        wrong = [f"{a} and {b}" for a, b in asked if (theirs[a][i] - theirs[b][i]) * (ours[a][i] - ours[b][i]) <= 0]
        out.append((ratio, wrong))
    return out


def other_prompts(prompts: tuple[int, ...]) -> dict[int, FloatArray]:
    """The dynamic column with prompts that count like so many tokens."""
    return {
        prompt: np.array([1e3 / ms(simulate("dynamic", r, fitted(), requests(TILT, prompt))) for r in RATIOS])
        for prompt in prompts
    }


def fit_dynamic(cells: tuple[float, ...] = DYNAMIC_AT) -> tuple[float, int]:
    """TILT and PROMPT: of a grid, those with the least sum of squared errors at these cells of dynamic."""
    best = (np.inf, 0.0, 0)
    for tilt, prompt in itertools.product((1.8, 1.9, 2.0), range(8, 13)):
        traffic = requests(tilt, prompt)
        found = 0.0
        for ratio in cells:
            measured = published()["dynamic"][RATIOS.index(ratio)]
            found += (measured * ms(simulate("dynamic", ratio, fitted(), traffic)) / 1e3 - 1) ** 2
        best = min(best, (found, tilt, prompt))
    return best[1], best[2]
