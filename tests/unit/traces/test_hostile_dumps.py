"""Sizes that a file only declares: none is believed, none makes an error of ours or takes the memory it names."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces.expert_loads import load_expert_loads

WHOLE = [[[0, 1], [2, 3]]] * 3
HUGE = 1 << 62


def npy(shape: tuple[int, ...]) -> str:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("shape", [(0, HUGE, 4), (HUGE, 0, 4), (0, HUGE, HUGE), (0,) + (1,) * 40, (0,) + (1,) * 70])
def test_empty_arrays_of_huge_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps({"prompt_routed_experts": WHOLE, "choices": [{"routed_experts": npy(shape)}]}))
    with pytest.raises(BadInput):
        load_expert_loads(path)


@pytest.mark.parametrize("key", ["tokens", "extends"])
def test_lengths_whose_sum_wraps(tmp_path: Path, key: str) -> None:
    path = tmp_path / "s.npz"
    lengths = {"tokens": np.array([0, 0, 0, 0, 3]), "extends": np.zeros(5, np.int64)}
    lengths[key] = np.array([HUGE, HUGE, HUGE, HUGE, lengths[key][-1]])
    np.savez(
        path, kind=np.array(2), last_physical_to_logical_map=np.array([[0, 1, 2, 3]]),
        global_physical_count=np.ones((5, 1, 4), np.int64), forward_pass_id=np.arange(5), rank=np.zeros(5, np.int64),
        topk_ids=np.array([[[0, 1], [1, 2], [2, 3]]]), input_ids=np.arange(3), positions=np.arange(3),
        forward_mode=np.ones(5, np.int64), extend_tokens=np.zeros(0, np.int64), **lengths,
    )  # fmt: skip
    with pytest.raises(BadInput, match="do not fit together"):
        load_expert_loads(path)


def test_a_table_of_a_few_lines_that_would_be_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("layer_id,expert_id,count\n" + "".join(f"{layer},65535,1\n" for layer in range(4096)))
    with pytest.raises(BadInput, match="no model's"):
        load_expert_loads(path)
