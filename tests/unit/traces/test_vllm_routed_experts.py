"""vLLM's routed experts: responses as they came, to tokens."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces.expert_loads import load_expert_loads, recognise


def ids(tokens: int, seed: int, layers: int = 3, k: int = 2, experts: int = 6) -> Any:
    rng = np.random.default_rng(seed)
    return np.stack([[rng.permutation(experts)[:k] for _ in range(layers)] for _ in range(tokens)]).astype(np.int16)


def npy(array: Any) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def response(prompt: Any, *choices: Any) -> dict[str, Any]:
    given = [
        {"index": i, "routed_experts": c.tolist() if isinstance(c, np.ndarray) else c} for i, c in enumerate(choices)
    ]
    return {
        "id": "x",
        "prompt_routed_experts": prompt.tolist() if isinstance(prompt, np.ndarray) else prompt,
        "choices": given,
    }


def written(tmp_path: Path, data: Any, name: str = "a.json") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, data)) if name.endswith("l") else json.dumps(data))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_prompt_and_answers_become_sequences(tmp_path: Path, name: str) -> None:
    prompt, first, second, other = ids(4, 0), ids(2, 1), ids(3, 2), ids(5, 3)
    data = [response(prompt, first, second), response(npy(other), npy(ids(1, 4)))]
    path = written(tmp_path, data, name)
    assert recognise(path) == "vllm_routed_experts"
    loads = load_expert_loads(path, tokens_per_row=8, num_experts=8)
    source = loads.tokens
    assert source is not None
    np.testing.assert_array_equal(source.expert_TLK, np.concatenate([prompt, first, second, other, ids(1, 4)]))
    assert source.sequence_tokens_Q.tolist() == [6, 3, 6]
    assert source.phase_T is not None
    assert source.phase_T.tolist() == [0] * 4 + [1] * 5 + [0] * 5 + [1]
    assert (loads.num_experts, loads.top_k, loads.num_rows, loads.layer_index) == (8, 2, 2, None)


def test_cached_prefixes_and_preempted_requests_are_left_out(tmp_path: Path) -> None:
    prompt = ids(4, 0)
    prompt[:2] = -1
    loads = load_expert_loads(written(tmp_path, [response(prompt, None)]))
    assert loads.tokens is not None
    np.testing.assert_array_equal(loads.tokens.expert_TLK, prompt[2:])
    said = " ".join(loads.warnings)
    assert "2 tokens with cached prefixes" in said
    assert "1 arrays are null" in said
    assert "taken from the largest id" in said


def test_dense_layers_of_older_versions_are_found(tmp_path: Path) -> None:
    whole = np.zeros((7, 5, 2), np.int16)
    whole[:, 2:] = ids(7, 0)
    loads = load_expert_loads(written(tmp_path, response(whole, [])))
    assert loads.layer_index == (2, 3, 4)
    assert loads.model_layers == 5
    assert loads.num_layers == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([response(None, None)], "2 arrays are null"),
        ([{"object": "list"}], "`choices`, a list of objects"),
        ([3], "a response is an object, got 3"),
        ([response([[[1, 2], [3]]])], "as many experts"),
        ([response([[[0.5, 1.5]]])], "whole numbers"),
        ([response([[1, 2]])], "whole numbers"),
        ([response([[[1, -7]]])], "-7..1"),
        ([response([[[1, 1]], [[2, 3]]])], "distinct experts"),
        ([response([[[1, 10**30]]])], "whole numbers|small"),
        ([response("AAAA")], "no base64 of an .npy"),
        ([response("no base64!")], "no base64 of an .npy"),
        ([response(npy(np.array([["x"]], object).astype("U1")))], "no base64|Nothing is unpickled"),
        ([response(npy(ids(3, 0))[:-40])], "cut off or damaged|no base64"),
        ([response(ids(2, 0)), response(ids(2, 1, layers=4))], "one model a file"),
        ([response(np.full((3, 2, 2), -1))], "Is the model a MoE model"),
    ],
)
def test_what_is_no_response_is_refused_in_one_error(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        load_expert_loads(written(tmp_path, data), "vllm_routed_experts")
    assert len(caught.value.problems) == 1


def test_lying_npy_sizes_and_broken_json_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i2", "fortran_order": False, "shape": (1 << 30, 60, 8)})
    lying = base64.b64encode(stream.getvalue() + b"xx").decode()
    with pytest.raises(BadInput, match="declares shape"):
        load_expert_loads(written(tmp_path, response(lying)))
    for text in ('{"choices": [', '{"choices": [], "choices": []}', '{"choices": [{"routed_experts": [[[NaN]]]}]}'):
        path = tmp_path / "b.json"
        path.write_text(text)
        with pytest.raises(BadInput, match="not JSON"):
            load_expert_loads(path)


def test_counts_in_json_are_not_taken_for_responses(tmp_path: Path) -> None:
    assert recognise(written(tmp_path, {"3": [1, 2]})) == "counts"
    assert recognise(written(tmp_path, [[1, 2]])) == "counts"


@pytest.mark.parametrize("answer", [3, 4])  # the last token generated has no pass of its own
def test_prompt_and_answer_in_one_array_are_parted_by_usage(tmp_path: Path, answer: int) -> None:
    data = response(None, ids(8, 0)) | {"usage": {"prompt_tokens": 5, "completion_tokens": answer}}
    source = load_expert_loads(written(tmp_path, data)).tokens
    assert source is not None
    assert source.phase_T is not None
    assert source.phase_T.tolist() == [0] * 5 + [1] * 3
    assert source.num_sequences == 1
