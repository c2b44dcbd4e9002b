"""`moesim place`: what is fitted, what is held out, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import main
from moesim.errors import BadInput
from moesim.exports import sglang, trtllm, vllm_ascend
from moesim.place import MARKER, Ask, check_options, place, render, write
from moesim.place_scores import score
from moesim.placement import Placement
from moesim.traces.expert_loads import from_tokens
from moesim.workload.loads import ExpertLoads
from moesim.workload.pool import RoutingSource

REQUESTS = {"format": "poisson", "rate_per_s": 1, "num_requests": 9, "prompt_tokens": 50, "output_tokens": 9}
MODEL = "deepseek-v2-lite"  # 27 layers, the first dense, 64 experts, top 6


def trace(path: Path, tokens: int = 600, layers: int = 26, experts: int = 64, top_k: int = 6, seed: int = 0) -> Path:
    """A skewed trace whose hot experts are the first ones in its first half and the last ones in its second."""
    rng = np.random.default_rng(seed)
    weight_E = 1 / np.arange(1, experts + 1)
    score_TLE = np.log(weight_E) + rng.gumbel(size=(tokens, layers, experts))
    ids = np.argsort(-score_TLE, axis=2)[..., :top_k].astype(np.uint8)
    ids[tokens // 2 :] = experts - 1 - ids[tokens // 2 :]
    np.savez(path, expert_ids=ids, sequence_id=np.arange(tokens) // 50, num_experts=experts)
    return path


def test_only_the_first_part_is_fitted_and_the_rest_is_scored(tmp_path: Path) -> None:
    dump = trace(tmp_path / "a.npz")
    placed = place(Ask(dump, 8, model=MODEL, parameters=("num_redundant_experts=8",), tokens_per_row=100))
    assert placed.fitted_rows == 3
    assert placed.held_out is not None
    (fit_before, fit_after), (before, after) = placed.fitted, placed.held_out
    assert fit_after.of_total < 1.05 < fit_before.of_total
    assert after.of_total > fit_after.of_total + 0.3  # the hot experts are others now
    text = render(placed)
    assert text.index("held out, each step") < text.index("fitted, each step")
    assert f"{before.of_steps:14.3f} {after.of_steps:8.3f}" in text
    halves = place(Ask(dump, 8, model=MODEL, held_out=0.9, tokens_per_row=100))
    assert halves.fitted_rows == 1


def test_scores_of_a_hand_worked_case() -> None:
    loads = ExpertLoads(
        np.array([[[4, 0, 2, 2], [1, 1, 1, 1]], [[0, 4, 2, 2], [5, 1, 1, 1]]]), "made", layer_index=(3, 9)
    )
    made = score(Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2), loads)
    # steps: layer 3: 4 of mean 4, 4 of 4; layer 9: 2 of 2, 6 of 4; together layer 3: 8 of 8, layer 9: 8 of 6
    assert made.of_steps == pytest.approx((1 + 1 + 1 + 1.5) / 4)
    assert made.of_total == pytest.approx((1 + 8 / 6) / 2)
    assert made.lockstep == pytest.approx((4 + 4 + 2 + 6) / (4 + 4 + 2 + 4))
    assert (made.worst, made.worst_layer) == (pytest.approx(8 / 6), 9)


def test_files_say_what_was_placed_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = tmp_path / "maps"
    engines = ("sglang", "trtllm", "vllm", "vllm-ascend")
    ask = Ask(trace(tmp_path / "a.npz"), 8, model=MODEL, parameters=("num_redundant_experts=16",), engines=engines)
    placed = place(ask)
    emitted = write(placed, engines, out)
    assert {p.name for p in out.iterdir()} == {e.file for e in emitted} | {MARKER}
    layers = tuple(range(1, 27))
    for back in (
        sglang.read((out / sglang.FILE).read_text(), 64, 8, layers),
        trtllm.read((out / trtllm.FILE).read_text(), 64, 8)[0],
        vllm_ascend.read((out / vllm_ascend.FILE).read_text(), 64),
    ):
        np.testing.assert_array_equal(back.slot_to_expert_LS, placed.placement.slot_to_expert_LS)
    assert len(json.loads((out / sglang.FILE).read_text())["physical_to_logical_map"]) == 27
    assert json.loads((out / "vllm_eplb_config.json").read_text())["num_redundant_experts"] == 16
    assert write(placed, ["vllm"], out)  # an earlier result is replaced as a whole
    assert {p.name for p in out.iterdir()} == {"vllm_eplb_config.json", MARKER}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="holds no placement"):
        write(placed, ["vllm"], mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_what_an_engine_cannot_say_leaves_nothing_behind(tmp_path: Path) -> None:
    dump = trace(tmp_path / "a.npz", layers=3, experts=4, top_k=1)
    placed = place(Ask(dump, 2, parameters=("num_redundant_experts=6",), engines=("vllm-ascend",)))
    with pytest.raises(BadInput, match="holds one twice"):  # ten slots of four experts on two ranks of five
        write(placed, ["vllm", "vllm-ascend"], tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_layers_without_a_record_get_experts_in_order(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    rows = np.random.default_rng(0).integers(1, 99, (2, 64)).tolist()
    head = "layer," + ",".join(f"e{e}" for e in range(64))
    path.write_text(
        "\n".join([head, *(f"{layer},{','.join(map(str, r))}" for layer, r in zip((4, 7), rows, strict=True))])
    )
    placed = place(Ask(path, 8, model=MODEL))
    assert placed.held_out is None
    assert "not known" in render(placed)
    assert any("24 MoE layers are not in the recording" in w for w in placed.warnings)
    assert placed.target.layer_index == tuple(range(1, 27))
    np.testing.assert_array_equal(placed.target.placement.slot_to_expert_LS[0], np.arange(64))
    np.testing.assert_array_equal(placed.target.placement.slot_to_expert_LS[3], placed.placement.slot_to_expert_LS[0])


def test_nodes_and_costs_come_from_a_scenario(tmp_path: Path) -> None:
    scenario = tmp_path / "s.yaml"
    scenario.write_text(
        json.dumps(
            {
                "name": "s",
                "model": MODEL,
                "cluster": {"device": "h100_sxm_datasheet", "gpus_per_node": 4, "nodes": 2},
                "parallel": {"dp": 8, "ep": 8},
                "routing": {"popularity_zipf": 1.0},
                "requests": REQUESTS,
            }
        )
    )
    dump = trace(tmp_path / "a.npz")
    placed = place(Ask(dump, cluster=scenario))
    assert placed.context.rank_to_node == (0, 0, 0, 0, 1, 1, 1, 1)
    assert placed.context.costs is not None
    assert placed.context.sample is not None
    other = place(Ask(dump, 16, cluster=scenario))
    assert (other.context.num_nodes, other.context.costs) == (4, None)
    assert any("is not known to the policy" in w for w in other.warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ep": None}, "how many ranks"),
        ({"model": "mixtral-8x7b"}, "id 63|experts"),
        ({"model": "deepseek-v2-lit"}, "Did you mean"),
        ({"policy": "elpb"}, "Did you mean 'eplb'"),
        ({"policy": "[1]"}, "name of a placement"),
        ({"parameters": ("num_redundant=8",)}, "Did you mean 'num_redundant_experts'"),
        ({"parameters": ("num_redundant_experts",)}, "KEY=VALUE is needed"),
        ({"parameters": ("num_redundant_experts=3",)}, "Use num_redundant_experts = 0, 8 or 16"),
        ({"held_out": 1.0}, "a share from 0 to below 1"),
        ({"fmt": "excel"}, "unknown format 'excel'"),
        ({"tokens_per_row": 100_000, "held_out": 0.5}, "one row cannot be split"),
        ({"nodes": 9}, "every node needs a rank"),
    ],
)
def test_mistakes_are_answered(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    dump = trace(tmp_path / "a.npz", tokens=40)
    with pytest.raises(BadInput, match=words):
        place(Ask(**({"dump": dump, "ep": 8, "model": MODEL} | change)))


def test_layers_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"25 layers without numbers, .* 26 MoE layers"):
        place(Ask(trace(tmp_path / "a.npz", tokens=20, layers=25), 8, model=MODEL))
    dump = tmp_path / "b.npz"
    np.savez(dump, kind=np.array(0), logical_count=np.ones((4, 27, 64), np.int32))  # the dense layer has loads, too
    with pytest.raises(BadInput, match=r"layer 0 of b\.npz is no MoE layer"):
        place(Ask(dump, 8, model=MODEL))
    np.savez(dump, kind=np.array(0), logical_count=np.ones((4, 30, 64), np.int32))
    with pytest.raises(BadInput, match="30 layers, "):
        place(Ask(dump, 8, model=MODEL))


def test_a_folder_without_files_is_refused() -> None:
    check_options(Ask(Path("x"), engines=("vllm",)), None)
    with pytest.raises(BadInput, match="which engines"):
        check_options(Ask(Path("x")), Path("out"))


def test_the_verb_prints_json_and_loads_plugins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_first.py").write_text(
        "import numpy as np\n"
        "from moesim.spec import Spec\n"
        "class Policy(Spec):\n"
        "    def place(self, weight_LE, ctx):\n"
        "        row = np.r_[1 : weight_LE.shape[1] : 2, 0 : weight_LE.shape[1] : 2]\n"
        "        return ctx.placement(np.tile(row, (len(weight_LE), 1)), weight_LE.shape[1])\n"
        "POLICIES = {'placement.odd-first': Policy}\n"
    )
    monkeypatch.chdir(tmp_path)
    trace(tmp_path / "a.npz", tokens=200)
    arguments = ["place", "--dump", "a.npz", "--ep", "4", "--tokens-per-row", "50", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--plugin", "odd_first", "--policy", "odd-first"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["policy"] == {"kind": "odd-first"}
    assert report["held_out"]["after"]["of_steps"] > 1
    assert report["recording"]["rows_fitted"] == 2
    assert "note: no model is named" in said.err


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "vllm-ascend"])
def test_a_map_in_use_is_what_before_means(tmp_path: Path, engine: str) -> None:
    ask = Ask(trace(tmp_path / "a.npz"), 8, model=MODEL, parameters=("num_redundant_experts=8",), engines=(engine,))
    placed = place(ask)
    file = write(placed, [engine], tmp_path / "maps")[0].file
    again = place(replace(ask, current=tmp_path / "maps" / file))
    assert again.fitted[0] == placed.fitted[1]
    assert again.before_name == f"as in {file}"
    with pytest.raises(BadInput, match=r"ranks|multiple of"):
        place(replace(ask, ep=16, current=tmp_path / "maps" / file))


def test_another_recording_is_scored_on(tmp_path: Path) -> None:
    first, second = trace(tmp_path / "a.npz"), trace(tmp_path / "b.npz", seed=1)
    ask = Ask(first, 8, model=MODEL, score_on=second, tokens_per_row=100)
    placed = place(ask)
    assert placed.held_out is not None
    assert (placed.fitted_rows, placed.scored_rows, placed.scored_source) == (6, 6, "b.npz")
    itself = place(replace(ask, score_on=first))
    assert itself.held_out == itself.fitted
    assert placed.held_out[1].of_total > itself.fitted[1].of_total
    with pytest.raises(BadInput, match="leave --held-out out"):
        place(replace(ask, held_out=0.5))
    with pytest.raises(BadInput, match="they are of one model"):
        place(replace(ask, model=None, score_on=trace(tmp_path / "c.npz", tokens=9, layers=3)))


def counts_file(path: Path, rows: list[list[int]], first: int = 0) -> Path:
    head = "layer," + ",".join(f"e{e}" for e in range(len(rows[0])))
    path.write_text("\n".join([head, *(f"{layer},{','.join(map(str, r))}" for layer, r in enumerate(rows, first))]))
    return path


def test_what_a_solver_proves_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 5 | 4 + 1, where experts in order have 5 + 4 | 1, and 3 + 3 | 2 + 2 + 2, in order 3 + 3 + 2 | 2 + 2."""
    pytest.importorskip("ortools")
    dump = counts_file(tmp_path / "counts.csv", [[5, 4, 1, 0], [3, 3, 2, 2]])
    calls = []
    from moesim_tuner.placement.balance_cpsat import Policy as Solver

    solve = Solver.solve
    monkeypatch.setattr(Solver, "solve", lambda self, *told: calls.append(1) or solve(self, *told))
    placed = place(Ask(dump, 2, policy="balance_cpsat"))
    assert calls == [1]
    assert placed.to_json()["solver"] == {"objective": 1.0, "bound": 1.0, "gap": 0.0, "status": "optimal"}
    assert placed.to_json()["objective"] == {"value": 1.0, "in_order": (1.8 + 1.2) / 2, "bound": 1.0}
    assert "solver: objective 1, bound 1, gap 0.00%, optimal" in render(placed)
    with pytest.raises(SystemExit):
        main(["place", "--dump", str(dump), "--ep", "2", "--policy", "balance_cpsat", "--json"])
    assert json.loads(capsys.readouterr().out)["solver"]["status"] == "optimal"
    plain = place(Ask(dump, 2, policy="eplb"))
    assert plain.to_json()["solver"] is plain.to_json()["objective"] is None
    assert "solver" not in render(plain)


