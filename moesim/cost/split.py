"""Steps of which each rank computes two halves, so that one half's exchange runs beside the other's computation.

`communication.overlap: two_batch` (DeepSeek-V3, arXiv:2412.19437, section 3.4; SGLang's two-batch overlap, vLLM's
DBO). Every rank cuts its tokens in two, the first half rounded up; both pass through all layers in the order that
`moesim.overlap.two_batch` states, *aligned* where prompts are most of the tokens and *shifted* else. Everything is
priced at its half's size: projections and attention by the tables, experts and exchange as batches of their own, which
read the experts' weights twice. A step in which some rank has a single token is not cut. A prompt may be cut inside;
its attention is then halved, because engines choose the cut so that both halves work alike. Host overhead, the head
and sampling happen once. Multiprocessors that the exchange holds are missing all the time, as engines leave them free
for the whole step.

Legend: S steps, D data-parallel ranks, L MoE layers; the two halves are an axis of 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables
from moesim.cost.experts import MEANS, MoESums
from moesim.cost.pricer import Batch, Key, Run
from moesim.overlap.two_batch import Halves, Order, two_batch_ns
from moesim.routing.capacity import Phase

__all__ = ["HalfLayers", "SplitDetail", "Splitter", "phase_order", "split_tokens"]


class HalfLayers(NamedTuple):
    """ns of both halves' MoE layers [L, 2, S], nothing hidden; rows: what they were drawn from, the second half's too;
    entry_2S: which column of each row was used."""

    dispatch: IntArray
    experts: IntArray
    combine: IntArray
    rows: tuple[MoESums, MoESums]
    entry_2S: IntArray

    @property
    def steps(self) -> int:
        return int(self.experts.shape[-1])


class SplitDetail(NamedTuple):
    """What explains a run of split steps: ns by step [S], dispatch and combine as far as they are not hidden; `rows`
    and `entry_2S` as of `HalfLayers`."""

    dispatch: IntArray
    experts: IntArray
    combine: IntArray
    rows: tuple[MoESums, MoESums]
    entry_2S: IntArray

    def cut(self, steps: int) -> SplitDetail:
        """The first `steps` steps, copied."""
        dispatch, experts, combine = (x[:steps].copy() for x in (self.dispatch, self.experts, self.combine))
        return SplitDetail(dispatch, experts, combine, self.rows, self.entry_2S[:, :steps].copy())

    def stats(self) -> FloatArray:
        """`MoESums.stats` by step [STATS, S]: both halves together; what is a mean of layers is that of both."""
        out = sum(row.stats[:, entry] for row, entry in zip(self.rows, self.entry_2S, strict=True))
        out = np.asarray(out, np.float64)
        for mean in MEANS:
            out[mean] *= 0.5
        return out


def split_tokens(tokens_D: IntArray) -> IntArray | None:
    """Tokens of the halves [2, D]; None where they cannot be cut: a rank has one token, or nobody has two."""
    if (tokens_D == 1).any() or not (tokens_D > 1).any():
        return None
    return np.stack([tokens_D - tokens_D // 2, tokens_D // 2])


class Splitter:
    """Prices split steps of one group. scale: share of the multiprocessors left to compute."""

    def __init__(
        self, dense: DenseTables, full: AttentionTables | None, window: AttentionTables | None, scale: float
    ) -> None:
        self._dense, self._full, self._window = dense, full, window
        self.slower = 1.0 / scale
        kinds = {table.stage: at for at, table in enumerate(dense.stages)}
        self._program = [kinds[stage] for stage in dense.program]
        self._most = int(np.bincount(self._program).argmax())
        self._host_ns = int(sum(p.ns_N[0] for p in dense.blocks["first"] if p.operator == "host"))

    def prepare(self, decoding: int) -> None:
        """Fill the attention rows of both halves of `decoding` requests."""
        for table in (self._full, self._window):
            if table is not None:
                table.fill(decoding - decoding // 2)
                table.fill(decoding // 2)

    def run(
        self, batch: Batch, decoding_D: IntArray, prefill_2D: tuple[IntArray, IntArray], tokens_2D: IntArray,
        sampled: int, moe: HalfLayers, order: Order, counts: tuple[int, int, int],
    ) -> Run:  # fmt: skip
        """The next steps of a group. prefill_2D: attention ns of prompts on each rank, layers with full attention and
        with a window; counts: decode tokens, prompt tokens and tokens of the busiest rank."""
        own, slowest, tokens_2 = self._own(batch, decoding_D, prefill_2D, tokens_2D, moe.steps)
        own_L = [own[kind] for kind in self._program]
        own_L[0] = np.stack([own_L[0][0] + self._host_ns, own_L[0][1]])
        experts = self._slow(moe.experts)
        halves = Halves(own_L, list(moe.dispatch), list(experts), list(moe.combine))
        head = int(self._dense.head_N[sampled])
        total_S = two_batch_ns(halves, order) + head
        spent_S = np.sum([x.sum(axis=0) for x in own_L], axis=0)
        expert_S = experts.sum(axis=(0, 1))
        exposed_S = total_S - head - spent_S - expert_S
        there_S, back_S = moe.dispatch.sum(axis=(0, 1)), moe.combine.sum(axis=(0, 1))
        dispatch_S = exposed_S * there_S // np.maximum(there_S + back_S, 1)
        detail = SplitDetail(dispatch_S, expert_S, exposed_S - dispatch_S, moe.rows, moe.entry_2S)
        return Run(
            np.cumsum(total_S), self._key(batch, slowest, decoding_D, prefill_2D, tokens_2, sampled, counts), detail
        )

    def part_ns(self, ns: IntArray, host: bool) -> IntArray:
        """What both halves take of a part that one takes `ns` of."""
        return ns if host else 2 * self._slow(ns)

    def _slow(self, ns: IntArray) -> IntArray:
        return ns if self.slower == 1.0 else np.rint(ns * self.slower).astype(np.int64)

    def _own(
        self, batch: Batch, decoding_D: IntArray, prefill_2D: tuple[IntArray, IntArray], tokens_2D: IntArray, steps: int
    ) -> tuple[list[IntArray], int, IntArray]:
        """ns of the slowest rank in each kind of stage, [2, S] each, host overhead apart; the rank slowest in most of
        the first half at the first step; tokens of each half on it, as computed."""
        half_2D = np.stack([decoding_D - decoding_D // 2, decoding_D // 2])
        pad = self._dense.pad
        ramp = np.arange(steps)[:, None]
        out: list[list[IntArray]] = [[] for _ in self._dense.stages]
        slowest, computed_2 = 0, []
        for half, (tokens_D, decode_D) in enumerate(zip(tokens_2D, half_2D, strict=True)):
            most = int(tokens_D.max())
            computed_D = np.full_like(tokens_D, pad[most]) if most < len(pad) else np.maximum(tokens_D, 1)
            full_SD = self._attention(self._full, decode_D, decoding_D, batch.context_D + decoding_D * ramp)
            window_SD = self._attention(self._window, decode_D, decoding_D, batch.window_D + batch.growing_D * ramp)
            shares = [(x + 1 - half) // 2 for x in prefill_2D]
            for kind, table in enumerate(self._dense.stages):
                stage = table.stage
                own_D = table.ns_N[computed_D] - stage.first * self._host_ns
                stage_SD = own_D + stage.full * (full_SD + shares[0])
                stage_SD = stage_SD + stage.window * (window_SD + shares[1])
                if kind == self._most and half == 0:
                    slowest = int(stage_SD[0].argmax())
                out[kind].append(stage_SD.max(axis=1))
            computed_2.append(computed_D)
        own = [self._slow(np.stack(x)) for x in out]
        return own, slowest, np.array([x[slowest] for x in computed_2])

    @staticmethod
    def _attention(table: AttentionTables | None, half_D: IntArray, of_D: IntArray, context_SD: IntArray) -> IntArray:
        """Decode attention of a half [S, D]: it has its share of the contexts."""
        if table is None:
            return np.zeros((1, len(half_D)), np.int64)
        share_SD = context_SD * half_D // np.maximum(of_D, 1)
        return np.asarray(table.decode_BC[half_D, share_SD >> table.shift])

    def _key(
        self, batch: Batch, rank: int, decoding_D: IntArray, prefill_2D: tuple[IntArray, IntArray], tokens_2: IntArray,
        sampled: int, counts: tuple[int, int, int],
    ) -> Key:  # fmt: skip
        layers = self._dense.full_layers, self._dense.window_layers
        spent = sum(int(x[rank]) * n for x, n in zip(prefill_2D, layers, strict=True))
        decoding = int(decoding_D[rank])
        half = decoding - decoding // 2
        of = max(decoding, 1)
        return Key(
            batch.tick, int(tokens_2[0]), sampled, half, int(batch.context_D[rank]) * half // of,
            int(batch.window_D[rank]) * half // of, 0, int(self._slow(np.array(spent))), *counts, 2,
        )  # fmt: skip


def phase_order(phase: Phase) -> Order:
    """The order in which a step's operations are issued."""
    return "aligned" if phase == "prefill" else "shifted"
