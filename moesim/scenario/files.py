"""Where files that a scenario names are found, and what they hold, as a hash."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path

import moesim
from moesim.errors import BadInput, Problem
from moesim.reuse import file_key, reused

__all__ = ["NAME", "content_hash", "find_named", "home", "names_in", "profile_hash", "shown"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WHOLE_BYTES = 256 << 20  # larger files are hashed by size and 256 samples of 1 MiB
_SAMPLE_BYTES = 1 << 20
_POWER = re.compile(rb"^power:[^\n]*\n(?:[ \t]+[^\n]*\n)*", re.MULTILINE)


def home() -> Path:
    """The folder with `workloads/` and `hw_profiles/`: MOESIM_HOME, or the clone this package runs from."""
    given = os.environ.get("MOESIM_HOME")
    root = Path(given) if given else Path(moesim.__file__).resolve().parents[1]
    if not (root / "workloads").is_dir():
        hint = "MOESIM_HOME names it" if given else "set MOESIM_HOME to a clone of moesim"
        raise BadInput(Problem("", f"the folder with workloads/ and hw_profiles/ is not {root}; {hint}"))
    return root


def names_in(folder: str) -> list[str]:
    """Names (without .yaml) of the files in `workloads/models` or `hw_profiles`, sorted."""
    return sorted(p.stem for p in (home() / folder).glob("*.yaml"))


def find_named(name: str, folder: str, base: Path, where: str, what: str) -> Path:
    """The file behind `name`: a path from `base` (or a folder with a config.json), else a file of `folder`.

    `where` is the place that named it and `what` it is, for the message. Raises BadInput.
    """
    try:
        near = base / name
        if near.is_file():
            return near
        if (near / "config.json").is_file():
            return near / "config.json"
        if NAME.fullmatch(name):
            shipped = home() / folder / f"{name}.yaml"
            if shipped.is_file():
                return shipped
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(Problem(where, f"{what} {_short(name)} cannot be read: {reason}")) from None
    known = names_in(folder)
    if "/" in name or name.endswith((".yaml", ".yml", ".json")):
        message = f"no such file {_short(name)} (looked for from {shown(base)})"
    else:
        folded = {k.lower(): k for k in known}
        close = [k for k in folded if k.startswith(name.lower())]
        close = close or difflib.get_close_matches(name.lower(), folded, n=1)
        hint = f"Did you mean {folded[close[0]]!r}?" if close else f"Known: {', '.join(known)}; or name a file"
        message = f"unknown {what} {_short(name)}. {hint}"
    raise BadInput(Problem(where, message))


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def shown(path: Path) -> str:
    """`path` as a user would name it from the current folder."""
    text = os.path.relpath(path)
    return str(path) if text.startswith("../../..") else text


def content_hash(path: Path) -> str:
    """blake2b of a file, or of the names and contents of a folder's files. Raises BadInput if unreadable."""
    return reused("content hash", lambda: file_key(path), lambda: _content_hash(path))


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            _hash_file(file, digest)
    except OSError as error:
        raise BadInput(Problem(shown(path), f"the file cannot be read: {error.strerror}")) from None
    return digest.hexdigest()


def profile_hash(path: Path) -> str:
    """`content_hash` of a device profile without its `power` block, on which no time depends."""
    try:
        data = _POWER.sub(b"", path.read_bytes())
    except OSError as error:
        raise BadInput(Problem(shown(path), f"the file cannot be read: {error.strerror}")) from None
    digest = hashlib.blake2b(b".\0", digest_size=16)
    digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _hash_file(path: Path, digest: hashlib.blake2b) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_SAMPLE_BYTES):
                digest.update(block)
            return
        for i in range(256):
            file.seek((size - _SAMPLE_BYTES) * i // 255)
            digest.update(file.read(_SAMPLE_BYTES))
