"""Scenario files: what is accepted, what is refused and in which words, overrides, the hash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.errors import BadInput
from moesim.scenario.files import content_hash, home, names_in
from moesim.scenario.load import load_scenario, load_scenario_text, scenario_from_dict, scenario_schema

GOOD = """\
name: small
seed: 7
model: deepseek-v2-lite
cluster: {device: h100_sxm_datasheet, nodes: 1}
parallel: {dp: 8, ep: 8}
requests:
  format: poisson
  rate_per_s: 5
  num_requests: 20
  prompt_tokens: 100
  output_tokens: 10
"""


def problems(text: str, tmp_path: Path, overrides: list[str] | None = None) -> list[str]:
    (tmp_path / "s.yaml").write_text(text)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(BadInput) as caught:
            load_scenario("s.yaml", overrides or [])
    finally:
        os.chdir(here)
    return str(caught.value).splitlines()


def test_a_scenario_is_read_with_its_defaults() -> None:
    s = load_scenario_text(GOOD, Path())
    assert (s.name, s.seed) == ("small", 7)
    assert (s.parallel.tp, s.parallel.dp, s.parallel.ep, s.parallel.replicas, s.parallel.pp) == (1, 8, 8, 1, 1)
    assert s.model.num_experts == 64
    assert s.cluster.num_ranks == 8
    assert s.engine.max_num_seqs == 256
    assert s.slo is None
    assert s.policies.kinds == {
        "routing": "topk",
        "placement": "contiguous",
        "dispatch": "local_first",
        "offload": "none",
        "batching": "vllm_v1",
        "balancer": "round_robin",
    }


def test_routing_defaults_to_what_the_router_does() -> None:
    s = load_scenario_text(GOOD, Path(), ["model=deepseek-v3", "parallel.ep=8", "model.kv_dtype=fp8"])
    assert s.policies.kinds["routing"] == "grouped_topk"
    assert s.model.kv_dtype == "fp8"


def test_all_errors_are_told_at_once_with_their_places(tmp_path: Path) -> None:
    text = """\
model: deepsek-v3
cluster: {device: h100_sxm_datashet, nodes: 0}
paralel: {tp: 1}
requests:
  format: poisson
  rate_per_s: -1
  num_requests: many
  prompt_tokens: 10
  output_tokens: 10
policies: {placement: eplbb, batching: {kind: vllm_v1, chunk: 4}}
engine:
  max_num_sequences: 12
