"""What training steps found: records of every step, figures with intervals, JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

import moesim
from moesim.arrays import AnyArray, FloatArray
from moesim.hardware import GRADES
from moesim.layout import Layout
from moesim.metrics import Errors, distribution, interval
from moesim.model import MoEModel
from moesim.scenario.load import Scenario
from moesim.training.memory import TrainingMemory
from moesim.training.reduce import LinkBytes
from moesim.training.routing import POSITION_BINS, StepRouting
from moesim.training.sampling import Sampling
from moesim.training.step import Ledger, StepTime

__all__ = ["Loads", "TrainingResult", "maxvio_by_chance", "model_flop_per_token"]

SCHEMA_VERSION = 1


def model_flop_per_token(model: MoEModel, sequence_tokens: int, experts_per_token: float) -> float:
    """FLOP of one token's forward and backward pass: 6 N + 12 L H Q T (PaLM, arXiv:2204.02311, appendix B): N the
    elements of the products that a token takes part in (the embedding table's look-up is none), L layers, H heads, Q
    the mean of key and value size, T the tokens that attention sees; nothing for what is computed again, and no
    discount for causal masks.
    """
    products: float = sum(g.n * g.k * g.batch * g.layers for g in model.gemms(1) if g.phase != "decode")
    matrices = (3 if model.gated_experts else 2) * model.expert_hidden * model.moe_intermediate_size
    products += model.num_moe_layers * experts_per_token * matrices if model.is_moe else 0
    a = model.attention
    seen = sum(min(sequence_tokens, window) if window else sequence_tokens for window in model.window_of_layer)
    return 6.0 * products + 12.0 * a.num_heads * (a.head_dim + a.v_head_dim) / 2 * seen


def maxvio_by_chance(tokens: int, top_k: int, experts: int) -> float:
    """MaxVio of `tokens` tokens whose experts are all alike and drawn independently: the normal approximation of the
    largest of E loads (Blom, Statistical Estimates and Transformed Beta-Variables, 1958: expected order statistics)."""
    if top_k >= experts:
        return 0.0
    share = top_k / experts
    spread = math.sqrt((1.0 - share) / (share * tokens))
    return spread * NormalDist().inv_cdf((experts - 0.375) / (experts + 0.25))


@dataclass(frozen=True, slots=True)
class Loads:
    """How even one step was. MaxVio (Wang et al., arXiv:2408.15664, section 4.1): the busiest expert's load over the
    mean, less 1; of the whole batch and of single micro-batches, mean over layers. max_over_mean: rows of the busiest
    part over the mean part's. wanted, dropped, run: pairs that routers chose, that found no place, and rows that
    kernels ran; copies over links by all ranks, one way. most_rows_L: of the rank that keeps most, by layer."""

    maxvio: float
    maxvio_micro_batch: float
    max_over_mean: float
    wanted: float
    dropped: float
    run: float
    nvlink: float
    nic: float
    most_rows_L: FloatArray

    @classmethod
    def of(cls, routing: StepRouting, parts: int) -> Loads:
        """The step's loads; `parts`: expert-parallel parts."""
        micro_MLE = routing.wanted_MRLE.sum(axis=1)
        rows_MRLP = routing.rows_MRLP
        run_MRLP = routing.slot_MRLS.reshape(*rows_MRLP.shape[:3], parts, -1).sum(axis=-1)
        at = np.unravel_index(int(run_MRLP.sum(axis=2).argmax()), (*run_MRLP.shape[:2], parts))
        ports = routing.ports
        return cls(
            maxvio=float(_max_over_mean(micro_MLE.sum(axis=0)).mean()) - 1.0,
            maxvio_micro_batch=float(_max_over_mean(micro_MLE).mean()) - 1.0,
            max_over_mean=float(_max_over_mean(rows_MRLP).mean()),
            wanted=float(routing.wanted_N.sum()),
            dropped=float(routing.dropped_N.sum()),
            run=float(run_MRLP.sum()),
            nvlink=0.0 if ports is None else float(ports.nvlink_total.sum()),
            nic=0.0 if ports is None else float(ports.nic_total.sum()),
            most_rows_L=run_MRLP[at[0], at[1], :, at[2]],
        )


def _max_over_mean(load: FloatArray) -> FloatArray:
    """Over the last axis; 1 where nothing is loaded."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.maximum(mean, 1e-300), 1.0)


@dataclass(slots=True)
class TrainingResult:
    """Steps that were simulated. `times` is empty where the training does not fit."""

    scenario: Scenario
    seed: int
    layout: Layout
    reasons: tuple[str, ...] = ()
    over: float | None = None
    """memory that is missing as a share of what is there, where it does not fit"""
    warnings: tuple[str, ...] = ()
    memory: TrainingMemory | None = None
    times: list[StepTime] = field(default_factory=list)
    loads: list[Loads] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    """of the measured steps"""
    wanted_N: FloatArray = field(default_factory=lambda: np.zeros(POSITION_BINS))
    dropped_N: FloatArray = field(default_factory=lambda: np.zeros(POSITION_BINS))
    sampling: Sampling | None = None
    micro_batches: int = 0
    exchange_bytes: float = 0.0
    """of one copy of a token, there and back, in all passes of a micro-batch"""
    gather_bytes: LinkBytes = field(default_factory=lambda: LinkBytes(0.0, 0.0))
    """tokens that the ranks of split experts gather and sum back in one step, gradients included"""
    reduce_bytes: LinkBytes = field(default_factory=lambda: LinkBytes(0.0, 0.0))
    """sums of gradients and gathers of weights in one step"""
    routing: str | None = None
    assumed: str = ""
    """what part of the scores is assumed"""
    elapsed_s: float = 0.0

    @property
    def feasible(self) -> bool:
        return bool(self.times)

    @property
    def devices(self) -> int:
        """Devices of the whole deployment."""
        p = self.scenario.parallel
        return p.tp * p.dp * p.replicas

    @property
    def operator_share(self) -> dict[str, float]:
        """Share of each operator in the measured steps' time."""
        total = max(self.ledger.total, 1)
        return {operator: ns / total for operator, ns in self.ledger.operator_ns.items()}

    @property
    def errors(self) -> Errors:
        """Relative error of step time, from the profile by operator shares; `bank` is 0: every step is routed."""
        profile = self.scenario.cluster.profile
        device = {op: share for op, share in self.operator_share.items() if op != "host"}
        variance = sum((share * profile.error(op)) ** 2 for op, share in device.items())
        variance += (sum(device.values()) * profile.speed_error) ** 2
        return Errors(float(np.sqrt(variance)), 0.0)

    def to_json(self) -> dict[str, Any]:
        """The stable result (see docs/result-schema.md), in the same form as a serving run's."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.scenario.name,
            "seed": self.seed,
            "feasible": self.feasible,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "summary": self._summary() if self.feasible else None,
            "provenance": self._provenance(),
        }

    @property
    def _measured(self) -> slice:
        assert self.scenario.training is not None
        return slice(self.scenario.training.measured_from_step, None)

    def _summary(self) -> dict[str, Any]:
        training, errors = self.scenario.training, self.errors
        assert training is not None
        assert self.memory is not None
        times = self.times[self._measured]
        step_ms = distribution(np.array([t.total for t in times]) / 1e6, None, errors)
        assert step_ms is not None
        for figures in (step_ms, step_ms["interval90"]):
            for name in ("p90", "p95"):
                del figures[name]
        tokens = training.global_batch_sequences * training.sequence_tokens
        per_s = tokens / (step_ms["mean"] / 1e3)
        rates = {"tok_per_s": per_s, "tok_per_s_per_device": per_s / self.devices}
        flop, peak = self._model_flop(), self.scenario.cluster.profile.flop_rate(self.scenario.model.activation_dtype)
        mfu = flop * per_s / (peak * self.devices)
        return {
            "mode": "training",
            "training": {
                "steps": len(self.times),
                "measured_steps": len(times),
                "micro_batches": self.micro_batches,
                "tokens_per_step": tokens,
                "model_flop_per_token": flop,
            },
            "step_ms": step_ms,
            "throughput": {**rates, "interval90": {k: interval(v, errors.step) for k, v in rates.items()}},
            "mfu": mfu,
            "phase_share": self._shares(self.ledger.phase_ns),
            "time_share": {k: v for k, v in self._shares(self.ledger.ns, ordered=True).items() if v},
            "overlap": self._overlap(),
            "balance": self._balance(),
            "drops": self._drops(),
            "links": self._links(len(times)),
            "memory": {"hbm": {"used": self.memory.used, "capacity": self.memory.capacity, "by": self.memory.by}},
            "routing": self._routing(),
            "error": {"profile": errors.profile, "bank": errors.bank},
        }  # fmt: skip

    def _shares(self, ns: dict[str, int], ordered: bool = False) -> dict[str, float]:
        total = max(self.ledger.total, 1)
        items = sorted(ns.items(), key=lambda kv: (-kv[1], kv[0])) if ordered else list(ns.items())
        return {name: spent / total for name, spent in items}

    def _mean(self, name: str) -> float:
        return float(np.mean([getattr(load, name) for load in self.loads[self._measured]]))

    def _pairs_per_token(self, name: str) -> float:
        training = self.scenario.training
        assert training is not None
        tokens = training.global_batch_sequences * training.sequence_tokens
        return self._mean(name) / tokens / self.scenario.model.num_moe_layers

    def _model_flop(self) -> float:
        """Of a token, with the experts that its routers chose and that had room."""
        training, model = self.scenario.training, self.scenario.model
        assert training is not None
        experts = self._pairs_per_token("wanted") - self._pairs_per_token("dropped") if model.is_moe else 0.0
        return model_flop_per_token(model, training.sequence_tokens, experts)

    def _overlap(self) -> dict[str, float]:
        times = self.times[self._measured]
        return {
            "gradient_reduction_ms": float(np.mean([t.reduction for t in times])) / 1e6,
            "gradient_reduction_exposed_ms": float(np.mean([t.reduction_exposed for t in times])) / 1e6,
            "parameter_gather_exposed_ms": float(np.mean([t.gather_exposed for t in times])) / 1e6,
        }

    def _balance(self) -> dict[str, float] | None:
        if not self.loads:
            return None
        times, loads = self.times[self._measured], self.loads[self._measured]
        slowest = sum(t.expert_slowest for t in times)
        return {
            "maxvio": self._mean("maxvio"),
            "maxvio_micro_batch": self._mean("maxvio_micro_batch"),
            "maxvio_first_step": loads[0].maxvio,
            "maxvio_last_step": loads[-1].maxvio,
            "max_over_mean_load": self._mean("max_over_mean"),
            "expert_idle_share": 1.0 - sum(t.expert_mean for t in times) / max(slowest, 1),
        }

    def _routing(self) -> dict[str, Any] | None:
        """Experts a token, where the scores come from, and what routing a sample of the tokens does to MaxVio."""
        if self.sampling is None:
            return None
        model, sampling = self.scenario.model, self.sampling
        by_chance = [
            maxvio_by_chance(tokens, model.top_k, model.num_experts)
            for tokens in (sampling.tokens_routed, sampling.tokens)
        ]
        return {
            "experts_per_token": self._pairs_per_token("wanted") - self._pairs_per_token("dropped"),
            "scores": {"model": self.routing, "assumed": self.assumed or None},
            "sampling": {
                "kind": sampling.kind,
                "scope": sampling.scope,
                "micro_batches": sampling.micro_batches,
                "replicas": sampling.replicas,
                "ranks": sampling.ranks,
                "tokens_of_rank": sampling.routed,
                "tokens_routed": sampling.tokens_routed,
                "tokens": sampling.tokens,
                "maxvio_by_chance": by_chance[0],
                "maxvio_by_chance_of_all": by_chance[1],
            },
        }

    def _drops(self) -> dict[str, Any] | None:
        if not self.loads or self.scenario.capacity is None:
            return None
        wanted, dropped = self._mean("wanted"), self._mean("dropped")
        kept = max(wanted - dropped, 1e-300)
        return {
            "share": dropped / max(wanted, 1e-300),
            "by_position": (self.dropped_N / np.maximum(self.wanted_N, 1e-300)).tolist(),
            "run_over_kept": self._mean("run") / kept,
        }

    def _links(self, steps: int) -> dict[str, Any] | None:
        out: dict[str, Any] = {}
        for name in ("nvlink", "nic"):
            copies = sum(getattr(load, name) for load in self.loads[self._measured])
            exchanged = copies * self.exchange_bytes + getattr(self.gather_bytes, name) * steps
            summed = getattr(self.reduce_bytes, name) * steps
            if exchanged + summed:
                out[name] = {"exchange_bytes": round(exchanged), "reduction_bytes": round(summed)}
        return out or None

    def _provenance(self) -> dict[str, Any]:
        profile = self.scenario.cluster.profile
        shares: dict[str, Any] = dict.fromkeys(GRADES)
        if self.feasible:
            total = max(float(self.ledger.grade_ns.sum()), 1.0)
            shares = {g: float(s) / total for g, s in zip(GRADES, self.ledger.grade_ns, strict=True)}
        return {
            "profile": profile.name,
            "profile_kind": profile.kind,
            "shares": shares,
            "versions": {"moesim": moesim.__version__, "numpy": np.__version__, "schema": SCHEMA_VERSION},
            "scenario_hash": self.scenario.hash,
            "routing": self.routing,
            "host": {"python": platform.python_version(), "machine": platform.machine()},
            "elapsed": {"steps_s": self.elapsed_s},
        }

    def tables(self) -> dict[str, dict[str, AnyArray]]:
        """`steps`: one row a step."""
        return {"steps": self.steps_table()}

    def steps_table(self) -> dict[str, AnyArray]:
        """One row a step; times in ns. Columns of loads are there for MoE models."""
        training = self.scenario.training
        assert training is not None
        names = ("total", "compute", "gather_exposed", "reduction_exposed", "optimizer")
        out: dict[str, AnyArray] = {
            "step_ns" if n == "total" else f"{n}_ns": np.array([getattr(t, n) for t in self.times]) for n in names
        }
        out["progress"] = np.array([training.progress(i) for i in range(len(self.times))])
        if self.loads:
            for name in ("maxvio", "maxvio_micro_batch", "max_over_mean"):
                column = "max_over_mean_load" if name == "max_over_mean" else name
                out[column] = np.array([getattr(load, name) for load in self.loads])
            wanted = np.array([load.wanted for load in self.loads])
            out["dropped_share"] = np.array([load.dropped for load in self.loads]) / np.maximum(wanted, 1e-300)
        return out
