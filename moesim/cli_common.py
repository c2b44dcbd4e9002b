"""What the verbs share: options that several take, plug-ins, and notes on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["PluginOption", "SetOption", "load_plugins", "show_notes"]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key, such as --set parallel.ep=16. May be repeated.", metavar="KEY=VALUE"),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Import this module's POLICIES. May be repeated.", metavar="MODULE"),
]


def load_plugins(plugins: list[str] | None) -> None:
    """Import what `--plugin` names; modules of the current folder are found."""
    if plugins:
        from moesim.policy import load_plugin

        sys.path.insert(0, str(Path.cwd()))
        for module in plugins:
            load_plugin(module)


def show_notes(notes: Iterable[str]) -> None:
    """Each once, on stderr."""
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)
