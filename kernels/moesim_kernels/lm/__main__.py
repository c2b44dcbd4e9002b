"""`python -m moesim_kernels.lm`: train the small MoE model, compare balancing methods, record its routing.

train    one model under one method, into a folder
compare  one model under each method, same initial weights and batches; figures into one JSON file
record   routing of a trained model on held-out text, into an .npz trace
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim_kernels.lm.methods import METHODS, Router
from moesim_kernels.lm.model import Sizes
from moesim_kernels.lm.record import record, save_trace
from moesim_kernels.lm.store import load_model, save_run, settings
from moesim_kernels.lm.text import Text, load_text
from moesim_kernels.lm.train import Course, max_violations, train

__all__ = ["main"]

EXIT_BAD_INPUT = 2
_SAID_EVERY = 50
_USUAL = Course()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.lm", description="A small real MoE language model.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train", help="one model under one balancing method")
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--out", type=Path, required=True, help="folder for model.npz, steps.npz, summary.json")
    one.add_argument("--scores", action="store_true", help="keep every step's router scores too (scores.npy, float16)")
    each = verbs.add_parser("compare", help="one model under each method")
    each.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    each.add_argument("--keep", type=Path, default=Path("results/routing-lm"), help="folder for the runs")
    each.add_argument("--out", type=Path, default=Path("results/validation/routing_maxvio.json"))
    each.add_argument("--fresh", action="store_true", help="train again what --keep holds already")
    for verb in (one, each):
        verb.add_argument("--steps", type=int, default=_USUAL.steps)
        verb.add_argument("--seed", type=int, default=_USUAL.seed)
    trace = verbs.add_parser("record", help="per-token trace of a trained model")
    trace.add_argument("--model", type=Path, required=True, help="folder that train or compare wrote")
    trace.add_argument("--out", type=Path, required=True, help=".npz trace")
    trace.add_argument("--whole", type=int, default=11, help="held-out sequences read at once (default 11)")
    trace.add_argument("--prompts", type=int, default=11, help="held-out prompts continued by the model (default 11)")
    trace.add_argument("--length", type=int, default=_USUAL.length, help="tokens of a sequence")
    trace.add_argument("--prompt-length", type=int, default=_USUAL.length // 2, help="tokens of a prompt")
    trace.add_argument("--seed", type=int, default=1)
    return parser


def _train(text: Text, name: str, course: Course, folder: Path, scores: bool) -> None:
    sizes = Sizes()
    kept: Any = None
    if scores:
        shape = (course.steps, sizes.layers, course.sequences * course.length, sizes.experts)
        folder.mkdir(parents=True, exist_ok=True)
        kept = np.lib.format.open_memmap(folder / "scores.npy", "w+", np.float16, shape)

    def watch(step: int, loss: torch.Tensor, router: Router) -> None:
        if kept is not None:
            kept[step] = np.stack([router.score_L[i].detach().numpy() for i in range(sizes.layers)])
        if step % _SAID_EVERY == 0 or step == course.steps - 1:
            violation = max_violations(router.counts().numpy()).mean()
            print(f"{name}: step {step}, loss {loss.item():.3f} nats, MaxVio {violation:.2f}", file=sys.stderr)

    run = train(text, name, sizes, course, watch)
    save_run(folder, name, run, settings(text, sizes, course))


def _there(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds a run under the same settings."""
    try:
        found = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found.get("settings") == about)


def _compare(text: Text, options: argparse.Namespace) -> None:
    course = Course(steps=options.steps, seed=options.seed)
    about = settings(text, Sizes(), course)
    out: dict[str, Any] = {"python": sys.version.split()[0], "torch": str(torch.__version__), **about, "methods": {}}
    for name in options.methods:
        folder = options.keep / name
        if options.fresh or not _there(folder, about):
            _train(text, name, course, folder, scores=name == "none")
        out["methods"][name] = json.loads((folder / "summary.json").read_text("utf-8"))["summary"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, separators=(",", ":")) + "\n", "utf-8")
    columns = ("train_loss_last", "held_out_loss", "held_out_loss_token_local", "maxvio_batch_first",
               "maxvio_batch_mean", "maxvio_batch_last", "maxvio_global_held_out")  # fmt: skip
    print("method".ljust(16) + " ".join(c.replace("held_out", "ho").rjust(19) for c in columns))
    for name, row in out["methods"].items():
        print(name.ljust(16) + " ".join(f"{row[c]:19.3f}" for c in columns))


def _record(text: Text, options: argparse.Namespace) -> None:
    _, model, router, _ = load_model(options.model)
    trace = record(
        model, router, text.held_out, whole=options.whole, prompts=options.prompts, length=options.length,
        prompt_length=options.prompt_length, seed=options.seed,
    )  # fmt: skip
    save_trace(trace, router, options.out)
    print(f"{sum(map(len, trace.token_T))} tokens, {options.out.stat().st_size} bytes: {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb on one thread; 0, or 2 with one line on stderr where the input cannot be used."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        text = load_text()
        if options.verb == "train":
            course = Course(steps=options.steps, seed=options.seed)
            _train(text, options.method, course, options.out, options.scores)
        elif options.verb == "compare":
            _compare(text, options)
        else:
            _record(text, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
