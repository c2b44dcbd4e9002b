"""Routing traces: what is read back, and that what cannot be replayed is refused with its place and mend."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces import routing_npz

TOKENS, LAYERS, TOP_K, EXPERTS = 12, 3, 2, 8


def arrays(**changes):
    ids = np.random.default_rng(1).random((TOKENS, LAYERS, EXPERTS)).argsort(2)[:, :, :TOP_K].astype(np.int32)
    out = {
        "expert_ids": ids,
        "weights": np.full(ids.shape, 0.25, np.float32),
        "sequence_id": np.array([4] * 5 + [9] * 7),
        "num_experts": np.array(EXPERTS),
        "top_k": np.array(TOP_K),
        "layer_index": np.array([1, 2, 5]),
        "scores": np.random.default_rng(2).normal(size=(TOKENS, LAYERS, EXPERTS)).astype(np.float16),
        "token_id": np.arange(TOKENS) * 3,
        "phase": np.array([0] * 9 + [1] * 3),
    } | changes
    return {k: v for k, v in out.items() if v is not None}


def written(tmp_path, **changes):
    path = tmp_path / "trace.npz"
    np.savez_compressed(path, **arrays(**changes))
    return path


def refused(path, *words):
    with pytest.raises(BadInput) as caught:
        routing_npz.read(path)
    text = str(caught.value)
    assert str(path.name) in text
    for word in words:
        assert word in text, text
    return text


def test_a_trace_is_read_back(tmp_path):
    source = routing_npz.read(written(tmp_path))
    assert source.expert_TLK.dtype == np.uint8
    np.testing.assert_array_equal(source.expert_TLK, arrays()["expert_ids"])
    assert source.sequence_start.tolist() == [0, 5, 12]
    assert source.layer_index == (1, 2, 5)
    assert (source.num_experts, source.top_k, source.recorded) == (8, 2, True)
    assert source.weight_TLK.dtype == np.float16
    np.testing.assert_array_equal(source.score_TLE, arrays()["scores"])
    assert source.score_TLE.dtype == np.float16
    assert source.token_T.tolist() == list(range(0, 36, 3))
    assert source.phase_T.tolist() == [0] * 9 + [1] * 3


def test_scores_tokens_and_phases_are_optional(tmp_path):
    source = routing_npz.read(written(tmp_path, scores=None, token_id=None, phase=None))
    assert (source.score_TLE, source.token_T, source.phase_T) == (None, None, None)


def test_scores_say_how_many_experts_there_are(tmp_path):
    source = routing_npz.read(written(tmp_path, num_experts=None))
    assert (source.num_experts, source.warnings) == (EXPERTS, ())


def test_facts_of_tokens_keep_step(tmp_path):
    source = routing_npz.read(written(tmp_path))
    turned = source.take_sequences(np.array([1, 0]))
    order = [*range(5, 12), *range(5)]
    np.testing.assert_array_equal(turned.score_TLE, source.score_TLE[order])
    np.testing.assert_array_equal(turned.token_T, source.token_T[order])
    np.testing.assert_array_equal(turned.phase_T, source.phase_T[order])
    other = source.with_ids(source.expert_TLK, "other")
    assert other.score_TLE is None, "scores belong to the experts chosen by them"
    assert other.token_T is source.token_T
    assert other.phase_T is source.phase_T


def test_a_folder_holds_the_same_and_is_mapped(tmp_path):
    path = written(tmp_path)
    routing_npz.convert(path, tmp_path / "folder")
    plain, mapped = routing_npz.read(path), routing_npz.read(tmp_path / "folder")
    assert isinstance(mapped.expert_TLK, np.memmap)
    np.testing.assert_array_equal(plain.expert_TLK, mapped.expert_TLK)
    np.testing.assert_array_equal(plain.weight_TLK, mapped.weight_TLK)
    np.testing.assert_array_equal(plain.sequence_start, mapped.sequence_start)
    assert isinstance(mapped.score_TLE, np.memmap)
    np.testing.assert_array_equal(plain.score_TLE, mapped.score_TLE)
    np.testing.assert_array_equal(plain.token_T, mapped.token_T)
    np.testing.assert_array_equal(plain.phase_T, mapped.phase_T)
    assert mapped.layer_index == plain.layer_index
    routing_npz.write_folder(plain, tmp_path / "again")
    again = routing_npz.read(tmp_path / "again")
    np.testing.assert_array_equal(again.expert_TLK, plain.expert_TLK)
    np.testing.assert_array_equal(again.score_TLE, plain.score_TLE)
    np.testing.assert_array_equal(again.phase_T, plain.phase_T)


def test_fortran_order_and_byte_order_are_read(tmp_path):
    ids = np.asfortranarray(arrays()["expert_ids"].astype(">i8"))
    np.testing.assert_array_equal(routing_npz.read(written(tmp_path, expert_ids=ids)).expert_TLK, ids)


def test_what_is_missing_is_assumed_and_said(tmp_path):
    path = written(tmp_path, sequence_id=None, num_experts=None, top_k=None, weights=None, scores=None)
    source = routing_npz.read(path)
    assert source.sequence_start.tolist() == [0, 12]
    assert len(source.warnings) == 2
    assert routing_npz.read(path, 8).num_experts == 8


def with_id(value):
    ids = arrays()["expert_ids"]
    ids[4, 1, 0] = value
    return ids


def with_score(value):
    scores = np.zeros((TOKENS, LAYERS, EXPERTS), np.float32)
    scores[7, 2, 3] = value
    return scores


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_ids": None}, ["`expert_ids`"]),
        ({"expert_ids": with_id(8)}, ["id 8 at token 4, layer 1", "8 experts"]),
        ({"expert_ids": with_id(-1)}, ["-1", "token 4, layer 1", "padd", ">= 0"]),
        ({"expert_ids": with_id(-7)}, ["-7", "below 0"]),
        ({"expert_ids": np.zeros((12, 3, 2), int)}, ["distinct", "token 0, layer 0", "[0, 0]"]),
        ({"expert_ids": np.zeros((12, 3, 2))}, ["integers", "float64"]),
        ({"expert_ids": np.zeros((12, 6), int)}, ["[tokens, layers, top_k]"]),
        ({"expert_ids": np.zeros((0, 3, 2), int)}, ["at least one token"]),
        ({"top_k": np.array(4)}, ["top_k", "4", "2"]),
        ({"num_experts": np.array(1)}, ["num_experts", "1"]),
        ({"num_experts": np.array(1 << 40)}, ["num_experts"]),
        ({"num_experts": np.array([8, 8])}, ["one number"]),
        ({"weights": np.ones((12, 3, 1), np.float32)}, ["weights", "shape"]),
        ({"weights": np.full((12, 3, 2), np.nan)}, ["weights", "NaN", "token 0"]),
        ({"weights": np.full((12, 3, 2), 1e9)}, ["weights", "65504"]),
        ({"weights": np.full((12, 3, 2), -0.5)}, ["not negative"]),
        ({"sequence_id": np.array([4] * 5 + [9] * 6 + [4])}, ["id 4 comes back", "Sort"]),
        ({"sequence_id": np.arange(11)}, ["(12,)", "(11,)"]),
        ({"sequence_id": np.full(12, 0.5)}, ["integers"]),
        ({"layer_index": np.array([1, 1, 2])}, ["rising"]),
        ({"layer_index": np.array([1, 2])}, ["layer_index"]),
        ({"scores": np.zeros((12, 3, 7), np.float16)}, ["scores", "(12, 3, 8)", "(12, 3, 7)"]),
        ({"scores": np.zeros((11, 3, 8), np.float16)}, ["scores", "(12, 3, 8)"]),
        ({"scores": np.zeros((12, 24), np.float16)}, ["scores", "(12, 24)"]),
        ({"scores": np.zeros((12, 3, 8), np.int32)}, ["scores", "int32"]),
        ({"scores": with_score(np.nan)}, ["scores", "NaN", "token 7"]),
        ({"scores": with_score(-np.inf)}, ["scores", "token 7"]),
        ({"scores": with_score(1e6)}, ["scores", "65504", "token 7"]),
        ({"token_id": np.arange(11)}, ["token_id", "(12,)", "(11,)"]),
        ({"token_id": np.arange(12) - 1}, ["token_id", "token 0", "-1"]),
        ({"token_id": np.arange(12) + (1 << 40)}, ["token_id", "2147483647"]),
        ({"token_id": np.zeros(12)}, ["token_id", "integers"]),
        ({"phase": np.arange(12)}, ["phase", "token 2", "prefill", "decode"]),
        ({"phase": np.zeros((12, 1), int)}, ["phase", "(12, 1)"]),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_refused(tmp_path, changes, words):
    path = written(tmp_path, **changes)
    refused(path, *words)
    if changes.get("num_experts", 0) is not None:
        with pytest.raises(BadInput):
            routing_npz.convert(path, tmp_path / "folder")
        assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"], "nothing is left behind"


def test_scores_that_declare_more_than_there_is(tmp_path):
    path = written(tmp_path, scores=None)
    member = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (12, 3, 1000000000000), }", b"\x00" * 64)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("scores.npy", member)
    refused(path, "scores", "72000000000000 bytes", "64 bytes")
    with pytest.raises(BadInput, match="72000000000000"):
        routing_npz.convert(path, tmp_path / "folder")


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "trace.npz"
    np.savez(path, **arrays(sequence_id=np.array([{"a": 1}] * 12, object)))
    refused(path, "sequence_id", "unpickled")


def npy(header: str, data: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def raw(tmp_path, member: bytes):
    path = tmp_path / "trace.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("expert_ids.npy", member)
    return path


def test_a_header_that_declares_more_than_there_is(tmp_path):
    member = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 58, 8), }", b"\x00" * 64)
    refused(raw(tmp_path, member), "464000000000000 bytes", "64 bytes")


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"\x93NUMPY",
        b"not an array at all",
        npy("{'descr': '|u1', 'shape': ", b"\x00"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1), }", b"\x00" * 8),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1, 1), }", b"\x00"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 3, 4), }", b"\x00" * 24),
    ],
)
def test_damaged_members(tmp_path, member):
    refused(raw(tmp_path, member), "expert_ids")


def test_files_that_are_cut_off_or_no_archive(tmp_path):
    whole = written(tmp_path).read_bytes()
    for cut in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.npz"
        path.write_bytes(whole[:cut])
        refused(path)
    flipped = bytearray(whole)
    flipped[whole.index(b"expert_ids.npy") + 80] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", "expert_ids")
    refused(tmp_path / "absent.npz", "no such")


def test_a_bomb_is_refused_by_its_declared_size(tmp_path):
    path = tmp_path / "bomb.npz"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "expert_ids.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1), }", b"\x00")
        )
    data = bytearray(buffer.getvalue())
    at = data.rindex(b"PK\x01\x02") + 24  # the uncompressed size in the central directory
    data[at : at + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "deflate")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("meta.json", "{"),
        ("meta.json", "[]"),
        ("meta.json", '{"format": "moesim-routing", "num_experts": "8", "top_k": 2}'),
        ("meta.json", '{"format": "moesim-routing", "num_experts": 4, "top_k": 2}'),
        ("meta.json", '{"format": "moesim-routing", "num_experts": 8, "top_k": 3}'),
        ("meta.json", '{"format": "moesim-routing", "num_experts": 8, "top_k": 2, "layer_index": "x"}'),
        ("meta.json", None),
        ("expert_ids.npy", None),
        ("expert_ids.npy", "x"),
        ("sequence_start.npy", np.array([0, 5])),
        ("sequence_start.npy", np.array([0, 5, 5, 12])),
        ("sequence_start.npy", np.array([0.0, 12.0])),
        ("weights.npy", np.ones(3, np.float16)),
        ("scores.npy", np.ones((12, 3, 7), np.float16)),
        ("scores.npy", np.ones((12, 3, 8), np.float32)),
        ("scores.npy", "x"),
        ("token_id.npy", np.arange(5)),
        ("phase.npy", np.full(12, 2)),
        ("expert_ids.npy", np.zeros((12, 3, 2), np.uint8)),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, name, text):
    folder = tmp_path / "folder"
    routing_npz.convert(written(tmp_path), folder)
    if text is None:
        (folder / name).unlink()
    elif isinstance(text, str):
        (folder / name).write_text(text)
    else:
        np.save(folder / name, text)
    refused(folder)


def test_a_folder_cut_off(tmp_path):
    folder = tmp_path / "folder"
    routing_npz.convert(written(tmp_path), folder)
    data = (folder / "expert_ids.npy").read_bytes()
    (folder / "expert_ids.npy").write_bytes(data[:-1])
    refused(folder, "cut off")


def test_converting_never_overwrites(tmp_path):
    path = written(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        routing_npz.convert(path, tmp_path / "there")
    with pytest.raises(BadInput, match="does not exist"):
        routing_npz.convert(path, tmp_path / "no" / "such")
    routing_npz.convert(path, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "meta.json").read_text())["source"] == "trace.npz"


DATA = Path(__file__).parents[2].parent / "shared" / "data" / "routing"


@pytest.mark.skipif(not DATA.exists(), reason="recorded routing is in ../shared/data, which is not here")
def test_the_recorded_traces_are_read():
    source = routing_npz.read(DATA / "esft_dsv2lite_summary.npz")
    assert (source.num_tokens, source.num_layers, source.num_sequences) == (8479, 26, 13)
    assert source.layer_index == tuple(range(1, 27))
    assert source.warnings == ()
