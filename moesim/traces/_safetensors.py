"""Arrays of integers from a safetensors file, mapped: nothing is read before every declared size is checked.

The format (huggingface/safetensors, README.md): 8 bytes little-endian, the length of a JSON header; the header, name to
{dtype, shape, data_offsets [begin, end]} and an optional __metadata__; then the data, which the tensors cover without
gaps or overlaps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.strict_json import parse_json
from moesim.traces._routing_checks import bad

__all__ = ["read_integers"]

_MOST_HEADER_BYTES = 100_000_000
"""as in the format's own reader"""
_DTYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4"}


def read_integers(path: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of the file by name, as read-only maps. Raises BadInput naming tensor, fact and mend."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
                raise bad(path, f"a header of {length} bytes in a file of {size}. The file is cut off or damaged.")
            raw = file.read(length)
    except OSError as error:
        raise bad(path, f"cannot be read ({error.strerror or error}).") from None
    try:
        header = parse_json(raw.decode("utf-8"), f"{path}: header")
    except UnicodeDecodeError:
        raise bad(path, "the header is not UTF-8. Is it a safetensors file?") from None
    if not isinstance(header, dict):
        raise bad(path, "the header is no JSON object. Is it a safetensors file?")
    header.pop("__metadata__", None)
    facts = {name: _entry(name, entry, path) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(facts.items(), key=lambda item: (item[1][2], item[1][3])):
        if begin != at:
            raise bad(path, f"{name}: begins at byte {begin} where {at} is next. The file is damaged.")
        at = end
    if at != size - 8 - length:
        raise bad(path, f"tensors of {at} bytes, but {size - 8 - length} of data. The file is cut off or damaged.")
    if not at:
        return {name: np.empty(shape, dtype) for name, (dtype, shape, _, _) in facts.items()}
    data = np.memmap(path, np.uint8, "r", 8 + length)
    return {name: data[b:e].view(dtype).reshape(shape) for name, (dtype, shape, b, e) in facts.items()}


def _entry(name: str, entry: Any, path: Path) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a tensor, sizes agreeing."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(path, f"{name[:80]}: dtype, shape and data_offsets are needed. The file is damaged.")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise bad(path, f"{name[:80]}: counts and ids are integers, got {str(entry['dtype'])[:20]}.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    whole = all(isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in x) for x in (shape, offsets))
    if not whole or len(offsets) != 2 or len(shape) > 8:
        raise bad(path, f"{name[:80]}: shape and data_offsets are whole numbers from 0 on. The file is damaged.")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise BadInput(
            f"{name[:80]}: shape {shape} of {entry['dtype']} takes {needed} bytes, data_offsets {offsets} are of"
            f" {offsets[1] - offsets[0]}. The file is damaged.",
            str(path),
        )
    return dtype, tuple(shape), offsets[0], offsets[1]
