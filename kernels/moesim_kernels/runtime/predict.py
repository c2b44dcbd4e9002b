"""What the simulator says of the same replay: times measured once on other routes, then moesim's own device.

`calibrate` runs the runtime itself, on routes and cache sizes that are not judged, and keeps what its parts took. The
simulation (`run_simulated`) then has the same mechanisms decide and `moesim.tiers.device.SimDevice` keep the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim.offload import StepRoutes
from moesim.offload.drive import Driver, LayerWork
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice
from moesim.tiers.links import Links
from moesim_kernels.runtime.replay import Replay
from moesim_kernels.runtime.run import Made, RealRun, Settings, build, costs_of, play
from moesim_kernels.runtime.sizes import ModelSizes

__all__ = ["Calibrated", "Prediction", "calibrated", "deciding_ns", "run_simulated"]

_TRIM = 0.1
"""Share of the samples left out at either end of a mean: others on the machine must not set a rate."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """ns. By number of tokens of a step: begin, own (a layer), join (a layer), end. product: by rows of one expert.
    decide: a layer, under the policies that were calibrated with; ask: each transfer asked for. move: one expert over
    the link; latency: what passes before a transfer starts and after it has ended, where somebody waits. sync: a
    layer's hand-over to the host; host: by rows of one expert there. move_spread: middle half of the moves' times over
    their mean."""

    begin: dict[int, float]
    own: dict[int, float]
    join: dict[int, float]
    end: dict[int, float]
    product: dict[int, float]
    host: dict[int, float]
    decide: float
    ask: float
    move: float
    latency: float
    sync: float
    size_bytes: int
    move_spread: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _trimmed(values: Any) -> float:
    """Mean without the tenth at either end."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = int(len(ordered) * _TRIM)
    return float(ordered[cut : len(ordered) - cut].mean()) if len(ordered) else 0.0


