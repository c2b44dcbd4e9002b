"""What a checked claim is, and how claims become a page: one table of all, then a section each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    rows = [row for section in sections for row in section.rows]
    count = Counter(row.verdict for row in rows)
    found = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS)
    lines = [
        "# Claims of routing papers beside the simulator's figures",
        "",
        "Made by `python benchmarks/routing/claims.py` (about three minutes on one core; `--only NAME` prints one"
        " section;"
        " recorded scores are read from `../shared/data`). Only claims are typed in; every figure of ours is computed"
        " by the project's own routers, models and prices, seeded.",
        "",
        f"**{len(rows)} claims: {found}.**",
        "",
        *table(("verdict", "means"), [(f"**{verdict}**", meaning) for verdict, meaning in VERDICTS.items()]),
        "Quality (loss, accuracy, perplexity) is outside a simulator and stands nowhere here. Recorded scores: ESFT's"
        " DeepSeek-V2-Lite traces `intent` and `summary` (64 experts, 6 recorded a token, 26 layers; scores below the"
        " sixth are drawn). No paper here used that model, so these figures say how far a claim carries over.",
        "",
        *_not_blind(),
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


def _not_blind() -> list[str]:
    """What was decided after figures had been seen."""
    return [
        "**Not blind.** What is *asked* of a row is ours, and most was written with a first run's figures on the table."
        " Where a figure then missed what was asked, the rule stays and the row counts as missed; a rule added later is"
        " a row of its own or stricter than the first one. Decided after figures had been seen:",
        "",
        "- the row on MaxVio at most 1 was added when the real curves missed the stricter 0.3, which stays;",
        "- *identity* was set apart from *reproduced*, which had held those rows;",
        "- simulated against real AvgMaxVio: the factor of 2, first asked of the mean over all steps alone, is asked of"
        " the last 50 steps too, as a mean may hide an end that is off by more;",
        "- Upcycling's 13B: 5 % was asked first and 13.7B misses it; the reading of 13B as cut off, under which it"
        " passed, is dropped;",
        "- scores of ESFT are taken about each token's mean (or its highest score) instead of as log probabilities, on"
        " which sigmoid gates with u = 1e-2 do not settle: listed under *fitted* where the bias is concerned, and"
        " loss-free balancing's 0.04 is a scale, not a number reproduced;",
        "- OpenMoE's balanced mix is judged at factor 2.0 alone (at 1.25 it would have passed the 10 % asked before);",
        "- tails are compared on scores about the mean (as log probabilities 3 of 36 pairs changed places, all of"
        " `loss_free`);",
        "- what is asked of top-p by layer was judged by eye before, and its rule written after the figures;",
        "- OmniMoE's row from published parameters alone is arithmetic, whose result was known when its factor was"
        " chosen.",
        "",
    ]


def shown(section: Section) -> str:
    """One section for the screen."""
    rows = [f"{r.verdict.upper()}: {r.paper}\n  {r.setup}\n  fitted: {r.fitted}\n  claim:  {r.claim}\n  asked:"
    f"  {r.asked}\n  ours:   {r.ours}"
            f"\n  {r.why}" for r in section.rows]  # fmt: skip
    return "\n".join([section.title, *rows, "", *section.lines])


def _reasons(section: Section) -> list[str]:
    out = [f"- **{row.verdict}** ({row.paper}): {row.why}" for row in section.rows if row.why and row.verdict != MISSED]
    return [*out, ""] if out else []
