"""A model's weights in one file: written from a seed, opened without trusting a number in it.

The format, all numbers little-endian:

| bytes | what |
|---|---|
| 0-7 | `MOESIMW1` |
| 8-15 | n, the bytes of the index, uint64, at most 16 MiB |
| 16-19 | CRC-32 of the index, uint32 |
| 20-31 | zeros |
| 32 to 32+n | the index: JSON, UTF-8 |
| then | zeros up to a multiple of 4096; the dense weights in the order of `ModelSizes.dense_shapes`, padded likewise |
| then | the experts, layer by layer: w13 [2F, H] (gate above up), w2 [H, F]; each padded to a multiple of 4096 |

The index is `{"format": 1, "seed": .., "sizes": {..}, "dense": [offset, bytes, crc], "experts": [[offset, bytes, crc],
..]}`, one entry a key, a CRC-32 over exactly `bytes`. Offsets and sizes follow from `sizes`, and a file whose index
says anything else, or which is not as long as they add up to, is refused before any memory is taken.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesim.arrays import U8Array
from moesim.errors import BadInput, Problem
from moesim.rng import generator
from moesim.strict_json import parse_json
from moesim_kernels.runtime.errors import ReadFailed, no_room
from moesim_kernels.runtime.sizes import ALIGN, ModelSizes, sizes_from

__all__ = ["Block", "WeightFile", "open_weights", "write_weights"]

MAGIC = b"MOESIMW1"
_HEAD = struct.Struct("<8sQI12s")
_MAX_INDEX = 16 << 20
_MAX_KEYS = 200_000
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """A run of bytes of the file, and what they add up to."""

    offset: int
    size_bytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """An opened file's facts; `expert_K` by key."""

    path: Path
    sizes: ModelSizes
    seed: int
    dense: Block
    expert_K: tuple[Block, ...]
    file_bytes: int

    def read(self, block: Block, what: str) -> U8Array:
        """The block's bytes, checked. Raises BadInput where they are not those that were written, ReadFailed."""
        try:
            with self.path.open("rb") as file:
                file.seek(block.offset)
                data = np.fromfile(file, np.uint8, block.size_bytes)
        except OSError as error:
            raise ReadFailed(f"{self.path}: {what} cannot be read: {error.strerror or error}") from None
        self.verify(data, block, what)
        return data

    def verify(self, data: Any, block: Block, what: str) -> None:
        """Raises BadInput where `data` (any buffer) is not what was written as `block`."""
        if len(data) != block.size_bytes or zlib.crc32(data) != block.crc:
            raise BadInput(
                Problem(
                    str(self.path),
                    f"{what} is not what was written: the checksum of {block.size_bytes} bytes at {block.offset} "
                    "differs. Write the model again (moesim runtime write)",
                )
            )

    def name(self, key: int) -> str:
        """Of an expert, for messages."""
        return f"expert {key % self.sizes.experts} of layer {key // self.sizes.experts}"

    def check(self) -> None:
        """Read everything once and compare all checksums."""
        self.read(self.dense, "the dense part")
        for key, block in enumerate(self.expert_K):
            self.read(block, self.name(key))


# ---- writing


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _dense(sizes: ModelSizes, seed: int) -> bytes:
    """Norms are ones, matrices normal with the variance that keeps a row's scale."""
    parts = []
    for number, (name, shape) in enumerate(sizes.dense_shapes.items()):
        if len(shape) == 1:
            parts.append(_packed(np.ones(shape, np.float32), sizes))
            continue
        scale = 1.0 if name == "embedding" else shape[1] ** -0.5
        draw = generator(seed, "runtime/dense", number).standard_normal(shape, np.float32)
        parts.append(_packed(draw * np.float32(scale), sizes))
    return b"".join(parts)


def _expert(sizes: ModelSizes, seed: int, key: int) -> bytes:
    draw = generator(seed, "runtime/expert", key)
    w13 = draw.standard_normal((2 * sizes.inner, sizes.hidden), np.float32) * np.float32(sizes.hidden**-0.5)
    w2 = draw.standard_normal((sizes.hidden, sizes.inner), np.float32) * np.float32(sizes.inner**-0.5)
    return _packed(w13, sizes) + _packed(w2, sizes)


def _packed(values: Any, sizes: ModelSizes) -> bytes:
    """In the file's number format; bfloat16 by rounding to nearest, ties to even."""
    single = np.ascontiguousarray(values, "<f4")
    if sizes.dtype == "float32":
        return single.tobytes()
    bits = single.view("<u4")
    rounded: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return rounded


