"""What makes the arrays of a routing trace fit to be replayed; each problem is one error with place, fact and mend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Problem

__all__ = [
    "bad",
    "check_ids",
    "check_integers",
    "check_layers",
    "check_scores_shape",
    "check_shape",
    "experts_of",
    "scalar",
    "sequence_starts",
    "to_scores",
    "to_tokens",
    "to_weights",
]

MAX_EXPERTS = 1 << 16


def bad(path: Path, message: str) -> BadInput:
    """The error for one file."""
    return BadInput(Problem(str(path), message))


def check_shape(shape: tuple[int, ...], path: Path) -> None:
    """expert_ids has three axes, none empty."""
    if len(shape) != 3:
        raise bad(path, f"expert_ids: [tokens, layers, top_k] is needed, got shape {shape}.")
    if 0 in shape:
        raise bad(path, f"expert_ids: at least one token, layer and expert is needed, got shape {shape}.")


def check_ids(ids: NDArray[Any], num_experts: int, path: Path, first: int = 0, duplicates: bool = True) -> None:
    """Ids are in [0, num_experts) and distinct within a token and layer; `first` is the first token's
    number."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        token, layer = np.argwhere(ids < 0)[0][:2]
        hint = (
            " -1 is the padding of some engines' exports: leave padded tokens out when exporting, ids[(ids"
            " >= 0)"
            ".all((1, 2))]."
            if low == -1
            else ""
        )
        raise bad(path, f"expert_ids: id {low} at token {first + token}, layer {layer} is below 0.{hint}")
    if high >= num_experts:
        token, layer = np.argwhere(ids >= num_experts)[0][:2]
        raise bad(
            path,
            f"expert_ids: id {int(ids[token, layer].max())} at token {first + token}, layer {layer} with"
            f" {num_experts}"
            f" experts (ids go from 0 to {num_experts - 1}). Use the model that the trace was recorded with.",
        )
    if not duplicates or ids.shape[2] == 1:
        return
    ordered = np.sort(ids, axis=2)
    same = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(2)
    if same.any():
        token, layer = np.argwhere(same)[0]
        raise bad(
            path,
            f"expert_ids: a token takes {ids.shape[2]} distinct experts, but token {first + token}, layer"
            f" {layer} has"
            f" {ids[token, layer].tolist()}. Fused or padded ids cannot be replayed; export the router's"
            " top-k.",
        )


def check_integers(array: NDArray[Any], path: Path, name: str) -> None:
    """An array of integers, of either sign."""
    if array.dtype.kind not in "iu":
        raise bad(path, f"{name}: integers are needed, got {array.dtype}. Convert with .astype(int).")


def to_weights(raw: NDArray[Any], path: Path) -> NDArray[np.float16]:
    """Gate weights as float16: finite, not negative."""
    with np.errstate(over="ignore", invalid="ignore"):
        weights = raw.astype(np.float16)
    if not np.isfinite(weights).all():
        token = int(np.argwhere(~np.isfinite(weights))[0][0])
        raise bad(path, f"weights: finite gate weights are needed, token {token} has NaN, infinity or over 65504.")
    if weights.min() < 0:
        token = int(np.argwhere(weights < 0)[0][0])
        raise bad(path, f"weights: gate weights are not negative, token {token} has {float(weights.min())}.")
    return weights


def to_scores(raw: NDArray[Any], path: Path, first: int = 0) -> NDArray[np.float16]:
    """Logits as float16: finite; `first` is the first token's number."""
    if raw.dtype.kind != "f":
        raise bad(path, f"scores: the router's logits, floats, are needed, got {raw.dtype}. Write them as they were.")
    with np.errstate(over="ignore", invalid="ignore"):
        scores: NDArray[np.float16] = raw.astype(np.float16)
    if not np.isfinite(scores).all():
        token = first + int(np.argwhere(~np.isfinite(scores))[0][0])
        raise bad(
            path,
            f"scores: finite logits are needed, token {token} has NaN, infinity or over 65504. Leave such tokens out.",
        )
    return scores


def check_scores_shape(shape: tuple[int, ...], ids: tuple[int, ...], experts: int, path: Path) -> None:
    """[T, L, E], T and L those of the ids' shape."""
    if shape != (*ids[:2], experts):
        raise bad(
            path,
            f"scores: one logit a token, layer and expert, {(*ids[:2], experts)}, is needed, got {shape}."
            " Write all experts' logits, or leave scores out.",
        )


def to_tokens(raw: NDArray[Any], tokens: int, path: Path, name: str) -> NDArray[np.int64]:
    """token_id or phase: an integer from 0 on for each token, at most 1 for a phase."""
    check_integers(raw, path, name)
    if raw.shape != (tokens,):
        raise bad(path, f"{name}: shape ({tokens},) is needed, one a token, got {raw.shape}.")
    most = 1 if name.startswith("phase") else (1 << 31) - 1
    wrong = np.flatnonzero((raw < 0) | (raw > most))
    if len(wrong):
        what = "0 (prefill) or 1 (decode)" if most == 1 else f"a vocabulary id between 0 and {most}"
        raise bad(path, f"{name}: {what} is needed, token {wrong[0]} has {int(raw[wrong[0]])}.")
    return raw.astype(np.int64)


def sequence_starts(sequence_id: NDArray[Any], tokens: int, path: Path) -> NDArray[np.int64]:
    """int64 [Q + 1] from one id a token; the tokens of a sequence must stand together."""
    check_integers(sequence_id, path, "sequence_id")
    if sequence_id.shape != (tokens,):
        raise bad(path, f"sequence_id: shape ({tokens},) is needed, one id a token, got {sequence_id.shape}.")
    first = np.flatnonzero(np.concatenate([[True], sequence_id[1:] != sequence_id[:-1]]))
    ids, counts = np.unique(sequence_id[first], return_counts=True)
    if (counts > 1).any():
        again = ids[counts > 1][0]
        raise bad(
            path,
            f"sequence_id: a sequence's tokens stand together, but id {again} comes back after another."
            " Sort the tokens by sequence (stable, so that positions keep their order).",
        )
    return np.append(first, tokens).astype(np.int64)


def check_layers(layer_index: NDArray[Any], layers: int, path: Path) -> tuple[int, ...]:
    """The layers' numbers, rising."""
    check_integers(layer_index, path, "layer_index")
    if layer_index.shape != (layers,):
        raise bad(path, f"layer_index: one entry a layer, ({layers},), is needed, got {layer_index.shape}.")
    out = tuple(int(x) for x in layer_index)
    if out[0] < 0 or any(b <= a for a, b in itertools.pairwise(out)):
        raise bad(path, f"layer_index: rising numbers from 0 on are needed, got {list(out)}.")
    return out


def experts_of(found: dict[str, Any], top_k: int, given: int | None, path: Path) -> int | None:
    """The number of experts that the file states, or `given`; None when neither does. Checks top_k on the
    way."""
    stated = found.get("top_k")
    if stated is not None and int(stated) != top_k:
        raise bad(path, f"top_k: the file states {int(stated)}, but expert_ids holds {top_k} ids a token.")
    experts = found.get("num_experts", given)
    if experts is None:
        return None
    experts = int(experts)
    if not top_k <= experts <= MAX_EXPERTS:
        raise bad(path, f"num_experts: between top_k={top_k} and {MAX_EXPERTS} is needed, got {experts}.")
    return experts


def scalar(array: NDArray[Any], path: Path, name: str) -> int:
    """The one integer of an array."""
    check_integers(array, path, name)
    if array.size != 1:
        raise bad(path, f"{name}: one number is needed, got shape {array.shape}.")
    return int(array.reshape(()))
