"""vllm-ascend: the expert map of `expert_map_path`, a list of MoE layers, each a list of devices with their experts.

{moe_layer_count, layer_list: [{layer_id, device_count, device_list: [{device_id, device_expert: [...]}]}]} as
vllm_ascend/eplb/adaptor/vllm_adaptor.py of vllm-project/vllm-ascend writes it: layer_id counts MoE layers from 0 on.
"""

from __future__ import annotations

import json

import numpy as np

from moesim.errors import BadInput
from moesim.exports import Target, full_slots
from moesim.exports.checks import vllm_ascend as rules
from moesim.placement import Placement
from moesim.strict_json import parse_json

__all__ = ["FILE", "check_target", "command", "notes", "read", "write"]

FILE = "vllm_ascend_expert_map.json"


def write(target: Target) -> str:
    """The file's text. Raises BadInput where slots are empty or a rank holds an expert twice."""
    full_slots(target, "vllm-ascend")
    placement = target.placement
    map_LGs = placement.slot_to_expert_LS.reshape(placement.num_layers, placement.num_ranks, -1)
    ordered_LGs = np.sort(map_LGs, axis=2)
    twice = np.argwhere((ordered_LGs[..., 1:] == ordered_LGs[..., :-1]).any(axis=2))
    if len(twice):
        layer, rank = (int(i) for i in twice[0])
        raise BadInput(
            f"vllm-ascend finds an expert of a rank by its number, so a rank holds it once; rank {rank} of layer"
            f" {target.layer_index[layer]} holds one twice ({len(twice)} such ranks). Use fewer redundant experts, or a"
            " policy that keeps replicas apart",
            "--emit vllm-ascend",
        )
    layers = [
        {
            "layer_id": number,
            "device_count": placement.num_ranks,
            "device_list": [{"device_id": g, "device_expert": row} for g, row in enumerate(map_Gs.tolist())],
        }
        for number, map_Gs in enumerate(map_LGs)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


def read(text: str, num_experts: int, where: str = FILE) -> Placement:
    """The placement of a file. Raises BadInput for what vllm-ascend refuses."""
    problems = rules.check(text, num_experts, None, None, where)
    if problems:
        raise BadInput("; ".join(problems), where)
    layers = parse_json(text, where)["layer_list"]
    map_LGs = np.array([[d["device_expert"] for d in layer["device_list"]] for layer in layers], np.int32)
    return Placement(map_LGs.reshape(len(layers), -1), num_experts, map_LGs.shape[1])


def check_target(text: str, target: Target) -> list[str]:
    """What vllm-ascend would refuse."""
    placement = target.placement
    return rules.check(text, placement.num_experts, placement.num_ranks, placement.num_layers, FILE)


def command(target: Target, path: str) -> str:
    """Options that load the file."""
    options = json.dumps({"eplb_config": {"expert_map_path": path}})
    return (
        f"vllm serve {target.model} --tensor-parallel-size {target.placement.num_ranks} --enable-expert-parallel"
        f" --additional-config '{options}'"
    )


def notes(target: Target) -> tuple[str, ...]:
    """What to know before using it."""
    return ("versions before eplb_config take expert_map_path itself as a key of --additional-config.",)
