"""The report of a study on screen; fits any width from 60 columns. Drawn from the JSON of `report.to_json`."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moesim_tuner.words import figure, settings_in_short

__all__ = ["render_report"]

_MOST = 8
"""rows of a front"""
_ORIGIN = 26
"""characters of where a trial comes from"""


def render_report(
    report: Mapping[str, Any], excluded: Sequence[str], file: IO[str] | None = None, width: int | None = None
) -> None:
    """Print it. excluded: what `diagnose` says, in lines."""
    out = _Screen(Console(file=file or sys.stdout, width=width, highlight=False, soft_wrap=False, emoji=False))
    with out.console.capture() as captured:
        _head(out, report)
        _search(out, report)
        _front(out, report)
        if report["judgement"] is not None:
            _judgement(out, report)
        if report["why"] is not None:
            _why(out, report["why"])
        _excluded(out, report, excluded)
        _foot(out, report)
    out.console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


class _Screen:
    def __init__(self, console: Console) -> None:
        self.console = console

    def section(self, title: str) -> None:
        """A heading."""
        self.console.print()
        self.console.print(Text(title, style="bold cyan"))

    def say(self, text: str, style: str = "", indent: int = 2) -> None:
        """One or more lines, set in; what follows hangs."""
        first, rest = " " * indent, " " * (indent + 2)
        for line in textwrap.wrap(
            text, self.console.width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        ):
            self.console.print(Text(line, style=style))

    def table(self, table: Table) -> None:
        """A table, set in."""
        self.console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _columns(*names: str) -> Table:
    """A table without lines; a column that starts with `>` is set to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        right = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _head(out: _Screen, report: Mapping[str, Any]) -> None:
    out.console.print(Text(report["study"], style="bold"), Text(f"scenario {report['scenario']}", style="dim"))
    wanted = " and ".join(f"{'most' if o['better'] == 'more' else 'least'} {o['name']}" for o in report["objectives"])
    limits = [
        f"{name} {word} {figure(limit[key], name)}"
        for name, limit in report["constraints"].items()
        for key, word in (("max", "at most"), ("min", "at least"))
        if key in limit
    ]
    out.console.print(Text(wanted + (f", with {' and '.join(limits)}" if limits else "")))


def _search(out: _Screen, report: Mapping[str, Any]) -> None:
    out.section("Search")
    search, space = report["search"], report["space"]
    size = "continuous" if space["points"] is None else f"{space['points']:,} points"
    parameters = len(space["parameters"])
    out.say(f"space: {parameters} parameter{'s' if parameters != 1 else ''}, {size}")
    states = search["states"]
    names = {"complete": "run whole", "pruned": "stopped early", "infeasible": "do not fit", "illegal": "cannot be",
             "failed": "failed"}  # fmt: skip
    counts = ", ".join(f"{states[state]} {name}" for state, name in names.items() if states[state])
    done = f"{search['trials']} of {search['wanted']} trials"
    out.say(f"{done}: {counts or 'none yet'}; {search['feasible']} feasible")
    came = ", ".join(f"{count} {origin}" for origin, count in search["origins"].items())
    if came:
        out.say(f"tried: {came}", "dim")
    curve = report["best_so_far"]
    if curve:
        name = report["objectives"][0]["name"]
        shown = curve if len(curve) <= _MOST else [*curve[:2], *curve[-(_MOST - 2) :]]
        steps = [f"{figure(step['value'], name)} (trial {step['trial']})" for step in shown]
        if len(shown) < len(curve):
            steps.insert(2, "...")
        out.say(f"best {name} so far: {' > '.join(steps)}")


def _front(out: _Screen, report: Mapping[str, Any]) -> None:
    front, beside = report["front"], report["beside"]
    if not front and not beside:
        return
    many = len(report["objectives"]) > 1
    out.section("Front: no trial is better in one figure without being worse in another" if many else "Best")
    names = [o["name"] for o in report["objectives"]]
    limits = [name for name in report["constraints"] if name not in names]
    table = _columns(">trial", "from", *(f">{name}" for name in names), *(f">{name}" for name in limits))
    rows = [*front[:_MOST], *(b for b in beside if b["trial"] not in {f["trial"] for f in front[:_MOST]})]
    for row in rows:
        on_front = any(row["trial"] == f["trial"] for f in front)
        cells = [_cell(row["values"].get(name), name, name in row["broken"]) for name in names]
        cells += [_cell(row["constraints"].get(name), name, name in row["broken"]) for name in limits]
        origin = _cut(row["origin"], _ORIGIN)
        table.add_row(Text(str(row["trial"]), style="bold green" if on_front else ""), origin, *cells)
    out.table(table)
    if len(front) > _MOST:
        out.say(f"{len(front) - _MOST} more on the front: --json", "dim")
    for row in rows:
        if row["origin"] != "default" or row["point"]:
            out.say(f"{row['trial']}: {settings_in_short(row['point']) or 'the scenario as written'}", "dim")
    if any(row["broken"] for row in rows):
        out.say("! breaks a limit", "yellow")


