"""Every fault of a `tune` block: the place, what is wrong, the mend; all at once; none for what is right."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from moesim_tuner.checks import check_figures, note

from moesim import cli
from moesim.errors import BadInput
from moesim.scenario.load import load_scenario

BASE = """\
name: s
model: qwen3-30b-a3b
cluster: {device: rtx_4090, nodes: 1, gpus_per_node: 4}
parallel: {tp: 1, dp: 4, ep: 4}
requests: {format: closed_loop, concurrency: 16, num_requests: 20, prompt_tokens: 150, output_tokens: 15}
policies: {placement: {kind: eplb, num_redundant_experts: 4}}
tune:
  objectives: [output_tok_per_s]
"""
SPACE = "  space: {parallel.ep: {choices: [2, 4]}, policies.placement: {choices: [contiguous, eplb]}}\n"

CASES = {
    # fields
    "field": ("  space: {§parallel.epp: {choices: [1]}}", "no field parallel.epp. Did you mean parallel.ep?"),
    "block": ("  space: {§paralel.ep: {choices: [1]}}", "Did you mean parallel.ep?"),
    "bare": ("  space: {§max_num_seqs: {choices: [1]}}", "Did you mean engine.max_num_seqs?"),
    "deep": ("  space: {§engine.block_size.x: {choices: [1]}}", "engine.block_size holds a value and has no keys"),
    "empty part": ("  space: {§engine..x: {choices: [1]}}", "is no path of a field"),
    "policy parameter": (
        "  space: {§policies.placement.num_redundant: {choices: [1]}}",
        "Did you mean policies.placement.num_redundant_experts?",
    ),
    "another policy's": ("  space: {§policies.offload.warm: {choices: [true]}}", "It is one of cached"),
    "family": ("  space: {§policies.placment: {choices: [eplb]}}", "Did you mean policies.placement?"),
    "family's parameter": ("  space: {§policies.placment.x: {choices: [eplb]}}", "Did you mean policies.placement"),
    "tune": ("  space: {§tune.trials: {choices: [1]}}", "the search does not change itself"),
    "seed": ("  space: {§seed: {choices: [1]}}", "same seeds"),
    "name": ("  space: {§name: {choices: [a]}}", "a search cannot set name"),
    "mode": ("  space: {§mode: {choices: [serving]}}", "write two scenarios"),
    "not yet": ("  space: {§engine.prefix_caching: {choices: [true]}}", "prefix caching is not simulated yet"),
    "training": ("  space: {§training.steps: {choices: [1]}}", "mode training only"),
    # kinds of parameter
    "none": ("  space: {parallel.ep: §{when: {a: 1}}}", "exactly one of choices, range, log_range, got none"),
    "two": ("  space: {parallel.ep: §{choices: [1], range: [1, 2]}}", "got choices and range; keep one"),
    "step of choices": ("  space: {parallel.ep: {choices: [1], step: §2}}", "step goes with range"),
    "step of log": ("  space: {parallel.ep: {log_range: [1, 4], step: §2}}", "write factor: 2"),
    "factor of range": ("  space: {parallel.ep: {range: [1, 4], factor: §2}}", "factor goes with log_range"),
    "no choice": ("  space: {parallel.ep: {choices: §[]}}", "1 to 1,000 values in a list are needed"),
    "no parameter": ("  space: §{}", "at least 1 item"),
    "when of nothing": ("  space: {parallel.ep: {choices: [1], when: §{}}}", "at least 1 item"),
    # bounds
    "low above high": ("  space: {parallel.ep: {range: §[8, 2]}}", "write [2, 8]"),
    "one end": ("  space: {parallel.ep: {range: §[8]}}", "at least 2 items"),
    "step of 0": ("  space: {parallel.ep: {range: [1, 8], step: §0}}", "more than 0, got 0"),
    "step too far": ("  space: {parallel.ep: {range: [1, 8], step: §9}}", "use 7 or less"),
    "step as text": ("  space: {parallel.ep: {range: [1, 8], step: §'2'}}", "write 2 without quotes"),
    "end as text": ("  space: {parallel.ep: {range: [1, §x]}}", "a number is needed, got 'x'"),
    "end as switch": ("  space: {parallel.ep: {range: [§true, 2]}}", "a number is needed, got True"),
    "log of 0": ("  space: {parallel.ep: {log_range: [§0, 8]}}", "equal ratios start above 0, got 0"),
    "factor of 1": ("  space: {parallel.ep: {log_range: [1, 8], factor: §1}}", "more than 1, got 1"),
    # choices
    "twice": ("  space: {parallel.ep: {choices: [1, 2, §1]}}", "1 is a choice already, as number 1"),
    "twice as 1.0": ("  space: {engine.host_overhead_us: {choices: [1, §1.0]}}", "a choice already"),
    "kind twice": ("  space: {policies.placement: {choices: [eplb, §{kind: eplb}]}}", "eplb is a choice already"),
    "label of nothing": ("  space: {a: {choices: {x: §{}, y: {parallel.ep: 2}}}}", "x sets no field"),
    "label's field": ("  space: {a: {choices: {x: {§parallel.epp: 2}}}}", "Did you mean parallel.ep?"),
    "label's value": ("  space: {a: {choices: {x: {parallel.ep: §0}}}}", "greater than or equal to 1, got 0"),
    "set twice": (
        "  space: {a: {choices: {x: {parallel.ep: 2}}}, §parallel.ep: {choices: [2, 4]}}",
        "parallel.ep is set by a, too; leave it to one of them, or part them by `when`",
    ),
    "inside a mapping": (
        "  space: {policies.placement: {choices: [{kind: eplb, num_redundant_experts: 4}]}, "
        "§policies.placement.num_redundant_experts: {choices: [8]}}",
        "is set by policies.placement, too",
    ),
    # values that can never be
    "value": ("  space: {parallel.ep: {choices: [1, §0]}}", "0 cannot be: should be greater than or equal to 1"),
    "type": ("  space: {parallel.ep: {choices: [1, §two]}}", "two cannot be: should be a valid integer"),
    "float steps": ("  space: {parallel.ep: {range: [1, §2], step: 0.5}}", "2.0 cannot be"),
    "range's end": ("  space: {engine.gpu_memory_utilization: {range: [0.8, §1.5]}}", "less than or equal to 1"),
    "kind": ("  space: {policies.placement: {choices: [§eplbb]}}", "Did you mean 'eplb'?"),
    "parameter": ("  space: {policies.placement: {choices: [§{kind: eplb, mod: auto}]}}", "Did you mean 'mode'?"),
    "parameter's value": (
        "  space: {policies.placement.num_redundant_experts: {choices: [§-1]}}",
        "greater than or equal to 0",
    ),
    "router": ("  space: {policies.routing: {choices: [§topkk]}}", "unknown router 'topkk'. Did you mean 'topk'?"),
    "unit": ("  space: {engine.runtime_memory_gib: {choices: [§2 s]}}", "is a time, but a bytes"),
    "model": ("  space: {model: {choices: [§qwen3-30b]}}", "Did you mean 'qwen3-30b-a3b'?"),
    "device": ("  space: {cluster.device: {choices: [§rtx_4091]}}", "Did you mean 'rtx_4090'?"),
    "file": ("  space: {routing.path: {choices: [§none.npz]}}", "no such file"),
    "literal": ("  space: {routing.fidelity: {choices: [§tokens]}}", "Did you mean 'token'?"),
    # conditions
    "when who": ("  space: {parallel.ep: {choices: [2], when: {§parallel.dp: 4}}}", "parallel.dp is no parameter"),
    "when what": (
        "  space: {parallel.ep: {choices: [2], when: {parallel.dp: §3}}, parallel.dp: {choices: [2, 4]}}",
        "3 is no value of parallel.dp. There are: 2, 4.",
    ),
    "when what of many": (
        "  space: {parallel.ep: {choices: [2], when: {parallel.dp: [2, §3]}}, parallel.dp: {choices: [2, 4]}}",
        "3 is no value of parallel.dp",
    ),
    "when continuous": (
        "  space: {parallel.ep: {choices: [2], when: {§slo.ttft_ms: 3}}, slo.ttft_ms: {range: [1.0, 4.0]}}",
        "slo.ttft_ms is continuous",
    ),
    "when itself": ("  space: {parallel.ep: {choices: [2], when: {§parallel.ep: 2}}}", "depend on itself"),
    "when round": (
        "  space: {parallel.ep: {choices: [2], §when: {parallel.dp: 4}}, "
        "parallel.dp: {choices: [4], when: {parallel.ep: 2}}}",
        "depends on itself (parallel.ep -> parallel.dp -> parallel.ep)",
    ),
    "when never": (
        "  space: {parallel.dp: {choices: [2, 4]}, parallel.ep: {choices: [2], when: {parallel.dp: 4}}, "
        "parallel.tp: {choices: [1], §when: {parallel.dp: 2, parallel.ep: 2}}}",
        "can never hold: it and what it depends on need different values of parallel.dp",
    ),
    # beside the space
    "start who": (SPACE + "  start: [{§parallel.e: 2}]", "no parameter of the space. Did you mean parallel.ep?"),
    "start what": (SPACE + "  start: [{parallel.ep: §3}]", "3 is not in the space. There are: 2, 4."),
    "start nothing": (SPACE + "  start: [§{}]", "sets nothing"),
    "start beside": (
        "  space: {policies.placement: {choices: [contiguous, eplb]}, policies.placement.mode: {choices: [global], "
        "when: {policies.placement: eplb}}}\n"
        "  start: [{policies.placement: contiguous, §policies.placement.mode: global}]",
        "means nothing where policies.placement is contiguous",
    ),
    "start above": ("  space: {parallel.ep: {range: [1, 4]}}\n  start: [{parallel.ep: §9}]", "9 is not in the space"),
    "rung's field": (SPACE + "  rungs: [{set: {§requests.num_request: 9}}]", "Did you mean requests.num_requests?"),
    "rung's value": (SPACE + "  rungs: [{set: {requests.num_requests: §0}}]", "greater than or equal to 1"),
    "rung's search": (SPACE + "  rungs: [{set: {§parallel.ep: 2}}]", "parallel.ep is searched"),
    "judge's field": (SPACE + "  judge: {set: {§routing.fidelty: token}}", "Did you mean routing.fidelity?"),
    "judge's value": (SPACE + "  judge: {set: {routing.fidelity: §tokens}}", "Did you mean 'token'?"),
    "judge's seed": (SPACE + "  judge: {set: {§seed: 3}}", "a search cannot set seed"),
    "limit": (SPACE + "  constraints: {ttft_p99_ms: §{min: 3, max: 2}}", "exchange min and max"),
    "key": (SPACE + "  §trails: 9", "Did you mean 'trials'?"),
}  # fmt: skip
"""text, with § before the place that the message names, and words of the message"""


def refused(folder: Path, text: str) -> list[str]:
    (folder / "s.yaml").write_text(BASE + text + "\n")
    with pytest.raises(BadInput) as caught:
        load_scenario(folder / "s.yaml")
    return [str(p) for p in caught.value.problems]


@pytest.mark.parametrize("name", CASES)
def test_one_fault(name: str, tmp_path: Path) -> None:
    text, words = CASES[name]
    problems = refused(tmp_path, text.replace("§", ""))
    before = (BASE + text).partition("§")[0].splitlines()
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{tmp_path}/s.yaml:{len(before)}:{len(before[-1]) + 1}: tune."), problems[0]
    assert words in problems[0], problems[0]


def test_all_at_once(tmp_path: Path) -> None:
    """Also where a part of the block cannot be read at all, and the scenario is wrong elsewhere."""
    problems = refused(
        tmp_path,
        """  space:
    parallel.epp: {choices: [1]}
    parallel.ep: {range: [4, 2]}
    parallel.dp: {choices: [0], when: {parallel.ep: 4}}
    engine.max_num_seqs: {choices: [1], range: [1, 2]}
  start: [{parallel.dp: 3}]
  trials: 0
