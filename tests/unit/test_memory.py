"""Memory to the byte, and what an infeasible deployment is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.simulate import simulate
from tests.build import scenario, tiny_model


def test_tiny_model_to_the_byte(tmp_path: Path) -> None:
    """tp 1, dp 2, ep 2 of the tiny model: 64 experts of 3 x 256 x 128 bf16 over 3 layers, half of them on each rank."""
    result = simulate(scenario(tmp_path, parallel={"dp": 2, "ep": 2}, engine={"max_num_batched_tokens": 1024}))
    m = result.memory
    assert m is not None
    assert m.expert_weights == 3 * 32 * 3 * 256 * 128 * 2
    attention = 4 * (4 * 256 * 256 + 2 * 256)  # q, k, v, o of 8 heads of 32, and two norms
    router, dense, ends = 3 * 256 * 64, 3 * 256 * 512, 2 * 1024 * 256 + 256
    assert m.dense_weights == 2 * (attention + router + dense + ends)
    assert m.kv_unit == 16 * 2 * 8 * 32 * 2
    assert m.fixed + m.kv_cache <= m.usable < m.fixed + m.kv_cache + m.kv_unit
    assert m.usable == int(m.capacity * 0.9)
    json = result.to_json()["summary"]["memory"]["hbm"]
    assert json["used"] <= json["capacity"]
    assert json["by"]["kv_peak"] <= json["by"]["kv_cache"]


def test_redundant_experts_cost_kv(tmp_path: Path) -> None:
    plain = simulate(scenario(tmp_path, parallel={"dp": 8, "ep": 8})).memory
    placement = {"placement": {"kind": "eplb", "num_redundant_experts": 16}}
    more = simulate(scenario(tmp_path, parallel={"dp": 8, "ep": 8}, policies=placement)).memory
    assert plain is not None
    assert more is not None
    assert more.expert_weights - plain.expert_weights == 3 * 2 * 3 * 256 * 128 * 2
    assert more.kv_units < plain.kv_units


def test_deepseek_v3_bf16_on_8_h100_does_not_fit(tmp_path: Path) -> None:
    result = simulate(
        scenario(
            tmp_path,
            {"name": "deepseek-v3", "weight_dtype": "bf16", "expert_dtype": "bf16"},  # type: ignore[arg-type]
            cluster={"device": "h100_sxm_datasheet", "nodes": 1, "gpus_per_node": 8},
            parallel={"tp": 8, "ep": 8},
        )
    )
    assert not result.feasible
    assert result.to_json()["summary"] is None
    first, *mends = result.reasons
    experts = 58 * 32 * 3 * 7168 * 2048 * 2
    assert f"expert_weights {experts:,} B" in first
    assert "bytes a rank are missing" in first
    assert any("32 ranks (dp=4, ep=32) on 4 nodes" in mend for mend in mends)
    assert any("expert_dtype int4" in mend for mend in mends)


def test_the_change_that_is_said_to_fit_fits(tmp_path: Path) -> None:
    fits = simulate(
        scenario(
            tmp_path,
            {"name": "deepseek-v3", "weight_dtype": "bf16", "expert_dtype": "bf16"},  # type: ignore[arg-type]
            cluster={"device": "h100_sxm_datasheet", "nodes": 4, "gpus_per_node": 8},
            parallel={"tp": 8, "dp": 4, "ep": 32},
            requests={
                "format": "poisson",
                "rate_per_s": 1.0,
                "num_requests": 3,
                "prompt_tokens": 10,
                "output_tokens": 3,
            },
        )
    )
    assert fits.feasible


def test_the_mend_keeps_slots_divisible(tmp_path: Path) -> None:
    """288 slots do not divide by 64 ranks; 320 do."""
    result = simulate(
        scenario(
            tmp_path,
            {"name": "deepseek-v3", "weight_dtype": "bf16", "expert_dtype": "bf16"},  # type: ignore[arg-type]
            cluster={"device": "h100_sxm_datasheet", "nodes": 1, "gpus_per_node": 8},
            parallel={"dp": 8, "ep": 8},
            policies={"placement": {"kind": "eplb", "num_redundant_experts": 32}},
        )
    )
    assert any("64 ranks (dp=64, ep=64, num_redundant_experts=64) on 8 nodes" in mend for mend in result.reasons)


@pytest.mark.parametrize("kind", ["host", "nvme"])
def test_loading_weights_delays_the_first_token(tmp_path: Path, kind: str) -> None:
    model = tiny_model(tmp_path)
    cold = simulate(scenario(tmp_path, model, parallel={"dp": 8, "ep": 8}, engine={"weights_from": kind}))
    warm = simulate(scenario(tmp_path, model, parallel={"dp": 8, "ep": 8}))
    assert warm.ready_ns == 0
    assert cold.memory is not None
    assert cold.outcome is not None
    node = cold.scenario.cluster.node
    size = cold.memory.dense_weights + cold.memory.expert_weights
    # eight ranks share what their node reads; one alone is bound by its PCIe port
    shared = node.nvme_bytes_per_s if kind == "nvme" else node.host_bytes_per_s
    floor = max(8 * size / shared, size / node.pcie_bytes_per_s) * 1e9
    assert floor - 1 <= cold.ready_ns <= floor * 1.001 + 2
    assert cold.outcome.requests.first_token_ns.min() > cold.ready_ns
