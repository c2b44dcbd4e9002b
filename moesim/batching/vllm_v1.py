"""Continuous batching as vLLM V1 does it: decodes first, then prompts in chunks, all within one token budget.

Source: vLLM's V1 scheduler as documented (chunked prefill always on, first come first served, running requests
before waiting ones, the latest running request is preempted and recomputed when blocks run out).
"""

from __future__ import annotations

from pydantic import Field

from moesim.batching import NOTHING, Plan, RankView, Wish
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """`long_prefill_token_threshold`: most tokens of one prompt in one step (0: no limit but the budget)."""

    long_prefill_token_threshold: int = Field(default=0, ge=0)

    def plan(self, view: RankView) -> Plan:
        """Fill what the decodes leave of the token budget with prompts, running ones first."""
        budget = view.max_num_batched_tokens - view.decoding
        most = self.long_prefill_token_threshold or budget
        wishes: list[Wish] = []
        for prompt in view.prefilling:
            tokens = min(prompt.target - prompt.computed, budget, most)
            if tokens <= 0:
                break
            wishes.append(Wish(prompt, tokens, False))
            budget -= tokens
        places = view.max_num_seqs - view.running
        for prompt in view.waiting:
            tokens = min(prompt.target, budget, most)
            if places <= 0 or tokens <= 0:
                break
            wishes.append(Wish(prompt, tokens, True))
            budget -= tokens
            places -= 1
        return Plan(tuple(wishes), True) if wishes else NOTHING
