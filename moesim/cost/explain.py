"""Where the time of a run went: every nanosecond of every step, by operation, with how firm each price was.

Vectorised over runs from their price keys: dense parts by table look-up on the critical rank's tokens, the experts'
share from the bank entries (or token counts) that were used, the prompt attention as booked, and decode attention as
what remains, so the parts add up to the simulated time exactly. Where ranks wait for each other the critical rank is
that of the run's first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.bank import BankDetail, CountExperts
from moesim.cost.dense import Part
from moesim.cost.experts import STATS, MoESums
from moesim.cost.pricer import Run
from moesim.cost.split import SplitDetail
from moesim.cost.step import StepPricer
from moesim.hardware import ASSUMED

__all__ = ["Explanation", "explain", "stats_by_draw"]

_ENTRIES_AT_ONCE = 1 << 22
_BATCHES = 20
_Found = tuple[IntArray, FloatArray, IntArray, IntArray, float]
"""ns by run of dispatch, experts and combine [R, 3], stats, grades by run of experts and exchange, bank error"""


@dataclass(slots=True)
class Explanation:
    """Sums over all steps of one group. `ns`, `operator`: by part; `part_grade_ns`: by part, ns by grade [4]; `stats`
    [STATS] (see `MoESums`), summed over steps; `max_over_mean`: summed over steps; `bank_sigma`: relative standard
    error."""

    ns: dict[str, int]
    operator: dict[str, str]
    part_grade_ns: dict[str, FloatArray]
    stats: FloatArray
    steps: int
    bank_sigma: float

    @property
    def grade_ns(self) -> FloatArray:
        """ns by grade [4], all parts together."""
        return np.asarray(sum(self.part_grade_ns.values(), np.zeros(4)))

    def add(self, other: Explanation) -> None:
        """Add another group's."""
        for name, value in other.ns.items():
            self.ns[name] = self.ns.get(name, 0) + value
        self.operator.update(other.operator)
        for name, grade_ns in other.part_grade_ns.items():
            self.part_grade_ns[name] = self.part_grade_ns.get(name, np.zeros(4)) + grade_ns
        self.stats += other.stats
        self.steps += other.steps
        self.bank_sigma = max(self.bank_sigma, other.bank_sigma)


def explain(runs: list[Run], pricer: StepPricer) -> Explanation:
    """Explain the runs of the groups that `pricer` priced."""
    dense = pricer.dense
    steps_R = np.array([len(r.cumulative_ns) for r in runs], np.int64)
    total_R = np.array([r.cumulative_ns[-1] for r in runs], np.int64)
    key = np.array([r.key for r in runs], np.int64).reshape(len(runs), -1)
    _, tokens_R, sampled_R, decoding_R, context_R, _, _, prefill_R = key.T[:8]
    chunk_R, halves_R = key[:, 9], key[:, 11]
    ns: dict[str, int] = {}
    operator: dict[str, str] = {}
    part_grade_ns: dict[str, FloatArray] = {}

    def firm(name: str, grade_R: AnyArray, spent_R: AnyArray) -> None:
        found = np.bincount(grade_R, weights=spent_R, minlength=4)
        part_grade_ns[name] = part_grade_ns.get(name, np.zeros(4)) + found

    rest_R = total_R - prefill_R
    moved_R = np.array([0 if r.rebalance_ns is None else r.rebalance_ns[-1] for r in runs], np.int64)
    if moved_R.any():
        ns["rebalance"], operator["rebalance"] = int(moved_R.sum()), "peer_to_peer"
        firm("rebalance", np.full(len(runs), ASSUMED), moved_R)
        rest_R = rest_R - moved_R
    parts = [(p, tokens_R, False) for p in dense.parts] + [(p, sampled_R, True) for p in dense.head_parts]
    for part, at_R, head in parts:
        spent_R = _part_ns(part, part.ns_N[at_R], halves_R, pricer, head) * steps_R
        ns[part.name] = ns.get(part.name, 0) + int(spent_R.sum())
        operator[part.name] = part.operator
        firm(part.name, part.grade_N[at_R], spent_R)
        rest_R = rest_R - spent_R
    stats, sigma = np.zeros(STATS), 0.0
    experts = _experts(runs, steps_R, pricer)
    gathers = {"dispatch": "all_gather", "combine": "reduce_scatter"}  # of groups whose experts are split over ranks
    if experts is not None:
        by_part_R, stats, expert_grade_R, exchange_grade_R, sigma = experts
        for name, column, grade_R in (
            ("dispatch", 0, exchange_grade_R), ("experts", 1, expert_grade_R), ("combine", 2, exchange_grade_R)
        ):  # fmt: skip
            spent_R = by_part_R[:, column]
            if spent_R.any():
                ns[name] = int(spent_R.sum())
                operator[name] = ("all_to_all" if dense.exchanges else gathers[name]) if column != 1 else "moe"
            firm(name, grade_R, spent_R)
            rest_R = rest_R - spent_R
    attention = pricer.full if pricer.full is not None else pricer.window
    if attention is not None:
        ns["attention_prefill"], ns["attention_decode"] = int(prefill_R.sum()), int(rest_R.sum())
        operator |= {"attention_prefill": "attention_prefill", "attention_decode": "attention_decode"}
        prompt_grade_R = attention.prompt_grade_Q[np.minimum(chunk_R, len(attention.prompt_grade_Q) - 1)]
        firm("attention_prefill", prompt_grade_R, prefill_R)
        column_R = np.minimum(context_R >> attention.shift, attention.decode_BC.shape[1] - 1)
        decode_grade_R = attention.decode_grade_BC[decoding_R, column_R]
        firm("attention_decode", decode_grade_R, np.maximum(rest_R, 0))
    return Explanation(ns, operator, part_grade_ns, stats, int(steps_R.sum()), sigma)


