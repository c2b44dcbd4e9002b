"""Whatever is done to the text of a scenario, model or profile file, it loads or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.scenario.files import home
from moesim.scenario.load import load_model, load_profile, load_scenario_text

SCENARIO = """\
name: small
seed: 7
model: {name: deepseek-v2-lite, kv_dtype: fp8}
cluster: {device: h100_sxm_datasheet, nodes: 1, nic_gb_per_s: 400 Gb/s}
parallel: {dp: 8, ep: 8}
requests:
  format: poisson
  rate_per_s: 5
  num_requests: 20
  prompt_tokens: {distribution: lognormal, mean: 1e2, cv: 0.5, max: 4096}
  output_tokens: 10
routing: {popularity_zipf: 0.8, fidelity: count}
policies: {placement: {kind: eplb, num_redundant_experts: 8}, dispatch: first, balancer: session}
engine: {max_num_seqs: 64, graph_batch_sizes: [1, 2, 4]}
slo: {ttft_ms: 2 s}
"""
WORDS = (
    "null", "~", "[]", "{}", "-1", "0", "1e308", "-0.0", "9223372036854775807", "true", "no", '""', "text", "'7'",
    "[1, 2]", "{a: 1}", "{kind: eplb}", ".5", "0x1f", "1 GiB", "3 s", "*x", "&x 3", "!!int 3", "\t", ": ", "- ", "#",
)  # fmt: skip


def _mutate(text: str, draw: st.DrawFn) -> str:
    """A few cuts, copies and replacements of words."""
    for _ in range(draw(st.integers(1, 3))):
        words = text.split(" ")
        at = draw(st.integers(0, max(0, len(words) - 1)))
        what = draw(st.sampled_from(["replace", "drop", "double", "cut", "swap", "character"]))
        if what == "replace":
            words[at] = draw(st.sampled_from(WORDS)) + ("\n" if words[at].endswith("\n") else "")
        elif what == "drop":
            del words[at : at + draw(st.integers(1, 4))]
        elif what == "double":
            words.insert(at, words[at])
        elif what == "swap":
            other = draw(st.integers(0, len(words) - 1))
            words[at], words[other] = words[other], words[at]
        text = " ".join(words)
        if what == "cut":
            text = text[: draw(st.integers(0, len(text)))]
        elif what == "character":
            place = draw(st.integers(0, len(text)))
            text = text[:place] + draw(st.characters(codec="utf-8")) + text[place + 1 :]
    return text


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    return _mutate(text, draw)


def _check(error: BadInput | None) -> None:
    for problem in [] if error is None else error.problems:
        assert problem.where
        assert problem.message
        assert len(str(problem)) < 2000


@settings(max_examples=300)
@given(mutated(SCENARIO))
def test_a_changed_scenario_loads_or_says_why_not(text: str) -> None:
    error = None
    try:
        scenario = load_scenario_text(text, Path())
        assert scenario.hash
    except BadInput as caught:
        error = caught
    _check(error)


@pytest.mark.parametrize(
    ("name", "load"), [("workloads/models/gpt-oss-20b", load_model), ("hw_profiles/l40s", load_profile)]
)
def test_a_changed_data_file_loads_or_says_why_not(
    name: str, load: Callable[[Path], object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("data") / "file.yaml"
    good = (home() / f"{name}.yaml").read_text()

    @settings(max_examples=150)
    @given(mutated(good))
    def check(text: str) -> None:
        error = None
        path.write_text(text, encoding="utf-8")
        try:
            load(path)
        except BadInput as caught:
            error = caught
        _check(error)

    check()
