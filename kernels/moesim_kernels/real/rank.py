"""One rank for real: its weights, its KV cache and the kernels that the calibration measures.

    begin -> for each layer: own -> experts of its slots -> add -> ... -> end

A lone rank runs all of it (`run`). Ranks of a group run the pieces with an exchange between them (`real.group`). One
device may play one rank of a larger group (`alone`): its own tokens' part and attention, and the rows that all ranks'
tokens send to its slots; what would travel is random numbers of the right shape, and nothing is exchanged.

On a CPU the sections of a step are timed as they pass, in CPU time of the thread where there is one. On CUDA a step is
one captured graph (`real.graphs`). Suffixes: T own tokens, H hidden, K choices a token, R rows = (token, slot) pairs, S
sampled tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput
from moesim.model import dtype_bytes
from moesim.rng import generator
from moesim.simulate import Prepared
from moesim_kernels.bench.cases import expert_how
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device
from moesim_kernels.ops import block
from moesim_kernels.ops.attention import decode_gqa, prefill_gqa, window_mask
from moesim_kernels.ops.dense import gemm, norm_residual
from moesim_kernels.ops.moe import combine, grouped_swiglu, moe_local, shared_expert
from moesim_kernels.real.cache import KvCache, layer_bytes
from moesim_kernels.real.loaded import (
    Arriving,
    Group,
    Loaded,
    Sections,
    StepTimes,
    groups_of,
    lay_out,
    no_room,
    own_tokens,
)
from moesim_kernels.real.room import Room, find_device, step_bytes
from moesim_kernels.real.weights import RankWeights, Values, gates_of, heads_of
from moesim_kernels.real.work import StepWork

__all__ = ["Loaded", "RealRank", "StepTimes"]

_CALL_BYTES = 160 << 10
"""keys and values that a CPU attends to in the time that one more call takes: 40 us at 4 GB/s, measured"""


class RealRank:
    """One rank of a scenario's deployment. weights, cache: see there. remark: what a reader of its times should know.

    Within a step: residual_TH, hidden_TH (not added yet), normed_TH (what experts are given), gate_TK (float32, of the
    model's own router, best first), logits_SV.
    """

    weights: RankWeights
    cache: KvCache
    residual_TH: Any
    hidden_TH: Any
    normed_TH: Any
    shared_TH: Any
    gate_TK: Any
    gate_R: Any
    order: block.Order
    logits_SV: Any
    chosen_S: Any

    def __init__(
        self,
        prepared: Prepared,
        rank: int = 0,
        *,
        device: str = "cpu",
        backend: str = "torch",
        threads: int = 1,
        seed: int = 0,
        alone: bool = False,
        cache_tokens: int | None = None,
        share: RealRank | None = None,
        any_values: bool = False,
        graphs: bool = True,
    ) -> None:
        """alone: this device plays `rank` of a larger group by itself. cache_tokens: room of the KV cache, by default
        every sequence of `engine.max_num_seqs` at full length; with a number call `arrange` before `load`. share:
        another rank on this device, whose weights are taken where they are the same; any_values: or of its shapes.
        graphs: on CUDA steps are captured when they are loaded; else they run eagerly, timed as a whole, which suits a
        served run, whose steps are all new.

        Raises BadInput for what is not executed or a device that is not there, Infeasible for what does not fit.
        """
        import torch

        experts = prepared.result.experts
        assert experts is not None
        scenario = prepared.result.scenario
        self.prepared, self.rank, self.seed, self.model = prepared, rank, seed, scenario.model
        self.ranks, self.threads = prepared.layout.dp, threads
        self.placement = experts.placement
        self.slots = self.placement.slots_per_rank
        self.first = rank * self.slots
        self.alone, self.lone = alone and self.ranks > 1, self.ranks == 1
        self.graphs = graphs
        if not 0 <= rank < self.ranks:
            raise BadInput(f"rank {rank} of a group of {self.ranks}: ranks are 0 to {self.ranks - 1}")
        self.device = find_device(device)
        self.on_cuda = self.device.type == "cuda"
        together = 1 if self.lone or self.alone or self.on_cuda else self.ranks
        self._room = Room(self.device, threads, together)
        if not self.on_cuda:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # some images turn TF32 on
        self.heads, self.gates = heads_of(self.model), gates_of(self.model)
        self.sections = Sections(thread=threads == 1 and not self.on_cuda)
        self._moe_of = {layer: i for i, layer in enumerate(self.model.moe_layers)}
        with no_room(f"weights and cache of {self.model.name}"):
            self._weigh(cache_tokens, share, any_values)
        self._choose_kernels(backend)
        self._next: dict[int, tuple[int, int]] = {}
        self._token_cache: dict[int, list[int]] = {}
        self._foreign: tuple[Any, Any, Any] = (None, None, None)
        self._masks: dict[tuple[int, int, int], Any] = {}
        self.busy: Any = None
        self.graph_pool: Any = None

    # -- what is held -------------------------------------------------------------------------------------------
    def _weigh(self, cache_tokens: int | None, share: RealRank | None, any_values: bool) -> None:
        """Weights and cache, within the memory that is free."""
        m, engine = self.model, self.prepared.result.scenario.engine
        context = engine.max_model_len or m.max_position_embeddings
        tokens = engine.max_num_seqs * context if cache_tokens is None else cache_tokens
        item = int(dtype_bytes(m.activation_dtype))
        self._token_bytes = layer_bytes(self.heads, item, 1)
        cache_bytes = m.num_layers * layer_bytes(self.heads, item, tokens)
        slot_LS = self.placement.slot_to_expert_LS[:, self.first : self.first + self.slots]
        values = Values(self.seed, self.device)
        shared_cache = share is not None and share.weights.model == m and share.cache.tokens >= tokens
        if not shared_cache:
            self._room.require(cache_bytes, f"a KV cache of {tokens:,} tokens")
        borrowed = ""
        if share is not None and share.holds(m, slot_LS, self.seed, self.device):
            self.weights = share.weights
        elif share is not None and any_values and share.weights.model == m and share.slots >= self.slots:
            self.weights = share.weights.first_slots(self.slots)
            borrowed = "experts of other slots stand in for those of another placement"
        else:
            most = engine.max_num_batched_tokens
            room = self._room.free_bytes() - cache_bytes - self._step_bytes(most, most * m.top_k)
            self.weights = RankWeights(m, slot_LS, self.seed, self.device, room)
        if share is not None and shared_cache:
            self.cache = share.cache
        else:
            self.cache = KvCache(m.num_layers, self.heads, tokens, values, self.weights.dtype)
        if cache_tokens is None:
            self.cache.arrange(engine.max_num_seqs, context)
        self._phase_CP = block.phases(context, self.heads.dim, device=self.device)
        self._values = values
        missing = "dispatch and combine are not executed: one device plays one rank of a group" if self.alone else ""
        self.remark = "; ".join(x for x in (self.weights.remark, borrowed, missing) if x)

    def holds(self, model: Any, slot_to_expert_LS: Any, seed: int, device: Any) -> bool:
        """Whether this rank's weights are those of another."""
        w = self.weights
        same = w.seed == seed and self.device == device and w.model == model
        return bool(same and np.array_equal(w.slot_to_expert_LS, slot_to_expert_LS))

    def _step_bytes(self, tokens: int, rows: int) -> int:
        """Of a step with so many tokens and rows; twice where graphs keep theirs."""
        sampled = min(tokens, self.prepared.result.scenario.engine.max_num_seqs)
        return step_bytes(self.model, self.heads, tokens, rows, sampled) * (2 if self.on_cuda else 1)

    def _choose_kernels(self, backend: str) -> None:
        """As the calibration runs the experts; rows that an exchange brought go through plain or grouped products."""
        if backend not in ("torch", "triton"):
            raise BadInput(f"no back end {backend!r} runs experts; use torch or triton")
        if backend == "triton" and not self.on_cuda:
            raise BadInput("the fused Triton kernel needs a CUDA device; use backend torch")
        device = Device("cuda" if self.on_cuda else "cpu", self.device.index or 0, self.threads)
        how: list[Any] = [
            expert_how(Case("peak_gemm", {}, {"n": 1}, dtype=self.model.activation_dtype, backend=name), device)
            for name in (backend, "torch")  # the rule reads format and back end of a case, not what it is
        ]
        self.how, self.how_rows = how

    def _random(self, kept: Any, rows: int, dtype: Any, *width: int) -> Any:
        """At least `rows` rows of numbers, `kept` where it is large enough."""
        import torch

        if kept is not None and kept.shape[0] >= rows:
            return kept
        out = torch.empty((rows, *width), dtype=dtype, device=self.device)
        block_, flat = self._values.block(dtype), out.view(-1)
        for at in range(0, flat.numel(), block_.numel()):
            flat[at : at + block_.numel()].copy_(block_[: min(block_.numel(), flat.numel() - at)])
        return out

    def arrange(self, sequences: int, context: int) -> None:
        """Cut the cache into rows anew, which forgets every request; steps that were loaded keep theirs, whose contents
        are then whoever's. Raises BadInput where the cache is too small."""
        self.cache.arrange(sequences, context)
        self._next.clear()

    # -- before the clock ---------------------------------------------------------------------------------------
    def load(self, work: StepWork) -> Loaded:
        """The step on the device: index tensors, rows of the cache, and on CUDA a captured graph.

        What a request has in the cache and was not computed here is drawn. Raises BadInput for work of another
        deployment or a cache that is full, Infeasible where the step does not fit into memory.
        """

        if work.num_slots != self.placement.num_slots or work.ranks != self.ranks:
            raise BadInput(
                f"work over {work.num_slots} slots and {work.ranks} ranks is not this deployment's, which has "
                f"{self.placement.num_slots} slots on {self.ranks}; resolve it with the same scenario"
            )
        own, row_T = own_tokens(work, self.rank, self.cache, not self.on_cuda)
        position_T, request_T = work.position_N[own], work.request_N[own]
        slot_L = lay_out(work, own, self.first, self.slots, self.model.top_k, self.alone)
        self._require_step(len(own), slot_L)
        token_T = self._tokens(request_T, position_T)
        groups = groups_of(work, own, row_T, 0.0 if self.on_cuda else _CALL_BYTES / self._token_bytes)
        request, position = request_T.tolist(), position_T.tolist()
        for group in groups:
            for i in range(group.first, group.first + (1 if group.chunk else group.tokens)):
                self.cache.extend(request[i], position[i], group.context if group.chunk else position[i] + 1)
        sampled = np.flatnonzero(work.sampled_N[own])
        to = self._to_device
        last = self.first + self.slots
        loaded = Loaded(
            work=work,
            own_N=own,
            token_T=to(np.array(token_T, np.int64)),
            place=block.Place(to(np.array(row_T, np.int64)), to(position_T), self._phase_CP[to(position_T)]),
            groups=groups,
            layers=list(self.cache.layers),
            sampled_S=to(sampled),
            request_S=tuple(request_T[sampled].tolist()),
            position_S=tuple(position_T[sampled].tolist()),
            arriving=tuple(Arriving(to(s), int(((s >= self.first) & (s < last)).sum())) for s in slot_L),
        )
        if self.alone:
            loaded.foreign = self._stand_ins(len(own), max(a.slot_AK.shape[0] for a in loaded.arriving))
        if self.on_cuda and self.graphs and (self.lone or self.alone):
            from moesim_kernels.real.graphs import CudaStep

            with no_room(f"a step of {loaded.tokens} tokens"):
                loaded.graphs = CudaStep(self, loaded)
        return loaded

    def _stand_ins(self, tokens: int, arriving: int) -> tuple[Any, Any, Any]:
        """Random numbers for what the group would send: states that arrive, results that come back, gates of theirs."""
        import torch

        hidden, dtype, (states, returned, gates) = self.model.hidden_size, self.weights.dtype, self._foreign
        states, returned = self._random(states, arriving, dtype, hidden), self._random(returned, tokens, dtype, hidden)
        self._foreign = states, returned, self._random(gates, arriving * self.model.top_k, torch.float32)
        return self._foreign

    def _require_step(self, tokens: int, slot_L: list[AnyArray]) -> None:
        """Raise Infeasible where the step's own memory is not there."""
        rows = max(slot.size for slot in slot_L)
        self._room.require_step(self._step_bytes(tokens, rows), f"a step of {tokens} tokens and {rows} rows")

    def _to_device(self, x: Any) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(self.device)

    def _tokens(self, request_T: IntArray, position_T: IntArray) -> list[int]:
        """Ids: what was chosen here for the place, else drawn by (seed, request, position)."""
        out = []
        for request, position in zip(request_T.tolist(), position_T.tolist(), strict=True):
            following, chosen = self._next.get(request, (-1, 0))
            out.append(chosen if following == position else self._drawn(request, position))
        return out

    def _drawn(self, request: int, position: int) -> int:
        drawn = self._token_cache.get(request, [])
        if len(drawn) <= position:  # a longer draw begins with the shorter one
            generator_ = generator(self.seed, "real/tokens", request)
            drawn = generator_.integers(self.model.vocab_size, size=2 * position + 64).tolist()
            self._token_cache[request] = drawn
        return drawn[position]

    def forget(self, request: int) -> None:
        """A request has ended, its rows of the cache are free."""
        self.cache.forget(request)
        self._next.pop(request, None)
        self._token_cache.pop(request, None)

    # -- a step -------------------------------------------------------------------------------------------------
    def run(self, loaded: Loaded) -> StepTimes:
        """One step of a lone rank, or of one that plays alone. Raises BadInput for a rank that needs its group."""
        if not (self.lone or self.alone):
            raise BadInput(f"rank {self.rank} of {self.ranks} does not step by itself; run the group, or play it alone")
        if loaded.graphs is not None:
            times: StepTimes = loaded.graphs.run()
        elif self.on_cuda:
            times = self._eager(loaded)
        else:
            self.sections.begin()
            self.step(loaded)
            times = self.sections.end()
        self.remember(loaded)
        return times

    def _eager(self, loaded: Loaded) -> StepTimes:
        """A step on CUDA as the host launches it, by the wall from the first launch to the last result."""
        import torch

        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        self.step(loaded)
        torch.cuda.synchronize()
        return StepTimes(time.perf_counter_ns() - began, 0, {}, {})

    def step(self, loaded: Loaded) -> None:
        """All of a step, on whatever device."""
        self.begin(loaded)
        for layer in range(self.model.num_layers):
            self.own(layer)
            if self.is_moe(layer):
                self.local(layer)
        self.end()

    def remember(self, loaded: Loaded) -> None:
        """Read the greedy choices: the next tokens of their requests."""
        loaded.chosen_S = self.chosen_S.tolist() if loaded.graphs is None else loaded.graphs.chosen_S.tolist()
        for request, position, token in zip(loaded.request_S, loaded.position_S, loaded.chosen_S, strict=True):
            self._next[request] = (position + 1, token)

    def is_moe(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return layer in self._moe_of

    def begin(self, loaded: Loaded) -> None:
        """Embed own tokens."""
        self._at = loaded
        self.residual_TH = self.weights.embedding_VH.index_select(0, loaded.token_T)
        self.hidden_TH = None
        self.sections.lap("embedding")

    def own(self, layer: int) -> None:
        """The layer's own part with attention; leaves normed_TH and gate_TK. A dense layer is done then; one with
        experts waits for `add`."""
        qkv_TND = self.before(layer)
        self.sections.lap("own")
        attended_TM = self.attend(layer, qkv_TND)
        self.sections.lap("attention")
        self.after(layer, attended_TM)
        self.sections.lap("own")

    def before(self, layer: int) -> Any:
        """Up to the attention kernel: [T, N, D], its keys and values in the cache."""
        own, at = self.weights.layers[layer].own, self._at
        qkv_TND = block.project(own, self.heads, self.hidden_TH, self.residual_TH)
        block.rotate(qkv_TND, self.heads, at.place.phase_TP)
        block.write_kv(at.layers[layer], qkv_TND, self.heads, at.place)
        return qkv_TND

    def attend(self, layer: int, qkv_TND: Any) -> Any:
        """The attention kernel's calls, one a group: [T, Q D]."""
        import torch

        window, cache = self.model.window_of_layer[layer], self._at.layers[layer]
        parts = [self._attend_group(group, qkv_TND, cache, window) for group in self._at.groups]
        if not parts:
            return qkv_TND.new_zeros(0, self.heads.query * self.heads.dim)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_group(self, group: Group, qkv_TND: Any, cache: Any, window: int) -> Any:
        query = qkv_TND[group.first : group.first + group.tokens, : self.heads.query]
        wide = self.heads.query * self.heads.dim
        if not group.chunk:
            since = max(0, min(group.contexts or (group.context,)) - window) if window else 0
            seen = cache[:, group.row : group.row + group.tokens, :, since : group.context]
            mask = self._decode_mask(group, since, window) if group.contexts else None
            return decode_gqa(query.unsqueeze(2), seen[0], seen[1], mask).reshape(group.tokens, wide)
        since = max(0, group.context - group.tokens - window + 1) if window else 0  # the first token's earliest key
        seen = cache[:, group.row : group.row + 1, :, since : group.context]
        total = group.context - since
        mask = self._mask(group.tokens, total, window) if 0 < window < total else None
        out = prefill_gqa(query.transpose(0, 1).unsqueeze(0), seen[0], seen[1], mask)
        return out.transpose(1, 2).reshape(group.tokens, wide)

    def _mask(self, length: int, total: int, window: int) -> Any:
        """The mask of a chunk under a window, made once."""
        key = (length, total, window)
        if key not in self._masks:
            self._masks[key] = window_mask(length, total, window, self.device)
        return self._masks[key]

    def _decode_mask(self, group: Group, since: int, window: int) -> Any:
        """What sequences of several contexts see of keys since .. context - 1, as numbers to add: [B, 1, 1, S]."""
        key = (group.contexts, since, window)
        if key not in self._at.masks:
            import torch

            end_B1 = torch.tensor(group.contexts, device=self.device).unsqueeze(1)
            at_S = torch.arange(since, group.context, device=self.device)
            hidden_BS = (at_S >= end_B1) | ((at_S < end_B1 - window) if window else (at_S < 0))
            mask = torch.zeros(hidden_BS.shape, dtype=self.weights.dtype, device=self.device)
            self._at.masks[key] = mask.masked_fill_(hidden_BS, float("-inf"))[:, None, None]
        return self._at.masks[key]

    def after(self, layer: int, attended_TM: Any) -> None:
        """From the attention kernel to the experts: norm, gates, shared experts; the order of rows, where they are this
        rank's own business. All of a dense layer's feed-forward."""
        w = self.weights.layers[layer]
        self.normed_TH = block.attention_out(w.own, attended_TM, self.residual_TH)
        self.hidden_TH = self.shared_TH = None
        if not self.is_moe(layer):
            assert w.dense is not None
            self.hidden_TH = shared_expert(self.normed_TH, *w.dense)
            return
        _, self.gate_TK = block.choose(w.own, self.gates, self.normed_TH)
        if w.shared is not None:
            self.shared_TH = shared_expert(self.normed_TH, *w.shared)
            if w.shared_gate_1H is not None:
                self.shared_TH *= gemm(self.normed_TH, w.shared_gate_1H).sigmoid_()
        if self.lone or self.alone:
            arriving = self._at.arriving[self._moe_of[layer]]
            self.order = block.order(arriving.slot_AK, self.first, self.slots, arriving.rows)
            flat = self._at.foreign[2] if self.alone else self.gate_TK.flatten()
            self.gate_R = flat[self.order.choice_R]

    def local(self, layer: int) -> None:
        """The experts of a lone rank, or of one that plays alone, as `moe_local` runs them; then the sum."""
        out_TH = self.experts_of(layer, self.order, self.gate_R)
        self.sections.lap("experts")
        self.hidden_TH = self._at.foreign[1][: self._at.tokens] if self.alone else out_TH
        if self.shared_TH is not None:
            self.hidden_TH = self.hidden_TH + self.shared_TH
            self.sections.lap("own")

    def experts_of(self, layer: int, order: block.Order, gate_R: Any) -> Any:
        """Rows gathered, multiplied and summed by token: of own tokens, or of those that arrive."""
        w, arriving = self.weights.layers[layer], self._at.arriving[self._moe_of[layer]]
        states = self._at.foreign[0][: arriving.slot_AK.shape[0]] if self.alone else self.normed_TH
        if not arriving.rows:
            return states.new_zeros(states.shape)
        return moe_local(states, order.token_R, gate_R, order.end_E, w.w13_SMH, w.w2_SHI, self.how)

    def experts(self, layer: int, row_RH: Any, slot_R: Any) -> Any:
        """Rows that an exchange brought, each through the expert of its slot (numbers over all ranks, this rank's own):
        [R, H] in their order."""
        w = self.weights.layers[layer]
        rows = row_RH.shape[0]
        order = block.order(slot_R.unsqueeze(1), self.first, self.slots, rows)
        sorted_RH = row_RH.index_select(0, order.choice_R)
        done_RH = grouped_swiglu(sorted_RH, w.w13_SMH, w.w2_SHI, order.end_E, self.how_rows)
        out_RH = done_RH.new_empty(done_RH.shape).index_copy_(0, order.choice_R, done_RH)
        self.sections.lap("experts")
        return out_RH

    def add(self, layer: int, out_RH: Any, choice_R: Any) -> None:
        """What came back of own tokens' choices, in any order: choice_R int64 names each row's place in the flattened
        [T, K]. Weighted by its gate and summed, for the residual stream."""
        gate_R, tokens = self.gate_TK.flatten()[choice_R], self._at.tokens
        self.hidden_TH = combine(out_RH, gate_R, choice_R // self.model.top_k, tokens)
        if self.shared_TH is not None:
            self.hidden_TH += self.shared_TH
        self.sections.lap("combine")

    def end(self) -> Any:
        """Final norm, logits of the sampled tokens [S, V] and their greedy choice (chosen_S)."""
        self.finish()
        self.sections.lap("own")
        self.head()
        self.sections.lap("head")
        return self.logits_SV

    def finish(self) -> None:
        """The final norm, of all tokens."""
        self.normed_TH = norm_residual(self.hidden_TH, self.residual_TH, self.weights.norm_H)

    def head(self) -> None:
        """Logits and greedy choice of the sampled tokens."""
        self.logits_SV = gemm(self.normed_TH.index_select(0, self._at.sampled_S), self.weights.head_VH)
        self.chosen_S = self.logits_SV.argmax(1)
