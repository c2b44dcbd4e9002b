"""A file of SGLang's expert distribution recorder as arrays of integers.

What is in it: python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang (`_StatAccumulator.dump`,
`_DetailAccumulator.dump`, `_DetailSinglePassGatherer.collect`). This module turns shapes and types into arrays, bounded
in number and size; what the numbers mean is moesim's part (moesim/traces/sglang_recorder.py).

Legend: S rows of the buffer, R records (passes of a rank), L layers of the model, E logical experts, P physical ones,
T tokens of all records, K ids a token.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MOST_BYTES", "Refused", "check_archive", "to_arrays"]

MOST_BYTES = 2 << 30
"""of all arrays handed on, and of the pickle"""
_MOST_RECORDS = 1 << 20
_MOST_PICKLE_BYTES = 256 << 20


class Refused(Exception):
    """What is wrong with the file, in one sentence."""


def check_archive(path: Path) -> None:
    """A zip as torch.save writes it: stored members that fit in the file, one pickle among them. Raises Refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise Refused(f"no file that torch.save writes today, or cut off ({error})") from None
    total = sum(member.file_size for member in members)
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or total > path.stat().st_size:
        raise Refused("packed or overlapping members: torch.save stores them as they are, one after the other")
    pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Refused(f"a file of torch.save has one data.pkl, this one {len(pickles)}")
    if pickles[0].file_size > _MOST_PICKLE_BYTES:
        raise Refused(f"data.pkl has {pickles[0].file_size} bytes, at most {_MOST_PICKLE_BYTES} are read")


class _Room:
    """Bytes left to hand on."""

    def __init__(self) -> None:
        self.left = MOST_BYTES

    def take(self, number: int, name: str) -> None:
        self.left -= number
        if self.left < 0:
            raise Refused(f"{name}: the arrays of the file take more than {MOST_BYTES} bytes")


