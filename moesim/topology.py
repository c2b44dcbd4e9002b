"""Ports and routes of a cluster, fair sharing of what different transfers use at once, and a collective's
ports.

A *port* is one direction of one link, or a memory that reads and writes share. A transfer holds all ports of
its route at one rate. Rates are max-min fair: none can grow without another, no faster one, shrinking.

Legend: C ports, F transfers (flows), G ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.hardware import Cluster

__all__ = [
    "PortBytes",
    "Route",
    "Topology",
    "Traffic",
    "collective_port_bytes",
    "max_min_rates",
    "traffic_by_level",
]

_TIE = 1 + 1e-12  # ports whose fair shares differ by less fill at the same moment


def max_min_rates(capacity_C: ArrayLike, uses: Sequence[Sequence[int]] | AnyArray) -> FloatArray:
    """Max-min fair rate of each flow: float64 [F], in the unit of the capacities.

    capacity_C: capacity of each port, >= 0, may be infinite. uses: the ports of each flow (one listed twice
    is used twice), or a matrix [F, C] that says how often a flow uses a port. A flow without ports gets
    infinity, one through a port without capacity zero. Progressive filling (Bertsekas and Gallager, Data
    Networks, 2nd ed., section 6.5.2): all rates rise together; when a port is full, the flows through it
    stop. Raises ValueError for a capacity that is negative or NaN, or a port that does not exist.
    """
    capacity = np.asarray(capacity_C, dtype=np.float64)
    flow, port, times, flows = _incidence(uses)
    if capacity.ndim != 1 or not (capacity >= 0).all():
        raise ValueError("capacities must be a vector of numbers >= 0")
    if port.size and (port.min() < 0 or port.max() >= capacity.size):
        raise ValueError(f"ports must lie in [0, {capacity.size}), got {port.min()}..{port.max()}")
    binds = np.isfinite(capacity[port])
    flow, port, times = flow[binds], port[binds], times[binds]
    rate_F = np.full(flows, np.inf)
    taken_C = np.zeros(capacity.size)
    while flow.size:
        users_C = np.bincount(port, weights=times, minlength=capacity.size)
        share_C = np.full(capacity.size, np.inf)
        np.divide(np.maximum(capacity - taken_C, 0.0), users_C, out=share_C, where=users_C > 0)
        level_F = np.full(flows, np.inf)
        np.minimum.at(level_F, flow, share_C[port])
        lowest_C = np.full(capacity.size, np.inf)
        np.minimum.at(lowest_C, port, level_F[flow])
        fills_C = share_C <= lowest_C * _TIE
        stops_F = np.zeros(flows, np.bool_)
        stops_F[flow[fills_C[port]]] = True
        rate_F[stops_F] = level_F[stops_F]
        stopped = stops_F[flow]
        used = rate_F[flow[stopped]] * times[stopped]
        taken_C += np.bincount(port[stopped], weights=used, minlength=capacity.size)
        flow, port, times = flow[~stopped], port[~stopped], times[~stopped]
    return rate_F


def _incidence(uses: Sequence[Sequence[int]] | AnyArray) -> tuple[IntArray, IntArray, FloatArray, int]:
    """(flow, port, how often) of each use, and the number of flows."""
    if isinstance(uses, np.ndarray):
        if uses.ndim != 2 or not (uses >= 0).all():
            raise ValueError("uses must be a matrix [flows, ports] of numbers >= 0")
        flow, port = np.nonzero(uses)
        return flow, port, uses[flow, port].astype(np.float64), uses.shape[0]
    lengths = [len(ports) for ports in uses]
    flow = np.repeat(np.arange(len(lengths)), lengths)
    port = np.fromiter((p for ports in uses for p in ports), np.int64, sum(lengths))
    return flow, port, np.ones(port.size), len(lengths)


# ---- ports and routes of a cluster

_GPU_PORTS = ("nvlink.out", "nvlink.in", "nic.out", "nic.in", "pcie.out", "pcie.in")
_NODE_PORTS = ("uplink.out", "uplink.in", "host", "nvme")


class Route(NamedTuple):
    """Ports a transfer holds while its bytes are on the way, and what it takes besides: latency, which holds
    none."""

    ports: tuple[int, ...]
    latency_ns: int


@dataclass(frozen=True, eq=False)
class Topology:
    """The ports of a `Cluster`, numbered GPU by GPU and then node by node, and the routes over them.

    Each GPU has NVLink, NIC and PCIe ports in both directions. Each node has an uplink in both directions
    (all of its NICs' rate over the oversubscription), its host memory and its NVMe (reads and writes share
    each). With rails, GPU i of every node hangs on switch i: bytes for another rail change it over NVLink
    inside the sender's node (as NCCL's PXN does) and do not touch the uplink, unless sent over the spine.
    """

    cluster: Cluster

    @cached_property
    def port_names(self) -> tuple[str, ...]:
        """`gpu3.nic.out`, `node0.host`: [C]."""
        gpus = (f"gpu{g}.{port}" for g in range(self.cluster.num_ranks) for port in _GPU_PORTS)
        return (*gpus, *(f"node{n}.{port}" for n in range(self.cluster.nodes) for port in _NODE_PORTS))

    @cached_property
    def capacity_C(self) -> FloatArray:
        """Bytes a second through each port: float64 [C]."""
        cluster, node = self.cluster, self.cluster.node
        nic = node.nic_bytes_per_s if cluster.rails else node.nic_bytes_per_s * cluster.oversubscription
        uplink = cluster.spine_bytes_per_s * cluster.gpus_per_node
        nvlink, pcie = node.nvlink_bytes_per_s, node.pcie_bytes_per_s
        gpu = np.tile([nvlink, nvlink, nic, nic, pcie, pcie], cluster.num_ranks)
        server = np.tile([uplink, uplink, node.host_bytes_per_s, node.nvme_bytes_per_s], cluster.nodes)
        return np.concatenate([gpu, server])

    def gpu_port(self, gpu: int, name: str) -> int:
        """Number of a port of a GPU: `nvlink.out`, `nvlink.in`, `nic.out`, `nic.in`, `pcie.out`,
        `pcie.in`."""
        if not 0 <= gpu < self.cluster.num_ranks:
            raise ValueError(f"GPU must lie in [0, {self.cluster.num_ranks}), got {gpu}")
        return gpu * len(_GPU_PORTS) + _GPU_PORTS.index(name)

    def node_port(self, node: int, name: str) -> int:
        """Number of a port of a node: `uplink.out`, `uplink.in`, `host`, `nvme`."""
        if not 0 <= node < self.cluster.nodes:
            raise ValueError(f"node must lie in [0, {self.cluster.nodes}), got {node}")
        return self.cluster.num_ranks * len(_GPU_PORTS) + node * len(_NODE_PORTS) + _NODE_PORTS.index(name)

    def gpu_to_gpu(self, source: int, target: int, over_spine: bool = False) -> Route:
        """NVLink inside a node, the network between nodes; `over_spine` changes rail there and not over
        NVLink."""
        per_node, node = self.cluster.gpus_per_node, self.cluster.node
        nvlink_ns, nic_ns = round(node.nvlink_latency_ns), round(node.nic_latency_ns)
        if source == target:
            return Route((), 0)
        here, there = source // per_node, target // per_node
        if here == there:
            return Route((self.gpu_port(source, "nvlink.out"), self.gpu_port(target, "nvlink.in")), nvlink_ns)
        nics = (self.gpu_port(source, "nic.out"), self.gpu_port(target, "nic.in"))
        uplinks = (self.node_port(here, "uplink.out"), self.node_port(there, "uplink.in"))
        if not self.cluster.rails:
            return Route((nics[0], *uplinks, nics[1]), nic_ns)
        if source % per_node == target % per_node:
            return Route(nics, nic_ns)
        if over_spine:
            return Route((nics[0], *uplinks, nics[1]), nic_ns)
        relay = here * per_node + target % per_node
        inside = (self.gpu_port(source, "nvlink.out"), self.gpu_port(relay, "nvlink.in"))
        return Route((*inside, self.gpu_port(relay, "nic.out"), nics[1]), nvlink_ns + nic_ns)

    def host_to_gpu(self, gpu: int) -> Route:
        """Host memory of the GPU's node to the GPU. The profile states no latency for PCIe: 0."""
        return Route((self.node_port(gpu // self.cluster.gpus_per_node, "host"), self.gpu_port(gpu, "pcie.in")), 0)

    def gpu_to_host(self, gpu: int) -> Route:
        """A GPU to the host memory of its node."""
        return Route((self.gpu_port(gpu, "pcie.out"), self.node_port(gpu // self.cluster.gpus_per_node, "host")), 0)

    def nvme_to_host(self, node: int) -> Route:
        """NVMe to host memory; the same ports carry the way back."""
        return Route((self.node_port(node, "nvme"), self.node_port(node, "host")), 0)

    def nvme_to_gpu(self, gpu: int) -> Route:
        """NVMe to a GPU without a stop in host memory (GPUDirect Storage); with one, use the two routes in
        turn."""
        return Route((self.node_port(gpu // self.cluster.gpus_per_node, "nvme"), self.gpu_port(gpu, "pcie.in")), 0)


# ---- what a collective asks of the ports


class Traffic(NamedTuple):
    """Bytes each rank sends and receives inside its node and across nodes: int64 [..., G] each."""

    send_intra: IntArray
    send_inter: IntArray
    recv_intra: IntArray
    recv_inter: IntArray


class PortBytes(NamedTuple):
    """Bytes through the busiest port of each level, the larger of its two directions: int64 [...] each.

    nvlink, nic: of a GPU. node: through one node's uplink. rail: all bytes that enter or leave one rail's
    NICs.
    """

    nvlink: IntArray
    nic: IntArray
    node: IntArray
    rail: IntArray


def traffic_by_level(bytes_GG: ArrayLike, node_of_rank_G: ArrayLike) -> Traffic:
    """Sums of a rank-to-rank matrix by level: [..., G, G] (row: sender) -> `Traffic`. What stays on a rank
    is none."""
    traffic = np.asarray(bytes_GG, dtype=np.int64)
    node_G = np.asarray(node_of_rank_G)
    same = node_G[:, None] == node_G[None, :]
    intra = traffic * (same & ~np.eye(node_G.size, dtype=np.bool_))
    inter = traffic * ~same
    return Traffic(intra.sum(axis=-1), inter.sum(axis=-1), intra.sum(axis=-2), inter.sum(axis=-2))


def collective_port_bytes(
    traffic: Traffic, node_of_rank_G: ArrayLike, rail_of_rank_G: ArrayLike | None = None
) -> PortBytes:
    """The busiest ports of an all-to-all, over any leading axes.

    node_of_rank_G: not decreasing. rail_of_rank_G: the rail of each rank's NIC (default: no rails, `rail` is
    0). A collective takes as long as its busiest port, so these four numbers and the rates give its time.
    """
    send_inter, recv_inter = np.asarray(traffic.send_inter), np.asarray(traffic.recv_inter)
    rail = np.zeros(send_inter.shape[:-1], np.int64)
    if rail_of_rank_G is not None:
        rail = _busiest_group(send_inter, recv_inter, np.asarray(rail_of_rank_G))
    return PortBytes(
        nvlink=np.maximum(traffic.send_intra, traffic.recv_intra).max(axis=-1),
        nic=np.maximum(send_inter, recv_inter).max(axis=-1),
        node=_busiest_group(send_inter, recv_inter, np.asarray(node_of_rank_G)),
        rail=rail,
    )


def _busiest_group(send: AnyArray, recv: AnyArray, group_G: NDArray[np.int64]) -> IntArray:
    """Largest sum over a group of ranks, of what is sent or received: [..., G] -> [...]."""
    order = np.argsort(group_G, kind="stable")
    _, starts = np.unique(group_G[order], return_index=True)
    sums = (np.add.reduceat(direction[..., order], starts, axis=-1) for direction in (send, recv))
    return np.asarray(np.maximum(*sums).max(axis=-1))
