"""The call of a block case: a MoE layer's own part as `ops.block` runs it, on other weights and positions each time.

Its tokens come from a few sequences, whose next positions they take. All experts are served here, so every choice is
a row. Suffixes as in `ops.block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moesim_kernels.bench.floors import block_cache_shape
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool, torch_dtype
from moesim_kernels.ops.block import Gates, Heads, Own, Place, own_part, phases

__all__ = ["block_call"]

_PLACES = 16  # other positions in the cache at most so often


def block_call(
    case: Case, device: Device, pool: Pool, sets: list[list[Any]], activations: tuple[Any, Any, Any]
) -> Callable[[int], Any]:
    """What a block case runs. sets: the weights of each rotation, as `floors.weight_shapes` lists them; activations:
    hidden states, what attention returns, and scratch for residual and cache."""
    s, tokens = case.shape, int(case.size["tokens"])
    heads = Heads(int(s["heads"]), int(s["kv_heads"]), int(s["head_dim"]))
    score: Any = s["score"]
    gates = Gates(int(s["top_k"]), score, int(s["groups"]), int(s["top_groups"]))
    owns = _weights(case, device, pool, sets)
    hidden_TH, attended_TM, scratch = activations
    cache = block_cache_shape(case)
    residual_TH = scratch[: hidden_TH.numel()].view_as(hidden_TH)
    residual_TH.zero_()  # every call adds to it, whatever it held
    cache_2SGCD = scratch[hidden_TH.numel() :][: math.prod(cache)].view(cache)
    places, slot_TK = _places(case, device, cache), _choices(case, device)
    slots, rows, turns = int(s["experts"]), tokens * gates.top_k, len(places)

    def run(i: int) -> Any:
        place = places[i % turns]
        return own_part(
            owns[i], heads, gates, hidden_TH, residual_TH, attended_TM, cache_2SGCD, place, slot_TK, slots, rows
        ).normed_TH

    return run


def _weights(case: Case, device: Device, pool: Pool, sets: list[list[Any]]) -> list[Own]:
    s, experts = case.shape, int(case.shape["experts"])
    routers = sets
    if s["router_dtype"] != case.dtype:
        routers = pool.rotate(torch_dtype(str(s["router_dtype"])), [(experts, int(s["hidden"]))])
    bias_E = torch.zeros(experts, device=device.torch_device) if s["score"] == "sigmoid" else None
    out = []
    for i, (before_H, qkv_MH, out_HM, after_H, bias_M, norm_XD, *_) in enumerate(sets):
        more = (bias_M if s["bias"] else None, norm_XD if s["head_norm"] else None, bias_E)
        out.append(Own(before_H, qkv_MH, out_HM, after_H, routers[i % len(routers)][-1], *more))
    return out


def _places(case: Case, device: Device, cache: tuple[int, ...]) -> list[Place]:
    """Where the tokens stand in each of a few rotations: sequence after sequence, each at consecutive positions."""
    tokens, (_, sequences, _, room, dim) = int(case.size["tokens"]), cache
    each = -(-tokens // sequences)
    phase_CP, token_T = phases(room, dim), torch.arange(tokens)
    out = []
    for start in range(0, room - each + 1, max(each, room // _PLACES)):
        position_T = start + token_T % each
        where = (token_T // each, position_T, phase_CP[position_T])
        out.append(Place(*(x.to(device.torch_device) for x in where)))
    return out


def _choices(case: Case, device: Device) -> Any:
    """Each token's choices, drawn evenly, [T, K]."""
    experts, top_k, tokens = int(case.shape["experts"]), int(case.shape["top_k"]), int(case.size["tokens"])
    rng = np.random.default_rng(np.random.SeedSequence([case.seed, 11]))
    slot_TK = np.ascontiguousarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k])
    return torch.from_numpy(slot_TK).to(device.torch_device)
