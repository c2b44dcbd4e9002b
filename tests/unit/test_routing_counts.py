"""Per-layer counts, from CSV and JSON."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces import routing_counts


def given(tmp_path, text, name="counts.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_csv_json_and_writing_agree(tmp_path):
    from_csv = routing_counts.read(given(tmp_path, "layer,e0,e1,e2\n4,1,0,2.5\n3,7,8,9\n"))
    assert from_csv.layer_index == (3, 4)
    assert from_csv.count_LE.tolist() == [[7, 8, 9], [1, 0, 2.5]]
    for name in ("again.csv", "again.json"):
        routing_counts.write(tmp_path / name, from_csv.layer_index, from_csv.count_LE)
        again = routing_counts.read(tmp_path / name)
        assert again.layer_index == (3, 4)
        np.testing.assert_array_equal(again.count_LE, from_csv.count_LE)
    listed = routing_counts.read(given(tmp_path, "[[1, 2], [3, 4]]", "list.json"))
    assert listed.layer_index == (0, 1)
    assert not listed.numbered


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ":1"),
        ("a,b\n1,2\n", ":1"),
        ("layer,e0\n", "no layer"),
        ("layer,e0,e1\n1,2\n", ":2"),
        ("layer,e0,e1\n1,2,x\n", ":2:3"),
        ("layer,e0,e1\n1,2,nan\n", ":2:3"),
        ("layer,e0,e1\n1,2,-1\n", ":2:3"),
        ("layer,e0,e1\n1,2,inf\n", ":2:3"),
        ("layer,e0,e1\n1.5,2,1\n", ":2"),
        ("layer,e0,e1\n1,2,1\n1,2,1\n", "once"),
        ("layer,e0,e1\n1,0,0\n", "layer 1"),
        ("layer,e0\n1,1e308\n2,1\n3,2\n\x00,1\n", "counts.csv"),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(tmp_path, text, place):
    with pytest.raises(BadInput) as caught:
        routing_counts.read(given(tmp_path, text))
    assert "counts.csv" in str(caught.value)
    assert place in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "3", "[]", "{}", '{"a": [1]}', '{"-1": [1]}', '{"1": 3}', '{"1": ["x"]}', '{"1": [1], "2": [1, 2]}',
     '{"1": []}', '{"1": [NaN]}', '{"1": [true]}', '{"1": [-1]}', '{"1": [0]}', "[" * 100000, '{"1": [1e999]}',
     '{"1": [1], "01": [2]}', '{"9' + "9" * 5000 + '": [1]}', '{"1": [' + "9" * 5000 + "]}"],
)  # fmt: skip
def test_a_bad_json_is_refused(tmp_path, text):
    with pytest.raises(BadInput) as caught:
        routing_counts.read(given(tmp_path, text, "counts.json"))
    assert "counts.json" in str(caught.value)


def test_an_absent_file_and_no_text(tmp_path):
    with pytest.raises(BadInput, match="no such"):
        routing_counts.read(tmp_path / "absent.csv")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00layer")
    with pytest.raises(BadInput, match="UTF-8"):
        routing_counts.read(path)
