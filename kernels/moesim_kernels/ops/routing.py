"""Rows per expert, which token each row belongs to, and rows from rank to rank. numpy alone.

A rank's expert work is told by counts over its slots, not by a number of tokens: under expert parallelism a token may
have no row here, or several. Suffixes: E slots of this rank, R rows = (token, slot) pairs of this rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["assign", "exchange_splits", "histogram"]

MAX_CELLS = 1_000_000_000  # numpy's multivariate_hypergeometric draws from fewer than this many (token, slot) cells
MAX_ZIPF = 10.0


def histogram(kind: str, rows: int, slots: int, tokens: int, seed: int) -> NDArray[np.int64]:
    """Rows of each slot, int64 [E]: they sum to `rows`, and none exceeds `tokens` (a token goes to a slot once).

    Kinds:
    - `uniform`: `rows` of the tokens x slots cells, all equally likely. Counts then follow the multivariate
      hypergeometric law, which is that of independent slots given their sum. Where every token takes exactly top_k
      slots, the true variance is smaller by (slots - 1/tokens)/(slots - 1), below 2 % from 64 slots on.
    - `balanced`: as even as integers allow; which slots hold one row more is drawn.
    - `zipf:A`: slot of popularity rank i is drawn with weight i^-A, 0 < A <= 10, until it is full; ranks are dealt
      to the slots at random.
    - `few:N`: all rows on the first N slots, balanced. `one` is `few:1`.

    The same arguments give the same counts. Raises ValueError where the counts cannot exist.
    """
    if rows < 0 or tokens < 0 or slots < 1 or tokens * slots >= MAX_CELLS:
        raise ValueError(
            f"a histogram needs rows >= 0, tokens >= 0, slots >= 1 and tokens x slots < {MAX_CELLS}: "
            f"rows={rows}, tokens={tokens}, slots={slots}"
        )
    name, _, argument = kind.partition(":")
    open_slots = _open_slots(kind, name, argument, slots)
    if rows > open_slots * tokens:
        raise ValueError(
            f"a token goes to a slot once, so rows <= slots x tokens: rows={rows}, tokens={tokens}, "
            f"slots={open_slots} ({kind}). Use fewer rows or another histogram"
        )
    rng = np.random.default_rng(np.random.SeedSequence([seed, rows, slots, tokens]))
    count_E = np.zeros(slots, dtype=np.int64)
    if name == "uniform":
        count_E[:] = rng.multivariate_hypergeometric(np.full(slots, tokens), rows, method="marginals")
    elif name == "zipf":
        weight_E = rng.permutation(np.arange(1, slots + 1, dtype=np.float64) ** -float(argument))
        count_E[:] = _draw_until_full(rng, weight_E, rows, tokens)
    else:
        count_E[:open_slots] = rows // open_slots
        count_E[rng.permutation(open_slots)[: rows % open_slots]] += 1
    return count_E


def _open_slots(kind: str, name: str, argument: str, slots: int) -> int:
    """How many slots may hold rows; ValueError for a kind that is none."""
    try:
        if name in ("uniform", "balanced") and not argument:
            return slots
        if name == "one" and not argument:
            return 1
        if name == "few" and 1 <= int(argument) <= slots:
            return int(argument)
        if name == "zipf" and 0.0 < float(argument) <= MAX_ZIPF:
            return slots
    except ValueError:
        pass
    raise ValueError(
        f"no histogram {kind!r} for {slots} slots: use uniform, balanced, one, zipf:A with 0 < A <= {MAX_ZIPF:g}, "
        "or few:N with 1 <= N <= slots"
    )


def _draw_until_full(
    rng: np.random.Generator, weight_E: NDArray[np.float64], rows: int, tokens: int
) -> NDArray[np.int64]:
    """Multinomial counts with at most `tokens` each: what overflows is drawn again among the slots with room."""
    count_E = np.zeros(len(weight_E), dtype=np.int64)
    left = rows
    while left:  # each turn but the last fills a slot
        weight_E = np.where(count_E < tokens, weight_E, 0.0)
        count_E += rng.multinomial(left, weight_E / weight_E.sum())
        left = int(np.maximum(count_E - tokens, 0).sum())
        np.minimum(count_E, tokens, out=count_E)
    return count_E


def assign(count_E: NDArray[np.int64], tokens: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(token_R, expert_R) with count_E[e] rows of slot e, sorted by slot, no token twice in a slot.

    Rows are dealt in slot order round and round a shuffled circle of tokens: a slot has at most `tokens` consecutive
    rows, so its tokens differ, and tokens have equally many rows, or one more. Tokens of a slot stand in random
    order. Raises ValueError for a count below 0 or above `tokens`.
    """
    if len(count_E) and (count_E.min() < 0 or count_E.max() > tokens):
        raise ValueError(f"each slot takes 0..{tokens} rows, one a token: counts {count_E.min()}..{count_E.max()}")
    rows = int(count_E.sum())
    expert_R = np.repeat(np.arange(len(count_E), dtype=np.int64), count_E)
    if rows == 0:
        return np.zeros(0, dtype=np.int64), expert_R
    circle_T = np.random.default_rng(np.random.SeedSequence([seed, tokens, rows])).permutation(tokens)
    return circle_T[np.arange(rows) % tokens].astype(np.int64), expert_R


def exchange_splits(rows: int, ranks: int, kind: str, seed: int) -> tuple[tuple[int, ...], ...]:
    """Rows that each rank sends to each, [source][destination], so that the busiest port (sending or receiving, a
    rank's rows for itself left out) has exactly `rows`.

    even: all pairs alike. one: rank 0 has all tokens. drawn: the ranks hold shares of the busiest one's tokens that are
    drawn evenly from 0 to 1, and destinations are drawn evenly from half to one and a half of their mean. What a rank
    keeps is its mean share. Raises ValueError for another kind.
    """
    if kind not in ("even", "one", "drawn"):
        raise ValueError(f"rows are spread over ranks even, one or drawn; got {kind!r}")
    want_GG = np.ones((ranks, ranks))
    if kind == "one":
        want_GG[1:] = 0.0
    if kind == "drawn":
        rng = np.random.default_rng(np.random.SeedSequence([seed, ranks, rows]))
        share_G = rng.uniform(0.0, 1.0, ranks)
        want_GG = (share_G / share_G.max())[:, None] * rng.uniform(0.5, 1.5, ranks)
    np.fill_diagonal(want_GG, 0.0)
    want_GG *= rows / max(want_GG.sum(axis=0).max(), want_GG.sum(axis=1).max())
    sent_GG = np.floor(want_GG + 1e-9).astype(np.int64)
    while (port_2G := np.stack([sent_GG.sum(axis=1), sent_GG.sum(axis=0)])).max() < rows:
        short = np.stack([want_GG.sum(axis=1), want_GG.sum(axis=0)]) * (port_2G.max() >= port_2G)
        way, port = divmod(int(short.argmax()), ranks)
        line = want_GG[port] - sent_GG[port] if way == 0 else want_GG[:, port] - sent_GG[:, port]
        other = int(line.argmax())
        sent_GG[(port, other) if way == 0 else (other, port)] += 1
    np.fill_diagonal(sent_GG, np.rint(sent_GG.sum(axis=1) / (ranks - 1)).astype(np.int64))
    return tuple(tuple(int(n) for n in row) for row in sent_GG)
