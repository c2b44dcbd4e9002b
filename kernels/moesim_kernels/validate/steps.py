"""Steps that stand for a whole simulated run: drawn from the steps it took, with a chance in proportion to their time.

Of n steps drawn with replacement, each with chance p_i / P (P: the run's predicted time), mean(m_i / p_i) x P estimates
the run's measured time without bias (Hansen and Hurwitz, Annals of Mathematical Statistics 1943). The draws are made
while the run goes by: n independent reservoirs of one, each of which takes a step of time p at a total of W with chance
p / W (Chao, Biometrika 1982).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.pricer import Batch, Chunk, Pricer, Run
from moesim.engine.core import run
from moesim.errors import BadInput
from moesim.rng import generator
from moesim.simulate import Prepared
from moesim_kernels.real.work import Setting

__all__ = ["Representative", "representative_steps"]


@dataclass(frozen=True, slots=True)
class Representative:
    """settings: the drawn steps, one may stand there twice under two names; busy_ns: of all steps of the run;
    output_tokens: that it generated; steps: that it took."""

    settings: tuple[Setting, ...]
    busy_ns: int
    output_tokens: int
    steps: int

    @property
    def ns_per_token(self) -> float:
        """Step time a generated token."""
        return self.busy_ns / max(self.output_tokens, 1)


@dataclass
class _Reservoirs:
    """Passes every call on to the pricer, and keeps some of what it was asked."""

    pricer: Pricer
    rng: np.random.Generator
    kept: list[tuple[Setting, int] | None]
    total_ns: int = 0
    steps: int = 0

    def prepare(self, decoding: int) -> None:
        """See Pricer."""
        self.pricer.prepare(decoding)

    def decode(self, batch: Batch, steps: int) -> Run:
        """See Pricer; one step."""
        priced = self.pricer.decode(batch, 1).cut(1)
        self._offer(priced, batch, [], [])
        return priced

    def mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        """See Pricer."""
        priced = self.pricer.mixed(batch, chunks, paused)
        self._offer(priced, batch, chunks, paused)
        return priced

    def _offer(self, priced: Run, batch: Batch, chunks: list[Chunk], paused: list[int]) -> None:
        ns = int(priced.cumulative_ns[-1])
        self.total_ns += ns
        self.steps += 1
        for place in np.flatnonzero(self.rng.random(len(self.kept)) * self.total_ns < ns).tolist():
            self.kept[place] = (_described(batch, chunks, paused), ns)


def _described(batch: Batch, chunks: list[Chunk], paused: list[int]) -> Setting:
    decode = []
    if batch.total_decoding:
        request, position, rank = batch.tokens()
        rows = zip(request.tolist(), position.tolist(), rank.tolist(), strict=True)
        decode = [(r, p, d) for r, p, d in rows if d not in paused]
    asked = [(c.request, c.start, c.tokens, c.rank, int(c.last)) for c in chunks]
    return Setting("", (), tuple(decode), tuple(asked))


def representative_steps(
    prepared: Prepared, count: int, seed: int, name: str, overrides: tuple[str, ...]
) -> Representative:
    """Simulate what was prepared (the engine without run-ahead) and draw `count` of its steps; they are called
    `name`step-01 and so on, and carry `overrides`. Raises BadInput where nothing was served."""
    deployment = prepared.deployment
    assert deployment is not None
    rng = generator(seed, f"validate/steps/{name}")
    if len(set(map(id, deployment.pricers))) > 1:
        raise BadInput("groups that step apart are drawn from one by one; validate one of them", "parallel")
    watched = _Reservoirs(deployment.pricers[0], rng, [None] * count)
    one_by_one = replace(deployment, pricers=[watched] * len(deployment.pricers), run_ahead=False)
    outcome = run(prepared.stream, one_by_one)
    done = outcome.requests.completed
    kept = [one for one in watched.kept if one is not None]
    if not done.any() or not kept:
        raise BadInput("no request was served, so there is no step to draw", "requests")
    settings = [replace(one, name=f"{name}step-{i + 1:02d}", overrides=overrides) for i, (one, _) in enumerate(kept)]
    return Representative(
        tuple(settings), watched.total_ns, int(outcome.requests.output_tokens[done].sum()), watched.steps
    )
