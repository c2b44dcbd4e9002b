"""Step prices of one group: dense tables and attention tables, and the experts' share from a `MoECost`.

A group of one rank adds everything up. In a group that meets at every MoE layer each stage takes as long as its
slowest rank; stages of one kind are equal, so a step is a few maxima, not one a layer (`moesim.program` states the
reference, and a test compares).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moesim.arrays import IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables
from moesim.cost.pricer import Batch, Chunk, Key, Run
from moesim.cost.split import HalfLayers, Splitter, phase_order, split_tokens
from moesim.routing.capacity import Phase

__all__ = ["MoECost", "NoExperts", "StepPricer"]

_CELLS = 1 << 16
"""steps * ranks priced at once in a group of many ranks"""


class MoECost(Protocol):
    """Time of all MoE layers' dispatch, experts and combine, step by step."""

    def decode_ns(self, batch: Batch, steps: int) -> tuple[IntArray | int, object]:
        """ns of each of the next `steps` decode steps (or fewer) and what explains them."""
        ...

    def mixed_ns(self, batch: Batch, chunks: list[Chunk], paused: list[int], busiest: int) -> tuple[int, object]:
        """ns of one step with prompts; `busiest`: tokens on the rank with the most."""
        ...

    def halves(
        self, batch: Batch, chunks: list[Chunk], paused: list[int], tokens_2D: IntArray, phase: Phase, steps: int
    ) -> HalfLayers:
        """The MoE layers of the next `steps` steps (or fewer), cut in halves of tokens_2D tokens on each rank."""
        ...


class NoExperts:
    """A dense model."""

    def decode_ns(self, batch: Batch, steps: int) -> tuple[int, None]:
        return 0, None

    def mixed_ns(self, batch: Batch, chunks: list[Chunk], paused: list[int], busiest: int) -> tuple[int, None]:
        return 0, None

    def halves(
        self, batch: Batch, chunks: list[Chunk], paused: list[int], tokens_2D: IntArray, phase: Phase, steps: int
    ) -> HalfLayers:
        raise NotImplementedError("a dense model exchanges nothing, so its steps are not cut")


