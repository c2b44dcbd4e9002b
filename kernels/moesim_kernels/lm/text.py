"""Text that every Python brings along: the sources of its standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Text", "batch", "load_text", "unigram_entropy", "windows"]

_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "encodings", "lib2to3", "__pycache__"}
)
_FEWEST_BYTES = 2048
_HELD_OUT_OF = 16
"""One file in so many is held out, chosen by the hash of its name."""


@dataclass(frozen=True, slots=True)
class Text:
    """`train`, `held_out`: uint8 bytes of the files, one after another, a 0 byte before each."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    files: int
    digest: str
    """blake2b over both: says which Python's library it was"""


def _held(name: str) -> bool:
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % _HELD_OUT_OF == 0


def load_text(folder: Path | None = None, most_bytes: int = 16 << 20) -> Text:
    """All modules of the standard library below `folder` (default: this Python's) by name, at most `most_bytes`.

    Tests, tables of encodings and installed packages are left out. Raises FileNotFoundError where there is no text.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    files = total = 0
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if _SKIPPED & set(path.relative_to(folder).parts) or path.stat().st_size < _FEWEST_BYTES:
            continue
        data = b"\0" + path.read_bytes().replace(b"\r\n", b"\n")
        if total + len(data) > most_bytes:
            break
        parts[_held(name)].append(data)
        files, total = files + 1, total + len(data)
    train, held_out = b"".join(parts[False]), b"".join(parts[True])
    if not train or not held_out:
        raise FileNotFoundError(f"{folder} holds no Python sources to train on and to hold out; name another folder")
    digest = hashlib.blake2b(train + held_out, digest_size=8).hexdigest()
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), files, digest)


def batch(data: NDArray[np.uint8], sequences: int, length: int, seed: int, step: int) -> NDArray[np.int64]:
    """int64 [sequences, length + 1]: windows at starts drawn for (seed, step) alone, so every method sees the same."""
    draws = np.random.default_rng(np.random.SeedSequence([seed, step]))
    start_B = draws.integers(0, len(data) - length, sequences)
    window_BS: NDArray[np.int64] = data[start_B[:, None] + np.arange(length + 1)].astype(np.int64)
    return window_BS


def windows(data: NDArray[np.uint8], sequences: int, length: int) -> NDArray[np.int64]:
    """int64 [sequences, length + 1]: windows evenly spread over `data`."""
    start_B = np.linspace(0, len(data) - length - 1, sequences).astype(np.int64)
    window_BS: NDArray[np.int64] = data[start_B[:, None] + np.arange(length + 1)].astype(np.int64)
    return window_BS


def unigram_entropy(data: NDArray[np.uint8]) -> float:
    """Nats per byte of the best guess that knows only how often each byte occurs."""
    share = np.bincount(data, minlength=256) / len(data)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
