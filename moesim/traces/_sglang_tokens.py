"""Tokens of SGLang's per_token recordings: physical ids to logical ones, passes in order, padding left out.

Legend as in `sglang_recorder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import IntArray
from moesim.traces._routing_checks import bad
from moesim.workload.loads import MAX_CELLS, ExpertLoads
from moesim.workload.pool import RoutingSource, count_steps, id_dtype

__all__ = ["Tokens", "to_loads", "to_source"]

_DECODE = 2
"""ForwardMode.DECODE of python/sglang/srt/model_executor/forward_batch_info.py: one token a request"""


class Tokens:
    """The tokens of a recording, and how many of them each pass has."""

    def __init__(self, source: RoutingSource, pass_tokens_S: IntArray) -> None:
        self.source = source
        self.pass_tokens_S = pass_tokens_S
        self.warnings = source.warnings


def to_source(
    dumps: list[dict[str, NDArray[Any]]],
    map_LP: IntArray,
    experts: int,
    pass_R: IntArray,
    rank_R: IntArray,
    path: Path,
) -> Tokens:
    """The tokens of all records, pass by pass, rank by rank. Raises BadInput where they do not fit together."""
    ids_LTK, tokens_R, fact_T, mode_R = _joined(dumps, map_LP, path)
    order = np.lexsort((rank_R, pass_R))
    start_R = np.cumsum(tokens_R) - tokens_R
    warnings: list[str] = []
    if _all_alike(pass_R, rank_R, start_R, tokens_R, fact_T):
        first = np.unique(pass_R[order], return_index=True)[1]
        order = order[first]
        warnings.append(f"{path.name}: every rank recorded the same tokens; those of one rank are kept.")
    row_T = np.concatenate([np.arange(start_R[r], start_R[r] + tokens_R[r]) for r in order])
    record_T = np.repeat(order, tokens_R[order])
    ids_TLK = ids_LTK.transpose(1, 0, 2)[row_T]
    moe = np.flatnonzero((ids_TLK >= 0).any(axis=(0, 2)))
    if not moe.size:
        raise bad(path, "topk_ids_of_layer: every id is -1, no expert was recorded. Is the model a MoE model?")
    ids_TLK = ids_TLK[:, moe]
    used_K = (ids_TLK >= 0).any(axis=(0, 1))
    ids_TLK = ids_TLK[:, :, used_K]
    whole_T = (ids_TLK >= 0).all(axis=(1, 2))
    if not whole_T.any():
        raise bad(path, "topk_ids_of_layer: no token has an expert in every place of every layer. Record it again.")
    if not whole_T.all():
        warnings.append(f"{path.name}: {int((~whole_T).sum()):,} padded tokens are left out.")
    ids_TLK, row_T, record_T = ids_TLK[whole_T], row_T[whole_T], record_T[whole_T]
    logical_TLK = map_LP[moe][np.arange(len(moe))[None, :, None], ids_TLK]
    ordered_TLK = np.sort(logical_TLK, axis=2)
    twice = np.argwhere((ordered_TLK[:, :, 1:] == ordered_TLK[:, :, :-1]).any(axis=2))
    if len(twice):
        raise bad(
            path,
            f"token {int(twice[0][0])} has an expert twice in layer {int(moe[twice[0][1]])}: the physical experts'"
            " map changed while recording. Record without rebalancing, or in mode stat.",
        )
    sequence_T = fact_T["sequence"][row_T]
    start = np.flatnonzero(np.concatenate([[True], sequence_T[1:] != sequence_T[:-1]]))
    source = RoutingSource(
        logical_TLK.astype(id_dtype(experts)),
        np.append(start, len(row_T)).astype(np.int64),
        experts,
        int(logical_TLK.shape[2]),
        True,
        path.name,
        layer_index=tuple(int(i) for i in moe),
        warnings=tuple(warnings),
        token_T=fact_T["token"][row_T] if (fact_T["token"] >= 0).all() else None,
        phase_T=(mode_R[record_T] == _DECODE).astype(np.uint8),
    )
    return Tokens(source, np.unique(pass_R[record_T], return_counts=True)[1].astype(np.int64))


def _joined(
    dumps: list[dict[str, NDArray[Any]]], map_LP: IntArray, path: Path
) -> tuple[NDArray[Any], IntArray, dict[str, IntArray], IntArray]:
    """topk_ids [L, T, K] and facts of each token of all files; a token's sequence is its piece of a pass."""
    for dump in dumps:
        layers, tokens, _ = dump["topk_ids"].shape
        sizes = {int(dump["tokens"].sum()), tokens, len(dump["input_ids"]), len(dump["positions"])}
        records = {len(dump[name]) for name in ("tokens", "forward_mode", "extends", "forward_pass_id", "rank")}
        # each by itself first: a sum of damaged ones may wrap to anything
        whole = all(
            bool((dump[name] >= 0).all()) and int(dump[name].max(initial=0)) <= most
            for name, most in (("tokens", tokens), ("extends", len(dump["extend_tokens"])))
        )
        if layers != len(map_LP) or len(sizes) > 1 or len(records) > 1 or not whole:
            raise bad(path, "the records' tokens do not fit together. Convert the .pt file again.")
        if dump["extends"].sum() != len(dump["extend_tokens"]):
            raise bad(path, "the records' lengths of requests do not fit together. Convert the .pt file again.")
        if dump["topk_ids"].size and not -1 <= dump["topk_ids"].min() <= dump["topk_ids"].max() < map_LP.shape[1]:
            raise bad(
                path,
                f"topk_ids_of_layer: physical ids from 0 to {map_LP.shape[1] - 1} (or -1) are needed, got"
                f" {int(dump['topk_ids'].min())}..{int(dump['topk_ids'].max())}. Record with shared experts not fused.",
            )
    if len({d["topk_ids"].shape[2] for d in dumps}) > 1:
        raise bad(path, "the files hold different numbers of ids a token. Keep one dump's files.")
    join = {name: np.concatenate([d[name] for d in dumps]).astype(np.int64) for name in
            ("tokens", "input_ids", "positions", "forward_mode", "extends")}  # fmt: skip
    lengths = np.split(np.concatenate([d["extend_tokens"] for d in dumps]), np.cumsum(join["extends"])[:-1])
    pieces, number = [], 0
    for tokens, mode, length in zip(join["tokens"], join["forward_mode"], lengths, strict=True):
        length = length.astype(np.int64)
        if mode != _DECODE and length.size and (length >= 0).all() and length.sum() == tokens:
            pieces.append(number + np.repeat(np.arange(len(length)), length))
        elif mode == _DECODE:
            pieces.append(number + np.arange(tokens))
        else:
            pieces.append(np.full(tokens, number))
        number += int(tokens) + 1
    facts = {"token": join["input_ids"], "position": join["positions"], "sequence": np.concatenate(pieces)}
    ids_LTK = np.concatenate([d["topk_ids"] for d in dumps], axis=1).astype(np.int64)
    return ids_LTK, join["tokens"], facts, join["forward_mode"]


