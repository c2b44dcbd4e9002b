"""The timeline is valid trace-event JSON: slices of a track never overlap and add up to the steps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from moesim.simulate import simulate
from moesim.timeline import timeline_events, write_timeline
from tests.build import scenario, tiny_model


@pytest.mark.parametrize(
    "parts",
    [
        {"parallel": {"dp": 8, "ep": 8}},
        {"parallel": {"dp": 4, "ep": 4}, "routing": {"fidelity": "token"}},
        {"parallel": {"tp": 4, "ep": 4}},
        {"moe": None},
    ],
    ids=["count", "token", "tensor", "dense"],
)
def test_slices_nest_and_cover(tmp_path: Path, parts: dict) -> None:  # type: ignore[type-arg]
    dense = "moe" in parts
    model = tiny_model(tmp_path, **({"moe": None} if dense else {}))
    result = simulate(scenario(tmp_path, model, **({} if dense else parts)))
    path = tmp_path / "t.json"
    write_timeline(result, path)
    events = json.loads(path.read_text())["traceEvents"]
    assert list(timeline_events(result)) == events
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    assert len(tracks) >= 2
    for slices in tracks.values():
        slices.sort()
        for (start, duration), (following, _) in pairwise(slices):
            assert start + duration <= following + 1e-3
    assert result.outcome is not None
    total = sum(duration for _, duration in tracks[0, 0])
    groups = int(result.outcome.steps.run_group.max()) + 1
    if groups == 1:
        assert total * 1e3 == pytest.approx(int(result.outcome.steps.duration_ns.sum()))
    assert not list(tmp_path.glob(".t.json*"))
