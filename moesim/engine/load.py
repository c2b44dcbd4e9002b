"""Reading the weights before the first request: every rank's bytes through the ports they share."""

from __future__ import annotations

from typing import Literal

import simpy

from moesim.engine.links import Network
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.memory import RankMemory
from moesim.topology import Topology

__all__ = ["load_weights_ns"]


def load_weights_ns(
    weights_from: Literal["none", "host", "nvme"],
    cluster: Cluster,
    layout: Layout,
    memory: RankMemory,
    replicas: int,
) -> int:
    """ns until the last rank holds its weights. Ranks of a node share its host memory and NVMe max-min fairly."""
    if weights_from == "none":
        return 0
    env = simpy.Environment()
    topology = Topology(cluster)
    network = Network(env, topology.capacity_C, topology.port_names)
    arrived = []
    for rank in range(layout.ranks * replicas):
        route = topology.host_to_gpu(rank) if weights_from == "host" else topology.nvme_to_gpu(rank)
        size = memory.dense_weights + memory.expert_weights + memory.expert_cache
        arrived.append(network.transfer(route.ports, size, route.latency_ns))
    env.run(until=env.all_of(arrived))
    return int(env.now)
