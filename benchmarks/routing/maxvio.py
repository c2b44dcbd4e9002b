"""Imbalance over training steps: the small model's real MaxVio curves beside the simulator's.

    make routing-lm                             trains the model under each method (an hour of one core), then this
    python benchmarks/routing/maxvio.py         simulates, plots, and prints rows for results/validation/routing.md

Real: results/validation/routing_maxvio.json. Simulated: the policies of moesim.routing, driven step after step

- on `recorded` scores: the router's of the run without balancing (results/routing-lm/none/scores.npy, which is not in
  the repository). They answer to no balancing: what a router learns under a method is in the real curves alone;
- on `generated` scores: moesim.workload.scores_training with its defaults, but for what is fitted.

Fitted: `rate` of the auxiliary loss's surrogate, on the first FITTED_STEPS steps of the real curve (recorded scores);
`quality_spread` of the generator, on the real curve of the run without balancing. All else is the real runs' own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing import Router, RoutingContext, bip, expert_choice, loss_free, sinkhorn, topk
from moesim.routing import auxiliary_loss as auxiliary_loss
from moesim.routing.select import load_of
from moesim.workload.scores_training import TrainingScores, TrainingScoresSpec

ROOT = Path(__file__).parents[2]
FITTED_STEPS = 100
LAST_STEPS = 50
BALANCED = 1.0
"""A method counts as balanced from the step on after which no mean over 10 steps exceeds this MaxVio"""
RATES = np.geomspace(0.1, 30, 15)
SPREADS = (0.4, 0.8, 1.6, 2.4, 3.2, 4.0)
SPREAD_EVERY = 15
"""The generator is fitted on one step in so many"""

Floats = NDArray[np.float64]


def policy_of(method: dict[str, Any], rate: float | None = None) -> Router | None:
    """The simulator's policy with the real run's parameters; None for a method that looks at no score."""
    kind = method["kind"]
    made: dict[str, Any] = {
        "topk": lambda: topk.Policy(),
        "auxiliary_loss": lambda: auxiliary_loss.Policy(alpha=method["alpha"], rate=1.0 if rate is None else rate),
        "loss_free": lambda: loss_free.Policy(rate=method["rate"], scoring=method["scoring"]),
        "bip": lambda: bip.Policy(iterations=method["iterations"], warm=method["warm"]),
        "sinkhorn": lambda: sinkhorn.Policy(iterations=method["iterations"], temperature=method["temperature"]),
        "expert_choice": lambda: expert_choice.Policy(),
    }
    return made[kind]() if kind in made else None


def simulate(score_SLTE: NDArray[np.float16], policy: Router, top_k: int) -> Floats:
    """MaxVio of each step, mean over layers [S]; each layer's state goes from step to step."""
    steps, layers, _, experts = score_SLTE.shape
    state: list[Any] = [{} for _ in range(layers)]
    out_S = np.empty(steps)
    for step in range(steps):
        violation = 0.0
        for layer in range(layers):
            context = RoutingContext(top_k=top_k, step=step, layer=layer, training=True, state=state[layer])
            routed = policy.route(score_SLTE[step, layer].astype(np.float32), context)
            state[layer] = routed.state
            load_E = load_of(routed.expert_TK, experts)
            violation += float(load_E.max() / load_E.mean() - 1)  # arXiv:2408.15664, 4.1
        out_S[step] = violation / layers
    return out_S


def fit_rate(score_SLTE: NDArray[np.float16], method: dict[str, Any], real_S: Floats, top_k: int) -> float:
    """The surrogate's rate whose curve over the first FITTED_STEPS steps is nearest in mean |log|, of RATES."""
    head, goal = score_SLTE[:FITTED_STEPS], np.log(smooth(real_S[:FITTED_STEPS]))
    errors = []
    for rate in RATES:
        policy = policy_of(method, float(rate))
        assert policy is not None
        errors.append(np.abs(np.log(smooth(simulate(head, policy, top_k))) - goal).mean())
    return float(RATES[int(np.argmin(errors))])


def generate(real: dict[str, Any], quality_spread: float, step_S: NDArray[np.int64]) -> NDArray[np.float16]:
    """Scores [S, L, T, E] of the given steps; run, batches and sequences are as long as the real ones."""
    sizes, course = real["sizes"], real["course"]
    spec = TrainingScoresSpec(quality_spread=quality_spread, sequence_tokens=course["length"])
    source = TrainingScores(spec, sizes["layers"], sizes["experts"], sizes["top_k"], course["seed"])
    tokens = course["sequences"] * course["length"]
    out = np.empty((len(step_S), sizes["layers"], tokens, sizes["experts"]), np.float16)
    for at, step in enumerate(step_S.tolist()):
        for layer in range(sizes["layers"]):
            rows = np.arange(step * tokens, (step + 1) * tokens)
            out[at, layer] = source.scores(rows, layer, step / max(1, course["steps"] - 1))
    return out


