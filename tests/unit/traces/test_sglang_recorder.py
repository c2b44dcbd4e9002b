"""SGLang's recordings, from real files as torch writes them to expert loads."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces import _engine_dumps, sglang_recorder
from moesim.traces.expert_loads import load_expert_loads, recognise

LAYERS, EXPERTS, PHYSICAL = 4, 8, 12


def npz(path: Path, **arrays: Any) -> Path:
    """What moesim_kernels.dumps writes."""
    np.savez(path, **arrays)
    return path


def stat(path: Path, count_SLE: Any) -> Path:
    return npz(path, kind=np.array(0), logical_count=np.asarray(count_SLE, np.int32))


def physical_map(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.r_[rng.permutation(EXPERTS), rng.integers(0, EXPERTS, PHYSICAL - EXPERTS)] for _ in range(LAYERS)]
    )


# ------------------------------------------------------------------------------------------------------------- stat


def test_ring_that_never_wrapped_is_put_in_order(tmp_path: Path) -> None:
    count = np.zeros((6, 2, 3), np.int32)
    for at, step in ((4, 1), (5, 2), (0, 3)):  # began in the middle of the ring
        count[at, 1] = step
    loads = load_expert_loads(stat(tmp_path / "a.npz", count))
    assert loads.ordered
    assert loads.count_SLE[:, 0, 0].tolist() == [1, 2, 3]
    assert loads.layer_index == (1,)
    assert loads.model_layers == 2
    assert loads.warnings == ()


@pytest.mark.parametrize("empty", [(), (1, 3)])
def test_full_ring_and_ring_with_idle_steps_have_no_order(tmp_path: Path, empty: tuple[int, ...]) -> None:
    count = np.ones((6, 1, 3), np.int32)
    count[list(empty)] = 0
    loads = load_expert_loads(stat(tmp_path / "a.npz", count))
    assert not loads.ordered
    assert loads.num_rows == 6 - len(empty)
    assert "not in the order of time" in loads.warnings[0]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (np.zeros((3, 2, 4)), "nothing ran between start and dump"),
        (np.zeros((0, 2, 4)), "holds nothing"),
        (np.full((2, 1, 4), -1), "counts are not negative"),
        (np.ones((2, 1, 5)), "5 experts, the model has 4"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, count: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        load_expert_loads(stat(tmp_path / "a.npz", count), num_experts=4)


# --------------------------------------------------------------------------------------------------------- per_pass


def passes(path: Path, rank: int, count_RLP: Any, map_LP: Any, first: int = 0, **more: Any) -> Path:
    number = len(count_RLP)
    return npz(
        path,
        kind=np.array(1 if not more else 2),
        forward_pass_id=np.arange(first, first + number),
        rank=np.full(number, rank),
        global_physical_count=np.asarray(count_RLP, np.int32),
        last_physical_to_logical_map=map_LP,
        **more,
    )


def test_physical_counts_of_all_ranks_become_logical_ones(tmp_path: Path) -> None:
    rng, map_LP = np.random.default_rng(3), physical_map()
    count = rng.integers(0, 9, (2, 5, LAYERS, PHYSICAL))
    count[:, :, 0] = 0  # a dense layer
    for rank in range(2):
        passes(tmp_path / f"r{rank}.npz", rank, count[rank], map_LP)
    loads = load_expert_loads(tmp_path, "sglang_recorder")
    assert (loads.recorded_ranks, loads.layer_index, loads.model_layers) == (2, (1, 2, 3), LAYERS)
    expected = np.zeros((5, LAYERS, EXPERTS), int)
    for r, s, layer, p in np.ndindex(count.shape):  # one by one, as SGLang's own reader adds them
        expected[s, layer, map_LP[layer, p]] += count[r, s, layer, p]
    np.testing.assert_array_equal(loads.count_SLE, expected[:, 1:])


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    count = np.ones((2, LAYERS, PHYSICAL))
    passes(tmp_path / "a.npz", 0, count, physical_map(1))
    passes(tmp_path / "b.npz", 1, count, physical_map(2))
    with pytest.raises(BadInput, match="maps of experts differ"):
        load_expert_loads(tmp_path, "sglang_recorder")
    passes(tmp_path / "b.npz", 0, count, physical_map(1))
    with pytest.raises(BadInput, match="stands twice"):
        load_expert_loads(tmp_path, "sglang_recorder")
    stat(tmp_path / "b.npz", np.ones((1, LAYERS, EXPERTS)))
    with pytest.raises(BadInput, match="different modes"):
        load_expert_loads(tmp_path, "sglang_recorder")


def test_a_missing_rank_is_said_and_a_hole_in_the_map_refused(tmp_path: Path) -> None:
    passes(tmp_path / "a.npz", 0, np.ones((3, LAYERS, PHYSICAL)), physical_map())
    passes(tmp_path / "b.npz", 1, np.ones((2, LAYERS, PHYSICAL)), physical_map())
    assert "not every pass has all of its 2 ranks" in load_expert_loads(tmp_path, "sglang_recorder").warnings[0]
    hole = physical_map()
    hole[2][hole[2] == 5] = 4
    with pytest.raises(BadInput, match="expert 5 of layer 2 has no physical expert"):
        load_expert_loads(passes(tmp_path / "c.npz", 0, np.ones((1, LAYERS, PHYSICAL)), hole))


# -------------------------------------------------------------------------------------------------------- per_token


def tokens(
    path: Path, rank: int, logical: Any, map_LP: Any, padded: int = 0, same: bool = False, **change: Any
) -> Path:
    """Records of 3 passes: a prompt of two requests, then two decode steps; layer 0 is dense."""
    rng = np.random.default_rng(rank)
    number = [len(x) for x in logical]
    ids = np.full((LAYERS, sum(number) + padded, 8), -1)
    flat = np.concatenate(logical)
    for t, layer, k in np.ndindex(flat.shape):
        ids[layer + 1, t, k] = rng.choice(np.flatnonzero(map_LP[layer + 1] == flat[t, layer, k]))
    number[-1] += padded
    base = 0 if same else 1000 * rank
    facts = {
        "topk_ids": ids,
        "tokens": np.array(number),
        "input_ids": base + np.arange(sum(number)),
        "positions": np.arange(sum(number)),
        "forward_mode": np.array([1, 2, 2]),
        "extend_tokens": np.array([number[0] - 1, 1]),
        "extends": np.array([2, 0, 0]),
    }
    return passes(path, rank, np.ones((3, LAYERS, PHYSICAL)), map_LP, **{**facts, **change})


def logical_ids(rank: int, sizes: tuple[int, ...] = (5, 2, 2)) -> list[Any]:
    rng = np.random.default_rng(50 + rank)
    return [np.stack([[rng.permutation(EXPERTS)[:3] for _ in range(LAYERS - 1)] for _ in range(n)]) for n in sizes]


def test_tokens_come_back_as_logical_ids_pass_by_pass(tmp_path: Path) -> None:
    ids = [logical_ids(rank) for rank in range(2)]
    for rank in range(2):
        tokens(tmp_path / f"r{rank}.npz", rank, ids[rank], physical_map(), padded=rank)
    loads = load_expert_loads(tmp_path, "sglang_recorder")
    source = loads.tokens
    assert source is not None
    expected = np.concatenate([ids[rank][step] for step in range(3) for rank in range(2)])
    np.testing.assert_array_equal(source.expert_TLK, expected)
    assert source.phase_T is not None
    assert source.phase_T.tolist() == [0] * 10 + [1] * 8
    assert source.sequence_tokens_Q.tolist() == [4, 1, 4, 1] + [1] * 8
    assert (loads.top_k, loads.num_rows, loads.tokens_per_rank) == (3, 3, 3.0)
    assert loads.warnings == (f"{tmp_path.name}: 1 padded tokens are left out.",)


def test_ranks_with_the_same_tokens_count_once(tmp_path: Path) -> None:
    ids = logical_ids(0)
    for rank in range(2):
        tokens(tmp_path / f"r{rank}.npz", rank, ids, physical_map(), same=True)
    loads = load_expert_loads(tmp_path, "sglang_recorder")
    assert loads.tokens is not None
    assert loads.tokens.num_tokens == 9
    assert "every rank recorded the same tokens" in loads.warnings[0]


def test_ids_that_the_map_cannot_explain_are_refused(tmp_path: Path) -> None:
    ids, map_LP = logical_ids(0), physical_map()
    beyond = np.full((LAYERS, 9, 8), PHYSICAL)
    with pytest.raises(BadInput, match="shared experts not fused"):
        load_expert_loads(tokens(tmp_path / "a.npz", 0, ids, map_LP, topk_ids=beyond))
    twice = np.full((LAYERS, 9, 8), -1)
    twice[1:, :, :2] = 0
    with pytest.raises(BadInput, match=r"an expert twice in layer 1: .* map changed while recording"):
        load_expert_loads(tokens(tmp_path / "a.npz", 0, ids, map_LP, topk_ids=twice))
    with pytest.raises(BadInput, match="do not fit together"):
        load_expert_loads(tokens(tmp_path / "a.npz", 0, ids, map_LP, tokens=np.array([5, 2, 9])))
    with pytest.raises(BadInput, match="every id is -1"):
        load_expert_loads(tokens(tmp_path / "a.npz", 0, ids, map_LP, topk_ids=np.full((LAYERS, 9, 8), -1)))


# -------------------------------------------------------------------------------------------------------------- CSV


def test_older_csv_files_of_all_ranks_add_up(tmp_path: Path) -> None:
    (tmp_path / "r0.csv").write_text("layer_id,expert_id,count\n3,0,5\n3,2,1\n4,1,2\n")
    (tmp_path / "r1.csv").write_text("layer_id,expert_id,count\n4,1,10\n3,2,3\n")
    assert recognise(tmp_path) == "sglang_recorder"
    loads = load_expert_loads(tmp_path, num_experts=4)
    assert loads.layer_index == (3, 4)
    np.testing.assert_array_equal(loads.count_SLE, [[[5, 0, 4, 0], [0, 12, 0, 0]]])
    assert "4 taken" not in str(load_expert_loads(tmp_path).warnings)
    assert load_expert_loads(tmp_path).num_experts == 3


@pytest.mark.parametrize("line", ["3,0,-5", "3,0,nan", "3,0", "x,0,1", "3,70000,1", "99999,0,1", "3,0,1\n3,0,1"])
def test_broken_csv_lines_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"layer_id,expert_id,count\n1,1,1\n{line}\n")
    with pytest.raises(BadInput, match=r"a\.csv:[34]: "):
        load_expert_loads(file)


# ----------------------------------------------------------------------------------------- hostile .npz and .pt files


def test_hostile_npz_files_are_refused(tmp_path: Path) -> None:
    packed = tmp_path / "a.npz"
    np.savez_compressed(packed, kind=np.array(0), logical_count=np.zeros((128, 60, 256), np.int32))
    with pytest.raises(BadInput, match="packed members"):
        load_expert_loads(packed)
    objects = tmp_path / "b.npz"
    np.savez(objects, kind=np.array(0), logical_count=np.array([print], object))
    with pytest.raises(BadInput, match="Nothing is unpickled"):
        load_expert_loads(objects)
    lying = tmp_path / "c.npz"
    with zipfile.ZipFile(stat(lying, np.ones((1, 1, 2)))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(lying, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw.replace(b"(1, 1, 2)", b"(9, 9, 2)"))
    with pytest.raises(BadInput, match="declares shape"):
        load_expert_loads(lying)
    with pytest.raises(BadInput, match="no `kind` of recording"):
        load_expert_loads(npz(tmp_path / "d.npz", kind=np.array(7)))
    with pytest.raises(BadInput, match="integers with 3 axes are needed"):
        load_expert_loads(npz(tmp_path / "e.npz", kind=np.array(0), logical_count=np.full((2, 2, 2), np.nan)))


def test_without_torch_one_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(b"x")
    monkeypatch.setattr(_engine_dumps, "MODULE", "moesim_kernels_that_nobody_installed")
    with pytest.raises(
        BadInput, match=r"read with torch, which is not here .* Install moesim with the extra `kernels`"
    ):
        sglang_recorder.read(file, None)  # type: ignore[arg-type]


def test_real_files_go_through_the_limited_process(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    map_LP = torch.from_numpy(physical_map())
    for rank in range(2):
        record = {"rank": rank, "gatherer_key": "primary",
                  "global_physical_count": torch.full((LAYERS, PHYSICAL), 1 + rank, dtype=torch.int32)}  # fmt: skip
        data = {"records": [{"forward_pass_id": i, **record} for i in range(3)], "last_physical_to_logical_map": map_LP}
        torch.save(data, tmp_path / f"expert_distribution_recorder_1764.25_{rank}.pt")
    assert recognise(tmp_path) == "sglang_recorder"
    loads = load_expert_loads(tmp_path)
    assert loads.count_SLE.sum() == 3 * LAYERS * PHYSICAL * 3
    assert loads.recorded_ranks == 2


class _Bomb:
    """weights_only lets bytearray through: a terabyte of it in twenty bytes of pickle."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (1 << 40,)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is set on Linux alone")
def test_memory_bombs_end_in_one_error(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bomb, good = tmp_path / "bomb.pt", tmp_path / "good.pt"
    torch.save({"logical_count": torch.zeros(1, 1, 1, dtype=torch.int32)}, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bomb, "w") as new:
        for member in old.namelist():
            raw = pickle.dumps({"logical_count": _Bomb()}, 2) if member.endswith("data.pkl") else old.read(member)
            new.writestr(member, raw)
    with pytest.raises(BadInput, match="memory") as caught:
        load_expert_loads(bomb)
    assert len(caught.value.problems) == 1
