"""BurstGPT CSV: both generations of files, failures dropped and counted, sessions kept."""

from __future__ import annotations

import pytest

from moesim.errors import BadInput
from moesim.traces.burstgpt import read
from moesim.workload.requests import ReadOptions

OLD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
NEW = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path, text):
    path = tmp_path / "b.csv"
    path.write_text(text)
    return path


def test_failures_are_dropped_and_counted(tmp_path):
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
    rows += "118,GPT-4,417,276,693,API log\n"
    raw = read(write(tmp_path, OLD + rows), ReadOptions())
    assert raw.arrival_ns.tolist() == [0, 113 * 10**9]
    assert raw.prompt_tokens.tolist() == [472, 417]
    assert raw.output_tokens.tolist() == [18, 276]
    assert raw.session_id.tolist() == [-1, -1]
    assert raw.warnings == ("b.csv: 1 of 3 requests failed (0 response tokens) and were dropped",)


def test_session_ids_are_kept(tmp_path):
    rows = "5.5,7,1.2,m,1,2,3,c\n6,,0.1,m,1,2,3,a\n7,7,0.1,m,1,0,1,c\n8,9,0.1,m,1,2,3,c\n"
    raw = read(write(tmp_path, NEW + rows), ReadOptions())
    assert raw.session_id.tolist() == [7, -1, 9]
    assert raw.arrival_ns.tolist() == [0, 500_000_000, 2_500_000_000]


def test_sessions_that_are_text_are_numbered_by_first_appearance(tmp_path):
    rows = "5,u1,1,m,1,2,3,c\n6,,0,m,1,2,3,a\n7,9,0,m,1,2,3,c\n8,u1,0,m,1,2,3,c\n"
    raw = read(write(tmp_path, NEW + rows), ReadOptions())
    assert raw.session_id.tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (OLD + "5,m,0,18,18,c\n", ":2", "'Request tokens'"),
        (OLD + "5,m,10,0,10,c\n", "", "all 1 requests failed"),
        (OLD + "5,m,10,-1,10,c\n", ":2", "'Response tokens'"),
        (OLD.replace("Response", "Respnse") + "5,m,1,1,2,c\n", ":1", "rename 'Respnse tokens'"),
        (OLD + "5,m,10\n", ":2", "cut off"),
    ],
)
def test_broken_files(tmp_path, text, where, words):
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    assert caught.value.problems[0].where == f"{path}{where}"
    assert words in caught.value.problems[0].message