def _all_alike(
    pass_R: IntArray, rank_R: IntArray, start_R: IntArray, tokens_R: IntArray, fact_T: dict[str, IntArray]
) -> bool:
    """Whether in every pass all ranks have the same tokens (attention tensor parallelism)."""
    if np.unique(rank_R).size < 2:
        return False
    first: dict[int, int] = {}
    for r, number in enumerate(pass_R.tolist()):
        other = first.setdefault(number, r)
        a, b = (slice(start_R[i], start_R[i] + tokens_R[i]) for i in (r, other))
        if any(not np.array_equal(fact_T[name][a], fact_T[name][b]) for name in ("token", "position")):
            return False
    return True


def to_loads(tokens: Tokens, ranks: int, model_layers: int, warnings: tuple[str, ...]) -> ExpertLoads:
    """One row a pass."""
    source, edge_S = tokens.source, np.concatenate([[0], np.cumsum(tokens.pass_tokens_S)])
    if len(tokens.pass_tokens_S) * source.num_layers * source.num_experts > MAX_CELLS:
        raise bad(Path(source.source), f"{len(tokens.pass_tokens_S)} passes are over {MAX_CELLS} counts.")
    return ExpertLoads(
        count_steps(source, np.arange(source.num_tokens), edge_S).astype(np.int64),
        source.source,
        top_k=source.top_k,
        layer_index=source.layer_index,
        model_layers=model_layers,
        recorded_ranks=ranks,
        tokens=source,
        row_tokens_S=tokens.pass_tokens_S,
        warnings=warnings,
    )
