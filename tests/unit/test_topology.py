"""Ports, routes and the busiest ports of a collective."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moesim.hardware import Cluster, Node
from moesim.topology import Topology, collective_port_bytes, max_min_rates, traffic_by_level

NODE = Node(
    gpus_per_node=4, nvlink_bytes_per_s=400e9, nvlink_latency_ns=700.4, nic_bytes_per_s=50e9, nic_latency_ns=3000.0,
    pcie_bytes_per_s=60e9, host_memory_bytes=1 << 40, host_bytes_per_s=200e9, nvme_bytes_per_s=10e9,
    nvme_bytes=1 << 42, cpu_cores=64,
)  # fmt: skip


def topology(nodes=3, oversubscription=1.0, rails=False):
    """As `Cluster.from_spec` resolves it: without rails the NIC rate it states is already the spine's share."""
    node = NODE if rails else replace(NODE, nic_bytes_per_s=NODE.nic_bytes_per_s / oversubscription)
    return Topology(Cluster(SimpleNamespace(node=node), nodes, 4, 1.0, oversubscription, rails))


def names(topo, route):
    return [topo.port_names[p] for p in route.ports]


def rate(topo, *routes):
    return max_min_rates(topo.capacity_C, [r.ports for r in routes]).tolist()


def test_each_port_has_a_name_and_a_capacity():
    topo = topology()
    assert len(topo.port_names) == topo.capacity_C.size == 12 * 6 + 3 * 4
    assert len(set(topo.port_names)) == len(topo.port_names)
    for gpu in (0, 5, 11):
        assert topo.port_names[topo.gpu_port(gpu, "nic.in")] == f"gpu{gpu}.nic.in"
    for node in (0, 2):
        assert topo.port_names[topo.node_port(node, "nvme")] == f"node{node}.nvme"
    by_name = dict(zip(topo.port_names, topo.capacity_C, strict=True))
    assert by_name["gpu7.nvlink.out"] == 400e9
    assert by_name["gpu7.pcie.in"] == 60e9
    assert by_name["node1.host"] == 200e9


def test_routes_between_gpus():
    topo = topology()
    assert topo.gpu_to_gpu(5, 5) == ((), 0)
    assert names(topo, topo.gpu_to_gpu(4, 6)) == ["gpu4.nvlink.out", "gpu6.nvlink.in"]
    assert topo.gpu_to_gpu(4, 6).latency_ns == 700
    away = topo.gpu_to_gpu(1, 6)
    assert names(topo, away) == ["gpu1.nic.out", "node0.uplink.out", "node1.uplink.in", "gpu6.nic.in"]
    assert away.latency_ns == 3000


def test_with_rails_bytes_change_rail_over_nvlink():
    topo = topology(rails=True)
    assert names(topo, topo.gpu_to_gpu(1, 9)) == ["gpu1.nic.out", "gpu9.nic.in"]
    relayed = topo.gpu_to_gpu(1, 6)
    assert names(topo, relayed) == ["gpu1.nvlink.out", "gpu2.nvlink.in", "gpu2.nic.out", "gpu6.nic.in"]
    assert relayed.latency_ns == 3700
    over = topo.gpu_to_gpu(1, 6, over_spine=True)
    assert names(topo, over) == ["gpu1.nic.out", "node0.uplink.out", "node1.uplink.in", "gpu6.nic.in"]


def test_routes_to_memory():
    topo = topology()
    assert names(topo, topo.host_to_gpu(6)) == ["node1.host", "gpu6.pcie.in"]
    assert names(topo, topo.gpu_to_host(6)) == ["gpu6.pcie.out", "node1.host"]
    assert names(topo, topo.nvme_to_host(2)) == ["node2.nvme", "node2.host"]
    assert names(topo, topo.nvme_to_gpu(11)) == ["node2.nvme", "gpu11.pcie.in"]


