"""Mooncake traces (github.com/kvcache-ai/Mooncake, FAST'25): JSON lines of timestamp (ms), input_length,
output_length.

`hash_ids` names the 512-token prefix blocks; prefix caching is not simulated, so they are not used and a
warning says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.traces._files import Findings, checked_text, read_file, strict_json, text_lines
from moesim.traces._json import json_tokens, near_key, shown
from moesim.traces._table import MAX_SECONDS
from moesim.workload.generators import MAX_REQUESTS
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_KEYS = ("timestamp", "input_length", "output_length")
_MAX_LINE = 4 * 2**20


def _row(text: str) -> tuple[float, int, int, bool]:
    """(timestamp in ms, prompt tokens, output tokens, has prefix hashes). Raises ValueError with every
    problem.
    """
    row: Any = strict_json(text)
    if not isinstance(row, dict):
        raise ValueError(f"an object with {', '.join(_KEYS)} is needed, got {shown(row)}")
    wrong = [near_key(key, row) for key in _KEYS if key not in row]
    stamp = row.get("timestamp", 0)
    if type(stamp) not in (int, float) or not 0 <= stamp <= MAX_SECONDS * 1e3:
        wrong.append(f"timestamp: a time in ms from 0 to {MAX_SECONDS * 1e3:g} is needed, got {shown(stamp)}")
    problems = [(key, json_tokens(row[key])) for key in _KEYS[1:] if key in row]
    wrong += [f"{key}: {problem}" for key, problem in problems if problem]
    if wrong:
        raise ValueError("; ".join(wrong))
    return stamp, row["input_length"], row["output_length"], "hash_ids" in row


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Read a Mooncake trace (JSON lines, gzip or not). Raises BadInput with every problem as `file:line`."""
    data = checked_text(read_file(path), str(path))
    num_lines = data.count(b"\n")
    if num_lines > MAX_REQUESTS:
        raise BadInput(f"a trace may have at most {MAX_REQUESTS:,} rows, this one has {num_lines:,}", str(path))
    last_line = data.rstrip().count(b"\n") + 1
    findings = Findings(path)
    rows: list[tuple[float, int, int, bool]] = []
    for number, line in enumerate(text_lines(data, str(path), _MAX_LINE), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line))
        except ValueError as error:
            cut = "the last line is cut off: " if number == last_line and not line.rstrip().endswith("}") else ""
            findings.add(number, f"{cut}{error}")
    findings.raise_if_any()
    stamp_ms, prompt, output, hashed = zip(*rows, strict=True)
    whole = all(type(stamp) is int for stamp in stamp_ms)
    first_ms = min(stamp_ms)
    arrival_ns = (
        (np.array(stamp_ms, dtype=np.int64) - int(first_ms)) * 1_000_000
        if whole
        else np.rint((np.array(stamp_ms, dtype=np.float64) - first_ms) * 1e6).astype(np.int64)
    )
    warnings: tuple[str, ...] = ()
    if any(hashed):
        warnings = (f"{path.name}: hash_ids are ignored: prefixes are not cached, prompts are computed in full",)
    return RawRequests(
        arrival_ns=arrival_ns,
        prompt_tokens=np.array(prompt, dtype=np.int64),
        output_tokens=np.array(output, dtype=np.int64),
        session_id=np.full(len(rows), -1, dtype=np.int64),
        warnings=warnings,
    )
