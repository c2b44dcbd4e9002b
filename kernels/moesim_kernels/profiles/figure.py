"""Pictures of profiles by matplotlib (extra `plot`): whole files or none, PNG, SVG or PDF by the name's ending."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim.cost.operators import Operators
from moesim.errors import BadInput, Problem
from moesim.hardware import GRADES, DeviceProfile
from moesim_kernels.profiles.compare import common_sizes, priced_pair
from moesim_kernels.profiles.find import clean
from moesim_kernels.profiles.shapes import AXES, AXIS_WORDS, Shape, knots, main_shapes, measured_shapes, span
from moesim_kernels.profiles.show import half_width
from moesim_kernels.profiles.terminal_plot import duration, percent, size_text

__all__ = ["check_target", "draw_comparison", "draw_profile"]

_KINDS = (".png", ".svg", ".pdf")
_POINTS = 160
_PANEL = (5.0, 3.6)  # inches
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by colour-blind readers
_DASHES = ("-", "--", "-.", ":")


def check_target(path: Path) -> None:
    """Raises BadInput unless the ending is known and matplotlib is installed; before anything is computed."""
    if path.suffix.lower() not in _KINDS:
        raise BadInput(Problem("--plot", f"{path.name!r} must end in {', '.join(_KINDS[:-1])} or {_KINDS[-1]}"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput(Problem("--plot", "matplotlib is not installed. Run: pip install 'moesim[plot]'")) from None


def draw_profile(report: dict[str, Any], path: Path, time: bool) -> None:
    """The lines of `show.describe`'s report, a panel an operator. Raises BadInput: nothing to draw, or not writable."""
    check_target(path)
    rows = [row for row in report["operators"] if row["shapes"]]
    if not rows:
        raise BadInput(Problem("--plot", "nothing to draw: these operators have no times by size"))
    what = "time" if time else "efficiency"
    figure, panels = _panels(len(rows), f"{clean(report['name'])} ({report['kind']}): {what}", 1.0)
    for panel, row in zip(panels, rows, strict=True):
        for i, shape in enumerate(row["shapes"]):
            value = np.array(shape["ns" if time else "efficiency"])
            style = {"color": _HUES[i % 4], "linestyle": _DASHES[i % 4]}
            panel.plot(shape["size"], value, label=shape["label"], linewidth=1.6, **style)
        _size_axis(panel, row["shapes"][0]["axis"])
        if time:
            _time_axis(panel)
        else:
            top = max(1.0, *(max(shape["efficiency"]) for shape in row["shapes"]))
            panel.set_ylim(0, 1.03 * top)
            panel.yaxis.set_major_formatter(lambda v, _: percent(v))
            panel.set_ylabel("roofline floor / time", fontsize=8)
        panel.set_title(row["operator"], fontsize=10, loc="left")
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19))
    _save(figure, path)


def draw_comparison(
    a: DeviceProfile,
    b: DeviceProfile,
    operators: Sequence[str],
    shapes: Sequence[tuple[Shape, FloatArray]] | None,
    path: Path,
) -> None:
    """Time by size of each operator's main shape in both profiles, with their 90 % bands; log-log, a panel a shape.

    shapes: those of a deployment, drawn all of them. Raises BadInput: nothing to draw, or not writable.
    """
    check_target(path)
    pair = (Operators(a), Operators(b))
    drawn = [(shape, size) for op in operators if op in AXES for shape, size in _drawn(a, b, op, shapes)]
    drawn = [(shape, size) for shape, size in drawn if priced_pair(pair, shape, size) is not None]
    if not drawn:
        raise BadInput(Problem("--plot", "nothing to draw: these operators have no times by size"))
    figure, panels = _panels(len(drawn), "", 0.0)
    names = [f"{letter}: {clean(p.name)} ({p.kind})" for letter, p in (("A", a), ("B", b))]
    for panel, (shape, size) in zip(panels, drawn, strict=True):
        priced = priced_pair(pair, shape, size)
        assert priced is not None
        for i, (p, times) in enumerate(zip((a, b), priced, strict=True)):
            width = np.array([half_width(p, shape.op, grade) for grade in GRADES])[times.grade]
            panel.plot(size, times.ns, color=_HUES[i], linestyle=_DASHES[i], linewidth=1.6, label=names[i])
            low, high = times.ns * np.exp(-width), times.ns * np.exp(width)
            panel.fill_between(size, low, high, color=_HUES[i], alpha=0.18, linewidth=0)
        _size_axis(panel, shape.axis)
        _time_axis(panel)
        panel.set_title(f"{shape.op}\n{shape.label}", fontsize=9, loc="left")
    from matplotlib.patches import Patch

    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Patch(color="#888888", alpha=0.3))
    figure.legend(handles, [*labels, "90 % interval of each"], loc="outside upper left", ncols=3, frameon=False)
    _save(figure, path)


def _drawn(
    a: DeviceProfile, b: DeviceProfile, op: str, shapes: Sequence[tuple[Shape, FloatArray]] | None
) -> list[tuple[Shape, FloatArray]]:
    """Shapes of one operator with close sizes over what is compared."""
    if shapes is not None:
        chosen = [(shape, size) for shape, size in shapes if shape.op == op]
    else:
        first, second = measured_shapes(a, op), measured_shapes(b, op)
        shared = [shape for shape in first if shape in second]
        main = [*shared, *first, *second, *main_shapes(a, op, 1)][:1]
        chosen = [(shape, common_sizes(a, shape, knots(a, op), knots(b, op))) for shape in main]
    out = []
    for shape, size in chosen:
        low, high = (float(size[0]), float(size[-1])) if len(size) > 1 else span(a, shape)
        out.append((shape, np.unique(np.rint(np.geomspace(low, high, _POINTS)))))
    return out


# ---- the paper


def _panels(count: int, title: str, legend_inches: float) -> tuple[Any, list[Any]]:
    """A figure with `count` panels in at most three columns. legend_inches: room under each for its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3 if count > 4 else 2)
    rows = math.ceil(count / columns)
    size = (_PANEL[0] * columns, (_PANEL[1] + 0.75 * legend_inches) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for panel in panels:
        panel.grid(which="major", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, panels


def _size_axis(panel: Any, axis: str) -> None:
    """A logarithmic axis whose ticks are powers of two, few enough not to touch."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    panel.set_xscale("log", base=2)
    low, high = panel.dataLim.intervalx
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / (6 if axis == "bytes" else 8)))
    panel.xaxis.set_major_locator(FixedLocator([2.0**p for p in range(first, last + 1, step)]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(lambda v, _: size_text(v, axis == "bytes"))
    panel.set_xlabel(AXIS_WORDS[axis], fontsize=8)


def _time_axis(panel: Any) -> None:
    """A logarithmic axis of times with their units; 2 and 5 are named where decades are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    few = math.log10(high / low) < 2.2
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(lambda v, _: duration(v).replace(".00", "").replace(".0 ", " "))
    panel.set_ylabel("time", fontsize=8)


def _save(figure: Any, path: Path) -> None:
    """Write the whole file or none; the same figures give the same bytes."""
    import matplotlib

    from moesim.results import replacing_file

    kind = path.suffix.lower()[1:]
    stamp = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "moesim", "svg.fonttype": "none"}), replacing_file(path) as hidden:
        figure.savefig(hidden, format=kind, dpi=130, metadata=stamp)
