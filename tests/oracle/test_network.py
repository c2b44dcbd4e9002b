"""Transfers in simulated time against hand calculation and an independent fluid integrator."""

from __future__ import annotations

import numpy as np
import pytest
import simpy

from moesim.engine.links import Network


def run(capacity, jobs):
    """jobs: (start_ns, ports, nbytes, latency_ns). -> the end of each, the network, the ends in firing
    order."""
    env = simpy.Environment()
    network = Network(env, capacity)
    ends, order = {}, []

    def job(number, start, ports, nbytes, latency):
        yield env.timeout(start)
        yield network.transfer(ports, nbytes, latency)
        ends[number] = env.now
        order.append(number)
        network._check()

    for number, (start, ports, nbytes, latency) in enumerate(jobs):
        env.process(job(number, start, ports, nbytes, latency))
    env.run()
    return [ends[i] for i in range(len(jobs))], network, order


@pytest.mark.parametrize("nbytes", [1, 7, 1000, 4096, 123_457, 10**9, 3 * 10**12])
@pytest.mark.parametrize("rate", [3e9, 25e9, 400e9, 1 / 3 * 1e12])
def test_one_flow_is_bytes_over_bandwidth_plus_latency(nbytes, rate):
    (end,), network, _ = run([1e15, rate, 2 * rate], [(17, (0, 1, 2), nbytes, 2500)])
    assert end == 17 + int(np.floor(nbytes / (rate / 1e9) + 0.5)) + 2500
    assert network.bytes_C.tolist() == [nbytes] * 3


def test_two_flows_share_one_link():
    # 2 GB/s = 2 bytes/ns; each gets 1 byte/ns.
    ends, network, order = run([2e9], [(0, (0,), 1000, 0), (0, (0,), 1000, 0)])
    assert ends == [1000, 1000]
    assert order == [0, 1]
    assert network.busy_ns_C.tolist() == [1000]


def test_latency_does_not_hold_the_link():
    # The second starts when the first one's bytes are through, while its latency still runs: no sharing.
    ends, network, _ = run([1e9], [(0, (0,), 1000, 500), (1000, (0,), 1000, 500)])
    assert ends == [1500, 2500]
    assert network.busy_ns_C.tolist() == [2000]


def test_staggered_arrivals_by_hand():
    # 1 byte/ns. A (1000 B) runs alone until 400 (600 left), shares with B (1000 B) until A ends at 1600; B has
    # 400 left and ends alone at 2000.
    ends, network, order = run([1e9], [(0, (0,), 1000, 0), (400, (0,), 1000, 0)])
    assert ends == [1600, 2000]
    assert order == [0, 1]
    assert network.busy_ns_C.tolist() == [2000]
    assert network.report() == {"link0": {"bytes": 2000, "busy_ns": 2000}}


def test_a_flow_leaves_what_it_cannot_use():
    # Link 0: 4 B/ns, link 1: 1 B/ns. A over both gets 1, B over link 0 the other 3.
    # B ends at 1000; A goes on at 1 (its bottleneck is link 1) and ends at 2000.
    ends, network, _ = run([4e9, 1e9], [(0, (0, 1), 2000, 0), (0, (0,), 3000, 0)])
    assert ends == [2000, 1000]
    assert network.busy_ns_C.tolist() == [2000, 2000]
    assert network.bytes_C.tolist() == [5000, 2000]


def test_no_ports_or_no_bytes_leave_the_latency():
    ends, network, _ = run([1e9], [(5, (), 10**12, 30), (5, (0,), 0, 40), (5, (), 0, 0)])
    assert ends == [35, 45, 5]
    assert network.report() == {}


def test_an_end_and_a_start_at_the_same_instant():
    ends, _, order = run([1e9], [(0, (0,), 100, 0), (100, (0,), 100, 0), (200, (0,), 100, 0)])
    assert ends == [100, 200, 300]
    assert order == [0, 1, 2]


