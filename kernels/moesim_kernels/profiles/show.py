"""What a profile is and what it says: facts, ceilings, operators with their errors, and how near the roofline they run.

`describe` gathers everything as plain JSON; `render` draws from that alone, so the screen cannot say what it does not.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from functools import partial
from math import hypot
from statistics import NormalDist
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moesim.cost.operators import Operators
from moesim.errors import BadInput
from moesim.hardware import GRADES, DeviceProfile
from moesim_kernels.profiles.find import clean
from moesim_kernels.profiles.shapes import AXES, AXIS_WORDS, floor_ns, main_shapes, price, span
from moesim_kernels.profiles.terminal_plot import Line, duration, percent, plot, size_text

__all__ = ["SCHEMA_VERSION", "console_for", "describe", "emit", "half_width", "render"]

SCHEMA_VERSION = 1
NORMAL_90 = 1.6449
"""Half width of the 90 % interval of a normal law, in its sigma"""

UNSEEN = 0.30
"""1 sigma of log of a shape that was not measured: on the public H100 tables a tenth of such times miss by 36 % or more
with 32 shapes measured, and `errors` speaks of measured shapes alone
"""

_POINTS = 64
_SHAPES = 4
_WIDEST = 132
_TOLD_FIRST = ("date", "device", "driver", "versions", "kernel", "command", "how", "tables")


# ---- the report


def describe(profile: DeviceProfile, operators: tuple[str, ...]) -> dict[str, Any]:
    """Everything `render` shows, as JSON: facts, ceilings, links, tiers, operators, provenance. Times ns."""
    node = profile.node
    return {
        "schema_version": SCHEMA_VERSION,
        "name": profile.name,
        "kind": profile.kind,
        "device": profile.device,
        "vendor": profile.vendor,
        "ceilings": {
            "hbm_bytes_per_s": profile.hbm_bytes_per_s,
            "flop_per_s": dict(profile.flop_per_s),
            "num_sms": profile.num_sms,
            "graph_launch_ns": profile.graph_launch_ns,
            "eager_launch_ns": profile.eager_launch_ns,
            "moe_block_rows": profile.moe_block_rows,
        },
        "links": {
            "gpus_per_node": node.gpus_per_node,
            "nvlink_bytes_per_s": node.nvlink_bytes_per_s,
            "nvlink_latency_ns": node.nvlink_latency_ns,
            "nic_bytes_per_s": node.nic_bytes_per_s,
            "nic_latency_ns": node.nic_latency_ns,
        },
        "tiers": {
            "hbm": {"bytes": profile.memory_bytes, "bytes_per_s": profile.hbm_bytes_per_s},
            "host": {
                "bytes": node.host_memory_bytes,
                "bytes_per_s": node.host_bytes_per_s,
                "pcie_bytes_per_s": node.pcie_bytes_per_s,
                "cpu_cores": node.cpu_cores,
            },
            "nvme": {"bytes": node.nvme_bytes, "bytes_per_s": node.nvme_bytes_per_s},
        },
        "operators": [_operator(profile, op) for op in operators],
        "provenance": _plain(profile.provenance),
    }


def _operator(profile: DeviceProfile, op: str) -> dict[str, Any]:
    """Curves, sizes covered, errors and the lines of the main shapes of one operator."""
    curves = profile.curves.get(op, ())
    axes = max((len(c.axes) for c in curves), default=0)
    covered = []
    for i in range(axes):
        ends = [(float(c.axes[i][0]), float(c.axes[i][-1])) for c in curves if len(c.axes) == axes]
        name = ("seqs", "tokens")[i] if axes == 2 else AXES.get(op, "size")
        covered.append({"axis": name, "least": min(e[0] for e in ends), "most": max(e[1] for e in ends)})
    return {
        "operator": op,
        "basis": "measured" if curves else "fitted" if _fitted(profile, op) else "assumed",
        "curves": len(curves),
        "points": int(sum(c.log_ratio.size for c in curves)),
        "covered": covered,
        "variants": sorted({c.variant for c in curves if c.variant}),
        "error": profile.error(op),
        "error_stated": op in profile.errors,
        "intervals": {grade: i.model_dump() for grade, i in profile.intervals.get(op, {}).items()},
        "half_width90": {grade: half_width(profile, op, grade) for grade in GRADES},
        "shapes": _lines(profile, op),
    }


def _fitted(profile: DeviceProfile, op: str) -> bool:
    return profile.kind == "measured" and any(key.split("/")[0] == op for key in profile.fits)


def half_width(profile: DeviceProfile, op: str, grade: str) -> float:
    """Half of the 90 % interval in log units: the profile's own where it states one (stretched as a normal law's if it
    is for another level), else 1.645 sigma of its error, and for extrapolated and assumed times no less than UNSEEN's;
    and with it the error of the device's speed from run to run.
    """
    stated = profile.interval(op, GRADES.index(grade))
    if stated is None:
        seen = grade in ("measured", "interpolated")
        half = NORMAL_90 * (profile.error(op) if seen else max(profile.error(op), UNSEEN))
    elif stated.level == 0.9:
        half = stated.half_width
    else:
        half = stated.half_width * NORMAL_90 / NormalDist().inv_cdf(0.5 + stated.level / 2)
    return hypot(half, NORMAL_90 * profile.speed_error)


def _lines(profile: DeviceProfile, op: str) -> list[dict[str, Any]]:
    """Time and efficiency of the main shapes over their sizes; shapes that the device cannot run are left out."""
    ops = Operators(profile)
    out = []
    for shape in main_shapes(profile, op, _SHAPES):
        low, high = span(profile, shape)
        size = np.unique(np.rint(np.geomspace(low, high, _POINTS)))
        try:
            ns, grade = price(ops, shape, size)
            floor = floor_ns(profile, shape, size)
        except BadInput:
            continue
        out.append(
            {
                "label": shape.label,
                "key": list(shape.key),
                "batch": shape.batch,
                "axis": shape.axis,
                "size": size.tolist(),
                "ns": ns.tolist(),
                "efficiency": (floor / np.maximum(ns, 1e-9)).tolist(),
                "grade": [GRADES[g] for g in grade.tolist()],
            }
        )
    return out


def _plain(value: Any, depth: int = 0) -> Any:
    """Provenance as JSON: mappings and lists of text and numbers."""
    if isinstance(value, Mapping) and depth < 8:
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple) and depth < 8:
        return [_plain(v, depth + 1) for v in value]
    return value if isinstance(value, bool | int | float) or value is None else str(value)


# ---- the screen


def console_for(file: IO[str] | None, width: int | None) -> Console:
    """A console on stdout: no markup in texts, no colour where NO_COLOR says so, at most 132 columns."""
    console = Console(file=file or sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    if console.width > _WIDEST:
        console.width = _WIDEST
    return console


def emit(console: Console, text: str) -> None:
    """Out, without the blanks that tables leave at the ends of lines."""
    console.file.write("".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def render(report: dict[str, Any], time: bool, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the report. time: plots of times (logarithmic) instead of efficiency."""
    console = console_for(file, width)
    with console.capture() as captured:
        _head(console, report)
        _ceilings(console, report)
        _operators(console, report, time)
        _plots(console, report, time)
    emit(console, captured.get())


