"""What a training leaves on disk: model.npz (weights and the router's state), steps.npz (every step), summary.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim_kernels.lm.methods import METHODS, Router
from moesim_kernels.lm.model import LanguageModel, Sizes
from moesim_kernels.lm.text import Text, unigram_entropy
from moesim_kernels.lm.train import Course, Run, max_violations

__all__ = ["LAST_STEPS", "load_model", "save_run", "settings", "summary"]

LAST_STEPS = 50
"""Steps that the figures at the end of a training are means of."""


def settings(text: Text, sizes: Sizes, course: Course) -> dict[str, Any]:
    """All that a run depends on beside its method."""
    about = {
        "files": text.files, "train_bytes": len(text.train), "held_out_bytes": len(text.held_out),
        "digest": text.digest, "unigram_entropy_nats": round(unigram_entropy(text.held_out), 4),
    }  # fmt: skip
    return {"text": about, "sizes": asdict(sizes), "course": asdict(course)}


def summary(name: str, run: Run) -> dict[str, Any]:
    """Figures of one run: MaxVio as means over layers, losses in nats per byte; the same bytes for the same run."""
    violation_SL = max_violations(run.count_SLE)
    last = slice(max(0, len(run.loss_S) - LAST_STEPS), None)
    return {
        "method": asdict(METHODS[name]),
        "train_loss_last": round(float(run.loss_S[last].mean()), 4),
        "held_out_loss": round(run.held_out.loss, 4),
        "held_out_loss_token_local": round(run.held_out_token_local.loss, 4),
        "maxvio_batch_first": round(float(violation_SL[0].mean()), 4),
        "maxvio_batch_last": round(float(violation_SL[last].mean()), 4),
        "maxvio_batch_mean": round(float(violation_SL.mean()), 4),
        "maxvio_batch_most": round(float(violation_SL.mean(1).max()), 4),
        "maxvio_global_last": round(float(max_violations(run.count_SLE[last].sum(0)).mean()), 4),
        "maxvio_global_held_out": round(float(max_violations(run.held_out.count_LE).mean()), 4),
        "maxvio_global_held_out_token_local": round(float(max_violations(run.held_out_token_local.count_LE).mean()), 4),
        "maxvio_S": [round(float(x), 3) for x in violation_SL.mean(1)],
        "loss_S": [round(float(x), 3) for x in run.loss_S],
    }


def save_run(folder: Path, name: str, run: Run, about: dict[str, Any]) -> None:
    """Write one run into `folder`, which is made. `about`: of `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"weight/{k}": v.detach().numpy() for k, v in run.model.state_dict().items()}
    state = {f"state/{layer}": v.numpy() for layer, v in run.router.state_L.items()}
    np.savez(folder / "model.npz", **weights, **state)
    np.savez_compressed(
        folder / "steps.npz", loss_S=run.loss_S, count_SLE=run.count_SLE, maxvio_SL=max_violations(run.count_SLE)
    )
    whole = {"name": name, "settings": about, "seconds": round(run.seconds, 1), "summary": summary(name, run)}
    (folder / "summary.json").write_text(json.dumps(whole) + "\n", "utf-8")


def load_model(folder: Path) -> tuple[str, LanguageModel, Router, dict[str, Any]]:
    """(method's name, model, router for inference, settings) that `save_run` wrote. Raises FileNotFoundError."""
    whole = json.loads((folder / "summary.json").read_text("utf-8"))
    sizes = Sizes(**whole["settings"]["sizes"])
    model = LanguageModel(sizes, 0)
    with np.load(folder / "model.npz", allow_pickle=False) as stored:
        arrays = {k: torch.from_numpy(stored[k]) for k in stored.files}
    model.load_state_dict({k.removeprefix("weight/"): v for k, v in arrays.items() if k.startswith("weight/")})
    state = {int(k.removeprefix("state/")): v for k, v in arrays.items() if k.startswith("state/")}
    return whole["name"], model, Router(METHODS[whole["name"]], sizes, False, state_L=state), whole["settings"]
