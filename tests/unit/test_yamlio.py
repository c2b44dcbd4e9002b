"""The strict YAML reader: scalars by YAML 1.2, and each refusal with its place."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import BadInput, Problem
from moesim.scenario import yamlio
from moesim.scenario.yamlio import dump_yaml, load_yaml, parse_yaml


def value(text: str) -> Any:
    return parse_yaml(f"x: {text}\n", "f.yaml")[0]["x"]


def refusal(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse_yaml(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 1e-3),
        ("1e5", 1e5),
        ("-2.5E+2", -250.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("017", 17),
        ("0o17", 15),
        ("0x1f", 31),
        ("+7", 7),
        ("-0", 0),
        ("9223372036854775807", 2**63 - 1),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
    ],
)
def test_scalars_are_read_by_yaml_1_2(text: str, expected: object) -> None:
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "y",
        "N",
        "12:30",
        "12:30:45",
        "2026-11-22",
        "1_000",
        "0b11",
        "1e",
        "0o8",
    ],
)
def test_other_plain_scalars_stay_text(text: str) -> None:
    assert value(text) == text


def test_quoted_scalars_are_text() -> None:
    assert value('"1e-3"') == "1e-3"
    assert value("'null'") == "null"


@pytest.mark.parametrize("text", [".nan", ".inf", "-.Inf", "1e400", "-1e999", "9223372036854775808", "0x" + "f" * 20])
def test_numbers_that_are_not_finite_or_too_large_are_refused(text: str) -> None:
    message = refusal(f"a: 1\nx: {text}\n")
    assert message.startswith("f.yaml:2:4: ")


def test_every_bad_scalar_and_key_is_reported_at_once() -> None:
    message = refusal("a: .nan\na: 2\n1: x\nb: !!python/object:os.system {}\n")
    lines = message.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["f.yaml:1:4", "f.yaml:2:1", "f.yaml:3:1", "f.yaml:4:4"]
    assert "already on line 1" in lines[1]
    assert "must be text" in lines[2]
    assert "tag" in lines[3]


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("a: {b: 1, b: 2}", "1:11", "again"),
        ("a: 1\n---\nb: 2\n", "2:1", "second document"),
        ("a: &x [1]\nb:\n  <<: *x\n", "3:3", "merge keys"),
        ("a: *x\n", "1:4", "no anchor"),
        ("a: &x [*x]\n", "1:8", "inside its own anchor"),
        ("a:\n\tb: 1\n", "2:1", "tab"),
        ("a: [1, 2\n", "2:1", "not YAML"),
        ("a: b: c\n", "1:5", "quotes"),
        ("a: 'x\n", "2:1", "not YAML"),
        ("? [1, 2]\n: 3\n", "1:3", "must be text"),
        ("a: \x00\n", "1:4", "U+0000"),
        ('a: "\\ud800"\n', "1:4", "surrogate"),
        ("%YAML 3.0\n---\na: 1\n", "1:1", "not YAML"),
    ],
)
def test_refusals_name_the_place(text: str, place: str, word: str) -> None:
    message = refusal(text)
    assert message.startswith(f"f.yaml:{place}: "), message
    assert word in message
    assert len(message.splitlines()) == 1


def test_depth_is_bounded_without_recursion() -> None:
    assert "deeper than 50" in refusal("a: " + "[" * 100_000)
    assert "deeper than 50" in refusal("".join(" " * i + "a:\n" for i in range(200)))
    data, _ = parse_yaml("[" * 50 + "]" * 50, "f.yaml")
    assert data == eval("[" * 50 + "]" * 50)


def test_depth_counts_what_aliases_add() -> None:
    text = "a0: &a0 [[[[[[[[[[1]]]]]]]]]]\n"
    text += "".join(f"a{i}: &a{i} [[[[[[[[[*a{i - 1}]]]]]]]]]\n" for i in range(1, 6))
    assert "deeper than 50" in refusal(text)


def test_an_alias_bomb_is_refused() -> None:
    text = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "aliases repeat more than" in refusal(text)


def test_a_small_alias_is_a_copy_with_its_own_place() -> None:
    data, marks = parse_yaml("a: &x {k: [1, 2]}\nb: *x\n", "f.yaml")
    assert data == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}}
    assert data["a"] is not data["b"]
    assert data["a"]["k"] is not data["b"]["k"]
    assert marks[("b",)] == (2, 4)
    assert marks[("b", "k", 1)] == (1, 15)


def test_nodes_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(yamlio, "MAX_NODES", 100)
    assert "more than 100 values" in refusal("a: [" + "1," * 200 + "]")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(BadInput, match="at most 1048576 are read"):
        load_yaml(big)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1\n")
    with pytest.raises(BadInput, match=r"no such file; did you mean quickstart\.yaml"):
        load_yaml(tmp_path / "quickstrat.yaml")
    with pytest.raises(BadInput, match="folder"):
        load_yaml(tmp_path)
    with pytest.raises(BadInput, match=r"folder .* is not there"):
        load_yaml(tmp_path / "x" / "y.yaml")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BadInput, match="not a regular file"):
        load_yaml(fifo)
    with pytest.raises(BadInput, match="cannot be read"):
        load_yaml(Path("a\0b"))


def test_bytes_that_are_not_utf8_name_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\xfe\n")
    with pytest.raises(BadInput, match=r"x\.yaml:2:4: byte 0xff"):
        load_yaml(path)
    path.write_bytes("\ufeffa: 1\n".encode())
    assert load_yaml(path)[0] == {"a": 1}


def test_marks_find_values_keys_and_the_nearest_parent() -> None:
    _, marks = parse_yaml("a:\n  b: 1\n  c: [5, 6]\n", "f.yaml")
    assert marks.where(("a", "b")) == "f.yaml:2:6"
    assert marks.where(("a", "b"), key=True) == "f.yaml:2:3"
    assert marks.where(("a", "c", 1)) == "f.yaml:3:10"
    assert marks.where(("a", "missing", "deeper")) == "f.yaml:1:1"
    assert marks.where(()) == "f.yaml:1:1"


def test_empty_documents_are_none() -> None:
    assert parse_yaml("", "f.yaml")[0] is None
    assert parse_yaml("# only a comment\n", "f.yaml")[0] is None


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_one_way(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        parse_yaml(text, "f.yaml")
    except BadInput as error:
        problems = error.problems
    assert all(p.where.startswith("f.yaml") and p.message for p in problems)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_written_by_python_come_back(number: float) -> None:
    assert math.copysign(1, value(repr(number))) == math.copysign(1, number)
    assert value(repr(number)) == number


_scalars = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63) + 1, max_value=2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["no", "1e-3", "017", "null", "~", ".nan", "<<", "- a", "a: b", "#", "", " x ", "../d/f.csv"])
)
_keys = st.text(max_size=8) | st.sampled_from(["<<", "null", "1", "true"])


@given(st.recursive(_scalars, lambda c: st.lists(c, max_size=4) | st.dictionaries(_keys, c, max_size=4), max_leaves=20))
def test_what_is_dumped_is_read_back(data: Any) -> None:
    text = dump_yaml(data)
    got = parse_yaml(text, "f.yaml")[0]
    assert repr(got) == repr(data), text
