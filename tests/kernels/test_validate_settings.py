"""Held-out settings: what an engine could ask for, spread over all sizes, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.real.work import Setting, prepare_real, resolve
from moesim_kernels.validate.measure import read_settings, write_settings
from moesim_kernels.validate.settings import Limits, allowed_variants, draw_settings, kind_of_setting
from moesim_kernels.validate.steps import representative_steps

from moesim.errors import BadInput
from moesim.scenario.load import load_scenario
from moesim.simulate import simulate

FILE = Path("workloads/validate_cpu.yaml")
LIMITS = Limits(ranks=1, sequences=16, batched_tokens=128, kv_tokens=4096, length=256, requests=48)


def _check(limits: Limits, setting: Setting) -> None:
    """What the engine would hold to, rank by rank."""
    ids = [r for r, *_ in (*setting.decode, *setting.chunks)]
    assert len(set(ids)) == len(ids)
    assert all(0 <= r < limits.requests for r in ids)
    for rank in range(limits.ranks):
        decode = [p + 1 for _, p, d in setting.decode if d == rank]
        chunks = [(s, t) for _, s, t, d, _ in setting.chunks if d == rank]
        assert len(decode) + len(chunks) <= limits.sequences
        assert 0 < len(decode) + sum(t for _, t in chunks) <= limits.batched_tokens
        assert all(1 <= x <= limits.length for x in (*decode, *(s + t for s, t in chunks)))
        assert all(t >= 1 for _, t in chunks)
        assert sum(decode) + sum(s + t for s, t in chunks) <= limits.kv_tokens + limits.batched_tokens


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        Limits(ranks=2, sequences=16, batched_tokens=128, kv_tokens=4096, length=256, requests=48),
        Limits(ranks=4, sequences=3, batched_tokens=5, kv_tokens=64, length=40, requests=9),
        Limits(ranks=1, sequences=1, batched_tokens=1, kv_tokens=16, length=8, requests=1),
        Limits(ranks=1, sequences=256, batched_tokens=8192, kv_tokens=20_000, length=32768, requests=500),
    ],
)
def test_every_setting_is_a_step_that_an_engine_could_take(limits: Limits) -> None:
    for seed in range(5):
        settings = draw_settings(limits, 44, seed, [("capacity.factor=2.0",)])
        assert len(settings) == 44
        assert len({s.name for s in settings}) == 44
        for setting in settings:
            _check(limits, setting)


def test_sizes_and_contexts_reach_from_end_to_end() -> None:
    settings = draw_settings(LIMITS, 44, 3)
    decode = [s for s in settings if kind_of_setting(s) == "decode"]
    batches = sorted(len(s.decode) for s in decode)
    assert len(decode) == 22
    assert batches[0] == 1
    assert batches[-1] >= 14
    # log-uniform: as many below the geometric middle as above it, to within the rounding to whole requests
    assert abs(sum(b <= 4 for b in batches) - len(batches) / 2) <= 3
    mean = [np.mean([p + 1 for _, p, _ in s.decode]) for s in decode]
    assert min(mean) < 4
    assert max(mean) > 120
    prompts = [s.tokens for s in settings if kind_of_setting(s) == "prompt"]
    assert min(prompts) <= 2
    assert max(prompts) >= 80
    assert sum(kind_of_setting(s) == "mixed" for s in settings) == 11
    assert any(c[1] > 0 for s in settings for c in s.chunks), "no chunk stands on a prefix"
    assert any(not c[4] for s in settings for c in s.chunks), "no chunk leaves its prompt unfinished"


def test_half_of_them_are_the_scenario_as_it_is_and_every_variant_has_its_share() -> None:
    variants = [(f"capacity.factor={x}",) for x in (1.0, 1.25, 2.0)]
    settings = draw_settings(LIMITS, 44, 1, variants)
    count = {v: sum(s.overrides == v for s in settings) for v in [(), *variants]}
    assert count[()] == 23  # 11, 6 and 6 of 22, 11 and 11
    assert sum(count.values()) == 44
    assert min(count[v] for v in variants) >= 5


def test_the_same_seed_draws_the_same_settings_and_another_name_others() -> None:
    first = draw_settings(LIMITS, 12, 7)
    assert draw_settings(LIMITS, 12, 7) == first
    assert draw_settings(LIMITS, 12, 8) != first
    other = draw_settings(LIMITS, 12, 7, name="fresh-")
    assert [s.decode for s in other] != [s.decode for s in first]
    assert all(s.name.startswith("fresh-") for s in other)


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(BadInput, match="cannot fill 2 ranks"):
        draw_settings(Limits(2, 4, 16, 64, 32, 1), 4, 0)


def test_variants_that_change_nothing_or_cannot_be_are_left_out() -> None:
    def try_out(overrides: tuple[str, ...]) -> str:
        if overrides == ("b=1",):
            raise BadInput("no b here")
        return "same" if overrides in ((), ("a=1",)) else str(overrides)

    fine, why = allowed_variants(try_out, [("a=1",), ("b=1",), ("c=1",)])
    assert fine == [("c=1",)]
    assert why == {"a=1": "is the scenario as it is", "b=1": "no b here"}


def test_settings_of_a_scenario_resolve_and_travel_as_json(tmp_path: Path) -> None:
    prepared = prepare_real(load_scenario(FILE))
    settings = draw_settings(Limits.of(prepared), 8, 1)
    for setting in settings:
        assert resolve(prepared, setting).tokens == setting.tokens
    write_settings(tmp_path / "s.json", settings)
    assert read_settings(tmp_path / "s.json") == settings
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(BadInput, match="a list of settings"):
        read_settings(tmp_path / "bad.json")


def test_drawn_steps_stand_for_the_whole_run() -> None:
    """The run is the simulator's own, and of many draws the mean of anything over the price is that of the run."""
    scenario = load_scenario(FILE)
    outcome = simulate(scenario).outcome  # type: ignore[union-attr]
    assert outcome is not None
    found = representative_steps(prepare_real(scenario), 150, 5, "c/", ("a=1",))
    duration = outcome.steps.duration_ns
    assert found.busy_ns == int(duration.sum())
    assert found.steps == len(duration)
    assert found.output_tokens == int(outcome.requests.output_tokens.sum())
    assert all(s.overrides == ("a=1",) and s.name.startswith("c/step-") for s in found.settings)
    # tokens a ns over the run, from the chance-proportional draws: sum of tokens / sum of ns = mean(tokens / ns)
    prefill = np.array([run.key.total_prefill for run in outcome.runs])
    tokens = float((outcome.steps.per_step(outcome.steps.run_decoding) + outcome.steps.per_step(prefill)).sum())
    from moesim_kernels.real.work import price

    prepared = prepare_real(scenario)
    ratio = [s.tokens / price(prepared, s).ns for s in found.settings]
    error = np.std(ratio) / np.sqrt(len(ratio))
    assert abs(np.mean(ratio) - tokens / found.busy_ns) < 4 * error


def test_on_a_gpu_sequences_of_a_step_decode_at_one_context() -> None:
    from dataclasses import replace

    settings = draw_settings(replace(LIMITS, alike=True), 44, 3)
    contexts = [{p for _, p, _ in s.decode} for s in settings if s.decode]
    assert all(len(found) == 1 for found in contexts)
    assert len(set().union(*contexts)) > 20
    assert any(len({p for _, p, _ in s.decode}) > 1 for s in draw_settings(LIMITS, 44, 3))