def write_weights(path: Path, sizes: ModelSizes, seed: int, told: Callable[[int, int], None] | None = None) -> None:
    """Write a model whole or not at all: into a hidden neighbour, to the disk, then over `path`.

    told: called with (experts written, experts) now and then. Raises NoRoom on a full disk, BadInput for a path that
    cannot be written to or a model of too many experts.
    """
    if sizes.num_keys > _MAX_KEYS:
        raise BadInput(f"an index of {sizes.num_keys} experts is not written; at most {_MAX_KEYS}")
    if path.exists() and not path.is_file():
        raise BadInput(Problem(str(path), "a regular file is needed; name another path"))
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise BadInput(Problem(str(path), f"cannot be written: {error.strerror or error}")) from None
    try:
        with no_room(str(path)), os.fdopen(descriptor, "wb", buffering=0) as file:
            _write(file, sizes, seed, told)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _write(file: Any, sizes: ModelSizes, seed: int, told: Callable[[int, int], None] | None) -> None:
    dense = _dense(sizes, seed)
    entries: list[list[int]] = []
    room = _index_room(sizes)
    offset = room + _padded(len(dense))
    total = offset + sizes.num_keys * sizes.slot_bytes
    os.posix_fallocate(file.fileno(), 0, total)  # a full disk is known now, not after minutes
    _put(file, room, dense)
    for key in range(sizes.num_keys):
        data = _expert(sizes, seed, key)
        entries.append([offset, len(data), zlib.crc32(data)])
        _put(file, offset, data)
        offset += sizes.slot_bytes
        if told is not None:
            told(key + 1, sizes.num_keys)
    about = {
        "format": 1,
        "seed": seed,
        "sizes": sizes.model_dump(),
        "dense": [room, len(dense), zlib.crc32(dense)],
        "experts": entries,
    }
    index = json.dumps(about, separators=(",", ":")).encode()
    assert _HEAD.size + len(index) <= room
    _put(file, 0, _HEAD.pack(MAGIC, len(index), zlib.crc32(index), bytes(12)) + index)


def _index_room(sizes: ModelSizes) -> int:
    """Bytes kept for header and index: a line of the index has two numbers of at most 13 digits and a CRC of 10."""
    return _padded(_HEAD.size + 1024 + 48 * (sizes.num_keys + 1))


def _put(file: Any, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file.fileno(), view, offset)
        view, offset = view[done:], offset + done


# ---- opening


def open_weights(path: Path) -> WeightFile:
    """The facts of a file, each compared with what its sizes imply. Raises BadInput; only the index takes memory."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise _bad(path, "a regular file is needed")
            return _opened(path, file, facts.st_size)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}. Write a model: moesim runtime write") from None
    except ValueError as error:
        raise _bad(Path(repr(str(path))), f"cannot be read: {error}") from None


def _opened(path: Path, file: BinaryIO, file_bytes: int) -> WeightFile:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise _bad(path, f"no model of moesim runtime write: it has {file_bytes} bytes, the header alone {_HEAD.size}")
    magic, index_bytes, crc, zeros = _HEAD.unpack(head)
    if magic != MAGIC or any(zeros):
        raise _bad(path, "no model of moesim runtime write: its first 32 bytes are not the header of one")
    if not 2 <= index_bytes <= min(_MAX_INDEX, file_bytes - _HEAD.size):
        raise _bad(path, f"an index of {index_bytes} bytes cannot be: the file has {file_bytes}, at most {_MAX_INDEX}")
    index = file.read(index_bytes)
    if len(index) != index_bytes or zlib.crc32(index) != crc:
        raise _bad(path, "its index is not what was written (the checksum differs). Write the model again")
    try:
        text = index.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(path, "its index is not UTF-8. Write the model again") from None
    about = parse_json(text, str(path))
    if not isinstance(about, dict) or set(about) != {"format", "seed", "sizes", "dense", "experts"}:
        raise _bad(path, "its index lacks format, seed, sizes, dense or experts, or has more")
    if about["format"] != 1 or not _whole(about["seed"], 1 << 63):
        raise _bad(path, f"format 1 and a whole seed are read; it says {about['format']!r:.20}, {about['seed']!r:.40}")
    sizes = sizes_from(about["sizes"], str(path))
    if sizes.num_keys > _MAX_KEYS:
        raise _bad(path, f"it says {sizes.num_keys} experts; at most {_MAX_KEYS} are read")
    return _laid_out(path, sizes, about, file_bytes)


def _laid_out(path: Path, sizes: ModelSizes, about: dict[str, Any], file_bytes: int) -> WeightFile:
    """The blocks, where every one stands and is as long as the sizes say."""
    entries = about["experts"]
    if not isinstance(entries, list) or len(entries) != sizes.num_keys:
        raise _bad(path, f"its index must list {sizes.num_keys} experts (layers x experts)")
    first = _index_room(sizes)
    wanted = [(first, sizes.dense_bytes, "the dense part")]
    experts = first + _padded(sizes.dense_bytes)
    for key in range(sizes.num_keys):
        name = f"expert {key % sizes.experts} of layer {key // sizes.experts}"
        wanted.append((experts + key * sizes.slot_bytes, sizes.expert_bytes, name))
    end = experts + sizes.num_keys * sizes.slot_bytes
    if file_bytes != end:
        what = "cut off" if file_bytes < end else "longer than it says"
        raise _bad(path, f"it is {what}: {file_bytes} bytes, where its sizes add up to {end}. Write the model again")
    blocks = []
    for entry, (offset, size, name) in zip([about["dense"], *entries], wanted, strict=True):
        if not isinstance(entry, list) or len(entry) != 3 or not all(_whole(x, 1 << 63) for x in entry):
            raise _bad(path, f"the index's entry of {name} is no [offset, bytes, crc]: {entry!r:.60}")
        if entry[:2] != [offset, size] or entry[2] >= 1 << 32:
            raise _bad(
                path,
                f"the index says that {name} is {entry[1]} bytes at {entry[0]}; by its sizes it is {size} at {offset}. "
                "Write the model again",
            )
        blocks.append(Block(offset, size, entry[2]))
    return WeightFile(path, sizes, about["seed"], blocks[0], tuple(blocks[1:]), file_bytes)


def _whole(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _bad(path: Path, message: str) -> BadInput:
    return BadInput(Problem(str(path), message))
