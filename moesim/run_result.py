"""What a serving run found: records, memory, explanation, and the figures and tables made of them."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import moesim
from moesim.arrays import AnyArray, FloatArray
from moesim.cost.bank import CountExperts
from moesim.cost.deployed import (
    Experts,
)
from moesim.cost.explain import Explanation
from moesim.cost.offload_figures import cache_figures
from moesim.cost.offload_setup import Offload
from moesim.cost.offloaded import OffloadedPricer
from moesim.cost.rebalancing import RebalancingPricer
from moesim.cost.step import StepPricer
from moesim.cost.tokens import TokenExperts
from moesim.dispatch.plan import shares
from moesim.engine.core import Outcome
from moesim.engine.rank import KvShape
from moesim.hardware import GRADES
from moesim.layout import Layout
from moesim.memory import RankMemory
from moesim.metrics import Errors, latencies, throughput
from moesim.placement import Placement
from moesim.placement.moves import MOVE_CLASSES
from moesim.record import REJECTED
from moesim.routing.batch import BINS
from moesim.scenario.load import Scenario
from moesim.workload.requests import RequestStream

__all__ = ["SCHEMA_VERSION", "RunResult"]

_EXCHANGE = 9 + 2 * BINS
"""row of `cost.experts.MoESums.stats`: ns of exchanges, hidden or not; then chunks, experts sent, ns of sending them"""

SCHEMA_VERSION = 1


@dataclass(slots=True)
class RunResult:
    """A run: records, memory and figures. `outcome` is None where the deployment does not fit."""

    scenario: Scenario
    seed: int
    reasons: tuple[str, ...] = ()
    over: float | None = None
    """memory that is missing as a share of what is there, where it does not fit and a number says so"""
    stream: RequestStream | None = None
    outcome: Outcome | None = None
    memory: RankMemory | None = None
    layout: Layout | None = None
    explanation: Explanation | None = None
    experts: Experts | None = None
    offload: Offload | None = None
    pricers: list[StepPricer] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    ready_ns: int = 0
    peak_kv_units: int = 0
    groups: int = 1
    kv: KvShape | None = None
    """KV cache of one data-parallel rank"""
    loop_s: float = 0.0
    """seconds the event loop took, pricing included; set-up and metrics apart"""

    @property
    def feasible(self) -> bool:
        return self.outcome is not None

    def to_json(self) -> dict[str, Any]:
        """The stable result (see docs/result-schema.md): the same bytes for the same scenario, seed and version,
        but for `provenance.host` and `provenance.elapsed`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.scenario.name,
            "seed": self.seed,
            "feasible": self.feasible,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "summary": self._summary() if self.outcome is not None else None,
            "provenance": self._provenance(),
        }

    @property
    def devices(self) -> int:
        """Devices of the whole deployment."""
        p = self.scenario.parallel
        return p.tp * p.dp * p.replicas

    @property
    def operator_share(self) -> dict[str, float]:
        """Share of the steps' time by the operator that priced it; empty where nothing ran."""
        e = self.explanation
        share: dict[str, float] = {}
        if e is not None:
            total = max(sum(e.ns.values()), 1)
            for name, spent in e.ns.items():
                share[e.operator[name]] = share.get(e.operator[name], 0.0) + spent / total
        return share

    @property
    def errors(self) -> Errors:
        """Relative error of step time: profile by operator shares, and bank by the experts' share."""
        e = self.explanation
        if e is None:
            return Errors(0.0, 0.0)
        total = max(sum(e.ns.values()), 1)
        profile = self.scenario.cluster.profile
        device = {operator: part for operator, part in self.operator_share.items() if operator != "host"}
        variance = sum((part * profile.error(operator)) ** 2 for operator, part in device.items())
        variance += (sum(device.values()) * profile.speed_error) ** 2
        expert_share = sum(e.ns.get(name, 0) for name in ("dispatch", "experts", "combine")) / total
        return Errors(float(np.sqrt(variance)), e.bank_sigma * expert_share)

    def _summary(self) -> dict[str, Any]:
        assert self.outcome is not None
        assert self.stream is not None
        requests, steps = self.outcome.requests, self.outcome.steps
        errors = self.errors
        done = requests.completed
        rates = throughput(requests, self.stream.concurrency is not None, self.devices, self.scenario.slo, errors)
        rejected = int((requests.target == REJECTED).sum())
        return {
            "requests": {
                "completed": int(done.sum()),
                "rejected": rejected,
                "unfinished": int(len(done) - done.sum()) - rejected,
                "preempted": int((requests.preemptions > 0).sum()),
                "preemptions": int(requests.preemptions.sum()),
            },
            "tokens": {
                "prompt": int(requests.prompt_tokens[done].sum()),
                "output": int(requests.output_tokens[done].sum()),
            },
            **rates,
            **latencies(requests, steps, errors),
            "offered_req_per_s": self._offered(),
            "busy_share": self.busy_share,
            "steps": steps.steps,
            "runs": len(steps.run_steps),
            "ready_s": self.ready_ns / 1e9,
            "balance": self._balance(),
            "time_share": self._time_share(),
            "links": self._links(),
            "rebalance": self._rebalance(),
            "overlap": self._overlap(),
            "guests": self._guests(),
            "memory": self._memory(),
            "drops": self._drops(),
            "routing": self._routing(),
            "cache": self._cache(),
            "replay": self._replay(),
            "error": {"profile": errors.profile, "bank": errors.bank},
        }

    def _offered(self) -> float | None:
        """Arrivals a second of an open stream; None for a closed loop or a single instant."""
        assert self.stream is not None
        span = int(self.stream.arrival_ns[-1] - self.stream.arrival_ns[0])
        return None if self.stream.concurrency is not None or not span else (len(self.stream) - 1) / span * 1e9

    @property
    def busy_share(self) -> float:
        """Share of the time from the first arrival to the last step's end in which a group steps, mean of groups."""
        assert self.outcome is not None
        steps, arrival_ns = self.outcome.steps, self.outcome.requests.arrival_ns
        span = max(steps.end_ns() - int(arrival_ns.min()), 1)
        return float(steps.duration_ns.sum()) / span / self.groups

    def _balance(self) -> dict[str, Any] | None:
        e = self.explanation
        if e is None or self.experts is None or not e.stats[1] or self.offload is not None:
            return None
        most, mean, ratio, _, _, mean_ns = e.stats[:6]
        return {
            "max_over_mean_load": float(ratio) / e.steps,
            "lockstep": float(most / mean),
            "expert_idle_share": 1.0 - float(mean_ns) / max(e.ns.get("experts", 0), 1),
            "planned": self.experts.planned,
            "bound": self.experts.bound,
            "hottest": self._hottest(),
        }

    def rank_load_LP(self) -> FloatArray | None:
        """Mean share of (token, expert) pairs by layer and expert-parallel part, each layer summing to 1."""
        slot_LS = self._slot_load()
        if slot_LS is None or self.experts is None:
            return None
        load_LP = self._placement().rank_load(slot_LS) + sum(moe.guests.load_LP for moe in self._moes())
        return np.asarray(load_LP / np.maximum(load_LP.sum(axis=1, keepdims=True), 1e-300))

    def _rebalancing(self) -> list[RebalancingPricer]:
        return [p for p in self.pricers if isinstance(p, RebalancingPricer)]

    def _placement(self) -> Placement:
        """Where experts are, in the end and in the first group where they move."""
        assert self.experts is not None
        moving = self._rebalancing()
        return moving[0].placement if moving else self.experts.placement

    def _rebalance(self) -> dict[str, Any] | None:
        """What moving experts did, over all groups."""
        groups = self._rebalancing()
        if not groups or self.explanation is None:
            return None
        done = [g.done for g in groups]
        slots = {name: sum(d.slots.get(name, 0) for d in done) for name in MOVE_CLASSES}
        size = groups[0].slot_bytes
        before, after = ([b for d in done for b in getattr(d, f"balance_{when}")] for when in ("before", "after"))
        return {
            "asked": sum(d.asked for d in done),
            "moved": sum(d.moved for d in done),
            "skipped_balanced": sum(d.skipped_balanced for d in done),
            "skipped_busy": sum(d.skipped_busy for d in done),
            "slots": slots,
            "bytes": {name: number * size for name, number in slots.items() if name != "unchanged"},
            "transfer_s": sum(d.transfer_ns for d in done) / 1e9,
            "step_time_s": self.explanation.ns.get("rebalance", 0) / 1e9,
            "planned_before": float(np.mean(before)) if before else None,
            "planned_after": float(np.mean(after)) if after else None,
        }

    def _moes(self, every: bool = False) -> list[CountExperts | TokenExperts]:
        """What priced the experts of the groups; of the first alone where maps differ, unless `every` one is asked."""
        pricers = self.pricers[:1] if self._rebalancing() and not every else self.pricers
        return [p.moe for p in pricers if isinstance(p.moe, CountExperts | TokenExperts)]

    def _guests(self) -> dict[str, Any] | None:
        """Weights that dispatch sent along with tokens."""
        e, experts, policy = self.explanation, self.experts, self.scenario.policies.dispatch
        if e is None or experts is None or not getattr(policy, "guests", False) or shares(policy):
            return None
        size = experts.prices.expert_bytes
        return {
            "bytes": round(float(e.stats[_EXCHANGE + 2]) * size),
            "transfer_s": float(e.stats[_EXCHANGE + 3]) / 1e9,
            "peak_bytes": round(max(moe.guests.most for moe in self._moes(every=True)) * size),
        }

    def _slot_load(self) -> FloatArray | None:
        loads = [moe.slot_load_LS() for moe in self._moes()]
        return sum(loads, np.zeros_like(loads[0])) if loads else None

    def _hottest(self) -> dict[str, Any] | None:
        """The layer and rank that carry most against their layer's mean, and the heaviest expert there."""
        slot_LS, rank_LP = self._slot_load(), self.rank_load_LP()
        if slot_LS is None or rank_LP is None or self.experts is None:
            return None
        ratio = rank_LP / np.maximum(rank_LP.mean(axis=1, keepdims=True), 1e-300)
        layer, part = (int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
        placement = self._placement()
        slots = slice(part * placement.slots_per_rank, (part + 1) * placement.slots_per_rank)
        slot = slots.start + int(slot_LS[layer, slots].argmax())
        return {
            "layer": self.scenario.model.moe_passes[layer],
            "rank": part,
            "max_over_mean_load": float(ratio[layer, part]),
            "expert": int(placement.slot_to_expert_LS[layer, slot]),
            "expert_share_of_rank": float(slot_LS[layer, slot] / max(slot_LS[layer, slots].sum(), 1e-300)),
        }

    def _drops(self) -> dict[str, Any] | None:
        """What the capacity refused, as shares of the (token, expert) pairs that were chosen."""
        e, router = self.explanation, None if self.experts is None else self.experts.batches
        if e is None or router is None or router.capacity is None:
            return None
        wanted, dropped = e.stats[9 : 9 + BINS], e.stats[9 + BINS : 9 + 2 * BINS]
        return {
            "share": float(e.stats[8] / max(e.stats[7], 1.0)),
            "by_position": [float(d / w) if w else None for d, w in zip(dropped, wanted, strict=True)],
        }

    def _routing(self) -> dict[str, Any] | None:
        """What routers did: experts a token, and for those that need scores, where these come from and what another
        model of the scores that no trace holds would give."""
        e, experts = self.explanation, self.experts
        if e is None or experts is None or not e.stats[6]:
            return None
        out: dict[str, Any] = {"experts_per_token": float((e.stats[7] - e.stats[8]) / e.stats[6]), "scores": None}
        if experts.router is not None:
            out["scores"] = {
                "model": experts.router.scores.name,
                "assumed": experts.router.scores.assumed or None,
                "figures": experts.figures,
                "other": experts.other_figures,
            }
        return out

    def _time_share(self) -> dict[str, float]:
        e = self.explanation
        if e is None:
            return {}
        total = max(sum(e.ns.values()), 1)
        return {name: spent / total for name, spent in sorted(e.ns.items(), key=lambda kv: (-kv[1], kv[0])) if spent}

    def _links(self) -> dict[str, Any] | None:
        e, experts = self.explanation, self.experts
        if e is None or experts is None or not e.stats[3]:
            return None
        size = experts.prices.dispatch_bytes + experts.prices.combine_bytes
        spent = float(e.ns.get("dispatch", 0) + e.ns.get("combine", 0))
        if self.scenario.communication.overlap != "none":
            spent = float(e.stats[_EXCHANGE])
        busy = spent / max(sum(e.ns.values()), 1)
        out: dict[str, Any] = {"nvlink": {"bytes": round(float(e.stats[3]) * size), "busy_share": busy}}
        if e.stats[4]:
            out["nic"] = {"bytes": round(float(e.stats[4]) * size), "busy_share": busy}
        return out

    def _overlap(self) -> dict[str, Any] | None:
        """What was cut, and how much of the exchange ran beside experts and attention."""
        e, kind = self.explanation, self.scenario.communication.overlap
        if e is None or kind == "none" or not e.stats[_EXCHANGE]:
            return None
        exchange, shown = float(e.stats[_EXCHANGE]), e.ns.get("dispatch", 0) + e.ns.get("combine", 0)
        return {
            "kind": kind,
            "chunks": float(e.stats[_EXCHANGE + 1]) / e.steps,
            "exchange_share": exchange / max(sum(e.ns.values()), 1),
            "hidden_share": max(0.0, 1.0 - shown / exchange),
        }

    def _memory(self) -> dict[str, Any]:
        assert self.memory is not None
        m = self.memory
        peak = self.peak_kv_units * m.kv_unit * m.kv_copies
        return {
            "hbm": {
                "used": m.fixed + peak,
                "capacity": m.capacity,
                "by": {**m.by_use(), "kv_peak": peak},
            },
            **{
                tier.name: {"used": tier.used, "capacity": tier.capacity, "by": tier.by}
                for tier in (self.offload.tiers if self.offload is not None else ())
            },
        }

    def _cache(self) -> dict[str, Any] | None:
        """What came and went between memories; None where all experts stay on the device."""
        if self.offload is None or self.outcome is None:
            return None
        played = [p for p in self.pricers if isinstance(p, OffloadedPricer)]
        return cache_figures(self.scenario, self.offload, played, self.outcome.runs)

    def _replay(self) -> dict[str, int] | None:
        if self.experts is None or self.experts.replay is None or self.outcome is None:
            return None
        served = np.flatnonzero(self.outcome.requests.target >= 0)
        return {k: int(v) for k, v in self.experts.replay.shares(served)._asdict().items()}

    def _provenance(self) -> dict[str, Any]:
        profile = self.scenario.cluster.profile
        shares: dict[str, Any] = dict.fromkeys(GRADES)
        if self.explanation is not None:
            total = max(float(self.explanation.grade_ns.sum()), 1.0)
            shares = {g: float(s) / total for g, s in zip(GRADES, self.explanation.grade_ns, strict=True)}
        return {
            "profile": profile.name,
            "profile_kind": profile.kind,
            "shares": shares,
            "versions": {"moesim": moesim.__version__, "numpy": np.__version__, "schema": SCHEMA_VERSION},
            "scenario_hash": self.scenario.hash,
            "fidelity": None if self.experts is None else ("count" if self.experts.replay is None else "token"),
            "routing": None if self.experts is None else self.experts.source.source,
            "requests": None if self.stream is None else self.stream.source,
            "host": {"python": platform.python_version(), "machine": platform.machine()},
            "elapsed": {"event_loop_s": self.loop_s},
        }

    def tables(self) -> dict[str, dict[str, AnyArray]]:
        """The tables of a results folder by name."""
        return {"requests": self.requests_table(), "steps": self.steps_table()}

    def requests_table(self) -> dict[str, AnyArray]:
        """One row a request; times in ns, -1 where rejected or unfinished."""
        assert self.outcome is not None
        r = self.outcome.requests
        return {name: getattr(r, name) for name in r.__dataclass_fields__}

    def steps_table(self) -> dict[str, AnyArray]:
        """One row a step."""
        assert self.outcome is not None
        s = self.outcome.steps
        preempted = np.zeros(s.steps, np.int64)
        preempted[np.cumsum(s.run_steps) - s.run_steps] = s.run_preempted  # before a run's first step
        prefill = np.array([run.key.total_prefill for run in self.outcome.runs], np.int64)
        return {
            "group": s.per_step(s.run_group),
            "start_ns": s.start_ns(),
            "duration_ns": s.duration_ns,
            "decode_tokens": s.per_step(s.run_decoding),
            "prefill_tokens": s.per_step(prefill),
            "waiting": s.per_step(s.run_waiting),
            "preempted": preempted,
        }
