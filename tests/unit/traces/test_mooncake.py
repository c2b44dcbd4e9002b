"""Mooncake JSON lines: the real file's totals and what a broken line says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.errors import BadInput
from moesim.traces.mooncake import read
from moesim.workload.requests import ReadOptions

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "requests" / "mooncake_conversation.jsonl"
GOOD = '{"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": [1]}\n'


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests/mooncake_conversation.jsonl")
def test_the_published_file_is_read_whole():
    raw = read(DATA, ReadOptions())
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert len(raw.arrival_ns) == len(rows) == 12_031
    assert int(raw.prompt_tokens.sum()) == 144_793_823
    assert int(raw.output_tokens.sum()) == 4_122_048
    assert raw.arrival_ns.tolist() == [row["timestamp"] * 10**6 for row in rows]
    assert len(raw.warnings) == 1
    assert "hash_ids are ignored" in raw.warnings[0]


def test_without_hashes_there_is_no_warning_and_fractions_of_a_ms_count(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"timestamp": 10.5, "input_length": 5, "output_length": 6}\n\n'
        '{"timestamp": 11, "input_length": 5, "output_length": 6}'
    )
    raw = read(path, ReadOptions())
    assert raw.arrival_ns.tolist() == [0, 500_000]
    assert raw.warnings == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"timestamp": 0, "input_length": 5}', "output_length is missing"),
        ('{"timestamp": 0, "input_lenght": 5, "output_length": 6}', "rename 'input_lenght'"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 6}', "input_length: a whole number"),
        ('{"timestamp": 0, "input_length": 5.0, "output_length": 6}', "input_length: a whole number"),
        ('{"timestamp": 0, "input_length": true, "output_length": 6}', "input_length: a whole number"),
        ('{"timestamp": 0, "input_length": null, "output_length": 6}', "input_length: a whole number"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 6}', "from 1 to"),
        ('{"timestamp": 0, "input_length": -3, "output_length": 6}', "from 1 to"),
        ('{"timestamp": 0, "input_length": 2147483649, "output_length": 6}', "from 1 to"),
        ('{"timestamp": 0, "input_length": 1' + "0" * 200 + ', "output_length": 6}', "more than 77 digits"),
        ('{"timestamp": 0, "input_length": 1' + "0" * 9000 + ', "output_length": 6}', "digits"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 6}', "timestamp: a time in ms"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 6}', "NaN"),
        ('{"timestamp": 1e999, "input_length": 5, "output_length": 6}', "timestamp: a time in ms"),
        (
            '{"timestamp": 1' + "0" * 400 + ', "input_length": 5, "output_length": 6}',
            "timestamp: a time in ms",
        ),
        (
            '{"timestamp": 0, "timestamp": 1, "input_length": 5, "output_length": 6}',
            "'timestamp' stands twice",
        ),
        ('{"timestamp": 0, "input_len', "the last line is cut off"),
        ("[0, 5, 6]", "an object with timestamp"),
        ("[" * 200_000, "nested too deeply"),
        ("hello", "Expecting value"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": [' + "[]," * 100, "Expecting value"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    path = tmp_path / "m.jsonl"
    path.write_text(GOOD * 2 + line)
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    assert [problem.where for problem in caught.value.problems] == [f"{path}:3"]
    assert words in caught.value.problems[0].message


def test_all_broken_lines_are_collected(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(GOOD + "x\n" + GOOD + "[]\n" * 30)
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    assert [problem.where for problem in caught.value.problems[:2]] == [f"{path}:2", f"{path}:4"]
    assert "and 11 more problems" in caught.value.problems[-1].message