def test_the_gap_to_the_bound_of_the_same_rows(tmp_path: Path) -> None:
    """By hand: 6 and three of 1 on two ranks: 7 of a mean of 4.5 is the least, which in order have already."""
    dump = counts_file(tmp_path / "counts.csv", [[6, 1, 1, 1], [3, 3, 1, 1]])
    placed = place(Ask(dump, 2, policy="contiguous"))
    assert placed.bound[0] == pytest.approx((7 / 4.5 + 1) / 2)
    of_total = (7 / 4.5 + 1.5) / 2
    assert placed.fitted[1].of_total == pytest.approx(of_total)
    assert placed.to_json()["fitted"]["gap_of_total"] == pytest.approx(1 - placed.bound[0] / of_total, abs=1e-6)
    assert f"proven bound 1.278, gap {1 - placed.bound[0] / of_total:.2%}" in render(placed)


def test_where_groups_stay_on_nodes_the_bound_is_of_such_maps(tmp_path: Path) -> None:
    """deepseek-v3 routes by 8 groups. All load in the experts of one: its node of two has twice the mean."""
    row = [0] * 256
    row[:32] = [8] * 32
    dump = counts_file(tmp_path / "counts.csv", [row] * 2, first=3)
    ask = Ask(dump, 8, model="deepseek-v3", nodes=2, policy="eplb")
    grouped, free = place(ask), place(replace(ask, parameters=("mode=global",)))
    assert (grouped.grouped, free.grouped) == (True, False)
    assert grouped.bound[0] == pytest.approx(2.0)
    assert grouped.fitted[1].of_total == pytest.approx(2.0)
    assert free.bound[0] == pytest.approx(1.0)
    assert "of maps that keep every expert group on a node" in render(grouped)
    assert "expert group" not in render(free)