seed: 1.5
mode: search
"""
    lines = problems(text, tmp_path)
    found = {line.split(": ")[0]: line for line in lines}
    assert "Did you mean 'deepseek-v3'" in found["s.yaml:1:8"]
    assert "cluster.nodes" in found["s.yaml:2:45"]
    assert "Did you mean 'h100_sxm_datasheet'" in found["s.yaml:2:19"]
    assert "Did you mean 'parallel'" in found["s.yaml:3:1"]
    assert "requests.rate_per_s" in found["s.yaml:6:15"]
    assert "requests.num_requests" in found["s.yaml:7:17"]
    assert "Did you mean 'eplb'" in found["s.yaml:10:23"]
    assert "Did you mean 'max_num_seqs'" in found["s.yaml:12:3"]
    assert "seed" in found["s.yaml:13:7"]
    assert "mode: should be 'serving' or 'training'" in found["s.yaml:14:7"]
    assert lines == sorted(lines, key=lambda line: int(line.split(":")[1]))


@pytest.mark.parametrize(
    ("extra", "place", "words"),
    [
        ("engine: {enable_prefix_caching: true}\n", "12:10", "prefix caching is not simulated yet"),
        ("engine: {num_speculative_tokens: 3}\n", "12:10", "speculative decoding is not simulated yet"),
        ("disaggregation: {prefill: 2, decode: 4}\n", "12:1", "disaggregation is not simulated yet"),
    ],
)
def test_what_is_not_simulated_is_refused(extra: str, place: str, words: str, tmp_path: Path) -> None:
    lines = problems(GOOD + extra, tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith(f"s.yaml:{place}: ")
    assert words in lines[0]


def test_pipeline_parallelism_is_refused_and_its_absence_is_not(tmp_path: Path) -> None:
    assert load_scenario_text(GOOD, Path(), ["parallel.pp=1", "engine.enable_prefix_caching=false"]).parallel.pp == 1
    lines = problems(GOOD, tmp_path, ["parallel.pp=2"])
    assert lines == ["--set parallel.pp=2: parallel.pp: pipeline parallelism is not simulated yet; remove parallel.pp"]


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["parallel.dp=16"], "s.yaml:5:11", "needs replicas * tp * dp = 1 * 1 * 16 = 16 devices"),
        (["parallel.replicas=2"], "s.yaml:5:11", "set cluster.nodes to 2"),
        (["parallel.ep=3"], "--set parallel.ep=3", "parallel.ep must divide tp * dp: ep=3, tp * dp = 8"),
        (["parallel.tp=3", "parallel.dp=1", "parallel.ep=1"], "--set parallel.tp=3", "must divide the attention heads"),
        (
            ["policies.placement={kind: eplb, num_redundant_experts: 3}"],
            "s.yaml:5:23",
            "64 experts + 3 redundant = 67 slots",
        ),
        (["model=llama-3.1-8b"], "s.yaml:5:23", "dense model"),
        (["engine.max_num_seqs=9000"], "--set engine.max_num_seqs=9000", "max_num_seqs must not exceed"),
        (["engine.max_model_len=1000000000"], "--set engine.max_model_len=1000000000", "positions"),
        (["model.name=nope"], "--set model.name=nope", "unknown model 'nope'"),
        (["cluster.device=h100"], "--set cluster.device=h100", "Did you mean 'h100"),
        (["slo={}"], "--set slo={}", "at least one of ttft_ms"),
        (["name=a/b"], "--set name=a/b", "name"),
        (["requests={format: azure, path: no.csv}"], "--set requests={", "no such file"),
        (["routing.path=no.npz"], "--set routing.path=no.npz", "no such file"),
    ],
)
def test_disagreements_name_rule_facts_and_mend(overrides: list[str], where: str, words: str, tmp_path: Path) -> None:
    lines = problems(GOOD, tmp_path, overrides)
    assert any(line.startswith(where) and words in line for line in lines), lines


def test_experts_split_over_ranks_must_divide_their_size(tmp_path: Path) -> None:
    text = GOOD.replace("deepseek-v2-lite", "gpt-oss-20b").replace("nodes: 1", "nodes: 64")
    lines = problems(text, tmp_path, ["parallel={tp: 1, dp: 512, ep: 1}"])
    assert len(lines) == 1
    assert "512 / 1 = 512 ranks, which must divide its intermediate size 2880. Use ep 8, " in lines[0]


# ---- overrides


def test_overrides_set_make_and_index() -> None:
    s = load_scenario_text(
        GOOD,
        Path(),
        [
            "parallel.dp=4",
            "parallel.ep=4",
            "slo.ttft_ms=2 s",
            "engine.graph_batch_sizes=[1, 2, 4]",
            "engine.graph_batch_sizes.2=8",
            "policies.placement.num_redundant_experts=8",
            "policies.placement.kind=eplb",
            "requests.prompt_tokens={distribution: lognormal, mean: 1e2, cv: 0.5}",
        ],
    )
    assert s.parallel.ep == 4
    assert s.slo is not None
    assert s.slo.ttft_ms == 2000
    assert s.engine.graph_batch_sizes == (1, 2, 8)
    assert s.policies.placement.num_redundant_experts == 8  # type: ignore[attr-defined]
    assert s.raw["policies"]["placement"] == {"num_redundant_experts": 8, "kind": "eplb"}


def test_the_last_override_wins_and_seed_wins_over_all() -> None:
    assert load_scenario_text(GOOD, Path(), ["seed=3", "seed=4"]).seed == 4
    s = load_scenario_text(GOOD, Path(), ["seed=3"], seed=5)
    assert s.seed == 5
    assert s.raw["seed"] == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel", "key=value"),
        ("=3", "key=value"),
        ("parallel..tp=3", "key=value"),
        ("seed.deeper=3", "holds a value"),
        ("engine.graph_batch_sizes=[1, .nan]", "not a finite number"),
        ("engine={a: 1, a: 2}", "again"),
        ("parallel.tp=[1", "not YAML"),
        ("parallel.tp=2\n---\n3", "second document"),
        (".".join("a" * 30) + "=1", "keys deep"),
    ],
)
def test_overrides_that_cannot_be_applied_say_so(override: str, words: str, tmp_path: Path) -> None:
    lines = problems(GOOD, tmp_path, [override])
    assert "".join(lines).startswith("--set ")
    assert words in "".join(lines)


def test_a_path_of_an_override_is_from_the_current_folder_or_the_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    header = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,2\n"
    (tmp_path / "a" / "in_a.csv").write_text(header)
    (tmp_path / "b" / "in_b.csv").write_text(header)
    text = GOOD[: GOOD.index("requests:")] + "requests: {format: csv_lengths, path: in_a.csv}\n"
    (tmp_path / "a" / "s.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "b")
    by_scenario = load_scenario("../a/s.yaml")
    by_cwd = load_scenario("../a/s.yaml", ["requests.path=in_b.csv"])
    assert (by_scenario.base / str(by_scenario.requests.path)).is_file()
    assert (by_cwd.base / str(by_cwd.requests.path)).is_file()
    assert by_scenario.hash != by_cwd.hash  # the file's name is part of it
    (tmp_path / "b" / "in_a.csv").write_text(header)
    assert load_scenario("../a/s.yaml", ["requests.path=in_a.csv"]).hash == by_scenario.hash


# ---- the hash


def test_the_hash_follows_content_not_places(tmp_path: Path) -> None:
    first = load_scenario_text(GOOD, Path()).hash
    assert load_scenario_text("# a comment\n" + GOOD, tmp_path).hash == first
    assert load_scenario_text(GOOD, Path(), ["parallel.tp=1"]).hash == first
    assert load_scenario_text(GOOD, Path(), ["engine.max_num_seqs=255"]).hash != first
    assert load_scenario_text(GOOD, Path(), seed=8).hash != first
    assert scenario_from_dict(load_scenario_text(GOOD, Path()).raw, Path()).hash == first


def test_the_hash_sees_a_changed_file(tmp_path: Path) -> None:
    model = (home() / "workloads/models/deepseek-v2-lite.yaml").read_text()
    (tmp_path / "m.yaml").write_text(model)
    text = GOOD.replace("deepseek-v2-lite", "m.yaml")
    first = load_scenario_text(text, tmp_path).hash
    (tmp_path / "m.yaml").write_text(model.replace("num_layers: 27", "num_layers: 28"))
    assert load_scenario_text(text, tmp_path).hash != first


def test_the_hash_is_the_same_in_every_process() -> None:
    program = (
        "import sys; from pathlib import Path; from moesim.scenario.load import load_scenario_text;"
        "print(load_scenario_text(sys.stdin.read(), Path()).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=GOOD,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert hashes == {load_scenario_text(GOOD, Path()).hash + "\n"}


def test_a_folder_is_hashed_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"1")
    first = content_hash(tmp_path)
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    assert content_hash(tmp_path) != first
    (tmp_path / "b.npy").rename(tmp_path / "a.npy")
    assert content_hash(tmp_path) == first


# ---- files


def test_a_config_json_is_read_by_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(config))
    for name in ("my-model", "my-model/config.json"):
        s = load_scenario_text(GOOD.replace("deepseek-v2-lite", name), tmp_path)
        assert s.model.num_experts == 8


def test_a_broken_model_file_is_told_with_its_own_places(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("name: x\nnum_layer: 3\n")
    lines = problems(GOOD.replace("deepseek-v2-lite", "./m.yaml"), tmp_path)
    assert any(line.startswith("m.yaml:2:1: ") and "num_layers" in line for line in lines), lines


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]\n", "just text\n"])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    lines = problems(text, tmp_path)
    assert lines
    assert all(line.startswith("s.yaml") for line in lines)


def test_every_shipped_model_and_profile_loads() -> None:
    for name in names_in("workloads/models"):
        s = load_scenario_text(GOOD, Path(), [f"model={name}", "parallel={}"])
        assert s.model.total_params() > 1e6
    for name in names_in("hw_profiles"):
        assert load_scenario_text(GOOD, Path(), [f"cluster={{device: {name}}}", "parallel={}"]).cluster.num_ranks >= 1


def test_the_home_folder_can_be_named_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESIM_HOME", str(tmp_path))
    with pytest.raises(BadInput, match="MOESIM_HOME"):
        home()


# ---- the schema


def test_the_schema_lists_keys_and_policy_kinds() -> None:
    schema = scenario_schema()
    text = json.dumps(schema, allow_nan=False)
    assert {"model", "cluster", "parallel", "requests", "routing", "policies", "engine", "slo"} <= set(
        schema["properties"]
    )
    placement = schema["$defs"]["PoliciesSpec"]["properties"]["placement"]["anyOf"]
    assert "eplb" in placement[0]["enum"]
    assert any("num_redundant_experts" in option.get("properties", {}) for option in placement)
    names = {ref.split('"')[0] for ref in text.split("#/$defs/")[1:]}
    assert names <= set(schema["$defs"])
