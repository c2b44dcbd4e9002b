"""Held-out steps of a scenario: what a serving engine would ask for, and what no calibration has seen.

Half of them decode only, a quarter are prompts alone, a quarter both. Within each kind sizes are drawn log-uniformly
by Latin hypercube (McKay, Beckman and Conover, Technometrics 1979): n settings fall into n equal parts of every axis,
so few settings reach all of it. Half of them run the scenario as it is, the others one variant each: other popularity
of the experts, other capacities, where the scenario allows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.arrays import FloatArray
from moesim.errors import BadInput, MoesimError
from moesim.rng import generator
from moesim.simulate import Prepared
from moesim_kernels.real.work import Setting

__all__ = ["VARIANTS", "Limits", "allowed_variants", "draw_settings", "kind_of_setting"]

VARIANTS: tuple[tuple[str, ...], ...] = (
    ("routing.popularity_zipf=0.4",),
    ("routing.popularity_zipf=0.8",),
    ("routing.popularity_zipf=1.2",),
    ("capacity.factor=1.0",),
    ("capacity.factor=1.25",),
    ("capacity.factor=2.0",),
)
_KINDS = ("decode", "prompt", "decode", "mixed")
_MOST_CHUNKS = 4
_AXES = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold. ranks: data-parallel ones; the others are of one rank: sequences, tokens, tokens that its
    KV cache holds; length: of a sequence; requests: of the scenario's stream. alike: sequences of a step decode at one
    context, as on CUDA, where no kernel of torch takes different ones at once: each would be a launch of its own, which
    an engine's kernel does not have."""

    ranks: int
    sequences: int
    batched_tokens: int
    kv_tokens: int
    length: int
    requests: int
    alike: bool = False

    @classmethod
    def of(cls, prepared: Prepared, alike: bool = False) -> Limits:
        """Of a scenario that was laid out."""
        d = prepared.deployment
        assert d is not None
        spare = d.kv.block_size * d.max_num_seqs  # a sequence's last block is not full
        return cls(
            ranks=prepared.layout.dp,
            sequences=d.max_num_seqs,
            batched_tokens=d.max_num_batched_tokens,
            kv_tokens=max(d.kv.token_capacity - spare, d.kv.block_size),
            length=d.max_model_len,
            requests=len(prepared.stream.prompt_tokens),
            alike=alike,
        )


def kind_of_setting(setting: Setting) -> str:
    """decode, prompt or mixed."""
    if not setting.chunks:
        return "decode"
    return "mixed" if setting.decode else "prompt"