@pytest.mark.parametrize(
    ("policy", "told"),
    [("exflow", "no bound known"), ("affinity", "no bound known"), ("moetuner", "no bound known"),
     ("semantic", "no bound known"), ("viterbi", "proven bound")],
)  # fmt: skip
def test_a_policys_own_objective_stands_beside_that_of_experts_in_order(tmp_path: Path, policy: str, told: str) -> None:
    dump = trace(tmp_path / "a.npz", tokens=200, layers=3, experts=6, top_k=2)
    placed = place(Ask(dump, 2, policy=policy, tokens_per_row=50))
    assert placed.aim is not None
    assert placed.aim.value <= placed.aim.in_order + 1e-12
    line = next(line for line in render(placed).splitlines() if line.startswith(f"what {policy} makes small"))
    assert f"{placed.aim.value:.6g}, of experts in order without replicas {placed.aim.in_order:.6g}; {told}" in line
    if policy == "exflow":  # on one node a crossing costs 1: the share of steps that leave the rank
        assert placed.aim.value == pytest.approx(placed.fitted[1].crossings)
        assert placed.aim.in_order == pytest.approx(placed.fitted[0].crossings)


def test_vllm_is_told_steps_where_they_are_given(tmp_path: Path) -> None:
    dump = counts_file(tmp_path / "counts.csv", [[5, 4, 1, 0]])
    ask = Ask(dump, 2, policy="eplb", engines=("vllm",))
    for change, steps, noted in (
        ({}, (3000, 1000), "window_size and step_interval: vLLM's default"),
        ({"interval": 150}, (150, 1000), "window_size: vLLM's default"),
        ({"interval": 150, "window": 300}, (150, 300), ""),
    ):
        emitted = write(place(replace(ask, **change)), ["vllm"], tmp_path / "maps")[0]
        config = json.loads(emitted.text)
        assert (config["step_interval"], config["window_size"]) == steps
        assert (noted in emitted.notes[-1]) if noted else len(emitted.notes) == 1
        assert f'"step_interval": {steps[0]}' in emitted.command
    for option in ("interval", "window"):
        with pytest.raises(BadInput, match=f"--{option}: it goes into vLLM's"):
            check_options(replace(ask, engines=("sglang",), **{option: 9}), None)


def test_crossings_of_a_hand_worked_case() -> None:
    ids = np.array([[[0], [1]], [[0], [3]], [[2], [2]], [[3], [0]]], np.uint8)  # of two layers, one expert a token
    loads = from_tokens(RoutingSource(ids, np.array([0, 4]), 4, 1, True, "made"), 4)
    in_order = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
    assert score(in_order, loads).crossings == pytest.approx(2 / 4)  # 0 to 3 and 3 to 0 leave their rank
    assert score(Placement(np.array([[0, 1, 2, 3], [3, 1, 2, 0]]), 4, 2), loads).crossings == pytest.approx(0)
