"""Routers, capacities and reshaped models inside the engine: what is conserved, and that no cut of a run shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.model import MoEModel
from moesim.simulate import RunResult, simulate
from tests.build import scenario

LAYOUT = {"tp": 1, "dp": 4, "ep": 4}
POOL = {"pool_tokens": 512, "sequence_tokens": 64, "popularity_zipf": 0.8}
ROUTERS = {
    "bip": "bip",
    "expert_choice": "expert_choice",
    "loss_free": "loss_free",
    "top_p": {"kind": "top_p", "p": 0.5},
    "null_experts": {"kind": "null_experts", "null_experts": 16},
}


PROMPTS = {"format": "closed_loop", "concurrency": 16, "num_requests": 16, "prompt_tokens": 256, "output_tokens": 1}
MIXED = {"format": "poisson", "rate_per_s": 300.0, "num_requests": 12, "prompt_tokens": 30, "output_tokens": 12}


def run(folder: Path, fidelity: str = "count", **parts: object) -> RunResult:
    routing = {**POOL, "fidelity": fidelity}
    return simulate(scenario(folder, parallel=LAYOUT, routing=routing, **{"requests": MIXED, **parts}))


def stats(result: RunResult) -> tuple[float, float, float]:
    """Tokens times passes, pairs wanted, pairs dropped."""
    assert result.explanation is not None
    tokens, wanted, dropped = result.explanation.stats[6:9]
    return float(tokens), float(wanted), float(dropped)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_token_of_every_pass_is_routed(tmp_path: Path, name: str) -> None:
    result = run(tmp_path, "token", policies={"routing": ROUTERS[name]})
    assert result.outcome is not None
    computed = result.outcome.requests.prompt_tokens + result.outcome.requests.output_tokens - 1
    tokens, wanted, dropped = stats(result)
    assert tokens == 3 * int(computed.sum())  # three MoE layers
    assert dropped == 0
    figures = result.to_json()["summary"]["routing"]
    assert figures["experts_per_token"] == pytest.approx(wanted / tokens)
    assert figures["scores"]["model"]
    if name in ("bip", "loss_free"):
        assert wanted == 4 * tokens


@pytest.mark.parametrize("name", ["bip", "top_p", "expert_choice"])
@pytest.mark.parametrize("capacity", [None, {"factor": 1.0}])
def test_run_ahead_routes_the_same_steps(tmp_path: Path, name: str, capacity: object) -> None:
    ahead, single = (
        run(tmp_path, "token", policies={"routing": ROUTERS[name]}, capacity=capacity, engine={"run_ahead": flag})
        for flag in (True, False)
    )
    assert ahead.outcome is not None
    assert single.outcome is not None
    np.testing.assert_array_equal(ahead.outcome.requests.finish_ns, single.outcome.requests.finish_ns)
    np.testing.assert_allclose(stats(ahead), stats(single))
    for key in ("drops", "routing"):
        assert ahead.to_json()["summary"][key] == single.to_json()["summary"][key]


@pytest.mark.parametrize("fidelity", ["count", "token"])
def test_expert_choice_is_even_and_bip_nearly(tmp_path: Path, fidelity: str) -> None:
    def worst(policy: str) -> float:
        done = run(tmp_path, fidelity, policies={"routing": policy}, requests=PROMPTS)
        return float(done.to_json()["summary"]["balance"]["lockstep"])

    plain, bip, choice = worst("topk"), worst("bip"), worst("expert_choice")
    assert choice < bip < plain
    assert choice < 1.01
    assert bip < 1.15


@pytest.mark.parametrize("fidelity", ["count", "token"])
@pytest.mark.parametrize("drop", ["position", "score", "reroute"])
def test_a_capacity_drops_and_less_work_is_done(tmp_path: Path, fidelity: str, drop: str) -> None:
    shares = []
    for factor in (0.5, 1.0, 2.0):
        done = run(tmp_path, fidelity, capacity={"factor": factor, "drop": drop, "scope": "all"}, requests=PROMPTS)
        tokens, wanted, dropped = stats(done)
        assert wanted == pytest.approx(4 * tokens)
        report = done.to_json()["summary"]
        assert report["drops"]["share"] == pytest.approx(dropped / wanted)
        assert report["routing"]["experts_per_token"] == pytest.approx((wanted - dropped) / tokens)
        assert all(share is None or 0 <= share <= 1 for share in report["drops"]["by_position"])
        shares.append(dropped / wanted)
    assert shares[0] > shares[1] >= shares[2]
    assert shares[0] >= 0.48  # room for half of the choices, rounded up for each of 64 experts
    if drop == "reroute":
        assert shares[1] < 0.05
    else:
        assert shares[1] > shares[2]


def test_drops_fall_on_the_ends_of_sequences_where_sequences_have_capacities(tmp_path: Path) -> None:
    """OpenMoE's drop-towards-the-end (arXiv:2402.01739, section 4.2): places go in order, so late tokens find none."""
    done = run(
        tmp_path, "count", capacity={"factor": 1.0, "scope": "sequence", "order": "token"},
        requests=PROMPTS,
    )  # fmt: skip
    share = done.to_json()["summary"]["drops"]["by_position"]
    assert share[0] < 0.25 * share[-1]


