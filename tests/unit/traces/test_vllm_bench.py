"""`vllm bench serve` results: failures dropped before times are rebased, and what a broken result says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moesim.errors import BadInput
from moesim.traces.vllm_bench import read
from moesim.workload.requests import ReadOptions

GOOD: dict[str, Any] = {
    "duration": 3.0,
    "max_concurrency": None,
    "input_lens": [10, 20, 30],
    "output_lens": [4, 5, 6],
    "start_times": [1000.5, 1000.25, 1001.0],
    "errors": ["", "", ""],
    "ttfts": [0.1, 0.2, 0.3],
}


def write(tmp_path, document):
    path = tmp_path / "r.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_times_are_rebased_in_seconds(tmp_path):
    raw = read(write(tmp_path, GOOD), ReadOptions())
    assert raw.arrival_ns.tolist() == [250_000_000, 0, 750_000_000]
    assert raw.prompt_tokens.tolist() == [10, 20, 30]
    assert raw.output_tokens.tolist() == [4, 5, 6]
    assert raw.warnings == ()


def test_failed_requests_have_no_say_in_the_clock(tmp_path):
    document = GOOD | {
        "start_times": [0.0, 1000.25, 1001.0],
        "output_lens": [0, 5, 6],
        "errors": ["refused", "", ""],
    }
    raw = read(write(tmp_path, document), ReadOptions())
    assert raw.arrival_ns.tolist() == [0, 750_000_000]
    assert "1 of 3 requests failed" in raw.warnings[0]


def test_a_closed_loop_recording_is_pointed_out_and_needs_no_start_times(tmp_path):
    assert "closed loop" in read(write(tmp_path, GOOD | {"max_concurrency": 8}), ReadOptions()).warnings[0]
    document = {key: value for key, value in GOOD.items() if key != "start_times"}
    assert read(write(tmp_path, document), ReadOptions(needs_arrivals=False)).arrival_ns.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("document", "where", "words"),
    [
        ({k: v for k, v in GOOD.items() if k != "start_times"}, "", "--save-detailed"),
        ({("input_len" if k == "input_lens" else k): v for k, v in GOOD.items()}, "", "rename 'input_len'"),
        (GOOD | {"output_lens": [1, 2]}, "", "of one length: input_lens 3, output_lens 2, start_times 3"),
        (GOOD | {"output_lens": 7}, ":output_lens", "a list is needed, got 7"),
        (GOOD | {"output_lens": [1, 2.5, 3]}, ":output_lens[1]", "whole number"),
        (GOOD | {"input_lens": [1, 0, 3]}, ":input_lens[1]", "from 1 to"),
        (GOOD | {"input_lens": [1, 2**40, 3]}, ":input_lens[1]", "from 1 to"),
        (GOOD | {"input_lens": [1, [2], 3]}, ":input_lens[1]", "a list of 1"),
        (GOOD | {"start_times": [1, -2, 3]}, ":start_times[1]", "a time from 0"),
        (GOOD | {"start_times": [1, "x", 3]}, ":start_times[1]", "a time from 0"),
        (GOOD | {"start_times": [1, True, 3]}, ":start_times[1]", "a time from 0"),
        (GOOD | {"output_lens": [0, 0, 0]}, "", "all 3 requests failed"),
        (GOOD | {"input_lens": [], "output_lens": [], "start_times": []}, "", "empty"),
        (json.dumps(GOOD)[:-10], ":1:", "cut off"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ":2:1", "--append-result"),
        (json.dumps(GOOD).replace("1001.0", "NaN"), "", "NaN"),
        ('{"input_lens": [1], "input_lens": [2]}', "", "stands twice"),
        ("[1]", "", "a JSON object"),
        ("[" * 200_000, "", "nested too deeply"),
    ],
)
def test_broken_results(tmp_path, document, where, words):
    path = write(tmp_path, document)
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    problem = caught.value.problems[0]
    assert problem.where.startswith(f"{path}{where}")
    assert words in problem.message
