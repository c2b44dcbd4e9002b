"""Azure LLM inference traces (github.com/Azure/AzurePublicDataset): TIMESTAMP, ContextTokens,
GeneratedTokens.

2023: `2023-11-16 18:17:03.9799600` (7 digits, so 100 ns); 2024 adds an offset from UTC, `2024-05-10
00:00:00.009930+00:00`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesim.arrays import AnyArray
from moesim.traces._table import Cells, Column, read_table, tokens
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_STAMP = re.compile(r"(?:19|20)[0-9]{2}-[01][0-9]-[0-3][0-9][ T][0-2][0-9]:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?")
_UTC = re.compile(r"(?:Z|\+00:?00)$")


def _one_stamp(text: str) -> int:
    text = text.strip()
    if not _STAMP.fullmatch(_UTC.sub("", text)):
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(f"a UTC time such as 2023-11-16 18:17:03.9799600 is needed, got {shown!r}")
    try:
        return int(np.datetime64(_UTC.sub("", text), "ns").astype(np.int64))
    except ValueError:
        raise ValueError(f"there is no such time: {text!r}") from None


def _many_stamps(texts: Sequence[str]) -> AnyArray:
    if not all(map(_STAMP.fullmatch, texts)):
        texts = [_UTC.sub("", text) for text in texts]
        if not all(map(_STAMP.fullmatch, texts)):
            raise ValueError
    return np.array(texts, dtype="datetime64[ns]").astype(np.int64)


_COLUMNS = (
    Column("TIMESTAMP", Cells(_one_stamp, _many_stamps, np.int64)),
    Column("ContextTokens", tokens(1)),
    Column("GeneratedTokens", tokens(1)),
)


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Read an Azure trace (CSV, or gzip of it). The published files end without a newline, so that is no sign
    of a cut.

    Raises BadInput with every problem as `file:line`.
    """
    values = read_table(path, _COLUMNS).values
    return RawRequests(
        arrival_ns=values["TIMESTAMP"],
        prompt_tokens=values["ContextTokens"],
        output_tokens=values["GeneratedTokens"],
        session_id=np.full(len(values["TIMESTAMP"]), -1, dtype=np.int64),
    )
