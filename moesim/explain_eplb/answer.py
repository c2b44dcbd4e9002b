"""Is EPLB worth it for this traffic on this deployment: candidates, the choice between them, and the reason.

Every placement is fitted on rows before those it is judged on. The best candidate is chosen on the first half of the
scored rows and its gain measured on the second, so that neither the fit nor the choice has seen what is claimed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cost.rebalancing import HOST_NS_PER_LAYER
from moesim.errors import BadInput, Problem
from moesim.explain_eplb.judge import (
    Gain,
    Persistence,
    Skip,
    compare_gain,
    persistence,
    profile_sigma,
    skip_below,
)
from moesim.explain_eplb.prices import StepPrices
from moesim.explain_eplb.replay import BASE, Candidate, Played, Replay
from moesim.explain_eplb.traffic import batch_rows
from moesim.placement import slot_count
from moesim.scenario.load import Scenario
from moesim.workload.loads import ExpertLoads
from moesim.workload.requests import build_requests

__all__ = ["Answer", "Ask", "Judged", "Stages", "explain_eplb"]

_LEAST_SPLIT = 24
"""scored rows from which on some are kept for the choice"""
_FRESH_ROWS = 24


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked for. redundant: counts to try (empty: legal ones up to four a rank); intervals: in steps (empty:
    what the recording can judge); policy: kind of the placement; host_ms: planning of one rebalance, None: 17 ms a
    layer; worth: the least gain that is worth enabling EPLB for."""

    redundant: tuple[int, ...] = ()
    intervals: tuple[int, ...] = ()
    policy: str = "eplb"
    host_ms: float | None = None
    worth: float = 0.01


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate, and its gain on the rows kept for judging: `gain` with what chance of rows does, `whole` with the
    profile's error added. tied: with the best candidate."""

    played: Played
    gain: Gain
    whole: Gain
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Stages:
    """Gain in throughput, one obstacle after another: loads shared evenly in every step; placed from half of the same
    tokens; placed from past rows; with the stall of moving; with the batch that fits beside the replicas."""

    even: float
    fresh: float
    past: float
    moved: float
    fits: float


@dataclass(frozen=True, eq=False)
class Answer:
    """The verdict and all it rests on. chosen None: nothing beats what is there."""

    scenario: Scenario
    loads: ExpertLoads
    replay: Replay
    ask: Ask
    base: Played
    judged: tuple[Judged, ...]
    chosen: Judged
    enable: bool
    split: bool
    stages: Stages
    """of the chosen candidate where EPLB is enabled; else the best of all candidates at each stage"""
    bound: str
    persistence: Persistence
    moving: Judged | None
    """the best candidate that rebalances; None where none was tried"""
    skip: Skip | None
    warnings: tuple[str, ...]


