"""ServeGen: every window's rate, the families' CV, the length tables, and archives that lie."""

from __future__ import annotations

import ast
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces._chunks import read_clients
from moesim.traces.servegen import read
from moesim.workload.requests import ReadOptions

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "requests" / "servegen_deepseek_r1.tar.gz"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/requests/servegen_deepseek_r1.tar.gz")
Z99 = 2.5758

TABLE = {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{7: 1.0}", "reason_ratio": "{}"}
TRACE = "0,0.5,1.0,Gamma,1.0,2.0\n100,0,0,,0,0\n200,2,1.0,Weibull,1.0,0.5\n"


def folder(tmp_path: Path, trace: str = TRACE, dataset: Any = None) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "chunk-3-trace.csv").write_text(trace)
    text = dataset if isinstance(dataset, str) else json.dumps({"0": TABLE} if dataset is None else dataset)
    (path / "chunk-3-dataset.json").write_text(text)
    (path / "README.md").write_text("not read")
    return path


def problems(path: Path, options: ReadOptions | None = None) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read(path, options or ReadOptions())
    return [str(problem).replace(str(path), "F") for problem in caught.value.problems]


@needs_data
def test_the_rate_of_every_window_of_the_published_day_is_reproduced():
    raw = read(DATA, ReadOptions(seed=3))
    expected = np.zeros(144)
    for client in read_clients(DATA):
        rows = [line.split(",") for line in (client.trace or b"").decode().splitlines()]
        expected += [float(row[1]) * 600 for row in rows]
    assert len(raw.arrival_ns) == 1_383_669
    assert np.array_equal(np.bincount(raw.arrival_ns // 600_000_000_000, minlength=144), np.rint(expected))


@needs_data
def test_lengths_follow_the_published_tables():
    hour = read(DATA, ReadOptions(seed=5, window_ns=(0, 3_600_000_000_000)))
    weight = mean = square = 0.0
    for client in read_clients(DATA):
        rate = sum(float(line.split(",")[1]) for line in (client.trace or b"").decode().splitlines()[:6])
        table = ast.literal_eval(json.loads(client.dataset or b"")["0"]["output_tokens"])
        weight += rate * 600
        mean += rate * 600 * sum(n * p for n, p in table.items())
        square += rate * 600 * sum(n * n * p for n, p in table.items())
    assert len(hour.output_tokens) == round(weight)
    mean, square = mean / weight, square / weight
    margin = Z99 * math.sqrt((square - mean**2) / weight)
    assert abs(float(hour.output_tokens.mean()) - mean) < margin


@needs_data
def test_a_window_or_a_limit_takes_a_part_of_the_same_stream():
    hour = read(DATA, ReadOptions(seed=1, window_ns=(0, 3_600_000_000_000)))
    few = read(DATA, ReadOptions(seed=1, enough=2000))
    assert 2000 <= len(few.arrival_ns) < len(hour.arrival_ns)
    for name in ("arrival_ns", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(few, name)[:2000], getattr(hour, name)[:2000])
    part = read(DATA, ReadOptions(seed=1, window_ns=(1_000_000_000_000, 2_000_000_000_000), enough=500))
    begin = int(np.searchsorted(hour.arrival_ns, 1_000_000_000_000))
    inside = part.prompt_tokens[np.searchsorted(part.arrival_ns, 1_000_000_000_000) :]
    assert np.array_equal(inside[:500], hour.prompt_tokens[begin : begin + 500])


def test_windows_hold_their_counts_and_lengths_their_shares(tmp_path):
    path = folder(tmp_path, "0,10,1,Gamma,1,1\n1000,0,0,,0,0\n2000,20,1,Weibull,1,1\n")
    raw = read(path, ReadOptions(seed=7))
    assert np.bincount(raw.arrival_ns // 1_000_000_000_000).tolist() == [10_000, 0, 20_000]
    assert set(raw.output_tokens.tolist()) == {7}
    share = float((raw.prompt_tokens == 20).mean())
    assert abs(share - 0.75) < Z99 * math.sqrt(0.75 * 0.25 / 30_000)
    assert set(raw.prompt_tokens.tolist()) == {10, 20}
    assert raw.clock_zero_ns == 0


@pytest.mark.parametrize(
    ("family", "shape", "cv"),
    [
        ("Gamma", 0.25, 2.0),
        ("Gamma", 4.0, 0.5),
        ("Weibull", 1.0, 1.0),
        ("Weibull", 0.5, math.sqrt(5)),  # CV^2 = Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1 = 24/4 - 1
    ],
)
def test_gaps_have_the_cv_of_their_family(tmp_path, family, shape, cv):
    path = folder(tmp_path, f"0,20,{cv},{family},{shape},1\n10000,0,0,,0,0\n")
    seen = []
    for seed in range(4):
        gap = np.diff(read(path, ReadOptions(seed=seed)).arrival_ns)
        seen.append(float(gap.std() / gap.mean()))
    assert abs(np.mean(seen) / cv - 1) < 0.02  # 800,000 gaps; the CV of heavy tails converges slowly


def test_a_fraction_of_a_request_comes_up_by_its_share(tmp_path):
    path = folder(tmp_path, "0,0.0025,1,Gamma,1,1\n100,1,1,Gamma,1,1\n")
    count = [len(read(path, ReadOptions(seed=seed)).arrival_ns) - 100 for seed in range(400)]
    assert set(count) == {0, 1}
    assert abs(np.mean(count) - 0.25) < Z99 * math.sqrt(0.25 * 0.75 / 400)


def test_shapes_at_the_edge_stay_inside_the_window(tmp_path):
    rows = "0,1,1,Gamma,0.000001,1\n100,1,1,Weibull,0.000001,1\n200,1,1,Gamma,1000000000,1\n"
    raw = read(folder(tmp_path, rows), ReadOptions())
    assert np.bincount(raw.arrival_ns // 100_000_000_000).tolist() == [100, 100, 100]


def test_lengths_come_from_the_latest_period_that_has_any(tmp_path):
    late = TABLE | {"input_tokens": {"99": 1.0}}
    empty = {"input_tokens": "{}", "output_tokens": "{}"}
    path = folder(
        tmp_path,
        "0,1,1,Gamma,1,1\n100,1,1,Gamma,1,1\n200,1,1,Gamma,1,1\n",
        {"200": late, "0": TABLE, "100": empty},
    )
    raw = read(path, ReadOptions())
    assert set(raw.prompt_tokens[raw.arrival_ns < 200 * 10**9].tolist()) == {10, 20}
    assert set(raw.prompt_tokens[raw.arrival_ns >= 200 * 10**9].tolist()) == {99}


def test_an_archive_means_the_same_as_its_folder_and_writes_nothing(tmp_path):
    path = folder(tmp_path)
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, arcname="../../evil")
    before = sorted(tmp_path.rglob("*"))
    one, two = read(path, ReadOptions()), read(archive, ReadOptions())
    assert np.array_equal(one.arrival_ns, two.arrival_ns)
    assert np.array_equal(one.prompt_tokens, two.prompt_tokens)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("trace", "place", "words"),
    [
        ("0,1,1,Gamma,1\n", "F:chunk-3-trace.csv:1", "6 cells"),
        ("0,1,1,Gamma,1,1\n100,x,1,Gamma,1,1\n", "F:chunk-3-trace.csv:2", "rate: a number"),
        ("0,nan,1,Gamma,1,1\n", "F:chunk-3-trace.csv:1", "rate: a number"),
        ("0,1_0,1,Gamma,1,1\n", "F:chunk-3-trace.csv:1", "rate: a number"),
        ("0,1e999,1,Gamma,1,1\n", "F:chunk-3-trace.csv:1", "rate: from 0"),
        ("0,inf,1,Gamma,1,1\n", "F:chunk-3-trace.csv:1", "rate: a number"),
        ("0,-1,1,Gamma,1,1\n", "F:chunk-3-trace.csv:1", "rate: from 0"),
        ("0,1,1,Gama,1,1\n", "F:chunk-3-trace.csv:1", "did you mean 'Gamma'"),
        ("0,1,1,Gamma,0,1\n", "F:chunk-3-trace.csv:1", "shape: from"),
        ("100,1,1,Gamma,1,1\n100,1,1,Gamma,1,1\n", "F:chunk-3-trace.csv:2", "one after the other"),
        ("0,0,0,,0,0\n", "F", "no window with a rate"),
        ("0,1000000,1,Gamma,1,1\n600,0,0,,0,0\n", "F", "at most 10,000,000 requests"),
        ("", "F:chunk-3-trace.csv", "empty"),
        ("\0", "F:chunk-3-trace.csv:1", "NUL"),
    ],
)
def test_broken_traces(tmp_path, trace, place, words):
    found = problems(folder(tmp_path, trace))
    assert found[0].startswith(f"{place}: ")
    assert words in found[0]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"0": {"input_tokens": "{1: 1.0}"}}, "output_tokens is missing"),
        ({"0": {"input_tokens": "{1: 1.0}", "output_token": "{1: 1.0}"}}, "rename 'output_token'"),
        ({"0": TABLE | {"input_tokens": "{1: 0.5}"}}, "must sum to 1, they sum to 0.5"),
        ({"0": TABLE | {"input_tokens": "{1: -1, 2: 2}"}}, "from 0 to 1"),
        ({"0": TABLE | {"input_tokens": "{1: 0.5, 1: 0.5}"}}, "stands twice"),
        ({"0": TABLE | {"input_tokens": "{0: 1.0}"}}, "from 1 to"),
        ({"0": TABLE | {"input_tokens": "{99999999999: 1.0}"}}, "from 1 to"),
        ({"0": TABLE | {"input_tokens": "__import__('os')"}}, "period 0, input_tokens"),
        ({"0": TABLE | {"input_tokens": "{1: 1"}}, "period 0, input_tokens"),
        ({"0": TABLE | {"input_tokens": 5}}, "a mapping"),
        ({"0": 5}, "period 0: an object"),
        ({"zero": TABLE}, "whole seconds"),
        ({"300": TABLE}, "no lengths for it"),
        ({}, "no lengths for it"),
        ("[1]", "an object of periods"),
        ('{"0": ', "cut off"),
        ('{"0": 1, "0": 2}', "stands twice"),
    ],
)
def test_broken_datasets(tmp_path, dataset, words):
    found = problems(folder(tmp_path, dataset=dataset))
    assert found[0].startswith("F:chunk-3-")
    assert words in found[0]


