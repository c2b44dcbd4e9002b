"""What vllm-ascend does with the file of expert_map_path, step by step.

vllm_ascend/eplb/core/eplb_utils.py of vllm-project/vllm-ascend: `expert_file_to_tensor` (layer_list is looked up by the
number of the MoE layer, from 0 on; the devices' lists make one tensor, so they are of one length), `init_eplb_config`
(the place of an expert on a rank is written into a table by the expert's number: one that stands twice loses a place,
one that stands nowhere is sent to slot 0; redundant ones = all places - experts), `generate_log2phy_map` (the places of
a rank are counted on rank 0). vllm_ascend/ops/expert_load_balancer.py, older: device_count of the first layer is the
number of ranks.
"""

from __future__ import annotations

from typing import Any

from moesim.errors import BadInput
from moesim.strict_json import parse_json

__all__ = ["check"]


def check(text: str, num_experts: int, ep_size: int | None, moe_layers: int | None, where: str) -> list[str]:
    """What is wrong with the file's text for a model of `moe_layers` MoE layers (None: any), [] if nothing."""
    try:
        data = parse_json(text, where)
    except BadInput as error:
        return [problem.message for problem in error.problems]
    layers = data.get("layer_list") if isinstance(data, dict) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        return ["layer_list: a list of objects, one a MoE layer, is needed"]
    problems = []
    count = data.get("moe_layer_count")
    if type(count) is not int or count != len(layers):
        problems.append(f"moe_layer_count {str(count)[:40]} for {len(layers)} layers in layer_list")
    if moe_layers is not None and len(layers) != moe_layers:
        problems.append(f"{len(layers)} layers where the model has {moe_layers} MoE layers")
    ranks = ep_size if ep_size is not None else layers[0].get("device_count")
    width: int | None = None
    for number, layer in enumerate(layers):
        found, width = _layer(number, layer, ranks, width, num_experts)
        problems += found
    return problems


def _layer(
    number: int, layer: dict[str, Any], ranks: Any, width: int | None, num_experts: int
) -> tuple[list[str], int | None]:
    """The problems of a layer, and how many experts a device has."""
    devices = layer.get("device_list")
    if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
        return [f"layer {number}: device_list: a list of objects is needed"], width
    if len(devices) != ranks or layer.get("device_count") != ranks:
        given = str(layer.get("device_count"))[:40]
        return [f"layer {number}: {len(devices)} devices, device_count {given}, for {str(ranks)[:40]} ranks"], width
    problems, held = [], set()
    for rank, device in enumerate(devices):
        row = device.get("device_expert")
        if not isinstance(row, list) or not row or not all(type(expert) is int for expert in row):
            problems.append(f"layer {number}, device {rank}: device_expert: a list of whole numbers is needed")
            continue
        if device.get("device_id", rank) != rank:
            problems.append(
                f"layer {number}: device {str(device['device_id'])[:40]} stands in the place of rank {rank}"
            )
        width = len(row) if width is None else width
        if len(row) != width:
            problems.append(f"layer {number}, device {rank}: {len(row)} experts where the first device has {width}")
        if len(set(row)) != len(row):
            problems.append(f"layer {number}, device {rank}: an expert stands twice on one device")
        held |= set(row)
    wrong = sorted(held ^ set(range(num_experts)))
    if wrong:
        problems.append(f"layer {number}: every expert from 0 to {num_experts - 1} and no other, wrong: {wrong[0]}")
    return problems, width
