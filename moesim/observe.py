"""What a comparison needs of one run: each figure, what it is with a part of the run left out, and how it moves with
step time. A result's records are large; this is small, so runs can be dropped once they are observed.

*Left out*: the run is cut into G = 20 parts (requests in the order of arrival; for rates, stretches in which a 20th of
the requests end; for the experts' load, the draws it rests on), and the figure is computed G times without one of
them. Two runs under the same traffic are cut alike, so what is common to both cancels in their ratio: the grouped
jackknife (Shao and Wu, Annals of Statistics 17 (1989), which holds for percentiles where parts are long).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.explain import stats_by_draw
from moesim.metrics import meets_slo, pacing, request_latencies
from moesim.record import NOT_YET, RequestRecords
from moesim.scenario.spec import SloSpec
from moesim.simulate import RunResult
from moesim.training.result import TrainingResult

__all__ = ["DEFAULT_FIGURES", "FIGURES", "Figure", "Observation", "Seen", "observe"]

_PARTS = 20
_LOAD_RATIO, _NVLINK, _NIC, _TOKENS, _WANTED, _DROPPED = 2, 3, 4, 6, 7, 8  # rows of `cost.experts.MoESums.stats`
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_STRETCH = 1.05
"""by which step times are stretched, and shrunk, to see how a count of good requests moves"""
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "whole request"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that can be compared. `key`: where it stands in a result's `summary`.

    absolute: compared by difference instead of ratio; differences up to `resolution` are none. counted: without an
    error of its own.
    """

    name: str
    label: str
    unit: str
    key: tuple[str, ...]
    more_is_better: bool = False
    absolute: bool = False
    counted: bool = False
    resolution: float = 0.0


def _figures() -> dict[str, Figure]:
    rates = (
        ("output_tok_per_s", "output tokens/s", "tokens/s"),
        ("total_tok_per_s", "all tokens/s", "tokens/s"),
        ("req_per_s", "requests/s", "requests/s"),
    )
    out = [Figure(name, label, unit, ("throughput", name), True) for name, label, unit in rates]
    for short, label in _LATENCIES.items():
        out += [
            Figure(f"{short}_{at}_ms", f"{label} {at}, ms", "ms", (f"{short}_ms", at)) for at in ("mean", *_QUANTILES)
        ]
    out += [
        Figure("goodput_req_per_s", "good requests/s", "requests/s", ("goodput_req_per_s",), True),
        Figure("slo_met_share", "requests within SLO", "share", ("slo_met_share",), True, True, False, 5e-4),
        Figure("max_over_mean_load", "max/mean load", "", ("balance", "max_over_mean_load")),
        Figure(
            "hbm_used_bytes", "HBM at peak, GiB", "bytes", ("memory", "hbm", "used"), False, True, True, 0.1 * 2**30
        ),
        Figure("hit_rate", "experts found there", "share", ("cache", "hit_rate"), True, True, True, 5e-4),
        Figure("dropped_share", "dropped share", "", ("drops", "share"), False, True, False, 5e-4),
        Figure("nvlink_bytes", "by NVLink, GiB", "bytes", ("links", "nvlink", "bytes")),
        Figure("nic_bytes", "by NIC, GiB", "bytes", ("links", "nic", "bytes")),
        Figure("step_mean_ms", "training step, ms", "ms", ("step_ms", "mean")),
        Figure("tok_per_s", "tokens trained/s", "tokens/s", ("throughput", "tok_per_s"), True),
        Figure("mfu", "model FLOP utilisation", "share", ("mfu",), True),
        Figure("maxvio", "MaxVio", "", ("balance", "maxvio"), False, True, False, 1e-3),
    ]
    return {figure.name: figure for figure in out}


FIGURES: Mapping[str, Figure] = _figures()
"""Every figure that can be compared, by name."""

