"""BurstGPT (github.com/HPMLL/BurstGPT): Timestamp (s), Model, Request tokens, Response tokens, Total tokens,
Log Type.

Newer files also have Session ID and Elapsed time. A row with 0 response tokens is a request that failed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.traces._files import Findings
from moesim.traces._sessions import session_ids
from moesim.traces._table import Column, labels, read_table, seconds, tokens
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_COLUMNS = (
    Column("Timestamp", seconds),
    Column("Request tokens", tokens(0)),
    Column("Response tokens", tokens(0)),
    Column("Session ID", labels, required=False),
)


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Read a BurstGPT file (CSV, or gzip of it). Failed requests are dropped and counted in a warning.

    Raises BadInput with every problem as `file:line`, and when no request succeeded.
    """
    table = read_table(path, _COLUMNS)
    values = table.values
    done = values["Response tokens"] > 0
    findings = Findings(path)
    for line in table.line[done & (values["Request tokens"] == 0)]:
        findings.add(int(line), "column 'Request tokens': a request that was answered has at least 1 token, got 0")
    if not done.any():
        findings.add(None, f"all {len(done):,} requests failed (0 response tokens): none is left to simulate")
    findings.raise_if_any()
    warnings = list(table.cut_warning(path))
    failed = len(done) - int(np.count_nonzero(done))
    if failed:
        warnings.append(
            f"{path.name}: {failed:,} of {len(done):,} requests failed (0 response tokens) and were dropped"
        )
    second = values["Timestamp"][done]
    session = values.get("Session ID")
    return RawRequests(
        arrival_ns=np.rint((second - second.min()) * 1e9).astype(np.int64),
        prompt_tokens=values["Request tokens"][done],
        output_tokens=values["Response tokens"][done],
        session_id=np.full(len(second), -1, dtype=np.int64) if session is None else session_ids(session[done]),
        warnings=tuple(warnings),
    )
