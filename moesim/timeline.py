"""A timeline that Perfetto opens: one track a rank's compute stream, one each for NVLink and NICs, one a group.

Every run of steps is one slice on its group's track (up to a bound); the first steps are shown operation by operation
on every rank, with the time a rank waits at each collective left blank, so the rank and the layer that the others
wait for can be seen. Chrome trace-event JSON: `ph` X slices, `ts` and `dur` in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from moesim.arrays import IntArray
from moesim.cost.bank import CountExperts
from moesim.cost.experts import MoESums
from moesim.cost.offloaded import COUNTERS, OffloadDetail, OffloadedPricer
from moesim.cost.pricer import Key, Run
from moesim.cost.step import StepPricer
from moesim.cost.tokens import TokenExperts
from moesim.program import Stage
from moesim.routing.capacity import Phase
from moesim.simulate import RunResult
from moesim.tiers.records import PARTS

__all__ = ["timeline_events", "write_timeline"]

_RUNS = 50_000
_DETAILED_EVENTS = 200_000


class _Layers(NamedTuple):
    """MoE layers of one step: ns of dispatch [L], experts [L, P], combine [L]."""

    dispatch_L: IntArray
    expert_LP: IntArray
    combine_L: IntArray


def write_timeline(result: RunResult, path: Path) -> None:
    """Write `result` as trace-event JSON to `path`, whole or not at all. Raises OSError where it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            for number, event in enumerate(timeline_events(result)):
                file.write((",\n" if number else "") + json.dumps(event, separators=(",", ":")))
            file.write("\n]}\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def timeline_events(result: RunResult) -> Iterator[dict[str, Any]]:
    """Events in order of writing: names of tracks, runs of steps, then operations of the first steps of group 0."""
    assert result.outcome is not None
    assert result.layout is not None
    steps, runs = result.outcome.steps, result.outcome.runs
    for group in range(int(steps.run_group.max(initial=0)) + 1):
        yield from _name(group, f"group {group}", 0, "steps")
    for i in range(min(_RUNS, len(runs))):
        key = runs[i].key
        yield _slice(
            int(steps.run_group[i]), 0, f"{steps.run_steps[i]} steps" if steps.run_steps[i] > 1 else "step",
            int(steps.run_start_ns[i]), int(runs[i].cumulative_ns[-1]),
            {"decode_tokens": int(steps.run_decoding[i]), "prefill_tokens": key.total_prefill,
             "waiting": int(steps.run_waiting[i])},
        )  # fmt: skip
    yield from _detail(result)


def _name(pid: int, process: str, tid: int, thread: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "process_name", "args": {"name": process}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}}


def _slice(pid: int, tid: int, name: str, start_ns: int, ns: int, args: dict[str, Any] | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start_ns / 1e3, "dur": ns / 1e3}
    if args:
        event["args"] = args
    return event


