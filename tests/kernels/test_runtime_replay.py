"""The mini-runtime as a whole: what comes out does not depend on where experts were, decisions are the simulator's,
and whatever breaks leaves cache and buffers consistent."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moesim_kernels.runtime.__main__ import main
from moesim_kernels.runtime.backings import DiskBacking, MemoryBacking, make_backing, make_home
from moesim_kernels.runtime.compare import first_difference, rank_agreement
from moesim_kernels.runtime.device import RealDevice
from moesim_kernels.runtime.errors import LinkDied, ReadFailed
from moesim_kernels.runtime.link import Transfer
from moesim_kernels.runtime.model import Decoder, expert_out
from moesim_kernels.runtime.predict import Calibrated, Deciding, calibrated, run_simulated
from moesim_kernels.runtime.replay import Replay, make_replay, sample, synthetic_routes
from moesim_kernels.runtime.run import Settings, build, costs_of, play, run_real
from moesim_kernels.runtime.sizes import ModelSizes
from moesim_kernels.runtime.weights import WeightFile, open_weights, write_weights

from moesim.errors import BadInput, MoesimError
from moesim.offload import StepRoutes
from moesim.offload.cache import ABSENT
from moesim.policy import policy_kinds
from moesim.workload.synthetic import SyntheticSpec

torch.set_num_threads(1)
SIZES = ModelSizes(
    layers=3, hidden=32, inner=24, experts=8, top_k=2, heads=2, kv_heads=1, head_dim=8, vocabulary=40,
    max_context=64, shared_inner=16,
)  # fmt: skip
WHOLE = SIZES.num_keys * SIZES.slot_bytes
PREFETCH = ("none", "markov", "previous_token", "frequency")
FOUND = Calibrated(
    begin={1: 1e4}, own={1: 2e5}, join={1: 1e4}, end={1: 1e4}, product={1: 2e4, 2: 3e4}, host={1: 2e4}, decide=5e4,
    ask=1e4, move=1e5, latency=2e4, wake=5e3, sync=0.0, size_bytes=SIZES.slot_bytes, move_spread=0.0,
)  # fmt: skip
"""Made up: decisions of what is compared with it must not depend on it."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> WeightFile:
    path = tmp_path_factory.mktemp("model") / "m.moe"
    write_weights(path, SIZES, 1)
    return open_weights(path)


def routes(steps: int = 14, batch: int = 3, prompt: int = 0, seed: int = 5) -> tuple[Replay, Any]:
    spec = SyntheticSpec(popularity_zipf=0.7, repeat=0.3, pool_tokens=1024, sequence_tokens=16)
    source = synthetic_routes(spec, SIZES, seed)
    return make_replay(source, SIZES, batch, steps, 8, prompt), sample(source, SIZES, range(8))


def test_expert_is_a_gated_feed_forward() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w13, w2 = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((3, 8), (10, 8), (8, 5)))
    gate, up = x @ w13[:5].T, x @ w13[5:].T
    torch.testing.assert_close(expert_out(x, w13, w2), (gate / (1 + torch.exp(-gate)) * up) @ w2.T)


