"""Exports: the scenario comes back as it was simulated, commands hold options that the engines have, maps are accepted,
nothing that the study set is lost."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from moesim_tuner.definition import Definition
from moesim_tuner.evaluate import evaluate
from moesim_tuner.export import ENGINES, MARKER, export, scenario_of, varied
from moesim_tuner.export.options import OPTIONS, SOURCES, check, check_keys
from moesim_tuner.records import Candidate, Trial
from moesim_tuner.study import finish

from moesim.errors import BadInput
from moesim.exports.checks import sglang as sglang_rules
from moesim.exports.checks import trtllm as trtllm_rules
from moesim.exports.checks import vllm as vllm_rules
from moesim.scenario.load import load_scenario, load_scenario_text
from moesim.scenario.yamlio import parse_yaml
from moesim.tune_spec import RungSpec

SERVING = """
name: small
model: olmoe-1b-7b
cluster: {device: h100_sxm, nodes: 1, gpus_per_node: 4}
parallel: {dp: 4, ep: 4}
requests: {format: closed_loop, concurrency: 8, num_requests: 8, prompt_tokens: 16, output_tokens: 4}
routing: {popularity_zipf: 0.9, pool_tokens: 256, fidelity: count}
policies: {batching: vllm_v1}
engine: {bank_entries: 1}
tune:
  space:
    layout:
      choices:
        dp4: {parallel.tp: 1, parallel.dp: 4, parallel.ep: 4}
        tp2: {parallel.tp: 2, parallel.dp: 2, parallel.ep: 4}
        half: {parallel.tp: 1, parallel.dp: 4, parallel.ep: 2}
    engine.max_num_seqs: {choices: [8, 16]}
    engine.max_num_batched_tokens: {choices: [64, 128]}
    policies.placement: {choices: [contiguous, eplb, {kind: eplb_swap, num_redundant_experts: 4}]}
    policies.placement.num_redundant_experts: {choices: [0, 4], when: {policies.placement: eplb}}
    policies.batching.long_prefill_token_threshold: {choices: [0, 32]}
    routing.popularity_zipf: {choices: [0.9, 1.0]}
  objectives: [output_tok_per_s]
"""

TRAINING = """
name: small_training
mode: training
model: stdlib-moe-16e
cluster: {device: h100_sxm, nodes: 1, gpus_per_node: 4}
parallel: {dp: 4, ep: 4}
capacity: {factor: 1.25, pad: true}
training: {sequence_tokens: 64, global_batch_sequences: 8, steps: 1, routing_tokens: 64}
tune:
  space:
    capacity.factor: {choices: [1.0, 1.25]}
    capacity.drop: {choices: [position, score, reroute]}
    training.recompute: {choices: [none, selective, full]}
    training.zero_stage: {choices: [0, 1, 2, 3]}
  objectives: [tok_per_s]
"""

OFFLOAD = """
name: small_offload
model: olmoe-1b-7b
cluster: {device: rtx_4090, gpus_per_node: 1}
requests: {format: closed_loop, concurrency: 1, num_requests: 1, prompt_tokens: 8, output_tokens: 2}
routing: {popularity_zipf: 0.5, pool_tokens: 2048}
tiers: {vram: 8 GiB, kv_tokens: 1024}
policies: {offload: cached}
engine: {max_num_seqs: 2, max_num_batched_tokens: 64}
tune:
  space:
    policies.offload: {choices: [ktransformers, llama_cpp, cached]}
    policies.offload.strategy: {choices: [uniform, frequency], when: {policies.offload: ktransformers}}
    engine.max_num_batched_tokens: {choices: [32, 64]}
  objectives: [output_tok_per_s]