def _detail(result: RunResult) -> Iterator[dict[str, Any]]:
    """Operations of the first steps of group 0, rank by rank."""
    assert result.outcome is not None
    assert result.layout is not None
    steps, layout, pricer = result.outcome.steps, result.layout, result.pricers[0]
    if isinstance(pricer, OffloadedPricer):
        yield from _offloaded(result)
        return
    ranks = layout.ranks if layout.meets else layout.tp
    pid = 1_000_000
    for rank in range(ranks):
        yield from _name(pid, "operations of the first steps (group 0)", 1 + rank, f"rank {rank} compute")
    if layout.exchanges:
        yield from _name(pid, "operations of the first steps (group 0)", ranks + 1, "NVLink / NIC (exchange)")
    per_step = ranks * (len(pricer.dense.program) * 6 + 4)
    budget = max(1, _DETAILED_EVENTS // per_step)
    for i in np.flatnonzero(steps.run_group == 0)[:budget]:
        yield from _one_step(pid, result, pricer, result.outcome.runs[i], int(steps.run_start_ns[i]), ranks)


def _offloaded(result: RunResult) -> Iterator[dict[str, Any]]:
    """The first steps of group 0 by what they were spent on, all layers together: who waits for what, step by step."""
    assert result.outcome is not None
    steps, pid = result.outcome.steps, 1_000_000
    yield from _name(pid, "parts of the first steps (group 0), all layers together", 1, "device")
    for i in np.flatnonzero(steps.run_group == 0)[: _DETAILED_EVENTS // len(PARTS)]:
        detail = cast(OffloadDetail, result.outcome.runs[i].detail)
        at = int(steps.run_start_ns[i])
        found = {name: int(n) for name, n in zip(COUNTERS, detail.counters, strict=True) if n}
        for name, ns in zip(PARTS, detail.part_ns.tolist(), strict=True):
            if ns:
                yield _slice(pid, 1, name, at, ns, found if name == "experts" else None)
            at += ns


def _one_step(
    pid: int, result: RunResult, pricer: StepPricer, run: Run, start_ns: int, ranks: int
) -> Iterator[dict[str, Any]]:
    """The first step of a run. The critical rank's batch is shown on all ranks before the experts."""
    key, at = run.key, start_ns
    if key.halves == 2:
        return  # two micro-batches have no one order of operations that ranks share
    layers = _layers(pricer, run)
    exchange = ranks + 1
    for index, stage in enumerate(pricer.dense.program):
        own = _stage_parts(pricer, key, stage)
        for rank in range(ranks):
            begin = at
            for name, ns in own:
                yield _slice(pid, 1 + rank, name, begin, ns)
                begin += ns
        at += sum(ns for _, ns in own)
        if layers is None or index >= len(layers.dispatch_L) or stage.last:
            continue
        dispatch, combine = int(layers.dispatch_L[index]), int(layers.combine_L[index])
        layer = {"layer": result.scenario.model.moe_passes[index]}
        if dispatch:
            yield _slice(pid, exchange, "dispatch", at, dispatch, layer)
        at += dispatch
        expert_P = layers.expert_LP[index]
        for rank in range(ranks):
            yield _slice(pid, 1 + rank, "experts", at, int(expert_P[rank * len(expert_P) // ranks]), layer)
        at += int(expert_P.max())
        if combine:
            yield _slice(pid, exchange, "combine", at, combine, layer)
        at += combine
    rest = start_ns + int(run.cumulative_ns[0]) - at
    if layers is not None and len(pricer.dense.program) == 1:
        yield _slice(pid, 1, "experts (all layers)", at, int(layers.expert_LP.max(axis=1).sum()))
        at += int(layers.expert_LP.max(axis=1).sum())
        rest = start_ns + int(run.cumulative_ns[0]) - at
    head = int(pricer.dense.head_N[key.sampled])
    for rank in range(ranks):
        yield _slice(pid, 1 + rank, "lm_head and sampling", at + max(rest - head, 0), head)


def _stage_parts(pricer: StepPricer, key: Key, stage: Stage) -> list[tuple[str, int]]:
    dense = pricer.dense
    name = "projections, norms, feed-forward"
    out = [(name, int(table.ns_N[key.tokens])) for table in dense.stages if table.stage == stage]
    attention = 0
    if stage.full and pricer.full is not None:
        attention += stage.full * int(pricer.full.decode_BC[key.decoding, key.context >> pricer.full.shift])
    if stage.window and pricer.window is not None:
        row = pricer.window.decode_BC[key.decoding]
        attention += stage.window * int(row[key.context_window >> pricer.window.shift])
    if attention:
        out.append(("attention decode", attention))
    if key.prefill_attention_ns:
        blocks = sum(s.attention for s in dense.program)
        out.append(("attention prefill", key.prefill_attention_ns * stage.attention // blocks))
    return out


def _layers(pricer: StepPricer, run: Run) -> _Layers | None:
    """Per-layer, per-part times of the first step of a run, scaled so that they add up to what was simulated."""
    moe, key = pricer.moe, run.key
    if isinstance(moe, CountExperts):
        phase: Phase = "prefill" if key.total_prefill > key.total_decode else "decode"
        tokens = key.total_prefill + key.total_decode
        entry = int(moe.sequence[key.tick % (1 << 16)])
        priced = moe.layers(phase, tokens, key.busiest_tokens)
        parts = priced.dispatch[entry], priced.expert_LP[entry], priced.combine[entry]
        row = moe.row(phase, tokens, key.busiest_tokens)
        totals = int(row.dispatch[entry]), int(row.experts[entry]), int(row.combine[entry])
    elif isinstance(moe, TokenExperts):
        assert isinstance(run.detail, MoESums)
        kept = moe.kept.get(key.tick)
        if kept is None:
            return None
        parts = kept.dispatch[0], kept.expert_LP[0], kept.combine[0]
        totals = int(run.detail.dispatch[0]), int(run.detail.experts[0]), int(run.detail.combine[0])
    else:
        return None
    sums = int(parts[0].sum()), int(parts[1].max(axis=1).sum()), int(parts[2].sum())
    scale = [t / s if s else 0.0 for t, s in zip(totals, sums, strict=True)]
    dispatch, experts, combine = (np.floor(p * f).astype(np.int64) for p, f in zip(parts, scale, strict=True))
    return _Layers(dispatch, experts, combine)
