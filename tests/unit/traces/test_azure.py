"""Azure CSV: the real file's totals, times to 100 ns, and what a broken file says."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces.azure import read
from moesim.workload.requests import ReadOptions

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "requests" / "azure_llm_2023_code.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:17:03.9799600,4808,10\n"


def problems(path: Path) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read(path, ReadOptions())
    return [str(problem).replace(str(path), "F") for problem in caught.value.problems]


def text_problems(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return problems(path)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests/azure_llm_2023_code.csv")
def test_the_published_file_is_read_whole():
    raw = read(DATA, ReadOptions())
    assert len(raw.arrival_ns) == 8819
    assert int(raw.prompt_tokens.sum()) == 18_059_974
    assert int(raw.output_tokens.sum()) == 245_896
    first_second = 1_700_158_623  # 2023-11-16 18:17:03 UTC
    assert int(raw.arrival_ns[0]) == first_second * 10**9 + 979_960_000
    assert int(raw.arrival_ns[-1] - raw.arrival_ns[0]) == 3_435_948_056_000
    gap = np.diff(raw.arrival_ns)
    assert round(float(gap.std() / gap.mean()), 1) == 13.2  # what shared/data/README.md says of it
    assert raw.warnings == ()


def test_seven_digits_utc_offsets_and_gzip_mean_the_same_time(tmp_path):
    plain = tmp_path / "a.csv"
    plain.write_text(
        HEADER + "2024-05-10 00:00:00.0000001,5,6\n2024-05-10 00:00:01.5+00:00,7,8\n2024-05-10T00:00:02Z,9,1\n"
    )
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    raw = read(plain, ReadOptions())
    assert (raw.arrival_ns - raw.arrival_ns[0]).tolist() == [0, 1_499_999_900, 1_999_999_900]
    assert raw.prompt_tokens.tolist() == [5, 7, 9]
    assert np.array_equal(read(packed, ReadOptions()).arrival_ns, raw.arrival_ns)


def test_windows_line_ends_byte_order_mark_and_other_columns_are_fine(tmp_path):
    path = tmp_path / "a.csv"
    body = "GeneratedTokens,Note,TIMESTAMP,ContextTokens\r\n10,x,2023-11-16 18:17:03.9799600,4808\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + body.encode())
    raw = read(path, ReadOptions())
    assert raw.prompt_tokens.tolist() == [4808]
    assert raw.output_tokens.tolist() == [10]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (HEADER + ROW + "2023-11-16 18:17:04,31x0,8\n", "F:3", ("ContextTokens", "'31x0'")),
        (HEADER + ROW + "2023-11-16 18:17:04,-5,8\n", "F:3", ("ContextTokens", "must not be negative")),
        (HEADER + ROW + "2023-11-16 18:17:04,12.5,8\n", "F:3", ("ContextTokens", "whole number")),
        (HEADER + ROW + "2023-11-16 18:17:04,nan,8\n", "F:3", ("ContextTokens", "'nan'")),
        (HEADER + ROW + "2023-11-16 18:17:04,1e400,8\n", "F:3", ("ContextTokens", "'1e400'")),
        (HEADER + ROW + "2023-11-16 18:17:04,0,8\n", "F:3", ("ContextTokens", "from 1")),
        (HEADER + ROW + "2023-11-16 18:17:04,5,0\n", "F:3", ("GeneratedTokens", "from 1")),
        (HEADER + ROW + "2023-11-16 18:17:04,4294967296,8\n", "F:3", ("4,294,967,296",)),
        (HEADER + ROW + "2023-11-16 18:17:04," + "9" * 5000 + ",8\n", "F:3", ("at most",)),
        (HEADER + ROW + "2023-11-16 18:17:04,\u0661\u0662,8\n", "F:3", ("ContextTokens",)),
        (HEADER + ROW + "2023-11-16 18:17:04,1_000,8\n", "F:3", ("ContextTokens",)),
        (HEADER + ROW + "2023-11-16 18:17:04,,8\n", "F:3", ("ContextTokens", "missing")),
        (HEADER + ROW + "2023-13-16 18:17:04,5,8\n", "F:3", ("TIMESTAMP", "2023-13-16")),
        (HEADER + ROW + "2023-02-30 18:17:04,5,8\n", "F:3", ("TIMESTAMP", "2023-02-30")),
        (HEADER + ROW + "NaT,5,8\n", "F:3", ("TIMESTAMP",)),
        (HEADER + ROW + "today,5,8\n", "F:3", ("TIMESTAMP",)),
        (HEADER + ROW + "2023-11-16 18:17:04,31", "F:3", ("last line is cut off", "2 cells", "3")),
        (HEADER + "2023-11-16 18:17:04,31\n" + ROW, "F:2", ("does not fit",)),
        (HEADER + ROW.strip() + ",7\n", "F:2", ("4 cells",)),
        (HEADER + ROW + '2023-11-16 18:17:04,"31,8\n', "F:3", ("not CSV",)),
        (HEADER, "F:1", ("not one request",)),
        (ROW + ROW, "F:1", ("must be the header",)),
        ("TIMESTAMP;ContextTokens;GeneratedTokens\n", "F:1", ("missing",)),
        (
            HEADER.replace("ContextTokens", "ContextToken") + ROW,
            "F:1",
            ("'ContextTokens'", "rename 'ContextToken'"),
        ),
        (HEADER.replace("GeneratedTokens", "ContextTokens") + ROW, "F:1", ("must stand once",)),
        ("", "F", ("empty",)),
        (" \n\n", "F", ("empty",)),
        (HEADER.encode("utf-16"), "F:1", ("UTF-16",)),
        (HEADER.encode() + ROW.encode() + b"2023-11-16 \xe9,5,8\n", "F:3:12", ("UTF-8", "0xE9")),
        (HEADER.encode() + b"\0\0\0\n", "F:2", ("NUL",)),
        (b"PK\x03\x04rubbish", "F", ("zip",)),
        (b"\x1f\x8brubbish", "F", ("gzip",)),
        (gzip.compress(ROW.encode() * 100, mtime=0)[:-20], "F", ("gzip", "cut off")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "F", ("Git LFS",)),
        (HEADER.encode() + b"x" * (2**20 + 2), "F:2", ("characters",)),
        (HEADER.encode() + b"," * 2000, "F:2", ("cells",)),
    ],
)
def test_a_broken_file_names_line_and_column(tmp_path, text, place, words):
    found = text_problems(tmp_path, text)
    assert found[0].startswith(f"{place}: "), found
    assert all(word in found[0] for word in words), found


def test_every_problem_of_a_file_is_collected(tmp_path):
    found = text_problems(tmp_path, HEADER + ROW + "x,y,z\n" * 30)
    assert found[0].startswith("F:3: column 'TIMESTAMP'")
    assert found[1].startswith("F:3: column 'ContextTokens'")
    assert found[2].startswith("F:3: column 'GeneratedTokens'")
    assert len(found) == 21
    assert "and 70 more problems" in found[20]


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "trace.csv").write_text(HEADER + ROW)
    assert "folder" in problems(tmp_path)[0]
    assert "did you mean 'trace.csv'" in problems(tmp_path / "trace.cvs")[0]
    assert "folder does not exist" in problems(tmp_path / "no" / "trace.csv")[0]
    assert problems(tmp_path / "a\0b")[0].startswith("F: ")
    assert problems(tmp_path / ("x" * 5000))[0].startswith("F: ")
    assert "device" in problems(Path("/dev/zero"))[0]


def test_a_gzip_bomb_is_refused_at_a_bounded_size(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.csv.gz"
    bomb.write_bytes(gzip.compress(b"0" * (40 * 2**20), 9, mtime=0))
    assert bomb.stat().st_size < 50_000
    assert "unpack to more than" in problems(bomb)[0]


def test_more_rows_than_the_bound_are_refused_before_they_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("moesim.traces._table.MAX_REQUESTS", 3)
    assert "at most 3 rows" in text_problems(tmp_path, HEADER + ROW * 4)[0]
    path = tmp_path / "t.csv"
    path.write_text(HEADER + ROW * 3)
    assert len(read(path, ReadOptions()).arrival_ns) == 3


def test_a_file_beyond_the_size_bound_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "big.csv"
    with path.open("wb") as handle:
        handle.truncate(600 * 2**20)
    assert "at most" in problems(path)[0]
