"""Simulate every point of a space of `spaces/` and keep the figures that matter in `optima/`.

    python benchmarks/tuner/exhaust.py serve_layout      # goes on where it was stopped
    python benchmarks/tuner/exhaust.py all

A table is a .npz of plain arrays: the scenario's text and its hash, the state of every point in the order of
`Space.points`, figures as float32 columns, what infeasible points broke, and the CPU seconds that it took. What
candidates have in common (device profile, routing pool, bound of a placement) is computed once in a process, and the
bound of a cache, which is no figure, not at all; `check` simulates points through the tuner's own `evaluate` and
compares.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from moesim_tuner import evaluate as evaluation
from moesim_tuner.records import Row, Task
from moesim_tuner.space import Space

from moesim import simulate as simulation
from moesim.cost import deployed, offload_figures, routed
from moesim.dispatch.plan import Coupled
from moesim.observe import FIGURES
from moesim.scenario import load, source, yamlio
from moesim.simulate import RunResult
from moesim.training.result import TrainingResult
from moesim.tune_spec import TuneSpec

HERE = Path(__file__).resolve().parent
STATES = ("done", "infeasible", "illegal", "failed")
SEED = 1


class Enumerable:
    """One space of this folder: its scenario, its points, and what each of them came to once `table` is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = HERE / "spaces" / f"{name}.yaml"
        self.text = self.path.read_text(encoding="utf-8")
        data, _ = load.parse_yaml(self.text, self.path.name)
        self.raw: dict[str, Any] = dict(data)
        self.spec = TuneSpec.model_validate(data["tune"])
        self.space = Space(self.spec.space)
        self.points = list(self.space.points())
        self.columns = [*self.spec.objectives, *(n for n in self.spec.constraints if n not in self.spec.objectives)]

    @property
    def table_path(self) -> Path:
        return HERE / "optima" / f"{self.name}.npz"

    @property
    def digest(self) -> str:
        """Of the scenario's text, so that a table of another one is known."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()

    def task(self, index: int) -> Task:
        point = self.points[index]
        return Task(self.text, self.name, str(self.path.parent), self.space.overrides(point), SEED)

    def table(self) -> list[Row]:
        """The stored rows, one a point. Raises ValueError where the table is of another text or not whole."""
        with np.load(self.table_path, allow_pickle=False) as found:
            if str(found["digest"]) != self.digest:
                raise ValueError(f"{self.table_path.name} was made of another {self.path.name}; make it again")
            state_P, figure_PF, amount_P = found["state_P"], found["figure_PF"], found["amount_P"]
        if len(state_P) != len(self.points):
            raise ValueError(f"{self.table_path.name} has {len(state_P)} of {len(self.points)} points; go on with it")
        rows = []
        for state, figures, amount in zip(state_P, figure_PF, amount_P, strict=True):
            name = STATES[state]
            limits = {"infeasible": {"memory": float(amount)}, "illegal": {"legality": float(amount)}}.get(name, {})
            there = {k: float(v) for k, v in zip(self.columns, figures, strict=True) if not np.isnan(v)}
            rows.append(Row(name, there if name == "done" else {}, limits))  # type: ignore[arg-type]
        return rows


def spaces() -> list[str]:
    return sorted(path.stem for path in (HERE / "spaces").glob("*.yaml"))


def quick_figures(result: RunResult | TrainingResult) -> dict[str, float]:
    """What `figures_of` finds, without the parts of a run that a comparison needs."""
    summary = result.to_json()["summary"]
    out = {}
    for name, figure in FIGURES.items():
        found: Any = summary
        for key in figure.key:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            out[name] = float(found)
    if summary.get("goodput_req_per_s") is not None:
        out["goodput_req_per_s"] = float(summary["goodput_req_per_s"])
    return out


def share() -> None:
    """Let candidates of this process share what they have in common."""
    load._hashed_profile = functools.lru_cache(maxsize=8)(load._hashed_profile)
    load.find_named = functools.lru_cache(maxsize=64)(load.find_named)
    pools: dict[str, Any] = {}
    pool_source = routed.pool_source

    def pool(scenario: Any, seed: int) -> Any:
        key = repr((scenario.routing, scenario.model, scenario.policies.routing, scenario.capacity is None, seed))
        if key not in pools:
            if len(pools) > 16:
                pools.clear()
            pools[key] = pool_source(scenario, seed)
        return pools[key]

    routed.pool_source = pool
    bounds: dict[tuple[bytes, int, int], Any] = {}
    balance_bound = deployed.balance_bound

    def bound(weight_LE: Any, slots: int, ranks: int) -> Any:
        key = (hashlib.blake2b(weight_LE.tobytes()).digest(), slots, ranks)
        if key not in bounds:
            bounds[key] = balance_bound(weight_LE, slots, ranks)
        return bounds[key]

    deployed.balance_bound = bound
    parse_yaml = functools.lru_cache(maxsize=4096)(load.parse_yaml)
    for module in (load, source, yamlio):
        module.parse_yaml = lambda *args: copy.deepcopy(parse_yaml(*args))
    load.load_model = functools.lru_cache(maxsize=8)(load.load_model)
    banks: dict[str, Any] = {}
    moe_cost = simulation.moe_cost

    def cost(scenario: Any, layout: Any, experts: Any, seed: int, placement: Any = None, before: Any = None) -> Any:
        planned = isinstance(scenario.policies.dispatch, Coupled)
        if placement is not None or experts is None or experts.replay or experts.batches or planned:
            return moe_cost(scenario, layout, experts, seed, placement, before)
        s = scenario
        parts = (s.model.name, layout, s.policies.dispatch, s.communication, s.routing, s.engine.bank_entries)
        placed = experts.placement.slot_to_expert_LS
        key = repr((*parts, s.engine.cuda_graph, s.policies.routing, placed.shape, seed)).encode() + placed.tobytes()
        if key not in banks:
            if len(banks) > 200:
                banks.clear()
            banks[key] = moe_cost(scenario, layout, experts, seed)
        return banks[key]

    simulation.moe_cost = cost
    offload_figures._bound = lambda *args: None
    evaluation.figures_of = quick_figures


def exhaust(name: str, save_every_s: float = 60.0) -> None:
    """Simulate what is not there yet; save as it goes."""
    space = Enumerable(name)
    number, width = len(space.points), len(space.columns)
    state_P = np.full(number, -1, np.int8)
    figure_PF = np.full((number, width), np.nan, np.float32)
    amount_P = np.zeros(number, np.float32)
    spent = 0.0
    if space.table_path.exists():
        with np.load(space.table_path, allow_pickle=False) as found:
            if str(found["digest"]) == space.digest:
                n = len(found["state_P"])
                state_P[:n], figure_PF[:n], amount_P[:n] = found["state_P"], found["figure_PF"], found["amount_P"]
                spent = float(found["cpu_s"])
    began, saved = time.process_time(), time.monotonic()
    hits: dict[str, Row] = {}
    for index in np.flatnonzero(state_P < 0):
        row = evaluation.evaluate(space.task(int(index)))
        state_P[index] = STATES.index(row.state)
        figure_PF[index] = [row.figures.get(c, np.nan) for c in space.columns]
        amount_P[index] = sum(row.limits.values())
        if row.state != "done":
            hits.setdefault(" | ".join(row.reasons)[:150], row)
        if time.monotonic() - saved > save_every_s:
            saved = time.monotonic()
            done = int((state_P >= 0).cumprod().sum())
            _save(space, state_P[:done], figure_PF[:done], amount_P[:done], spent + time.process_time() - began)
            print(f"{name}: {done:,} of {number:,}, {spent + time.process_time() - began:.0f} CPU s", flush=True)
    _save(space, state_P, figure_PF, amount_P, spent + time.process_time() - began)
    for reason in list(hits)[:8]:
        print("  not run:", reason)
    counts = {s: int((state_P == i).sum()) for i, s in enumerate(STATES)}
    print(f"{name}: {number:,} points, {json.dumps(counts)}, {spent + time.process_time() - began:.0f} CPU s")


def _save(space: Enumerable, state_P: Any, figure_PF: Any, amount_P: Any, cpu_s: float) -> None:
    space.table_path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, digest=np.array(space.digest), state_P=state_P, figure_PF=figure_PF, amount_P=amount_P,
        cpu_s=np.array(cpu_s),
    )  # fmt: skip
    part = space.table_path.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    part.replace(space.table_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("space", nargs="+", help="name of a space, or all")
    asked = parser.parse_args().space
    share()
    for name in spaces() if asked == ["all"] else asked:
        exhaust(name)


if __name__ == "__main__":
    main()