class StepPricer:
    """Prices runs of steps for one group (see `moesim.cost.pricer.Pricer`). splitter: prices steps that are cut in two
    micro-batches, where they can be; None: none is."""

    def __init__(
        self,
        dense: DenseTables,
        full: AttentionTables | None,
        window: AttentionTables | None,
        moe: MoECost,
        splitter: Splitter | None = None,
    ) -> None:
        self.dense = dense
        self.full = full
        self.window = window
        self.moe = moe
        self.splitter = splitter
        self._total = dense.total_N.tolist()
        self._head = dense.head_N.tolist()
        self._pad = dense.pad
        self._largest = len(dense.pad) - 1
        self._ramp = np.arange(8192, dtype=np.int64)
        self._stages = [(s.times, s.stage.full, s.stage.window, s.ns_N) for s in dense.stages]

    def prepare(self, decoding: int) -> None:
        """Fill the attention rows that a rank with `decoding` requests reads."""
        if self.full is not None:
            self.full.fill(decoding)
        if self.window is not None:
            self.window.fill(decoding)
        if self.splitter is not None:
            self.splitter.prepare(decoding)

    def decode(self, batch: Batch, steps: int) -> Run:
        """A run of decode-only steps. Raises nothing; prices at least one step."""
        if batch.ranks == 1:
            return self._decode_alone(batch, steps)
        return self._decode_together(batch, min(steps, max(1, _CELLS // batch.ranks)))

    def _decode_alone(self, batch: Batch, steps: int) -> Run:
        dense = self.dense
        decoding = batch.total_decoding
        tokens = self._pad[decoding] if decoding <= self._largest else decoding
        experts, detail = self.moe.decode_ns(batch, steps)
        if not isinstance(experts, int):
            steps = len(experts)
        _, context, growing, context_window = batch.alone
        ns: IntArray | int = experts + (self._total[tokens] + self._head[decoding])
        ramp = self._ramp[:steps]
        if self.full is not None:
            at = ramp * decoding
            at += context
            at >>= self.full.shift
            own = self.full.rows[decoding].take(at)
            own *= dense.full_layers
            own += ns
            ns = own
        if self.window is not None:
            at = (context_window + growing * ramp) >> self.window.shift
            ns = self.window.rows[decoding].take(at) * dense.window_layers + ns
        assert not isinstance(ns, int)
        key = Key(batch.tick, tokens, decoding, decoding, context, context_window, growing, 0, decoding, 0, decoding)
        return Run(ns.cumsum(), key, detail)

    def _decode_together(self, batch: Batch, steps: int) -> Run:
        decoding_D = batch.decoding_D
        if self.splitter is not None and (tokens_2D := split_tokens(decoding_D)) is not None:
            none = (np.zeros_like(decoding_D),) * 2
            halves = self.moe.halves(batch, [], [], tokens_2D, "decode", steps)
            most = int(decoding_D.max())
            counts = batch.total_decoding, 0, most
            return self.splitter.run(batch, decoding_D, none, tokens_2D, most, halves, "shifted", counts)
        experts, detail = self.moe.decode_ns(batch, steps)
        if not isinstance(experts, int):
            steps = len(experts)
        most = int(decoding_D.max())
        tokens_D = self._padded(decoding_D, most)
        ramp = self._ramp[:steps, None]
        full_SD = window_SD = None
        if self.full is not None:
            full_SD = self.full.decode_BC[decoding_D, (batch.context_D + decoding_D * ramp) >> self.full.shift]
        if self.window is not None:
            at_SD = (batch.window_D + batch.growing_D * ramp) >> self.window.shift
            window_SD = self.window.decode_BC[decoding_D, at_SD]
        ns, slowest = self._meet(tokens_D, full_SD, window_SD)
        ns = ns + (experts + self._head[most])
        key = self._key(batch, slowest, tokens_D, most, 0, batch.total_decoding, 0, most)
        return Run(np.cumsum(ns), key, detail)

    def _padded(self, tokens_D: IntArray, most: int) -> IntArray | int:
        """Tokens on each rank as computed: all padded to one graph, or as they are (an idle rank runs one token)."""
        return self._pad[most] if most <= self._largest else np.maximum(tokens_D, 1)

    def _meet(
        self, tokens_D: IntArray | int, full_SD: IntArray | None, window_SD: IntArray | None
    ) -> tuple[IntArray, int]:
        """Sum over stages of the slowest rank's time [S], and the rank that is slowest in most stages at step 0."""
        total: IntArray | int = 0
        slowest, weight = 0, -1
        for times, full, window, ns_N in self._stages:
            own = ns_N[tokens_D]
            attention: IntArray | int = 0
            if full and full_SD is not None:
                attention = full_SD * full
            if window and window_SD is not None:
                attention = attention + window_SD * window
            if isinstance(attention, int):
                total = total + times * int(np.max(own))
                continue
            if isinstance(tokens_D, int):
                total = total + (attention.max(axis=-1) + own) * times
                own_first = attention[0]
            else:
                stage = attention + own
                total = total + stage.max(axis=-1) * times
                own_first = stage[0]
            if times > weight:
                slowest, weight = int(own_first.argmax()), times
        assert not isinstance(total, int)
        return total, slowest

    def mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        """One step with prompt chunks."""
        if batch.ranks == 1:
            return self._mixed_alone(batch, chunks, paused)
        ranks = batch.ranks
        decoding_D = batch.decoding_D.copy()
        if paused:
            decoding_D[paused] = 0
        tokens_D, sampled_D = decoding_D.copy(), decoding_D.copy()
        full_ns_D, window_ns_D = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
        prefill = 0
        for chunk in chunks:
            d = chunk.rank
            tokens_D[d] += chunk.tokens
            sampled_D[d] += chunk.last
            prefill += chunk.tokens
            if self.full is not None:
                full_ns_D[d] += self.full.prefill(chunk.start, chunk.tokens)
            if self.window is not None:
                window_ns_D[d] += self.window.prefill(chunk.start, chunk.tokens)
        busiest = int(tokens_D.max())
        sampled, total_decode = int(sampled_D.max()), int(decoding_D.sum())
        if self.splitter is not None and (tokens_2D := split_tokens(tokens_D)) is not None:
            phase: Phase = "prefill" if prefill > total_decode else "decode"
            halves = self.moe.halves(batch, chunks, paused, tokens_2D, phase, 1)
            counts = total_decode, prefill, busiest
            own = full_ns_D, window_ns_D
            return self.splitter.run(batch, decoding_D, own, tokens_2D, sampled, halves, phase_order(phase), counts)
        full_D = window_D = None
        if self.full is not None:
            decode = self.full.decode_BC[decoding_D, batch.context_D >> self.full.shift]
            full_D = (full_ns_D + decode)[None]
        if self.window is not None:
            decode = self.window.decode_BC[decoding_D, batch.window_D >> self.window.shift]
            window_D = (window_ns_D + decode)[None]
        computed_D = self._padded(tokens_D, busiest)
        ns, slowest = self._meet(computed_D, full_D, window_D)
        experts, detail = self.moe.mixed_ns(batch, chunks, paused, busiest)
        ns = ns + (experts + self._head[sampled])
        spent = int(full_ns_D[slowest]) * self.dense.full_layers + int(window_ns_D[slowest]) * self.dense.window_layers
        key = self._key(batch, slowest, computed_D, sampled, spent, total_decode, prefill, busiest)
        if slowest in paused:
            key = key._replace(decoding=0, context=0, context_window=0)
        return Run(ns, key, detail)

    def _mixed_alone(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        decoding = 0 if paused else batch.total_decoding
        prefill = sum(c.tokens for c in chunks)
        sampled = decoding + sum(c.last for c in chunks)
        busiest = decoding + prefill
        tokens = self._pad[busiest] if busiest <= self._largest else busiest
        _, context, _, context_window = batch.alone
        spent = own = 0
        if self.full is not None:
            spent += self.dense.full_layers * sum(self.full.prefill(c.start, c.tokens) for c in chunks)
            own += self.dense.full_layers * int(self.full.rows[decoding][context >> self.full.shift])
        if self.window is not None:
            spent += self.dense.window_layers * sum(self.window.prefill(c.start, c.tokens) for c in chunks)
            own += self.dense.window_layers * int(self.window.rows[decoding][context_window >> self.window.shift])
        experts, detail = self.moe.mixed_ns(batch, chunks, paused, busiest)
        ns = self._total[tokens] + self._head[sampled] + spent + own + experts
        key = Key(
            batch.tick,
            tokens,
            sampled,
            decoding,
            context,
            context_window,
            0,
            spent,
            decoding,
            prefill,
            busiest,
        )
        return Run(np.array([ns], np.int64), key, detail)

    def _key(
        self, batch: Batch, rank: int, tokens_D: IntArray | int, sampled: int, spent: int, decode: int, prefill: int,
        busiest: int,
    ) -> Key:  # fmt: skip
        tokens = tokens_D if isinstance(tokens_D, int) else int(tokens_D[rank])
        return Key(
            batch.tick, tokens, sampled, int(batch.decoding_D[rank]), int(batch.context_D[rank]),
            int(batch.window_D[rank]), int(batch.growing_D[rank]), spent, decode, prefill, busiest,
        )  # fmt: skip
