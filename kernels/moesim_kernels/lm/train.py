"""Training under one method: same initial weights, same batches, loads and losses of every step kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moesim_kernels.lm.methods import METHODS, Router
from moesim_kernels.lm.model import LanguageModel, Sizes
from moesim_kernels.lm.text import Text, batch, windows

__all__ = ["Course", "Evaluation", "Run", "evaluate", "max_violations", "train"]


@dataclass(frozen=True, slots=True)
class Course:
    """How to train: `steps` of `sequences` windows of `length` bytes; AdamW, warm-up, cosine down to a tenth."""

    steps: int = 300
    sequences: int = 12
    length: int = 192
    peak_rate: float = 3e-3
    warm_up_steps: int = 20
    seed: int = 1
    held_out_sequences: int = 120

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warm_up_steps:
            return self.peak_rate * (step + 1) / self.warm_up_steps
        done = (step - self.warm_up_steps) / max(1, self.steps - self.warm_up_steps)
        return self.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """On held-out text: nats per byte, and tokens of each expert over all of it."""

    loss: float
    count_LE: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """What a training left: the model, its router's state, and the record of every step."""

    model: LanguageModel
    router: Router
    loss_S: NDArray[np.float64]
    count_SLE: NDArray[np.int32]
    held_out: Evaluation
    """by the method's own rule, in batches of the training's size (bip, sinkhorn and expert choice look at all of it,
    later bytes too)"""
    held_out_token_local: Evaluation
    """by a rule that a causal decoder can run"""
    seconds: float


def max_violations(count_LE: NDArray[np.integer]) -> NDArray[np.float64]:
    """MaxVio over the last axis: max over mean, less 1 (arXiv 2408.15664, 4.1)."""
    mean = count_LE.mean(-1)
    violation_L: NDArray[np.float64] = count_LE.max(-1) / np.maximum(mean, 1e-300) - 1.0
    return violation_L


def train(
    text: Text,
    method: str,
    sizes: Sizes,
    course: Course,
    watch: Callable[[int, torch.Tensor, Router], None] | None = None,
) -> Run:
    """Train one model under the method of that name. `watch(step, loss, router)` sees every step before the next.

    The same arguments give the same run on the same machine with the same number of threads.
    """
    model = LanguageModel(sizes, course.seed)
    router = Router(METHODS[method], sizes)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    loss_S = np.empty(course.steps)
    count_SLE = np.empty((course.steps, sizes.layers, sizes.experts), np.int32)
    began = time.perf_counter()
    for step in range(course.steps):
        window_BS = torch.from_numpy(batch(text.train, course.sequences, course.length, course.seed, step))
        for group in optimiser.param_groups:
            group["lr"] = course.rate(step)
        router.token_T = window_BS[:, :-1].flatten()
        loss = model.loss(window_BS, router)
        extra = router.extra_loss()
        optimiser.zero_grad(set_to_none=True)
        (loss if extra is None else loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        loss_S[step], count_SLE[step] = loss.item(), router.counts().numpy()
        router.step()
        if watch is not None:
            watch(step, loss, router)
    seconds = time.perf_counter() - began
    own, local = (evaluate(text, model, router.frozen(token_local), course) for token_local in (False, True))
    return Run(model, router, loss_S, count_SLE, own, local, seconds)


def evaluate(text: Text, model: LanguageModel, router: Router, course: Course) -> Evaluation:
    """Loss and loads on windows spread over the held-out files, in batches of the training's size."""
    window_NS = torch.from_numpy(windows(text.held_out, course.held_out_sequences, course.length))
    count_LE = np.zeros((model.sizes.layers, model.sizes.experts), np.int64)
    total = 0.0
    with torch.no_grad():
        for window_BS in window_NS.split(course.sequences):
            router.token_T = window_BS[:, :-1].flatten()
            total += model.loss(window_BS, router).item() * len(window_BS)
            count_LE += router.counts().numpy()
    return Evaluation(total / len(window_NS), count_LE)
