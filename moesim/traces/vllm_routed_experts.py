"""vLLM's routed experts: responses of a server started with --enable-return-routed-experts, as they came.

Described in docs/training/routed_experts_replay.md of vllm-project/vllm: `prompt_routed_experts` [prompt, layers, K] of
a response and `choices[i].routed_experts` [generated, layers, K]. A JSON file with one response or a list of them, or
one response a line (.jsonl). An array is nested lists or, as later versions send it, the base64 of an .npy.

What the files do not say, and what is done about it:
- -1 stands for tokens whose prefix was cached: they are left out. An array is null where a request was preempted.
- layers are the MoE layers, in older versions all layers: one where no token has K distinct experts is taken for dense.
- which requests ran together is not recorded: rows are tokens in the order of the file, not passes of the engine.
- the number of experts.

Legend: T tokens, L layers, K experts a token.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray
from moesim.errors import BadInput
from moesim.traces._files import checked_text, read_file, strict_json, text_lines
from moesim.traces._json import shown
from moesim.traces._npy import BROKEN, read_header
from moesim.traces._routing_checks import MAX_EXPERTS, bad, check_ids
from moesim.workload.loads import ExpertLoads
from moesim.workload.pool import RoutingSource, id_dtype

if TYPE_CHECKING:
    from moesim.traces.expert_loads import ReadOptions

__all__ = ["read", "recognise"]

_MOST_IDS = 1 << 28
_LINE_CHARS = 256 << 20
_COUNTS = re.compile(r'\s*(\{\s*("\d+"|\})|\[\s*(\[|\]))')
"""how a JSON file of per-layer counts begins"""


def recognise(path: Path) -> bool:
    """A .jsonl file, or a .json file that does not begin as per-layer counts do."""
    if path.suffix.lower() == ".jsonl":
        return path.is_file()
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return _COUNTS.match(file.read(4096).decode("utf-8", "replace").lstrip("\ufeff")) is None


def read(path: Path, options: ReadOptions) -> ExpertLoads:
    """The responses of `path` as rows of at most `options.tokens_per_row` tokens. Raises BadInput with the response."""
    from moesim.traces.expert_loads import from_tokens

    parts, phases, missing = _sequences(path)
    if not parts:
        raise bad(
            path,
            f"no routed experts in it ({missing} arrays are null). Start the server with"
            " --enable-return-routed-experts.",
        )
    warnings = [f"{path.name}: rows are tokens in the order of the file; which ones ran together is not recorded."]
    if missing:
        warnings.append(f"{path.name}: {missing} arrays are null (preempted requests): their tokens are missing.")
    ids_TLK = np.concatenate(parts).astype(np.int64)
    sequence_T = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    phase_T = np.concatenate(phases)
    moe = _moe_layers(ids_TLK)
    if not moe.size:
        raise bad(path, "no layer in which a token has distinct experts. Is the model a MoE model?")
    model_layers = ids_TLK.shape[1] if moe.size < ids_TLK.shape[1] else 0
    ids_TLK = ids_TLK[:, moe]
    whole_T = (ids_TLK >= 0).all(axis=(1, 2))
    if not whole_T.all():
        warnings.append(f"{path.name}: {int((~whole_T).sum()):,} tokens with cached prefixes (-1) are left out.")
    if not whole_T.any():
        raise bad(path, "every token's prefix was cached (-1). Record with --no-enable-prefix-caching.")
    ids_TLK, sequence_T, phase_T = ids_TLK[whole_T], sequence_T[whole_T], phase_T[whole_T]
    experts = options.num_experts
    if experts is None:
        experts = int(ids_TLK.max()) + 1
        warnings.append(f"{path.name} does not say how many experts there are; {experts} taken from the largest id.")
    if experts > MAX_EXPERTS:
        raise bad(path, f"expert {experts - 1}: at most {MAX_EXPERTS} experts are read.")
    check_ids(ids_TLK, experts, path)
    start = np.flatnonzero(np.concatenate([[True], sequence_T[1:] != sequence_T[:-1]]))
    source = RoutingSource(
        ids_TLK.astype(id_dtype(experts)),
        np.append(start, len(ids_TLK)).astype(np.int64),
        experts,
        int(ids_TLK.shape[2]),
        True,
        path.name,
        layer_index=tuple(int(i) for i in moe) if model_layers else None,
        phase_T=phase_T,
        warnings=tuple(warnings),
    )
    return from_tokens(source, options.tokens_per_row, model_layers=model_layers)


def _moe_layers(ids_TLK: AnyArray) -> NDArray[np.intp]:
    """Layers where some token has K distinct experts (K > 1), or any expert (K = 1)."""
    if ids_TLK.shape[2] == 1:
        return np.flatnonzero((ids_TLK >= 0).any(axis=(0, 2)))
    ordered = np.sort(ids_TLK, axis=2)
    distinct_TL = (ordered[:, :, 1:] != ordered[:, :, :-1]).all(axis=2) & (ordered[:, :, 0] >= 0)
    return np.flatnonzero(distinct_TL.any(axis=0))


# ------------------------------------------------------------------------------------------------------- responses


def _sequences(path: Path) -> tuple[list[NDArray[Any]], list[NDArray[np.uint8]], int]:
    """Each choice's ids [T, L, K], the prompt before the first one, phases [T], and how many arrays are null."""
    parts: list[NDArray[Any]] = []
    phases: list[NDArray[np.uint8]] = []
    missing, left, shape = 0, _MOST_IDS, None
    for where, response in _responses(path):
        choices = response.get("choices")
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise BadInput("`choices`, a list of objects, is needed: a response of vLLM as it came", where)
        given = [(response.get("prompt_routed_experts"), f"{where}: prompt_routed_experts", 0)]
        given += [(c.get("routed_experts"), f"{where}: choices[{i}].routed_experts", 1) for i, c in enumerate(choices)]
        arrays = []
        for value, name, phase in given:
            if value is None:
                missing += 1
                continue
            ids = _ids(value, name)
            if not len(ids):
                continue
            if shape is not None and ids.shape[1:] != shape:
                raise BadInput(f"{ids.shape[1:]} layers and experts a token, {shape} before; one model a file", name)
            shape, left = ids.shape[1:], left - ids.size
            if left < 0:
                raise bad(path, f"over {_MOST_IDS} ids. Split the file.")
            prompt = _prompt_tokens(response, len(ids)) if phase else 0
            if prompt:  # later versions send prompt and answer as one array
                arrays.append((ids[:prompt], 0))
            arrays.append((ids[prompt:], phase))
        if len(arrays) > 1 and arrays[0][1] == 0:  # the prompt and what the first choice says after it
            joined = np.concatenate([arrays[0][0], arrays[1][0]])
            parts.append(joined)
            phases.append(np.repeat(np.array([0, 1], np.uint8), [len(arrays[0][0]), len(arrays[1][0])]))
            arrays = arrays[2:]
        parts += [ids for ids, _ in arrays]
        phases += [np.full(len(ids), phase, np.uint8) for ids, phase in arrays]
    return parts, phases, missing


