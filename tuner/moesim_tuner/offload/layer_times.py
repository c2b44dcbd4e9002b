"""How long a layer takes by how many of its experts are missing: what a resident set is judged by.

Of `active` experts that a step's tokens take in a layer, `missing` are not on the device. Of these the CPU computes as
many as let the layer end first (`moesim.offload.shares.shortest_layer`, as the policy does when it serves); the others
travel, one after the other. As in `moesim.tiers.device`: work is handed to the CPU first, then the device computes what
it has, and what comes as it comes. Experts of a step count as alike: each has its equal part of the step's rows.

Legend: S steps, E experts, A active ones, M missing ones.
"""

from __future__ import annotations

import math

import numpy as np

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.offload import MissCosts, OffloadContext, RouteSample
from moesim.offload.shares import shortest_layer

__all__ = ["active_LSE", "layer_ns", "ns_AM"]


def active_LSE(sample: RouteSample, context: OffloadContext, running: int, steps: int) -> BoolArray:
    """Which experts each of at most `steps` steps takes in each layer, bool [L, S, E]. A step has one token of each of
    `running` places of the sample, evenly apart, as requests that decode together are; steps are evenly apart, too."""
    rows = len(sample.expert_TLK)
    count = min(steps, rows)
    start_S = np.arange(count) * rows // max(count, 1)
    apart_R = np.arange(running) * rows // running
    token_SR = (start_S[:, None] + apart_R[None, :]) % max(rows, 1)
    out = np.zeros((context.num_layers, count, context.num_experts + 1), bool)
    for layer in range(context.num_layers):
        ids = np.minimum(sample.expert_TLK[token_SR, layer], context.num_experts).reshape(count, -1)
        np.put_along_axis(out[layer], ids.astype(np.int64), True, axis=1)
    return out[:, :, :-1]


def layer_ns(costs: MissCosts, active: int, missing: int, rows: int) -> float:
    """ns of a layer's experts. rows: of each of them."""
    cpu_ns = costs.cpu_ns(rows)
    on_cpu = int(shortest_layer(np.full(missing, cpu_ns), costs.transfer_ns, costs.sync_ns).sum())
    start = costs.sync_ns if on_cpu else 0.0
    device = start + _product_ns(costs, active - missing, rows)
    coming, came = missing - on_cpu, 0
    while came < coming:  # those that have come meanwhile compute together
        device = max(device, (came + 1) * costs.transfer_ns)
        here = coming if costs.transfer_ns <= 0 else min(coming, int(device / costs.transfer_ns + 1e-9))
        device += _product_ns(costs, here - came, rows)
        came = here
    return max(device, start + on_cpu * cpu_ns)


def _product_ns(costs: MissCosts, experts: int, rows: int) -> float:
    if costs.product_ns is None:
        return experts * costs.gpu_ns(rows)
    return costs.product_ns([rows] * experts) if experts else 0.0


def ns_AM(costs: MissCosts, active: IntArray, rows: int) -> FloatArray:
    """`layer_ns` by (active, missing), for the numbers `active` that occur; inf for others and for missing > active.
    rows: of all of a step's choices in a layer together."""
    most = int(active.max(initial=0))
    out = np.full((most + 1, most + 2), math.inf)
    out[0, 0] = 0.0
    for count in np.unique(active[active > 0]).tolist():
        each = max(1, round(rows / count))
        out[count, : count + 1] = [layer_ns(costs, count, missing, each) for missing in range(count + 1)]
    return out