def section(console: Console, title: str) -> None:
    """A heading after an empty line."""
    console.print()
    console.print(Text(title, style="bold cyan"))


def say(console: Console, text: str, style: str = "", hang: int = 2) -> None:
    """A paragraph, set in by two, later lines by `hang`."""
    lines = textwrap.wrap(clean(text), console.width - 1, initial_indent="  ", subsequent_indent=" " * hang)
    for line in lines:
        console.print(Text(line, style=style))


def _head(console: Console, report: dict[str, Any]) -> None:
    console.print(Text(clean(report["name"]), style="bold"), Text(report["kind"], style="dim"))
    console.print(Text(f"{clean(report['device'])} ({clean(report['vendor'])})"))
    section(console, "Where it comes from")
    known = report["provenance"]
    keys = [k for k in _TOLD_FIRST if k in known]
    keys += [k for k in known if k not in keys and k not in ("sources", "curve_sources")]
    for key in keys:
        _tell(console, clean(key), known[key], 4)
    sources = known.get("sources")
    if sources:
        say(console, f"facts: {len(sources)} of its figures name their source (--json lists them)", "dim", 4)
    if known.get("curve_sources"):
        say(console, "curves from:", "dim")
        for text in known["curve_sources"]:
            say(console, f"  - {clean(text)}", "dim", 6)
    if not known:
        say(console, "the profile does not say", "dim")


