"""Per-token routing traces: .npz as recorders write them, and a folder of .npy that is memory-mapped.

.npz members: `expert_ids` [T, L, K] (required), `weights` [T, L, K], `scores` [T, L, E] (the router's logits),
`sequence_id` [T], `token_id` [T] (of the vocabulary), `phase` [T] (0 prefill, 1 decode), `layer_index` [L],
`num_experts`, `top_k`. The folder holds expert_ids.npy, weights.npy, scores.npy, sequence_start.npy [Q + 1],
token_id.npy, phase.npy and meta.json. Nothing is unpickled; every size a header declares is compared with the bytes
that are there before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moesim.traces._npy import BROKEN, Header, read_header, read_member
from moesim.traces._routing_checks import (
    bad,
    check_ids,
    check_integers,
    check_layers,
    check_scores_shape,
    check_shape,
    experts_of,
    scalar,
    sequence_starts,
    to_scores,
    to_tokens,
    to_weights,
)
from moesim.workload.pool import RoutingSource, id_dtype

__all__ = ["convert", "read", "write_folder"]

_GIB = 1 << 30
NPZ_LIMIT_BYTES = 4 * _GIB
FOLDER_LIMIT_BYTES = 64 * _GIB
_META_LIMIT_BYTES = 1 << 20
_DEFLATE_MOST = 1040
"""No deflate stream grows by more than 1032 to 1; a member that claims more lies about its size."""
_CHUNK_BYTES = 16 << 20
_DUPLICATE_CHECK_IDS = 1 << 26
"""Ids of a mapped folder searched for duplicates at load: evenly spaced parts of it. `convert` searches
all."""
_MEMBERS = (
    "expert_ids", "weights", "scores", "sequence_id", "token_id", "phase", "layer_index", "num_experts", "top_k",
)  # fmt: skip


def read(path: Path, num_experts: int | None = None) -> RoutingSource:
    """The trace at `path` (an .npz file, or a folder that `convert` wrote) as a pool of whole tokens.

    `num_experts` is the model's, used where the file does not say. Raises BadInput naming file, member, fact
    and mend.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise bad(path, "no such routing trace. Give an .npz file or a folder written by `moesim convert`.")
    return _read_npz(path, num_experts)


