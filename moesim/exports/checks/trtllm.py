"""What TensorRT-LLM does with moe_load_balancer.yaml, step by step.

`MoeLoadBalancerConfig` (tensorrt_llm/llmapi/llm_args.py of NVIDIA/TensorRT-LLM, a strict pydantic model: no other keys;
`setup` needs num_slots; `get_layer_initial_global_assignments` raises for a missing layer and for another length), the
MoE layer that takes it (tensorrt_llm/_torch/modules/fused_moe: num_slots >= experts, the set of a row is that of all
experts, ep_size > 1; a rank's slots are num_slots // ep_size, so a remainder would be lost), and layer_updates_per_iter
0 for a map that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.errors import BadInput
from moesim.scenario.yamlio import parse_yaml

__all__ = ["check", "check_data"]

_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def check(text: str, num_experts: int, ep_size: int, moe_layers: Sequence[int], where: str) -> list[str]:
    """What is wrong with the file's text for a model whose MoE layers include `moe_layers`, [] if nothing."""
    try:
        data, _ = parse_yaml(text, where, number_keys=True)
    except BadInput as error:
        return [problem.message for problem in error.problems]
    return check_data(data, num_experts, ep_size, moe_layers)


def check_data(data: Any, num_experts: int, ep_size: int, moe_layers: Sequence[int]) -> list[str]:
    """`check` of a parsed file."""
    if not isinstance(data, dict):
        return ["a mapping is needed"]
    problems = [f"the key {key!r} is not permitted" for key in sorted(set(map(str, data)) - _KEYS)]
    slots = data.get("num_slots")
    if type(slots) is not int:
        return [*problems, f"num_slots: a whole number is needed, got {str(slots)[:40]}"]
    if slots < num_experts or slots % ep_size:
        problems.append(f"num_slots {slots}: at least {num_experts}, and a multiple of ep_size {ep_size}")
    updates = data.get("layer_updates_per_iter", 0)
    if type(updates) is not int or updates < 0:
        problems.append(f"layer_updates_per_iter: a whole number from 0 on is needed, got {str(updates)[:40]}")
    if ep_size < 2:
        problems.append(f"ep_size {ep_size}: the load balancer needs expert parallelism")
    assigned = data.get("initial_global_assignments")
    if assigned is None:
        return problems
    if not isinstance(assigned, dict):
        return [*problems, "initial_global_assignments: a mapping from layer to list is needed"]
    return problems + _assignments(assigned, slots, num_experts, moe_layers)


def _assignments(assigned: dict[Any, Any], slots: int, num_experts: int, moe_layers: Sequence[int]) -> list[str]:
    problems, numbers = [], set()
    for layer, row in assigned.items():
        number = str(layer)
        if not (number.isascii() and number.isdigit()):
            problems.append(f"initial_global_assignments: {number[:40]!r} is no layer's number")
            continue
        numbers.add(int(number))
        if not isinstance(row, list) or not all(type(expert) is int for expert in row):
            problems.append(f"layer {number}: a list of whole numbers is needed")
        elif len(row) != slots:
            problems.append(f"layer {number}: {len(row)} slots do not match num_slots {slots}")
        elif set(row) != set(range(num_experts)):
            wrong = sorted(set(row) ^ set(range(num_experts)))[0]
            problems.append(f"layer {number}: every expert from 0 to {num_experts - 1} and no other, wrong: {wrong}")
    missing = sorted(set(moe_layers) - numbers)
    return [*problems, *(f"layer {layer} not found in initial_global_assignments" for layer in missing)]
