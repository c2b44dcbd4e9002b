"""Plain CSV of requests: arrival in seconds, prompt and output tokens; `format: csv`.

Known headers: vidur's processed traces (arrived_at, num_prefill_tokens, num_decode_tokens), splitwise-sim's
(arrival_timestamp, prompt_size, token_size) and the plain arrival_s, prompt_tokens, output_tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.traces._sessions import session_ids
from moesim.traces._table import Column, labels, read_table, seconds, tokens
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_ARRIVAL = Column("arrival_s", seconds, ("arrived_at", "arrival_timestamp", "arrival_time_s"))
_COLUMNS = (
    Column("prompt_tokens", tokens(1), ("num_prefill_tokens", "prompt_size", "input_tokens")),
    Column("output_tokens", tokens(1), ("num_decode_tokens", "token_size")),
    Column("session_id", labels, required=False),
)


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Read a CSV of lengths (or gzip of it). Without an arrival column it serves for a closed loop only.

    Raises BadInput with every problem as `file:line`.
    """
    table = read_table(path, (replace(_ARRIVAL, required=options.needs_arrivals), *_COLUMNS))
    count = len(table.line)
    second = table.values.get("arrival_s", np.zeros(count))
    session = table.values.get("session_id")
    return RawRequests(
        arrival_ns=np.rint((second - second.min()) * 1e9).astype(np.int64),
        prompt_tokens=table.values["prompt_tokens"],
        output_tokens=table.values["output_tokens"],
        session_id=np.full(count, -1, dtype=np.int64) if session is None else session_ids(session),
        warnings=table.cut_warning(path),
    )
