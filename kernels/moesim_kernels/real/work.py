"""A step of a scenario: described, resolved into who computes what, and priced by the simulator.

A description (`Setting`) names tokens by request and position alone. `resolve` gives each its slots with the
simulator's own objects (replay, router, capacity, placement, dispatch); `price` asks the simulator's own pricer for the
same tokens. The two share nothing else: who executes a `StepWork` never sees a price.

Legend: N tokens of a step (all ranks), L MoE layers, K choices a token, S slots of a layer over all ranks, D
data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.cost.explain import explain
from moesim.cost.pricer import Batch, Chunk
from moesim.cost.step import StepPricer
from moesim.cost.tokens import TokenExperts
from moesim.dispatch.plan import couples
from moesim.errors import BadInput, Infeasible
from moesim.routing.capacity import Phase
from moesim.scenario.load import Scenario
from moesim.simulate import Prepared, prepare

__all__ = [
    "PART_OF", "PricedStep", "Setting", "StepWork", "couples_tokens", "make_work", "phase_of", "prepare_real", "price",
    "requests_for", "resolve", "slots_of",
]  # fmt: skip

PART_OF: Mapping[str, str] = {
    "host": "host",
    "embedding": "embedding",
    "norm": "own",
    "attention_projections": "own",
    "rope_kv_write": "own",
    "router": "own",
    "top_k": "own",
    "shared_expert": "own",
    "activation": "own",
    "latent_projections": "own",
    "attention_prefill": "attention",
    "attention_decode": "attention",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "final_norm": "own",
    "lm_head": "head",
    "sampling": "head",
}
"""The part of a step, as an executor can time it, to which an operation of `moesim.cost.explain` belongs. own: what a
rank does for its own tokens around the attention kernel and the experts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One step by name, JSON through and through. overrides: of the scenario, as `--set` takes them; decode: (request,
    position of the token that is computed, rank); chunks: (request, tokens before, tokens, rank, 1 where it ends the
    prompt). A decoding token at position p attends to p + 1 keys."""

    name: str
    overrides: tuple[str, ...] = ()
    decode: tuple[tuple[int, int, int], ...] = ()
    chunks: tuple[tuple[int, int, int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens computed by all ranks."""
        return len(self.decode) + sum(c[2] for c in self.chunks)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "overrides": list(self.overrides),
            "decode": [list(d) for d in self.decode],
            "chunks": [list(c) for c in self.chunks],
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Setting:
        """Back from `to_json`. Raises BadInput for what is no setting."""
        try:
            decode = tuple((int(r), int(p), int(d)) for r, p, d in given["decode"])
            chunks = tuple((int(r), int(s), int(t), int(d), int(e)) for r, s, t, d, e in given["chunks"])
            overrides = tuple(str(x) for x in given["overrides"])
            return cls(str(given["name"]), overrides, decode, chunks)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is no setting: {error!r}; it has name, overrides, decode and chunks", "") from None


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes, rank by rank, resolved. Tokens stand as the simulator orders them: those that decode,
    then the chunks. slot_NLK: int64, `num_slots` where a choice was refused or is a null expert. sampled_N: tokens
    that get logits. decode: how many tokens decode, the first ones."""

    request_N: IntArray
    position_N: IntArray
    rank_N: IntArray
    sampled_N: AnyArray
    slot_NLK: IntArray
    decode: int
    chunks: tuple[Chunk, ...]
    num_slots: int
    slots_per_rank: int
    ranks: int

    @property
    def tokens(self) -> int:
        """Of all ranks."""
        return len(self.request_N)

    def rows_LS(self) -> IntArray:
        """Tokens that each slot serves, int64 [L, S]: what the experts compute."""
        layers = self.slot_NLK.shape[1]
        key = self.slot_NLK + np.arange(layers)[None, :, None] * (self.num_slots + 1)
        count = np.bincount(key.ravel(), minlength=layers * (self.num_slots + 1))
        return count.reshape(layers, self.num_slots + 1)[:, : self.num_slots]


@dataclass(frozen=True, slots=True)
class PricedStep:
    """What the simulator says of a step: ns in all, by operation of the simulator, and by part (`PART_OF`). grade:
    share of the time by grade, [measured, interpolated, extrapolated, assumed]; operation_grade: the same of each
    operation that takes time."""

    ns: int
    operation_ns: dict[str, int]
    operator: dict[str, str]
    grade: tuple[float, ...]
    operation_grade: dict[str, tuple[float, ...]]

    @property
    def part_ns(self) -> dict[str, int]:
        """By part, as an executor can time it."""
        out: dict[str, int] = {}
        for name, ns in self.operation_ns.items():
            part = PART_OF.get(name, name)
            out[part] = out.get(part, 0) + ns
        return out


def prepare_real(scenario: Scenario, seed: int | None = None) -> Prepared:
    """Lay a scenario out as `simulate` does, ready for `resolve` and `price`. Raises BadInput where its steps cannot be
    executed one by one (training, tensor parallelism, split experts, tiers, rebalancing, count fidelity), Infeasible
    where it does not fit."""
    told = ""
    if scenario.requests is None:
        told = "mode: training has no steps of requests; give a serving scenario"
    elif scenario.tiers is not None:
        told = "experts in other memory run in the mini-runtime: moesim runtime compare"
    elif not scenario.model.is_moe or scenario.model.attention.kind != "gqa" or not scenario.model.gated_mlp:
        told = (
            f"{scenario.model.name} is not executed: MoE models with gated experts and grouped-query attention are, "
            "such as qwen3-30b-a3b, mixtral-8x7b or a smaller one (workloads/validate/)"
        )
    elif scenario.parallel.tp > 1 or scenario.parallel.replicas > 1 or scenario.parallel.dp != scenario.parallel.ep:
        p = scenario.parallel
        told = f"tp=1, replicas=1 and ep=dp are executed, not tp={p.tp}, dp={p.dp}, ep={p.ep}, replicas={p.replicas}"
    elif scenario.rebalance is not None or scenario.communication.overlap != "none":
        told = "rebalance and communication.overlap are simulated only; leave them out"
    elif scenario.routing.fidelity != "token":
        told = "single tokens are executed: set routing.fidelity to token"
    if told or scenario.requests is None:
        raise BadInput(told, f"scenario {scenario.name}")
    prepared = prepare(scenario, scenario.requests, scenario.seed if seed is None else seed)
    if prepared.deployment is None:
        raise Infeasible(list(prepared.result.reasons))
    return prepared


def _experts(prepared: Prepared) -> TokenExperts:
    moe = prepared.result.pricers[0].moe
    assert isinstance(moe, TokenExperts)
    return moe


def _phase(setting: Setting) -> Phase:
    prompts = sum(c[2] for c in setting.chunks)
    return phase_of(prompts, setting.tokens)


def phase_of(prompts: int, tokens: int) -> Phase:
    """The phase of a step of `tokens` tokens of which `prompts` are of prompts."""
    return "prefill" if 2 * prompts > tokens else "decode"


def _chunks(setting: Setting) -> list[Chunk]:
    return [Chunk(rank, request, start, tokens, bool(last)) for request, start, tokens, rank, last in setting.chunks]


def resolve(prepared: Prepared, setting: Setting) -> StepWork:
    """Who computes what in the step. Deterministic: the same scenario, seed and setting give the same work, wherever.

    Raises BadInput for a setting that the scenario does not hold.
    """
    _check(prepared, setting)
    decode = np.array(setting.decode, np.int64).reshape(-1, 3)
    chunks = _chunks(setting)
    request = np.concatenate([decode[:, 0], *(np.full(c.tokens, c.request, np.int64) for c in chunks)])
    position = np.concatenate([decode[:, 1], *(np.arange(c.start, c.start + c.tokens) for c in chunks)])
    rank = np.concatenate([decode[:, 2], *(np.full(c.tokens, c.rank, np.int64) for c in chunks)])
    slot = slots_of(prepared, request, position, rank, _phase(setting))
    return make_work(prepared, (request, position, rank), slot, len(decode), chunks)


def make_work(
    prepared: Prepared,
    tokens: tuple[IntArray, IntArray, IntArray],
    slot_NLK: AnyArray,
    decode: int,
    chunks: list[Chunk],
) -> StepWork:
    """A step whose tokens (request, position, rank: those that decode, then the chunks') have their slots."""
    experts = prepared.result.experts
    assert experts is not None
    last = [np.arange(c.tokens) == c.tokens - 1 if c.last else np.zeros(c.tokens, bool) for c in chunks]
    return StepWork(
        *tokens,
        sampled_N=np.concatenate([np.ones(decode, bool), *last]),
        slot_NLK=np.asarray(slot_NLK, np.int64),
        decode=decode,
        chunks=tuple(chunks),
        num_slots=experts.placement.num_slots,
        slots_per_rank=experts.placement.slots_per_rank,
        ranks=prepared.layout.dp,
    )


def slots_of(
    prepared: Prepared, request_N: IntArray, position_N: IntArray, rank_N: IntArray, phase: Phase = "decode"
) -> AnyArray:
    """The slots of one step's tokens, [N, L, K]. Where nothing `couples` tokens, any others may stand beside them."""
    return _experts(prepared).slots_of(request_N, position_N, rank_N, 0, phase)


def couples_tokens(prepared: Prepared) -> bool:
    """Whether a token's slots depend on the others of its step: a router or capacity of whole batches, a dispatch that
    plans."""
    experts = prepared.result.experts
    assert experts is not None
    return experts.batches is not None or couples(prepared.result.scenario.policies.dispatch)


def _check(prepared: Prepared, setting: Setting) -> None:
    deployment, ranks = prepared.deployment, prepared.layout.dp
    assert deployment is not None
    requests = len(prepared.stream.prompt_tokens)
    tokens = [(r, p + 1, d) for r, p, d in setting.decode] + [(r, s + t, d) for r, s, t, d, _ in setting.chunks]
    for request, length, rank in tokens:
        if not (0 <= request < requests and 0 < length <= deployment.max_model_len and 0 <= rank < ranks):
            raise BadInput(
                f"request {request} with {length} tokens on rank {rank}: there are {requests} requests of at most "
                f"{deployment.max_model_len} tokens on {ranks} ranks",
                f"setting {setting.name}",
            )
    if not tokens:
        raise BadInput("a step computes at least one token", f"setting {setting.name}")


def price(prepared: Prepared, setting: Setting) -> PricedStep:
    """The simulator's price of the step, by its own pricer."""
    _check(prepared, setting)
    pricer: StepPricer = prepared.result.pricers[0]
    batch, chunks = _batch(prepared, setting), _chunks(setting)
    for d in range(batch.ranks):
        pricer.prepare(sum(1 for x in setting.decode if x[2] == d))
    run = pricer.mixed(batch, chunks, []) if chunks else pricer.decode(batch, 1).cut(1)
    found = explain([run], pricer)
    total = int(run.cumulative_ns[-1])
    shares = tuple(float(x) / max(total, 1) for x in found.grade_ns)
    firm = {name: tuple(map(float, ns / ns.sum())) for name, ns in found.part_grade_ns.items() if ns.sum() > 0}
    return PricedStep(total, dict(found.ns), dict(found.operator), shares, firm)


def _batch(prepared: Prepared, setting: Setting) -> Batch:
    """The decoding requests as the engine would hand them over."""
    ranks = prepared.layout.dp if prepared.layout.meets else 1
    decode = np.array(setting.decode, np.int64).reshape(-1, 3)
    batch = Batch.idle(ranks, lambda: (decode[:, 0], decode[:, 1], decode[:, 2]))
    window = max(prepared.result.scenario.model.window_of_layer, default=0)
    for d in range(ranks):
        context = decode[decode[:, 2] == d, 1] + 1
        inside = np.minimum(context, window) if window else context
        growing = int((context < window).sum()) if window else 0
        batch.set(d, len(context), int(context.sum()), growing, int(inside.sum()))
    return batch


def requests_for(settings: Sequence[Setting]) -> int:
    """How many requests the settings name."""
    return max((r for s in settings for r, *_ in (*s.decode, *s.chunks)), default=-1) + 1
