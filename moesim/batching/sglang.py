"""Prefill first, as SGLang batches by default: a step computes prompts or decodes, never both.

Source: SGLang's scheduler as documented (prefill prioritised, `chunked_prefill_size` tokens of prompts a step,
a new request admitted only if its prompt and the estimated rest of all outputs fit, the estimate being
`schedule_conservativeness` times `new_token_ratio` times the remaining output). SGLang lets the ratio decay while it
decodes; here it stays constant, which admits a little later and keeps a decode-only run stable.
"""

from __future__ import annotations

from pydantic import Field

from moesim.batching import NOTHING, Plan, RankView, Wish
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """`chunked_prefill_size`: prompt tokens a step; `new_token_ratio`: share of the remaining output reserved."""

    chunked_prefill_size: int = Field(default=8192, ge=1)
    new_token_ratio: float = Field(default=0.4, ge=0.0, le=1.0)

    def plan(self, view: RankView) -> Plan:
        """Wish for prompts if any can be computed; decodes run only in steps without prompts."""
        budget = min(self.chunked_prefill_size, view.max_num_batched_tokens)
        wishes: list[Wish] = []
        for prompt in view.prefilling:
            tokens = min(prompt.target - prompt.computed, budget)
            if tokens <= 0:
                break
            wishes.append(Wish(prompt, tokens, False))
            budget -= tokens
        places = view.max_num_seqs - view.running
        free = view.free_tokens - int(self.new_token_ratio * view.remaining_output())
        for prompt in view.prefilling:
            free -= prompt.target - prompt.computed
        for prompt in view.waiting:
            tokens = min(prompt.target, budget)
            need = prompt.target + int(self.new_token_ratio * (prompt.output - prompt.generated))
            if places <= 0 or tokens <= 0 or (need > free and view.running + len(wishes) > 0):
                break
            wishes.append(Wish(prompt, tokens, True))
            budget -= tokens
            places -= 1
            free -= need
        return Plan(tuple(wishes), False) if wishes else NOTHING
