"""What a checked claim is, and how claims become a page: one table of all, then a section each."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TARGET = ROOT / "results" / "validation"

REPRODUCED, IDENTITY, SHAPE = "reproduced", "identity", "shape"
FITTED, MISSED, NOT_CHECKED = "fitted", "missed", "not checked"
VERDICTS = {
    REPRODUCED: "a simulated number that was not fitted agrees, within the tolerance that the row states",
    IDENTITY: "it follows from the definition or from published inputs; nothing is simulated, only arithmetic and code"
    " are checked",
    SHAPE: "only a direction, an order or a scale can be compared, and it agrees",
    FITTED: "the number agrees because a parameter was set so that it does; nothing else is published to compare",
    MISSED: "it does not agree",
    NOT_CHECKED: "what the comparison needs is not public, or not there",
}


@dataclass(frozen=True)
class Row:
    """One claim. paper: where it stands. setup: what was run. fitted: parameters set by looking at published numbers
    ("nothing"). claim, ours: side by side. asked: the rule that the verdict follows. why: the reason of a miss, or what
    the verdict leaves open."""

    paper: str
    setup: str
    fitted: str
    claim: str
    ours: str
    verdict: str
    why: str = ""
    asked: str = ""


@dataclass(frozen=True)
class Section:
    """A claim's rows, and what stands under them: paragraphs and tables as Markdown lines."""

    name: str
    title: str
    rows: Sequence[Row]
    lines: Sequence[str] = field(default_factory=list)


def within(ours: float, claim: float, tolerance: float) -> bool:
    """Whether a number agrees, relative to the claim."""
    return abs(ours / claim - 1) <= tolerance


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, an empty line behind it."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def page(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page: how it was made and what must be known to read it (`intro`, Markdown lines before and after the
    verdicts, parted by an empty string), a table of all claims, misses, then a section each."""
    rows = [row for section in sections for row in section.rows]
    count = Counter(row.verdict for row in rows)
    found = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS)
    lines = [
        f"# {title}",
        "",
        intro[0],
        "",
        f"**{len(rows)} claims: {found}.**",
        "",
        *table(("verdict", "means"), [(f"**{verdict}**", meaning) for verdict, meaning in VERDICTS.items()]),
        *intro[1:],
        "",
        "## All claims",
        "",
        *table(
            ("verdict", "paper", "set-up", "fitted", "claim", "asked", "ours"),
            [(f"**{r.verdict}**", r.paper, r.setup, r.fitted, r.claim, r.asked, r.ours) for r in rows],
        ),
        "## Missed, and why",
        "",
        *(
            f"- {r.paper}; {r.setup}: **{r.claim}**. Asked: {r.asked}. Ours: {r.ours}. {r.why}"
            for r in rows
            if r.verdict == MISSED
        ),
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", "", *_reasons(section), *section.lines]
    return "\n".join(lines).rstrip("\n") + "\n"


def shown(section: Section) -> str:
    """One section for the screen."""
    rows = [f"{r.verdict.upper()}: {r.paper}\n  {r.setup}\n  fitted: {r.fitted}\n  claim:  {r.claim}\n  asked:"
    f"  {r.asked}\n  ours:   {r.ours}"
            f"\n  {r.why}" for r in section.rows]  # fmt: skip
    return "\n".join([section.title, *rows, "", *section.lines])


def _reasons(section: Section) -> list[str]:
    out = [f"- **{row.verdict}** ({row.paper}): {row.why}" for row in section.rows if row.why and row.verdict != MISSED]
    return [*out, ""] if out else []


def command(doc: str | None, sections: Mapping[str, str], name: str, title: str, intro: Sequence[str]) -> None:
    """The command line of a page: make all sections and write results/validation/`name`, or print those of `--only`.
    sections: name -> `module.function` that makes it. doc: of the script, for --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, metavar="NAME", help=", ".join(sections))
    options = parser.parse_args()
    made: list[Section] = []
    for section in options.only or sections:
        module, _, function = sections[section].partition(".")
        began = time.process_time()
        made.append(getattr(importlib.import_module(module), function)())
        print(f"{section}: {time.process_time() - began:.1f} CPU s", file=sys.stderr)
        if options.only:
            print(shown(made[-1]))
    if not options.only:
        (TARGET / name).write_text(page(title, intro, made), "utf-8")
