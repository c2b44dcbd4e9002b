"""What vLLM does with the value of --eplb-config.

`EPLBConfig` of vllm/config/parallel.py of vllm-project/vllm (a pydantic dataclass: no other keys, window_size > 0,
step_interval > 0, num_redundant_experts >= 0, log_balancedness_interval > 0, policy "default", one of four
communicators; `_validate_eplb_config`: asynchronous moves go with neither torch_nccl nor pynccl), `ParallelConfig`
(more than one rank), and the MoE layer under EPLB (experts and redundant ones spread evenly over the ranks).
"""

from __future__ import annotations

from typing import Any

from moesim.errors import BadInput
from moesim.strict_json import parse_json

__all__ = ["check"]

_WHOLE = {"window_size": 1, "step_interval": 1, "num_redundant_experts": 0, "log_balancedness_interval": 1}
_FLAGS = ("log_balancedness", "use_async")
_COMMUNICATORS = (None, "torch_nccl", "torch_gloo", "nixl", "pynccl")


def check(text: str, num_experts: int, ep_size: int, where: str) -> list[str]:
    """What is wrong with the text for `num_experts` on `ep_size` ranks, [] if nothing."""
    try:
        data = parse_json(text, where)
    except BadInput as error:
        return [problem.message for problem in error.problems]
    if not isinstance(data, dict):
        return ["an object is needed"]
    known = {*_WHOLE, *_FLAGS, "policy", "communicator"}
    problems = [f"the key {key!r} is not permitted" for key in sorted(set(data) - known)]
    for key, least in _WHOLE.items():
        value = data.get(key, least)
        if type(value) is not int or value < least:
            problems.append(f"{key}: a whole number from {least} on is needed, got {str(value)[:40]}")
    problems += [f"{key}: true or false is needed" for key in _FLAGS if type(data.get(key, True)) is not bool]
    return problems + _together(data, num_experts, ep_size)


def _together(data: dict[str, Any], num_experts: int, ep_size: int) -> list[str]:
    problems = []
    if data.get("policy", "default") != "default":
        problems.append(f"policy: only 'default' is there, got {str(data['policy'])[:40]!r}")
    communicator = data.get("communicator")
    if isinstance(communicator, list | dict) or communicator not in _COMMUNICATORS:
        problems.append(f"communicator: one of {_COMMUNICATORS} is needed, got {str(communicator)[:40]!r}")
    elif data.get("use_async", True) and communicator in ("torch_nccl", "pynccl"):
        problems.append(f"use_async does not go with the communicator {communicator}")
    redundant = data.get("num_redundant_experts", 0)
    if type(redundant) is int and (num_experts + redundant) % ep_size:
        problems.append(f"{num_experts} experts + {redundant} redundant ones do not divide by {ep_size} ranks")
    if ep_size < 2:
        problems.append(f"{ep_size} rank: EPLB needs more than one")
    return problems
