"""What the simulator says of the same replay: times measured once on other routes, then moesim's own device.

`calibrate` runs the runtime itself, on routes and cache sizes that are not judged, and keeps what its parts took. The
simulation (`run_simulated`) then has the same mechanisms decide and `moesim.tiers.device.SimDevice` keep the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim.offload import StepRoutes, Wanted
from moesim.offload.drive import Driver, LayerWork
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice, Waits
from moesim.tiers.links import Links
from moesim_kernels.runtime.replay import Replay
from moesim_kernels.runtime.run import Made, RealRun, Settings, build, costs_of, play
from moesim_kernels.runtime.sizes import ModelSizes

__all__ = ["Calibrated", "Deciding", "Prediction", "calibrated", "deciding_of", "run_simulated"]

_TRIM = 0.1
"""Share of the samples left out at either end of a mean: others on the machine must not set a rate."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """ns. By number of tokens of a step: begin, own (a layer), join (a layer), end. product: by rows of one expert.
    decide: a layer, under the policies that were calibrated with; ask: each transfer asked for. move: one expert over
    the link; latency: between when a transfer could start (asked for, the link free) and when it does; wake: between
    its end and when who waited for it goes on. sync: a layer's hand-over to the host; host: by rows of an expert there.
    move_spread: middle half of the moves' times over their mean."""

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
    wake: float
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
        latency=_trimmed([gap for run in runs for gap in _gaps(run)]),
        wake=_trimmed(waits),
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
    """moesim.tiers.LayerTimes of a calibration. look_ns: a layer's look-up."""

    def __init__(self, found: Calibrated, look_ns: float) -> None:
        self._found, self._decide = found, look_ns
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


class _Hosted(SimDevice):
    """The simulator's device with a real host in front: asking for a transfer takes the computing thread `ask_ns` (a
    lock, a queue, a thread that is woken), prefetches are decided in `ahead_ns` while urgent transfers run already, and
    whoever has waited for a transfer goes on `wake_ns` after its end."""

    tells_waits = True
    ask_ns = ahead_ns = wake_ns = 0

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """See Device."""
        super().fetch(key, size_bytes, urgent)
        self.skip_to(self.now_ns + self.ask_ns)

    def experts(self, layer: int, work: LayerWork) -> None:
        """See Device."""
        self.skip_to(self.now_ns + self.ahead_ns)
        super().experts(layer, work)

    def experts_waits(self, layer: int, work: LayerWork) -> Waits:
        """See SimDevice: a wait is a None, and what follows it is the time at which the thread goes on."""
        waited = False
        for want in super().experts_waits(layer, work):
            if waited and want is not None:
                self.skip_to(max(self.now_ns, want) + self.wake_ns)
                want = self.now_ns
            yield want
            waited = want is None


@dataclass(frozen=True, slots=True)
class Deciding:
    """ns a layer: before missed experts are asked for, and between that and the first product (prefetch)."""

    look_ns: float
    ahead_ns: float


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
    deciding: Deciding | None = None,
) -> Prediction:
    """The replay on moesim's device. deciding: of these policies; None: as calibrated."""
    deciding = deciding if deciding is not None else Deciding(found.decide, 0.0)
    made = build(settings, sizes, replay, costs_of(sizes, kind), fit)
    rate = found.size_bytes / max(found.move, 1.0)
    latency = round(found.latency)
    rates = LinkRates(
        to_device=rate, host=1e6, nvme=rate, to_device_latency_ns=latency, nvme_latency_ns=latency,
        chunk_bytes=settings.chunk_bytes,
    )  # fmt: skip
    options = DeviceOptions(staging=settings.staging, on_host=kind == "disk", duplex=False, sync_blocks=kind == "cuda")
    times = _Times(found, deciding.look_ns)
    device = _Hosted(times, Links(rates), made.context.size_K, options=options)
    device.ask_ns, device.ahead_ns, device.wake_ns = (round(x) for x in (found.ask, deciding.ahead_ns, found.wake))
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


class _Timed:
    """A prefetch policy's state whose `wanted` is timed, CPU ns of this thread."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.taken_ns = inner, 0

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch."""
        self._inner.begin(step)

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch."""
        start = time.thread_time_ns()
        out: list[Wanted] = self._inner.wanted(layer)
        self.taken_ns += time.thread_time_ns() - start
        return out

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """See Prefetch."""
        self._inner.told(layer, found)


def deciding_of(
    run: RealRun, ask: float, settings: Settings, sizes: ModelSizes, replay: Replay, kind: str, fit: Any
) -> Deciding:
    """What these policies take to decide, from a real `run` of them on a replay that is not judged. How it parts into
    looking up and prefetching is that of the same replay without a device. ask: ns of each transfer asked for."""
    made: Made = build(settings, sizes, replay, costs_of(sizes, kind), fit)
    timed = _Timed(made.prefetch)
    start = time.thread_time_ns()
    play(replace(made, prefetch=timed), replay, _Nothing())
    share = timed.taken_ns / max(1, time.thread_time_ns() - start)
    whole = _trimmed([s.other_ns - ask * s.fetches for s in run.steps]) / sizes.layers
    return Deciding(max(0.0, whole * (1 - share)), max(0.0, whole * share))