def allowed_variants(
    try_out: Callable[[tuple[str, ...]], str], variants: Sequence[tuple[str, ...]] = VARIANTS
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The variants that the scenario allows and that change it, and why the others do not.

    try_out: prepares the scenario with these overrides and returns its hash, or raises BadInput or Infeasible.
    """
    known, fine, why = {try_out(()): "the scenario as it is"}, [], {}
    for variant in variants:
        name = " ".join(variant)
        try:
            found = try_out(variant)
        except MoesimError as error:
            why[name] = str(error).splitlines()[0]
            continue
        if found in known:
            why[name] = f"is {known[found]}"
            continue
        known[found] = name
        fine.append(variant)
    return fine, why


def draw_settings(
    limits: Limits, count: int, seed: int, variants: Sequence[tuple[str, ...]] = (), name: str = ""
) -> list[Setting]:
    """`count` settings, the same for the same arguments; `name` begins each one's name and keys its draws.

    Raises BadInput where the scenario has too few requests to fill a step.
    """
    if limits.requests < limits.ranks:
        raise BadInput(
            f"{limits.requests} requests cannot fill {limits.ranks} ranks; the stream needs more", "requests"
        )
    kinds = [_KINDS[i % len(_KINDS)] for i in range(count)]
    out: list[Setting] = []
    made = dict.fromkeys(kinds, 0)
    axes = {kind: _hypercube(kinds.count(kind), seed, f"{name}{kind}") for kind in made}
    chosen = {kind: _variants(kinds.count(kind), variants, seed, f"{name}{kind}") for kind in made}
    for number, kind in enumerate(kinds):
        rng = generator(seed, f"validate/setting/{name}", number)
        at = made[kind]
        made[kind] += 1
        decode, chunks = _MAKE[kind](limits, axes[kind][at], rng)
        out.append(Setting(f"{name}{kind}-{at + 1:02d}", chosen[kind][at], tuple(decode), tuple(chunks)))
    return out


def _hypercube(count: int, seed: int, what: str) -> FloatArray:
    """[count, _AXES] in (0, 1): each axis has one point in each of `count` equal parts."""
    rng = generator(seed, f"validate/axes/{what}")
    parts = np.stack([rng.permutation(count) for _ in range(_AXES)], axis=1)
    return np.asarray((parts + rng.random((count, _AXES))) / count)


def _variants(count: int, variants: Sequence[tuple[str, ...]], seed: int, what: str) -> list[tuple[str, ...]]:
    """Every other setting as the scenario is; the rest take turns, from a drawn start on, in a drawn order."""
    rng = generator(seed, f"validate/variants/{what}")
    start = int(rng.integers(len(variants))) if variants else 0
    turn = [variants[(start + i) % len(variants)] if variants and i % 2 else () for i in range(count)]
    return [turn[i] for i in rng.permutation(count)]


def _between(low: float, high: float, u: float) -> int:
    """A whole number from low to high, log-uniform in u."""
    high = max(low, high)
    return int(np.clip(np.rint(low * (high / low) ** u), low, high))


_Made = tuple[list[tuple[int, int, int]], list[tuple[int, int, int, int, int]]]


def _decoding(
    limits: Limits, batch: int, context: int, rng: np.random.Generator, request: list[int]
) -> list[tuple[int, int, int]]:
    """`batch` requests on ranks in turns, contexts within a factor of two of `context`, or all that."""
    spread = np.exp(rng.uniform(-np.log(2.0), np.log(2.0), batch))
    if limits.alike:
        spread[:] = 1.0
    length = np.clip(np.rint(context * spread), 1, limits.length).astype(np.int64)
    rank = np.arange(batch) % limits.ranks
    for d in range(limits.ranks):
        mine = rank == d
        held = int(length[mine].sum())
        if held > limits.kv_tokens // 2:  # the other half is for prompts
            length[mine] = np.maximum(1, length[mine] * (limits.kv_tokens // 2) // held)
    return [(request[i], int(length[i]) - 1, int(rank[i])) for i in range(batch)]


def _prompts(
    limits: Limits, tokens: int, rank: int, rng: np.random.Generator, request: list[int], prefixed: bool
) -> list[tuple[int, int, int, int, int]]:
    """Chunks of one rank with `tokens` tokens in all: whole prompts, the first perhaps the end of a longer one, the
    last perhaps a beginning. `request` has one id for each chunk that may be made."""
    most = min(_MOST_CHUNKS, len(request), tokens)
    least = -(-tokens // limits.length)
    number = int(np.clip(1 + rng.integers(0, 2) * rng.integers(0, most), min(least, most), most))
    size = np.maximum(1, np.floor(tokens * rng.dirichlet(np.full(number, 3.0)))).astype(np.int64)
    size[int(size.argmax())] += tokens - int(size.sum())
    out = []
    for i in range(number):
        length = int(min(size[i], limits.length))
        room = min(limits.length, limits.kv_tokens // 2) - length
        start = _between(1, room, float(rng.random())) if prefixed and i == 0 and room > 0 else 0
        ends = int(i < number - 1 or rng.random() < 0.7)
        out.append((request[i], start, length, rank, ends))
    return out


def _ids(limits: Limits, rng: np.random.Generator) -> list[int]:
    """The stream's requests in a drawn order: no step names one twice."""
    return [int(x) for x in rng.permutation(limits.requests)]


def _make_decode(limits: Limits, u: FloatArray, rng: np.random.Generator) -> _Made:
    request = _ids(limits, rng)
    most = min(limits.sequences, limits.batched_tokens) * limits.ranks
    batch = _between(limits.ranks, min(most, limits.requests), float(u[0]))
    return _decoding(limits, batch, _between(1, limits.length, float(u[1])), rng, request), []


def _make_prompt(limits: Limits, u: FloatArray, rng: np.random.Generator) -> _Made:
    request = _ids(limits, rng)
    share = max(1, min(limits.requests // limits.ranks, limits.sequences))
    tokens = _between(1, min(limits.batched_tokens, share * limits.length), float(u[0]))
    chunks = []
    for rank in range(limits.ranks):
        mine = request[rank * share : (rank + 1) * share]
        chunks += _prompts(limits, tokens, rank, rng, mine, bool(u[2] < 0.4))
    return [], chunks


def _make_mixed(limits: Limits, u: FloatArray, rng: np.random.Generator) -> _Made:
    request = _ids(limits, rng)
    share = max(1, min(limits.requests // limits.ranks, limits.sequences))
    if share < 2 or limits.batched_tokens < 2:  # no room for both
        return _make_decode(limits, u, rng)
    batch = _between(1, min(share - 1, limits.batched_tokens - 1), float(u[0]))
    tokens = _between(1, min(limits.batched_tokens - batch, (share - batch) * limits.length), float(u[2]))
    decode = _decoding(limits, batch * limits.ranks, _between(1, limits.length, float(u[1])), rng, request)
    rest = request[batch * limits.ranks :]
    chunks = []
    for rank in range(limits.ranks):
        mine = rest[rank * (share - batch) : (rank + 1) * (share - batch)]
        chunks += _prompts(limits, tokens, rank, rng, mine, bool(u[3] < 0.4))
    return decode, chunks


_MAKE: dict[str, Callable[[Limits, FloatArray, np.random.Generator], _Made]] = {
    "decode": _make_decode,
    "prompt": _make_prompt,
    "mixed": _make_mixed,
}
