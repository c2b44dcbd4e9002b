"""JSON as strictly as moesim reads it (no duplicate key, no NaN, sizes bounded first), for machines without moesim."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from moesim_kernels.bench.errors import BadPlan

__all__ = ["canonical", "parse", "read_bytes"]

_MAX_DIGITS = 25


def canonical(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises BadPlan naming the file."""
    where = str(path)
    try:
        # a pipe would block on opening, so it is looked at first
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadPlan("a regular file is needed; name another path", where)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BadPlan(f"cannot be read: {error.strerror or error}", where) from None
    except BadPlan:
        raise
    except ValueError as error:  # a path with a null byte
        raise BadPlan(f"cannot be read: {error}", repr(where)) from None
    if len(data) > limit:
        raise BadPlan(f"at most {limit} bytes are read, this file is longer; is it the right one?", where)
    return data


def parse(text: str | bytes, where: str) -> Any:
    """One JSON value, or BadPlan naming `where` for whatever is not plain, finite JSON."""

    def no_constant(word: str) -> NoReturn:
        raise BadPlan(f"numbers must be finite; {word} is not JSON", where)

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise BadPlan(f"a number of {len(digits)} digits is beyond any use", where)
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise BadPlan(f"numbers must be finite; {digits[:40]} is not", where)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
            raise BadPlan(f"the key {twice!r} stands twice in one object; keep one", where)
        return out

    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=unique,
            parse_constant=no_constant,
            parse_int=whole,
            parse_float=real,
        )
    except json.JSONDecodeError as error:
        raise BadPlan(f"not JSON: {error.msg} (column {error.colno})", where) from None
    except UnicodeDecodeError as error:
        raise BadPlan(f"must be UTF-8; byte {error.start} is not", where) from None
    except RecursionError:
        raise BadPlan("nests too deeply to be read", where) from None