def test_files_that_are_absent_are_named(tmp_path):
    path = folder(tmp_path)
    (path / "chunk-3-dataset.json").rename(path / "chunk-4-dataset.json")
    found = problems(path)
    assert found[0].startswith("F:chunk-4-trace.csv: ")
    (path / "chunk-4-dataset.json").unlink()
    assert "no lengths for it" in problems(path)[0]
    (path / "chunk-3-trace.csv").unlink()
    assert "no chunk-N-trace.csv" in problems(path)[0]


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def test_archives_that_lie(tmp_path):
    path = tmp_path / "a.tar"
    good = (
        (member("chunk-3-trace.csv"), TRACE.encode()),
        (member("chunk-3-dataset.json"), json.dumps({"0": TABLE}).encode()),
    )
    path.write_bytes(tar_bytes(*good))
    assert len(read(path, ReadOptions()).arrival_ns) == 250
    path.write_bytes(tar_bytes(*good, (member("x/chunk-3-trace.csv"), b"")))
    assert "two files" in problems(path)[0]
    path.write_bytes(tar_bytes((member("chunk-3-trace.csv", tarfile.SYMTYPE, "/etc/passwd"), b"")))
    assert "link" in problems(path)[0]
    lying = bytearray(tar_bytes(*good))
    lying[124:136] = b"77777777777\0"  # a size of 8 GiB
    lying[148:156] = b"        "
    lying[148:156] = b"%06o\0 " % sum(lying[:512])
    path.write_bytes(bytes(lying))
    assert "unexpected end of data" in problems(path)[0]
    path.write_bytes(tar_bytes(*good)[:700])
    assert problems(path)
    path.write_bytes(b"not an archive" * 100)
    assert "tar archive" in problems(path)[0]
    path.write_bytes(b"")
    assert problems(path)