def by_hand(file: WeightFile, replay: Replay) -> list[np.ndarray[Any, Any]]:
    """The forward pass without caches of any kind: every step computes its sequences from their first token, experts
    straight from the file."""
    decoder = Decoder(file, torch.device("cpu"))
    w, s = decoder.weight, file.sizes

    def expert(key: int) -> tuple[torch.Tensor, torch.Tensor]:
        flat = torch.from_numpy(file.read(file.expert_K[key], "it").copy()).view(torch.float32)
        cut = 2 * s.inner * s.hidden
        return flat[:cut].view(2 * s.inner, s.hidden), flat[cut:].view(s.hidden, s.inner)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    def turned(x: torch.Tensor) -> torch.Tensor:
        places, half = torch.arange(x.shape[1], dtype=torch.float32), s.head_dim // 2
        angle = places[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = torch.cos(angle), torch.sin(angle)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    history: dict[int, list[tuple[int, np.ndarray[Any, Any]]]] = {}
    said: dict[int, int] = {}
    out = []
    for step in replay.steps:
        drawn = decoder._drawn(step)
        for row, sequence in enumerate(step.sequence_T.tolist()):
            token = drawn[row] if step.prompt or sequence not in said else said[sequence]
            history.setdefault(sequence, []).append((token, step.expert_TLK[row]))
        logits = {}
        for sequence in dict.fromkeys(step.sequence_T.tolist()):
            x = w["embedding"][[token for token, _ in history[sequence]]]
            n = len(x)
            for layer in range(s.layers):
                qkv = (norm(x, w[f"{layer}.norm1"]) @ w[f"{layer}.qkv"].T).view(n, -1, s.head_dim).transpose(0, 1)
                query, key, value = qkv[: s.heads], qkv[s.heads : s.heads + s.kv_heads], qkv[s.heads + s.kv_heads :]
                score = turned(query) @ turned(key).transpose(1, 2) / s.head_dim**0.5  # one KV head serves all
                score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
                mixed = (torch.softmax(score, -1) @ value).transpose(0, 1).reshape(n, -1)
                x = x + mixed @ w[f"{layer}.out"].T
                normed = norm(x, w[f"{layer}.norm2"])
                x = x + expert_out(normed, w[f"{layer}.shared13"], w[f"{layer}.shared2"])
                added = torch.zeros_like(x)
                for at, (_, ids) in enumerate(history[sequence]):
                    for e in ids[layer].tolist():
                        added[at] += expert_out(normed[at : at + 1], *expert(layer * s.experts + e))[0] / s.top_k
                x = x + added
            logits[sequence] = norm(x, w["norm"]) @ w["head"].T
            said[sequence] = int(logits[sequence][-1].argmax())
        rows = [logits[q][-step.sequence_T.tolist().count(q) :] for q in dict.fromkeys(step.sequence_T.tolist())]
        out.append(torch.cat(rows).numpy())
    return out


@pytest.mark.parametrize("prompt", [0, 5])
def test_the_forward_pass_is_that_of_a_model_without_caches(file: WeightFile, prompt: int) -> None:
    replay, _ = routes(8, 2, prompt)
    assert any(step.prompt for step in replay.steps) == bool(prompt)
    run = run_real(file, Settings(WHOLE // 3), replay, "disk", keep_logits=True)
    assert run.logits is not None
    for ours, theirs in zip(run.logits, by_hand(file, replay), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def all_resident(file: WeightFile) -> int:
    replay, _ = routes()
    run = run_real(file, Settings(WHOLE, offload="none"), replay, "memory")
    assert not run.transfers
    return run.digest


SETTINGS = [
    Settings(WHOLE // 4),
    Settings(WHOLE // 4, eviction="lfu", prefetch="markov"),
    Settings(WHOLE // 2, eviction="belady", pooled=True, miss="bypass", chunk_bytes=4096),
    Settings(WHOLE // 4, prefetch="previous_token", completion="logical"),
    Settings(WHOLE // 8, prefetch="frequency", chunk_bytes=4096, staging=1, pooled=True, miss="bypass"),
    Settings(WHOLE * 7 // 8, offload="moe_lightning"),
]


@pytest.mark.parametrize("kind", ["disk", "memory"])
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_outputs_are_bit_by_bit_those_of_a_model_that_is_all_resident(
    file: WeightFile, all_resident: int, kind: str, number: int
) -> None:
    replay, fit = routes()
    run = run_real(file, SETTINGS[number], replay, kind, fit, check="always")
    assert run.digest == all_resident
    assert run.driver.counters.hits < run.driver.counters.look_ups or SETTINGS[number].offload == "moe_lightning"


def test_experts_that_the_host_computes_and_swaps_change_nothing(file: WeightFile, all_resident: int) -> None:
    replay, fit = routes()
    for offload in ("fiddler", "mixtral_offloading"):
        run = run_real(file, Settings(WHOLE // 2, offload=offload), replay, "memory", fit)
        assert run.digest == all_resident
    assert run_real(file, Settings(WHOLE // 2, offload="fiddler"), replay, "memory", fit).driver.counters.on_cpu
    with pytest.raises(BadInput, match="disk"):
        run_real(file, Settings(WHOLE // 2, offload="fiddler"), replay, "disk", fit)
    with pytest.raises(BadInput, match="nowhere to travel"):
        run_real(file, Settings(WHOLE // 2, offload="mixtral_offloading"), replay, "disk", fit)


def test_demand_policies_meet_the_same_events_as_in_the_simulator(file: WeightFile) -> None:
    replay, fit = routes(14)
    home = make_home("memory", file)
    for number, eviction in enumerate(policy_kinds("eviction")):
        miss, pooled = (("evict", False), ("bypass", True), ("evict", True))[number % 3]
        settings = Settings(WHOLE // 3, eviction=eviction, miss=miss, pooled=pooled)
        real = run_real(file, settings, replay, "memory", fit, check="never", home=home)
        simulated = run_simulated(FOUND, settings, SIZES, replay, "memory", fit)
        assert not first_difference(real, simulated), eviction
        assert real.driver.counters == simulated.driver.counters, eviction


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_logical_prefetch_meets_the_same_events_as_in_the_simulator(file: WeightFile, prefetch: str) -> None:
    replay, fit = routes(20)
    for kind, chunk in (("disk", 0), ("memory", 4096)):
        settings = Settings(WHOLE // 3, prefetch=prefetch, completion="logical", chunk_bytes=chunk)
        real = run_real(file, settings, replay, kind, fit)
        simulated = run_simulated(FOUND, settings, SIZES, replay, kind, fit)
        assert not first_difference(real, simulated)
        assert real.driver.counters == simulated.driver.counters
        assert prefetch == "none" or real.driver.counters.prefetched


def test_a_difference_of_events_is_said_in_words(file: WeightFile) -> None:
    replay, _ = routes(6)
    real = run_real(file, Settings(WHOLE // 3), replay, "memory")
    other = run_simulated(FOUND, Settings(WHOLE // 2), SIZES, replay, "memory")
    assert "is real" in first_difference(real, other)


def test_bytes_and_buffers_add_up(file: WeightFile) -> None:
    replay, fit = routes(20)
    run = run_real(file, Settings(WHOLE // 3, prefetch="markov"), replay, "disk", fit)
    c = run.driver.counters
    most = c.loads + c.streams + c.prefetched
    assert most - c.cancelled >= len(run.transfers) >= c.loads + c.streams
    assert all(size == SIZES.slot_bytes for size, *_ in run.transfers)
    for times in run.steps:
        assert times.other_ns >= 0
        assert times.cpu_ns > 0
        assert len(times.layer_stall_ns) == SIZES.layers
        assert sum(times.layer_stall_ns) <= times.stall_ns
    for size, asked, start, end, _ in run.transfers:
        assert size > 0
        assert asked <= start <= end


# ---- what breaks


class Broken(DiskBacking):
    """A disk that fails, or ends the thread, at the transfer number `at`."""

    def __init__(self, file: WeightFile, at: int, error: BaseException) -> None:
        super().__init__(file)
        self.at, self.error = at, error

    def move(self, transfer: Transfer, begin: int, end: int) -> None:
        self.at -= 1
        if self.at == 0:
            raise self.error
        super().move(transfer, begin, end)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
@pytest.mark.parametrize(
    ("error", "seen"),
    [(ReadFailed("the disk is gone"), ReadFailed), (SystemExit(), LinkDied), (ValueError("a mistake"), ValueError)],
)
def test_a_link_that_fails_leaves_cache_and_buffers_consistent(
    file: WeightFile, number: int, error: BaseException, seen: type[BaseException]
) -> None:
    """One clear error; nothing lost; and after a restart the same device goes on, with the right bytes."""
    replay, fit = routes(24)
    made = build(SETTINGS[number], SIZES, replay, costs_of(SIZES, "disk"), fit)
    backing = Broken(file, 60, error)
    device = RealDevice(Decoder(file, backing.torch_device), backing, made.context, made.plan)
    with pytest.raises(seen):
        play(made, replay, device)
    made.cache._check()
    device._check()
    device.recover()
    device._check(made.cache)
    device.verify()
    if not made.plan.paged:
        held = {key for key in range(SIZES.num_keys) if made.cache.state(key) != ABSENT}
        assert set(device._there) == held
    device.close()


def test_a_file_cut_off_while_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "m.moe"
    write_weights(path, SIZES, 1)
    file = open_weights(path)
    replay, _ = routes(24)
    made = build(Settings(WHOLE // 4), SIZES, replay, costs_of(SIZES, "disk"))
    backing = make_backing("disk", file)
    device = RealDevice(Decoder(file, backing.torch_device), backing, made.context, made.plan)
    os.truncate(path, file.expert_K[4].offset)
    with pytest.raises(ReadFailed, match="cut off"):
        play(made, replay, device)
    made.cache._check()
    device._check()
    device.close()


def test_a_changed_expert_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.moe"
    write_weights(path, SIZES, 1)
    block = open_weights(path).expert_K[9]
    with path.open("r+b") as stream:
        stream.seek(block.offset + 1000)
        stream.write(b"changed")
    assert main(["run", str(path), "--steps", "40", "--batch", "4"]) == 2
    shown = capsys.readouterr()
    assert "expert 1 of layer 1 is not what was written" in shown.err
    assert shown.out == ""


def test_a_prefetch_thread_killed_from_outside(file: WeightFile) -> None:
    replay, fit = routes(24)
    made = build(Settings(WHOLE // 4, prefetch="markov"), SIZES, replay, costs_of(SIZES, "disk"), fit)
    backing = make_backing("disk", file)
    device = RealDevice(Decoder(file, backing.torch_device), backing, made.context, made.plan)

    def kill(number: int) -> None:
        if number == 5:
            ident = ctypes.c_ulong(device.link._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))

    with pytest.raises(LinkDied, match="was ended"):
        play(made, replay, device, after=kill)
    made.cache._check()
    device._check()
    device.recover()
    device._check(made.cache)
    device.verify()
    device.close()


def test_sequences_longer_than_the_context_are_refused(file: WeightFile) -> None:
    source = synthetic_routes(SyntheticSpec(pool_tokens=512, sequence_tokens=128), SIZES, 0)
    with pytest.raises(BadInput, match="max_context"):
        make_replay(source, SIZES, 1, 4)
    decoder = Decoder(file, torch.device("cpu"))
    step = StepRoutes(0, np.zeros((65, 3, 2), np.int64), np.zeros(65, np.int64))
    with pytest.raises(BadInput, match="max_context"):
        decoder.begin(step)


def test_lanes_take_sequences_in_turn() -> None:
    source = synthetic_routes(SyntheticSpec(pool_tokens=64, sequence_tokens=4), SIZES, 0)
    replay = make_replay(source, SIZES, 2, 9, first=1, prompt=2)
    shape = [(len(s.expert_TLK), s.prompt, tuple(s.sequence_T.tolist())) for s in replay.steps]
    assert shape[:5] == [
        (2, True, (1, 1)), (2, True, (2, 2)), (2, False, (1, 2)), (2, False, (1, 2)), (2, True, (3, 3)),
    ]  # fmt: skip
    assert [e.sequences for e in replay.ended[:5]] == [(), (), (), (1, 2), ()]
    rows = np.concatenate([s.expert_TLK[s.sequence_T == 1] for s in replay.steps])
    np.testing.assert_array_equal(rows, source.expert_TLK[4:8])
    with pytest.raises(BadInput, match="the routes end"):
        make_replay(source, SIZES, 2, 40)


def test_a_calibration_finds_what_its_runs_took(file: WeightFile) -> None:
    replay, _ = routes(10)
    run = run_real(file, Settings(WHOLE // 3), replay, "disk")
    for number, times in enumerate(run.steps):
        times.begin_ns, times.own_ns, times.join_ns, times.end_ns = 7_000, 30_000, 12_000, 5_000
        times.experts_ns, times.stall_ns, times.sync_ns, times.waits = 0, 0, 0, 0
        times.fetches = number % 4
        times.step_ns = 54_000 + 9_000 + 500 * times.fetches
    run.products[:] = [(1, 100), (2, 150)]
    run.transfers[:] = [(4096, 0, 40, 140, True), (4096, 0, 150, 250, True), (4096, 900, 910, 1010, False)]
    found = calibrated([run], SIZES)
    assert (found.begin, found.own, found.join, found.end) == ({3: 7000}, {3: 10_000}, {3: 4000}, {3: 5000})
    assert found.product == {1: 100, 2: 150}
    assert (found.move, found.move_spread) == (100, 0)
    assert found.latency == pytest.approx((40 + 10 + 10) / 3)
    assert found.decide == pytest.approx(3000)
    assert found.ask == pytest.approx(500)


def test_a_predicted_step_is_worked_by_hand() -> None:
    """One layer, one token, two experts: begin 10, own 200, decide 50; each miss is asked for in 10 and takes 20 + 100
    on the link, 5 to wake up; prefetch decided in 30; products of 20; join 10, end 10 (us)."""
    sizes = SIZES.model_copy(update={"layers": 1})
    step = StepRoutes(0, np.array([[[0, 1]]]), np.array([0]))
    replay = Replay((step, replace(step, number=1)), ((), ()))  # type: ignore[arg-type]
    settings = Settings(sizes.slot_bytes * 2, offload={"kind": "cached", "warm": False})
    found = run_simulated(FOUND, settings, sizes, replay, deciding=Deciding(50e3, 30e3))
    warm = 10 + 200 + 50 + 30 + 2 * 20 + 10 + 10
    # asked at 260 and 270, on the link from 260: there at 380 and 500; woken at 505, the second product ends at 525
    cold = 260 + 120 + 120 + 5 + 20 + 10 + 10
    np.testing.assert_allclose(found.step_ns_S, [cold * 1e3, warm * 1e3])


def test_rank_agreement_is_kendalls() -> None:
    assert rank_agreement([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert np.isnan(rank_agreement([1], [1]))


def test_memory_backing_is_the_file(file: WeightFile) -> None:
    backing = MemoryBacking(file)
    weights = backing.host_weights(5)
    assert weights is not None
    data = np.concatenate([w.numpy().ravel() for w in weights]).tobytes()
    assert data == file.read(file.expert_K[5], "it").tobytes()
    backing.close()


def test_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.moe")
    assert main(["write", path, "--set", "layers=2", "--set", "hidden=32", "--set", "experts=6", "-q"]) == 0
    assert main(["run", path, "--steps", "3", "--json", "--prefetch", '{"kind": "markov"}']) == 0
    shown = capsys.readouterr()
    assert '"digest"' in shown.out
    for arguments, code, says in (
        (["run", path, "--eviction", "lruu"], 2, "Did you mean 'lru'"),
        (["run", path, "--cache", "1KiB"], 2, "holds no expert"),
        (["run", path, "--cache", "x"], 2, "--cache"),
        (["run", path, "--link", "tape"], 2, "--link"),
        (["run", path, "--chunk", "7"], 2, "--chunk"),
        (["run", path, "--completion", "soon"], 2, "--completion"),
        (["run", path, "--learn", "5000"], 2, "--learn"),
        (["run", str(tmp_path / "none.moe")], 2, "cannot be read"),
        (["run", path, "--trace", path], 2, "m.moe"),
        (["compare", path, "--caches", "2"], 2, "--caches"),
        (["write", path, "--set", "layers"], 2, "--set"),
        (["write", path, "--set", "layers=0"], 2, "layers"),
        (["write", path, "--set", "hidden=1000000"], 2, "hidden"),
    ):
        assert main(arguments) == code, arguments
        shown = capsys.readouterr()
        assert says in shown.err
        assert "Traceback" not in shown.err
        assert shown.out == ""


def test_compare_says_what_it_predicted_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.moe")
    assert main(["write", path, "--set", "layers=2", "--set", "hidden=32", "--set", "experts=6", "-q"]) == 0
    arguments = [
        "compare",
        path,
        "--policies",
        "lru,lfu+markov",
        "--caches",
        "0.5,0.8",
        "--rounds",
        "2",
        "--steps",
        "5",
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("lru at 0.5")
    assert "same" in lines[1]
    assert "tau-b" in lines[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_cuda_computes_the_same_whatever_the_cache(file: WeightFile, number: int) -> None:
    replay, fit = routes()
    whole = run_real(file, Settings(WHOLE, offload="none"), replay, "cuda", fit, keep_logits=True)
    run = run_real(file, SETTINGS[number], replay, "cuda", fit, keep_logits=True)
    assert run.digest == whole.digest
    host = run_real(file, Settings(WHOLE, offload="none"), replay, "memory", fit, keep_logits=True)
    assert run.logits is not None
    assert host.logits is not None
    np.testing.assert_allclose(run.logits[0], host.logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_meets_the_simulators_events_and_recovers(file: WeightFile) -> None:
    replay, fit = routes(20)
    ahead = Settings(WHOLE // 3, prefetch="markov", completion="logical")
    for settings in (Settings(WHOLE // 3, eviction="lfu"), ahead):
        real = run_real(file, settings, replay, "cuda", fit)
        assert not first_difference(real, run_simulated(FOUND, settings, SIZES, replay, "cuda", fit))


def test_cuda_without_a_device_is_bad_input(file: WeightFile) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MoesimError, match="CUDA"):
        make_backing("cuda", file)
