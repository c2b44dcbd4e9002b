"""What traffic a search sees, and what is kept back for its finalists.

A search that is judged on the traffic it searched promises too much: of many candidates the luckiest leads, and a
placement fits the tokens it was fitted to. So the search takes the first share of the routing pool's sequences and of
a recorded request trace, and finalists meet the rest, under seeds that the search never used. What learns from traffic
(placements, caches, prefetchers) learns from the first share and serves the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from moesim.cost.routed import pool_source
from moesim.errors import BadInput
from moesim.scenario.load import Scenario
from moesim.tune_spec import TuneSpec
from moesim.workload.requests import RequestStream, build_requests

__all__ = ["HeldOut", "final_fields", "hold_out", "search_fields"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """share: of the traffic that the search sees. pool: the routing pool is cut, at this share of its sequences.
    requests: of a recorded trace the search takes so many of so many, after an offset. notes: sentences for the user.
    """

    share: float
    pool: bool = False
    requests: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()

    def search(self, scenario: Scenario) -> tuple[str, ...]:
        """`a.b=c` texts under which the scenario, and every candidate, runs while it is searched."""
        out: list[str] = []
        if self.pool:
            first, middle, _ = self._ends(scenario)
            out.append(_text("routing.sequences", [first, middle]))
        if self.requests is not None:
            offset, fit, _ = self.requests
            out += [_text("requests.offset", offset), _text("requests.limit", fit)]
        return tuple(out)

    def final(self, candidate: Scenario) -> tuple[str, ...]:
        """Texts under which a candidate runs when it is judged. candidate: its scenario, without `search`'s texts."""
        out = list(self._final_pool(candidate)) if self.pool else []
        if self.requests is not None:
            offset, fit, total = self.requests
            out += [_text("requests.offset", offset + fit), _text("requests.limit", total - fit)]
        return tuple(out)

    def _ends(self, scenario: Scenario) -> tuple[float, float, float]:
        first, last = scenario.routing.sequences or (0.0, 1.0)
        return first, first + self.share * (last - first), last

    def _final_pool(self, candidate: Scenario) -> tuple[str, ...]:
        first, middle, last = self._ends(candidate)
        served = _text("routing.sequences", [middle, last])
        asked, policies = candidate.placement_from, candidate.policies
        if candidate.training is not None or (asked is not None and asked.routing is not None):
            return (served,)
        if asked is None and candidate.tiers is not None:
            # policies that are to know nothing still know nothing
            return (_text("tiers.fit_share", self.share) if candidate.tiers.fit_share else served,)
        whole = policies.routing.couples or candidate.capacity is not None  # routers that see batches of one pool
        if not whole and candidate.routing.scores.model != "generator":
            return (_text("placement_from.share", self.share),)
        learns = getattr(policies.placement, "uses_traffic", True)
        if candidate.rebalance is not None and candidate.rebalance.start == "initial":
            learns = False
        if not learns:
            return (served,)
        routing = {**(candidate.raw.get("routing") or {}), "sequences": [first, middle]}
        return served, _text("placement_from", {"routing": routing})


