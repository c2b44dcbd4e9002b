"""From deployments to a plan: the exact shapes that a simulation of them will price, and no case twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim_kernels.bench.plan import Case, Plan
from moesim_kernels.calibrate.deployment import Deployment
from moesim_kernels.calibrate.exchange import collective_cases, exchange_cases, ranks_of
from moesim_kernels.calibrate.grid import (
    attention_cases,
    block_cases,
    layer_cases,
    moe_cases,
    stream_cases,
    training_cases,
)

__all__ = ["make_plan"]


def make_plan(
    deployments: Sequence[Deployment],
    device: str,
    *,
    threads: int = 1,
    backend: str = "torch",
    training: bool = False,
    seed: int = 0,
) -> Plan:
    """What to measure for `deployments` on one `device` ("cpu" or "cuda"): the same plan for the same arguments.

    backend: the kernels of the routed experts. training: the backward operators too. `note` of the plan names the
    deployments. Raises BadInput for what no kernel here runs.
    """
    problems = [p for d in deployments for p in d.unmeasured(device)]
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))
    found: dict[str, Case] = {}
    dtypes, ranks = {"bf16", "fp32"}, 1
    for at, d in enumerate(deployments):
        rng = np.random.default_rng([seed, at])
        cases = [
            *moe_cases(d, device, backend, rng),
            *layer_cases(d, device, rng),
            *attention_cases(d, device, rng),
            *block_cases(d, np.random.default_rng([seed, at, 1])),
            *(training_cases(d, backend, rng) if training else ()),
            *exchange_cases(d, device, np.random.default_rng([seed, at, 1])),
        ]
        for case in cases:
            found.setdefault(case.id, case)
            dtypes.add(case.dtype)
        ranks = max(ranks, ranks_of(d, device))
    links = collective_cases(device, ranks, np.random.default_rng([seed, len(deployments), 1]))
    machine = {case.id: case for case in (*stream_cases(device, dtypes), *links)}
    note = {"deployments": [_described(d) for d in deployments], "seed": seed}
    return Plan(device, (*machine.values(), *(c for i, c in found.items() if i not in machine)), threads, note)


def _described(d: Deployment) -> dict[str, Any]:
    """A deployment as numbers, for the profile's provenance."""
    p = d.layout
    return {
        "model": d.model.name,
        "tp": p.tp,
        "dp": p.dp,
        "ep": p.ep,
        "max_batched_tokens": d.max_tokens,
        "max_seqs": d.engine.max_num_seqs,
        "max_context": d.max_context,
        "dtypes": f"weights {d.model.weight_dtype}, experts {d.model.expert_dtype}, activations "
        f"{d.model.activation_dtype}, KV {d.model.kv_dtype}",
    }
