"""Per-layer expert counts: CSV `layer,e0,e1,...` and JSON `{"3": [..], ...}` or a list of lists (layers 0, 1,
...)."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Problem

__all__ = ["Counts", "read", "write"]

_LIMIT_BYTES = 64 << 20
_MAX_LAYERS, _MAX_EXPERTS = 4096, 1 << 16


@dataclass(frozen=True, slots=True)
class Counts:
    """`count_LE`: float64 [L, E], how often each expert was taken, any scale; `layer_index` [L] as the file
    numbers them."""

    layer_index: tuple[int, ...]
    count_LE: NDArray[np.float64]
    numbered: bool
    """the file names its layers (else they are 0, 1, ... in order)"""


def read(path: Path) -> Counts:
    """Counts from `path`, by its ending (.json, else CSV). Raises BadInput with the line of what is wrong."""
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise BadInput(Problem(str(path), f"counts files over {_LIMIT_BYTES} bytes are not read."))
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(Problem(str(path), "no such counts file.")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(Problem(str(path), f"not readable as UTF-8 text ({error}).")) from None
    return _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)


def _from_csv(text: str, path: Path) -> Counts:
    rows = csv.reader(text.splitlines())
    try:
        head = next(rows, [])
        if len(head) < 2 or head[0].strip() != "layer":
            raise BadInput(Problem(f"{path}:1", "the first line must be `layer,e0,e1,...`, one column an expert."))
        layers: list[int] = []
        counts: list[list[float]] = []
        for row in rows:
            if not row:
                continue
            where = f"{path}:{rows.line_num}"
            if len(row) != len(head):
                raise BadInput(Problem(where, f"{len(head)} columns are needed as in the first line, got {len(row)}."))
            values = [_number(cell, f"{where}:{i + 1}") for i, cell in enumerate(row)]
            if values[0] != int(values[0]):
                raise BadInput(Problem(where, f"a layer is a whole number, got {row[0]!r}."))
            layers.append(int(values[0]))
            counts.append(values[1:])
            if len(layers) > _MAX_LAYERS:
                raise BadInput(Problem(where, f"over {_MAX_LAYERS} layers."))
    except csv.Error as error:
        raise BadInput(Problem(f"{path}:{rows.line_num}", f"not readable as CSV ({error}).")) from None
    return _checked(layers, counts, path, numbered=True)


def _number(cell: object, where: str) -> float:
    """A finite number >= 0."""
    try:
        value = float(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BadInput(Problem(where, f"a finite number >= 0 is needed, got {str(cell)[:40]!r}."))
    return value


def _from_json(text: str, path: Path) -> Counts:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(Problem(f"{path}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}.")) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(Problem(str(path), f"not readable JSON ({error}).")) from None
    named = isinstance(data, dict)
    items = list(data.items()) if named else list(enumerate(data)) if isinstance(data, list) else []
    if not items or len(items) > _MAX_LAYERS:
        raise BadInput(Problem(str(path), 'counts are {"layer": [counts], ...} or a list of lists, one a layer.'))
    layers, counts = [], []
    for key, values in items:
        where = f"{path}: layer {str(key)[:40]}"
        if not str(key).isascii() or not str(key).isdigit() or len(str(key)) > 9:
            raise BadInput(Problem(where, 'a layer is named by its number, such as "3".'))
        if not isinstance(values, list):
            raise BadInput(Problem(where, "a list of counts, one an expert, is needed."))
        layers.append(int(key))
        counts.append([_number(v, f"{where}, expert {i}") for i, v in enumerate(values)])
    return _checked(layers, counts, path, numbered=named)


def _checked(layers: list[int], counts: list[list[float]], path: Path, numbered: bool) -> Counts:
    where = str(path)
    if not layers:
        raise BadInput(Problem(where, "no layer in the file."))
    widths = sorted({len(c) for c in counts})
    if len(widths) > 1:
        raise BadInput(Problem(where, f"every layer needs the same number of experts, got {widths[:6]}."))
    if not 1 <= widths[0] <= _MAX_EXPERTS:
        raise BadInput(Problem(where, f"between 1 and {_MAX_EXPERTS} experts a layer are read, got {widths[0]}."))
    order = sorted(range(len(layers)), key=layers.__getitem__)
    rising = [layers[i] for i in order]
    twice = [a for a, b in itertools.pairwise(rising) if a == b]
    if twice or rising[0] < 0:
        raise BadInput(Problem(where, f"each layer stands once, numbered from 0 on; wrong: {(twice or rising)[0]}."))
    count_LE = np.array([counts[i] for i in order], np.float64)
    empty = np.flatnonzero(count_LE.sum(1) <= 0)
    if empty.size or not np.isfinite(count_LE.sum(1)).all():
        at = rising[int(empty[0])] if empty.size else "?"
        raise BadInput(Problem(where, f"layer {at}: the counts must add up to a finite number above 0."))
    return Counts(tuple(rising), count_LE, numbered)


def write(path: Path, layer_index: Sequence[int], count_LE: NDArray[np.int64] | NDArray[np.float64]) -> None:
    """Write counts as CSV or, for a name ending in .json, JSON."""
    rows = [[v.item() for v in row] for row in count_LE]
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps({str(i): r for i, r in zip(layer_index, rows, strict=True)}) + "\n", "utf-8")
        return
    head = ",".join(["layer", *(f"e{e}" for e in range(count_LE.shape[1]))])
    body = [",".join([str(i), *(repr(v) for v in r)]) for i, r in zip(layer_index, rows, strict=True)]
    path.write_text("\n".join([head, *body]) + "\n", "utf-8")
