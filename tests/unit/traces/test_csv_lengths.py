"""`format: csv`: the spellings of peers' files, sessions, and a closed loop without arrivals."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.errors import BadInput
from moesim.traces.csv_lengths import read
from moesim.workload.requests import ReadOptions

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "requests" / "splitwise_conv_q2_2000.csv"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests/splitwise_conv_q2_2000.csv")
def test_the_2000_requests_every_peer_was_measured_on():
    raw = read(DATA, ReadOptions())
    assert len(raw.arrival_ns) == 2000
    assert int(raw.prompt_tokens.sum()) == 2_331_296
    assert int(raw.output_tokens.sum()) == 425_094
    assert int((raw.prompt_tokens + raw.output_tokens).max()) <= 4096  # clipped to 4,096 tokens
    assert int(raw.arrival_ns[0]) == 0
    assert int(raw.arrival_ns[1]) == 12_665_000  # 0.522695 - 0.510030 s
    assert raw.warnings == ()


@pytest.mark.parametrize(
    "header",
    [
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        "arrival_s,prompt_tokens,output_tokens",
        "Arrival_S, Prompt Tokens ,OUTPUT_TOKENS",
        "arrival_timestamp,prompt_size,token_size",
    ],
)
def test_known_headers(tmp_path, header):
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n1.5,10,20\n\n 2.000000001 , 11 , 21 \n")
    raw = read(path, ReadOptions())
    assert raw.arrival_ns.tolist() == [0, 500_000_001]
    assert raw.prompt_tokens.tolist() == [10, 11]
    assert raw.output_tokens.tolist() == [20, 21]
    assert raw.session_id.tolist() == [-1, -1]


def test_sessions_and_the_missing_last_newline(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,session_id\n0,1,2,b\n0,1,2,\n0,1,2,a\n0,1,2,b")
    raw = read(path, ReadOptions())
    assert raw.session_id.tolist() == [0, -1, 1, 0]
    assert "does not end in a newline" in raw.warnings[0]


def test_arrivals_may_be_absent_only_when_they_are_not_needed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt_tokens,output_tokens\n5,6\n7,8\n")
    assert read(path, ReadOptions(needs_arrivals=False)).arrival_ns.tolist() == [0, 0]
    with pytest.raises(BadInput, match="column 'arrival_s'"):
        read(path, ReadOptions())


@pytest.mark.parametrize("cell", ["-1", "nan", "inf", "1e999", "1e12", "abc", "", "0x10", "1_0", "12:30"])
def test_a_time_must_be_a_finite_number_of_seconds(tmp_path, cell):
    path = tmp_path / "t.csv"
    path.write_text(f"arrival_s,prompt_tokens,output_tokens\n1,1,1\n{cell},1,1\n")
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    assert str(caught.value).startswith(f"{path}:3: column 'arrival_s': ")


def test_two_spellings_of_one_column_are_ambiguous(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,arrived_at,prompt_tokens,output_tokens\n1,1,1,1\n")
    with pytest.raises(BadInput, match="must stand once"):
        read(path, ReadOptions())
