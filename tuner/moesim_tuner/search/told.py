"""What a study's trials say to a sampler."""

from __future__ import annotations

from collections.abc import Sequence

from moesim_tuner.records import Trial

__all__ = ["final_values"]


def final_values(trials: Sequence[Trial], objectives: Sequence[str]) -> dict[int, tuple[float, ...]]:
    """Values of the last rung by number of the trial: those measured; of a pruned trial those of its rung, times what
    the trials that climbed on gained from there (the median ratio). None of a trial that was not measured."""
    out = {t.number: t.values for t in trials if t.state == "complete" and len(t.values) == len(objectives)}
    gains: dict[int, tuple[float, ...]] = {}
    for t in trials:
        if t.state == "pruned" and len(t.values) == len(objectives):
            rung = len(t.rungs) - 1
            if rung not in gains:
                gains[rung] = tuple(_gain(trials, rung, name) for name in objectives)
            out[t.number] = tuple(v * g for v, g in zip(t.values, gains[rung], strict=True))
    return out


def _gain(trials: Sequence[Trial], rung: int, name: str) -> float:
    """Median over complete trials of the last rung's figure over that of `rung`; 1 where there is none."""
    ratios = sorted(
        t.rungs[-1][name] / t.rungs[rung][name]
        for t in trials
        if t.state == "complete" and len(t.rungs) > rung + 1 and t.rungs[rung].get(name) and name in t.rungs[-1]
    )
    return ratios[len(ratios) // 2] if ratios else 1.0
