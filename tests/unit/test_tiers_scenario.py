"""Scenarios with memory tiers: what is read, what is refused and how, and memory to the byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput, Infeasible
from moesim.layout import Layout
from moesim.offload import OffloadPlan
from moesim.scenario.load import Scenario, load_scenario_text, scenario_schema
from moesim.tiers.memory import budget_of, home_use, require, with_plans
from tests.build import scenario, tiny_model

TIERS = {"kv_tokens": 4096}
CACHED = {"offload": "cached"}
EXPERT = 3 * 256 * 128 * 2  # gate, up, down of the tiny model in bf16
KV_BLOCK = 16 * 2 * 8 * 32 * 2  # 16 tokens, keys and values of 8 heads of 32, bf16: one layer
GIB = 2**30

GOOD = """\
model: qwen3-30b-a3b
cluster: {device: rtx_4090, nodes: 1, gpus_per_node: 2}
requests: {format: poisson, rate_per_s: 1, num_requests: 4, prompt_tokens: 10, output_tokens: 10}
tiers: {kv_tokens: 4096}
policies: {offload: cached}
"""


def told(overrides: list[str], text: str = GOOD) -> list[str]:
    with pytest.raises(BadInput) as error:
        load_scenario_text(text, Path(), overrides)
    return [f"{p.where}: {p.message}" for p in error.value.problems]


def test_tiers_and_its_policies_are_read_overridden_and_hashed() -> None:
    plain = load_scenario_text(GOOD, Path())
    assert plain.tiers is not None
    assert (plain.tiers.kv_tokens, plain.tiers.home, plain.tiers.cpu.sync_us) == (4096, "dram", 40.0)
    other = load_scenario_text(GOOD, Path(), ["tiers.cpu.sync_us=1 ms", "policies.eviction.kind=lru"])
    assert other.tiers is not None
    assert other.tiers.cpu.sync_us == pytest.approx(1000.0)
    assert other.policies.kinds["eviction"] == "lru"
    assert other.resolved["tiers"]["cpu"]["sync_us"] == pytest.approx(1000.0)
    assert plain.hash != other.hash
    without = load_scenario_text(GOOD.replace("tiers: {kv_tokens: 4096}", "").replace("cached", "none"), Path())
    assert "tiers" not in without.resolved


def test_a_profile_of_a_cpu_enters_by_its_content() -> None:
    found = load_scenario_text(GOOD, Path(), ["tiers.cpu.profile=cpu_epyc_1thread"])
    assert found.cpu is not None
    assert found.resolved["tiers"]["cpu"]["profile"]["name"] == found.cpu.name
    assert "Did you mean 'cpu_epyc_1thread'" in told(["tiers.cpu.profile=cpu_epyc_1tread"])[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policies.offload=none"], "policies.offload says which experts stay on the device, and it is none"),
        (["tiers=null"], "nothing says how much there is of each"),
        (["tiers={}"], "Give kv_tokens"),
        (["tiers={kv_tokens: 16, experts: 1 GiB}"], "one of them gets what the other leaves"),
        (["tiers.vram=25 GiB"], "25 GiB > 24 GiB of rtx_4090"),
        (["tiers.dram=1 TiB"], "1024 GiB > 128 GiB"),
        (["tiers.cpu.cores=17"], "17 > 16"),
        (["tiers.cpu={profile: cpu_epyc_1thread, gb_per_s: 10}"], "remove one"),
        (["parallel.dp=2"], "attention data parallelism are not simulated yet: dp=2"),
        (["parallel.tp=2", "cluster.gpus_per_node=1", "cluster.nodes=2"], "tp=2, gpus_per_node=1"),
        (["policies.placement={kind: eplb, num_redundant_experts: 2}"], "every expert has one home"),
        (["policies.dispatch=lp"], "plans whole batches"),
        (["policies.routing=balanced"], "balanced loads name no experts"),
        (["routing.fidelity=count"], "tiers need fidelity token"),
        (["rebalance={interval_steps: 10}", "policies.placement=eplb"], "not moved between ranks, too"),
        (["capacity={factor: 1.0}"], "not simulated yet; remove capacity"),
        (["tiers.kvtokens=1"], "Did you mean 'kv_tokens'"),
        (["tiers=x"], "should be a mapping"),
        (["tiers.chunk=1"], "tiers.chunk"),
        (["tiers.staging=0"], "tiers.staging"),
        (["model=qwen3-8b"], "a dense model and has no experts"),
    ],
)
def test_disagreements_are_told_in_one_message_each(overrides: list[str], words: str) -> None:
    lines = told(overrides)
    assert len(lines) == 1, lines
    assert words in lines[0]


def test_training_has_no_tiers() -> None:
    training = "mode: training\nmodel: qwen3-30b-a3b\ncluster: {device: h100_sxm}\ntraining: {steps: 2}\n"
    assert any("tiers: in training every expert stays" in line for line in told(["tiers.kv_tokens=1"], training))


def test_the_schema_has_tiers_and_the_families() -> None:
    schema = scenario_schema()
    assert {"kv_tokens", "experts", "home", "cpu"} <= set(schema["$defs"]["TiersSpec"]["properties"])
    eviction = schema["$defs"]["PoliciesSpec"]["properties"]["eviction"]["anyOf"]
    assert "lru" in eviction[0]["enum"]


# ---- memory


def tiered(tmp_path: Path, **tiers: object) -> Scenario:
    return scenario(tmp_path, tiers=tiers, policies=CACHED)


def layout_of(s: Scenario) -> Layout:
    return Layout.of(s.model, s.cluster, s.parallel.tp, s.parallel.dp, s.parallel.ep)


def plan_of(experts: int) -> OffloadPlan:
    """Three layers, so many experts fixed in the first, room for eight more in each."""
    fixed = np.zeros((3, 64), bool)
    fixed[0, :experts] = True
    none = np.zeros((3, 64), bool)
    return OffloadPlan(np.full(3, 8 * EXPERT), fixed, none, none)


def test_device_memory_is_divided_to_the_byte(tmp_path: Path) -> None:
    s = tiered(tmp_path, vram=1.5, kv_tokens=1000, staging=3)
    assert s.tiers is not None
    budget = budget_of(s.model, s.cluster, layout_of(s), s.engine, s.tiers, EXPERT)
    # embedding and head, final norm; attention and its norms in four layers; a dense layer; three routers
    dense = 2 * (2 * 1024 * 256 + 256 + 4 * (4 * 256 * 256 + 2 * 256) + 3 * 256 * 512 + 3 * 64 * 256)
    # residual, normed input, attention in and out, intermediates: 8,192 tokens of 3 + 4 hidden; logits of 256 rows
    activations = 8192 * 2 * (3 * 256 + 4 * 256) + 4 * 256 * 1024
    kv = 63 * 4 * KV_BLOCK  # 1,000 tokens are 63 blocks, in four layers
    fixed = dense + activations + GIB + 3 * EXPERT
    assert budget.memory.fixed == fixed
    assert budget.kv_bytes == kv
    assert budget.expert_bytes == int(1.5 * GIB) - fixed - kv
    size_LE = np.full((3, 64), EXPERT)
    memory = with_plans(budget, [plan_of(0), plan_of(5)], [size_LE] * 2, [0, 12_345])
    assert memory.expert_weights == 5 * EXPERT
    assert memory.expert_cache == 24 * EXPERT
    assert memory.kv_units == (int(1.5 * GIB) - fixed - 29 * EXPERT - 12_345) // KV_BLOCK
    assert memory.kv_units >= 63 * 4
    assert sum(v for k, v in memory.by_use().items() if k != "kv_cache") == memory.fixed


def test_experts_given_leave_the_rest_to_the_kv_cache(tmp_path: Path) -> None:
    s = tiered(tmp_path, vram=1.5, experts=29 * EXPERT / GIB)
    assert s.tiers is not None
    budget = budget_of(s.model, s.cluster, layout_of(s), s.engine, s.tiers, EXPERT)
    assert budget.expert_bytes == 29 * EXPERT
    memory = with_plans(budget, [plan_of(5)], [np.full((3, 64), EXPERT)], [0])
    assert memory.usable - memory.fixed - memory.kv_cache < KV_BLOCK
    with pytest.raises(Infeasible, match="The policy of offload must keep within"):
        with_plans(budget, [plan_of(6)], [np.full((3, 64), EXPERT)], [0])


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path: Path) -> None:
    s = tiered(tmp_path, vram=1.2, experts=0.5)
    assert s.tiers is not None

    def budget(model: object = s.model, tiers: object = s.tiers) -> object:
        return budget_of(model, s.cluster, layout_of(s), s.engine, tiers, EXPERT)  # type: ignore[arg-type]

    with pytest.raises(Infeasible) as error:
        require(s.model, s.cluster, layout_of(s), s.engine, s.tiers, budget(), budget)  # type: ignore[arg-type]
    reasons = error.value.reasons
    assert "tiers.vram 1.2 GiB" in reasons[0]
    largest = float(reasons[1].split(": ")[1].split()[0])
    fits = s.tiers.model_copy(update={"experts": largest - 0.001})
    assert budget(tiers=fits).expert_bytes == int((largest - 0.001) * GIB)  # type: ignore[attr-defined]
    wide = s.tiers.model_copy(update={"experts": "rest", "kv_tokens": 10_000_000})
    with pytest.raises(Infeasible, match=r"Largest tiers.kv_tokens that fits"):
        require(s.model, s.cluster, layout_of(s), s.engine, wide, budget(tiers=wide), budget)  # type: ignore[arg-type]


def test_homes_of_experts(tmp_path: Path) -> None:
    s = tiered(tmp_path, kv_tokens=16)
    assert s.tiers is not None
    stored = 3 * 64 * EXPERT
    host = home_use(s.cluster, s.tiers, stored, 10 * EXPERT, 2)
    assert [(t.name, t.used) for t in host] == [("dram", 2 * stored)]
    alone = s.tiers.model_copy(update={"host_copies": False})
    assert home_use(s.cluster, alone, stored, 10 * EXPERT, 1)[0].used == stored - 10 * EXPERT
    small = s.tiers.model_copy(update={"dram": (stored - 1) / GIB})
    with pytest.raises(Infeasible, match=r"1 are missing. Set tiers.dram"):
        home_use(s.cluster, small, stored, 0, 1)
    drives = small.model_copy(update={"home": "nvme"})
    cache, nvme = home_use(s.cluster, drives, stored, 0, 1)
    assert (cache.used, nvme.used) == (stored - 1, stored)
    tight = dataclasses.replace(s.cluster, profile=dataclasses.replace(
        s.cluster.profile, node=dataclasses.replace(s.cluster.node, nvme_bytes=stored - 1)))  # fmt: skip
    with pytest.raises(Infeasible, match="NVMe"):
        home_use(tight, drives, stored, 0, 1)


def test_the_tiny_model_is_what_the_figures_above_say(tmp_path: Path) -> None:
    s = scenario(tmp_path, tiny_model(tmp_path))
    assert s.model.expert_bytes() == EXPERT
