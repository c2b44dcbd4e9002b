"""Cache size, eviction, prefetch in a fixed memory: what is left of it by keys and values holds experts.

More sequences at once share what is read and leave the cache less room, so the largest cache is not the best. The
mini-runtime runs every candidate with real reads; parts are timed once on other routes (`runtime.predict`), and
policies learn from sequences that nobody replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contested import Candidate, Measuring, Sample, Space
from moesim_kernels.runtime.backings import make_home
from moesim_kernels.runtime.compare import Case
from moesim_kernels.runtime.compare import predict as predict_cases
from moesim_kernels.runtime.predict import Calibrated, calibrated
from moesim_kernels.runtime.replay import Replay, make_replay, sample, synthetic_routes
from moesim_kernels.runtime.run import Settings, run_real
from moesim_kernels.runtime.sizes import ModelSizes
from moesim_kernels.runtime.weights import WeightFile, open_weights, write_weights

from moesim.errors import MoesimError
from moesim.workload.synthetic import SyntheticSpec

__all__ = ["Cached", "budget_bytes", "cache_bytes", "predict", "roofline_ns"]

SIZES = ModelSizes(max_context=4096)
ROUTES = SyntheticSpec(popularity_zipf=0.5, repeat=0.25, pool_tokens=8192, sequence_tokens=128)
BATCHES = (1, 2, 3, 4)
POLICIES = (("lru", "none"), ("lfu", "none"), ("lru", "markov"), ("lru", "next_layer"), ("lfu", "next_layer"))
DEFAULT = (2, "lru", "none")  # of `moesim runtime compare`
SHARE = 0.5  # of all experts' bytes: the memory that cache and keys and values share
TOKENS = 48
LEARN = 16
CALIBRATED_AT = ((1, 0.4), (4, 0.2), (2, 0.3))
"""(batch, share) on other routes"""
SEEDS = (31, 13)  # of the judged routes, and of those that parts are timed on


def budget_bytes(sizes: ModelSizes) -> int:
    """What cache and keys and values share."""
    return int(SHARE * sizes.num_keys * sizes.slot_bytes)


def cache_bytes(sizes: ModelSizes, batch: int) -> int:
    """What `batch` sequences of full length leave for experts."""
    kv = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * sizes.max_context * sizes.item_bytes
    return budget_bytes(sizes) - batch * kv


def roofline_ns(found: Calibrated, sizes: ModelSizes, replay: Replay, batch: int, read_bytes_per_ns: float) -> float:
    """ns a token: weights of a step read once from memory, those of experts that a cache of this share of all of them
    lacks over the link as well. It knows no policy, and no overlap."""
    distinct = np.mean([[len(np.unique(s.expert_TLK[:, x])) for x in range(sizes.layers)] for s in replay.steps])
    experts = float(distinct) * sizes.layers * sizes.slot_bytes
    missing = experts * max(0.0, 1.0 - cache_bytes(sizes, batch) / (sizes.num_keys * sizes.slot_bytes))
    moved = (experts + sizes.dense_bytes) / read_bytes_per_ns + missing / (found.size_bytes / found.move)
    return moved / batch


def model(folder: Path) -> WeightFile:
    """The model's file, written where it is not there."""
    path = folder / "contested.moe"
    try:
        file = open_weights(path)
        if file.sizes == SIZES:
            return file
    except MoesimError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(path, SIZES, 0)
    return open_weights(path)


def predict(folder: Path, link: str, read_bytes_per_ns: float) -> tuple[Space, Cached]:
    """Time the parts on other routes, then all candidates by the simulator."""
    file, sizes = model(folder), SIZES
    judged, other = (synthetic_routes(ROUTES, sizes, seed) for seed in SEEDS)
    fit, home = sample(judged, sizes, range(LEARN)), make_home(link, file)
    found = _timed(file, other, link, home)
    candidates, runs = [], []
    for batch in BATCHES:
        replay = make_replay(judged, sizes, batch, TOKENS // batch, LEARN)
        before = make_replay(other, sizes, batch, TOKENS // batch)
        room = cache_bytes(sizes, batch)
        cases = [Case(f"{e}+{p}", Settings(room, e, p)) for e, p in POLICIES]
        bare = roofline_ns(found, sizes, replay, batch, read_bytes_per_ns)
        for (eviction, prefetch), one in zip(
            POLICIES, predict_cases(found, file, cases, replay, before, link, fit, home), strict=True
        ):
            what = {
                "sequences": batch,
                "cache": f"{room / (sizes.num_keys * sizes.slot_bytes):.0%}",
                "eviction": eviction,
                "prefetch": prefetch,
                "hits": f"{one.predicted_hit_rate:.0%}",
            }
            name = f"{batch} sequences, {eviction}, {'no prefetch' if prefetch == 'none' else prefetch}"
            default = (batch, eviction, prefetch) == DEFAULT
            candidates.append(Candidate(name, what, one.predicted_mean_ns / batch, bare, default))
            runs.append((one.case.settings, replay, batch))
    space = Space(
        key="offload",
        title="cache size x eviction x prefetch",
        figure="time a generated token",
        about=(
            f"Experts on {link}, {sizes.num_keys} of {sizes.slot_bytes:,} bytes; {budget_bytes(sizes):,} bytes of "
            "memory are shared by cached experts and by keys and values of sequences of up to "
            f"{sizes.max_context:,} tokens. The default is what `moesim runtime compare` does: two sequences, LRU, no "
            "prefetch. Hits are the simulated ones."
        ),
        candidates=tuple(candidates),
        facts={"link": link, "calibration": found.to_json()},
    )
    return space, Cached(file, runs, link, fit, home)


def _timed(file: WeightFile, other: Any, link: str, home: Any) -> Calibrated:
    """What the runtime's parts take, under LRU without prefetch. The first run is thrown away."""
    whole = SIZES.num_keys * SIZES.slot_bytes
    sets = [
        (Settings(int(whole * share)), make_replay(other, SIZES, batch, TOKENS // batch))
        for batch, share in CALIBRATED_AT
    ]
    run_real(file, *sets[0], link, check="never", home=home)
    return calibrated([run_real(file, *one, link, check="never", home=home) for one in sets], SIZES)


class Cached(Measuring):
    """Runs candidates on the mini-runtime, each from an empty cache."""

    def __init__(
        self, file: WeightFile, runs: Sequence[tuple[Settings, Replay, int]], link: str, fit: Any, home: Any
    ) -> None:
        self._file, self._runs, self._link, self._fit, self._home = file, runs, link, fit, home

    def open(self) -> Cached:
        """Nothing is held between runs."""
        return self

    def once(self, candidate: int) -> Sample:
        """See Measuring. What waits for reads has no CPU time, so there is the wall alone."""
        settings, replay, batch = self._runs[candidate]
        run = run_real(self._file, settings, replay, self._link, self._fit, check="never", home=self._home)
        return Sample(float(np.mean([s.step_ns for s in run.steps])) / batch)

    def close(self) -> None:
        """See Measuring."""
