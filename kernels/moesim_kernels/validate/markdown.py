"""A report as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim_kernels.validate.tables import Table, profile_words, tables

__all__ = ["markdown"]


def markdown(report: Mapping[str, Any], command: str) -> str:
    """The verdict first, then every table; `command` made it."""
    words, machine = profile_words(report["profile"]), report["machine"]
    ran = machine.get("device") if machine.get("device") != "cpu" else machine.get("cpu")
    out = [
        f"# moesim validate {report['scenario']}",
        "",
        f"**{report['verdict']['sentence']}**",
        "",
        f"Made by `{command}` (exit code {report['verdict']['exit_code']}), moesim {report['moesim']}, on {ran}, torch "
        f"{machine.get('torch')}, {machine.get('date')}. {words[:1].upper() + words[1:]}. Predictions "
        f"were on disk before the first measurement: SHA-256 `{report['seal']}`.",
    ]
    for table in tables(report):
        out += ["", f"## {table.title}", "", *_table(table)]
    return "\n".join(out) + "\n"


def _table(table: Table) -> list[str]:
    out = []
    if table.rows:
        rule = ["---", *("---:" for _ in table.header[1:])]
        out += [_line(table.header), _line(rule), *(_line(row) for row in table.rows)]
    if table.lines:
        out += ([""] if table.rows else []) + [f"- {line}" for line in table.lines]
    return out


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
