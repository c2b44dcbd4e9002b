"""What a result must say of itself: a placement fitted on its own traffic, knobs that count fidelity averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.simulate import simulate
from tests.build import scenario

FITTED = "fitted on the same routing"
AVERAGED = "domains and drift are averaged"


@pytest.mark.parametrize(
    ("policies", "routing", "says"),
    [
        ({"placement": "eplb"}, {"popularity_zipf": 1.0}, [FITTED]),
        ({"placement": "contiguous"}, {"popularity_zipf": 1.0}, []),
        ({"placement": "round_robin"}, {"popularity_zipf": 1.0}, []),
        ({}, {"drift": 0.5, "drift_windows": 4, "fidelity": "count"}, [AVERAGED]),
        ({}, {"drift": 0.5, "drift_windows": 4, "fidelity": "token"}, []),
    ],
)
def test_what_is_said(tmp_path: Path, policies: dict[str, Any], routing: dict[str, Any], says: list[str]) -> None:
    result = simulate(scenario(tmp_path, parallel={"dp": 4, "ep": 4}, policies=policies, routing=routing))
    told = result.to_json()["warnings"]
    for text in (FITTED, AVERAGED):
        assert any(text in line for line in told) == (text in says), told
