"""The journal of a study: whatever was acknowledged is there, wherever the file was cut off; damage is said to be."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.store import journal as journal_module
from moesim_tuner.store.journal import Found, Journal, read_journal
from moesim_tuner.store.kept import Kept, batch_record, canonical_export

from moesim.errors import BadInput
from tests.build_study import candidate, definition, in_child, trial

SMALL = {"text": "", "name": "", "base": "", "overrides": [], "fields": [], "plugins": [], "rungs": [], "sampler": ""}


def written(path: Path, batches: int = 2, small: bool = False) -> list[bytes]:
    """A journal of some batches of three; its lines."""
    told = {**SMALL, "spec": {"trials": 9, "objectives": []}} if small else definition().to_json()
    kept = Kept("world", told, "1")
    journal = Journal(path, Found())
    journal.append(*kept.header())
    for first in range(0, 3 * batches, 3):
        journal.append("proposed", batch_record(first, [candidate(n) for n in range(first, first + 3)]))
        journal.append("trials", [trial(first).to_json(), trial(first + 2).to_json()])
        journal.append("trials", [trial(first + 1).to_json()])
    journal.append("note", {"name": "judge", "value": {"winner": 1}})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def expected(lines: list[bytes], count: int) -> tuple[list[int], int]:
    """Numbers of the trials in the first `count` lines, and how many were proposed: from the JSON alone."""
    numbers: list[int] = []
    proposed = 0
    for line in lines[:count]:
        record = json.loads(line)
        if record["kind"] == "trials":
            numbers += [t["number"] for t in record["data"]]
        elif record["kind"] == "proposed":
            proposed += len(record["data"]["candidates"])
    return sorted(numbers), proposed


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "j"
    lines = written(path, batches=4)
    found = read_journal(path)
    assert found.kept is not None
    assert found.kept.trials == [trial(n) for n in range(12)]
    assert found.kept.batches == [[candidate(n) for n in range(f, f + 3)] for f in range(0, 12, 3)]
    assert found.kept.notes == {"judge": {"winner": 1}}
    assert found.kept.definition == definition().to_json()
    assert (found.num_records, found.whole_bytes, found.torn_bytes) == (len(lines), path.stat().st_size, 0)
    assert [json.loads(line)["seq"] for line in lines] == list(range(len(lines)))


def test_every_cut_point(tmp_path):
    """Cut anywhere, the whole records before are there; what follows is cut off and written anew, and the file is then
    the same, byte for byte, as one that was never cut."""
    path = tmp_path / "j"
    lines = written(path, batches=1, small=True)
    whole = path.read_bytes()
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    for cut in range(len(whole), -1, -1):
        os.truncate(path, cut)
        found = read_journal(path)
        count = max(n for n, end in enumerate(ends) if end <= cut)
        assert (found.num_records, found.whole_bytes, found.torn_bytes) == (count, ends[count], cut - ends[count])
        if count == 0:
            assert found.kept is None
        else:
            numbers, proposed = expected(lines, count)
            assert found.kept is not None
            assert [t.number for t in found.kept.trials] == numbers
            assert found.kept.num_proposed == proposed
        if cut % 397 == 0 or cut in ends:
            again = tmp_path / "again"
            again.write_bytes(whole[:cut])
            journal = Journal(again, found)
            for line in lines[count:]:
                record = json.loads(line)
                journal.append(record["kind"], record["data"])
            journal.close()
            assert again.read_bytes() == whole


@given(st.data())
@settings(max_examples=60)
def test_garbage_after_the_last_whole_record(tmp_path_factory, data):
    """A page that never reached the disk, or reached it as something else: zeros, line ends, bytes."""
    path = tmp_path_factory.mktemp("journal") / "j"
    lines = written(path, batches=1, small=True)
    count = data.draw(st.integers(0, len(lines)), label="whole records")
    begun = b"" if count == len(lines) else lines[count][: data.draw(st.integers(0, len(lines[count]) - 1))]
    garbage = data.draw(
        st.one_of(st.binary(max_size=300), st.just(b"\0" * 4096), st.just(b"\n{}\n\n")), label="garbage"
    )
    tail = begun + garbage
    if count < len(lines) and tail.startswith(lines[count]):
        return
    path.write_bytes(b"".join(lines[:count]) + tail)
    found = read_journal(path)
    assert (found.num_records, found.torn_bytes) == (count, len(tail))
    Journal(path, found).close()
    assert path.read_bytes() == b"".join(lines[:count])


@given(st.data())
@settings(max_examples=60)
def test_damage_before_a_whole_record_is_said_to_be(tmp_path_factory, data):
    """Any changed byte in any line but the last: the file, the line and what to do."""
    path = tmp_path_factory.mktemp("journal") / "j"
    lines = written(path, batches=1, small=True)
    number = data.draw(st.integers(0, len(lines) - 2), label="line")
    at = data.draw(st.integers(0, len(lines[number]) - 1), label="byte")
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != lines[number][at]), label="becomes")
    lines[number] = lines[number][:at] + bytes([byte]) + lines[number][at + 1 :]
    path.write_bytes(b"".join(lines))
    with pytest.raises(BadInput) as caught:
        read_journal(path)
    assert f"{path}:{number + 1}: " in str(caught.value)
    assert "restored from its database" in str(caught.value)


@pytest.mark.parametrize("change", ["remove", "double", "swap"])
def test_lines_out_of_order(tmp_path, change):
    path = tmp_path / "j"
    a, b, c, *rest = written(path)
    path.write_bytes(b"".join({"remove": [a, c], "double": [a, b, b, c], "swap": [a, c, b]}[change] + rest))
    with pytest.raises(
        BadInput, match=rf"{path}:[23]: record . stands in place of .: a line was removed, added or moved"
    ):
        read_journal(path)


def with_sum(record: dict[str, object]) -> bytes:
    return journal_module.line_of(record["kind"], record["data"], record["seq"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "trials", "data": [{"number": 1}], "seq": 1}, "'point' is missing"),
        ({"kind": "trials", "data": 3, "seq": 1}, "not iterable"),
        ({"kind": "trials", "data": [trial(0).to_json()], "seq": 1}, "trial 0 was not proposed"),
        ({"kind": "proposed", "data": {"first": 4, "candidates": []}, "seq": 1}, "a batch from trial 4, where 0 comes"),
        ({"kind": "gossip", "data": {}, "seq": 1}, "a record of the kind 'gossip'"),
        ({"kind": "definition", "data": definition("seed: 2\n").to_json(), "seq": 1}, "a definition of another study"),
        (
            {"kind": "proposed", "data": {"first": 0, "candidates": [{"point": {"a": []}, "origin": ""}]}, "seq": 1},
            "a point maps parameters to scalars",
        ),
    ],
)
def test_whole_records_that_cannot_be(tmp_path, record, message):
    path = tmp_path / "j"
    path.write_bytes(written(path)[0] + with_sum(record))
    with pytest.raises(BadInput, match=f"{path}:2: .*{message}"):
        read_journal(path)


def test_other_first_records(tmp_path):
    path = tmp_path / "j"
    header = json.loads(written(path)[0])
    newer = {**header, "data": {**header["data"], "format": 2}}
    path.write_bytes(with_sum(newer))
    with pytest.raises(BadInput, match="format 2, by a newer moesim; this one knows up to 1: update it"):
        read_journal(path)
    other = {**header, "data": {**header["data"], "definition": definition("seed: 2\n").to_json()}}
    path.write_bytes(with_sum(other))
    with pytest.raises(BadInput, match="do not belong together"):
        read_journal(path)
    path.write_bytes(with_sum({"kind": "note", "data": {}, "seq": 0}))
    with pytest.raises(BadInput, match="the first record says what the study is"):
        read_journal(path)


def test_depth_size_and_kind_of_file_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "j"
    first = written(path)[0]
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    path.write_bytes(first + with_sum({"kind": "note", "data": {"name": "x", "value": deep}, "seq": 1}))
    with pytest.raises(BadInput, match="JSON may nest 64 levels"):
        read_journal(path)
    monkeypatch.setattr(journal_module, "MAX_LINE_BYTES", 1000)
    with pytest.raises(BadInput, match=r"a record of \d+ bytes; a line of a journal has 1000 at most"):
        journal_module.line_of("note", {"name": "x", "value": "y" * 1000}, 1)
    monkeypatch.setattr(journal_module, "MAX_JOURNAL_BYTES", 1000)
    with pytest.raises(BadInput, match="at most 1000 are read"):
        read_journal(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="a regular file"):
        read_journal(tmp_path / "fifo")


def test_no_room(tmp_path):
    """A file that may not grow any further (RLIMIT_FSIZE, in a process of its own): one message, nothing half written
    stays, and once there is room the same journal goes on."""
    path, said = tmp_path / "j", tmp_path / "said"
    lines = written(path)
    path.write_bytes(b"".join(lines[:4]))

    def child() -> None:
        whole = sum(map(len, lines[:5]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 100, resource.RLIM_INFINITY))
        journal = Journal(path, read_journal(path))
        journal.append("proposed", batch_record(3, [candidate(n) for n in (3, 4, 5)]))
        errors = []
        for _ in range(2):
            try:
                journal.append("trials", [trial(3).to_json(), trial(5).to_json()])
            except OSError as error:
                errors.append(f"{error.errno} {error.filename} {error.strerror} {path.stat().st_size - whole}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.append("trials", [trial(3).to_json(), trial(5).to_json()])
        said.write_text("\n".join(errors))

    in_child(child)
    message = "no room is left (File too large); the 3 trials kept so far are safe: make room and resume"
    assert said.read_text().splitlines() == [f"{errno.EFBIG} {path} {message} 0"] * 2
    assert path.read_bytes() == b"".join(lines[:6])


def test_a_write_that_fails_half_way_and_cannot_be_cut_off(tmp_path, monkeypatch):
    """Then nothing more is written: what would come after a broken line would be damage."""
    path = tmp_path / "j"
    lines = written(path)
    path.write_bytes(b"".join(lines[:2]))
    journal = Journal(path, read_journal(path))
    real = os.write

    def half(file: int, data: memoryview) -> int:
        if len(data) < 200:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, data[:-100])

    def refuse(file: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr(os, "write", half)
        m.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="the 0 trials kept so far are safe"):
            journal.append("trials", [trial(0).to_json()])
    with pytest.raises(OSError, match="a half written record could not be cut off"):
        journal.append("trials", [trial(0).to_json()])
    journal.close()
    found = read_journal(path)
    assert found.num_records == 2
    assert found.torn_bytes > 0


def test_each_record_is_synced_before_append_returns(tmp_path, monkeypatch):
    """And the folder, once the file is new."""
    calls: list[str] = []
    for name in ("write", "fdatasync", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    kept = Kept("world", definition().to_json(), "1")
    journal = Journal(tmp_path / "j", Found())
    assert calls == ["fsync", "fsync"]
    journal.append(*kept.header())
    journal.append("proposed", batch_record(0, [candidate(0)]))
    assert calls[2:] == ["write", "fdatasync"] * 2
    journal.close()


def test_export_has_no_clock_and_no_place():
    def study(clock_s: float, base: str, name: str) -> Kept:
        kept = Kept(name, definition(base=base).to_json(), "1")
        kept.propose(0, [candidate(n) for n in range(9)])
        kept.append(
            [trial(n, clock_s=clock_s) for n in (3, 1, 0, 2)] + [trial(n, clock_s=clock_s) for n in range(4, 9)]
        )
        return kept

    one, other = study(1e9, "/here", "a"), study(2e9, "/there", "b")
    assert canonical_export(one) == canonical_export(other)
    lines = [json.loads(line) for line in canonical_export(one).splitlines()]
    assert [line["trial"]["number"] for line in lines if "trial" in line] == list(range(9))
    assert all("started_s" not in line["trial"] for line in lines if "trial" in line)
    changed = Kept("a", definition().to_json(), "1")
    changed.propose(0, [candidate(n) for n in range(9)])
    changed.append([trial(n, changes=1e-12 if n == 5 else 0.0) for n in range(9)])
    assert canonical_export(changed) != canonical_export(one)
