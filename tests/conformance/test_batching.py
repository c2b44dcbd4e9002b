"""Every file of moesim/batching, found by itself: budgets, order, purity, the stability rule, and no starvation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.batching import BatchingPolicy, Plan
from moesim.engine.rank import KvShape, Rank, Sequence
from moesim.policy import load_policy, policy_kinds
from moesim.simulate import simulate
from tests.build import scenario, tiny_model, with_kv_tokens

KINDS = policy_kinds("batching")
PARAMETERS: list[Any] = [
    {"kind": "vllm_v1", "long_prefill_token_threshold": 5},
    {"kind": "sglang", "new_token_ratio": 0.0, "chunked_prefill_size": 7},
    {"kind": "sglang", "new_token_ratio": 1.0},
]
"""beside every kind with its defaults"""
EVERY = pytest.mark.parametrize("value", [*KINDS, *PARAMETERS], ids=str)
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


class Case(NamedTuple):
    """A rank alone: KV blocks that hold any one request, limits, requests (prompt, output), steps to play first."""

    block_size: int
    blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    requests: list[tuple[int, int]]
    steps: int

    def rank(self, policy: BatchingPolicy) -> Rank:
        kv = KvShape(full_layers=1, window_layers=0, window=0, block_size=self.block_size, capacity=self.blocks)
        rank = Rank(kv, policy, self.max_num_seqs, self.max_num_batched_tokens)
        rank.waiting.extend(Sequence(i, prompt, output, 0) for i, (prompt, output) in enumerate(self.requests))
        return rank


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size, seqs = draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 6))
    requests = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8))
    blocks = draw(st.integers(-(-60 // block_size), -(-240 // block_size)))
    return Case(block_size, blocks, seqs, draw(st.integers(seqs, 64)), requests, draw(st.integers(0, 15)))


def step(rank: Rank) -> tuple[list[Sequence], int]:
    """Plan and book one step as the engine does; sequences that ended, tokens computed."""
    chunks, decode, _ = rank.plan()
    computed = sum(tokens for _, tokens in chunks) + (rank.decoding if decode else 0)
    if decode:
        rank.advance(1)
    done = rank.due()
    for sequence, tokens in chunks:
        if rank.finish_chunk(sequence, tokens):
            if sequence.generated == sequence.output:
                rank.drop(sequence)
                done.append(sequence)
            else:
                rank.join(sequence)
    rank._check()
    return done, computed


def played(case: Case, value: Any) -> Rank:
    """The rank after `case.steps` steps."""
    rank = case.rank(load_policy("batching", value))
    for _ in range(case.steps):
        if rank.waiting or rank.running:
            step(rank)
    return rank


def test_the_kinds_are_found() -> None:
    assert {"sglang", "vllm_v1"} <= set(KINDS)


@EVERY
@SETTINGS
@given(case=cases())
def test_a_plan_keeps_budgets_and_order(value: Any, case: Case) -> None:
    rank = played(case, value)
    plan = rank.policy.plan(rank)
    assert isinstance(plan, Plan)
    running = [w for w in plan.wishes if not w.admit]
    admitted = [w for w in plan.wishes if w.admit]
    assert plan.wishes == (*running, *admitted), "running prompts come before new ones"
    assert [w.prompt for w in running] == rank.prefilling[: len(running)], "in the order in which they were admitted"
    assert [w.prompt for w in admitted] == list(rank.waiting)[: len(admitted)], "in the order of the queue"
    assert len(admitted) <= rank.max_num_seqs - rank.running
    assert all(1 <= w.tokens <= w.prompt.target - w.prompt.computed for w in plan.wishes)
    tokens = sum(w.tokens for w in plan.wishes) + (rank.decoding if plan.decode else 0)
    assert tokens <= rank.max_num_batched_tokens
    assert plan.decode or plan.wishes, "a plan does something"


@EVERY
@SETTINGS
@given(case=cases())
def test_a_plan_is_a_pure_function(value: Any, case: Case) -> None:
    """Asked twice, and asked of another instance, it says the same and leaves the rank as it was."""
    rank, twin = played(case, value), played(case, value)
    before = [(s.index, s.computed, s.target, s.generated) for s in (*rank.waiting, *rank.running_set.values())]
    first, again, other = rank.policy.plan(rank), rank.policy.plan(rank), twin.policy.plan(twin)
    assert again == first
    assert shape(other) == shape(first)
    assert [(s.index, s.computed, s.target, s.generated) for s in (*rank.waiting, *rank.running_set.values())] == before
    rank._check()


def shape(plan: Plan) -> tuple[Any, ...]:
    return plan.decode, [(w.prompt.index, w.tokens, w.admit) for w in plan.wishes]  # type: ignore[attr-defined]


@EVERY
@SETTINGS
@given(case=cases())
def test_no_wish_stays_no_wish_while_only_decoding_goes_on(value: Any, case: Case) -> None:
    """The rule of moesim/batching/__init__.py, on which runs of many steps rest; and so for wishes not granted."""
    rank = played(case, value)
    for _ in range(200):
        if not rank.waiting and not rank.running:
            return
        chunks = None
        if not rank.policy.plan(rank).wishes and rank.decoding and rank._need(1) <= rank.free_units:
            for _ in range(rank.horizon() - 1):
                rank.advance(1)
                assert not rank.policy.plan(rank).wishes
                chunks, decode, dropped = rank.plan()
                assert (chunks, decode, dropped) == ([], True, [])
        step(rank)


@EVERY
@SETTINGS
@given(case=cases())
def test_every_request_ends(value: Any, case: Case) -> None:
    """Even where blocks run out: whatever was computed and thrown away, all answers come, and every step computes."""
    rank = case.rank(load_policy("batching", value))
    done: list[Sequence] = []
    for _ in range(5000):
        if not rank.waiting and not rank.running:
            break
        ended, computed = step(rank)
        assert computed > 0
        done.extend(ended)
    assert sorted(s.index for s in done) == list(range(len(case.requests)))
    assert all(s.generated == s.output for s in done)
    assert (rank.used, rank.decoding, rank.context, rank.remaining, rank.prefilling) == (0, 0, 0, 0, [])


@EVERY
def test_every_request_ends_in_a_simulation(tmp_path: Path, value: Any) -> None:
    """Little memory and many requests on two ranks, twice: all served, with preemptions, alike to the last byte."""
    requests = {
        "format": "closed_loop", "concurrency": 30, "num_requests": 60,
        "prompt_tokens": {"distribution": "uniform", "min": 1, "max": 60},
        "output_tokens": {"distribution": "geometric", "mean": 25, "max": 60},
    }  # fmt: skip
    engine = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "block_size": 4, "graph_batch_sizes": [1, 8, 16]}
    built = with_kv_tokens(
        scenario(
            tmp_path, tiny_model(tmp_path), requests=requests, engine=engine, parallel={"dp": 2, "ep": 2},
            policies={"batching": value},
        ), 200,
    )  # fmt: skip
    a, b = simulate(built), simulate(built)
    assert a.outcome is not None
    assert a.outcome.requests.completed.all()
    careful = value == {"kind": "sglang", "new_token_ratio": 1.0}
    assert a.outcome.requests.preemptions.any() or careful, "the case must run out of blocks"
    for one, other in ((a.requests_table(), b.requests_table()), (a.steps_table(), b.steps_table())):
        for column, values in one.items():
            np.testing.assert_array_equal(values, other[column], err_msg=column)
