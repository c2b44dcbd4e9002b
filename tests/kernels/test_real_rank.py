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
from moesim_kernels.real.rank import RealRank
from moesim_kernels.real.weights import RankWeights
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve

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


ROUNDINGS = 2000
"""A path from embedding to logit passes some forty roundings a layer, which products and norms spread; a token, choice,
gate or position that is wrong moves a logit by far more than so many units of the largest (see the test that fails)."""


def stepped(prep: Prepared, setting: Setting, **more: Any) -> tuple[torch.Tensor, RealRank, Any]:
    """Logits of one step, and who computed them."""
    rank = RealRank(prep, **more)
    loaded = rank.load(resolve(prep, setting))
    rank.run(loaded)
    logits = rank.logits_SV if loaded.graphs is None else loaded.graphs.logits_SV
    return logits.clone(), rank, loaded


def near(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = ROUNDINGS * UNIT[one.dtype] * float(two.abs().max())
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