def test_padding_to_the_capacity_takes_the_same_time_whatever_the_skew(tmp_path: Path) -> None:
    def expert_ns(zipf: float, pad: bool) -> int:
        done = simulate(
            scenario(
                tmp_path, parallel=LAYOUT, routing={**POOL, "popularity_zipf": zipf, "fidelity": "count"},
                capacity={"factor": 1.0, "pad": pad},
                requests=PROMPTS,
            )
        )  # fmt: skip
        assert done.explanation is not None
        return sum(done.explanation.ns[name] for name in ("dispatch", "experts", "combine"))

    assert expert_ns(0.0, True) == expert_ns(1.5, True)
    assert expert_ns(0.0, False) != expert_ns(1.5, False)


def model(folder: Path, **changes: object) -> dict[str, object]:
    from tests.build import tiny_model

    return {"name": tiny_model(folder), **changes}


def test_iterations_visit_the_experts_again(tmp_path: Path) -> None:
    once, twice = (run(tmp_path, model=model(tmp_path, iterations=n)) for n in (1, 2))
    assert stats(twice)[0] / stats(once)[0] == pytest.approx(2, rel=0.02)
    assert once.memory is not None
    assert twice.memory is not None
    assert twice.memory.expert_weights == once.memory.expert_weights
    assert once.explanation is not None
    assert twice.explanation is not None
    for name in ("dispatch", "experts", "combine", "router"):
        assert twice.explanation.ns[name] / twice.explanation.steps == pytest.approx(
            2 * once.explanation.ns[name] / once.explanation.steps, rel=0.15
        )


def test_layers_that_share_a_pool_keep_its_weights_once(tmp_path: Path) -> None:
    plain = run(tmp_path)
    shared = run(tmp_path, model=model(tmp_path, pool_layers=0, pool_share=0.5))
    assert plain.memory is not None
    assert shared.memory is not None
    assert shared.scenario.model.num_experts == 96  # half of three layers of 64
    assert shared.memory.expert_weights * 2 == plain.memory.expert_weights
    placement = shared.experts.placement.slot_to_expert_LS  # type: ignore[union-attr]
    assert (placement == placement[0]).all()


