"""vLLM: the value of `--eplb-config`. It loads no map: it balances by itself, from the counts of the last window.

`EPLBConfig` of vllm/config/parallel.py of vllm-project/vllm. Its own map starts as slot i = expert i mod E; loading one
has been proposed (vllm-project/vllm issues 34811 and 53022) and is not in a release that was read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from moesim.errors import BadInput
from moesim.exports import Target, full_slots
from moesim.exports.checks import vllm as rules
from moesim.strict_json import parse_json

__all__ = ["FILE", "EplbConfig", "check_target", "command", "notes", "read", "render", "write"]

FILE = "vllm_eplb_config.json"


@dataclass(frozen=True)
class EplbConfig:
    """The keys that this project has an opinion on, vLLM's defaults where nothing is given.

    window_size: steps whose counts are used. step_interval: steps between rearrangements. use_async: weights move
    beside the steps.
    """

    num_redundant_experts: int
    window_size: int = 1000
    step_interval: int = 3000
    use_async: bool = True
    policy: str = "default"


def render(config: EplbConfig) -> str:
    """The JSON text, one line."""
    return json.dumps(asdict(config)) + "\n"


def write(target: Target) -> str:
    """The text for as many redundant experts as the placement has, and the steps that were told.

    Raises BadInput where slots are empty.
    """
    full_slots(target, "vllm")
    config = EplbConfig(target.redundant)
    config = replace(config, window_size=target.window or config.window_size)
    return render(replace(config, step_interval=target.interval or config.step_interval))


def read(text: str, num_experts: int, num_ranks: int, where: str = FILE) -> EplbConfig:
    """The values of a text. Raises BadInput for what vLLM refuses."""
    problems = rules.check(text, num_experts, num_ranks, where)
    if problems:
        raise BadInput("; ".join(problems), where)
    data = parse_json(text, where)
    return EplbConfig(**{"num_redundant_experts": 0} | {k: v for k, v in data.items() if k in _KEYS})


_KEYS = frozenset(EplbConfig.__dataclass_fields__)


def check_target(text: str, target: Target) -> list[str]:
    """What vLLM would refuse."""
    return rules.check(text, target.placement.num_experts, target.placement.num_ranks, FILE)


def command(target: Target, path: str) -> str:
    """Options with the values of the file."""
    return (
        f"vllm serve {target.model} --data-parallel-size {target.placement.num_ranks} --enable-expert-parallel"
        f" --enable-eplb --eplb-config '{write(target).strip()}'"
    )


def notes(target: Target) -> tuple[str, ...]:
    """What to know before using it."""
    steps = (("window_size", target.window), ("step_interval", target.interval))
    left = " and ".join(name for name, told in steps if told is None)
    loads = (
        "vLLM loads no map: it starts from its own and rearranges by its own counts, so the balance above is what a map"
        " of this kind can reach, not what vLLM starts with."
    )
    if not left:
        return (loads,)
    return loads, f"{left}: vLLM's default; moesim explain eplb finds what pays, --window and --interval set it."
