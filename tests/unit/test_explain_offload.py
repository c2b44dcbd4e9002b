"""`moesim explain offload`: what it tries, chooses and says, on the small model whose routing is in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim import policy
from moesim.errors import BadInput, Infeasible
from moesim.explain_offload import Answer, Ask, explain_offload, render, to_json
from moesim.explain_offload.answer import _search
from moesim.explain_offload.ask import Base
from moesim.explain_offload.candidates import RESIDENT, Candidate, kinds
from moesim.explain_offload.flags import device_experts, engine_flags
from moesim.explain_offload.play import Player
from moesim.offload.cached import Policy as Cached
from moesim.policy import policy_kinds

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / "workloads" / "routing" / "stdlib_moe_loss_free.npz"
MIB = 1 / 1024
SMALL = ("engine.runtime_memory_gib=0", "engine.max_num_batched_tokens=64")
EXPERT = 3 * 128 * 128 * 4


def ask(vram_mib: float, **more: Any) -> Ask:
    given = {"trace": TRACE, "prompt_tokens": 16, "output_tokens": 12, "overrides": SMALL, **more}
    return Ask("rtx_4090", "stdlib-moe-16e", vram_mib * MIB, **given)


@pytest.fixture(scope="module")
def answer() -> Answer:
    return explain_offload(ask(6))


@pytest.fixture(scope="module")
def report(answer: Answer) -> dict[str, Any]:
    return to_json(answer)


def test_every_kind_is_tried_that_a_user_could_mean() -> None:
    tried = {c.kind for c in kinds(concurrency=8)}
    # a cache whose loads swap; kinds of other packages are tried where they are asked for
    assert tried == set(policy_kinds("offload")) - {"mixtral_offloading", "split_ilp"}


def test_a_kind_of_another_package_is_tried_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policy._plugins, "offload.outside", Cached)
    asked = ask(6, kinds=("outside", "fiddler"))
    tried = {p.candidate.kind: p for p in _search(asked, Player(asked))}
    assert set(tried) == {"outside", "fiddler"}
    assert tried["outside"].summary is not None


def test_what_is_chosen_is_the_best_that_an_engine_runs(answer: Answer) -> None:
    able = [p for p in answer.finals if p.candidate.engine]
    assert answer.chosen in able
    assert answer.chosen.rate(answer.ask) == max(p.rate(answer.ask) for p in able)
    assert not answer.fits
    assert answer.resident.summary is None
    assert answer.resident.reasons


def test_the_best_of_each_engine_is_run_long(answer: Answer) -> None:
    able = {p.candidate.engine for p in answer.tried if p.summary is not None}
    assert {p.candidate.engine for p in answer.finals} == able
    assert {"llama.cpp", "KTransformers", "Fiddler", "expert cache"} <= able


def test_figures_are_of_other_requests_than_the_choice(answer: Answer) -> None:
    long = {p.scenario_hash for p in answer.finals}
    assert not long & {p.scenario_hash for p in answer.tried}
    assert answer.scenario.seed == answer.ask.seed + 1


def test_memory_is_that_of_the_device_to_the_byte(report: dict[str, Any]) -> None:
    memory = report["memory"]
    assert memory["usable_bytes"] == 6 << 20
    assert memory["expert_bytes"] == EXPERT
    assert memory["experts"] == 64
    held = memory["by"].get("expert_weights", 0) + memory["by"].get("expert_cache", 0)
    assert memory["experts_on_device"] == held // EXPERT
    assert sum(size for name, size in memory["by"].items() if name != "kv_peak") <= 6 << 20


def test_more_memory_and_fewer_bits_do_not_hurt(report: dict[str, Any]) -> None:
    gain = {w["label"]: w["gain"] for w in report["what_if"]}
    assert gain["0.75 times the device memory"] < 0 < gain["1.5 times the device memory"]
    assert gain["experts in int4 (other results of the model)"] > 0


def test_the_interval_holds_the_estimate(report: dict[str, Any]) -> None:
    for final in report["finals"]:
        low, high = final["expected_tok_per_s"]["interval90"]
        assert 0 < low < final["expected_tok_per_s"]["value"] < high


def test_the_rate_is_that_of_whole_requests(answer: Answer) -> None:
    summary = answer.chosen.summary
    assert summary is not None
    whole = summary["ttft_ms"]["mean"] + 11 * summary["tpot_ms"]["mean"]
    assert answer.chosen.rate(answer.ask) == pytest.approx(12 / whole * 1e3)
    # one request at a time, of that very length: what the simulation says of output tokens a second
    assert answer.chosen.rate(answer.ask) == pytest.approx(summary["throughput"]["output_tok_per_s"], rel=1e-6)


def test_text_names_the_choice_and_each_engine(report: dict[str, Any]) -> None:
    text = render(report)
    assert f"offload: {report['chosen']['label']}" in text
    assert "infeasible" not in text
    for engine, flags in report["flags"].items():
        assert f"  {engine}: {flags}" in text
    assert max(map(len, text.splitlines())) < 400


def test_flags_by_hand(answer: Answer) -> None:
    flags = engine_flags(answer)
    by = {p.candidate.kind: p for p in answer.finals}
    llama, kt = by["llama_cpp"].summary, by["ktransformers"].summary
    assert llama is not None
    assert kt is not None
    layers = llama["memory"]["hbm"]["by"]["expert_weights"] // (16 * EXPERT)  # whole layers on the device
    assert f"--n-cpu-moe {4 - layers} " in flags["llama.cpp"]
    number = kt["memory"]["hbm"]["by"]["expert_weights"] // EXPERT // 4
    assert f"--kt-num-gpu-experts {number} " in flags["KTransformers"]
    assert "--max-total-tokens 32" in flags["KTransformers"]  # 16 + 12 of one request, in blocks of 16


def test_everything_fits() -> None:
    fits = explain_offload(ask(1024))
    assert fits.fits
    assert fits.chosen.candidate == RESIDENT
    assert fits.runs == 2
    report = to_json(fits)
    assert report["flags"] == {}
    assert report["memory"]["experts_on_device"] == 64
    assert "everything fits" in render(report)


def test_nothing_fits_says_each_reason_once() -> None:
    with pytest.raises(Infeasible) as told:
        explain_offload(ask(1))
    reasons = [reason.partition(": ")[2] for reason in told.value.reasons[1:]]
    assert len(set(reasons)) == len(reasons)
    assert any("bytes are missing" in reason for reason in reasons)


def test_kinds_asked_for_are_all_that_is_tried() -> None:
    only = explain_offload(ask(6, kinds=("expert_split",)))
    assert {p.candidate.kind for p in (*only.tried, *only.finals)} == {"expert_split"}
    assert only.chosen.candidate.kind == "expert_split"  # no engine has it, and it was asked for


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kinds": ("cache",)}, "unknown kind of offload 'cache'"),
        ({"trace": Path("nowhere.npz")}, "no such file or folder: nowhere.npz"),
        ({"home": "tape"}, "home"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        explain_offload(ask(6, **change))


def test_a_dense_model_has_nothing_to_offload() -> None:
    with pytest.raises(BadInput, match="dense model"):
        explain_offload(Ask("rtx_4090", "qwen3-8b"))


def test_more_memory_than_there_is() -> None:
    with pytest.raises(BadInput, match="more than rtx_4090 has: 24 GiB"):
        explain_offload(ask(25 * 1024))


def test_a_scenario_file_is_changed_by_what_was_asked() -> None:
    asked = Ask(str(ROOT / "workloads" / "offload_qwen3_30b_4090.yaml"), concurrency=3, prompt_tokens=100)
    scenario = Base(asked).scenario(("policies.eviction=lfu",), asked.short, 5)
    assert scenario.seed == 5
    assert scenario.requests is not None
    assert scenario.requests.concurrency == 3
    assert scenario.tiers is not None
    assert scenario.tiers.kv_tokens == 3 * 23 * 16  # 356 tokens are 23 blocks
    assert scenario.policies.kinds["eviction"] == "lfu"


def test_a_player_remembers_runs() -> None:
    player = Player(ask(1024))
    first = player.play(RESIDENT, ask(1024).short, 0)
    again = player.play(Candidate("x", "none", "by another name", RESIDENT.changes), ask(1024).short, 0)
    assert player.runs == 1
    assert again.summary is first.summary
    assert again.candidate.label == "by another name"


def test_a_question_about_a_whole_device_is_answered() -> None:
    """No memory is left to ask what more of it would buy."""
    told = explain_offload(Ask("rtx_4090", "mixtral-8x7b", 24.0, None, 1, 8, 4, kinds=("llama_cpp",)))
    assert told.what_if[0].label == "0.75 times the device memory"
    assert not any("memory" in w.label for w in told.what_if[1:])
    part = explain_offload(Ask("rtx_4090", "mixtral-8x7b", None, None, 1, 8, 4, kinds=("llama_cpp",)))
    assert "1.11 times the device memory" in [w.label for w in part.what_if]  # an engine takes 0.9 of it
    flags = engine_flags(part)["llama.cpp"]
    assert "-c 16 -np 1 " in flags


def test_what_a_scenario_says_of_tiers_is_no_hindrance(tmp_path: Path) -> None:
    """Its policies and its division of memory are what is searched; dtypes of its model stay in what-ifs."""
    file = tmp_path / "s.yaml"
    file.write_text(
        "model: {name: mixtral-8x7b, weight_dtype: fp8_block}\n"
        "cluster: {device: rtx_4090, gpus_per_node: 1}\n"
        "requests: {format: closed_loop, concurrency: 1, num_requests: 1, prompt_tokens: 8, output_tokens: 4}\n"
        "tiers: {experts: 2 GiB}\n"
        "policies: {offload: cached, eviction: lfu, prefetch: markov, precision: {kind: uniform, width: 8}}\n"
    )
    overrides = ("tiers.cpu.gb_per_s=100", "policies.precision={kind: mote}")
    asked = Ask(str(file), None, 16.0, None, 1, 8, 4, kinds=("llama_cpp",), overrides=overrides)
    base = Base(asked)
    whole = base.scenario(RESIDENT.changes, asked.short, 0)
    assert whole.tiers is None
    assert "precision" not in whole.policies.kinds
    told = explain_offload(asked)
    assert told.scenario.tiers is not None
    assert told.scenario.tiers.cpu.gb_per_s == 100
    assert told.scenario.policies.kinds["precision"] == "mote"


def test_dtypes_of_the_model_stay_in_what_ifs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "model: {name: mixtral-8x7b, weight_dtype: fp8_block}\n"
        "cluster: {device: rtx_4090, gpus_per_node: 1}\n"
        "requests: {format: closed_loop, concurrency: 1, num_requests: 1, prompt_tokens: 8, output_tokens: 4}\n"
    )
    seen: list[str] = []
    play = Player.play

    def watched(self: Player, candidate: Candidate, *more: Any) -> Any:
        seen.extend(c for c in candidate.changes if c.startswith("model="))
        return play(self, candidate, *more)

    monkeypatch.setattr(Player, "play", watched)
    explain_offload(Ask(str(file), None, 16.0, None, 1, 8, 4, kinds=("llama_cpp",)))
    assert seen
    assert all('"weight_dtype": "fp8_block"' in change for change in seen)


def test_a_trace_that_cannot_be_read_is_bad_input_not_a_device_that_is_too_small(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not a readable"):
        explain_offload(ask(6, trace=broken))


def test_ranks_with_experts_of_their_own_hold_more_together() -> None:
    """Two ranks with half of the experts each, four fixed a layer on each."""
    asked = ask(6, overrides=(*SMALL, "cluster.gpus_per_node=2", "parallel.tp=2", "parallel.ep=2"))
    scenario = Base(asked).scenario(("policies.offload=fiddler",), asked.short, 0)
    summary = {"cache": {"slots": {"experts_per_layer": 8.0, "fixed_per_layer": 4.0, "cache_per_layer": 0.0}}}
    assert device_experts(scenario, summary) == 2 * 4 * 4
