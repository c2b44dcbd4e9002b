"""TensorRT-LLM's expert statistics: a folder that a run with EXPERT_STATISTIC_ITER_RANGE wrote.

meta_info.json {num_experts, num_experts_per_token, ...} and one rank<N>.safetensors a rank with a tensor of E counts
for every "<iteration>_<layer>"; where asked for, rank<N>_raw.safetensors with the ids themselves under the same names,
[tokens, K], from which come whole tokens. As read by examples/wide_ep/ep_load_balancer/utils.py of NVIDIA/TensorRT-LLM
and written by ExpertStatistic. Counts of ranks are added, as there: ranks that hold the same tokens (attention not
data-parallel) count them again.
A layer's number is the model's.

Legend: S iterations, L layers, E experts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.strict_json import load_json
from moesim.traces._routing_checks import MAX_EXPERTS, bad, check_ids
from moesim.traces._safetensors import read_integers
from moesim.workload.loads import MAX_CELLS, ExpertLoads
from moesim.workload.pool import RoutingSource, id_dtype

if TYPE_CHECKING:
    from moesim.traces.expert_loads import ReadOptions

__all__ = ["read", "recognise"]

_KEY = re.compile(r"(\d{1,12})_(\d{1,5})")
_MOST_FILES = 4096


def recognise(path: Path) -> bool:
    """A folder with meta_info.json, or a rank's file in one."""
    return (path / "meta_info.json").is_file() or (path.suffix == ".safetensors" and path.is_file())


def read(path: Path, options: ReadOptions) -> ExpertLoads:
    """The statistics of the folder `path`. Raises BadInput naming file, tensor, fact and mend."""
    folder = path.parent if path.suffix == ".safetensors" else path
    experts, top_k = _meta(folder / "meta_info.json")
    if options.num_experts is not None and experts != options.num_experts:
        raise bad(path, f"{experts} experts, the model has {options.num_experts}. Name the right model.")
    files = sorted(f for f in folder.glob("rank*.safetensors") if not f.name.endswith("_raw.safetensors"))
    if not files or len(files) > _MOST_FILES:
        raise bad(folder, f"{len(files)} files rank*.safetensors; from 1 to {_MOST_FILES} are read.")
    total: dict[tuple[int, int], Any] = {}
    for file in files:
        for name, count_E in read_integers(file).items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise bad(file, f"a tensor is named <iteration>_<layer>, got {name[:60]!r}.")
            if count_E.shape != (experts,):
                raise bad(file, f"{name}: {experts} counts are needed as meta_info.json says, got {count_E.shape}.")
            if count_E.min() < 0:
                raise bad(file, f"{name}: counts are not negative, got {int(count_E.min())}. The file is damaged.")
            key = (int(match[1]), int(match[2]))
            if (len(total) + 1) * experts > MAX_CELLS:
                raise bad(folder, f"over {MAX_CELLS} counts. Record fewer iterations.")
            total[key] = count_E.astype(np.int64) + total.get(key, 0)
    loads = _loads(total, experts, top_k, len(files), folder)
    raw = [file.with_name(f"{file.stem}_raw.safetensors") for file in files]
    return _with_tokens(loads, sorted({key[0] for key in total}), raw, folder) if raw[0].is_file() else loads


def _meta(path: Path) -> tuple[int, int]:
    """num_experts and num_experts_per_token (0 where it is not there)."""
    meta, _ = load_json(path)
    if not isinstance(meta, dict):
        raise bad(path, "an object is needed.")
    experts, top_k = meta.get("num_experts"), meta.get("num_experts_per_token", 0)
    if type(experts) is not int or not 1 <= experts <= MAX_EXPERTS:
        raise bad(path, f"num_experts: a number from 1 to {MAX_EXPERTS} is needed, got {str(experts)[:40]}.")
    if type(top_k) is not int or not 0 <= top_k <= experts:
        raise bad(path, f"num_experts_per_token: a number up to {experts} is needed, got {str(top_k)[:40]}.")
    return experts, top_k


def _loads(total: dict[tuple[int, int], Any], experts: int, top_k: int, ranks: int, folder: Path) -> ExpertLoads:
    steps, layers = (sorted({key[i] for key in total}) for i in (0, 1))
    missing = [f"{s}_{m}" for s in steps for m in layers if (s, m) not in total]
    if missing or not total:
        raise bad(folder, f"{missing[0] if missing else 'a count'} is missing: every iteration needs every layer.")
    count_SLE = np.stack([np.stack([total[s, layer] for layer in layers]) for s in steps])
    moe = np.flatnonzero(count_SLE.any(axis=(0, 2)))
    filled = count_SLE.any(axis=(1, 2))
    if not filled.any():
        raise bad(folder, "every count is 0. Record iterations in which requests are served.")
    return ExpertLoads(
        count_SLE[filled][:, moe],
        folder.name,
        top_k=top_k,
        layer_index=tuple(layers[i] for i in moe),
        recorded_ranks=ranks,
    )


def _with_tokens(loads: ExpertLoads, steps: list[int], files: list[Path], folder: Path) -> ExpertLoads:
    """The loads with their tokens, iteration by iteration, rank by rank. Raises BadInput unless they are the counts."""
    assert loads.layer_index is not None
    parts: list[NDArray[Any]] = []
    row_tokens_S = []
    ranks = [read_integers(file) for file in files]
    for step in steps:
        row_tokens_S.append(0)
        for file, tensors in zip(files, ranks, strict=True):
            names = [f"{step}_{layer}" for layer in loads.layer_index]
            found = [tensors[name] for name in names if name in tensors]
            if not found:
                continue  # a rank without tokens in this iteration
            if len(found) < len(names) or any(f.ndim != 2 or f.shape != found[0].shape for f in found):
                raise bad(file, f"iteration {step}: ids [tokens, experts a token], as many in every layer, are needed.")
            parts.append(np.stack(found, axis=1))
            row_tokens_S[-1] += len(parts[-1])
    tokens = [p for p in parts if len(p)]
    if not tokens or len({p.shape[2] for p in tokens}) > 1:
        raise bad(folder, "rank*_raw.safetensors: ids with one number of experts a token are needed.")
    ids_TLK = np.concatenate(tokens)
    check_ids(ids_TLK, loads.num_experts, files[0])
    start = np.cumsum([0, *(len(p) for p in tokens)]).astype(np.int64)
    ids = ids_TLK.astype(id_dtype(loads.num_experts))
    source = RoutingSource(
        ids, start, loads.num_experts, ids.shape[2], True, folder.name, layer_index=loads.layer_index
    )
    filled = [n for n in row_tokens_S if n]
    if len(filled) != loads.num_rows or not np.array_equal(source.count_LE(), loads.total_LE):
        raise bad(folder, "the ids of rank*_raw.safetensors do not add up to the counts. Keep one recording's files.")
    return replace(loads, top_k=source.top_k, tokens=source, row_tokens_S=np.array(filled, np.int64))
