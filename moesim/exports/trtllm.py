"""TensorRT-LLM: moe_load_balancer.yaml {num_slots, layer_updates_per_iter, initial_global_assignments}.

examples/wide_ep/ep_load_balancer/README.md of NVIDIA/TensorRT-LLM. Assignments are by the model's own number of the
layer; the slots of a rank stand together. The YAML is lines of numbers, so it is written as such.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import BadInput
from moesim.exports import Target, full_slots
from moesim.exports.checks import trtllm as rules
from moesim.placement import Placement
from moesim.scenario.yamlio import parse_yaml

__all__ = ["FILE", "check_target", "command", "notes", "read", "write"]

FILE = "moe_load_balancer.yaml"


def write(target: Target) -> str:
    """The file's text. Raises BadInput where slots are empty."""
    full_slots(target, "trtllm")
    lines = [f"num_slots: {target.placement.num_slots}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    rows = target.placement.slot_to_expert_LS.tolist()
    lines += [f"  {layer}: {row}" for layer, row in zip(target.layer_index, rows, strict=True)]
    return "\n".join(lines) + "\n"


def read(text: str, num_experts: int, num_ranks: int, where: str = FILE) -> tuple[Placement, tuple[int, ...]]:
    """The placement of a file and its layers' numbers. Raises BadInput for what TensorRT-LLM refuses."""
    data, _ = parse_yaml(text, where, number_keys=True)
    problems = rules.check_data(data, num_experts, num_ranks, ())
    if problems:
        raise BadInput("; ".join(problems), where)
    assigned = data.get("initial_global_assignments")
    if assigned is None:
        raise BadInput("no initial_global_assignments: TensorRT-LLM starts with a map of its own", where)
    layers = tuple(sorted(int(layer) for layer in assigned))
    by_number = {int(layer): row for layer, row in assigned.items()}
    return Placement(np.array([by_number[i] for i in layers], np.int32), num_experts, num_ranks), layers


def check_target(text: str, target: Target) -> list[str]:
    """What TensorRT-LLM would refuse."""
    placement = target.placement
    return rules.check(text, placement.num_experts, placement.num_ranks, target.layer_index, FILE)


def command(target: Target, path: str) -> str:
    """Options that load the file; the second line goes into the file that the first names."""
    ranks = target.placement.num_ranks
    return (
        f"trtllm-serve {target.model} --tp_size {ranks} --ep_size {ranks} --extra_llm_api_options options.yaml\n"
        f"options.yaml: {{enable_attention_dp: true, moe_config: {{backend: WIDEEP, load_balancer: {path}}}}}"
    )


def notes(target: Target) -> tuple[str, ...]:
    """What to know before using it."""
    return ("layers of multi-token prediction have numbers of their own, which the file needs where they are used.",)