def test_small_experts_cost_less(tmp_path: Path) -> None:
    plain = run(tmp_path)
    mixed = run(tmp_path, model=model(tmp_path, expert_widths=[1.0, 0.25]))
    latent = run(tmp_path, model=model(tmp_path, latent_rank=64))
    ternary = run(tmp_path, model=model(tmp_path, expert_dtype="ternary"))
    assert plain.explanation is not None
    for other, share in ((mixed, 1.0), (latent, 0.25), (ternary, 0.125)):
        assert other.explanation is not None
        # a step: how many there are goes with when requests arrive in them
        each, most = (e.ns["experts"] / e.steps for e in (other.explanation, plain.explanation))
        assert each < most
        assert other.memory is not None
        assert plain.memory is not None
        # contiguous ranks: the fullest holds large experts only
        assert other.memory.expert_weights == pytest.approx(share * plain.memory.expert_weights)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"model": {"split": 7}}, "split must divide the experts' intermediate size"),
        ({"model": {"expert_widths": [1.0, 0.5, 0.1]}}, "expert_widths gives equal blocks"),
        ({"model": {"pool_share": 0.5}}, "give pool_layers too"),
        ({"capacity": {"pad": True}}, "a capacity needs a factor"),
        ({"policies": {"routing": "bipp"}}, "Did you mean 'bip"),
        ({"policies": {"routing": {"kind": "bip", "iteration": 2}}}, "Did you mean 'iterations'"),
    ],
)
def test_bad_input_is_told(tmp_path: Path, part: dict[str, dict[str, object]], text: str) -> None:
    parts: dict[str, object] = dict(part)
    if "model" in parts:
        parts["model"] = model(tmp_path, **part["model"])
    with pytest.raises(BadInput, match=text):
        scenario(tmp_path, parallel=LAYOUT, **parts)


def test_parameters_that_do_not_go_together_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="partition cannot route this model's tokens: every class needs a pool"):
        run(tmp_path, policies={"routing": {"kind": "partition", "pools": 1}})
    with pytest.raises(BadInput, match="cannot route this model's tokens"):
        run(tmp_path, policies={"routing": {"kind": "null_experts", "top_k": 200}})


def test_sixty_five_thousand_experts_have_room_for_no_expert(tmp_path: Path) -> None:
    """Ids of 65,536 experts fill 16 bits; the place of a dropped choice must not read as expert 0."""
    done = simulate(
        scenario(
            tmp_path, parallel={"dp": 2, "ep": 2}, routing={"pool_tokens": 64, "sequence_tokens": 64},
            model=model(tmp_path, num_experts=65_536, intermediate_size=1, router_columns=512),
            policies={"routing": {"kind": "product", "columns": "factors"}}, capacity={"factor": 1.0, "scope": "all"},
            requests={"format": "closed_loop", "concurrency": 2, "num_requests": 2, "prompt_tokens": 64,
                      "output_tokens": 1},
        )
    )  # fmt: skip
    tokens, wanted, dropped = stats(done)
    assert wanted == pytest.approx(4 * tokens)
    assert done.experts is not None
    batch = done.experts.router.route(np.arange(64), "prefill", 0)  # type: ignore[union-attr]
    assert batch.expert_NLW.dtype == np.uint32
    assert (batch.expert_NLW == 65_536).sum() >= batch.dropped_NL.sum()
    assert 0 < dropped < wanted


TRACE = Path(__file__).parents[2] / "workloads" / "routing" / "stdlib_moe_loss_free.npz"


@pytest.mark.parametrize("mode", ["serving", "training"])
def test_a_generator_fitted_to_a_trace_takes_its_place(tmp_path: Path, mode: str) -> None:
    parts: dict[str, object] = {
        "model": "stdlib-moe-16e", "cluster": {"device": "cpu_epyc_1thread", "nodes": 1, "gpus_per_node": 1},
        "parallel": {"dp": 1, "ep": 1}, "policies": {"routing": "bip"},
        "routing": {"path": str(TRACE), "scores": {"model": "generator"}},
        "engine": {"max_model_len": 256, "cuda_graph": False},
        "requests": {"format": "closed_loop", "concurrency": 2, "num_requests": 2, "prompt_tokens": 64,
                     "output_tokens": 2},
    }  # fmt: skip
    if mode == "training":
        del parts["engine"]
        parts |= {
            "requests": None,
            "mode": "training",
            "training": {"sequence_tokens": 64, "global_batch_sequences": 1, "micro_batch_sequences": 1, "steps": 1},
        }
    done = simulate(scenario(tmp_path, **parts))
    report = done.to_json()
    assert any("drawn from a model fitted to stdlib_moe_loss_free.npz" in text for text in report["warnings"])
    if mode == "serving":
        scores = report["summary"]["routing"]["scores"]
        assert scores["other"]["score_model"] == "recorded scores"  # of this trace nothing else need be assumed
        assert scores["figures"]["max_over_mean_expert"] < 1.5


