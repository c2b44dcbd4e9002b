"""One rank of a group of processes: a `RealRank` between whose pieces tokens travel, and what it tells the parent.

    begin -> for each layer: own -> dispatch -> experts -> combine -> add -> ... -> end

Every process resolves the same settings by itself, which is deterministic, so that the parent sends descriptions alone.
A rank without tokens computes one dummy token that reaches no expert, as engines do and the simulator prices, and takes
part in every exchange. Run as a module this is a worker of `moesim_kernels.real.group.RealGroup`, which see.

Suffixes: T own tokens, L MoE layers, K choices a token, G ranks, S slots of a rank, R rows = (token, slot) pairs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.errors import MoesimError
from moesim.scenario.load import scenario_from_dict
from moesim_kernels.bench.undisturbed import no_collection
from moesim_kernels.ops import block
from moesim_kernels.ops.exchange import TokenExchange
from moesim_kernels.ops.worker import serve
from moesim_kernels.real.loaded import Sections
from moesim_kernels.real.rank import Loaded, RealRank
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve

__all__ = ["GroupRank", "Trace", "with_dummy"]

_DUMMY = 1 << 40  # its request, which no scenario has


class Trace(Sections):
    """Every lap of a step by itself: (part, CPU ns of the thread, ns of the machine's monotonic clock)."""

    laps: list[tuple[str, int, int]]

    def begin(self) -> None:
        """The clock runs."""
        super().begin()
        self.laps = [("", time.thread_time_ns(), time.perf_counter_ns())]

    def lap(self, part: str) -> None:
        """What went by belongs to `part`."""
        self.laps.append((part, time.thread_time_ns(), time.perf_counter_ns()))


def with_dummy(work: StepWork, rank: int) -> StepWork:
    """The work with one more token on a rank that has none: it decodes at position 0, reaches no slot and is not
    sampled. Other ranks' work as it is."""
    if (work.rank_N == rank).any():
        return work
    layers, choices = work.slot_NLK.shape[1:]
    return replace(
        work,
        request_N=np.concatenate([[_DUMMY + rank], work.request_N]),
        position_N=np.concatenate([[0], work.position_N]),
        rank_N=np.concatenate([[rank], work.rank_N]),
        sampled_N=np.concatenate([[False], work.sampled_N]),
        slot_NLK=np.concatenate([np.full((1, layers, choices), work.num_slots, np.int64), work.slot_NLK]),
        decode=work.decode + 1,
    )


@dataclass
class _Step:
    """A setting that is ready to run. places: of its sampled tokens among the step's."""

    rank: RealRank
    loaded: Loaded
    rows_L: tuple[int, ...]
    places: list[int]
    requests: tuple[int, ...]


class GroupRank:
    """A worker's state: the scenario it was opened with, a rank for each set of overrides, steps by their number."""

    ready: dict[str, Any]

    def __init__(self, device: torch.device) -> None:
        self.device, self.index, self.ranks = device, dist.get_rank(), dist.get_world_size()
        self.ready = {}
        self._native = self._has_uneven()
        self._exchange = TokenExchange(self._native)
        self._ranks: dict[tuple[str, ...], RealRank] = {}
        self._steps: dict[int, _Step] = {}
        self._last: _Step | None = None

    def _has_uneven(self) -> bool:
        """Whether the back end brings all-to-alls with uneven splits: one that it lacks is refused before sending."""
        try:
            out = torch.zeros(self.ranks, device=self.device)
            dist.all_to_all_single(out, out.clone(), [1] * self.ranks, [1] * self.ranks)
        except (RuntimeError, NotImplementedError) as error:
            if "support" not in str(error).lower() and "implement" not in str(error).lower():
                raise
            return False
        return True

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request of the parent."""
        found: dict[str, Any] = getattr(self, f"_{request['do']}")(request)
        return found

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        self._scenario, self._base, self._seed = request["scenario"], Path(request["base"]), request["seed"]
        self._apart = bool(request["apart"])
        try:
            return {"remark": self._rank_of(tuple(request["opening"])).remark}
        except MoesimError as error:
            return {"refused": str(error)}

    def _rank_of(self, overrides: tuple[str, ...]) -> RealRank:
        """The rank under these overrides; weights are shared where they are the same."""
        found = self._ranks.get(overrides)
        if found is None:
            prepared = prepare_real(scenario_from_dict(self._scenario, self._base, overrides))
            known = list(self._ranks.values())
            assert prepared.result.experts is not None
            slot_LS = prepared.result.experts.placement.slot_to_expert_LS
            same = [r for r in known if np.array_equal(r.placement.slot_to_expert_LS, slot_LS)]
            share = next(iter(same), max(known, key=lambda r: r.slots, default=None))
            engine, most = prepared.result.scenario.engine, prepared.result.scenario.model.max_position_embeddings
            shape = engine.max_num_seqs + 1, engine.max_model_len or most  # one more sequence: the dummy's
            found = RealRank(
                prepared, self.index, device=self.device.type, seed=self._seed, share=share,
                cache_tokens=shape[0] * shape[1], any_values=self._apart,
            )  # fmt: skip
            if not self._apart and (found.cache.sequences, found.cache.context) != shape:
                found.cache.arrange(*shape)
            found.sections = Trace(thread=True)
            self._ranks[overrides] = found
        return found

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a user can mend is told, and no reason to end."""
        try:
            return self._loaded(request["step"], Setting.from_json(request["setting"]))
        except MoesimError as error:
            return {"refused": str(error)}

    def _loaded(self, number: int, setting: Setting) -> dict[str, Any]:
        rank = self._rank_of(setting.overrides)
        whole = resolve(rank.prepared, setting)
        work = with_dummy(whole, self.index)
        if self._apart:
            mine = work.rank_N == self.index
            rank.arrange(len(np.unique(work.request_N[mine])), int(work.position_N[mine].max()) + 1)
        loaded = rank.load(work)
        shift = work.tokens - whole.tokens
        own = loaded.own_N - shift
        rows = [int((a.slot_AK < work.num_slots).sum()) for a in loaded.arriving]
        sampled = own[loaded.sampled_S.cpu().numpy()].tolist()
        requests = tuple(sorted(set(work.request_N[loaded.own_N].tolist())))
        self._steps[number] = _Step(rank, loaded, tuple(rows), sampled, requests)
        return {"remark": rank.remark}

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        """One step after a barrier: its trace, and how many rows it sent to each rank in each layer."""
        step = self._steps[request["step"]]
        self._last = step
        sections = step.rank.sections
        assert isinstance(sections, Trace)
        dist.barrier()
        with no_collection():
            sections.begin()
            sent_LG = self._step(step)
        step.rank.remember(step.loaded)
        return {"laps": sections.laps, "sent": sent_LG, "chosen": [step.loaded.request_S, step.loaded.chosen_S]}

    def _step(self, step: _Step) -> list[list[int]]:
        rank, exchange, sent_LG = step.rank, self._exchange, list[list[int]]()
        slots, lap = rank.slots, rank.sections.lap
        rank.begin(step.loaded)
        for layer in range(rank.model.num_layers):
            rank.own(layer)
            if not rank.is_moe(layer):
                continue
            at = len(sent_LG)
            order = block.order(step.loaded.arriving[at].slot_AK, 0, slots * self.ranks, step.rows_L[at])
            lap("own")
            count_GS = order.end_E.diff(prepend=order.end_E.new_zeros(1)).long().view(self.ranks, slots)
            row_RH, slot_R = exchange.dispatch(rank.normed_TH, order.token_R, count_GS)
            lap("dispatch")
            sent_LG.append(exchange.sent_G)
            out_RH = rank.experts(layer, row_RH, slot_R + rank.first)
            back_RH = exchange.combine(out_RH)
            lap("back")
            rank.add(layer, back_RH, order.choice_R)
        rank.end()
        return sent_LG

    def _logits(self, _: dict[str, Any]) -> dict[str, Any]:
        """Of the step that ran last."""
        assert self._last is not None
        return {"places": self._last.places, "logits": self._last.rank.logits_SV.float().tolist()}

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Forget a step and the keys and values of its requests."""
        step = self._steps.pop(request["step"], None)
        if step is not None:
            for one in step.requests:
                step.rank.forget(one)
        return {}

    def _forget(self, request: dict[str, Any]) -> dict[str, Any]:
        for rank in self._ranks.values():
            rank.forget(request["request"])
        return {}


if __name__ == "__main__":
    serve(sys.argv[1:], GroupRank)
