"""The search: kinds, then prefetches and buffers of the best, then longer runs of those that count.

What short runs have left is judged by longer ones on other requests. The best of these few (`_MOST_FINAL` and one an
engine at most) is chosen by the figure that is claimed of it, so where several are equally good the claim is the best
of them, within their interval. Policies learn from the first part of the routing pool alone (`tiers.fit_share`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesim.compare import Comparison, Entry, compare
from moesim.errors import BadInput, Infeasible, Problem
from moesim.explain_offload.ask import Ask
from moesim.explain_offload.candidates import BUFFERS, RESIDENT, Candidate, kinds, of_kind, prefetches
from moesim.explain_offload.play import Played, Player
from moesim.policy import did_you_mean, policy_kinds
from moesim.scenario.load import Scenario

__all__ = ["FIGURES", "Answer", "WhatIf", "explain_offload"]

FIGURES = ("output_tok_per_s", "tpot_mean_ms", "ttft_mean_ms")
_MOST_FINAL = 5
_NEAR = 0.05
"""candidates so near to the best short run are run long, too"""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The chosen settings under other circumstances. rate: of short runs, as `Answer.chosen_short`; None: no room."""

    label: str
    rate: float | None
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """tried: short runs, the best first, then what cannot run. finals: long runs in the order of `comparison`; chosen:
    the best of them that an engine can run. resident: all experts on the device. ties: other finals that are the best,
    or cannot be told from it. what_if: short runs of the chosen one with more memory, faster links, fewer bits."""

    ask: Ask
    scenario: Scenario
    resident: Played
    tried: tuple[Played, ...]
    finals: tuple[Played, ...]
    comparison: Comparison
    chosen: Played
    chosen_short: float
    ties: tuple[str, ...]
    what_if: tuple[WhatIf, ...]
    runs: int

    @property
    def fits(self) -> bool:
        """All experts are on the device."""
        return self.chosen.candidate.kind == "none"


def explain_offload(ask: Ask, progress: Callable[[float], None] | None = None) -> Answer:
    """Raises BadInput where the deployment cannot be read, Infeasible where nothing runs."""
    unknown = [kind for kind in ask.kinds if kind not in policy_kinds("offload")]
    if unknown:
        told = did_you_mean(unknown[0], policy_kinds("offload"))
        raise BadInput(Problem("--kind", f"unknown kind of offload {unknown[0]!r}.{told}"))
    player = Player(ask, progress)
    resident = player.play(RESIDENT, ask.short, ask.seed)
    if resident.summary is not None and (not ask.kinds or "none" in ask.kinds):
        return _answer(ask, player, resident, [resident], [RESIDENT], resident)
    tried = _search(ask, player)
    running = [p for p in tried if p.summary is not None]
    if not running:
        reasons = {reason: p.candidate.label for p in reversed(tried) for reason in p.reasons[:1]}  # each reason once
        whys = [f"{label}: {reason}" for reason, label in reversed(reasons.items())]
        raise Infeasible(["No kind of offload runs this model on this device.", *whys])
    best = _buffers(ask, player, _runnable(ask, running)[0])
    return _answer(ask, player, resident, tried, _finalists(ask, running, best), best)


def _search(ask: Ask, player: Player) -> list[Played]:
    """Short runs of every kind asked for, and of the best cache with each prefetch; the best first."""
    known = kinds(ask.concurrency)
    wanted = [c for c in known if not ask.kinds or c.kind in ask.kinds]
    wanted += [of_kind(kind) for kind in ask.kinds if all(c.kind != kind for c in known)]
    tried = [player.play(c, ask.short, ask.seed) for c in wanted]
    caches = [p for p in tried if p.candidate.kind == "cached" and p.summary is not None]
    if caches:
        cache = max(caches, key=lambda p: p.rate(ask))
        tried += [player.play(c, ask.short, ask.seed) for c in prefetches(cache.candidate)]
    return sorted(tried, key=lambda p: -p.rate(ask))


def _runnable(ask: Ask, played: Sequence[Played]) -> list[Played]:
    """Those that an engine can run, or that were asked for; all where there is none."""
    found = [p for p in played if p.summary is not None and (p.candidate.engine or p.candidate.kind in ask.kinds)]
    return found or list(played)


