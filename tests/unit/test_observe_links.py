"""Bytes over links as figures of a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.observe import FIGURES, observe
from moesim.simulate import RunResult, simulate
from tests.build import scenario


def run(folder: Path, placement: str) -> RunResult:
    result = simulate(
        scenario(
            folder, parallel={"dp": 8, "ep": 8},
            cluster={"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 4},
            routing={"popularity_zipf": 1.0}, policies={"placement": placement},
        )
    )  # fmt: skip
    assert isinstance(result, RunResult)
    return result


def test_bytes_are_those_of_the_result_and_have_parts_left_out(tmp_path: Path) -> None:
    result = run(tmp_path, "contiguous")
    links, seen = result.to_json()["summary"]["links"], observe(result).figures
    for name, link in (("nvlink_bytes", "nvlink"), ("nic_bytes", "nic")):
        assert seen[name].value == links[link]["bytes"] > 0
        without = seen[name].without_G
        assert without is not None
        assert len(without) > 2
        np.testing.assert_allclose(without, seen[name].value, rtol=0.1)
        assert seen[name].slope == 0
    assert {"nvlink_bytes", "nic_bytes"} <= set(FIGURES)


def test_one_node_sends_nothing_between_nodes(tmp_path: Path) -> None:
    place = scenario(tmp_path, parallel={"dp": 8, "ep": 8}, cluster={"device": "h100_sxm_datasheet", "nodes": 1})
    figures = observe(simulate(place)).figures
    assert "nvlink_bytes" in figures
    assert "nic_bytes" not in figures