DEFAULT_FIGURES = (
    "output_tok_per_s",
    "total_tok_per_s",
    "req_per_s",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "max_over_mean_load",
    "hbm_used_bytes",
    "hit_rate",
    "dropped_share",
    "step_mean_ms",
    "tok_per_s",
    "mfu",
    "maxvio",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One figure of one run. `without_G`: the same with each of G parts left out, empty where the run is too short to
    be cut, None where the figure is counted; `slope`: d ln(figure) / d ln(step time), of an absolute figure
    d figure / d ln(step time)."""

    value: float
    interval90: tuple[float, float] | None = None
    without_G: FloatArray | None = None
    slope: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """One run. A figure it does not have is not in `figures`.

    operator_share: of the steps' time; errors, speed_error, profile: the device profile's, and its hash; bank: relative
    error of step time from having drawn few batches of routing; traffic: a hash of the requests.
    """

    figures: Mapping[str, Seen]
    operator_share: Mapping[str, float]
    errors: Mapping[str, float]
    speed_error: float
    bank: float
    profile: str
    traffic: str


def observe(result: RunResult | TrainingResult, left_out: bool = True) -> Observation:
    """Look at a feasible run, of requests or of training steps. left_out: also at what the figures are without parts of
    it; without these a run says nothing of chance."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(result, TrainingResult):
        # every seed draws other tokens
        digest.update(f"{result.seed} {result.scenario.training!r}".encode())
        return _observed(result, _without_steps(result) if left_out else {}, {}, 1.0, digest.hexdigest())
    assert result.outcome is not None
    assert result.stream is not None
    stream = result.stream
    for column in (stream.arrival_ns, stream.prompt_tokens, stream.output_tokens):
        digest.update(column.tobytes())
    paced, slo = pacing(result.outcome.requests, stream.concurrency is not None), result.scenario.slo
    slopes = {} if slo is None else _good_slopes(result.outcome.requests, slo, paced)
    return _observed(result, _without(result) if left_out else {}, slopes, paced, digest.hexdigest())


def _observed(
    result: RunResult | TrainingResult,
    left_out: Mapping[str, FloatArray],
    own: Mapping[str, float],
    paced: float,
    traffic: str,
) -> Observation:
    """The figures that the result has. left_out: by figure, without each part; own: slopes of single figures; paced:
    how far rates go with steps."""
    profile, summary = result.scenario.cluster.profile, result.to_json()["summary"]
    slopes = dict.fromkeys(("balance", "memory", "drops", "links", "cache"), 0.0)
    slopes |= {"throughput": -paced, "mfu": -1.0}
    figures: dict[str, Seen] = {}
    for name, figure in FIGURES.items():
        value = _at(summary, figure.key)
        if value is None:
            continue
        held = _at(summary, (*figure.key[:-1], "interval90", figure.key[-1]))
        slope = own.get(name, slopes.get(figure.key[0], 1.0))
        figures[name] = Seen(
            float(value),
            None if held is None else (float(held[0]), float(held[1])),
            None if figure.counted else left_out.get(name, np.zeros(0)),
            slope,
        )
    share = {operator: part for operator, part in result.operator_share.items() if operator != "host"}
    return Observation(
        figures=figures,
        operator_share=share,
        errors={operator: profile.error(operator) for operator in share},
        speed_error=profile.speed_error,
        bank=result.errors.bank,
        profile=str(result.scenario.resolved["cluster"]["device"]["blake2b"]),
        traffic=traffic,
    )


def _at(summary: Any, key: tuple[str, ...]) -> Any:
    found = summary
    for part in key:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _good_slopes(requests: RequestRecords, slo: SloSpec, paced: float) -> dict[str, float]:
    """How goodput and the share of good requests move with step time: who still meets the SLO is counted again with
    all latencies a little longer, and shorter; goodput moves as rates do, too."""
    more, less = (int(meets_slo(requests, slo, s).sum()) for s in (_STRETCH, 1 / _STRETCH))
    width, came = 2 * math.log(_STRETCH), max(int((requests.target != NOT_YET).sum()), 1)
    return {
        "goodput_req_per_s": math.log(max(more, 0.5) / max(less, 0.5)) / width - paced,
        "slo_met_share": (more - less) / came / width,
    }


# ---- figures without a part of the run


def _without(result: RunResult) -> dict[str, FloatArray]:
    assert result.outcome is not None
    requests = result.outcome.requests
    slo = result.scenario.slo
    out = without_rates(requests, slo)
    total = len(requests.arrival_ns)
    if slo is not None:
        out["slo_met_share"] = _share_met(requests, slo)
    for name, (row, values) in request_latencies(requests).items():
        short = name.removesuffix("_ms")
        part = row * (parts := _parts(total)) // total
        for at, figure in latency_figures().items():
            out[f"{short}_{at}_ms"] = leave_out(values, part, parts, figure)
    sums = stats_by_draw(result.outcome.runs, result.pricers[0]) if result.pricers else None
    if sums is not None:
        stats_XD, steps_D = sums
        out["max_over_mean_load"] = _left_ratio(stats_XD[_LOAD_RATIO], steps_D)
        out["dropped_share"] = _left_ratio(stats_XD[_DROPPED], stats_XD[_WANTED])
        assert result.experts is not None
        prices, tokens = result.experts.prices, float(stats_XD[_TOKENS].sum())
        for name, stat in (("nvlink_bytes", _NVLINK), ("nic_bytes", _NIC)):  # copies a token, for all tokens
            per_copy = prices.dispatch_bytes + prices.combine_bytes
            out[name] = _left_ratio(stats_XD[stat], stats_XD[_TOKENS]) * (tokens * per_copy)
    return out


def _without_steps(result: TrainingResult) -> dict[str, FloatArray]:
    """Figures of training without each of at most 20 stretches of measured steps; MFU up to a constant factor, which
    a ratio does not see."""
    training = result.scenario.training
    assert training is not None
    times, loads = result.times[training.measured_from_step :], result.loads[training.measured_from_step :]
    steps = len(times)
    parts = min(_PARTS, steps)
    if parts < 2:
        return {}
    part = np.arange(steps) * parts // steps

    def left(values: list[float]) -> FloatArray:
        """Sums without each part."""
        return np.array([np.array(values)[part != g].sum() for g in range(parts)])

    mean_ms = left([float(t.total) for t in times]) / left([1.0] * steps) / 1e6
    tokens = training.global_batch_sequences * training.sequence_tokens
    out = {"step_mean_ms": mean_ms, "tok_per_s": tokens / mean_ms * 1e3, "mfu": 1.0 / mean_ms}
    if loads:
        out["maxvio"] = left([load.maxvio for load in loads]) / left([1.0] * steps)
        out["max_over_mean_load"] = left([load.max_over_mean for load in loads]) / left([1.0] * steps)
        wanted = left([load.wanted for load in loads])
        out["dropped_share"] = left([load.dropped for load in loads]) / np.maximum(wanted, 1e-300)
    return out


def _left_ratio(above_D: FloatArray, below_D: FloatArray | IntArray) -> FloatArray:
    """sum(above) / sum(below) without each draw; empty where one draw alone counts. Balanced routing has a single
    draw, which stands for all and has no error."""
    if len(below_D) == 1:
        return np.repeat(above_D / np.maximum(below_D, 1e-300), 2)
    rest_D = below_D.sum() - below_D
    return (above_D.sum() - above_D) / rest_D if rest_D.all() else np.zeros(0)


def _parts(requests: int) -> int:
    return min(_PARTS, requests // 2)


def latency_figures() -> dict[str, Callable[[FloatArray], float]]:
    """mean, p50, ...: figures of values sorted upwards; percentiles are order statistics, as in `metrics`."""

    def at(q: float) -> Callable[[FloatArray], float]:
        return lambda ordered: float(ordered[max(0, math.ceil(q * len(ordered)) - 1)])

    return {"mean": lambda ordered: float(ordered.mean()), **{name: at(q) for name, q in _QUANTILES.items()}}


def leave_out(values: FloatArray, part: IntArray, parts: int, figure: Callable[[FloatArray], float]) -> FloatArray:
    """`figure` of the sorted values without each part [G]; empty where fewer than two parts have values."""
    if parts < 2 or len(np.unique(part)) < 2:
        return np.zeros(0)
    order = np.argsort(values, kind="stable")
    ordered, part_of = values[order], part[order]
    return np.array([figure(ordered[part_of != g]) for g in range(parts)])


def _share_met(requests: RequestRecords, slo: SloSpec) -> FloatArray:
    """Share of requests that meet the SLO, of those that came, without each of G parts in the order of arrival."""
    good, came = np.zeros(len(requests.arrival_ns)), (requests.target != NOT_YET).astype(np.float64)
    good[requests.completed] = meets_slo(requests, slo)
    parts = _parts(len(good))
    if parts < 2:
        return np.zeros(0)
    part = np.arange(len(good)) * parts // len(good)
    good_G, came_G = (np.bincount(part, weights=x, minlength=parts) for x in (good, came))
    left_G = came_G.sum() - came_G
    return (good_G.sum() - good_G) / left_G if left_G.all() else np.zeros(0)


def without_rates(requests: RequestRecords, slo: SloSpec | None = None) -> dict[str, FloatArray]:
    """Throughput (and, with an SLO, goodput) without each of G stretches of time, in each of which a G-th of the
    requests end; also the time from the last arrival to the last finish is in a stretch, so that a difference that only
    the end made is known as one."""
    done = np.flatnonzero(requests.completed)
    parts = _parts(len(done))
    if parts < 2:
        return {}
    done = done[np.argsort(requests.finish_ns[done], kind="stable")]
    last = np.arange(1, parts + 1) * len(done) // parts - 1
    end = requests.finish_ns[done[last]]
    span_G = np.diff(end, prepend=requests.arrival_ns[done].min()).astype(np.float64) / 1e9
    output = requests.output_tokens[done].astype(np.float64)
    amounts = {
        "output_tok_per_s": output,
        "total_tok_per_s": output + requests.prompt_tokens[done],
        "req_per_s": np.ones(len(done)),
    }
    if slo is not None:
        good = np.zeros(len(requests.arrival_ns))
        good[requests.completed] = meets_slo(requests, slo)
        amounts["goodput_req_per_s"] = good[done]
    first = np.concatenate([[0], last[:-1] + 1])
    left_G = span_G.sum() - span_G
    if not (left_G > 0).all():
        return {}
    out = {}
    for name, amount in amounts.items():
        amount_G = np.add.reduceat(amount, first)
        out[name] = (amount_G.sum() - amount_G) / left_G
    return out
