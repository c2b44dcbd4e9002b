"""RequestsSpec: which key belongs to which format. build_requests: order, window, limit, scale, clip,
generators.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from moesim.errors import BadInput
from moesim.workload.generators import MAX_TOKENS, LengthsSpec, draw_lengths
from moesim.workload.requests import RequestsSpec, RequestStream, build_requests, request_formats

Z99 = 2.5758
LENGTHS = {"prompt_tokens": 100, "output_tokens": 10}


def build(base: Path = Path(), seed: int = 0, **keys: Any) -> RequestStream:
    return build_requests(RequestsSpec(**keys), base, seed)


def refused(**keys: Any) -> dict[str, str]:
    """Key -> message of every problem of a spec."""
    with pytest.raises(ValidationError) as caught:
        RequestsSpec(**keys)
    return {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


@pytest.fixture
def trace(tmp_path):
    """Six requests, two of them out of order, two at the same time."""
    rows = ["10.0,1,11", "11.5,2,12", "11.0,3,13", "13.0,4,14", "13.0,5,15", "20.0,6,16"]
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return tmp_path


# --- the spec


def test_formats():
    assert set(request_formats()) >= {
        "azure", "burstgpt", "closed_loop", "csv", "deterministic", "fixed", "gamma", "mooncake", "poisson",
        "servegen", "vllm_bench",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"format": "azur", "path": "x"}, "format", "did you mean 'azure'"),
        ({"format": "_table", "path": "x"}, "format", "unknown request format"),
        ({"format": "../azure", "path": "x"}, "format", "unknown request format"),
        ({"format": "routing_npz", "path": "x"}, "format", "unknown request format"),
        ({"format": "azure"}, "path", "path is missing"),
        ({"format": "azure", "path": "x", "rate_per_s": 3}, "rate_per_s", "azure does not use rate_per_s"),
        ({"format": "azure", "path": "x", "prompt_tokens": 3}, "prompt_tokens", "does not use"),
        ({"format": "azure", "path": "x", "window_s": [5, 5]}, "window_s", "start < end"),
        ({"format": "azure", "path": "x", "window_s": [-1, 5]}, "window_s.0", "greater than or equal to 0"),
        ({"format": "azure", "path": "x", "limit": 0}, "limit", "greater than or equal to 1"),
        ({"format": "azure", "path": "x", "limit": 2.0}, "limit", "valid integer"),
        ({"format": "azure", "path": "x", "rate_scale": 0}, "rate_scale", "greater than"),
        ({"format": "azure", "path": "x", "rate_scale": float("nan")}, "rate_scale", "finite"),
        ({"format": "azure", "path": "x", "concurrency": 4, "rate_scale": 2.0}, "rate_scale", "closed loop"),
        ({"format": "poisson", "num_requests": 5, **LENGTHS}, "rate_per_s", "needs rate_per_s"),
        ({"format": "poisson", "rate_per_s": 1, **LENGTHS}, "num_requests", "num_requests or duration_s"),
        (
            {"format": "poisson", "rate_per_s": 0, "num_requests": 5, **LENGTHS},
            "rate_per_s",
            "greater than 0",
        ),
        (
            {"format": "poisson", "rate_per_s": 1, "cv": 2, "num_requests": 5, **LENGTHS},
            "cv",
            "does not use cv",
        ),
        (
            {"format": "poisson", "rate_per_s": 1, "num_requests": 5, "path": "x", **LENGTHS},
            "path",
            "does not use",
        ),
        (
            {"format": "poisson", "rate_per_s": 1, "num_requests": 10**9, **LENGTHS},
            "num_requests",
            "less than",
        ),
        (
            {"format": "poisson", "rate_per_s": 1e-6, "num_requests": 10**6, **LENGTHS},
            "num_requests",
            "spans at most",
        ),
        (
            {"format": "poisson", "rate_per_s": 1e6, "duration_s": 3600, **LENGTHS},
            "duration_s",
            "at most 10,000,000",
        ),
        ({"format": "gamma", "rate_per_s": 1, "num_requests": 5, **LENGTHS}, "cv", "needs cv"),
        ({"format": "gamma", "rate_per_s": 1, "cv": 0, "num_requests": 5, **LENGTHS}, "cv", "greater than 0"),
        ({"format": "fixed", "num_requests": 5, **LENGTHS}, "rate_per_s", "rate_per_s or interval_ms"),
        (
            {"format": "fixed", "num_requests": 5, "rate_per_s": 1, "interval_ms": 1, **LENGTHS},
            "interval_ms",
            "not both",
        ),
        ({"format": "closed_loop", "num_requests": 5, **LENGTHS}, "concurrency", "needs concurrency"),
        (
            {"format": "closed_loop", "num_requests": 5, "concurrency": 2, "rate_scale": 2.0, **LENGTHS},
            "rate_scale",
            "use",
        ),
        (
            {"format": "closed_loop", "num_requests": 5, "concurrency": 2, "output_tokens": 1},
            "prompt_tokens",
            "missing",
        ),
        (
            {"format": "closed_loop", "num_requests": 5, "concurrency": 0, **LENGTHS},
            "concurrency",
            "greater than",
        ),
    ],
)
def test_a_key_that_is_wrong_keeps_its_own_place(keys, key, words):
    found = refused(**keys)
    assert words in found[key], found


@pytest.mark.parametrize(
    ("lengths", "key", "words"),
    [
        (0, "mean", "greater than 0"),
        (1.5, "mean", "whole number"),
        (True, "", "LengthsSpec"),
        ("12", "", "LengthsSpec"),
        ({"distribution": "lognorm", "mean": 5, "cv": 1}, "distribution", "did you mean 'lognormal'"),
        ({"distribution": "lognormal", "mean": 5}, "cv", "need mean and cv"),
        ({"distribution": "lognormal", "mean": 5, "cv": -1}, "cv", "greater than or equal to 0"),
        ({"distribution": "geometric", "mean": 5, "cv": 1}, "cv", "do not use cv"),
        ({"distribution": "geometric", "mean": 0.5}, "mean", "at least 1"),
        ({"distribution": "uniform", "min": 5, "max": 4}, "max", "must not be below min"),
        ({"distribution": "uniform", "min": 0, "max": 4}, "min", "greater than or equal to 1"),
        ({"distribution": "constant", "mean": 5, "max": 4}, "max", "do not use max"),
        ({"distribution": "empirical"}, "values", "need values"),
        ({"distribution": "empirical", "values": []}, "values", "at least 1"),
        ({"distribution": "empirical", "values": [1, 0]}, "values.1", "greater than or equal to 1"),
        ({"distribution": "empirical", "values": [1, 2], "weights": [1.0]}, "weights", "one weight a value"),
        ({"distribution": "empirical", "values": [1, 2], "weights": [0.0, 0.0]}, "weights", "above 0"),
        (
            {"distribution": "empirical", "values": [1, 2], "weights": [1e308, 1e308]},
            "weights.0",
            "less than or equal",
        ),
        ({"distribution": "normal", "mean": float("inf"), "cv": 1}, "mean", "finite"),
        ({"distribution": "normal", "mean": 5, "cv": 1, "sigma": 3}, "sigma", "Extra inputs"),
    ],
)
def test_lengths_that_are_wrong_keep_their_own_place(lengths, key, words):
    found = refused(format="closed_loop", concurrency=1, num_requests=1, prompt_tokens=lengths, output_tokens=1)
    assert words in found[f"prompt_tokens.{key}".rstrip(".")], found


def test_all_problems_of_a_spec_are_told_at_once():
    lengths = {"distribution": "lognorml", "mean": "x"}
    found = refused(format="poisson", cv=2, limit=0, prompt_tokens=lengths, num_requests=5)
    assert set(found) == {
        "cv", "limit", "rate_per_s", "output_tokens", "prompt_tokens.mean", "prompt_tokens.distribution",
    }  # fmt: skip


def test_a_spec_survives_a_round_trip_and_has_a_schema():
    spec = RequestsSpec(format="gamma", rate_per_s="20 /s", cv=2, duration_s="1 min", prompt_tokens=7, output_tokens=8)
    assert spec.duration_s == 60.0
    again = RequestsSpec(**json.loads(spec.model_dump_json()))
    assert again == spec
    assert "prompt_tokens" in RequestsSpec.model_json_schema()["properties"]


# --- traces


def test_rows_are_sorted_rebased_and_counted(trace):
    stream = build(trace, format="csv", path="t.csv")
    assert stream.prompt_tokens.tolist() == [1, 3, 2, 4, 5, 6]
    assert stream.arrival_ns.tolist() == [0, 10**9, 15 * 10**8, 3 * 10**9, 3 * 10**9, 10**10]
    assert stream.warnings == ("t.csv: 1 rows arrive before the row above them; the rows were sorted by arrival",)
    assert len(stream) == 6
    assert stream.concurrency is None
    assert not stream.arrival_ns.flags.writeable


def test_window_then_offset_then_limit_then_scale(trace):
    stream = build(trace, format="csv", path="t.csv", window_s=[1.0, 10.0], offset=1, limit=2, rate_scale=2.0)
    assert stream.prompt_tokens.tolist() == [2, 4]
    assert stream.arrival_ns.tolist() == [0, 750_000_000]  # 1.5 s apart, twice as fast


def test_clipping_is_counted(trace):
    stream = build(trace, format="csv", path="t.csv", max_prompt_tokens=4, max_output_tokens=1000)
    assert int(stream.prompt_tokens.max()) == 4
    assert "2 of 6 prompts were clipped to 4 tokens (3 tokens less)" in stream.warnings
    assert len(stream.warnings) == 2


def test_a_limit_beyond_the_trace_is_a_warning_and_an_offset_beyond_it_an_error(trace):
    assert "only 6 requests" in build(trace, format="csv", path="t.csv", limit=7).warnings[-1]
    with pytest.raises(BadInput, match="offset=6, requests=6"):
        build(trace, format="csv", path="t.csv", offset=6)
    with pytest.raises(BadInput, match=r"no request arrives in window_s \[100.0, 200.0\]; the trace is 0 to 10 s"):
        build(trace, format="csv", path="t.csv", window_s=[100, 200])
    with pytest.raises(BadInput, match="no such file"):
        build(trace, format="csv", path="u.csv")


def test_a_trace_in_a_closed_loop_keeps_its_lengths(trace):
    stream = build(trace, format="csv", path="t.csv", concurrency=2)
    assert stream.concurrency == 2
    assert not stream.arrival_ns.any()
    assert stream.prompt_tokens.tolist() == [1, 3, 2, 4, 5, 6]


def test_a_span_beyond_the_bound_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n5e9,1,1\n")
    with pytest.raises(BadInput, match="spans at most"):
        build(tmp_path, format="csv", path="t.csv")
    assert len(build(tmp_path, format="csv", path="t.csv", limit=1)) == 1


# --- generators

SEEDS = range(20)


@pytest.mark.parametrize(
    ("keys", "cv"),
    [
        ({"format": "poisson"}, 1.0),
        ({"format": "gamma", "cv": 0.5}, 0.5),
        ({"format": "gamma", "cv": 1.0}, 1.0),
        ({"format": "gamma", "cv": 3.0}, 3.0),
    ],
)
def test_mean_and_cv_of_the_gaps_over_20_seeds_lie_in_their_99_percent_interval(keys, cv):
    rate, count = 20.0, 2001
    gaps = [np.diff(build(seed=s, rate_per_s=rate, num_requests=count, **keys, **LENGTHS).arrival_ns) for s in SEEDS]
    gap = np.concatenate(gaps) / 1e9
    n = len(gap)
    assert abs(gap.mean() * rate - 1) < Z99 * cv / math.sqrt(n)
    # Delta method for gamma gaps (skewness 2 cv, kurtosis 3 + 6 cv^2): var(CV) = cv^2 (1 + cv^2) / 2n.
    assert abs(gap.std() / gap.mean() - cv) < Z99 * cv * math.sqrt((1 + cv**2) / 2 / n)


@pytest.mark.parametrize(
    ("spec", "mean", "std"),
    [
        ({"distribution": "lognormal", "mean": 1500, "cv": 1.0}, 1500, 1500),
        ({"distribution": "normal", "mean": 1500, "cv": 0.1}, 1500, 150),
        ({"distribution": "gamma", "mean": 1500, "cv": 0.7}, 1500, 1050),
        ({"distribution": "exponential", "mean": 5000}, 5000, 5000),
        ({"distribution": "geometric", "mean": 250}, 250, math.sqrt(250 * 249)),
        ({"distribution": "uniform", "min": 11, "max": 20}, 15.5, math.sqrt(99 / 12)),
        ({"distribution": "empirical", "values": [3, 9], "weights": [1, 2]}, 7, math.sqrt(8)),
        ({"distribution": "empirical", "values": [3, 9, 3]}, 5, math.sqrt(8)),
    ],
)
def test_mean_of_the_lengths_over_20_seeds_lies_in_its_99_percent_interval(spec, mean, std):
    values = np.concatenate([draw_lengths(LengthsSpec(**spec), 2000, s, "t")[0] for s in SEEDS])
    assert abs(values.mean() - mean) < Z99 * std / math.sqrt(len(values))
    assert abs(values.std() / std - 1) < 0.05
    assert values.min() >= 1


def test_bounds_of_lengths_are_kept_and_a_moved_mean_is_said():
    spec = {"distribution": "normal", "mean": 10, "cv": 2.0}
    stream = build(format="closed_loop", concurrency=1, num_requests=1000, prompt_tokens=spec, output_tokens=5)
    assert int(stream.prompt_tokens.min()) == 1
    assert "requests.prompt_tokens: " in stream.warnings[0]
    bounded = build(
        format="closed_loop",
        concurrency=1,
        num_requests=1000,
        prompt_tokens=spec | {"min": 8, "max": 12},
        output_tokens=5,
    )
    assert set(bounded.prompt_tokens.tolist()) == {8, 9, 10, 11, 12}
    assert bounded.warnings == ()


def test_heavy_tails_stop_at_the_largest_length():
    spec = LengthsSpec(distribution="lognormal", mean=float(MAX_TOKENS), cv=1000.0)
    assert int(draw_lengths(spec, 1000, 1, "t")[0].max()) <= MAX_TOKENS
    assert set(draw_lengths(LengthsSpec(distribution="gamma", mean=5.0, cv=0.0), 9, 1, "t")[0].tolist()) == {5}
    assert set(draw_lengths(LengthsSpec(distribution="lognormal", mean=5.0, cv=0.0), 9, 1, "t")[0].tolist()) == {5}


def test_fixed_intervals_do_not_drift():
    stream = build(format="deterministic", rate_per_s=3, num_requests=300_001, **LENGTHS)
    assert int(stream.arrival_ns[-1]) == 10**14
    assert set(np.diff(stream.arrival_ns).tolist()) == {333_333_333, 333_333_334}
    assert build(format="fixed", interval_ms=2.5, num_requests=3, **LENGTHS).arrival_ns.tolist() == [
        0,
        2_500_000,
        5_000_000,
    ]
    assert len(build(format="fixed", interval_ms=100, duration_s=1, **LENGTHS)) == 10
    assert len(build(format="fixed", interval_ms=100, duration_s=1, num_requests=4, **LENGTHS)) == 4


def test_a_duration_or_a_limit_takes_a_part_of_the_same_stream():
    keys = {"format": "poisson", "rate_per_s": 1000, "output_tokens": 5}
    keys["prompt_tokens"] = {"distribution": "geometric", "mean": 50}
    long = build(num_requests=100_000, **keys)
    timed = build(duration_s=90, **keys)
    cut = int(np.searchsorted(long.arrival_ns, 90 * 10**9))
    assert 80_000 < len(timed) == cut
    assert np.array_equal(timed.arrival_ns, long.arrival_ns[:cut])
    assert np.array_equal(timed.prompt_tokens, long.prompt_tokens[:cut])
    few = build(num_requests=100_000, limit=10, **keys)
    assert np.array_equal(few.arrival_ns, long.arrival_ns[:10])
    faster = build(num_requests=100_000, rate_scale=4.0, **keys)
    assert np.array_equal(faster.arrival_ns, np.rint(long.arrival_ns / 4))
    assert np.array_equal(build(num_requests=100, **(keys | {"rate_per_s": 1})).prompt_tokens, long.prompt_tokens[:100])


def test_closed_loop_starts_together():
    stream = build(format="closed_loop", concurrency=64, num_requests=2000, prompt_tokens=1024, output_tokens=256)
    assert stream.concurrency == 64
    assert len(stream) == 2000
    assert not stream.arrival_ns.any()
    assert set(stream.prompt_tokens.tolist()) == {1024}


def test_a_burst_beyond_the_largest_stream_is_refused_not_cut(monkeypatch):
    monkeypatch.setattr("moesim.workload.generators.MAX_REQUESTS", 1000)
    monkeypatch.setattr("moesim.workload.requests.MAX_REQUESTS", 1000)
    with pytest.raises(BadInput, match="at most 1,000 requests"):
        build(seed=1, format="gamma", cv=500, rate_per_s=1, duration_s=800, **LENGTHS)


def test_a_stream_that_runs_away_is_refused():
    with pytest.raises(BadInput, match="spans at most"):
        build(seed=18, format="gamma", cv=1000, rate_per_s=1e-4, num_requests=50_000, **LENGTHS)


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = (
        "from pathlib import Path;from moesim.workload.requests import *;"
        "s=build_requests(RequestsSpec(format='gamma',rate_per_s=5,cv=2,num_requests=50,output_tokens=3,"
        "prompt_tokens={'distribution':'lognormal','mean':90,'cv':1}),Path(),4);"
        "print(s.arrival_ns.tobytes().hex()+s.prompt_tokens.tobytes().hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed},
            text=True,
        ).stdout
        for hash_seed in ("0", "7")
    }
    assert len(seen) == 1
    assert len(seen.pop()) > 100


# --- recorded data

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "requests"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests")
@pytest.mark.parametrize(
    ("keys", "figures"),
    [
        (
            {"format": "azure", "path": "azure_llm_2023_code.csv"},
            (8819, 18_059_974, 245_896, 3_435_948_056_000),
        ),
        (
            {"format": "mooncake", "path": "mooncake_conversation.jsonl"},
            (12_031, 144_793_823, 4_122_048, 3_536_999_000_000),
        ),
        (
            {"format": "csv", "path": "splitwise_conv_q2_2000.csv"},
            (2000, 2_331_296, 425_094, 957_534_096_000),
        ),
    ],
)
def test_totals_of_recorded_traces(keys, figures):
    stream = build(DATA, **keys)
    seen = (
        len(stream),
        int(stream.prompt_tokens.sum()),
        int(stream.output_tokens.sum()),
        int(stream.arrival_ns[-1]),
    )
    assert seen == figures


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests")
def test_servegen_counts_its_window_from_the_start_of_the_day():
    keys = {"format": "servegen", "path": "servegen_deepseek_r1.tar.gz"}
    window = build(DATA, seed=2, window_s=[600, 1200], **keys)
    assert np.array_equal(
        window.prompt_tokens[:100], build(DATA, seed=2, window_s=[600, 1200], limit=100, **keys).prompt_tokens
    )
    assert int(window.arrival_ns[-1]) < 600 * 10**9