engine: {block_sise: 3}""",
    )
    assert [p.split(":")[1] for p in problems] == ["10", "11", "12", "13", "14", "15", "16"]


def test_what_is_legal_beside_other_values_is_fine(tmp_path: Path) -> None:
    """ep 64 needs more ranks than there are, and may get them; one field for two parameters parted by `when`."""
    (tmp_path / "s.yaml").write_text(
        BASE
        + """  constraints: {ttft_p99_ms: {max: 2000}}
  space:
    parallel.ep: {choices: [4, 64]}
    routing.popularity_zipf: {range: [0.5, 1.5]}
    tiers.experts: {choices: [4 GiB, 8, rest]}
    rebalance: {choices: [null, {interval_steps: 100}]}
    placing:
      choices:
        few: {policies.placement: {kind: eplb, num_redundant_experts: 4}}
        more: {policies.placement: eplb}
    policies.placement.num_redundant_experts: {range: [8, 32], step: 8, when: {placing: more}}
    policies.routing: {choices: [topk, switch]}
  start: [{tiers.experts: 4 GiB, placing: few}, {rebalance: null}]
  rungs: [{set: {requests.num_requests: 10}}, {seeds: 2}]
"""
    )
    scenario = load_scenario(tmp_path / "s.yaml")
    assert scenario.tune is not None
    line = note(tmp_path / "s.yaml", (), scenario)
    assert line is not None
    assert "6 parameters" not in line
    assert line.startswith("tune: 7 parameters, points without number, 60 trials for output_tok_per_s")


FIGURES = {
    "unknown objective": ("[output_tok_per_sec]", "{}", "8:16", "Did you mean"),
    "unknown constraint": ("[req_per_s]", "{ttft_p99: {max: 3}}", "9:17", "ttft_p99_ms"),
    "held back": ("[output_tok_per_s]", "{output_tok_per_s: {max: 3}}", "9:17", "write min, or remove max"),
    "held up": ("[ttft_p99_ms]", "{ttft_p99_ms: {min: 3}}", "9:17", "write max, or remove min"),
    "no slo": ("[goodput_req_per_s]", "{}", "8:16", "slo"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str, tmp_path: Path) -> None:
    objectives, constraints, place, words = FIGURES[name]
    text = BASE.replace("[output_tok_per_s]", objectives) + f"  constraints: {constraints}\n" + SPACE
    (tmp_path / "s.yaml").write_text(text)
    scenario = load_scenario(tmp_path / "s.yaml")
    with pytest.raises(BadInput) as caught:
        check_figures(tmp_path / "s.yaml", (), scenario)
    (problem,) = caught.value.problems
    assert problem.where == f"{tmp_path}/s.yaml:{place}"
    assert words in problem.message


def test_note_counts_points_and_says_what_lies_outside(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE + SPACE)
    told = note(tmp_path / "s.yaml", (), load_scenario(tmp_path / "s.yaml"))
    assert told == (
        "tune: 2 parameters, 4 points, 60 trials for output_tok_per_s; "
        "the scenario's own value of policies.placement is not in the space"
    )


def test_moesim_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    named = metadata.EntryPoint("tune", "moesim_tuner.checks:note", "moesim.checks")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [named] if group == "moesim.checks" else [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    codes = []
    for text in (BASE + SPACE, BASE.replace("tok_per_s", "tok_per_h") + SPACE, BASE + "  space: {}\n"):
        Path("s.yaml").write_text(text)
        with pytest.raises(SystemExit) as ended:
            cli.main(["check", "s.yaml"])
        codes.append(ended.value.code)
    out, err = capsys.readouterr()
    assert codes == [0, 2, 2]
    first, second = out.splitlines()
    assert first.startswith("ok: s (")
    assert second.startswith("tune: 2 parameters, 4 points, 60 trials")
    assert [line.split(" ")[1:3] for line in err.splitlines() if line.startswith("error: ")] == [
        ["s.yaml:8:16:", "tune.objectives[0]:"], ["s.yaml:9:10:", "tune.space:"]
    ]  # fmt: skip


def test_what_the_check_needs_is_no_optuna() -> None:
    modules = "moesim_tuner.checks, moesim_tuner.heuristics, moesim_tuner.diagnose"
    program = f"import sys, {modules}; print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(ran.stdout)
    assert not {"optuna", "sqlalchemy", "ortools", "distributed", "torch"} & set(loaded)