def _part_ns(part: Part, ns_R: IntArray, halves_R: IntArray, pricer: StepPricer, head: bool) -> IntArray:
    """What a step takes of a part, where a rank's tokens, or half of them, take `ns_R`."""
    if pricer.splitter is None or head:
        return ns_R
    return np.where(halves_R == 2, pricer.splitter.part_ns(ns_R, part.operator == "host"), ns_R)


def _experts(runs: list[Run], steps_R: IntArray, pricer: StepPricer) -> _Found | None:
    if not runs or runs[0].detail is None:
        return None
    cut = np.array([isinstance(r.detail, SplitDetail) for r in runs])
    found = []
    if cut.any():
        halves = [cast(SplitDetail, runs[i].detail) for i in np.flatnonzero(cut)]
        found.append(_from_halves(halves, steps_R[cut], isinstance(pricer.moe, CountExperts)))
    if not cut.all():
        whole = [r.detail for r, is_cut in zip(runs, cut, strict=True) if not is_cut]
        if isinstance(whole[0], MoESums):
            found.append(_from_tokens(cast(list[MoESums], whole), steps_R[~cut]))
        else:
            moe = pricer.moe
            assert isinstance(moe, CountExperts)
            found.append(_from_bank(cast(list[BankDetail], whole), steps_R[~cut], moe))
    if len(found) == 1:
        return found[0]
    order = np.argsort(np.concatenate([np.flatnonzero(cut), np.flatnonzero(~cut)]), kind="stable")
    by_part, stats, grade, exchange, sigma = zip(*found, strict=True)
    together = [np.concatenate(x)[order] for x in (by_part, grade, exchange)]
    # the same draws serve both, so their errors add
    return together[0], stats[0] + stats[1], together[1], together[2], max(sigma)


def _from_halves(details: list[SplitDetail], steps_R: IntArray, drawn: bool) -> _Found:
    """drawn: from a bank, whose few draws have an error."""
    details = [d.cut(n) for d, n in zip(details, steps_R.tolist(), strict=True)]
    by_part_R = np.array([[x.sum() for x in d[:3]] for d in details], np.int64)
    stats = np.sum([d.stats().sum(axis=1) for d in details], axis=0)
    grade_R = np.array([max(int(row.grade.max()) for row in d.rows) for d in details], np.int64)
    exchange_R = np.array([max(int(row.exchange_grade.max()) for row in d.rows) for d in details], np.int64)
    rows = {id(d.rows[0]): d.rows[0] for d in details}
    at = {key: i for i, key in enumerate(rows)}
    row_R = np.array([at[id(d.rows[0])] for d in details], np.int64)
    sigma = _bank_sigma(list(rows.values()), row_R, steps_R) if drawn else 0.0
    return by_part_R, stats, grade_R, exchange_R, sigma


def _from_tokens(details: list[MoESums], steps_R: IntArray) -> _Found:
    by_part = np.array(
        [
            [d.dispatch[:n].sum(), d.experts[:n].sum(), d.combine[:n].sum()]
            for d, n in zip(details, steps_R, strict=True)
        ]
    )
    stats = np.sum([d.stats[:, :n].sum(axis=1) for d, n in zip(details, steps_R, strict=True)], axis=0)
    grade = np.array([d.grade.max() for d in details], np.int64)
    exchange = np.array([d.exchange_grade.max() for d in details], np.int64)
    return by_part, stats, grade, exchange, 0.0