"""


@dataclass
class Study:
    """A study of one trial."""

    name: str
    definition: Definition
    trials: list[Trial]


@functools.cache
def tried(text: str, point: str, fields: tuple[str, ...], base: Path, seeds: int) -> tuple[Definition, Trial]:
    scenario = load_scenario_text(text, base)
    assert scenario.tune is not None
    rungs = (RungSpec(set={"requests.num_requests": 2}), RungSpec(seeds=seeds))
    definition = Definition(
        text, scenario.name, str(base), scenario.tune, "random", rungs, fields=fields, scenario_hash=scenario.hash
    )
    values = json.loads(point)
    rows = [[evaluate(task) for task in definition.tasks(values, 1)]] * 2
    return definition, finish(definition, 0, Candidate(values, "tpe"), rows, 0.0)


def study(
    text: str, point: Mapping[str, Any], fields: tuple[str, ...] = (), base: Path = Path(), seeds: int = 1
) -> Study:
    definition, trial = tried(text, json.dumps(point), fields, base, seeds)
    return Study(definition.name, definition, [trial])


DP4 = {
    "layout": "dp4", "engine.max_num_seqs": 16, "engine.max_num_batched_tokens": 128, "policies.placement": "eplb",
    "policies.placement.num_redundant_experts": 4, "policies.batching.long_prefill_token_threshold": 32,
    "routing.popularity_zipf": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    out = tmp_path_factory.mktemp("export") / "out"
    found = study(SERVING, DP4, seeds=2)
    export(found, 0, out)
    return found, out


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def words_of(out: Path, engine: str) -> list[str]:
    report = json.loads((out / MARKER).read_text())
    (one,) = [e for e in report["engines"] if e["engine"] == engine]
    return list(one["command"])


# ---- the scenario


def test_the_scenario_simulates_to_the_trial(served: tuple[Study, Path]) -> None:
    found, out = served
    scenario = load_scenario(out / "scenario.yaml")
    assert scenario.hash == found.trials[0].scenario_hash
    assert scenario.tune is None
    text = (out / "scenario.yaml").read_text()
    assert "Trial 0 of the study small (tpe)" in text
    assert "output_tok_per_s = " in text


def test_a_scenario_elsewhere_finds_its_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "lengths.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,16,4\n" * 4)
    text = re.sub(r"requests: \{.*\}", "requests: {format: csv, path: lengths.csv}", SERVING)
    found = study(text, DP4, fields=("seed=5",), base=base)
    assert found.trials[0].state == "complete", found.trials[0].reasons
    export(found, 0, tmp_path / "far" / "out", ["vllm"])
    assert load_scenario(tmp_path / "far" / "out" / "scenario.yaml").hash == found.trials[0].scenario_hash


def test_the_tune_section_stays_where_it_is_asked_for(tmp_path: Path) -> None:
    found = study(SERVING, DP4)
    export(found, 0, tmp_path / "out", ["vllm"], keep_tune=True)
    scenario = load_scenario(tmp_path / "out" / "scenario.yaml")
    assert scenario.tune == found.definition.spec
    assert scenario.hash == found.trials[0].scenario_hash


# ---- engines


def test_limits_are_said_as_each_engine_counts_them(served: tuple[Study, Path]) -> None:
    _, out = served
    vllm, sglang, trtllm = (words_of(out, engine) for engine in ("vllm", "sglang", "trtllm"))
    assert option(vllm, "--max-num-seqs") == "16"
    assert option(vllm, "--data-parallel-size") == "4"
    assert option(vllm, "--long-prefill-token-threshold") == "32"
    assert "--enable-expert-parallel" in vllm
    assert option(sglang, "--tp-size") == option(sglang, "--dp-size") == option(sglang, "--ep-size") == "4"
    assert option(sglang, "--max-running-requests") == "64"  # of the whole server
    assert option(sglang, "--chunked-prefill-size") == "512"
    assert option(sglang, "--ep-num-redundant-experts") == "4"
    assert option(trtllm, "--max_batch_size") == "16"
    options, _ = parse_yaml((out / "trtllm_options.yaml").read_text(), "options")
    assert options["enable_attention_dp"] is True
    assert options["moe_config"]["load_balancer"] == f"{out}/moe_load_balancer.yaml"


def test_maps_are_those_that_the_trial_ran_with_and_engines_take_them(served: tuple[Study, Path]) -> None:
    found, out = served
    model = scenario_of(found.definition, found.trials[0]).model
    text = (out / "sglang_expert_location.json").read_text()
    assert sglang_rules.check(text, model.num_experts, 4, model.num_layers, "map") == []
    load_balancer = (out / "moe_load_balancer.yaml").read_text()
    assert trtllm_rules.check(load_balancer, model.num_experts, 4, model.moe_layers, "map") == []
    rows = json.loads(text)["physical_to_logical_map"]
    table, _ = parse_yaml(load_balancer, "map", number_keys=True)
    assigned = {int(layer): row for layer, row in table["initial_global_assignments"].items()}
    assert [rows[i] for i in model.moe_layers] == [assigned[i] for i in model.moe_layers]
    config = option(words_of(out, "vllm"), "--eplb-config")
    assert vllm_rules.check(config, model.num_experts, 4, "config") == []


def test_nothing_that_the_study_set_is_lost(served: tuple[Study, Path]) -> None:
    """Each field is carried by an option or listed. The popularity of experts is no engine's to set."""
    found, out = served
    report = json.loads((out / MARKER).read_text())
    assert set(varied(found.definition, found.trials[0])) >= {"parallel.ep", "policies.placement"}
    for one in report["engines"]:
        assert "routing.popularity_zipf" in one["not_set_by_flags"], one["engine"]
        script = (out / f"{one['engine']}.sh").read_text()
        assert all(f"# not set by flags: {path} = " in script for path in one["not_set_by_flags"])
    by_engine = {one["engine"]: one["not_set_by_flags"] for one in report["engines"]}
    assert "policies.batching.long_prefill_token_threshold" in by_engine["sglang"]
    assert "policies.batching.long_prefill_token_threshold" not in by_engine["vllm"]


