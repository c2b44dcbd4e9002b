"""What counting a trace's ids costs beside one np.bincount of them, and replay and generation speed.

python benchmarks/routing/count_ids.py ../shared/data/routing/esft_dsv2lite_intent.npz
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moesim.traces.routing_npz import read
from moesim.workload.pool import RoutingSource, count_ids, count_steps
from moesim.workload.replay import Replay
from moesim.workload.synthetic import Groups, SyntheticSpec, generate, popularity_weights


def best_ms(call: Callable[[], object], times: int = 9) -> float:
    """Least wall time of `times` calls: noise only ever adds."""
    least = np.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return float(least * 1e3)


def counting(name: str, source: RoutingSource) -> None:
    """Ways to count a whole pool by layer and expert."""
    ids, experts = source.expert_TLK, source.num_experts
    tokens, layers, top_k = ids.shape
    offset = np.repeat(np.arange(layers) * experts, top_k)
    flat = ids.reshape(tokens, -1)
    offsets = np.arange(0, tokens, 64)
    offsets = np.append(offsets, tokens)
    rows = np.arange(tokens)
    ways = {
        "np.bincount of the ids (no layers)": lambda: np.bincount(ids.ravel(), minlength=experts),
        "count_ids": lambda: count_ids(ids, experts),
        "one bincount per layer": lambda: [np.bincount(ids[:, i].ravel(), minlength=experts) for i in range(layers)],
        "one bincount, int64 keys": lambda: np.bincount((flat + offset).ravel(), minlength=layers * experts),
        "count_steps, steps of 64 rows": lambda: count_steps(source, rows, offsets),
    }
    base = 0.0
    for way, call in ways.items():
        ms = best_ms(call)
        base = base or ms
        print(f"{name:12} {way:38} {ms:8.3f} ms {ms / base:5.2f}x")


def replaying(source: RoutingSource) -> None:
    """Rows a second, before and past the end of the sequences."""
    rng = np.random.default_rng(0)
    number = 1 << 20
    request = rng.integers(0, 2000, number)
    replay = Replay(source, np.full(2000, 500), np.full(2000, 100), 1)
    shortest = int(source.sequence_tokens_Q.min())
    for name, low, high in (("replayed", 0, shortest), ("resampled", 10_000, 20_000)):
        position = rng.integers(low, high, number)
        ms = best_ms(lambda at=position: replay.rows(request, at))
        print(f"rows, {name:12} {number / ms / 1e3:8.1f} M rows/s")


def generating() -> None:
    """A DeepSeek-V3 pool: 4,096 tokens, 58 layers, 256 experts, top-8."""
    plain = SyntheticSpec(popularity_zipf=0.8, pool_tokens=4096)
    rich = plain.model_copy(
        update={"repeat": 0.2, "affinity": 0.9, "coactivation": 0.6, "domains": 8, "topic_spread": 0.05}
    )
    weight_LE = popularity_weights(plain, 58, 256, 1)
    for name, spec in (("popularity only", plain), ("all knobs", rich)):
        for groups in (Groups(), Groups(8, 4)):
            ms = best_ms(lambda s=spec, g=groups: generate(s, weight_LE, 8, 1, g), 2)
            print(f"pool of 4,096 x 58 x 8 of 256, {name}, {groups.kept} of {groups.number} groups: {ms / 1e3:.2f} s")


if __name__ == "__main__":
    trace = read(Path(sys.argv[1]))
    counting("trace", trace)
    counting("DeepSeek-V3", generate(SyntheticSpec(pool_tokens=4096), np.ones((58, 256)), 8, 1))
    replaying(trace)
    generating()