def test_progress_is_seen_while_bytes_are_on_the_way():
    env = simpy.Environment()
    network = Network(env, [1e9, 2e9], ["a", "b"])
    network.transfer((0, 1), 1000, 10)
    env.run(until=250)
    assert network.active == 1
    assert network.report() == {"a": {"bytes": 250, "busy_ns": 250}, "b": {"bytes": 250, "busy_ns": 250}}


@pytest.mark.parametrize(
    ("ports", "nbytes", "latency"), [((0,), -1, 0), ((0,), 1, -1), ((2,), 1, 0), ((-1,), 1, 0), ((1,), 1, 0)]
)
def test_what_can_never_arrive_is_refused(ports, nbytes, latency):
    network = Network(simpy.Environment(), [1e9, 0.0])
    with pytest.raises(ValueError, match=r"must not be negative|needs ports"):
        network.transfer(ports, nbytes, latency)


def fill(capacity, routes):
    """Max-min rates by raising all rates in turn to the next full link: plain Python, apart from
    moesim.topology."""
    rate = dict.fromkeys(routes)
    while any(r is None for r in rate.values()):
        shares = []
        for link, size in enumerate(capacity):
            here = [f for f, route in routes.items() for p in route if p == link]
            free = [f for f in here if rate[f] is None]
            if free:
                shares.append(((size - sum(rate[f] for f in here if rate[f] is not None)) / len(free), link))
        level, tightest = min(shares)
        for f, route in routes.items():
            if rate[f] is None and tightest in route:
                rate[f] = level
    return rate


def integrate(capacity, jobs, step):
    """Ends of the jobs with the fluid moved in steps of `step` ns; rates in bytes/ns."""
    left = {i: float(job[2]) for i, job in enumerate(jobs)}
    ends, now, rates, known = {}, 0.0, {}, None
    while left:
        active = tuple(i for i in left if jobs[i][0] <= now + 1e-9)
        if active != known:
            rates, known = fill(capacity, {i: jobs[i][1] for i in active}), active
        now += step
        for i in active:
            left[i] -= rates[i] * step
            if left[i] <= 1e-9:
                ends[i] = now + left.pop(i) / rates[i] + jobs[i][3]
    return [ends[i] for i in range(len(jobs))]


@pytest.mark.parametrize("case", range(25))
def test_random_cases_against_a_small_step_integrator(case):
    rng = np.random.default_rng(case)
    links = int(rng.integers(1, 6))
    capacity = rng.integers(1, 20, links).astype(float)
    jobs = []
    for _ in range(int(rng.integers(2, 10))):
        ports = tuple(int(p) for p in rng.permutation(links)[: rng.integers(1, min(3, links) + 1)])
        jobs.append((int(rng.integers(0, 300)), ports, int(rng.integers(1, 3000)), int(rng.integers(0, 50))))
    ends, network, _ = run(capacity * 1e9, jobs)
    # each end before this one may have been rounded by half a nanosecond, each step adds at most one more
    assert ends == pytest.approx(integrate(capacity, jobs, 0.125), abs=1.0 + 0.625 * len(jobs))
    expected = np.zeros(links)
    for _, ports, nbytes, _ in jobs:
        expected[list(ports)] += nbytes
    assert network.bytes_C.tolist() == expected.tolist()
    assert (network.bytes_C <= (network.busy_ns_C + len(jobs)) * capacity * (1 + 1e-9)).all()
    assert run(capacity * 1e9, jobs)[2] == run(capacity * 1e9, jobs)[2]


def test_twice_the_bandwidth_takes_half_the_time():
    rng = np.random.default_rng(5)
    jobs = [(int(t), (int(p),), int(n), 64) for t, p, n in zip(*rng.integers(0, 4, (3, 30)), strict=True)]
    jobs = [(t * 1000, ports, n * 30_720, lat) for t, ports, n, lat in jobs]
    slow, _, _ = run([1e9, 2e9, 4e9, 8e9], jobs)
    fast, _, _ = run([2e9, 4e9, 8e9, 16e9], [(t // 2, ports, n, lat // 2) for t, ports, n, lat in jobs])
    assert [2 * end for end in fast] == pytest.approx(slow, abs=30)
