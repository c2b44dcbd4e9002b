"""What runs may share: results of pure steps (a pool of routed tokens, a parsed profile) kept by what they are made of.

Off unless someone says `with reusing(Reuse(...))`, as the tuner's workers do: its candidates differ in a few fields,
and most of a run's time does not depend on those. A step is kept under a hash of its inputs, all of them and nothing
else, so a run gives the same bytes with and without. What is kept is shared, so its arrays are made read-only.

An input that was itself kept is named by its own key instead of by its content: a placement on a pool of gigabytes is
named in microseconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

__all__ = ["Reuse", "file_key", "named", "reused", "reusing"]

T = TypeVar("T")

_NAMED_BYTES = 64 << 20
"""An array that is larger, and not known by name, is not hashed: what rests on it is made anew."""
_OVERHEAD_BYTES = 512
_MOST_FILES = 1000
_SETTLED_NS = 2_000_000_000


class _Nameless(Exception):
    """An input that cannot be named, so that what rests on it is not kept."""


class Reuse:
    """Results by key, at most `limit_bytes` of them, the one longest unused leaves first. Safe with threads: two that
    miss at once both compute, and either result is right."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self.hits: dict[str, int] = {}
        self.misses: dict[str, int] = {}
        self._kept: OrderedDict[str, tuple[Any, int, dict[int, str]]] = OrderedDict()
        self._name_of_id: dict[int, str] = {}
        self._lock = threading.Lock()

    def get(self, what: str, key: Callable[[], tuple[Any, ...] | None], make: Callable[[], T]) -> T:
        """`make()`, or what it gave for an equal key; key None: not kept. An exception of `make` goes through, and
        nothing is kept."""
        name = self.name(what, key())
        if name is None:
            self._count(self.misses, what)
            return make()
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
        if found is not None:
            self._count(self.hits, what)
            result: T = found[0]
            return result
        self._count(self.misses, what)
        made = make()
        self._keep(name, made)
        return made

    def name(self, what: str, key: tuple[Any, ...] | None) -> str | None:
        """The hash that `what`, made of `key`, is kept under; None where an input cannot be named."""
        if key is None:
            return None
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        try:
            self._feed(digest, key)
        except _Nameless:
            return None
        return digest.hexdigest()

    def _count(self, counts: dict[str, int], what: str) -> None:
        with self._lock:
            counts[what] = counts.get(what, 0) + 1

    def _keep(self, name: str, made: Any) -> None:
        size = _OVERHEAD_BYTES + _freeze(made, set())
        if size > self.limit_bytes:
            return
        with self._lock:
            if name in self._kept:
                return
            named = dict(_nameable(made, name))
            self._kept[name] = (made, size, named)
            self.size_bytes += size
            for place, its_name in named.items():
                self._name_of_id.setdefault(place, its_name)
            while self.size_bytes > self.limit_bytes:
                _, its_size, names = self._kept.popitem(last=False)[1]
                self.size_bytes -= its_size
                for place, its_name in names.items():
                    if self._name_of_id.get(place) == its_name:
                        del self._name_of_id[place]

    def _feed(self, digest: Any, part: Any) -> None:
        """Add one input to a hash: its type, its extent and its content, or its name."""
        if part is None or isinstance(part, bool | int | float | str | bytes):
            text = part if isinstance(part, bytes) else repr(part).encode()
            digest.update(f"{type(part).__name__}:{len(text)}:".encode() + text)
            return
        known = self._name_of_id.get(id(part))
        if known is not None:
            digest.update(b"named:" + known.encode())
            return
        if isinstance(part, np.ndarray | np.generic):
            array = np.asarray(part)
            if array.dtype.hasobject or array.nbytes > _NAMED_BYTES:
                raise _Nameless
            digest.update(f"array:{array.dtype.str}:{array.shape}:".encode())
            digest.update(np.ascontiguousarray(array).data)
            return
        if isinstance(part, type):
            digest.update(f"type:{part.__module__}.{part.__qualname__}:".encode())
            return
        digest.update(f"{type(part).__module__}.{type(part).__qualname__}(".encode())
        for item in _items(part):
            self._feed(digest, item)
        digest.update(b")")