def test_a_script_is_the_command(served: tuple[Study, Path]) -> None:
    _, out = served
    for engine in ("vllm", "sglang", "trtllm"):
        text = "".join(line for line in (out / f"{engine}.sh").read_text().splitlines(True) if line[0] != "#")
        assert shlex.split(text.replace("\\\n", " ")) == words_of(out, engine)


def test_layouts_that_an_engine_has_not(tmp_path: Path) -> None:
    export(study(SERVING, {**DP4, "layout": "tp2"}), 0, tmp_path / "tp2")
    told = {e["engine"]: e["not_set_by_flags"] for e in json.loads((tmp_path / "tp2" / MARKER).read_text())["engines"]}
    assert {"parallel.tp", "parallel.dp"} <= set(told["trtllm"])  # attention: all of one kind
    assert not {"parallel.tp", "parallel.dp", "parallel.ep"} & {*told["vllm"], *told["sglang"]}
    half = {**DP4, "layout": "half", "policies.placement": "contiguous"}
    del half["policies.placement.num_redundant_experts"]
    export(study(SERVING, half), 0, tmp_path / "half")
    told = {e["engine"]: e["not_set_by_flags"] for e in json.loads((tmp_path / "half" / MARKER).read_text())["engines"]}
    assert "parallel.ep" in told["vllm"]  # all ranks or one
    assert "parallel.ep" not in told["sglang"]
    assert not list((tmp_path / "half").glob("*location*"))  # experts in order: engines start so


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_training_goes_to_megatron(zero: int, tmp_path: Path) -> None:
    point = {
        "capacity.factor": 1.0,
        "capacity.drop": {1: "position", 2: "reroute", 3: "score"}[zero],
        "training.recompute": {1: "selective", 2: "full", 3: "none"}[zero],
        "training.zero_stage": zero,
    }
    found = study(TRAINING, point)
    assert found.trials[0].state == "complete", found.trials[0].reasons
    made = export(found, 0, tmp_path / "out")
    (one,) = made.engines
    words = list(one.words)
    assert one.engine == "megatron"
    assert option(words, "--moe-expert-capacity-factor") == "1.0"
    assert "--moe-pad-expert-input-to-capacity" in words
    assert option(words, "--expert-model-parallel-size") == "4"
    assert ("--use-megatron-fsdp" in words) == (zero > 1)
    assert "--use-distributed-optimizer" in words
    if zero == 2:
        assert set(one.unset) == {"capacity.drop"}
    else:
        assert option(words, "--moe-token-drop-policy") == ("position" if zero == 1 else "probs")
        assert not one.unset
    if zero == 1:
        assert words[words.index("--recompute-modules") + 1 :][:2] == ["layernorm", "moe_act"]