@pytest.mark.parametrize("rails", [False, True])
@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_oversubscription_binds_the_node_not_the_single_gpu(oversubscription, rails):
    topo = topology(2, oversubscription, rails)
    alone = topo.gpu_to_gpu(0, 4, over_spine=True)
    assert rate(topo, alone) == [50e9]
    together = [topo.gpu_to_gpu(g, 4 + (g + 1) % 4, over_spine=True) for g in range(4)]
    assert rate(topo, *together) == pytest.approx([50e9 / oversubscription] * 4)
    if rails:
        own_rail = [topo.gpu_to_gpu(g, 4 + g) for g in range(4)]
        assert rate(topo, *own_rail) == [50e9] * 4


def test_what_is_shared_and_what_is_not():
    topo = topology()
    assert rate(topo, topo.gpu_to_gpu(0, 1), topo.gpu_to_gpu(1, 0)) == [400e9, 400e9]  # two directions
    assert rate(topo, topo.gpu_to_gpu(0, 1), topo.gpu_to_gpu(0, 2)) == [200e9, 200e9]  # one sender
    assert rate(topo, *(topo.host_to_gpu(g) for g in range(4))) == [50e9] * 4  # host memory of 200 GB/s
    assert rate(topo, topo.host_to_gpu(0), topo.host_to_gpu(4)) == [60e9, 60e9]  # two nodes
    assert rate(topo, topo.nvme_to_host(0), topo.host_to_gpu(0)) == [10e9, 60e9]


@pytest.mark.parametrize("number", [-1, 12])
def test_a_gpu_or_node_that_does_not_exist_is_refused(number):
    with pytest.raises(ValueError, match="GPU must lie in"):
        topology().gpu_port(number, "nic.in")
    with pytest.raises(ValueError, match="node must lie in"):
        topology().node_port(number, "host")


# ---- collectives


def brute_force(traffic, node, rail):
    """Busiest ports of one rank-to-rank matrix, byte by byte."""
    ports = {}
    for a in range(len(node)):
        for b in range(len(node)):
            if a == b:
                continue
            level = "nvlink" if node[a] == node[b] else "nic"
            sides = [(level, "out", a), (level, "in", b)]
            if level == "nic":
                sides += [("node", "out", node[a]), ("node", "in", node[b])]
                sides += [("rail", "out", rail[a]), ("rail", "in", rail[b])]
            for side in sides:
                ports[side] = ports.get(side, 0) + int(traffic[a, b])
    return [max((n for side, n in ports.items() if side[0] == level), default=0) for level in PORT_LEVELS]


PORT_LEVELS = ("nvlink", "nic", "node", "rail")


@pytest.mark.parametrize("node", [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 2], list(range(6))])
def test_busiest_ports_against_brute_force(node):
    rng = np.random.default_rng(len(set(node)))
    rail = [node[:g].count(node[g]) for g in range(6)]
    traffic = rng.integers(0, 10**12, (4, 3, 6, 6))
    sums = traffic_by_level(traffic, node)
    ports = collective_port_bytes(sums, node, rail)
    for step in range(4):
        for layer in range(3):
            expected = brute_force(traffic[step, layer], node, rail)
            assert [int(p[step, layer]) for p in ports] == expected
    sent, received = sums.send_intra + sums.send_inter, sums.recv_intra + sums.recv_inter
    off_diagonal = traffic.sum(axis=(-1, -2)) - np.trace(traffic, axis1=-2, axis2=-1)
    assert (sent.sum(axis=-1) == off_diagonal).all()
    assert (received.sum(axis=-1) == off_diagonal).all()


def test_balanced_traffic_by_hand():
    # 4 GPUs on 2 nodes, one byte to each other: one by NVLink, two by NIC each; a node sends 4 and so does a rail.
    sums = traffic_by_level(np.ones((4, 4), int), [0, 0, 1, 1])
    assert [int(p) for p in collective_port_bytes(sums, [0, 0, 1, 1], [0, 1, 0, 1])] == [1, 2, 4, 4]
    assert [int(p) for p in collective_port_bytes(sums, [0, 0, 1, 1])] == [1, 2, 4, 0]


def test_skew_shows_on_the_port_that_carries_it():
    traffic = np.zeros((4, 4), int)
    traffic[:, 3] = 100  # all send to GPU 3
    sums = traffic_by_level(traffic, [0, 0, 1, 1])
    assert [int(p) for p in collective_port_bytes(sums, [0, 0, 1, 1])] == [100, 200, 200, 0]
