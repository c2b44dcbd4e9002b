"""SGLang: the JSON file of `--init-expert-location`, {"physical_to_logical_map": [layers, physical experts]}.

python/sglang/srt/eplb/expert_location.py of sgl-project/sglang. Rows are all layers of the model, dense ones too
(`num_layers` is num_hidden_layers there): those get the map that SGLang itself starts with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from moesim.errors import BadInput
from moesim.exports import Target, full_slots
from moesim.exports.checks import sglang as rules
from moesim.placement import Placement, initial_map
from moesim.strict_json import parse_json

__all__ = ["FILE", "check_target", "command", "notes", "read", "write"]

FILE = "sglang_expert_location.json"


def write(target: Target) -> str:
    """The file's text. Raises BadInput where slots are empty or the model's number of layers is unknown."""
    full_slots(target, "sglang")
    if not target.model_layers:
        raise BadInput(
            "SGLang's map has a row for every layer of the model, dense ones too, and how many there are is not known."
            " Name the model: --model",
            "--emit sglang",
        )
    placement = target.placement
    map_LP = np.tile(initial_map(placement.num_experts, placement.num_slots), (target.model_layers, 1))
    map_LP[list(target.layer_index)] = placement.slot_to_expert_LS
    return json.dumps({"physical_to_logical_map": map_LP.tolist()}) + "\n"


def read(
    text: str, num_experts: int, num_ranks: int, layer_index: Sequence[int] | None = None, where: str = FILE
) -> Placement:
    """The placement of the layers `layer_index` (None: all rows) of a file. Raises BadInput for what SGLang refuses."""
    problems = rules.check(text, num_experts, num_ranks, None, where)
    if problems:
        raise BadInput("; ".join(problems), where)
    map_LP = np.array(parse_json(text, where)["physical_to_logical_map"], np.int32)
    if layer_index is not None and max(layer_index, default=0) >= len(map_LP):
        raise BadInput(f"layer {max(layer_index)} is asked for, {len(map_LP)} rows are there", where)
    return Placement(map_LP if layer_index is None else map_LP[list(layer_index)], num_experts, num_ranks)


def check_target(text: str, target: Target) -> list[str]:
    """What SGLang would refuse."""
    placement = target.placement
    return rules.check(text, placement.num_experts, placement.num_ranks, target.model_layers, FILE)


def command(target: Target, path: str) -> str:
    """Options that load the file."""
    ranks = target.placement.num_ranks
    return (
        f"python -m sglang.launch_server --model-path {target.model} --tp-size {ranks} --ep-size {ranks}"
        f" --init-expert-location {path} --ep-num-redundant-experts {target.redundant} --ep-dispatch-algorithm static"
    )


def notes(target: Target) -> tuple[str, ...]:
    """What to know before using it."""
    return ("--ep-dispatch-algorithm dynamic draws a replica for every token; static gives each rank its own.",)