def _tensor(torch: Any, value: Any, name: str, ndim: int, room: _Room) -> Any:
    """A tensor of integers as an array. Raises Refused, before memory is taken, for anything else."""
    if type(value) is not torch.Tensor:
        raise Refused(f"{name}: a tensor is needed, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or value.is_complex():
        raise Refused(f"{name}: a plain tensor is needed, got {value.layout} {value.dtype} on {value.device}")
    if value.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise Refused(f"{name}: counts and ids are integers, got {value.dtype}")
    if value.dim() != ndim:
        raise Refused(f"{name}: {ndim} axes are needed, got shape {tuple(value.shape)}")
    size = value.numel() * value.element_size()
    if size > value.untyped_storage().nbytes():
        raise Refused(f"{name}: shape {tuple(value.shape)} over {value.untyped_storage().nbytes()} bytes of data")
    room.take(size, name)
    return np.ascontiguousarray(value.numpy())


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not -(2**62) < value < 2**62:
        raise Refused(f"{name}: a whole number is needed, got {type(value).__name__}")
    return value


def _integers(value: Any, name: str, room: _Room) -> Any:
    """A list of whole numbers as int64."""
    if type(value) is not list:
        raise Refused(f"{name}: a list is needed, got {type(value).__name__}")
    room.take(8 * len(value), name)
    if not all(type(x) is int and -(2**62) < x < 2**62 for x in value):
        raise Refused(f"{name}: whole numbers are needed")
    return np.array(value, np.int64)


def to_arrays(torch: Any, data: Any) -> dict[str, Any]:
    """The arrays of what torch.load gave. `kind` 0: stat, 1: per_pass, 2: per_token. Raises Refused.

    stat: logical_count [S, L, E]. Else forward_pass_id [R], rank [R], global_physical_count [R, L, P],
    last_physical_to_logical_map [L, P]; per_token also tokens [R], topk_ids [L, T, K], input_ids [T], positions [T],
    forward_mode [R], extend_tokens [.] and extends [R] (how many of them each record has; 0 where it has none).
    """
    room = _Room()
    if type(data) is not dict:
        raise Refused(f"a recording is a dictionary, got {type(data).__name__}")
    if "logical_count" in data:
        count = _tensor(torch, data["logical_count"], "logical_count", 3, room)
        return {"kind": np.array(0), "logical_count": count}
    if "records" not in data or "last_physical_to_logical_map" not in data:
        names = ", ".join(sorted(str(k)[:40] for k in list(data)[:8])) or "nothing"
        raise Refused(f"neither logical_count nor records with last_physical_to_logical_map; it has {names}")
    records = data["records"]
    if type(records) is not list or not all(type(r) is dict for r in records):
        raise Refused("records: a list of dictionaries is needed")
    if not 0 < len(records) <= _MOST_RECORDS:
        raise Refused(f"records: from 1 to {_MOST_RECORDS} are read, got {len(records)}")
    name = "last_physical_to_logical_map"
    arrays = {"kind": np.array(1), name: _tensor(torch, data[name], name, 2, room)}
    arrays |= _passes(torch, records, room)
    if any("topk_ids_of_layer" in record for record in records):
        arrays |= {"kind": np.array(2), **_tokens(torch, records, room)}
    return arrays


def _need(record: dict[Any, Any], key: str, number: int) -> Any:
    if key not in record:
        raise Refused(f"records[{number}]: {key} is missing")
    return record[key]


def _stacked(parts: list[Any], name: str, axis: int | None) -> Any:
    """Arrays stacked on a new first axis, or joined along one; equal otherwise."""
    shapes = {p.shape if axis is None else (*p.shape[:axis], *p.shape[axis + 1 :]) for p in parts}
    if len(shapes) > 1:
        raise Refused(f"{name}: the records have different shapes, {sorted(shapes)[:3]}")
    return np.stack(parts) if axis is None else np.concatenate(parts, axis)


def _passes(torch: Any, records: list[dict[Any, Any]], room: _Room) -> dict[str, Any]:
    count = [
        _tensor(torch, _need(r, "global_physical_count", i), f"records[{i}].global_physical_count", 2, room)
        for i, r in enumerate(records)
    ]
    arrays = {"global_physical_count": _stacked(count, "global_physical_count", None)}
    for key in ("forward_pass_id", "rank"):
        arrays[key] = np.array([_whole(_need(r, key, i), f"records[{i}].{key}") for i, r in enumerate(records)])
    return arrays


def _tokens(torch: Any, records: list[dict[Any, Any]], room: _Room) -> dict[str, Any]:
    ids, inputs, positions, modes, extends = [], [], [], [], []
    for i, record in enumerate(records):
        ids.append(_tensor(torch, _need(record, "topk_ids_of_layer", i), f"records[{i}].topk_ids_of_layer", 3, room))
        inputs.append(_integers(_need(record, "input_ids", i), f"records[{i}].input_ids", room))
        positions.append(_integers(_need(record, "positions", i), f"records[{i}].positions", room))
        modes.append(_whole(_need(record, "forward_mode", i), f"records[{i}].forward_mode"))
        given = record.get("extend_seq_lens")
        extends.append(_integers([] if given is None else given, f"records[{i}].extend_seq_lens", room))
        if not ids[-1].shape[1] == len(inputs[-1]) == len(positions[-1]):
            raise Refused(
                f"records[{i}]: {ids[-1].shape[1]} tokens in topk_ids_of_layer, {len(inputs[-1])} in input_ids,"
                f" {len(positions[-1])} in positions"
            )
    return {
        "topk_ids": _stacked(ids, "topk_ids_of_layer", 1),
        "tokens": np.array([len(x) for x in inputs], np.int64),
        "input_ids": np.concatenate(inputs),
        "positions": np.concatenate(positions),
        "forward_mode": np.array(modes, np.int64),
        "extend_tokens": np.concatenate(extends),
        "extends": np.array([len(x) for x in extends], np.int64),
    }