def _open_npz(path: Path, limit_bytes: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """The archive and its members by name, sizes bounded."""
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise bad(path, f"not a readable .npz (zip) file: {error}. Write it with numpy.savez_compressed.") from None
    members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
    if "expert_ids" not in members:
        archive.close()
        found = ", ".join(sorted(members)[:8]) or "nothing"
        raise bad(
            path,
            f"a routing trace needs an array `expert_ids` [tokens, layers, top_k]; the file has {found}.",
        )
    for name in _MEMBERS:
        info = members.get(name)
        if info is None:
            continue
        problem = ""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "is compressed by a method that is not read; use stored or deflate."
        elif info.flag_bits & 1:
            problem = "is encrypted; write it without a password."
        elif info.file_size > _DEFLATE_MOST * info.compress_size + 1024:
            problem = f"claims {info.file_size} bytes from {info.compress_size}, more than deflate can make."
        if problem:
            archive.close()
            raise bad(path, f"{name}: {problem}")
    total = sum(i.file_size for i in members.values())
    if total > limit_bytes:
        archive.close()
        raise bad(
            path,
            f"the arrays take {total} bytes uncompressed, over the limit of {limit_bytes} for reading an"
            " .npz into"
            " memory. Turn it into a memory-mapped folder: moesim convert TRACE.npz FOLDER.",
        )
    return archive, members


# ------------------------------------------------------------------------------------------------------- .npz


def _read_npz(path: Path, given_experts: int | None) -> RoutingSource:
    archive, members = _open_npz(path, NPZ_LIMIT_BYTES)
    with archive:
        side = _side_arrays(archive, members, path)
        raw = read_member(archive, members["expert_ids"], path, "expert_ids")
        check_integers(raw, path, "expert_ids")
        check_shape(raw.shape, path)
        tokens, layers, top_k = raw.shape
        warnings = []
        experts = experts_of(side, top_k, _experts_scored(archive, members, path) or given_experts, path)
        if experts is None:
            experts = max(int(raw.max()) + 1, top_k)
            warnings.append(f"{path.name} does not say num_experts; {experts} taken from the largest id.")
        check_ids(raw, experts, path)
        weights = None
        if "weights" in members:
            raw_weights = read_member(archive, members["weights"], path, "weights")
            if raw_weights.shape != raw.shape:
                raise bad(
                    path,
                    f"weights: the shape of expert_ids, {raw.shape}, is needed, got {raw_weights.shape}.",
                )
            weights = to_weights(raw_weights, path)
        scores = None
        if "scores" in members:
            raw_scores = read_member(archive, members["scores"], path, "scores")
            check_scores_shape(raw_scores.shape, raw.shape, experts, path)
            scores = to_scores(raw_scores, path)
    token_T, phase_T = _facts(side, tokens, path)
    if "sequence_id" in side:
        starts = sequence_starts(side["sequence_id"], tokens, path)
    else:
        starts = np.array([0, tokens], np.int64)
        warnings.append(f"{path.name} has no sequence_id: its {tokens} tokens count as one sequence.")
    index = check_layers(side["layer_index"], layers, path) if "layer_index" in side else None
    ids = np.ascontiguousarray(raw, id_dtype(experts))
    return RoutingSource(
        ids, starts, experts, top_k, True, path.name, weights, index, warnings=tuple(warnings), score_TLE=scores,
        token_T=token_T, phase_T=phase_T,
    )  # fmt: skip


def _experts_scored(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> int | None:
    """E by the shape of `scores`; None where there are none."""
    if "scores" not in members:
        return None
    shape = _peek(archive, members["scores"], path, "scores").shape
    return shape[2] if len(shape) == 3 else None


def _facts(found: dict[str, Any], tokens: int, path: Path) -> tuple[Any, Any]:
    """token_T int64 and phase_T uint8, each None where the trace has none."""
    token = to_tokens(found["token_id"], tokens, path, "token_id") if "token_id" in found else None
    phase = to_tokens(found["phase"], tokens, path, "phase").astype(np.uint8) if "phase" in found else None
    return token, phase


def _side_arrays(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("sequence_id", "token_id", "phase", "layer_index"):
        if name in members:
            found[name] = read_member(archive, members[name], path, name)
    for name in ("num_experts", "top_k"):
        if name in members:
            found[name] = scalar(read_member(archive, members[name], path, name), path, name)
    return found


# ----------------------------------------------------------------------------------------------------- folder


def _map_npy(path: Path, mapped: bool) -> NDArray[Any]:
    """One .npy of a folder, its header checked against the file's size; mapped read-only or read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = read_header(stream, size, path.parent, path.name)
            at = stream.tell()
    except BROKEN as error:
        raise bad(path, f"not a readable .npy file ({error}). Convert the trace again.") from None
    if header.data_bytes == 0:
        return np.empty(header.shape, header.dtype)
    data = np.memmap(path, header.dtype, "r", at, header.shape, "F" if header.fortran else "C")
    return data if mapped else np.array(data)


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "meta.json"
    try:
        if file.stat().st_size > _META_LIMIT_BYTES:
            raise bad(file, f"over {_META_LIMIT_BYTES} bytes. Convert the trace again.")
        meta = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise bad(path, "a routing folder holds meta.json; this one does not. Write it with moesim convert.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise bad(file, f"not readable JSON ({error}). Convert the trace again.") from None
    if not isinstance(meta, dict) or meta.get("format") != "moesim-routing":
        raise bad(file, 'a mapping with "format": "moesim-routing" is needed. Convert the trace again.')
    for name in ("num_experts", "top_k"):
        if not isinstance(meta.get(name), int) or isinstance(meta[name], bool):
            raise bad(file, f"{name}: an integer is needed, got {meta.get(name)!r}.")
    return meta


def _read_folder(path: Path) -> RoutingSource:
    meta = _read_meta(path)
    total = sum(f.stat().st_size for f in path.glob("*.npy"))
    if total > FOLDER_LIMIT_BYTES:
        raise bad(path, f"the arrays take {total} bytes, over the limit of {FOLDER_LIMIT_BYTES}. Split the trace.")
    ids = _map_npy(path / "expert_ids.npy", mapped=True)
    check_integers(ids, path, "expert_ids.npy")
    check_shape(ids.shape, path)
    tokens, layers, top_k = ids.shape
    experts = experts_of(meta, top_k, None, path)
    assert experts is not None
    if ids.dtype != id_dtype(experts) or not ids.flags.c_contiguous:
        raise bad(path, f"expert_ids.npy: {id_dtype(experts)} in C order is needed, got {ids.dtype}. Convert again.")
    _check_mapped_ids(ids, experts, path)
    starts = _map_npy(path / "sequence_start.npy", mapped=False)
    check_integers(starts, path, "sequence_start.npy")
    starts = starts.astype(np.int64)
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) <= 0).any():
        raise bad(path, f"sequence_start.npy: rising row numbers from 0 to {tokens} are needed. Convert again.")
    weights = None
    if (path / "weights.npy").exists():
        weights = _map_npy(path / "weights.npy", mapped=True)
        if weights.shape != ids.shape or weights.dtype != np.float16:
            raise bad(path, f"weights.npy: float16 {ids.shape} is needed, got {weights.dtype} {weights.shape}.")
    scores = None
    if (path / "scores.npy").exists():
        scores = _map_npy(path / "scores.npy", mapped=True)
        check_scores_shape(scores.shape, ids.shape, experts, path / "scores.npy")
        if scores.dtype != np.float16:
            raise bad(path, f"scores.npy: float16 is needed, got {scores.dtype}. Convert again.")
    side = {n: _map_npy(path / f"{n}.npy", mapped=False) for n in ("token_id", "phase") if (path / f"{n}.npy").exists()}
    token_T, phase_T = _facts(side, tokens, path)
    index = meta.get("layer_index")
    if index is not None:
        if not isinstance(index, list) or not all(isinstance(x, int) for x in index):
            raise bad(path / "meta.json", "layer_index: a list of integers is needed.")
        index = check_layers(np.array(index, np.int64), layers, path)
    return RoutingSource(
        ids, starts, experts, top_k, True, str(meta.get("source", path.name)), weights, index, score_TLE=scores,
        token_T=token_T, phase_T=phase_T,
    )  # fmt: skip


def _check_mapped_ids(ids: NDArray[Any], experts: int, path: Path) -> None:
    """All ids' range; duplicates in up to _DUPLICATE_CHECK_IDS evenly spaced ids."""
    row = ids.shape[1] * ids.shape[2]
    step = max(1, _CHUNK_BYTES // row)
    chunks = -(-ids.shape[0] // step)
    every = max(1, -(-ids.size // _DUPLICATE_CHECK_IDS))
    for i in range(chunks):
        check_ids(ids[i * step : (i + 1) * step], experts, path, i * step, duplicates=i % every == 0)


def write_folder(source: RoutingSource, dst: Path) -> None:
    """Write `source` as a folder of .npy. All or nothing: a temporary folder beside `dst` is renamed at the
    end."""

    def fill(folder: Path) -> dict[str, Any]:
        np.save(folder / "expert_ids.npy", source.expert_TLK, allow_pickle=False)
        if source.weight_TLK is not None:
            np.save(folder / "weights.npy", source.weight_TLK, allow_pickle=False)
        if source.score_TLE is not None:
            np.save(folder / "scores.npy", source.score_TLE, allow_pickle=False)
        _save_facts(folder, source.token_T, source.phase_T)
        np.save(folder / "sequence_start.npy", source.sequence_start, allow_pickle=False)
        index = None if source.layer_index is None else list(source.layer_index)
        return {
            "num_experts": source.num_experts, "top_k": source.top_k, "layer_index": index,
            "source": source.source,
        }  # fmt: skip

    _atomic_folder(dst, fill)


def _save_facts(folder: Path, token_T: NDArray[np.int64] | None, phase_T: NDArray[np.uint8] | None) -> None:
    for name, array in (("token_id", token_T), ("phase", phase_T)):
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _atomic_folder(dst: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    if dst.exists():
        raise bad(dst, "exists already. Give the name of a folder that does not, or remove this one.")
    if not dst.parent.is_dir():
        raise bad(dst, f"the folder {dst.parent} does not exist. Create it first.")
    folder = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        meta = {"schema_version": 1, "format": "moesim-routing", **fill(folder)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        folder.chmod(0o755)
        os.rename(folder, dst)
    except OSError as error:
        raise bad(dst, f"cannot be written ({error}).") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- convert


def convert(src: Path, dst: Path, num_experts: int | None = None) -> None:
    """Turn the .npz trace `src` into the memory-mappable folder `dst`, in chunks: a trace may exceed memory.

    Every id is checked. Raises BadInput, and leaves nothing behind, for a trace that cannot be replayed.
    """
    if not src.is_file():
        raise bad(src, "no such .npz file.")
    archive, members = _open_npz(src, FOLDER_LIMIT_BYTES)
    with archive:
        side = _side_arrays(archive, members, src)
        header = _peek(archive, members["expert_ids"], src, "expert_ids")
        check_shape(header.shape, src)
        experts = experts_of(side, header.shape[2], _experts_scored(archive, members, src) or num_experts, src)
        if experts is None:
            raise bad(src, "num_experts: the file does not say it. Add it to the .npz or give it when converting.")
        if "sequence_id" in side:
            starts = sequence_starts(side["sequence_id"], header.shape[0], src)
        else:
            starts = np.array([0, header.shape[0]], np.int64)
        token_T, phase_T = _facts(side, header.shape[0], src)
        layers = side.get("layer_index")
        index = None if layers is None else check_layers(layers, header.shape[1], src)

        def check(chunk: NDArray[Any], first: int) -> NDArray[Any]:
            check_integers(chunk, src, "expert_ids")
            check_ids(chunk, experts, src, first)
            return chunk.astype(id_dtype(experts))

        def check_weights(chunk: NDArray[Any], _first: int) -> NDArray[Any]:
            return to_weights(chunk, src)

        def check_scores(chunk: NDArray[Any], first: int) -> NDArray[Any]:
            return to_scores(chunk, src, first)

        def fill(folder: Path) -> dict[str, Any]:
            _stream(archive, members["expert_ids"], src, "expert_ids", folder / "expert_ids.npy", check)
            if "weights" in members:
                shape = _peek(archive, members["weights"], src, "weights").shape
                if shape != header.shape:
                    raise bad(src, f"weights: the shape of expert_ids, {header.shape}, is needed, got {shape}.")
                _stream(archive, members["weights"], src, "weights", folder / "weights.npy", check_weights)
            if "scores" in members:
                shape = _peek(archive, members["scores"], src, "scores").shape
                check_scores_shape(shape, header.shape, experts, src)
                _stream(archive, members["scores"], src, "scores", folder / "scores.npy", check_scores)
            _save_facts(folder, token_T, phase_T)
            np.save(folder / "sequence_start.npy", starts, allow_pickle=False)
            return {
                "num_experts": experts, "top_k": header.shape[2], "source": src.name,
                "layer_index": None if index is None else list(index),
            }  # fmt: skip

        _atomic_folder(dst, fill)


def _peek(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: str) -> Header:
    try:
        with archive.open(info) as stream:
            return read_header(stream, info.file_size, path, name)
    except BROKEN as error:
        raise bad(path, f"{name}: damaged ({error}). Write the file again.") from None


def _stream(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    path: Path,
    name: str,
    out: Path,
    check: Callable[[NDArray[Any], int], NDArray[Any]],
) -> None:
    """Copy a [T, ...] member to `out` in chunks of tokens, each through `check`."""
    sink: np.memmap[Any, Any] | None = None
    for first, chunk in _chunks(archive, info, path, name):
        checked = check(chunk, first)
        if sink is None:
            shape = _peek(archive, info, path, name).shape
            sink = npy.open_memmap(out, "w+", checked.dtype, shape)
        sink[first : first + len(checked)] = checked
    assert sink is not None
    sink.flush()


def _chunks(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: str
) -> Iterator[tuple[int, NDArray[Any]]]:
    try:
        with archive.open(info) as stream:
            header = read_header(stream, info.file_size, path, name)
            if header.fortran:
                raise bad(
                    path,
                    f"{name}: C order is needed to convert in chunks. Use numpy.ascontiguousarray first.",
                )
            row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
            step = max(1, _CHUNK_BYTES // row_bytes)
            for first in range(0, header.shape[0], step):
                rows = min(step, header.shape[0] - first)
                data = stream.read(rows * row_bytes)
                if len(data) != rows * row_bytes:
                    raise bad(path, f"{name}: ends after token {first}. The file is cut off; write it again.")
                yield first, np.frombuffer(data, header.dtype).reshape(rows, *header.shape[1:])
    except BROKEN as error:
        raise bad(path, f"{name}: damaged ({error}). Write the file again.") from None