def _buffers(ask: Ask, player: Player, best: Played) -> Played:
    """Spend device memory on buffers where that gains more than experts there would, one kind of buffer after the
    other."""
    for words, key, values in BUFFERS:
        options = [player.play(best.candidate.plus(f"{words} {v}", f"{key}={v}"), ask.short, ask.seed) for v in values]
        found = max(options, key=lambda p: p.rate(ask))
        if found.rate(ask) > best.rate(ask) * (1 + ask.worth):
            best = found
    return best


def _finalists(ask: Ask, running: Sequence[Played], best: Played) -> list[Candidate]:
    """The best, the best that each engine could run, and what is near the best, with the buffers of the best one."""
    buffers = tuple(c for c in best.candidate.changes if c.partition("=")[0] in {key for _, key, _ in BUFFERS})
    out: list[Candidate] = [best.candidate]
    seen = {best.candidate.engine}
    for p in running:
        near = p.rate(ask) >= (1 - _NEAR) * running[0].rate(ask)
        candidate = p.candidate.plus("", *buffers) if buffers else p.candidate
        same = {c.changes for c in out}
        if candidate.changes not in same and (p.candidate.engine not in seen or (near and len(out) < _MOST_FINAL)):
            out.append(candidate)
        seen.add(p.candidate.engine)
    return out


def _answer(
    ask: Ask, player: Player, resident: Played, tried: Sequence[Played], finalists: Sequence[Candidate], best: Played
) -> Answer:
    seed = ask.seed + 1
    finals = [player.play(c, ask.long, seed) for c in finalists]
    entries = [
        Entry(p.candidate.label, () if p.observation is None else (p.observation,), p.reasons, p.warnings)
        for p in finals
    ]
    comparison = compare(entries, FIGURES, (seed,))
    chosen = max(_runnable(ask, finals), key=lambda p: p.rate(ask))
    verdicts = comparison.rows[0].verdicts
    marked = [v is not None and v.mark is not None for v in verdicts]
    ties = tuple(p.candidate.label for p, mark in zip(finals, marked, strict=True) if mark and p is not chosen)
    scenario = player.base.scenario(chosen.candidate.changes, ask.long, seed)
    short = player.play(chosen.candidate, ask.short, ask.seed)
    what_if = () if chosen.candidate.kind == "none" else _what_if(ask, player, chosen.candidate, scenario)
    return Answer(
        ask, scenario, resident, tuple(tried), tuple(finals), comparison, chosen, short.rate(ask), ties, what_if,
        player.runs,
    )  # fmt: skip


def _what_if(ask: Ask, player: Player, chosen: Candidate, scenario: Scenario) -> tuple[WhatIf, ...]:
    """Circumstances one at a time: what one would buy, or give up."""
    assert scenario.tiers is not None
    usable = scenario.tiers.vram
    if usable is None:
        usable = scenario.cluster.profile.memory_bytes * scenario.engine.gpu_memory_utilization / 2**30
    most = scenario.cluster.profile.memory_bytes / 2**30
    sizes = [("0.75 times the device memory", usable * 0.75)]
    if usable * 1.05 < most:
        share = min(1.5, most / usable)
        sizes.append((f"{share:.3g} times the device memory", usable * share))
    asked = [(label, (f"tiers.vram={size:.9g} GiB",)) for label, size in sizes]
    node = scenario.cluster.node
    twice = node.pcie_bytes_per_s * 2 / 1e9
    asked.append((f"a link to the host of {twice:.0f} GB/s", (f"cluster.pcie_gb_per_s={twice:g}",)))
    model = scenario.model
    for dtype in ("fp8_block", "int4"):
        if model.with_dtypes(expert_dtype=dtype).expert_bytes() < model.expert_bytes():
            written = scenario.raw["model"]
            changed = {**({"name": written} if isinstance(written, str) else written), "expert_dtype": dtype}
            asked.append((f"experts in {dtype} (other results of the model)", (f"model={json.dumps(changed)}",)))
    out = []
    for label, changes in asked:
        played = player.play(chosen.plus(label, *changes), ask.short, ask.seed)
        out.append(WhatIf(label, None if played.summary is None else played.rate(ask), hit_rate(played)))
    return tuple(out)


def hit_rate(played: Played) -> float | None:
    """Of experts asked for, those on the device; None where nothing was looked up."""
    found = (played.summary or {}).get("cache")
    return None if not found else found["hit_rate"]
