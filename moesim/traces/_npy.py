"""Arrays in NumPy's own format, from files that strangers wrote: every declared size is checked before memory is taken.

Nothing is unpickled.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moesim.traces._routing_checks import bad

__all__ = ["BROKEN", "Header", "read_header", "read_member"]

_MAX_AXES, _MAX_SIZE = 32, 1 << 48
BROKEN = (
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
    EOFError, OSError, ValueError, SyntaxError, RuntimeError, KeyError,
)  # fmt: skip
"""what zipfile and NumPy raise on a damaged file"""


@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy header declares; `data_bytes` follow it."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    data_bytes: int


def read_header(stream: IO[bytes], file_bytes: int, path: Path, name: str) -> Header:
    """The .npy header at the start of `stream`, with its size compared with the `file_bytes` that are
    there."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise bad(path, f"{name}: .npy format {version[0]}.{version[1]} is not read, 1.0 and 2.0 are.")
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = reader(stream)
    if dtype.hasobject or dtype.kind not in "iuf":
        raise bad(
            path,
            f"{name}: an array of integers or floats is needed, got dtype {dtype}. Nothing is unpickled.",
        )
    if any(n < 0 for n in shape):
        raise bad(path, f"{name}: the header declares a negative size, {shape}.")
    if len(shape) > _MAX_AXES or any(size > _MAX_SIZE for size in shape):
        raise bad(path, f"{name}: the header declares shape {str(shape)[:80]}, which no array has.")
    needed, there = math.prod(shape) * dtype.itemsize, file_bytes - stream.tell()
    if needed != there:
        raise bad(
            path,
            f"{name}: the header declares shape {shape} of {dtype}, {needed} bytes, but {there} bytes"
            " follow it."
            " The file is cut off or damaged; write it again.",
        )
    return Header(shape, fortran, dtype, needed)


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: str) -> NDArray[Any]:
    """One whole array, in native byte order."""
    try:
        with archive.open(info) as stream:
            header = read_header(stream, info.file_size, path, name)
            data = stream.read(header.data_bytes)
            rest = stream.read(1)
    except BROKEN as error:
        raise bad(path, f"{name}: damaged ({error}). Write the file again.") from None
    if len(data) != header.data_bytes or rest:
        raise bad(path, f"{name}: {len(data)} bytes of data where {header.data_bytes} are declared.")
    array = np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    return array.astype(header.dtype.newbyteorder("="), copy=False)
