"""Whatever the file or the spec: a stream that keeps its invariants, or BadInput; never another exception."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moesim.errors import BadInput, Problem
from moesim.traces import _table
from moesim.workload.generators import LengthsSpec, draw_lengths
from moesim.workload.requests import RequestsSpec, build_requests

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOKENS = st.integers(1, 2**31)


def tar_of(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


VALID: dict[str, bytes] = {
    "azure": b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
    b"2023-11-16 18:17:04.0319600,3180,8\r\n",
    "burstgpt": b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b'5,1,2.5,m,472,18,490,"a, b"\n9,,2.5,m,3,0,3,c\n',
    "csv": b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.510030,395,112\n0.522695,1030,403\n",
    "mooncake": b'{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    b'{"timestamp": 27.5, "input_length": 7, "output_length": 5}\n',
    "vllm_bench": json.dumps(
        {"input_lens": [1, 2], "output_lens": [3, 4], "start_times": [5.5, 6.25], "errors": ["", ""]}
    ).encode(),
    "servegen": tar_of(
        {
            "d/chunk-0-trace.csv": "0,0.1,1.5,Gamma,0.4,2.5\n60,0.2,1.1,Weibull,0.9,3\n",
            "d/chunk-0-dataset.json": json.dumps(
                {"0": {"input_tokens": "{5: 0.25, 9: 0.75}", "output_tokens": "{3: 1.0}", "reason_ratio": "{}"}}
            ),
        }
    ),
}


def build(data: bytes, folder: Path, **keys: Any) -> str:
    """'stream' when the data gave one (which checks itself when it is made), else 'refused'."""
    (folder / "trace").write_bytes(data)
    problems: tuple[Problem, ...] = ()
    try:
        stream = build_requests(RequestsSpec(path="trace", **keys), folder, 1)
    except BadInput as error:
        problems = error.problems
    if problems:
        assert all(problem.where and problem.message and len(str(problem)) < 1000 for problem in problems)
        return "refused"
    stream._check()
    assert stream.arrival_ns[0] == 0
    return "stream"


@pytest.mark.parametrize("name", sorted(VALID))
def test_the_examples_are_valid(name, tmp_path):
    assert build(VALID[name], tmp_path, format=name) == "stream"


@pytest.mark.parametrize("name", sorted(VALID))
@SETTINGS
@given(data=st.data())
def test_a_damaged_file_gives_a_stream_or_bad_input(name, tmp_path, data):
    damaged = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged)))
        cut = data.draw(st.integers(0, 6))
        piece = data.draw(
            st.binary(max_size=4)
            | st.sampled_from(
                [
                    b"-",
                    b"e9",
                    b"1e999",
                    b"nan",
                    b"9" * 30,
                    b'"',
                    b",",
                    b"\n",
                    b"\r",
                    b"{",
                    b"[" * 2000,
                    b"null",
                    b"\xff",
                ]
            )
        )
        damaged[place : place + cut] = piece
    build(bytes(damaged), tmp_path, format=name)


@pytest.mark.parametrize("name", sorted(VALID))
@SETTINGS
@given(data=st.binary(max_size=300))
def test_garbage_is_refused(name, tmp_path, data):
    assert build(data, tmp_path, format=name) == "refused"


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_file_cut_at_any_byte_gives_a_stream_or_bad_input(name, tmp_path):
    seen = {build(VALID[name][:size], tmp_path, format=name) for size in range(min(len(VALID[name]), 700))}
    assert "refused" in seen


@SETTINGS
@given(
    rows=st.lists(st.tuples(st.integers(0, 10**9), TOKENS, TOKENS), min_size=1, max_size=30), chunk=st.integers(1, 7)
)
def test_a_csv_comes_back_sorted_with_nothing_lost(tmp_path, rows, chunk):
    text = "arrival_s,prompt_tokens,output_tokens\n"
    text += "".join(f"{us // 10**6}.{us % 10**6:06d},{p},{o}\n" for us, p, o in rows)
    (tmp_path / "t.csv").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_table, "_CHUNK", chunk)  # so that chunks meet inside the file
        stream = build_requests(RequestsSpec(format="csv", path="t.csv"), tmp_path, 0)
    want = sorted(rows, key=lambda row: row[0])  # stable, as equal times keep the file's order
    assert stream.arrival_ns.tolist() == [(row[0] - want[0][0]) * 1000 for row in want]
    assert stream.prompt_tokens.tolist() == [row[1] for row in want]
    assert stream.output_tokens.tolist() == [row[2] for row in want]


CELL = st.text(" 0123456789+-.eEnaif_x\t", max_size=8) | st.integers(-3, 2**33).map(str) | st.floats().map(repr)


@SETTINGS
@given(texts=st.lists(CELL, min_size=1, max_size=6), kind=st.sampled_from(["tokens", "seconds"]))
def test_the_fast_reading_of_a_column_is_the_slow_one(texts, kind):
    cells = _table.tokens(1) if kind == "tokens" else _table.seconds
    try:
        fast = cells.many(texts).tolist()
    except ValueError:
        return
    assert fast == [cells.one(text) for text in texts]


@SETTINGS
@given(
    window=st.none() | st.tuples(st.floats(0, 40), st.floats(0, 40)),
    offset=st.integers(0, 12),
    limit=st.none() | st.integers(1, 12),
    scale=st.floats(0.01, 100),
)
def test_window_offset_limit_and_scale_agree_with_a_loop(tmp_path, window, offset, limit, scale):
    second = [3.0, 5.0, 5.0, 4.0, 9.5, 30.0, 30.0, 31.0, 22.25, 8.0]
    lines = [f"{s},{i + 1},1" for i, s in enumerate(second)]
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    chosen = sorted((s, i + 1) for i, s in enumerate(second))
    if window is not None:
        if not window[0] < window[1]:
            return
        chosen = [(s, i) for s, i in chosen if round(window[0] * 1e9) <= (s - 3.0) * 1e9 < round(window[1] * 1e9)]
    chosen = chosen[offset:][:limit]
    spec = RequestsSpec(format="csv", path="t.csv", window_s=window, offset=offset, limit=limit, rate_scale=scale)
    if not chosen:
        with pytest.raises(BadInput):
            build_requests(spec, tmp_path, 0)
        return
    stream = build_requests(spec, tmp_path, 0)
    assert stream.prompt_tokens.tolist() == [i for _, i in chosen]
    assert stream.arrival_ns.tolist() == [round((s - chosen[0][0]) * 1e9 / scale) for s, _ in chosen]


VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-2, 50)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(0, 9), max_size=3)
)
KINDS = ["constant", "uniform", "lognormal", "normal", "gamma", "geometric", "exponential", "empirical"]
LENGTH = st.fixed_dictionaries(
    {"distribution": st.sampled_from(KINDS)},
    optional={
        "mean": st.floats(0.1, 1e5),
        "cv": st.floats(0, 20),
        "min": st.integers(1, 100),
        "max": st.integers(1, 1000),
        "values": st.lists(TOKENS, max_size=4),
        "weights": st.lists(st.floats(0, 5), max_size=4),
    },
)


@SETTINGS
@given(lengths=LENGTH)
def test_any_lengths_are_refused_or_drawn_within_bounds(lengths):
    try:
        spec = LengthsSpec(**lengths)
    except ValidationError:
        return
    values, _ = draw_lengths(spec, 50, 3, "t")
    assert values.dtype == np.int64
    assert int(values.min()) >= (spec.min or 1)
    assert int(values.max()) <= (spec.max or 2**31)


@SETTINGS
@given(
    keys=st.dictionaries(st.sampled_from(sorted(RequestsSpec.model_fields)), VALUE, max_size=6),
    name=st.sampled_from(["poisson", "gamma", "fixed", "closed_loop", "azure", "csv", "none"]),
)
def test_any_spec_is_refused_or_gives_a_stream_or_bad_input(tmp_path, keys, name):
    plain = {"num_requests": 5, "rate_per_s": 2.0, "prompt_tokens": 5, "output_tokens": 5} if name == "poisson" else {}
    try:
        spec = RequestsSpec(**(plain | keys | {"format": name}))
    except ValidationError:
        return
    with contextlib.suppress(BadInput):
        build_requests(spec, tmp_path, 0)._check()
