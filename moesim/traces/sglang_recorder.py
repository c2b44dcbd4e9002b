"""Recordings of SGLang's expert distribution recorder: stat, stat_approx, per_pass, per_token, and older CSV files.

Written by python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang. A file, or a folder of the files of all
ranks (`per_pass`, `per_token` and CSV write one a rank). `.pt` files are read by a process of their own
(`_engine_dumps`); an .npz that `python -m moesim_kernels.dumps` made of one is read directly.

What the files do not say, and what is done about it:
- stat counts into a ring that is written out unrotated, and zero where it was never filled. Zero rows are left out;
  where they stand together the rows after them are the earliest ones, where there are none the order is lost.
- layers without experts are rows of zeros: left out, and their number kept.
- ids and counts of per_pass and per_token are of physical experts, and the map to logical ones is the last one.
- per_token has 8 ids a token whatever the model; -1 where it has fewer, and where a token is padding.
- counts are sums over ranks: ranks that hold the same tokens (attention tensor parallelism) count each of them again.

Legend: S rows, R records (a pass of a rank), L layers, E logical experts, P physical ones, T tokens, K experts a token.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, BoolArray, IntArray
from moesim.errors import BadInput
from moesim.traces import _sglang_tokens
from moesim.traces._engine_dumps import read_arrays, read_converted
from moesim.traces._files import checked_text, read_file
from moesim.traces._routing_checks import MAX_EXPERTS, bad
from moesim.workload.loads import MAX_CELLS, ExpertLoads

if TYPE_CHECKING:
    from moesim.traces.expert_loads import ReadOptions

__all__ = ["read", "recognise"]

_CSV_HEAD = "layer_id,expert_id,count"
_MAX_LAYERS = 4096
_MAX_TOTAL_CELLS = 1 << 22
"""layers times experts of a .csv, whose single lines could name any"""
_STAT, _PER_PASS, _PER_TOKEN = 0, 1, 2
_SHAPES = {"logical_count": 3, "global_physical_count": 3, "last_physical_to_logical_map": 2, "topk_ids": 3}


def recognise(path: Path) -> bool:
    """A .pt file, an .npz made of one, a CSV file with SGLang's first line, or a folder of such."""
    if path.is_dir():
        return any(path.glob("*.pt")) or any(recognise(file) for file in sorted(path.glob("*.csv"))[:1])
    if path.suffix == ".pt":
        return True
    if path.suffix.lower() == ".csv" and path.is_file():
        with path.open("rb") as file:
            return file.read(64).decode("utf-8", "replace").lstrip("\ufeff").startswith(_CSV_HEAD)
    return path.suffix.lower() == ".npz" and "kind" in _members(path)


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        return set()


