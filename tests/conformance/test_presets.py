"""Every router that can be named, mechanism or preset, runs in a scenario, and tells what of it is ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.policy import policy_kinds
from moesim.scenario.presets import presets
from moesim.simulate import simulate
from tests.build import scenario, tiny_model

NAMES = [*policy_kinds("routing"), *presets()]


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_a_scenario(tmp_path: Path, name: str) -> None:
    done = simulate(
        scenario(
            tmp_path,
            tiny_model(tmp_path, num_layers=5),  # four MoE layers
            parallel={"dp": 2, "ep": 2},
            policies={"routing": name},
            routing={"pool_tokens": 256, "sequence_tokens": 64, "popularity_zipf": 0.5, "domains": 2},
            engine={"bank_entries": 2},
            requests={
                "format": "poisson", "rate_per_s": 300.0, "num_requests": 4, "prompt_tokens": 40, "output_tokens": 4,
            },
        )
    )  # fmt: skip
    assert done.feasible, done.reasons
    report = done.to_json()
    summary = report["summary"]
    assert summary["requests"]["completed"] == 4
    taken = summary["routing"]["experts_per_token"]
    assert 0 <= taken <= done.scenario.model.num_experts
    assert np.isfinite(taken)
    assert (summary["drops"] is not None) == (done.scenario.capacity is not None)
    assert done.scenario.policies.kinds["routing"] == name
    if name in presets() and presets()[name].reconstruction:
        assert any("is a reconstruction" in text for text in report["warnings"])


def test_names_are_apart() -> None:
    assert len(set(NAMES)) == len(NAMES)
