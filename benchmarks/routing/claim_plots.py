"""Pictures beside the page of claims; each function writes one file and returns its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from claim_page import TARGET
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Curve = NDArray[np.float64]
COLOURS = {
    "none": "#555555", "auxiliary_loss": "#b07d00", "loss_free": "#00795a", "loss_free_slow": "#7fc4ae",
    "bip": "#b3321f", "bip_cold": "#e39b8e", "sinkhorn": "#3c5a99", "sinkhorn_sharp": "#9fb3dd",
    "expert_choice": "#000000",
}  # fmt: skip


def _figure(width: float, height: float) -> Any:
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, name: str) -> str:
    with matplotlib.rc_context({"savefig.dpi": 100}):
        figure.savefig(TARGET / name, metadata={"Software": None})
    return name


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)


TITLES = {
    "real": "real training", "recorded": "simulated, recorded scores", "generated": "simulated, generated scores",
    "ESFT": "recorded ESFT scores, 64 experts",
}  # fmt: skip


def plot_maxvio(found: Mapping[str, Mapping[str, Curve]]) -> str:
    """MaxVio by step, a panel for each kind of scores; means of 5 steps."""
    figure = _figure(3.4 * len(found), 3.7)
    all_axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (kind, curves) in zip(all_axes, found.items(), strict=True):
        for method, curve in curves.items():
            total = np.concatenate([[0.0], np.cumsum(curve)])
            high = np.arange(1, len(curve) + 1)
            low = np.maximum(0, high - 5)
            smooth = (total[high] - total[low]) / (high - low)
            axes.plot(high, np.maximum(smooth, 0.01), color=COLOURS[method], linewidth=1.1, label=method)
        axes.set(xlabel="step", xscale="log", yscale="log", ylim=(0.009, 12))
        axes.set_title(TITLES[kind], fontsize=10)
        _bare(axes)
    all_axes[0].set_ylabel("MaxVio of the batch (0.01: or less)")
    handles, labels = max((axes.get_legend_handles_labels() for axes in all_axes), key=lambda hl: len(hl[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return _save(figure, "routing_balance.png")


def plot_drops(shares: Mapping[tuple[str, float], Curve]) -> str:
    """Dropped share by tenth of the sequence."""
    figure = _figure(8.4, 3.4)
    both = figure.subplots(1, 2, sharey=True)
    shades = {"balanced mix": "#00795a", "skewed mix": "#b3321f", "intent": "#b07d00", "summary": "#3c5a99"}
    for axes, factor in zip(both, (1.25, 2.0), strict=True):
        for (mix, of), curve in shares.items():
            if of == factor:
                name = mix if "mix" in mix else f"ESFT {mix} (64 experts, top-6)"
                axes.plot(np.arange(10) * 10 + 5, curve, color=shades[mix], marker="o", markersize=3, label=name)
        axes.set(title=f"capacity factor {factor}", xlabel="position, % of the sequence")
        axes.set_ylim(bottom=0)
        _bare(axes)
    both[0].set_ylabel("choices dropped, %")
    both[1].legend(frameon=False, fontsize=8)
    return _save(figure, "routing_drops.png")


def plot_capacity(
    factors: Sequence[float], cost: Mapping[str, Sequence[float]], dropped: Mapping[str, Sequence[float]]
) -> str:
    """Throughput lost against factor 1.0, and share dropped, by capacity factor."""
    figure = _figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    for i, (name, values) in enumerate(cost.items()):
        left.plot(factors, values, color=("#00795a", "#3c5a99", "#b07d00", "#b3321f")[i % 4], marker="o", markersize=3,
                  label=name)  # fmt: skip
    left.vlines(1.25, 8, 11, color="#000000", linewidth=4, label="claim at 1.25: 8 to 11 %")
    left.axhline(0, color="#999999", linewidth=0.8)
    left.set(xlabel="capacity factor", ylabel="throughput lost against 1.0, %")
    left.legend(frameon=False, fontsize=8)
    for (name, values), style in zip(dropped.items(), ("-", "--", ":"), strict=False):
        right.plot(factors, values, style, color="#555555", marker="o", markersize=3, label=name)
    right.set(xlabel="capacity factor", ylabel="choices dropped, %", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    _bare(left)
    _bare(right)
    return _save(figure, "routing_capacity.png")