def explain_eplb(loads: ExpertLoads, scenario: Scenario, ask: Ask) -> Answer:
    """Judge EPLB for the traffic in `loads` on the deployment of `scenario`.

    Raises BadInput where the recording does not fit the model or is too short, Infeasible never: candidates that do not
    fit are left out, and without redundant experts the deployment must fit.
    """
    model = scenario.model
    _agrees(loads, scenario)
    mean_tokens = _mean_tokens(scenario)
    whole = StepPrices(scenario, 1.0)
    fitting = whole.batch(-(-model.num_experts // whole.layout.ep), mean_tokens)
    if fitting is None:
        raise BadInput(
            Problem("explain eplb", "not one request fits beside the experts; `moesim check` says what would")
        )
    rows = batch_rows(loads, fitting.tokens, model.top_k, scenario.seed)
    prices = StepPrices(scenario, model.num_moe_passes / len(rows.layers))
    host = HOST_NS_PER_LAYER * model.num_moe_passes if ask.host_ms is None else ask.host_ms * 1e6
    start = rows.number // 4 if rows.timed else rows.number // 2
    dispatch = scenario.policies.dispatch
    replay = Replay(rows, prices, ask.policy, dispatch, start, mean_tokens, host, scenario.seed)
    return _answer(loads, scenario, ask, replay)


def _answer(loads: ExpertLoads, scenario: Scenario, ask: Ask, replay: Replay) -> Answer:
    base = replay.play(BASE)
    assert base is not None
    scored = replay.scored
    split = scored >= _LEAST_SPLIT
    choose, keep = (slice(0, scored // 2), slice(scored // 2, None)) if split else (slice(None), slice(None))
    played = _candidates(replay, ask, base, choose)
    seed = scenario.seed
    level = 0.9 if split else 1 - 0.1 / max(len(played), 1)  # Bonferroni where the choice saw the same rows
    best = _choice(base, played, choose, seed, ask.worth)
    judged = []
    for one in played:
        sigma = profile_sigma(base, one, replay)
        gain = compare_gain(base, one, keep, seed, level)
        to_best = compare_gain(best, one, keep, seed)
        tied = one is best or to_best.low <= 0 <= to_best.high
        judged.append(Judged(one, gain, compare_gain(base, one, keep, seed, level, sigma), tied))
    chosen = next(j for j in judged if j.played is best)
    enable = chosen.whole.low > 0 and chosen.gain.value >= ask.worth
    stages = _stages(replay, base, [best] if enable else played, keep)
    timed_ones = [p for p in played if p.candidate.interval_rows]
    shortest = min((p.candidate.interval_rows for p in timed_ones), default=1)
    kept = persistence(replay.rows, shortest)
    moving = (
        best
        if best.candidate.interval_rows
        else _choice(base, timed_ones, choose, seed, ask.worth)
        if timed_ones
        else None
    )
    return Answer(
        scenario=scenario,
        loads=loads,
        replay=replay,
        ask=ask,
        base=base,
        judged=tuple(judged),
        chosen=chosen,
        enable=enable,
        split=split,
        stages=stages,
        bound=_bound(stages, ask.worth, chosen, kept, enable),
        persistence=kept,
        moving=next((j for j in judged if j.played is moving), None),
        skip=None if moving is None else skip_below(moving, replay),
        warnings=_warnings(loads, replay, split),
    )


# ---- candidates


def _interval_rows(replay: Replay, asked: Sequence[int]) -> list[int]:
    steps, longest = replay.rows.row_steps, max(1, replay.scored // 12)
    if not asked:
        return sorted({round(float(x)) for x in np.geomspace(1, longest, 4)})
    out = []
    for interval in asked:
        rows = round(interval / steps)
        if rows < 1 or replay.scored < 2 * rows:
            raise BadInput(
                f"an interval of {interval} steps cannot be judged on rows of {steps:g} steps, {replay.scored} of which"
                f" are scored. Use {int(steps)} to {int(steps) * (replay.scored // 2)}, or another recording",
                "--interval",
            )
        out.append(rows)
    return sorted(set(out))


def _candidates(replay: Replay, ask: Ask, base: Played, choose: slice) -> list[Played]:
    """All that is tried: counts, intervals, waiting or not, and for the best of them longer windows."""
    counts = _counts(replay, ask.redundant)
    tried = [Candidate("static", count) for count in counts]
    if replay.rows.timed:
        intervals = _interval_rows(replay, ask.intervals)
        for count in counts:
            for rows in intervals:
                tried += [Candidate("sync", count, rows, rows), Candidate("async", count, rows, rows)]
    played = [p for c in tried if (p := replay.play(c)) is not None]
    if not played:
        raise BadInput(
            "beside none of the redundant experts asked for fits a single request; ask for fewer", "--redundant"
        )
    moving = [p for p in played if p.candidate.interval_rows]
    if moving:
        best = _choice(base, moving, choose, replay.seed, ask.worth).candidate
        longer = {min(best.interval_rows * k, replay.start) for k in (4, 16)} - {best.window_rows}
        more = [dataclasses.replace(best, window_rows=w) for w in sorted(longer)]
        played += [p for c in more if (p := replay.play(c)) is not None]
    return played


def _counts(replay: Replay, asked: Sequence[int]) -> tuple[int, ...]:
    """Redundant experts to try: those asked for, each legal, or the lowest legal count and one, two and four a rank
    more."""
    experts, ranks = replay.prices.model.num_experts, replay.prices.layout.ep
    for count in asked:
        slot_count(experts, count, ranks, "--redundant")
    low = -experts % ranks
    return tuple(sorted(set(asked))) or tuple(low + ranks * k for k in (0, 1, 2, 4) if low + ranks * k <= experts)


def _choice(base: Played, played: list[Played], rows: slice, seed: int, worth: float) -> Played:
    """The best on `rows`; of those that tie with it, and are not behind by what is worth having, the one that costs
    least: fewest redundant experts, then fewest rebalances."""
    best = max(played, key=lambda p: compare_gain(base, p, rows, seed).value)
    to_best = [(p, compare_gain(best, p, rows, seed)) for p in played]
    ties = [p for p, gain in to_best if p is best or (gain.high >= 0 and gain.value > -worth)]
    return min(ties, key=lambda p: _price(p.candidate))


def _price(c: Candidate) -> tuple[int, float, bool, int]:
    return c.redundant, 1.0 / c.interval_rows if c.interval_rows else 0.0, c.mode == "async", -c.window_rows


# ---- why


def _stages(replay: Replay, base: Played, played: list[Played], keep: slice) -> Stages:
    """The best of `played` at each stage."""
    before = float(base.full_ns_R[keep].mean())
    steps = replay.rows.row_steps

    def stall(p: Played) -> float:
        return p.stall_ns / (max(p.candidate.interval_rows, 1) * steps)

    number = len(range(*keep.indices(replay.scored)))
    spaced = slice(keep.start or 0, None, max(1, number // _FRESH_ROWS))
    return Stages(
        even=before / replay.even_ns(keep) - 1,
        fresh=max(replay.fresh_gain(count, spaced) for count in {p.candidate.redundant for p in played}),
        past=max(before / float(p.full_ns_R[keep].mean()) - 1 for p in played),
        moved=max(before / (float(p.full_ns_R[keep].mean()) + stall(p)) - 1 for p in played),
        fits=max(compare_gain(base, p, keep, replay.seed).value for p in played),
    )


def _bound(stages: Stages, worth: float, chosen: Judged, kept: Persistence, enable: bool) -> str:
    """What bounds the gain: of a no the first obstacle that leaves too little, of a yes the one that takes most."""
    names = ("balance", "drift", "rebalance time", "KV memory")
    left = (stages.even, stages.fresh, stages.past, stages.moved, stages.fits)
    if enable:
        taken = [a - b for a, b in itertools.pairwise(left)]
        return "rest of the step" if max(taken) < 0.1 * stages.fits else names[int(np.argmax(taken))]
    if stages.even < worth:
        return "balance" if chosen.played.times.balance.mean() < 1.1 and kept.skew < 0.1 else "rest of the step"
    for name, gain in zip(names, left[1:], strict=True):
        if gain < worth:
            return name
    return "chance"


def _warnings(loads: ExpertLoads, replay: Replay, split: bool) -> tuple[str, ...]:
    out = [*loads.warnings, *replay.rows.notes]
    batch = replay.base_batch
    if loads.steps_per_row and loads.top_k:
        recorded = loads.tokens_per_step or 0.0
        if abs(recorded / batch.tokens - 1) > 0.25:
            out.append(
                f"recorded steps have {recorded:,.0f} tokens, steps here {batch.tokens:,}: batches are drawn from the"
                " recorded ones, and intervals count recorded steps"
            )
    if replay.prices.layout.communication.overlap != "none":
        out.append("communication.overlap is left out: exchange and experts are added up")
    if not replay.rows.timed:
        out.append("the recording has no time order or fewer than 8 rows: intervals cannot be judged, nor drift")
    if not split:
        out.append("too few rows to choose on some and judge on others: intervals are wider for that (Bonferroni)")
    return tuple(dict.fromkeys(out))


# ---- what goes in


def _agrees(loads: ExpertLoads, scenario: Scenario) -> None:
    model, problems = scenario.model, []
    if model.is_moe and loads.num_experts != model.num_experts:
        problems.append(f"{loads.num_experts} experts, {model.name} {model.num_experts}")
    if model.is_moe and loads.num_layers > model.num_moe_passes:
        problems.append(f"{loads.num_layers} MoE layers, {model.name} {model.num_moe_passes}")
    if loads.top_k and model.is_moe and loads.top_k != model.top_k:
        problems.append(f"{loads.top_k} experts a token, {model.name} {model.top_k}")
    if problems:
        raise BadInput(f"the recording has {'; '.join(problems)}. Name the model it is of with --model", loads.source)


def _mean_tokens(scenario: Scenario) -> tuple[float, float]:
    if scenario.requests is None:
        raise BadInput("EPLB is judged for serving, and this is a training scenario; give a serving one", "--cluster")
    stream = build_requests(scenario.requests, scenario.base, scenario.seed)
    return float(stream.prompt_tokens.mean()), float(stream.output_tokens.mean())