def _by(keys: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    key_N, value_N = np.asarray(keys), np.asarray(values, np.float64)
    return {int(k): _trimmed(value_N[key_N == k]) for k in np.unique(key_N)}


def calibrated(runs: Sequence[RealRun], sizes: ModelSizes) -> Calibrated:
    """From replays whose routes and cache sizes are not those that are judged; at least one needs transfers."""
    steps = [s for run in runs for s in run.steps]
    tokens = [s.tokens for s in steps]
    layers = sizes.layers
    products = [p for run in runs for p in run.products]
    host = [p for run in runs for p in run.host_products] or products
    # deciding and asking: other = layers * decide + fetches * ask, by least squares over the steps
    other_S = np.array([s.other_ns for s in steps], np.float64)
    terms_SX = np.array([[layers, s.fetches] for s in steps], np.float64)
    keep_S = other_S <= np.quantile(other_S, 1 - _TRIM)
    decide, ask = (max(0.0, float(x)) for x in np.linalg.lstsq(terms_SX[keep_S], other_S[keep_S], rcond=None)[0])
    moves = np.array([t[3] - t[2] for run in runs for t in run.transfers], np.float64)
    low, high = np.quantile(moves, [0.25, 0.75]) if len(moves) else (0.0, 0.0)
    move = _trimmed(moves)
    waits = [s.woke_ns / s.waits for s in steps if s.waits]
    return Calibrated(
        begin=_by(tokens, [s.begin_ns for s in steps]),
        own=_by(tokens, [s.own_ns / layers for s in steps]),
        join=_by(tokens, [s.join_ns / layers for s in steps]),
        end=_by(tokens, [s.end_ns for s in steps]),
        product=_by([p[0] for p in products], [p[1] for p in products]),
        host=_by([p[0] for p in host], [p[1] for p in host]),
        decide=decide,
        ask=ask,
        move=move,
        latency=_trimmed([gap for run in runs for gap in _gaps(run)]) + (_trimmed(waits) if waits else 0.0),
        sync=_trimmed([s.sync_ns / layers for s in steps]),
        size_bytes=sizes.slot_bytes,
        move_spread=float((high - low) / move) if move else 0.0,
    )


def _gaps(run: RealRun) -> list[float]:
    """Between when a transfer could start and when it did: asked for, and the link free."""
    out, free = [], 0
    for _, asked, start, end, _ in run.transfers:
        out.append(float(start - max(asked, free)))
        free = end
    return [max(0.0, gap) for gap in out]


class _Times:
    """moesim.tiers.LayerTimes of a calibration. decide_ns: of the policies that run, a layer."""

    def __init__(self, found: Calibrated, layers: int, decide_ns: float) -> None:
        self._found, self._layers, self._decide = found, layers, decide_ns
        self._tokens = 1

    def begin(self, tokens: int) -> None:
        """See LayerTimes."""
        self._tokens = tokens

    def own_ns(self, layer: int) -> int:
        """See LayerTimes."""
        first = _at(self._found.begin, self._tokens) if layer == 0 else 0.0
        return round(first + _at(self._found.own, self._tokens) + self._decide)

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes. One expert after the other."""
        return round(sum(_at(self._found.product, n) for n in rows))

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes."""
        return round(sum(_at(self._found.host, n) for n in rows))

    def sync_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return round(self._found.sync)

    def join_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return round(_at(self._found.join, self._tokens))

    def end_ns(self) -> int:
        """See LayerTimes."""
        return round(_at(self._found.end, self._tokens))


def _at(table: dict[int, float], x: int) -> float:
    """Linear between knots; flat before the first, and beyond the last along its own share."""
    if x in table:
        return table[x]
    knots = sorted(table)
    if x > knots[-1]:
        return table[knots[-1]] * x / knots[-1]
    return float(np.interp(x, knots, [table[k] for k in knots]))


class _Asking(SimDevice):
    """The simulator's device where asking for a transfer takes the computing thread `ask_ns`: a lock, a queue and a
    thread that is woken."""

    ask_ns = 0

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """See Device."""
        super().fetch(key, size_bytes, urgent)
        self.skip_to(self.now_ns + self.ask_ns)


@dataclass(slots=True)
class Prediction:
    """What the simulator says: ns of each step, and what look-ups found."""

    step_ns_S: FloatArray
    driver: Driver
    parts_ns: dict[str, float] = field(default_factory=dict)


def run_simulated(
    found: Calibrated,
    settings: Settings,
    sizes: ModelSizes,
    replay: Replay,
    kind: str = "disk",
    fit: Any = None,
    decide_ns: float | None = None,
) -> Prediction:
    """The replay on moesim's device. decide_ns: of these policies, a layer; None: as calibrated."""
    made = build(settings, sizes, replay, costs_of(sizes, kind), fit)
    rate = found.size_bytes / max(found.move, 1.0)
    latency = round(found.latency)
    rates = LinkRates(
        to_device=rate, host=1e6, nvme=rate, to_device_latency_ns=latency, nvme_latency_ns=latency,
        chunk_bytes=settings.chunk_bytes,
    )  # fmt: skip
    options = DeviceOptions(staging=settings.staging, on_host=kind == "disk", duplex=False, sync_blocks=kind == "cuda")
    times = _Times(found, sizes.layers, found.decide if decide_ns is None else decide_ns)
    device = _Asking(times, Links(rates), made.context.size_K, options=options)
    device.ask_ns = round(found.ask)
    driver = play(made, replay, device)
    return Prediction(device.records.step_ns_S().astype(np.float64), driver)


class _Nothing:
    """A device on which everything takes no time: what is left is deciding."""

    def __init__(self) -> None:
        self._asked: dict[int, None] = {}

    def begin(self, step: StepRoutes) -> None:
        """See Device."""

    def own(self, layer: int, tokens: int) -> None:
        """See Device."""

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """See Device."""
        self._asked[key] = None

    def hurry(self, key: int) -> None:
        """See Device."""

    def cancel(self, key: int) -> bool:
        """See Device."""
        return False

    def arrived(self) -> list[int]:
        """See Device."""
        out = list(self._asked)
        self._asked.clear()
        return out

    def evict(self, key: int, write_back: bool) -> None:
        """See Device."""

    def page(self, layer: int, size_bytes: int) -> None:
        """See Device."""

    def experts(self, layer: int, work: LayerWork) -> None:
        """See Device."""

    def end(self) -> None:
        """See Device."""


def deciding_ns(settings: Settings, sizes: ModelSizes, replay: Replay, kind: str, fit: Any = None) -> float:
    """CPU ns a layer that these mechanisms take to decide, on a replay that is not judged: the best of three."""
    best = float("inf")
    for _ in range(3):
        made: Made = build(settings, sizes, replay, costs_of(sizes, kind), fit)
        start = time.thread_time_ns()
        play(made, replay, _Nothing())
        best = min(best, (time.thread_time_ns() - start) / (len(replay.steps) * sizes.layers))
    return best