def _items(part: Any) -> Iterator[Any]:
    """What a value is made of, in one order. Raises _Nameless for what has no content that could be told."""
    if isinstance(part, BaseModel):
        yield part.__dict__
        yield part.model_fields_set
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield field.name
            yield getattr(part, field.name)
    elif isinstance(part, Mapping):
        for key in sorted(part, key=repr):
            yield key
            yield part[key]
    elif isinstance(part, tuple | list):
        yield len(part)
        yield from part
    elif isinstance(part, set | frozenset):
        yield from sorted(part, key=repr)
    elif isinstance(part, PurePath):
        yield str(part)
    else:
        raise _Nameless


def _nameable(made: Any, name: str) -> Iterator[tuple[int, str]]:
    """Identities of arrays and frozen dataclasses in what is kept, each with a name, not of the small values that
    Python shares. They live as long as it is kept, and nothing can change them."""
    if isinstance(made, np.ndarray):
        yield id(made), name
    elif dataclasses.is_dataclass(made) and not isinstance(made, type):
        if made.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            yield id(made), name
            for field in dataclasses.fields(made):
                yield from _nameable(getattr(made, field.name, None), f"{name}.{field.name}")
    elif isinstance(made, tuple):
        for place, part in enumerate(made):
            yield from _nameable(part, f"{name}[{place}]")


def _freeze(made: Any, seen: set[int]) -> int:
    """Make arrays read-only; bytes of what is held."""
    if id(made) in seen or made is None or isinstance(made, bool | int | float | type):
        return 0
    seen.add(id(made))
    if isinstance(made, np.ndarray):
        if made.flags.writeable:
            made.setflags(write=False)
        return 0 if isinstance(made, np.memmap) else int(made.nbytes)
    if isinstance(made, str | bytes):
        return len(made)
    if isinstance(made, Mapping):
        return sum(_freeze(k, seen) + _freeze(v, seen) + 64 for k, v in made.items())
    if isinstance(made, tuple | list | set | frozenset):
        return sum(_freeze(v, seen) + 8 for v in made)
    if dataclasses.is_dataclass(made):
        return sum(_freeze(getattr(made, f.name, None), seen) + 8 for f in dataclasses.fields(made))
    held = getattr(made, "__dict__", None)
    return 256 if held is None else 256 + sum(_freeze(v, seen) for v in held.values())


_now: ContextVar[Reuse | None] = ContextVar("moesim_reuse", default=None)


@contextmanager
def reusing(kept: Reuse) -> Iterator[Reuse]:
    """Within, runs of this thread share what `kept` holds."""
    token = _now.set(kept)
    try:
        yield kept
    finally:
        _now.reset(token)


def reused(what: str, key: Callable[[], tuple[Any, ...] | None], make: Callable[[], T]) -> T:
    """`make()`, which must be a pure function of `key()`; the result of an equal call where runs share. what: names the
    step. key: asked for only where runs share; None: not to be kept."""
    kept = _now.get()
    return make() if kept is None else kept.get(what, key, make)


def named(what: str, key: Callable[[], tuple[Any, ...]]) -> str | None:
    """A hash that stands for `key()` in the keys of steps that share much of their input; None where runs do not share,
    or an input cannot be named."""
    kept = _now.get()
    return None if kept is None else kept.name(what, key())


def file_key(path: Path) -> tuple[Any, ...] | None:
    """Stands for the content of a file, or of a folder's files, as git's index does: by identity, size and the times of
    its last changes. None where it cannot be told so: changed in the last two seconds (a further change could
    leave the times as they are), of too many files, or unreadable."""
    try:
        if not path.is_dir():
            return _stat_key(path)
        files = sorted(p for p in itertools.islice(path.rglob("*"), _MOST_FILES + 1) if p.is_file())
        if len(files) > _MOST_FILES:
            return None
        keys = [_stat_key(file) for file in files]
    except (OSError, ValueError):
        return None
    return None if None in keys else (str(path.absolute()), tuple(keys))


def _stat_key(file: Path) -> tuple[Any, ...] | None:
    found = file.stat()
    if time.time_ns() - max(found.st_ctime_ns, found.st_mtime_ns) < _SETTLED_NS:
        return None
    return (
        str(file.absolute()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns,
    )  # fmt: skip
