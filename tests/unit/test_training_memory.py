"""What a rank keeps while it trains, against numbers worked by hand; and mends that do fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.layout import Layout
from moesim.scenario.load import Scenario
from moesim.simulate import simulate
from moesim.training.memory import balanced_rows, training_memory
from tests.build import tiny_model, training_scenario

# the tiny model: 3 MoE layers of 64 experts of 3 x 256 x 128, 1 dense layer of 3 x 256 x 512, 4 layers of attention
EXPERTS = 3 * 64 * 3 * 256 * 128
ATTENTION = 4 * (4 * 256 * 256 + 2 * 256)
ROUTER, FFN = 3 * 256 * 64, 3 * 256 * 512
DENSE = ATTENTION + ROUTER + FFN + 2 * 1024 * 256 + 256
T = 128


def by_use(s: Scenario, rows: float | None = None) -> dict[str, int]:
    assert s.training is not None
    layout = Layout.of(s.model, s.cluster, s.parallel.tp, s.parallel.dp, s.parallel.ep)
    rows_L = balanced_rows(s.model, layout, T) if rows is None else np.full(3, rows)
    return training_memory(s.model, s.cluster, layout, s.training, s.parallel.replicas, rows_L).by


@pytest.mark.parametrize("stage", range(4))
def test_sixteen_bytes_a_parameter_over_shards(stage: int, tmp_path: Path) -> None:
    """bf16 weights and gradients, AdamW: 2 + 2 + 12 (ZeRO, arXiv:1910.02054, figure 1). Dense parameters on 2 x 4
    ranks, each half of the experts on 4."""
    training = {"zero_stage": stage, "grad_dtype": "bf16"}
    by = by_use(training_scenario(tmp_path, parallel={"dp": 2, "ep": 2, "replicas": 4}, training=training))
    dense, experts, copies = DENSE, EXPERTS // 2, (8, 4)
    shards = [[n if stage >= least else 1 for n in copies] for least in (3, 2, 1)]
    assert by["dense_weights"] == pytest.approx(2 * dense / shards[0][0], abs=64)
    assert by["expert_weights"] == 2 * experts // shards[0][1]
    assert by["gradients"] == pytest.approx(2 * (dense / shards[1][0] + experts / shards[1][1]), abs=64)
    assert by["optimizer_states"] == pytest.approx(12 * (dense / shards[2][0] + experts / shards[2][1]), abs=256)
    widest = ATTENTION // 4 + ROUTER // 3 + EXPERTS // 6
    assert by["zero_buffers"] == {0: 0, 1: 0, 2: 2 * widest, 3: 6 * widest}[stage]
    if stage == 0:
        states = sum(by[k] for k in ("dense_weights", "expert_weights", "gradients", "optimizer_states"))
        assert states == 16 * (dense + experts)


def test_float32_weights_are_their_own_master(tmp_path: Path) -> None:
    model = {"name": tiny_model(tmp_path), "weight_dtype": "fp32", "expert_dtype": "fp32"}
    by = by_use(training_scenario(tmp_path, model=model))
    params = DENSE + EXPERTS // 8
    assert by["dense_weights"] + by["expert_weights"] == 4 * params - 2 * ROUTER  # the router stays in bf16
    assert by["optimizer_states"] == 8 * params + 4 * ROUTER


def test_activations_by_hand(tmp_path: Path) -> None:
    """Bytes a token, bf16: attention 2 * (256 in, 256 normed, 3 * 256 q k v, 256 out) and 8 float32; dense 2 * (256
    in, 256 normed, 3 * 512); MoE 2 * (256 in, 256 normed), 64 float32 scores, 4 outputs of 256; a row 2 * (256 + 3 *
    128)."""
    attention, dense, moe, row = 2 * 6 * 256 + 32, 2 * (512 + 1536), 2 * 512 + 256 + 2 * 1024, 2 * (256 + 384)
    rows = T * 8 * 4 / 8
    layers = [T * (attention + dense)] + 3 * [T * (attention + moe) + rows * row]
    ends = 2 * T * 512
    kept = {r: by_use(training_scenario(tmp_path, training={"recompute": r})) for r in ("none", "selective", "full")}
    assert kept["none"]["activations"] == sum(layers) + ends
    # norms' outputs and the activation functions' outputs are computed again
    saved = T * 4 * 512 + T * (512 + 2 * 512) + 3 * (T * 512 + rows * 2 * 128)
    assert kept["selective"]["activations"] == sum(layers) + ends - saved
    assert kept["full"]["activations"] == 4 * T * 512 + max(layers) + ends
    assert kept["none"]["logits"] == 4 * T * 1024
    assert kept["none"]["exchange_buffers"] == (T * 4 + rows) * 512


def test_uneven_experts_take_more(tmp_path: Path) -> None:
    s = training_scenario(tmp_path)
    assert by_use(s, 2048)["activations"] - by_use(s, 512)["activations"] == 3 * 1536 * 2 * (256 + 384)
    skewed = training_scenario(tmp_path, routing={"popularity_zipf": 2.0})
    even = training_scenario(tmp_path, policies={"routing": "balanced"})
    used = [simulate(x).to_json()["summary"]["memory"]["hbm"]["by"] for x in (skewed, even)]
    assert used[0]["activations"] > used[1]["activations"] == by_use(s)["activations"]


@pytest.mark.parametrize(
    ("training", "share", "offered"),
    [
        ({"micro_batch_sequences": 4}, 0.97, {"micro_batch_sequences", "recompute", "zero_stage"}),
        ({"recompute": "full"}, 0.9, {"zero_stage"}),
        ({"micro_batch_sequences": 4}, 0.4, set()),
    ],
)
def test_mends_fit(training: dict[str, Any], share: float, offered: set[str], tmp_path: Path) -> None:
    """On a device that holds so much of what is needed, each change that is offered fits."""
    training = {**training, "runtime_memory_gib": 0.0}
    parts: dict[str, Any] = {"parallel": {"dp": 2, "ep": 2, "replicas": 4}}
    wanted = sum(by_use(training_scenario(tmp_path, training=training, **parts)).values())
    training["gpu_memory_utilization"] = share * wanted / (80 * 2**30)
    result = simulate(training_scenario(tmp_path, training=training, **parts))
    text = " ".join(result.reasons)
    assert not result.feasible
    assert result.to_json()["summary"] is None
    assert re.search(r"[\d,]+ bytes a rank are missing", text)
    mends = [{key: value} for key, value in re.findall(r"training\.(\w+) that fits: (\w+)\.", text)]
    assert {key for mend in mends for key in mend} == offered
    if not mends:
        together = re.search(r"fit together: (.*)\.$", text)
        assert together is not None, text
        mends = [dict(m.removeprefix("training.").split("=") for m in together[1].split(", "))]
        assert len(mends[0]) > 1
    for mend in mends:
        changed = {k: int(v) if v.isdecimal() else v for k, v in mend.items()}
        assert simulate(training_scenario(tmp_path, training={**training, **changed}, **parts)).feasible
