"""Where the time of a run with tiers went: dense parts from the tables, what experts and waiting for them took from the
record of every step. The parts add up to the simulated time exactly."""

from __future__ import annotations

from typing import cast

import numpy as np

from moesim.arrays import AnyArray, FloatArray
from moesim.cost.experts import STATS
from moesim.cost.explain import Explanation
from moesim.cost.offloaded import OffloadDetail, OffloadedPricer
from moesim.cost.pricer import Run
from moesim.hardware import ASSUMED
from moesim.tiers.records import PARTS

__all__ = ["PLAYED", "explain_offloaded"]

PLAYED = {
    "experts": ("experts", "moe"),
    "cpu": ("experts_on_cpu", "moe"),
    "sync": ("cpu_sync", "host"),
    "stall": ("expert_stall", "copy"),
    "meet": ("rank_wait", "moe"),
}
"""Part of a step (`records.PARTS`) -> its name among the operations, and the operator whose error it has."""


def explain_offloaded(runs: list[Run], pricer: OffloadedPricer, fetch_grade: int, cpu_grade: int) -> Explanation:
    """fetch_grade, cpu_grade: how firm the times of transfers and of experts on the CPU are."""
    dense = pricer.dense
    details = [cast(OffloadDetail, run.detail) for run in runs]
    total = sum(int(run.cumulative_ns[-1]) for run in runs)
    part_ns = np.sum([d.part_ns for d in details], axis=0) if details else np.zeros(len(PARTS), np.int64)
    passes = np.array([now for d in details for now in d.passes], np.int64).reshape(-1, 8)
    tokens_X, sampled_X, decoding_X, context_X, _, full_X, window_X, host_X = passes.T
    ns: dict[str, int] = {}
    operator: dict[str, str] = {}
    part_grade_ns: dict[str, FloatArray] = {}

    def book(name: str, priced_by: str, spent: AnyArray | int, grade: AnyArray | int) -> None:
        ns[name] = ns.get(name, 0) + int(np.sum(spent))
        operator[name] = priced_by
        found = np.bincount(np.atleast_1d(grade), weights=np.atleast_1d(spent), minlength=4)
        part_grade_ns[name] = part_grade_ns.get(name, np.zeros(4)) + found

    for part in dense.parts:
        at_X = part.ns_N[tokens_X]
        book(part.name, part.operator, at_X * host_X if part.operator == "host" else at_X, part.grade_N[tokens_X])
    for part in dense.head_parts:
        book(part.name, part.operator, part.ns_N[sampled_X], part.grade_N[sampled_X])
    # what a rank does by itself is dense parts and attention
    own = int(part_ns[[PARTS.index(name) for name in ("own", "join", "end")]].sum())
    prefill_X = full_X * dense.full_layers + window_X * dense.window_layers
    decode = own - sum(ns.values()) - int(prefill_X.sum())
    attention = pricer.full if pricer.full is not None else pricer.window
    if attention is not None:
        chunk_R = np.array([run.key.total_prefill for run in runs], np.int64)
        spent_R = np.array([run.key.prefill_attention_ns for run in runs], np.int64)
        book(
            "attention_prefill", "attention_prefill", spent_R,
            attention.prompt_grade_Q[np.minimum(chunk_R, len(attention.prompt_grade_Q) - 1)],
        )  # fmt: skip
        column_X = np.minimum(context_X >> attention.shift, attention.decode_BC.shape[1] - 1)
        seen = np.bincount(attention.decode_grade_BC[decoding_X, column_X], minlength=4)
        book("attention_decode", "attention_decode", decode, int(np.argmax(seen)))
    grades = {"experts": max((d.grade for d in details), default=0), "cpu": cpu_grade, "stall": fetch_grade}
    for name, (shown, priced_by) in PLAYED.items():
        spent = int(part_ns[PARTS.index(name)])
        if spent:
            book(shown, priced_by, spent, grades.get(name, int(ASSUMED)))
    assert sum(ns.values()) == total, "the parts of a run add up to its time"
    stats: FloatArray = np.sum([d.stats[:, 0] for d in details], axis=0) if details else np.zeros(STATS)
    return Explanation(ns, operator, part_grade_ns, stats, len(runs), 0.0)