@pytest.mark.parametrize(("kind", "flag"), [("ktransformers", "--kt-num-gpu-experts"), ("llama_cpp", "--n-cpu-moe")])
def test_offload_goes_to_its_own_engine(kind: str, flag: str, tmp_path: Path) -> None:
    point = {"policies.offload": kind, "engine.max_num_batched_tokens": 32}
    if kind == "ktransformers":
        point["policies.offload.strategy"] = "frequency"
    made = export(study(OFFLOAD, point), 0, tmp_path / "out")
    (one,) = made.engines
    assert one.engine == kind
    assert not one.unset
    experts = int(option(list(one.words), flag))
    assert 0 < experts < (64 if kind == "ktransformers" else 16)


def test_what_no_engine_runs_is_said(tmp_path: Path) -> None:
    found = study(OFFLOAD, {"policies.offload": "cached", "engine.max_num_batched_tokens": 32})
    made = export(found, 0, tmp_path / "out")
    assert not made.engines
    assert set(made.left_out) == set(ENGINES)
    assert "cached" in str(made)
    assert (tmp_path / "out" / "scenario.yaml").is_file()


# ---- refusals


@pytest.mark.parametrize(
    ("engines", "told"),
    [(["vlm"], "engines are"), (["megatron"], "Megatron-LM trains"), (["vllm", "ktransformers"], "host memory")],
)
def test_engines_that_cannot_be(engines: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told):
        export(study(SERVING, DP4), 0, tmp_path / "out", engines)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match=MARKER):
        export(study(SERVING, DP4), 0, out, ["vllm"])
    assert [f.name for f in out.iterdir()] == ["thesis.tex"]
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_a_changed_file_is_told(tmp_path: Path) -> None:
    found = study(SERVING, DP4)
    old = found.trials[0]
    found.trials = [Trial(**{**{f: getattr(old, f) for f in Trial.__dataclass_fields__}, "scenario_hash": "0" * 16})]
    assert "has changed since" in str(export(found, 0, tmp_path / "out", ["vllm"]))


# ---- the options themselves


def test_checks_refuse_what_a_parser_would() -> None:
    assert check("vllm", ["vllm", "serve", "m", "--max-num-seqs", "8", "--enable-dbo"]) == []
    assert check("vllm", ["vllm", "--max-num-seq", "8"]) == ["vllm has no option '--max-num-seq'"]
    assert "int is needed" in check("vllm", ["vllm", "--max-num-seqs", "many"])[0]
    assert "needs a value" in check("vllm", ["vllm", "--max-num-seqs"])[0]
    assert "needs a value" in check("vllm", ["vllm", "--max-num-seqs", "--enable-dbo"])[0]
    assert "one of" in check("vllm", ["vllm", "--all2all-backend", "pigeon"])[0]
    assert "twice" in check("vllm", ["vllm", "--enable-dbo", "--enable-dbo"])[0]
    assert "json" in check("vllm", ["vllm", "--eplb-config", "{"])[0]
    assert check_keys({"moe_config": {"backend": "WIDEEP"}, "enable_attention_dp": True}) == []
    assert "not permitted" in check_keys({"moe_config": {"balancer": "x"}})[0]
    assert "bool is needed" in check_keys({"enable_attention_dp": 1})[0]


def test_every_engine_names_its_source() -> None:
    assert set(OPTIONS) == set(SOURCES) == set(ENGINES)
