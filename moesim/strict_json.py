"""JSON as strictly as the YAML reader: no duplicate keys, no NaN, size and depth bounded first."""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from moesim.errors import BadInput

__all__ = ["MAX_JSON_BYTES", "MAX_JSON_DEPTH", "line_of_key", "load_json", "parse_json"]

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
_LIMIT = f"a JSON file of at most {MAX_JSON_BYTES} bytes is read"
_MAX_DIGITS = 40
# Possessive, and an open string runs to the end of the text: linear in the length whatever is written.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def load_json(path: Path) -> tuple[Any, str]:
    """Read a file into (value, text). Raises BadInput with `file:line:col` where JSON gives one."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadInput("a regular file is needed", str(path))
        size = facts.st_size
        if size > MAX_JSON_BYTES:
            raise BadInput(f"{_LIMIT}; this one has {size}", str(path))
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", str(path)) from None
    except ValueError as error:  # a path with a null byte
        raise BadInput(f"cannot be read: {error}", repr(str(path))) from None
    if len(data) > MAX_JSON_BYTES:
        raise BadInput(f"{_LIMIT}; this one is longer", str(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"JSON must be UTF-8; byte {error.start} is not", str(path)) from None
    return parse_json(text, str(path)), text


def parse_json(text: str, where: str) -> Any:
    """Parse `text`; `where` names it in errors. Raises BadInput for whatever is not plain, finite JSON."""
    _refuse_deep(text, where)

    def no_constant(word: str) -> NoReturn:
        raise BadInput(f"numbers must be finite; {word} is not JSON", where)

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise BadInput(f"a number of {len(digits)} digits is beyond any use", where)
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise BadInput(f"numbers must be finite; {digits[:40]} is not", where)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise BadInput(f"the key {key!r} stands twice in one object; keep one", where)
            out[key] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_int=whole, parse_float=real)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg}", f"{where}:{error.lineno}:{error.colno}") from None


def _refuse_deep(text: str, where: str) -> None:
    """Count brackets outside strings, so that the parser never meets more than MAX_JSON_DEPTH levels."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                line = text.count("\n", 0, match.start()) + 1
                raise BadInput(f"JSON may nest {MAX_JSON_DEPTH} levels; this has more", f"{where}:{line}")
        elif match[0] in "]}":
            depth -= 1


def line_of_key(text: str, key: str) -> int | None:
    """Line (from 1) of the first `"key":` in `text`, or None."""
    found = re.search(rf'"{re.escape(key)}"\s*:', text)
    return None if found is None else text.count("\n", 0, found.start()) + 1
