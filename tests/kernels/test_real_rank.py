"""One rank for real: its logits against float64, token by token and choice by choice, and what must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moesim_kernels.ops import block
from moesim_kernels.ops.bounds import (
    FP32,
    UNIT,
    Ball,
    attention_weights,
    exact,
    factor,
    rms_norm_ball,
    score_ball,
    swiglu_ball,
)
from moesim_kernels.ops.checks import compare
from moesim_kernels.ops.checks_block import rotated_ball
from moesim_kernels.real.loaded import _calls
from moesim_kernels.real.rank import RealRank
from moesim_kernels.real.weights import RankWeights
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve

from moesim.errors import BadInput, Infeasible
from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared

MODEL = """
name: tiny
source: this test
num_layers: 2
hidden_size: 32
vocab_size: 40
tie_word_embeddings: false
max_position_embeddings: 64
attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}
moe: {num_experts: 8, top_k: 3, intermediate_size: 16, norm_topk_prob: true, router_dtype: fp32}
weight_dtype: fp32
expert_dtype: fp32
kv_dtype: fp32
activation_dtype: fp32
"""
SCENARIO = """
name: tiny
seed: 3
model: MODEL
cluster: {device: cpu_epyc_1thread, nodes: 1, gpus_per_node: 1, host_memory_gib: 4}
parallel: {tp: 1, dp: 1, ep: 1}
requests: {format: poisson, rate_per_s: 10, num_requests: 12, prompt_tokens: 20, output_tokens: 8}
routing: {popularity_zipf: 1.0, fidelity: token}
engine: {max_num_seqs: 8, max_num_batched_tokens: 32, max_model_len: 48, cuda_graph: false, host_overhead_us: 0}
"""
EP2 = ("cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2", "communication.all_to_all=pairwise")
EPLB = ("policies.placement={kind: eplb, num_redundant_experts: 4}",)
MIXED = Setting(
    "mixed", (), ((0, 9, 0), (1, 9, 0), (2, 4, 0), (3, 30, 0)), ((4, 0, 7, 0, 1), (5, 3, 6, 0, 0), (6, 0, 1, 0, 1))
)
SHAPES = {
    "plain": "",
    "window": "attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8, layer_pattern: [window, full], "
    "window: 5, qk_norm: true, qkv_bias: true}",
    "shared": "moe: {num_experts: 6, top_k: 2, intermediate_size: 16, shared_intermediate_size: 24, shared_gate: true, "
    "first_dense_layers: 1, scoring: sigmoid, router_bias: true, num_expert_groups: 3, top_groups: 2, "
    "router_dtype: fp32}\ndense_intermediate_size: 40",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prepared(folder: Path, *overrides: str, shape: str = "", dtype: str = "fp32", layers: int = 2) -> Prepared:
    """The tiny model, some of its lines replaced."""
    named = {line.split(":")[0]: line for line in MODEL.strip().splitlines()}
    named |= {line.split(":")[0]: line for line in shape.splitlines()}
    text = (
        "\n".join(named.values()).replace(": fp32\n", f": {dtype}\n").replace("num_layers: 2", f"num_layers: {layers}")
    )
    if dtype != "fp32":
        text = text.replace("activation_dtype: fp32", f"activation_dtype: {dtype}")
    (folder / "model.yaml").write_text(text + "\n")
    (folder / "scenario.yaml").write_text(SCENARIO.replace("MODEL", "model.yaml"))
    return prepare_real(load_scenario(folder / "scenario.yaml", overrides))


class Reference:
    """A step in float64, token by token and choice by choice, each stage with how far the executor may be off."""

    def __init__(self, prep: Prepared, loaded: Any, work: StepWork) -> None:
        """loaded: as it is before it runs, because of what its cache holds."""
        self.model = prep.result.scenario.model
        experts = np.tile(np.arange(self.model.num_experts), (self.model.num_moe_layers, 1))
        self.weights = RankWeights(self.model, experts, 0, torch.device("cpu"), 1 << 30)
        self.unit = UNIT[self.weights.dtype]
        assert prep.result.experts is not None
        self.placement = prep.result.experts.placement
        self.loaded, self.own_N = loaded, loaded.own_N
        self.position, self.request = work.position_N[self.own_N].tolist(), work.request_N[self.own_N].tolist()
        self.slot_TLK = work.slot_NLK[self.own_N]
        self.rows = loaded.place.sequence_T.tolist()
        self.cache = [layer.clone().cpu() for layer in loaded.layers]

    def logits(self) -> torch.Tensor:
        """[S, V] of the whole step, in float64 from the embedding on."""
        residual, pending = exact(self.weights.embedding_VH)[self.loaded.token_T.cpu()], None
        for layer in range(self.model.num_layers):
            residual = residual if pending is None else pending.plus(residual, 0.0)
            attended = self.attend(layer, self.project(layer, residual))
            residual, normed = self.after(layer, attended, residual)
            pending = exact(self.mixed(layer, exact(normed.value)).value)  # bounds hold a stage each, not a whole step
            residual = exact(residual.value)
        assert pending is not None
        return self.head(
            rms_norm_ball(pending.plus(residual, 0.0), exact(self.weights.norm_H), block.EPSILON, 0.0)
        ).value

    def head(self, normed: Ball) -> Ball:
        """Logits of the sampled tokens."""
        return normed[self.loaded.sampled_S.cpu()].matmul(exact(self.weights.head_VH).t, self.unit)

    def project(self, layer: int, residual: Ball) -> Ball:
        """Norm, queries, keys and values, rotated: [T, N, D]."""
        own, a = self.weights.layers[layer].own, self.model.attention
        turn = a.num_heads + a.num_kv_heads
        normed = rms_norm_ball(residual, exact(own.before_H), block.EPSILON, self.unit)
        qkv = normed.matmul(exact(own.qkv_MH).t, self.unit)
        if own.bias_M is not None:
            qkv = qkv.plus(exact(own.bias_M), self.unit)
        qkv = Ball(*(y.view(len(self.position), -1, a.head_dim) for y in (qkv.value, qkv.error)))
        turning = qkv[:, :turn]
        if own.head_norm_XD is not None:
            turning = rms_norm_ball(turning, exact(own.head_norm_XD), block.EPSILON, self.unit)
        turned = rotated_ball(turning, self.position, self.unit)
        pairs = ((turned.value, qkv.value[:, turn:]), (turned.error, qkv.error[:, turn:]))
        return Ball(*(torch.cat(pair, 1) for pair in pairs))

    def attend(self, layer: int, qkv: Ball) -> Ball:
        """Each token against what stands in the cache before the step's own tokens, and those: [T, Q D]."""
        a, unit = self.model.attention, self.unit
        q, g, d = a.num_heads, a.num_kv_heads, a.head_dim
        window, out = self.model.window_of_layer[layer], []
        for t, p in enumerate(self.position):
            mine = {self.position[i]: i for i in range(len(self.position)) if self.request[i] == self.request[t]}
            stored = self.cache[layer][:, self.rows[t]].double()
            sides = []
            for side in range(2):
                parts = [
                    qkv[mine[at], q + side * g : q + (side + 1) * g] if at in mine else exact(stored[side, :, at])
                    for at in range(max(0, p + 1 - window) if window else 0, p + 1)
                ]
                sides.append(Ball(torch.stack([x.value for x in parts]), torch.stack([x.error for x in parts])))
            for h in range(q):
                key, value = (side[:, h * g // q] for side in sides)
                score = qkv[t, h : h + 1].matmul(key.t, FP32).times(factor(d**-0.5), 2 * FP32)
                weight = attention_weights(score, torch.ones_like(score.value, dtype=torch.bool)).rounded(unit)
                out.append(weight.matmul(value, unit))
        shape = (len(self.position), q * d)
        return Ball(torch.cat([o.value for o in out]).view(shape), torch.cat([o.error for o in out]).view(shape))

    def after(self, layer: int, attended: Ball, residual: Ball) -> tuple[Ball, Ball]:
        """(residual, normed) after attention."""
        own = self.weights.layers[layer].own
        residual = attended.matmul(exact(own.out_HM).t, self.unit).plus(residual, self.unit)
        return residual, rms_norm_ball(residual, exact(own.after_H), block.EPSILON, self.unit)

    def mixed(self, layer: int, normed: Ball) -> Ball:
        """What the layer's feed-forward adds: dense, or experts and shared expert."""
        w = self.weights.layers[layer]
        if w.dense is not None:
            return self._feed_forward(normed, w.dense)
        total = self._experts(layer, normed)
        if w.shared is None:
            return total
        gate = normed.matmul(exact(w.shared_gate_1H).t, self.unit).through(torch.sigmoid, 0.25, self.unit)
        return total.plus(self._feed_forward(normed, w.shared).times(gate, self.unit), self.unit)

    def _feed_forward(self, x: Ball, pair: tuple[Any, Any]) -> Ball:
        return swiglu_ball(x.matmul(exact(pair[0]).t, self.unit), self.unit)[3].matmul(exact(pair[1]).t, self.unit)

    def _experts(self, layer: int, x: Ball) -> Ball:
        """Gates are the router's own best scores, in order; a choice's slot says which expert serves it."""
        m, w, unit = self.model, self.weights.layers[layer], self.unit
        assert w.own.router_EH is not None
        logit = x.rounded(UNIT[w.own.router_EH.dtype]).matmul(exact(w.own.router_EH).t, UNIT[w.own.router_EH.dtype])
        score = score_ball(logit, m.scoring)
        gates = self._gates(score, w.own.bias_E)
        sparse, rows = m.moe_layers.index(layer), []
        slot_TK = self.slot_TLK[:, sparse]
        for t in range(len(slot_TK)):
            total = exact(torch.zeros(1, m.hidden_size))
            for k, slot in enumerate(slot_TK[t].tolist()):
                if slot == self.placement.num_slots:
                    continue
                expert = int(self.placement.slot_to_expert_LS[sparse, slot])
                done = self._feed_forward(x[t : t + 1], (w.w13_SMH[expert], w.w2_SHI[expert]))
                weighted = done.times(gates[t : t + 1, k : k + 1], unit)
                total = Ball(total.value + weighted.value, total.error + weighted.error + 8 * FP32 * weighted.largest)
            rows.append(total.rounded(unit))
        return Ball(torch.cat([r.value for r in rows]), torch.cat([r.error for r in rows]))

    def _gates(self, score: Ball, bias_E: torch.Tensor | None) -> Ball:
        """The best of the eligible experts' scores; which of two near ones comes first moves a gate by their error."""
        m, biased = self.model, score.value if bias_E is None else score.value + bias_E.double()
        size = m.num_experts // m.num_expert_groups
        if m.num_expert_groups > 1:
            best = 2 if m.scoring == "sigmoid" else 1
            worth = biased.view(-1, m.num_expert_groups, size).topk(best, dim=-1).values.sum(-1)
            kept = worth.topk(m.top_groups, dim=-1).indices
            open_ = torch.zeros_like(worth, dtype=torch.bool).scatter(1, kept, True).repeat_interleave(size, dim=1)
            biased = biased.masked_fill(~open_, -torch.inf)
        chosen = biased.topk(m.top_k, dim=1).indices
        most = score.error.amax(1, keepdim=True).expand(-1, m.top_k)
        gate = Ball(score.value.gather(1, chosen), most)
        return gate.over(gate.sum(1), FP32) if m.norm_topk_prob else gate


ROUNDINGS = {torch.float32: 2000, torch.bfloat16: 8}
"""A path from embedding to logit passes some forty roundings a layer, which products and norms spread; a token, choice,
gate or position that is wrong moves a logit by far more than so many units of the largest (see the test of what is
wrong). bf16 is compared with itself alone."""


def stepped(prep: Prepared, setting: Setting, **more: Any) -> tuple[torch.Tensor, RealRank, Any]:
    """Logits of one step, and who computed them."""
    rank = RealRank(prep, **more)
    loaded = rank.load(resolve(prep, setting))
    rank.run(loaded)
    logits = rank.logits_SV if loaded.graphs is None else loaded.graphs.logits_SV
    return logits.clone(), rank, loaded


def near(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = ROUNDINGS[one.dtype] * UNIT[one.dtype] * float(two.abs().max())
    return bool(((one.double().cpu() - two.double().cpu()).abs() <= tolerance).all())


def stage_by_stage(prep: Prepared, setting: Setting, **more: Any) -> None:
    """Every stage within its bound, from the executor's own states before it; at the end from the embedding on."""
    rank = RealRank(prep, **more)
    work = resolve(prep, setting)
    loaded = rank.load(work)
    reference = Reference(prep, loaded, work)
    rank.begin(loaded)
    for layer in range(rank.model.num_layers):
        before = exact(rank.residual_TH)
        if rank.hidden_TH is not None:
            before = exact(rank.hidden_TH).plus(before, reference.unit)
        qkv_TND = rank.before(layer)
        qkv, residual = exact(qkv_TND), exact(rank.residual_TH)
        attended_TM = rank.attend(layer, qkv_TND)
        rank.after(layer, attended_TM)
        after = reference.after(layer, exact(attended_TM), residual)
        pairs = [
            (residual.value, before),
            (qkv_TND, reference.project(layer, residual)),
            (attended_TM, reference.attend(layer, qkv)),
            (rank.residual_TH, after[0]),
            (rank.normed_TH, after[1]),
        ]
        if rank.is_moe(layer):
            rank.local(layer)
        found = compare(*pairs, (rank.hidden_TH, reference.mixed(layer, exact(rank.normed_TH))))
        assert found.ok, f"layer {layer}: {found.error:.3e} where {found.bound:.3e} is allowed"
    rank.end()
    assert compare((rank.logits_SV, reference.head(exact(rank.normed_TH)))).ok
    logits = rank.logits_SV.clone()
    rank.run(loaded)
    again = rank.logits_SV if loaded.graphs is None else loaded.graphs.logits_SV
    if rank.weights.dtype == torch.float32:
        assert near(logits, reference.logits())
    assert near(again, logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_a_dense_reference(tmp_path: Path, shape: str) -> None:
    stage_by_stage(prepared(tmp_path, shape=SHAPES[shape]), MIXED)


def test_a_step_in_bf16(tmp_path: Path) -> None:
    stage_by_stage(prepared(tmp_path, dtype="bf16"), MIXED)


def test_the_reference_sees_what_is_wrong(tmp_path: Path) -> None:
    """One choice served by another expert, one token at another position: not near."""
    prep = prepared(tmp_path)
    rank, work = RealRank(prep), resolve(prep, MIXED)
    loaded = rank.load(work)
    right = Reference(prep, loaded, work).logits()
    rank.run(loaded)
    assert near(rank.logits_SV, right)
    slot = loaded.arriving[0].slot_AK
    slot[2, 1] = (slot[2, 1] + 1) % work.num_slots
    rank.run(loaded)
    assert not near(rank.logits_SV, right)
    slot[2, 1] = (slot[2, 1] - 1) % work.num_slots
    loaded.place.phase_TP[1] = loaded.place.phase_TP[0].conj()
    rank.run(loaded)
    assert not near(rank.logits_SV, right)


def test_a_prompt_in_chunks_is_the_prompt(tmp_path: Path) -> None:
    """Chunks, and then decoding: as one whole prompt."""
    prep = prepared(tmp_path)
    whole, _, _ = stepped(prep, Setting("whole", (), (), ((5, 0, 13, 0, 1),)))
    rank = RealRank(prep)
    for start, tokens in ((0, 4), (4, 1), (5, 7)):
        rank.run(rank.load(resolve(prep, Setting("chunk", (), (), ((5, start, tokens, 0, 0),)))))
    rank.run(rank.load(resolve(prep, Setting("last", (), (), ((5, 12, 1, 0, 1),)))))
    assert near(rank.logits_SV, whole)
    rank.forget(5)
    for start, tokens in ((0, 12),):
        rank.run(rank.load(resolve(prep, Setting("prompt", (), (), ((5, start, tokens, 0, 0),)))))
    rank.run(rank.load(resolve(prep, Setting("decode", (), ((5, 12, 0),)))))
    assert near(rank.logits_SV, whole)
    chosen = int(rank.logits_SV.argmax())
    following = rank.load(resolve(prep, Setting("next", (), ((5, 13, 0),))))
    assert following.token_T.tolist() == [chosen]


def test_what_must_not_change_the_logits(tmp_path: Path) -> None:
    """Replicas, another placement, another order of the tokens, another run."""
    plain, rank, _ = stepped(prepared(tmp_path), MIXED)
    for policy in (EPLB, ("policies.placement={kind: random}",)):
        placed = prepared(tmp_path, *policy)
        other, there, _ = stepped(placed, MIXED)
        assert near(other, plain)
        assert not np.array_equal(there.placement.slot_to_expert_LS, rank.placement.slot_to_expert_LS)
    turned = Setting("turned", (), MIXED.decode[::-1], MIXED.chunks[::-1])
    other, _, loaded = stepped(prepared(tmp_path), turned)
    _, _, first = stepped(prepared(tmp_path), MIXED)
    place = [loaded.request_S.index(request) for request in first.request_S]
    assert near(other[place], plain)
    assert torch.equal(stepped(prepared(tmp_path), MIXED)[0], plain)
    assert not near(stepped(prepared(tmp_path), MIXED, seed=1)[0], plain)


def test_refused_choices_are_computed_by_nobody(tmp_path: Path) -> None:
    """Under capacity rows computed are those that the simulator prices, and what is refused adds nothing."""
    prep = prepared(tmp_path, "capacity.factor=1.0")
    work = resolve(prep, MIXED)
    assert (work.slot_NLK == work.num_slots).any()
    stage_by_stage(prep, MIXED)
    rank = RealRank(prep)
    loaded = rank.load(work)
    assert [a.rows for a in loaded.arriving] == work.rows_LS().sum(axis=1).tolist()
    rank.begin(loaded)
    for layer in range(2):
        rank.own(layer)
        ends = rank.order.end_E.tolist()
        assert np.diff([0, *ends]).tolist() == work.rows_LS()[layer].tolist()
        assert len(rank.order.token_R) == ends[-1] == len(rank.gate_R)
        rank.local(layer)


def exchanged(prep: Prepared, setting: Setting) -> dict[int, torch.Tensor]:
    """Logits by request of a group whose ranks are composed by hand: every choice's row goes to its slot and back."""
    ranks = [RealRank(prep, r) for r in range(prep.layout.dp)]
    work = resolve(prep, setting)
    loaded = [rank.load(work) for rank in ranks]
    for rank, step in zip(ranks, loaded, strict=True):
        rank.begin(step)
    served = np.zeros((ranks[0].model.num_moe_layers, work.num_slots), np.int64)
    for layer in range(ranks[0].model.num_layers):
        for rank in ranks:
            rank.own(layer)
        sent = []
        for rank, step in zip(ranks, loaded, strict=True):
            slot_R = step.arriving[layer].slot_AK.flatten()
            out_RH = torch.full((len(slot_R), rank.model.hidden_size), float("nan"))
            rows_RH = rank.normed_TH.repeat_interleave(rank.model.top_k, dim=0)
            for other in ranks:
                to_R = ((slot_R >= other.first) & (slot_R < other.first + other.slots)).nonzero().flatten().flip(0)
                out_RH[to_R] = other.experts(layer, rows_RH[to_R], slot_R[to_R])
                served[layer] += np.bincount(slot_R[to_R].numpy(), minlength=work.num_slots)
            sent.append((out_RH, (slot_R < work.num_slots).nonzero().flatten()))
        for rank, (out_RH, choice_R) in zip(ranks, sent, strict=True):
            rank.add(layer, out_RH[choice_R], choice_R)
    assert np.array_equal(served, work.rows_LS())
    found = {}
    for rank, step in zip(ranks, loaded, strict=True):
        found |= dict(zip(step.request_S, rank.end(), strict=True))
    return found


@pytest.mark.parametrize("more", [(), EPLB, ("capacity.factor=1.0",)])
def test_a_group_computes_what_one_rank_does(tmp_path: Path, more: tuple[str, ...]) -> None:
    here = [(r, p, r % 2) for r, p, _ in MIXED.decode]
    there = [(r, s, t, (r + 1) % 2, e) for r, s, t, _, e in MIXED.chunks]
    spread = exchanged(prepared(tmp_path, *EP2, *more), Setting("spread", (), tuple(here), tuple(there)))
    limited = bool(more) and "capacity" in more[0]
    logits, _, loaded = stepped(prepared(tmp_path, *(() if limited else more)), MIXED)
    for i, request in enumerate(loaded.request_S):
        assert limited or near(spread[request], logits[i])
    assert set(spread) == set(loaded.request_S)


def test_a_rank_that_plays_alone_has_its_share_of_the_work(tmp_path: Path) -> None:
    """Its own tokens, and the rows that all ranks' tokens send to its slots."""
    prep = prepared(tmp_path, *EP2)
    setting = Setting("s", (), tuple((i, 9 + i, i % 2) for i in range(7)), ((9, 0, 8, 1, 1),))
    work = resolve(prep, setting)
    rows = 0
    for index in range(2):
        rank = RealRank(prep, index, alone=True)
        loaded = rank.load(work)
        assert loaded.tokens == (work.rank_N == index).sum()
        mine = slice(rank.first, rank.first + rank.slots)
        assert [a.rows for a in loaded.arriving] == work.rows_LS()[:, mine].sum(axis=1).tolist()
        rows += sum(a.rows for a in loaded.arriving)
        times = rank.run(loaded)
        assert set(times.part_ns) == {"embedding", "own", "attention", "experts", "head"}
        assert np.diff([0, *rank.order.end_E.tolist()]).tolist() == work.rows_LS()[-1, mine].tolist()
        assert bool(rank.logits_SV.isfinite().all())
        assert "not executed" in rank.remark
        assert times.cpu_ns == sum(times.part_ns.values())
    assert rows == work.rows_LS().sum()
    one = RealRank(prep, 0)
    part = one.load(work)
    with pytest.raises(BadInput, match="group"):
        one.run(part)


def test_sequences_share_calls_where_that_costs_least() -> None:
    """Against all ways to cut a few sequences into calls; rows that do not follow each other never share one."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        count = int(rng.integers(1, 8))
        context = rng.integers(1, 40, count).tolist()
        row = (np.arange(count) + np.cumsum(rng.random(count) < 0.2)).tolist()
        for spared in (0.0, 12.0):
            costs = {}
            for bits in range(1 << (count - 1)):
                ends = [i + 1 for i in range(count - 1) if bits >> i & 1] + [count]
                calls = list(zip([0, *ends], ends, strict=False))
                apart = any(row[b - 1] - row[a] != b - a - 1 for a, b in calls)
                unequal = not spared and any(len(set(context[a:b])) > 1 for a, b in calls)
                if not (apart or unequal):
                    costs[tuple(calls)] = sum(max(spared, 1.0) + (b - a) * max(context[a:b]) for a, b in calls)
            found = tuple(_calls(context, row, spared))
            assert costs[found] == min(costs.values())
    assert _calls([], [], 1.0) == []


def test_rows_of_the_cache_are_freed(tmp_path: Path) -> None:
    prep = prepared(tmp_path)
    rank = RealRank(prep)
    full = Setting("full", (), tuple((i, 7, 0) for i in range(8)))
    loaded = rank.load(resolve(prep, full))
    assert [(g.row, g.tokens) for g in loaded.groups] == [(0, 8)]
    one = resolve(prep, Setting("one", (), ((9, 3, 0),)))
    with pytest.raises(BadInput, match="max_num_seqs"):
        rank.load(one)
    for request in (5, 2, 99):
        rank.forget(request)
    assert rank.load(one).place.sequence_T.tolist() == [2]
    rank.load(resolve(prep, Setting("two", (), ((2, 3, 0), (9, 4, 0)))))
    assert rank.cache.row_of[2] == 5


def test_what_is_not_executed_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    strange = "attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8, sinks: true, o_bias: true}"
    with pytest.raises(BadInput, match="sinks") as found:
        RealRank(prepared(tmp_path, shape=strange))
    assert len(found.value.problems) == 2
    prep = prepared(tmp_path)
    with pytest.raises(BadInput, match="ranks are 0 to 0"):
        RealRank(prep, 1)
    with pytest.raises(BadInput, match="no device"):
        RealRank(prep, device="tape")
    with pytest.raises(BadInput, match="back end"):
        RealRank(prep, backend="loop")
    model = prep.result.scenario.model
    experts = np.tile(np.arange(8), (2, 1))
    fixed, each = RankWeights.needed_bytes(model, 8)
    with pytest.raises(Infeasible, match="one MoE layer of 8 experts"):
        RankWeights(model, experts, 0, torch.device("cpu"), fixed + each - 1)
    short = RankWeights(model, experts, 0, torch.device("cpu"), fixed + 2 * each - 1)
    assert short.held == 1
    assert "1 of 2 MoE layers" in short.remark
    assert short.layers[0] is short.layers[1]
    with pytest.raises(Infeasible, match="KV cache"):
        RealRank(prep, cache_tokens=1 << 40)
    with pytest.raises(BadInput, match="same scenario"):
        RealRank(prep).load(resolve(prepared(tmp_path, *EPLB), MIXED))


def test_weights_are_a_function_of_seed_layer_and_expert(tmp_path: Path) -> None:
    model = prepared(tmp_path).result.scenario.model
    slot_LS = np.array([[3, 3, -1], [7, 3, 0]])
    some = RankWeights(model, slot_LS, 5, torch.device("cpu"), 1 << 30)
    every = RankWeights(model, np.tile(np.arange(8), (2, 1)), 5, torch.device("cpu"), 1 << 30)
    for layer in range(2):
        for slot, expert in enumerate(slot_LS[layer].tolist()):
            wanted = every.layers[layer].w13_SMH[expert] if expert >= 0 else torch.zeros(32, 32)
            assert torch.equal(some.layers[layer].w13_SMH[slot], wanted)
    first, second = every.layers[0].w2_SHI, every.layers[1].w2_SHI
    assert len({tuple(w.flatten()[:4].tolist()) for w in (*first, *second)}) == 16
    assert abs(float(every.layers[0].own.qkv_MH.std()) * 32**0.5 - 1) < 0.1
    part = every.first_slots(3)
    assert torch.equal(part.layers[1].w2_SHI, second[:3])
    assert part.layers[1].w2_SHI.data_ptr() == second.data_ptr()


# -- on a GPU: `pytest -m gpu tests/kernels/test_real_rank.py`
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cuda_steps_are_those_of_the_reference(tmp_path: Path, shape: str, dtype: str, backend: str) -> None:
    stage_by_stage(prepared(tmp_path, shape=SHAPES[shape], dtype=dtype), MIXED, device="cuda", backend=backend)


@pytest.mark.gpu
@needs_cuda
def test_cuda_steps_are_captured(tmp_path: Path) -> None:
    """A step is one graph where torch has grouped products as one kernel; replays give the same choices, and steps that
    were loaded before still run."""
    prep = prepared(tmp_path, dtype="bf16")
    rank = RealRank(prep, device="cuda")
    first = rank.load(resolve(prep, MIXED))
    rank.run(first)
    logits = first.graphs.logits_SV.clone()
    other = rank.load(resolve(prep, Setting("other", (), ((7, 5, 0),))))
    rank.run(other)
    times = rank.run(first)
    assert near(first.graphs.logits_SV, logits)
    assert set(times.part_ns) == {"embedding", "own", "attention", "experts", "head"}
    assert times.wall_ns > max(times.part_ns.values()) // 2
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert not first.remark, first.remark
    eager = RealRank(prep, device="cuda", graphs=False)
    launched = eager.load(resolve(prep, MIXED))
    assert eager.run(launched).wall_ns > 0
    assert launched.graphs is None
    assert near(eager.logits_SV, logits)
    alone = RealRank(prepared(tmp_path, *EP2, dtype="bf16"), 1, device="cuda", alone=True)
    step = alone.load(resolve(alone.prepared, Setting("a", (), ((0, 5, 0), (1, 9, 1)), ((2, 0, 7, 1, 1),))))
    alone.run(step)
    assert bool(step.graphs.logits_SV.isfinite().all())