def fit_spread(real: dict[str, Any], unbalanced_S: Floats) -> float:
    """The quality_spread whose plain top-k is nearest to the real unbalanced run in mean |log|, of SPREADS."""
    step_S = np.arange(0, len(unbalanced_S), SPREAD_EVERY)
    goal = np.log(unbalanced_S[step_S])
    top_k = real["sizes"]["top_k"]
    errors = [np.abs(np.log(simulate(generate(real, q, step_S), topk.Policy(), top_k)) - goal).mean() for q in SPREADS]
    return SPREADS[int(np.argmin(errors))]


def smooth(curve_S: Floats, over: int = 10) -> Floats:
    """Means of the last `over` steps (fewer at the beginning); never 0, so that it has a logarithm."""
    total = np.concatenate([[0.0], np.cumsum(curve_S)])
    high = np.arange(1, len(curve_S) + 1)
    low = np.maximum(0, high - over)
    return np.maximum((total[high] - total[low]) / (high - low), 1e-3)


def balanced_from(curve_S: Floats) -> int | None:
    """The first step from which `smooth` stays at or below BALANCED; None if it does not."""
    above = np.flatnonzero(smooth(curve_S) > BALANCED)
    start = 0 if not len(above) else int(above[-1]) + 1
    return start if start < len(curve_S) else None


def rows(real: dict[str, Any], curves: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Markdown lines; each cell: real / on recorded scores / on generated scores."""
    yield (
        "| method | MaxVio, first step | most (mean of 10 steps) | last 50 steps | balanced from step | train loss |"
        " held-out loss, own rule / token by token |"
    )
    yield "|---|---|---|---|---|---|---|"
    figures = (lambda c: c[0], lambda c: smooth(c).max(), lambda c: c[-LAST_STEPS:].mean())
    for name, row in real["methods"].items():
        each = [np.array(row["maxvio_S"]), *(np.array(c[name]) for c in curves.values() if name in c)]
        cells = [" / ".join(f"{figure(c):.2f}" for c in each) for figure in figures]
        cells.append(" / ".join("never" if start is None else str(start) for start in map(balanced_from, each)))
        yield (
            f"| {name} | {' | '.join(cells)} | {row['train_loss_last']:.3f}"
            f" | {row['held_out_loss']:.3f} / {row['held_out_loss_token_local']:.3f} |"
        )


def plot(real: dict[str, Any], curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel for the real curves and one for each kind of scores, one line a method, means over 10 steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 1 + len(curves), figsize=(16, 5.5), sharey=True, layout="constrained")
    measured = {name: row["maxvio_S"] for name, row in real["methods"].items()}
    titles = ("real: 16 experts, top-2, 2,304 tokens a step", *(f"simulated on {kind} scores" for kind in curves))
    for axes, title, lines in zip(panels, titles, (measured, *curves.values()), strict=True):
        for place, name in enumerate(measured):
            style = "--" if name in ("loss_free_slow", "bip_cold", "sinkhorn_sharp") else "-"
            if name in lines:
                axes.plot(smooth(np.array(lines[name])), style, color=f"C{place % 10}", label=name)
        axes.set_title(title)
        axes.set_yscale("log")
        axes.set_ylim(0.02, 10)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("MaxVio of a batch, mean over 4 layers and 10 steps")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=100)


def simulate_all(real: dict[str, Any], score_SLTE: NDArray[np.float16], rate: float) -> dict[str, list[float]]:
    """The curve of every method that goes by scores."""
    out = {}
    for name, row in real["methods"].items():
        policy = policy_of(row["method"], rate)
        if policy is not None:
            curve_S = simulate(score_SLTE, policy, real["sizes"]["top_k"])
            out[name] = [round(float(x), 3) for x in curve_S]
    return out


def main() -> None:
    """Command line."""
    results = ROOT / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=results / "validation" / "routing_maxvio.json")
    parser.add_argument("--scores", type=Path, default=results / "routing-lm" / "none" / "scores.npy")
    parser.add_argument("--out", type=Path, default=results / "validation" / "routing_maxvio_simulated.json")
    parser.add_argument("--plot", type=Path, default=results / "validation" / "routing_maxvio_beside.png")
    options = parser.parse_args()
    real = json.loads(options.real.read_text("utf-8"))
    measured = {name: np.array(row["maxvio_S"]) for name, row in real["methods"].items()}
    recorded = np.load(options.scores, mmap_mode="r", allow_pickle=False)
    loss = real["methods"]["auxiliary_loss"]["method"]
    rate = fit_rate(recorded, loss, measured["auxiliary_loss"], real["sizes"]["top_k"])
    spread = fit_spread(real, measured["none"])
    generated = generate(real, spread, np.arange(real["course"]["steps"]))
    curves = {
        "recorded": simulate_all(real, recorded, rate),
        "generated": simulate_all(real, generated, rate),
    }
    fitted = {"auxiliary_loss.rate": round(rate, 4), "training_scores.quality_spread": spread}
    options.out.write_text(json.dumps({"fitted": fitted, "maxvio_S": curves}, separators=(",", ":")) + "\n", "utf-8")
    plot(real, curves, options.plot)
    print(f"fitted: {fitted}")
    for line in rows(real, curves):
        print(line)


if __name__ == "__main__":
    main()
