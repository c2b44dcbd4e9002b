"""results/validation/offload_real.md is what its tool makes of its .json; what needs no quiet machine was reached."""

from __future__ import annotations

import json

from benchmarks.offload.real_against_simulated import OUT, page


def test_the_page_is_made_of_its_figures() -> None:
    report = json.loads((OUT / "offload_real.json").read_text("utf-8"))
    assert (OUT / "offload_real.md").read_text("utf-8") == page(report)
    assert len(report["times"]["cases"]) >= 12
    assert len(report["times"]["digests"]) == 1
    assert not [row for row in report["events"] if row["difference"]]
    demand = [one for one in report["times"]["cases"] if "+" not in one["case"]]
    assert all(all(one["same_events"]) for one in demand)
    assert min(row["runs"] for row in report["races"]) >= 10