def _prompt_tokens(response: dict[str, Any], rows: int) -> int:
    """How many of a choice's rows are the prompt's, where no array has them alone and `usage` tells; else 0."""
    usage = response.get("usage")
    if response.get("prompt_routed_experts") is not None or not isinstance(usage, dict):
        return 0
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(answer) is not int or len(response["choices"]) != 1:
        return 0
    return prompt if prompt >= 0 and rows in (prompt + answer, prompt + answer - 1) else 0


def _responses(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each response with its place."""
    data = checked_text(read_file(path), str(path))
    found: list[tuple[str, Any]]
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text_lines(data, str(path), _LINE_CHARS), 1)
        found = [(f"{path}:{n}", _json(line, f"{path}:{n}")) for n, line in lines if line.strip()]
    else:
        value = _json(data.decode("utf-8"), str(path))
        found = (
            [(f"{path}: [{i}]", v) for i, v in enumerate(value)] if isinstance(value, list) else [(str(path), value)]
        )
    for where, response in found:
        if not isinstance(response, dict):
            raise BadInput(f"a response is an object, got {shown(response)}", where)
    return found


def _json(text: str, where: str) -> Any:
    try:
        return strict_json(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg}", f"{where}:{error.lineno}:{error.colno}") from None
    except ValueError as error:
        raise BadInput(f"not JSON that is read: {error}", where) from None


def _ids(value: Any, where: str) -> NDArray[Any]:
    """[T, L, K] of nested lists or of a base64 .npy."""
    if isinstance(value, str):
        ids = _npy(value, where)
    elif isinstance(value, list):
        if not value:
            return np.empty((0, 0, 0), np.int64)
        try:
            ids = np.array(value)
        except ValueError:
            raise BadInput("every token needs the same layers, and every layer as many experts", where) from None
        except OverflowError:
            raise BadInput("expert ids are small whole numbers", where) from None
    else:
        raise BadInput(f"lists [tokens, layers, experts], base64 text or null are needed, got {shown(value)}", where)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise BadInput(
            f"whole numbers [tokens, layers, experts] are needed, got {ids.dtype} of shape {ids.shape}", where
        )
    if len(ids) and 0 in ids.shape:
        raise BadInput(f"at least one layer and one expert are needed, got shape {ids.shape}", where)
    if ids.size and not -1 <= ids.min() <= ids.max() < MAX_EXPERTS:
        raise BadInput(f"expert ids from 0 on (-1: cached) are needed, got {ids.min()}..{ids.max()}", where)
    return ids


def _npy(text: str, where: str) -> NDArray[Any]:
    try:
        data = base64.b64decode(text, validate=True)
        stream = io.BytesIO(data)
        header = read_header(stream, len(data), Path(where), "routed experts")
        flat = np.frombuffer(data, header.dtype, offset=stream.tell())
        return flat.reshape(header.shape, order="F" if header.fortran else "C")
    except (binascii.Error, *BROKEN) as error:
        raise BadInput(f"no base64 of an .npy array ({error})", where) from None