def _from_bank(details: list[BankDetail], steps_R: IntArray, moe: CountExperts) -> _Found:
    """How often each run used each entry, from prefix counts of the entry sequence; then one product a row."""
    rows: dict[int, int] = {}
    ordered: list[MoESums] = []
    row_R = np.empty(len(details), np.int64)
    for i, detail in enumerate(details):
        found = rows.get(id(detail.row))
        if found is None:
            found = rows[id(detail.row)] = len(ordered)
            ordered.append(detail.row)
        row_R[i] = found
    start_R = np.array([d.start for d in details], np.int64)
    sequence = moe.sequence
    entries = len(ordered[0].total)
    prefix = np.zeros((len(sequence) + 1, entries), np.int32)
    prefix[np.arange(1, len(sequence) + 1), sequence] = 1
    np.cumsum(prefix, axis=0, out=prefix)
    part_YXE = np.array([[row.dispatch, row.experts, row.combine] for row in ordered], np.int64)
    stats_YXE = np.array([row.stats for row in ordered])
    by_part_R = np.empty((len(details), 3), np.int64)
    stats = np.zeros(STATS)
    chunk = max(1, _ENTRIES_AT_ONCE // (STATS * entries))
    for lo in range(0, len(details), chunk):
        part = slice(lo, lo + chunk)
        used_RE = (prefix[start_R[part] + steps_R[part]] - prefix[start_R[part]]).astype(np.int64)
        by_part_R[part] = np.einsum("re,rxe->rx", used_RE, part_YXE[row_R[part]])
        stats += np.einsum("re,rxe->x", used_RE, stats_YXE[row_R[part]])
    grade = np.array([int(row.grade.max()) for row in ordered])[row_R]
    exchange = np.array([int(row.exchange_grade.max()) for row in ordered])[row_R]
    return by_part_R, stats, grade, exchange, _bank_sigma(ordered, row_R, steps_R)


def _bank_sigma(rows: list[MoESums], row_R: IntArray, steps_R: IntArray) -> float:
    """Relative standard error of the experts' share from having drawn so few batches of each size."""
    if len(rows[0].total) < 2:
        return 0.0
    weight = np.bincount(row_R, weights=steps_R, minlength=len(rows))
    mean = np.array([row.total.mean() for row in rows])
    error = np.array([row.total.std(ddof=1) / np.sqrt(len(row.total)) for row in rows])
    spent = float((weight * mean).sum())
    # entries of different sizes share draws, so their errors add instead of averaging out
    return float((weight * error).sum()) / spent if spent else 0.0


def stats_by_draw(runs: list[Run], pricer: StepPricer) -> tuple[FloatArray, IntArray] | None:
    """`MoESums.stats` summed over the steps of each draw [STATS, X], and those steps [X]; None where no experts ran.

    A draw is what the sampling error of such sums rests on: an entry of the bank at count fidelity, because its few
    entries serve all steps, and else one of 20 batches of consecutive steps.
    """
    if not runs or runs[0].detail is None:
        return None
    steps_R = np.array([len(r.cumulative_ns) for r in runs], np.int64)
    if not isinstance(pricer.moe, CountExperts):
        told = [cast(MoESums | SplitDetail, r.detail) for r in runs]
        stats_XS = np.concatenate([_stats(d)[:, :n] for d, n in zip(told, steps_R, strict=True)], axis=1)
        steps = stats_XS.shape[1]
        draws = min(_BATCHES, steps)
        draw_S = np.arange(steps) * draws // steps
        by_draw = np.array([np.bincount(draw_S, weights=row_S, minlength=draws) for row_S in stats_XS])
        return by_draw.astype(np.float64), np.bincount(draw_S, minlength=draws).astype(np.int64)
    cut = np.array([isinstance(r.detail, SplitDetail) for r in runs])
    first = runs[0].detail
    entries = len((first.rows[0] if isinstance(first, SplitDetail) else cast(BankDetail, first).row).total)
    out, used_X = np.zeros((STATS, entries)), np.zeros(entries, np.int64)
    for i in np.flatnonzero(cut):
        detail = cast(SplitDetail, runs[i].detail).cut(int(steps_R[i]))
        entry_S = detail.entry_2S[0]
        out += [np.bincount(entry_S, weights=row_S, minlength=entries) for row_S in detail.stats()]
        used_X += np.bincount(entry_S, minlength=entries)
    if not cut.all():
        whole = [cast(BankDetail, runs[i].detail) for i in np.flatnonzero(~cut)]
        more, steps_X = _bank_by_draw(whole, steps_R[~cut], pricer.moe)
        out, used_X = out + more, used_X + steps_X
    return out, used_X


def _stats(detail: MoESums | SplitDetail) -> FloatArray:
    return detail.stats() if isinstance(detail, SplitDetail) else detail.stats


def _bank_by_draw(used: list[BankDetail], steps_R: IntArray, moe: CountExperts) -> tuple[FloatArray, IntArray]:
    draws = len(used[0].row.total)
    rows: dict[int, int] = {}  # runs share rows
    row_R = np.array([rows.setdefault(id(d.row), len(rows)) for d in used])
    stats_YXE = np.array([row.stats for row in {id(d.row): d.row for d in used}.values()])
    draw_S = np.concatenate([moe.sequence[d.start : d.start + n] for d, n in zip(used, steps_R, strict=True)])
    cell_S = np.repeat(row_R, steps_R) * draws + draw_S
    used_YE = np.bincount(cell_S, minlength=len(rows) * draws).reshape(len(rows), draws)
    by_draw = np.einsum("ye,yxe->xe", used_YE, stats_YXE)
    return np.asarray(by_draw, np.float64), np.bincount(draw_S, minlength=draws).astype(np.int64)
