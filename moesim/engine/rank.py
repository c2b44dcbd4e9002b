"""One data-parallel rank: its queue, its running requests and its KV blocks.

Time inside a rank is a decode counter (`dtick`): every request that decodes gets one token each time it goes up, so a
request's finish, its next block and the saturation of its attention window are known in advance, and between two
such events the rank is two numbers: how many decode, and the sum of their context lengths.

KV is counted in units: one block of `block_size` tokens of one layer. Full-attention layers hold every block of a
sequence; window layers hold every block up to the window and one more beyond it, where a window straddles blocks.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from moesim.batching import BatchingPolicy, Plan

__all__ = ["KvShape", "Rank", "Sequence"]

_NEVER = 1 << 60
_WINDOW_FULL, _LAST_TOKEN = 0, 1


class Sequence:
    """A request in flight. `computed` KV tokens while prefilling; once decoding, KV length is `offset + dtick`."""

    __slots__ = ("arrival_ns", "computed", "first_ns", "generated", "index", "offset", "output", "preempted",
                 "prompt", "stalled_ns", "target", "version")  # fmt: skip

    def __init__(self, index: int, prompt: int, output: int, arrival_ns: int) -> None:
        self.index = index
        self.prompt = prompt
        self.output = output
        self.arrival_ns = arrival_ns
        self.target = prompt
        self.computed = 0
        self.generated = 0
        self.offset = 0
        self.version = 0
        self.first_ns = -1
        self.stalled_ns = -1
        self.preempted = 0


@dataclass(frozen=True, slots=True)
class KvShape:
    """How KV is held on one rank: layers by attention kind, tokens a block, units in all."""

    full_layers: int
    window_layers: int
    window: int
    block_size: int
    capacity: int

    @property
    def token_capacity(self) -> int:
        """Tokens held when every block is full and no window is."""
        return self.capacity // (self.full_layers + self.window_layers) * self.block_size

    def units(self, tokens: int) -> int:
        """Units held by one sequence of `tokens` tokens."""
        blocks = -(-tokens // self.block_size)
        if self.window_layers and tokens >= self.window:
            return self.full_layers * blocks + self.window_layers * (-(-self.window // self.block_size) + 1)
        return (self.full_layers + self.window_layers) * blocks


class Rank:
    """Scheduler state of one data-parallel rank. `_check()` states its invariants."""

    __slots__ = ("_crossings", "_crossings_window", "_events", "_filling", "context", "context_window", "decoding",
                 "dtick", "growing", "kv", "max_num_batched_tokens", "max_num_seqs", "peak", "policy", "preemptions",
                 "prefilling", "remaining", "running_set", "used", "waiting")  # fmt: skip

    def __init__(self, kv: KvShape, policy: BatchingPolicy, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.kv = kv
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running_set: dict[int, Sequence] = {}
        self.dtick = 0
        self.decoding = 0
        self.context = 0
        self.context_window = 0
        self.growing = 0  # decoding sequences still shorter than the window
        self.used = 0
        self.peak = 0
        self.preemptions = 0
        self.remaining = 0  # output tokens still to come from running requests
        self._crossings = [0] * kv.block_size
        self._crossings_window = [0] * kv.block_size
        self._filling: dict[int, int] = {}  # dtick -> windows that fill then and take their straddling block
        # (dtick, what, request, version, sequence): a window that fills with the last token closes before it leaves
        self._events: list[tuple[int, int, int, int, Sequence]] = []

    # -- the view a batching policy sees ------------------------------------------------------------------
    @property
    def running(self) -> int:
        return len(self.running_set)

    @property
    def free_units(self) -> int:
        return self.kv.capacity - self.used

    @property
    def free_tokens(self) -> int:
        held = self.context - self.decoding + sum(s.computed for s in self.prefilling)
        return self.kv.token_capacity - held

    def remaining_output(self) -> int:
        return self.remaining

    # -- decode runs ----------------------------------------------------------------------------------------
    def advance(self, steps: int) -> None:
        """`steps` decode steps without an event in between."""
        if steps and self.decoding:
            self.used += self._growth(steps)
            if self.used > self.peak:
                self.peak = self.used
            self.context += self.decoding * steps
            self.context_window += self.growing * steps
            self.remaining -= self.decoding * steps
        self.dtick += steps

    def _growth(self, steps: int) -> int:
        """KV units that the next `steps` decode steps take."""
        kv = self.kv
        turns, rest = divmod(steps, kv.block_size)
        units = turns * (kv.full_layers * self.decoding + kv.window_layers * self.growing)
        if rest:
            first = self.dtick % kv.block_size
            last = first + rest
            ring = self._crossings
            if last <= kv.block_size:
                units += kv.full_layers * sum(ring[first:last])
            else:
                units += kv.full_layers * _around(ring, first, rest)
            if kv.window_layers:
                units += kv.window_layers * _around(self._crossings_window, first, rest)
        return units

    def _roomy(self) -> bool:
        """Every decoding sequence could take a new block in every layer, and two in window layers."""
        kv = self.kv
        return self.free_units >= self.decoding * (kv.full_layers + 2 * kv.window_layers)

    def _need(self, steps: int) -> int:
        """KV units for the next `steps` decode steps, none of which but the last fills a window."""
        need = self._growth(steps)
        return need + self.kv.window_layers * self._filling.get(self.dtick + steps, 0) if self._filling else need

    def horizon(self) -> int:
        """Decode steps until this rank must be looked at again: a finish, a full window, or blocks running out."""
        events = self._events
        while events and events[0][4].version != events[0][3]:
            heapq.heappop(events)
        if not self.decoding:
            return _NEVER
        steps = events[0][0] - self.dtick
        kv = self.kv
        turn = kv.full_layers * self.decoding + kv.window_layers * self.growing
        free = kv.capacity - self.used
        safe = kv.block_size * (free // turn) if turn else _NEVER
        if safe >= steps:
            return steps if steps == 1 or not self._filling or self._need(steps) <= free else steps - 1
        if safe == 0:
            while safe < kv.block_size and self._need(safe + 1) <= free:
                safe += 1
        return min(steps, safe)

    def due(self) -> list[Sequence]:
        """Sequences whose last output token came with the step that just ended; windows that filled are closed."""
        done: list[Sequence] = []
        events = self._events
        while events and (events[0][0] <= self.dtick or events[0][4].version != events[0][3]):
            _, what, _, version, sequence = heapq.heappop(events)
            if version != sequence.version:
                continue
            if what == _WINDOW_FULL:
                self._close_window(sequence)
            else:
                self._leave(sequence)
                self.used -= self.kv.units(sequence.offset + self.dtick)
                sequence.generated = sequence.output
                del self.running_set[sequence.index]
                done.append(sequence)
        return done

    # -- joining and leaving ----------------------------------------------------------------------------------
    def join(self, sequence: Sequence) -> None:
        """A sequence whose prompt is computed and whose next token is out starts to decode."""
        kv, length = self.kv, sequence.target
        sequence.offset = length - self.dtick
        sequence.version += 1
        self.decoding += 1
        self.context += length + 1
        slot = (self.dtick - length) % kv.block_size
        self._crossings[slot] += 1
        end = self.dtick + sequence.output - sequence.generated
        heapq.heappush(self._events, (end, _LAST_TOKEN, sequence.index, sequence.version, sequence))
        if kv.window_layers:
            self.context_window += min(length + 1, kv.window)
            if length < kv.window:
                self.growing += 1
                self._crossings_window[slot] += 1
                full = self.dtick + kv.window - length
                self._filling[full] = self._filling.get(full, 0) + 1
                heapq.heappush(self._events, (full, _WINDOW_FULL, sequence.index, sequence.version, sequence))

    def _close_window(self, sequence: Sequence) -> None:
        kv, length = self.kv, sequence.offset + self.dtick
        self.growing -= 1
        self._crossings_window[(-sequence.offset) % kv.block_size] -= 1
        # contexts count the token being computed: at KV length `window` the window holds `window` keys from now on
        self.context_window -= length + 1 - kv.window
        self.used += kv.window_layers  # the block that a full window straddles
        self.peak = max(self.peak, self.used)
        self._no_longer_fills(self.dtick)

    def _no_longer_fills(self, dtick: int) -> None:
        self._filling[dtick] -= 1
        if not self._filling[dtick]:
            del self._filling[dtick]

    def _leave(self, sequence: Sequence) -> None:
        kv, length = self.kv, sequence.offset + self.dtick
        sequence.version += 1
        self.decoding -= 1
        self.context -= length + 1
        slot = (-sequence.offset) % kv.block_size
        self._crossings[slot] -= 1
        if kv.window_layers:
            if length < kv.window:
                self.context_window -= length + 1
                self.growing -= 1
                self._crossings_window[slot] -= 1
                self._no_longer_fills(self.dtick + kv.window - length)
            else:
                self.context_window -= kv.window

    # -- a step with prompts ------------------------------------------------------------------------------------
    def plan(self) -> tuple[list[tuple[Sequence, int]], bool, list[Sequence]]:
        """Decide the next step: chunks granted (sequence, tokens), whether decodes run, requests preempted."""
        dropped: list[Sequence] = []
        while self.decoding and not self._roomy() and self._need(1) > self.free_units:
            dropped.append(self._preempt())
        if not self.waiting and not self.prefilling:
            return [], True, dropped
        admit = not dropped
        while True:
            chunks, decode = self._grant(self.policy.plan(self), admit)
            if chunks or self.decoding:
                return chunks, decode, dropped
            if self.prefilling:  # only stuck prompts run: the latest gives its blocks back
                dropped.append(self._preempt())
                admit = False
            elif self.waiting and not admit:  # everything was preempted: the queue starts afresh
                admit = True
            else:
                return chunks, decode, dropped

    def _grant(self, plan: Plan, admit: bool) -> tuple[list[tuple[Sequence, int]], bool]:
        chunks: list[tuple[Sequence, int]] = []
        reserve = self._need(1) if plan.decode and self.decoding and plan.wishes else 0
        for wish in plan.wishes:
            sequence: Sequence = wish.prompt  # type: ignore[assignment]  # the engine's own sequences come back
            need = self.kv.units(sequence.computed + wish.tokens) - self.kv.units(sequence.computed)
            if need > self.free_units - reserve or (wish.admit and not admit):
                break
            if wish.admit:
                popped = self.waiting.popleft()
                assert popped is sequence, "a batching policy admits in the order of the queue"
                self.running_set[sequence.index] = sequence
                self.prefilling.append(sequence)
                self.remaining += sequence.output - sequence.generated
            self.used += need
            self.peak = max(self.peak, self.used)
            chunks.append((sequence, wish.tokens))
        return chunks, plan.decode or not chunks

    def _preempt(self) -> Sequence:
        """The latest running request gives its blocks back and will be computed again from the start."""
        _, sequence = self.running_set.popitem()
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
            self.used -= self.kv.units(sequence.computed)
        else:
            length = sequence.offset + self.dtick
            self._leave(sequence)
            self.used -= self.kv.units(length)
            sequence.generated += length - sequence.target
        self.remaining -= sequence.output - sequence.generated
        sequence.target = sequence.prompt + sequence.generated
        sequence.computed = 0
        sequence.preempted += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def finish_chunk(self, sequence: Sequence, tokens: int) -> bool:
        """Book a chunk that has been computed; True when it completed the prompt (one output token is out)."""
        sequence.computed += tokens
        if sequence.computed < sequence.target:
            return False
        self.prefilling.remove(sequence)
        sequence.generated += 1
        self.remaining -= 1
        return True

    def drop(self, sequence: Sequence) -> None:
        """A sequence that ended with its prefill leaves."""
        del self.running_set[sequence.index]
        self.used -= self.kv.units(sequence.computed)

    def _check(self) -> None:
        """Invariants, for tests: counters equal what the sequences say."""
        kv = self.kv
        waiting_to_decode = [s for s in self.running_set.values() if s not in self.prefilling]
        lengths = [s.offset + self.dtick for s in waiting_to_decode]
        assert self.decoding == len(lengths)
        assert self.context == sum(n + 1 for n in lengths)
        if kv.window_layers:
            assert self.growing == sum(n < kv.window for n in lengths)
            assert self.context_window == sum(min(n + 1, kv.window) for n in lengths)
        held = sum(map(kv.units, lengths)) + sum(kv.units(s.computed) for s in self.prefilling)
        assert self.used == held, (self.used, held)
        assert 0 <= self.used <= self.peak <= kv.capacity
        assert sum(self._filling.values()) == self.growing
        assert len(self.running_set) <= self.max_num_seqs


def _around(counts: list[int], first: int, number: int) -> int:
    """Sum of `number` entries of a ring, starting at `first`."""
    last = first + number
    return (
        sum(counts[first:last]) + sum(counts[: last - len(counts)]) if last > len(counts) else sum(counts[first:last])
    )