def _cell(value: float | None, name: str, broken: bool) -> Text:
    text = "-" if value is None else figure(value, name)
    return Text(f"{text} !" if broken else f"{text}  ", style="yellow" if broken else "")


def _judgement(out: _Screen, report: Mapping[str, Any]) -> None:
    """The finalists on fresh seeds and held-out traffic, and the finding in words; a table an objective."""
    found = report["judgement"]
    out.section(f"Judged on {len(found['seeds'])} fresh seeds")
    for i, text in enumerate(found["sentences"]):
        out.say(_short(text), "bold" if i == 0 else "")
    for name in found["objectives"]:
        out.console.print()
        table = _columns("", ">trial", "from", f">{name}", ">90 %", ">to best", ">interval")
        for place, one in enumerate(found["finalists"]):
            style = "bold green" if place == found["chosen"] else ""
            cells = ["*" if place == found["chosen"] else "=" if place in found["ties"] else ""]
            cells += ["-" if one["trial"] is None else str(one["trial"]), _cut(one["origin"], _ORIGIN // 2)]
            score = one["scores"].get(name)
            cells += ["-", "", "", ""] if score is None else _score(score, name)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        out.table(table)
    for one in found["finalists"]:
        if _limits(one):
            name = "the scenario as written" if one["trial"] is None else f"trial {one['trial']}"
            out.say(f"{name}: {_limits(one)}", "yellow")
    level = f"{100 * found['tie_level']:.3g}%"
    out.say(f"* chosen; = cannot be told from the best: the {level} interval, same seeds for all", "dim")
    for note in found["notes"]:
        out.say(f"note: {note}", "yellow")


def _score(score: Mapping[str, Any], name: str) -> list[str]:
    """A figure, its interval, how it stands to the best's, and that interval."""
    ends, best_ends = score["interval90"], score["to_best_interval"]
    between = "" if ends is None else f"{figure(ends[0], name)}..{figure(ends[1], name)}"
    if score["mark"] == "best" or score["to_best"] is None:
        return [figure(score["value"], name), between, score["mark"] or "", ""]
    to_best = "" if best_ends is None else f"{best_ends[0]:.3g}..{best_ends[1]:.3g}"
    return [figure(score["value"], name), between, f"{score['to_best']:.3g}", to_best]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(text: str) -> str:
    """A reason without the bytes by use, which are in the JSON."""
    return re.sub(r" \([^()]*\d B\)\.?$", ".", text)


def _limits(one: Mapping[str, Any]) -> str:
    """What a finalist does not surely keep."""
    if one["state"] != "done":
        return str(one["state"])
    return ", ".join(
        f"{name} {kept['status']}" for name, kept in one["constraints"].items() if kept["status"] != "kept"
    )


def _why(out: _Screen, why: Mapping[str, Any]) -> None:
    """What bounds the winner and what each setting is worth; what would turn it is in the JSON."""
    from moesim_tuner.why import render

    out.section("Why")
    for line in render({**why, "certainty": {}}).splitlines():
        if line:
            out.say(_short(line.strip().removeprefix("- ")), "", 2 + len(line) - len(line.lstrip()))
        else:
            out.console.print()


def _excluded(out: _Screen, report: Mapping[str, Any], lines: Sequence[str]) -> None:
    if len(lines) > 1 or not report["search"]["feasible"]:
        out.section("Excluded")
        for line in lines:
            indent = len(line) - len(line.lstrip())
            out.say(_short(line.strip()), "dim" if indent else "", 2 + indent)


def _foot(out: _Screen, report: Mapping[str, Any]) -> None:
    out.console.print()
    search = report["search"]
    if search["asynchronous"]:
        out.say("run with --async: another run with the same seed may propose other trials", "yellow")
    else:
        out.say(
            f"sampler {search['sampler']}, seed {search['seed']}, batches of {search['batch']}: any number of workers"
            " finds the same trials",
            "dim",
        )
    if report["front"] and report["judgement"] is None:
        out.say("not judged yet: the figures above are the search's own, and the best of many is lucky", "yellow")
    if search["trials"] < search["wanted"]:
        out.say(f"go on: moesim tune resume {report['study']}")
    judged = report["judgement"]
    if report["front"] if judged is None else judged["winner"] is not None:
        out.say(f"export: moesim tune export {report['study']} --out DIR")
