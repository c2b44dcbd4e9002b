"""What SGLang does with the file of --init-expert-location, step by step.

python/sglang/srt/eplb/expert_location.py of sgl-project/sglang: `compute_initial_expert_location_metadata` (the keys),
`init_by_mapping` (takes physical_to_logical_map and nothing else: a further key is a TypeError), `_init_common`
(physical experts = logical ones + --ep-num-redundant-experts, divisible by the EP size),
`_compute_logical_to_all_physical_map` (an id beyond the logical experts is an IndexError; an expert without a physical
one leaves a row of -1, which the static dispatch cannot choose from), and its table of the layers of the model, by
which a layer finds its row.
"""

from __future__ import annotations

from typing import Any

from moesim.errors import BadInput
from moesim.strict_json import parse_json

__all__ = ["check"]


def check(text: str, num_experts: int, ep_size: int, num_layers: int | None, where: str) -> list[str]:
    """What is wrong with the file's text for a model of `num_experts` and `num_layers` (None: any), [] if nothing."""
    try:
        data = parse_json(text, where)
    except BadInput as error:
        return [problem.message for problem in error.problems]
    if not isinstance(data, dict):
        return ["an object is needed"]
    if "physical_to_logical_map" not in data:
        return [f"physical_to_logical_map is missing, there is {', '.join(map(str, data)) or 'nothing'}"]
    extra = sorted(set(data) - {"physical_to_logical_map"})
    problems = [f"the key {key!r} beside physical_to_logical_map raises a TypeError" for key in extra]
    rows = data["physical_to_logical_map"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        return [*problems, "physical_to_logical_map: a list of rows, one a layer, is needed"]
    if num_layers is not None and len(rows) != num_layers:
        problems.append(f"{len(rows)} layers where the model has {num_layers}, dense ones included")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        return [*problems, f"rows of different lengths {sorted(widths)[:4]} make no tensor"]
    physical = widths.pop()
    if physical % ep_size or physical < num_experts:
        problems.append(f"{physical} physical experts: at least {num_experts}, and a multiple of ep_size {ep_size}")
    for layer, row in enumerate(rows):
        problems += _row(layer, row, num_experts)
    return problems


def _row(layer: int, row: list[Any], num_experts: int) -> list[str]:
    if not all(type(expert) is int for expert in row):
        return [f"layer {layer}: whole numbers are needed"]
    wrong = [expert for expert in row if not 0 <= expert < num_experts]
    if wrong:
        return [f"layer {layer}: expert {wrong[0]} of {num_experts}"]
    missing = sorted(set(range(num_experts)) - set(row))
    return [f"layer {layer}: expert {missing[0]} has no physical expert"] if missing else []
