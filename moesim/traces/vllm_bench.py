"""Result of `vllm bench serve --save-result --save-detailed`: start_times (s), input_lens, output_lens,
errors.

Arrays are in seconds and tokens, one element a request (vllm/benchmarks/serve.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.traces._files import Findings, checked_text, read_file, strict_json
from moesim.traces._json import json_tokens, near_key, shown
from moesim.traces._table import MAX_SECONDS
from moesim.workload.generators import MAX_REQUESTS
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_MAX_BYTES = 128 * 2**20


def _document(path: Path) -> dict[str, Any]:
    data = checked_text(read_file(path, _MAX_BYTES), str(path))
    try:
        document = strict_json(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        if error.msg == "Extra data":
            raise BadInput(
                "one JSON object is needed, but more follows it (--append-result?); keep one", where
            ) from None
        raise BadInput(f"the file is not JSON, or it is cut off: {error.msg}", where) from None
    except ValueError as error:
        raise BadInput(f"the file is not usable JSON: {error}", str(path)) from None
    if not isinstance(document, dict):
        raise BadInput(f"the result of a benchmark is a JSON object, got {shown(document)}", str(path))
    return document


def _lists(document: dict[str, Any], findings: Findings, needs_arrivals: bool) -> dict[str, list[Any]]:
    """The arrays used, all of one length."""
    lists: dict[str, list[Any]] = {}
    for key in ("input_lens", "output_lens", "start_times", "errors"):
        value = document.get(key)
        if value is None:
            if key in ("input_lens", "output_lens") or (key == "start_times" and needs_arrivals):
                findings.add(None, f"{near_key(key, document)}; run the benchmark with --save-detailed")
        elif not isinstance(value, list):
            findings.add(key, f"a list is needed, got {shown(value)}")
        elif len(value) > MAX_REQUESTS:
            findings.add(key, f"at most {MAX_REQUESTS:,} requests, got {len(value):,}")
        else:
            lists[key] = value
    lengths = {key: len(value) for key, value in lists.items() if key != "errors" or value}
    if "input_lens" in lengths and not lengths["input_lens"]:
        findings.add("input_lens", "the list is empty: there is no request")
    elif len(set(lengths.values())) > 1:
        findings.add(None, "the lists must be of one length: " + ", ".join(f"{k} {n:,}" for k, n in lengths.items()))
    findings.raise_if_any()
    return lists


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Read a benchmark result. Requests that failed (an error, or no output) are dropped and counted in a
    warning.

    Raises BadInput with every problem as `file:list[index]`.
    """
    document = _document(path)
    findings = Findings(path)
    lists = _lists(document, findings, options.needs_arrivals)
    count = len(lists["input_lens"])
    errors = lists.get("errors") or [""] * count
    starts = lists.get("start_times") or [0.0] * count
    kept: list[tuple[float, int, int]] = []
    for i, (start, prompt, output, error) in enumerate(
        zip(starts, lists["input_lens"], lists["output_lens"], errors, strict=True)
    ):
        if error or (type(output) is int and output == 0):
            continue
        if type(start) not in (int, float) or not 0 <= start <= MAX_SECONDS:
            findings.add(f"start_times[{i}]", f"a time from 0 to {MAX_SECONDS:g} seconds is needed, got {shown(start)}")
        for key, value in (("input_lens", prompt), ("output_lens", output)):
            if problem := json_tokens(value):
                findings.add(f"{key}[{i}]", problem)
        kept.append((start, prompt, output))
    if not kept:
        findings.add(None, f"all {count:,} requests failed: none is left to simulate")
    findings.raise_if_any()
    warnings: list[str] = []
    if len(kept) < count:
        warnings.append(f"{path.name}: {count - len(kept):,} of {count:,} requests failed and were dropped")
    if options.needs_arrivals and type(document.get("max_concurrency")) is int:
        limit = document["max_concurrency"]
        warnings.append(
            f"{path.name}: recorded with max_concurrency {shown(limit)}: its starts depend on that server; "
            "set requests.concurrency to replay it as a closed loop"
        )
    second, prompts, outputs = (np.array(column) for column in zip(*kept, strict=True))
    return RawRequests(
        arrival_ns=np.rint((second - second.min()) * 1e9).astype(np.int64),
        prompt_tokens=prompts.astype(np.int64),
        output_tokens=outputs.astype(np.int64),
        session_id=np.full(len(kept), -1, dtype=np.int64),
        warnings=tuple(warnings),
    )
