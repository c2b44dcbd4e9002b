"""Fit the synthetic routing model to one half of recorded traces and compare it with the other half.

    python benchmarks/routing/fit_synthetic.py ../shared/data/routing/esft_dsv2lite_{intent,summary}.npz \
        --out results/validation/synthetic_routing.md

Writes a table: the fitted half's own distance from the other half stands beside the model's, because a model cannot be
asked to be nearer than that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moesim.traces.routing_npz import read
from moesim.workload.synthetic_fit import Row, compare, fit_synthetic, split_sequences

SCALED = ("correlation", "lag-1")
"""Statistics near zero: their errors are differences, not shares."""


def error(row: Row) -> str:
    """The error in percent, or as a difference where the statistic may be zero."""
    if any(word in row.name for word in SCALED):
        return f"{row.synthetic - row.recorded:+.3f}"
    return f"{100 * row.error:+.1f} %"


def section(path: Path, seed: int) -> Iterator[str]:
    """Markdown lines for one trace."""
    source = read(path)
    fitted_on, held_out = split_sequences(source, 0), split_sequences(source, 1)
    model = fit_synthetic(fitted_on, held_out, seed=seed)
    knobs = {k: v for k, v in model.spec.model_dump(exclude_none=True).items() if k != "drift_windows"}
    yield f"## {path.stem}"
    yield ""
    yield (
        f"{source.num_tokens} tokens, {source.num_sequences} sequences, {source.num_layers} layers,"
        f" {source.num_experts} experts, top-{source.top_k}. Fitted on every other sequence,"
        " compared with the rest. Knobs: " + ", ".join(f"`{k}: {round(v, 4)}`" for k, v in knobs.items()) + "."
    )
    yield ""
    yield "| statistic | looked at by the fit | recorded (held out) | synthetic | error | fitted half's own error |"
    yield "|---|---|---|---|---|---|"
    halves = compare(held_out, fitted_on)
    inside = {"expected": 0, "within": 0}
    for row, other in zip(model.report, halves, strict=True):
        looked = "yes" if row.kind == "fitted" else "no"
        yield f"| {row.name} | {looked} | {row.recorded:.4g} | {row.synthetic:.4g} | {error(row)} | {error(other)} |"
        if not any(word in row.name for word in SCALED):
            inside["expected"] += 1
            inside["within"] += abs(row.error) <= 0.10
    yield ""
    yield f"Within 10 %: {inside['within']} of {inside['expected']} statistics (correlations not counted)."
    yield ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lines = [
        "# Synthetic routing against recorded routing",
        "",
        "Made by `python benchmarks/routing/fit_synthetic.py ../shared/data/routing/esft_dsv2lite_intent.npz"
        " ../shared/data/routing/esft_dsv2lite_summary.npz --out results/validation/synthetic_routing.md`. Traces:"
        " github.com/deepseek-ai/ESFT (MIT), DeepSeek-V2-Lite shape, prefill of whole chats.",
        "",
        "Batches: *consecutive* rows (a prefill chunk), *scattered* ones (unrelated tokens), *parallel* (several"
        " sequences going on together, as decodes do). Ranks: 8, experts in id order. Errors of correlations are"
        " differences. Means over layers. `intent` chats are 65 tokens of template, one sentence and a fixed form of"
        " answer, so that 64 consecutive tokens are nearly one chat: their loads vary less than those of independent"
        " tokens (variance ratio below 1), which no stationary model can do, and the model's variance there is too"
        " high. In both traces the hottest expert's load varies more from stretch to stretch than its share says.",
        "",
    ]
    for path in options.trace:
        lines += section(path, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines), "utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