def test_a_generator_needs_a_trace(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a generator is fitted to a trace with gate weights"):
        simulate(
            scenario(tmp_path, parallel=LAYOUT, routing={**POOL, "scores": {"model": "generator"}}, requests=MIXED)
        )


def test_recorded_scores_choose_what_was_recorded(tmp_path: Path) -> None:
    """The trace holds all scores and the bias that was added to their sigmoid: nothing is left to assume."""
    from moesim.traces import routing_npz
    from moesim.workload.scores import ScoreSpec, score_model

    source = routing_npz.read(TRACE)
    scores = score_model(source, ScoreSpec(), 1, True)
    assert scores.assumed == ""
    bias_LE = np.load(TRACE)["bias"]
    for layer in range(source.num_layers):
        score_TE = scores.scores(np.arange(source.num_tokens), layer)
        gate_TE = 1 / (1 + np.exp(-score_TE)) + bias_LE[layer].astype(np.float32)
        chosen_TK = np.argsort(-gate_TE, axis=1, kind="stable")[:, :2]
        assert (chosen_TK == source.expert_TLK[:, layer]).mean() > 0.999  # sigmoids may round together


def test_dimensions_by_hand(tmp_path: Path) -> None:
    """The tiny model: hidden 256, 64 gated experts of 128, three MoE layers."""

    def changed(**changes: object) -> MoEModel:
        return scenario(tmp_path, parallel=LAYOUT, model=model(tmp_path, **changes)).model

    plain = changed(top_k=4)
    expert = 3 * 256 * 128
    assert plain.total_params() - changed(num_experts=32).total_params() == 3 * 32 * (expert + 256)
    # two layers share a pool of 128, the third has half of one: as many experts as before, wider routers
    assert changed(pool_layers=2).total_params() - plain.total_params() == 3 * 64 * 256
    narrow = changed(intermediate_size=1, gated_experts=False, shared=1)
    assert narrow.expert_params() == 2 * 256
    assert narrow.shared_intermediate_size == 128
    assert changed(split=4).num_experts == 256
    assert changed(split=4).total_params() - plain.total_params() == 3 * 192 * 256  # only the routers grow
    again = changed(iterations=2, shared=1)
    assert [g.layers for g in again.gemms(1) if g.name.startswith(("router", "shared"))] == [6, 6, 6]


@pytest.mark.parametrize(
    "capacity", [{"factor": 1.25}, {"factor": 1.25, "scope": "sequence"}, {"prefill": 1.0}, {"decode": 1.0}]
)
@pytest.mark.parametrize("requests", ["mixed", "long prompts"])
def test_both_fidelities_drop_alike(tmp_path: Path, capacity: dict[str, object], requests: str) -> None:
    """A capacity counts the tokens of real ranks and real sequences, few as they are: a bank that spread its tokens
    evenly over ranks, or cut sequences into blocks, would drop several times as many."""
    made = {
        "mixed": {**MIXED, "num_requests": 40, "prompt_tokens": 60},
        "long prompts": {"format": "poisson", "rate_per_s": 100.0, "num_requests": 24, "prompt_tokens": 400,
                         "output_tokens": 4},
    }[requests]  # fmt: skip
    share = {}
    for fidelity in ("token", "count"):
        done = simulate(
            scenario(
                tmp_path, parallel={"tp": 1, "dp": 8, "ep": 8}, capacity=capacity, requests=made,
                routing={"pool_tokens": 2048, "sequence_tokens": 256, "popularity_zipf": 0.5, "fidelity": fidelity},
                engine={"bank_entries": 16},
            )
        )  # fmt: skip
        share[fidelity] = done.to_json()["summary"]["drops"]["share"]
    assert share["count"] == pytest.approx(share["token"], rel=0.35, abs=0.012)


@pytest.mark.parametrize("fidelity", ["count", "token"])
@pytest.mark.parametrize("capacity", [{"decode": 1.25}, {"layers": {1: 1.25}}])
def test_padding_where_no_capacity_holds_changes_nothing(
    tmp_path: Path, fidelity: str, capacity: dict[str, object]
) -> None:
    def spent(**more: object) -> dict[str, int]:
        done = run(tmp_path, fidelity, capacity={**capacity, **more}, requests=PROMPTS)
        assert done.explanation is not None
        return {name: done.explanation.ns[name] for name in ("dispatch", "experts", "combine")}

    plain, padded = spent(), spent(pad=True)
    if "decode" in capacity:
        assert padded == plain  # prompts alone
    else:
        assert all(
            0.5 * plain[name] < padded[name] < 2 * plain[name] for name in plain
        )  # two of three layers as they are


def test_padding_does_not_make_a_lone_sender_cheaper(tmp_path: Path) -> None:
    """All rows of a padded exchange that one rank's tokens fill leave by that rank's port."""

    lone = {"concurrency": 1, "num_requests": 1, "prompt_tokens": 400, "output_tokens": 1}

    def ns(pad: bool) -> int:
        capacity = {"factor": 4.0, "pad": pad}
        done = run(tmp_path, "token", capacity=capacity, requests={"format": "closed_loop", **lone})
        assert done.explanation is not None
        return done.explanation.ns["dispatch"] + done.explanation.ns["combine"]

    assert ns(True) > ns(False)


@pytest.mark.parametrize("schedule", ["linear", "linear_reverse"])
def test_denoising_goes_through_its_whole_schedule(tmp_path: Path, schedule: str) -> None:
    done = run(
        tmp_path, policies={"routing": {"kind": "expert_choice", "schedule": schedule, "k_min": 2.0, "k_max": 8.0}},
        requests={**PROMPTS, "num_requests": 64}, engine={"bank_entries": 16},
    )  # fmt: skip
    assert done.experts is not None
    assert done.experts.figures is not None
    assert done.experts.figures["experts_per_token"] == pytest.approx(5, rel=0.1)
    tokens, wanted, _ = stats(done)
    assert wanted / tokens == pytest.approx(5, rel=0.35)  # few steps, each at a step of denoising of its own


def test_a_batch_as_one_takes_other_experts_in_every_step(tmp_path: Path) -> None:
    done = run(tmp_path, "token", policies={"routing": {"kind": "random", "per": "batch"}})
    load_LS = done._slot_load()
    assert load_LS is not None
    assert ((load_LS > 0).sum(axis=1) > 32).all()  # of 64: one step alone uses four


def test_an_explicit_null_turns_a_presets_capacity_off(tmp_path: Path) -> None:
    from moesim.scenario.load import load_scenario_text

    text = f"""
model: {model(tmp_path)["name"]}
cluster: {{device: h100_sxm_datasheet}}
parallel: {{dp: 2, ep: 2}}
requests: {{format: poisson, rate_per_s: 1, num_requests: 1, prompt_tokens: 4, output_tokens: 1}}
policies: {{routing: gshard}}
"""
    assert load_scenario_text(text, tmp_path).capacity is not None
    assert load_scenario_text(text + "capacity: null\n", tmp_path).capacity is None
    own = load_scenario_text(text + "capacity: {factor: 3.0}\n", tmp_path).capacity
    assert own is not None
    assert own.factor == 3.0


def test_the_bank_says_how_far_its_few_batches_are_off(tmp_path: Path) -> None:
    """Entries of a bank are draws of their own: none stands there twice to make the error look small."""
    done = run(tmp_path, capacity={"factor": 1.0}, requests=PROMPTS, engine={"bank_entries": 16})
    moe = done.pricers[0].moe
    row = moe.row("prefill", 2048, 512)  # type: ignore[attr-defined]
    assert len(row.total) == 8
    assert len({tuple(column) for column in row.stats.T.tolist()}) == 8


def test_padding_takes_memory_and_many_experts_a_token_do(tmp_path: Path) -> None:
    def buffers(**parts: object) -> int:
        done = run(tmp_path, **parts)
        assert done.memory is not None
        return done.memory.exchange_buffers

    plain = buffers(capacity={"factor": 2.0})
    assert buffers(capacity={"factor": 2.0, "pad": True}) == pytest.approx(2 * plain, rel=0.01)
    wide = simulate(
        scenario(
            tmp_path, parallel={"dp": 32, "ep": 32}, routing={**POOL, "fidelity": "count"}, requests=MIXED,
            policies={"routing": {"kind": "threshold", "percentile": 75.0}},
        )
    )  # fmt: skip
    assert wide.experts is not None
    assert wide.experts.figures is not None
    taken = wide.experts.figures["experts_per_token"]
    assert taken > 8
    assert wide.memory is not None
    assert wide.memory.exchange_buffers >= 2 * 8192 * taken * 256 * 2


def test_a_layer_without_tokens_is_no_balance(tmp_path: Path) -> None:
    """Tokens that stop early leave late layers empty; such layers have no largest over mean, and no hottest place."""
    done = run(tmp_path, "token", policies={"routing": {"kind": "halting", "threshold": 1e9, "free_layers": 1}})
    report = done.to_json()["summary"]
    assert report["balance"]["max_over_mean_load"] >= 1
    load_LP = done.rank_load_LP()
    assert load_LP is not None
    assert load_LP[-1].sum() == 0
    assert load_LP[0].sum() == pytest.approx(1)
    assert report["balance"]["hottest"]["layer"] != done.scenario.model.moe_layers[-1]
    assert report["routing"]["experts_per_token"] < 4


def test_a_trace_serves_a_router_with_another_k(tmp_path: Path) -> None:
    base = {
        "model": "stdlib-moe-16e", "cluster": {"device": "cpu_epyc_1thread", "nodes": 1, "gpus_per_node": 1},
        "parallel": {"dp": 1, "ep": 1}, "routing": {"path": str(TRACE)},
        "engine": {"max_model_len": 256, "cuda_graph": False},
        "requests": {"format": "closed_loop", "concurrency": 2, "num_requests": 2, "prompt_tokens": 64,
                     "output_tokens": 2},
    }  # fmt: skip
    done = simulate(scenario(tmp_path, **base, policies={"routing": "hash_layers"}))
    assert done.to_json()["summary"]["routing"]["experts_per_token"] == 1
    with pytest.raises(BadInput, match="16 experts, stdlib-moe-16e here 32"):
        simulate(scenario(tmp_path, **base, policies={"routing": "expert_upcycling"}))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"model": {"router_columns": 3}}, "router_columns must be the scores that the router asks for: 3"),
        ({"capacity": {"layers": {"7": 1.0}}}, "capacity.layers counts MoE layers from 0"),
        ({"capacity": {"factor": 1e300}}, "less than or equal to 1000000"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path: Path, part: dict[str, dict[str, object]], text: str) -> None:
    parts: dict[str, object] = dict(part)
    if "model" in parts:
        parts["model"] = model(tmp_path, **part["model"])
    with pytest.raises(BadInput, match=text):
        scenario(tmp_path, parallel=LAYOUT, **parts)