def read(path: Path, options: ReadOptions) -> ExpertLoads:
    """The recording at `path`. Raises BadInput for what cannot be read or is not what the recorder writes."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.pt")) or sorted(path.glob("*.npz")) or sorted(path.glob("*.csv"))
        if not files:
            raise bad(path, "no .pt, .npz or .csv file in this folder. Name the folder that the recorder wrote to.")
    if files[0].suffix.lower() == ".csv":
        return _from_csv(files, path, options)
    dumps = read_arrays(files) if files[0].suffix == ".pt" else [read_converted(file) for file in files]
    kinds = [_kind(dump, file) for dump, file in zip(dumps, files, strict=True)]
    if len(set(kinds)) > 1:
        raise bad(path, "recordings of different modes in one folder. Keep the files of one recording together.")
    if kinds[0] == _STAT:
        if len(files) > 1:
            raise bad(path, f"{len(files)} recordings of mode stat, which writes one file. Name one of them.")
        return _from_stat(dumps[0]["logical_count"], path, options)
    return _from_records(dumps, path, options, kinds[0] == _PER_TOKEN)


def _kind(dump: dict[str, NDArray[Any]], file: Path) -> int:
    """The mode of one file, its arrays being those of that mode."""
    given = dump.get("kind")
    kind = int(given.reshape(())) if given is not None and given.size == 1 and given.dtype.kind in "iu" else -1
    if kind not in (_STAT, _PER_PASS, _PER_TOKEN):
        raise bad(file, "no `kind` of recording in it. Convert the .pt file again.")
    needed = ["logical_count"] if kind == _STAT else ["global_physical_count", "last_physical_to_logical_map"]
    if kind != _STAT:
        needed += ["forward_pass_id", "rank"]
    if kind == _PER_TOKEN:
        needed += ["topk_ids", "tokens", "input_ids", "positions", "forward_mode", "extend_tokens", "extends"]
    for name in needed:
        if name not in dump or dump[name].ndim != _SHAPES.get(name, 1) or dump[name].dtype.kind not in "iu":
            axes = _SHAPES.get(name, 1)
            raise bad(file, f"{name}: integers with {axes} axes are needed. Convert the .pt file again.")
    records = {len(dump[name]) for name in ("global_physical_count", "forward_pass_id", "rank") if kind != _STAT}
    if len(records) > 1:
        raise bad(file, f"records of different numbers, {sorted(records)}. Convert the .pt file again.")
    return kind


# ------------------------------------------------------------------------------------------------------------- stat


def _from_stat(count_SLE: AnyArray, path: Path, options: ReadOptions) -> ExpertLoads:
    _check_count(count_SLE, path, "logical_count")
    if options.num_experts is not None and count_SLE.shape[2] != options.num_experts:
        raise bad(path, f"{count_SLE.shape[2]} experts, the model has {options.num_experts}. Name the right model.")
    row_S, ordered = _ring_order(np.asarray(count_SLE.any(axis=(1, 2))))
    if not row_S.size:
        raise bad(path, "every count is 0: nothing ran between start and dump. Record while requests are served.")
    warnings = []
    if not ordered:
        warnings.append(
            f"{path.name}: the recorder's ring was full, or had empty steps, so that its rows are not in the order of"
            " time. Record with a larger --expert-distribution-recorder-buffer-size (-1: no ring)."
        )
    return _loads(count_SLE[row_S], path, tuple(warnings), ordered=ordered)


def _ring_order(filled_S: BoolArray) -> tuple[IntArray, bool]:
    """The filled rows, earliest first where that is known, and whether it is.

    The ring starts anywhere (resetting it clears the rows and keeps the position). One gap of empty rows, seen round
    the ring, lies before the earliest row.
    """
    rows = np.flatnonzero(filled_S)
    starts = np.flatnonzero(filled_S & ~np.roll(filled_S, 1))
    if len(starts) != 1:
        return rows, len(rows) == 1
    return np.concatenate([rows[rows >= starts[0]], rows[rows < starts[0]]]), True


def _check_count(count: AnyArray, path: Path, name: str) -> None:
    if 0 in count.shape:
        raise bad(path, f"{name}: shape {count.shape} holds nothing. Record while requests are served.")
    if count.size > MAX_CELLS or count.shape[1] > _MAX_LAYERS or count.shape[2] > MAX_EXPERTS:
        raise bad(path, f"{name}: shape {count.shape} is over {MAX_CELLS} counts. Record fewer steps.")
    if count.min() < 0:
        at = ", ".join(str(i) for i in np.argwhere(count < 0)[0])
        raise bad(path, f"{name}: counts are not negative, [{at}] is {int(count.min())}. The file is damaged.")


def _loads(count_SLE: AnyArray, path: Path, warnings: tuple[str, ...], **facts: Any) -> ExpertLoads:
    """Counts [S, all layers, E] without the layers that have none."""
    moe = np.flatnonzero(count_SLE.any(axis=(0, 2)))
    if not moe.size:
        raise bad(path, "every count is 0: nothing ran between start and dump. Record while requests are served.")
    return ExpertLoads(
        count_SLE[:, moe].astype(np.int64),
        path.name,
        layer_index=tuple(int(i) for i in moe),
        model_layers=int(count_SLE.shape[1]),
        warnings=warnings,
        **facts,
    )


# --------------------------------------------------------------------------------------------- per_pass and per_token


def _from_records(dumps: list[dict[str, NDArray[Any]]], path: Path, options: ReadOptions, tokens: bool) -> ExpertLoads:
    map_LP = dumps[0]["last_physical_to_logical_map"].astype(np.int64)
    if any(not np.array_equal(d["last_physical_to_logical_map"], map_LP) for d in dumps):
        raise bad(path, "the ranks' maps of experts differ: the files are of different dumps. Keep one dump's files.")
    experts = _experts_of_map(map_LP, path, options.num_experts)
    for dump in dumps:
        _check_count(dump["global_physical_count"], path, "global_physical_count")
        if dump["global_physical_count"].shape[1:] != map_LP.shape:
            raise bad(
                path,
                f"global_physical_count: {dump['global_physical_count'].shape[1:]} layers and physical experts,"
                f" {map_LP.shape} in the map. The file is damaged.",
            )
    pass_R = np.concatenate([d["forward_pass_id"] for d in dumps]).astype(np.int64)
    rank_R = np.concatenate([d["rank"] for d in dumps]).astype(np.int64)
    if len(np.unique(np.stack([pass_R, rank_R]), axis=1).T) != len(pass_R):
        raise bad(path, "a pass of a rank stands twice: files of two dumps, or one twice. Keep one dump's files.")
    ranks = int(np.unique(rank_R).size)
    warnings = []
    if len(np.unique(pass_R)) * ranks != len(pass_R):
        warnings.append(f"{path.name}: not every pass has all of its {ranks} ranks.")
    if tokens:
        source = _sglang_tokens.to_source(dumps, map_LP, experts, pass_R, rank_R, path)
        return _sglang_tokens.to_loads(source, ranks, map_LP.shape[0], (*warnings, *source.warnings))
    passes, at_R = np.unique(pass_R, return_inverse=True)
    if len(passes) * map_LP.shape[0] * experts > MAX_CELLS:
        raise bad(path, f"{len(passes)} passes are over {MAX_CELLS} counts. Record fewer steps.")
    count_SLE = np.zeros((len(passes), map_LP.shape[0], experts), np.int64)
    first = 0
    for dump in dumps:
        for count_LP in dump["global_physical_count"]:
            _add_logical(count_SLE[at_R[first]], count_LP, map_LP)
            first += 1
    count_SLE = count_SLE[count_SLE.any(axis=(1, 2))]
    if not len(count_SLE):
        raise bad(path, "every count is 0: nothing ran between start and dump. Record while requests are served.")
    return _loads(count_SLE, path, tuple(warnings), recorded_ranks=ranks)


def _add_logical(count_LE: IntArray, count_LP: AnyArray, map_LP: IntArray) -> None:
    """Add the counts of physical experts to those of the logical ones they hold."""
    flat = np.arange(len(map_LP))[:, None] * count_LE.shape[1] + map_LP
    count_LE += np.bincount(flat.ravel(), count_LP.ravel(), count_LE.size).reshape(count_LE.shape).astype(np.int64)


def _experts_of_map(map_LP: IntArray, path: Path, given: int | None) -> int:
    """E: every logical expert has a physical one in each layer."""
    name = "last_physical_to_logical_map"
    if not map_LP.size or map_LP.min() < 0 or map_LP.max() >= MAX_EXPERTS or len(map_LP) > _MAX_LAYERS:
        raise bad(path, f"{name}: logical experts from 0 on are needed for every physical one. The file is damaged.")
    experts = int(map_LP.max()) + 1
    held_LE = np.zeros((len(map_LP), experts), bool)
    np.put_along_axis(held_LE, map_LP, True, axis=1)
    if not held_LE.all():
        layer, expert = (int(i) for i in np.argwhere(~held_LE)[0])
        raise bad(path, f"{name}: expert {expert} of layer {layer} has no physical expert. The file is damaged.")
    if given is not None and experts != given:
        raise bad(path, f"{experts} experts, the model has {given}. Name the right model.")
    return experts


# -------------------------------------------------------------------------------------------------------------- CSV


def _from_csv(files: Sequence[Path], path: Path, options: ReadOptions) -> ExpertLoads:
    """One total of every rank's file, which name only experts that were taken."""
    cells: dict[tuple[int, int], int] = {}
    for file in files:
        lines = checked_text(read_file(file), str(file)).decode().splitlines()
        if lines[0].strip() != _CSV_HEAD:
            raise BadInput(f"the first line must be `{_CSV_HEAD}`", f"{file}:1")
        seen: set[tuple[int, int]] = set()
        for number, line in enumerate(lines[1:], 2):
            if not line.strip():
                continue
            words, where = line.split(","), f"{file}:{number}"
            if len(words) != 3 or not all(w.strip().isascii() and w.strip().isdigit() and len(w) < 16 for w in words):
                raise BadInput(f"layer, expert and count, whole numbers >= 0, are needed, got {line[:60]!r}", where)
            layer, expert, count = (int(w) for w in words)
            if layer >= _MAX_LAYERS or expert >= MAX_EXPERTS:
                raise BadInput(f"layer {layer}, expert {expert} is beyond {_MAX_LAYERS}, {MAX_EXPERTS}", where)
            if (layer, expert) in seen:
                raise BadInput(f"layer {layer}, expert {expert} stands twice in the file", where)
            seen.add((layer, expert))
            cells[layer, expert] = cells.get((layer, expert), 0) + count
    if not any(cells.values()):
        raise bad(path, "no count above 0. Record while requests are served.")
    largest = max(expert for _, expert in cells) + 1
    experts = options.num_experts or largest
    warnings = [f"{path.name} is one total: nothing of it can be held out, and it shows no drift."]
    if largest > experts:
        raise bad(path, f"expert {largest - 1} is named, the model has {experts}. Name the right model.")
    if options.num_experts is None:
        warnings.append(f"{path.name} does not say how many experts there are; {experts} taken from the largest id.")
    layers = sorted({layer for layer, _ in cells})
    if len(layers) * experts > _MAX_TOTAL_CELLS:
        raise bad(path, f"{len(layers)} layers of {experts} experts are no model's. The file is damaged.")
    count_LE = np.zeros((len(layers), experts), np.int64)
    for (layer, expert), count in cells.items():
        count_LE[layers.index(layer), expert] = count
    moe = np.flatnonzero(count_LE.any(axis=1))
    return ExpertLoads(
        count_LE[None, moe],
        path.name,
        steps_per_row=options.steps_per_row,
        layer_index=tuple(layers[i] for i in moe),
        recorded_ranks=len(files),
        warnings=tuple(warnings),
    )