def _text(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def hold_out(scenario: Scenario, spec: TuneSpec) -> HeldOut:
    """What can be kept back of a scenario's traffic at `judge.fit_share`. Pure; reads the scenario's trace and pool,
    and holds nothing out where these cannot be read (running it says why)."""
    share = spec.judge.fit_share
    if not share:
        told = "nothing is held out (tune.judge.fit_share 0): finalists meet the same traffic under fresh seeds"
        return HeldOut(share, notes=(told,))
    pool, notes = _pool(scenario, spec, share)
    requests, more = _requests(scenario, share)
    notes += more
    if requests is not None:
        notes += _reaching(spec, requests)
    if not pool and requests is None:
        notes.append("finalists meet streams and draws of fresh seeds; there is nothing recorded to hold out")
    return HeldOut(share, pool, requests, tuple(notes))


def search_fields(scenario: Scenario, spec: TuneSpec) -> tuple[tuple[str, ...], list[str]]:
    """`a.b=c` texts that hold for the whole search, and sentences that say what is held out."""
    held = hold_out(scenario, spec)
    return held.search(scenario), list(held.notes)


def final_fields(scenario: Scenario, spec: TuneSpec, candidate: Scenario | None = None) -> tuple[str, ...]:
    """`a.b=c` texts under which a candidate's scenario (the scenario itself where none is given) is judged."""
    return hold_out(scenario, spec).final(candidate or scenario)


def _pool(scenario: Scenario, spec: TuneSpec, share: float) -> tuple[bool, list[str]]:
    routing = scenario.routing
    if not scenario.model.is_moe or (scenario.training is not None and not routing.names_pool):
        return False, []
    if any(name.split(".")[0] == "model" for name in spec.space):
        return False, ["routing: candidates have different models, so no part of a pool is held out"]
    counts = routing.path is not None and routing.path.lower().endswith((".csv", ".json"))
    if routing.path is None or counts:
        whole = -(-routing.pool_tokens // routing.sequence_tokens)  # as `workload.synthetic` makes them
    else:
        try:
            uncut = replace(scenario, routing=routing.model_copy(update={"sequences": None}))
            whole = pool_source(uncut, scenario.seed).num_sequences
        except BadInput as error:
            return False, [f"routing: nothing is held out: {error.problems[0].message}"]
    low, high = routing.sequences or (0.0, 1.0)
    total = round(high * whole) - round(low * whole)
    first = round((low + share * (high - low)) * whole) - round(low * whole)
    if not 0 < first < total:
        told = f"tune.judge.fit_share {share:g} of its {total:,} sequences is {first:,}"
        return False, [f"routing: the pool cannot be cut, for {told}; finalists meet fresh seeds alone"]
    told = f"routing: the search sees the first {first:,} of the pool's {total:,} sequences, finalists serve the others"
    if counts:
        told += "; both are drawn from the same counts, so what is held out is the draw and not the recording"
    elif routing.path is None:
        told += " (of a pool drawn by their own seed)"
    return True, [told]


def _requests(scenario: Scenario, share: float) -> tuple[tuple[int, int, int] | None, list[str]]:
    """Of a recorded trace: offset, how many the search takes, how many there are. A format that draws (each seed makes
    another stream) needs no cut."""
    spec = scenario.requests
    if spec is None or spec.path is None:
        return None, []
    try:
        streams = [build_requests(spec, scenario.base, seed) for seed in (scenario.seed, scenario.seed + 1)]
    except BadInput:
        return None, []
    if not _alike(*streams):
        return None, []
    total = len(streams[0])
    fit = round(share * total)
    if not 0 < fit < total:
        return None, [f"requests: the trace's {total:,} requests are too few to be cut; finalists serve them all"]
    told = (
        f"requests: the search takes the first {fit:,} of the trace's {total:,}, finalists the {total - fit:,} others"
    )
    return (spec.offset, fit, total), [told]


def _alike(a: RequestStream, b: RequestStream) -> bool:
    columns = ("arrival_ns", "prompt_tokens", "output_tokens")
    return len(a) == len(b) and all(bool((getattr(a, c) == getattr(b, c)).all()) for c in columns)


def _reaching(spec: TuneSpec, requests: tuple[int, int, int]) -> list[str]:
    """Rungs that put back what is held out."""
    out = []
    offset, fit, _ = requests
    for i, rung in enumerate(spec.rungs or ()):
        limit, start = rung.set.get("requests.limit", fit), rung.set.get("requests.offset", offset)
        moved = "requests" in rung.set or "requests.window_s" in rung.set or "requests.path" in rung.set
        if moved or (isinstance(limit, int) and isinstance(start, int) and start + limit > offset + fit):
            out.append(f"tune.rungs.{i} reaches into the requests that are held out; keep it to {fit:,}")
    return out
