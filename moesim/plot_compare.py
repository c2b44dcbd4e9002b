"""A comparison as a picture (matplotlib, extra `plot`): a panel a figure, a dot and its 90 % interval a candidate.

Candidates that are best, or cannot be told from the best, stand on the same shade.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim.observe import FIGURES
from moesim.results import replacing_file
from moesim.terminal_compare import shown, tie_rule

__all__ = ["check_target", "draw"]

_KINDS = (".png", ".svg", ".pdf")
_SHADE, _MARKED, _OTHER = "#d7efe5", "#00795a", "#555555"


def check_target(path: Path) -> None:
    """Raises BadInput unless the ending is known, the folder there and matplotlib installed; before anything runs."""
    if path.suffix.lower() not in _KINDS:
        raise BadInput(Problem("--plot", f"{path.name!r} must end in {', '.join(_KINDS[:-1])} or {_KINDS[-1]}"))
    if not path.absolute().parent.is_dir():
        raise BadInput(Problem("--plot", f"there is no folder {path.parent}; make it first"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput(Problem("--plot", "matplotlib is not installed. Run: pip install 'moesim[plot]'")) from None


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw `Comparison.to_json()`. Raises BadInput where nothing fits or the file cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_target(path)
    fits = [c for c in report["candidates"] if c["feasible"]]
    if not fits:
        raise BadInput(Problem("--plot", "nothing to draw: no candidate fits"))
    names = [figure["name"] for figure in report["figures"]]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    labels = [_wrapped(c["label"]) for c in fits]
    lines = max(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.splitlines())
    height = 0.75 + max(0.26, 0.13 + 0.13 * lines) * len(fits)
    size = (2.9 * columns + 0.075 * longest + 0.2, height * rows + 0.8)
    figure: Any = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    FigureCanvasAgg(figure)
    seeds = report["seeds"]
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    varied = ", ".join(dict.fromkeys(key for c in report["candidates"] for key in c["varied"]))
    title = f"{len(fits)} candidates{f' ({varied})' if varied else ''}, {told}: dots with 90 % intervals"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for i, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, i + 1)
        _panel(panel, name, fits, labels if i % columns == 0 else [""] * len(fits))
    if len(fits) > 1:
        rule = tie_rule(report).replace("* best, = tie", "shaded: best, or tied with it where")
        figure.supxlabel(rule.replace(" where:", " where"), x=0.01, ha="left", fontsize=8, color=_OTHER)
    kind = path.suffix.lower()[1:]
    stamp = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "moesim", "svg.fonttype": "none"}), replacing_file(path) as hidden:
        figure.savefig(hidden, format=kind, dpi=130, metadata=stamp)


def _wrapped(label: str) -> str:
    """A label in at most three lines of 36 characters."""
    lines = textwrap.wrap(label, 36, break_on_hyphens=False)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], f"{lines[2][:33]}..."])


def _panel(panel: Any, name: str, fits: list[dict[str, Any]], labels: list[str]) -> None:
    known = FIGURES[name]
    scale = 1 / 2**30 if name.endswith("_bytes") else 1.0
    for i, candidate in enumerate(fits):
        row = candidate["figures"][name]
        if row is None:
            continue
        marked = row["mark"] is not None
        color = _MARKED if marked else _OTHER
        if marked:
            panel.axhspan(i - 0.5, i + 0.5, color=_SHADE, linewidth=0, zorder=0)
        if row["interval90"] is not None:
            low, high = (end * scale for end in row["interval90"])
            panel.plot([low, high], [i, i], color=color, linewidth=1.4, solid_capstyle="butt")
        panel.plot([row["value"] * scale], [i], "o", color=color, markersize=4.5)
        panel.annotate(
            shown(row["value"], name),
            (1.0, i),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=color,
        )
    panel.set_ylim(len(fits) - 0.5, -0.5)
    panel.set_yticks(range(len(fits)), labels)
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    way = "more is better" if known.more_is_better else "less is better"
    panel.set_title(f"{known.label}", fontsize=9, loc="left")
    panel.set_title(way, fontsize=7, loc="right", color=_OTHER)
