"""Collectives between real processes against numpy, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from moesim_kernels.bench import io_cases
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.io_cases import IO_BUILDERS, exchange_call
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool, PoolFull
from moesim_kernels.ops.workers import EXCHANGES, OPS, Call, Group, WorkerFailed

START_S = 120.0  # a loaded machine takes long to import torch several times


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Group]]:
    """Groups by number of ranks: starting one costs a core two seconds a process, so tests share them."""
    started: dict[int, Group] = {}
    yield started
    for group in started.values():
        group.close()


def live(groups: dict[int, Group], ranks: int) -> Group:
    if ranks not in groups or not groups[ranks].alive:
        groups[ranks] = Group(ranks, timeout_s=START_S)
    return groups[ranks]


@pytest.fixture(params=[2, 3], ids=["2ranks", "3ranks"])
def group(request: pytest.FixtureRequest, groups: dict[int, Group]) -> Group:
    return live(groups, request.param)


def given(call: Call, ranks: int, seed: int) -> list[np.ndarray]:
    """Small whole numbers, which any order of adding keeps exact in every dtype."""
    draw = np.random.default_rng(seed)
    return [draw.integers(-8, 9, call.elements(rank, ranks)[0]).astype(np.float32) for rank in range(ranks)]


def expected(call: Call, parts: list[np.ndarray]) -> list[np.ndarray]:
    ranks = len(parts)
    if call.op == "all_reduce":
        return [np.sum(parts, axis=0)] * ranks
    if call.op == "all_gather":
        return [np.concatenate(parts)] * ranks
    if call.op == "reduce_scatter":
        return list(np.sum(parts, axis=0).reshape(ranks, -1))
    splits = np.array(call.splits) if call.splits else np.full((ranks, ranks), call.count)
    blocks = [np.split(part, np.cumsum(row)[:-1]) for part, row in zip(parts, splits, strict=True)]
    return [np.concatenate([blocks[source][to] for source in range(ranks)]) for to in range(ranks)]


def check(group: Group, call: Call, seed: int = 0) -> None:
    parts = given(call, group.ranks, seed)
    for rank, (got, want) in enumerate(zip(group.values(call, parts), expected(call, parts), strict=True)):
        np.testing.assert_array_equal(got, want, err_msg=f"{call} rank {rank}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPS[:4])
def test_equals_numpy(group: Group, op: str, dtype: str) -> None:
    for seed, count in enumerate((0, 1, 5, 1000)):
        check(group, Call(op, count, dtype), seed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("composed", [False, True], ids=["native", "composed"])
def test_uneven_and_empty_splits(group: Group, dtype: str, composed: bool) -> None:
    draw = np.random.default_rng(7)
    ranks = group.ranks
    tables = [draw.integers(0, 40, (ranks, ranks)) for _ in range(4)]
    tables += [np.zeros((ranks, ranks), dtype=int), np.eye(ranks, dtype=int) * 3]  # nothing; only to oneself
    lonely = np.zeros((ranks, ranks), dtype=int)
    lonely[:, 0] = 11  # all to rank 0, nothing to others
    for seed, table in enumerate([*tables, lonely, tables[0] * (1 - np.eye(ranks, dtype=int))]):
        splits = tuple(tuple(int(n) for n in row) for row in table)
        check(group, Call("all_to_allv", dtype=dtype, splits=splits, composed=composed), seed)


def exchanged(call: Call, parts: list[np.ndarray]) -> list[np.ndarray]:
    """What a dispatch or a combine ends with, rank by rank."""
    ranks, wide = len(parts), call.width
    rows = [part.reshape(-1, wide) for part in parts]
    splits = np.array(call.splits)
    if call.op == "dispatch":  # rows are copies of the tokens, round and round, in the order of the destinations
        rows = [part[np.arange(sum(row)) % max(len(part), 1)] for part, row in zip(rows, splits, strict=True)]
    else:
        splits = splits.T
    blocks = [np.split(part, np.cumsum(row)[:-1]) for part, row in zip(rows, splits, strict=True)]
    return [np.concatenate([blocks[source][to] for source in range(ranks)]).ravel() for to in range(ranks)]


@pytest.mark.parametrize("op", EXCHANGES)
@pytest.mark.parametrize("composed", [False, True], ids=["native", "composed"])
def test_tokens_travel_to_the_ranks_of_their_experts_and_results_back(group: Group, op: str, composed: bool) -> None:
    ranks = group.ranks
    draw = np.random.default_rng(11)
    tables = [draw.integers(0, 30, (ranks, ranks)), np.zeros((ranks, ranks), dtype=int)]
    idle = draw.integers(1, 9, (ranks, ranks))
    idle[1:] = 0  # all other ranks are without tokens, and take part
    for seed, table in enumerate([*tables, idle, idle.T]):
        splits = tuple(tuple(int(n) for n in row) for row in table)
        call = Call(op, splits=splits, composed=composed, width=6, slots=4, top_k=2)
        parts = given(call, ranks, seed)
        for got, want in zip(group.values(call, parts), exchanged(call, parts), strict=True):
            np.testing.assert_array_equal(got, want)
    assert min(group.rank_ns(call)) > 0
    group.release(call)


@pytest.mark.parametrize("op", ["reduce_scatter", "all_to_all"])
def test_compositions_equal_numpy(group: Group, op: str) -> None:
    for dtype in ("fp32", "bf16"):
        for count in (0, 1, 333):
            check(group, Call(op, count, dtype, composed=True))


def test_sums_of_reals_are_within_rounding(group: Group) -> None:
    """Adding n numbers in any order errs by at most (n - 1) 2^-24 times the sum of magnitudes (Higham, eq. 4.4)."""
    draw = np.random.default_rng(3)
    for op in ("all_reduce", "reduce_scatter"):
        call = Call(op, 500)
        parts = [draw.standard_normal(call.elements(r, group.ranks)[0]).astype(np.float32) for r in range(group.ranks)]
        want = expected(call, [part.astype(np.float64) for part in parts])
        bound = expected(call, [np.abs(part).astype(np.float64) for part in parts])
        for got, exact, magnitude in zip(group.values(call, parts), want, bound, strict=True):
            assert np.all(np.abs(got - exact) <= 1.01 * (group.ranks - 1) * 2.0**-24 * magnitude)


def test_every_rank_is_timed_and_buffers_are_bounded(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("all_reduce", 1000)
    assert len(group.rank_ns(call)) == group.ranks
    assert group.time_ns(call) > 0
    monkeypatch.setattr(group, "buffers_bytes", call.buffer_bytes(group.ranks) + 100)
    with pytest.raises(ValueError, match="Use smaller sizes"):
        group.rank_ns(Call("all_gather", 1000))
    group.release(call)
    assert min(group.rank_ns(Call("all_gather", 10))) > 0
    group.release(Call("all_gather", 10))


def test_refuses_what_is_no_collective() -> None:
    for wrong in (
        {"op": "broadcast"},
        {"op": "all_reduce", "dtype": "int8"},
        {"op": "all_reduce", "count": -1},
        {"op": "all_to_all", "splits": ((1, 1), (1, 1))},
        {"op": "all_to_allv"},
        {"op": "all_to_allv", "splits": ((1, 1), (1,))},
        {"op": "all_reduce", "composed": True},
        {"op": "dispatch", "splits": ((1, 1), (1, 1)), "width": 0},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            Call(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 to"):
        Group(1)
    with pytest.raises(ValueError, match="back end"):
        Group(2, "mpi")


def gone(pids: list[int]) -> bool:
    """Whether none of these processes is left, a zombie included."""
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_a_worker_killed_while_another_waits_for_it_ends_the_group(groups: dict[int, Group]) -> None:
    group = live(groups, 2)
    pids = group.pids
    os.kill(pids[1], signal.SIGSTOP)  # rank 0 now waits for it in the barrier
    killer = threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerFailed, match="rank 1 was killed by signal 9"):
        group.time_ns(Call("all_reduce", 1000))
    killer.join()
    assert gone(pids)
    assert not group.alive
    with pytest.raises(WorkerFailed, match="has ended"):
        group.time_ns(Call("all_reduce", 1000))


@pytest.mark.slow
def test_nccl_without_enough_devices_says_so() -> None:
    ranks = torch.cuda.device_count() + 2
    with pytest.raises(WorkerFailed, match="nccl runs one process a GPU"):
        Group(ranks, "nccl", timeout_s=START_S)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl runs one process a GPU: needs two")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nccl_equals_numpy(dtype: str) -> None:
    with Group(torch.cuda.device_count(), "nccl", timeout_s=START_S) as group:
        for op in OPS[:4]:
            check(group, Call(op, 1000, dtype))
            assert group.time_ns(Call(op, 1000, dtype)) > 0
        draw = np.random.default_rng(7).integers(0, 40, (group.ranks, group.ranks))
        splits = tuple(tuple(int(n) for n in row) for row in draw)
        for composed in (False, True):
            check(group, Call("all_to_allv", dtype=dtype, splits=splits, composed=composed))


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "from moesim_kernels.ops.workers import Group\n"
        "import time\n"
        f"group = Group(2, timeout_s={START_S})\n"
        "print(*group.pids, flush=True)\n"
        "time.sleep(1000)\n"
    )
    home = str(Path(__file__).parents[2] / "kernels")
    environment = {**os.environ, "PYTHONPATH": home, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    for _ in range(600):
        # they are now the children of whoever adopts orphans, who may be slow to reap: a zombie has no command line
        left = [p for p in pids if not gone([p]) and Path(f"/proc/{p}/cmdline").read_bytes()]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"workers {left} outlived their parent")


def test_cases_run_a_failed_group_starts_again_and_one_that_stalls_is_given_up(groups: dict[int, Group]) -> None:
    pool = Pool(Device("cpu", capacity_bytes=1 << 20))
    key = ("group", 2, "gloo")
    ended = pool.get(key, 0, lambda: groups.get(2) or live(groups, 2))
    ended.close()  # without effect where a test before this one has killed it
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "token_exchange"):
        case = exchange_of() if op == "token_exchange" else case_of(op, size=4096)
        prepared = IO_BUILDERS[op](case, pool.device, pool)
        assert prepared.timed is not None
        assert prepared.timed(0) > 0
        assert prepared.bytes == 4096  # two ranks: all_reduce moves 2 (n-1)/n = 1 times its buffer through a port
        prepared.close()
    assert pool.used_bytes == 0
    with pytest.raises(PoolFull):
        IO_BUILDERS["all_reduce"](case_of("all_reduce", size=1 << 20), pool.device, pool)
    group = pool.get(key, 0, lambda: ended)
    assert group is not ended
    pids = group.pids
    group.timeout_s = 0.5
    os.kill(pids[0], signal.SIGSTOP)
    prepared = IO_BUILDERS["all_gather"](case_of("all_gather"), pool.device, pool)
    assert prepared.timed is not None
    with pytest.raises(WorkerFailed, match=r"no answer of rank \[0, 1\] within 0.5 s"):
        prepared.timed(0)
    assert gone(pids)
    prepared.close()
    assert pool.used_bytes == 0


def case_of(op: str, ranks: int = 2, size: int = 64, dtype: str = "bf16", backend: str = "gloo") -> Case:
    return Case(op, {"ranks": ranks, "backend": backend}, {"bytes": size}, dtype=dtype)


def exchange_of(way: str = "dispatch", size: int = 4096) -> Case:
    shape = {"ranks": 2, "backend": "gloo", "way": way, "hidden": 8, "slots": 3, "top_k": 2}
    return Case("token_exchange", shape, {"bytes": size, "spread": "drawn"}, dtype="bf16", seed=3)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (case_of("all_reduce", size=63), "whole bf16 elements"),
        (case_of("all_reduce", dtype="fp8"), "collectives run in"),
        (case_of("all_reduce", ranks=1), "from 2 to"),
        (case_of("all_reduce", backend="nccl"), "use gloo"),
        (exchange_of(size=100), "whole rows of 8 bf16 elements"),
    ],
    ids=["part of an element", "fp8", "one rank", "nccl on cpu", "part of a row"],
)
def test_cases_that_cannot_run_say_why(case: Case, says: str) -> None:
    pool = Pool(Device("cpu"))
    with pytest.raises(BadPlan, match=says):
        IO_BUILDERS[case.op](case, pool.device, pool)


def test_groups_that_cannot_start_cost_their_start_once_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def start(ranks: int, backend: str, **_: object) -> Group:
        starts.append(ranks)
        raise WorkerFailed("no network")

    monkeypatch.setattr(io_cases, "Group", start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pool = Pool(Device("cuda"))
    with pytest.raises(BadPlan, match="4 ranks, and torch sees 2"):
        IO_BUILDERS["all_reduce"](case_of("all_reduce", ranks=4, backend="nccl"), pool.device, pool)
    assert starts == []
    for op in ("all_reduce", "all_gather"):
        with pytest.raises(WorkerFailed, match="no network"):
            IO_BUILDERS[op](case_of(op, backend="nccl"), pool.device, pool)
    assert starts == [2]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_an_exchange_sends_exactly_the_bytes_asked_for(ranks: int) -> None:
    for elements in (0, 1, 2, 5, 64, 1001):
        call = exchange_call(elements, ranks, "bf16")
        table = np.array(call.splits) if call.splits else np.full((ranks, ranks), call.count)
        others = table * (1 - np.eye(ranks, dtype=int))
        np.testing.assert_array_equal(others.sum(axis=1), elements)
        np.testing.assert_array_equal(others.sum(axis=0), elements)
        assert np.ptp(table) <= 1