def _tell(console: Console, name: str, value: Any, hang: int) -> None:
    """One entry of the provenance; a mapping becomes `name.key: value` lines, a list one line."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _tell(console, f"{name}.{clean(key)}", inner, hang)
    elif isinstance(value, list):
        say(console, f"{name}: {', '.join(clean(v) for v in value)}", "dim", hang)
    else:
        say(console, f"{name}: {clean(value)}", "dim", hang)


def _ceilings(console: Console, report: dict[str, Any]) -> None:
    section(console, "Ceilings, links and tiers")
    ceilings, links, tiers = report["ceilings"], report["links"], report["tiers"]
    rates = ", ".join(f"{dtype} {_rate(rate)}" for dtype, rate in ceilings["flop_per_s"].items())
    say(console, f"memory: {_gib(tiers['hbm']['bytes'])} at {_gb(ceilings['hbm_bytes_per_s'])}")
    say(console, f"TFLOP/s: {rates}; {ceilings['num_sms']} multiprocessors", hang=4)
    launch = f"launch: {duration(ceilings['graph_launch_ns'])} in a graph, {duration(ceilings['eager_launch_ns'])}"
    say(console, f"{launch} by the host; grouped GEMMs pad to {ceilings['moe_block_rows']} rows", hang=4)
    near = f"{_gb(links['nvlink_bytes_per_s'])}, {duration(links['nvlink_latency_ns'])}"
    far = f"{_gb(links['nic_bytes_per_s'])}, {duration(links['nic_latency_ns'])}"
    say(console, f"node: {links['gpus_per_node']} devices; link of each {near}; NIC of each {far}", hang=4)
    host, nvme = tiers["host"], tiers["nvme"]
    text = f"host: {_gib(host['bytes'])} at {_gb(host['bytes_per_s'])}, {host['cpu_cores']} cores, "
    text += f"{_gb(host['pcie_bytes_per_s'])} to a device; NVMe: {_gib(nvme['bytes'])} at {_gb(nvme['bytes_per_s'])}"
    say(console, text, hang=4)


def _operators(console: Console, report: dict[str, Any], time: bool) -> None:
    section(console, "Operators")
    table = new_table("operator", ">curves", "sizes covered", ">error", ">between", ">unseen")
    silent = []
    for row in report["operators"]:
        if len(report["operators"]) > 1 and not (row["shapes"] or row["curves"] or row["error_stated"]):
            silent.append(row["operator"])
            continue
        sizes = " x ".join(map(_ends, row["covered"]))
        error = percent(row["error"]) + ("" if row["error_stated"] else "*")
        basis = f"{row['curves']:,}" if row["curves"] else row["basis"]
        ends = [_range(row["half_width90"][grade]) for grade in ("interpolated", "extrapolated")]
        table.add_row(row["operator"], basis, sizes, error, *ends)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if silent:
        say(console, f"neither measured nor stated: {', '.join(silent)}", "dim", 4)
    text = (
        "error: held out, 1 sigma of log; between: where 90 % of times between measured sizes lie; unseen: of shapes "
    )
    text += "that were not measured"
    if any(not row["error_stated"] for row in report["operators"]):
        text += "; *: the profile states none, so that of a roofline with typical efficiencies"
    say(console, text, "dim")
    if not time:
        say(console, "efficiency, drawn below: roofline floor at the ceilings above / predicted time", "dim")


def _range(width: float) -> str:
    """An interval of a half width in log units, around a time."""
    return f"-{percent(1 - float(np.exp(-width)))} +{percent(float(np.exp(width)) - 1)}"


def _ends(covered: dict[str, Any]) -> str:
    of_bytes = covered["axis"] == "bytes"
    least, most = size_text(covered["least"], of_bytes), size_text(covered["most"], of_bytes)
    return least if least == most else f"{least}..{most}"


def _plots(console: Console, report: dict[str, Any], time: bool) -> None:
    plain = not (console.encoding or "").lower().startswith("utf")
    for row in report["operators"]:
        lines = [
            Line(s["label"], np.array(s["size"]), np.array(s["ns" if time else "efficiency"]))
            for s in row["shapes"]
            if not all(grade == "assumed" for grade in s["grade"]) or report["kind"] == "assumed"
        ]
        if not lines:
            continue
        what = "time" if time else "efficiency"
        axis = row["shapes"][0]["axis"]
        section(console, f"{row['operator']}: {what} by {AXIS_WORDS[axis]}")
        drawn = plot(
            lines,
            console.width - 2,
            10,
            duration if time else percent,
            partial(size_text, of_bytes=axis == "bytes"),
            None if time else 1.0,
            plain,
        )
        for text in drawn:
            console.print(Padding(text, (0, 0, 0, 2), expand=False))


def new_table(*columns: str) -> Table:
    """A table without lines; a column that starts with `>` is set to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right or not table.columns)
    return table


def _rate(flop_per_s: float) -> str:
    tera = flop_per_s / 1e12
    return f"{tera:,.0f}" if tera >= 99.5 else f"{tera:.3g}"


def _gb(bytes_per_s: float) -> str:
    giga = bytes_per_s / 1e9
    return f"{giga:,.0f} GB/s" if giga >= 99.5 else f"{giga:.3g} GB/s"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:,.0f} GiB" if gib >= 99.5 else f"{gib:.3g} GiB"
