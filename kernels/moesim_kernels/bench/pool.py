"""What a measured case is made of: the device, the shared memory, and the thing that runs. torch comes in late.

All weights of a run are views of a few arenas of random normal numbers, one a number format and kind, so that hundreds
of cases fit where one layer does. A case that reads less than the last-level cache holds gets several views, one a
rotation, which together are larger than the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["FP8_SCALE", "Device", "Pool", "PoolFull", "Prepared", "cache_bytes", "torch_dtype"]

T = TypeVar("T")
DEFAULT_CACHE_BYTES = 64 << 20
FP8_SCALE = 0.02 / 100  # the scale that makes fp8 weights as large as the others
MAX_ROTATIONS = 1024
_BLOCK = 1 << 22  # normals drawn afresh; an arena repeats them, which no cache can tell from new ones


class PoolFull(MemoryError):
    """A tensor would break the bound of the pool: `needed` and `bound` in bytes."""

    def __init__(self, needed: int, bound: int) -> None:
        self.needed = needed
        self.bound = bound
        super().__init__(f"needs {needed / 1e9:.2f} GB where {bound / 1e9:.2f} GB are to be used")


@dataclass(frozen=True)
class Device:
    """Where cases run. `cache_bytes` is the last-level cache that rotations must exceed, `capacity_bytes` the memory
    that a pool may take."""

    kind: str  # cpu | cuda
    index: int = 0
    threads: int = 1
    cache_bytes: int = DEFAULT_CACHE_BYTES
    capacity_bytes: int = 1 << 62

    @property
    def torch_device(self) -> Any:
        """`torch.device` of this device."""
        import torch

        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @classmethod
    def find(cls, kind: str, threads: int = 1, index: int = 0, fraction: float = 0.5) -> Device:
        """The device of this machine, to use `fraction` of its free memory. Raises ValueError where CUDA is missing."""
        if kind == "cpu":
            return cls("cpu", 0, threads, cache_bytes(), int(fraction * _free_host_bytes()))
        import torch

        if not torch.cuda.is_available():
            raise ValueError("the plan is for cuda and torch sees no CUDA device; use a plan for cpu")
        free, _ = torch.cuda.mem_get_info(index)
        l2 = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0) or DEFAULT_CACHE_BYTES
        return cls("cuda", index, threads, int(l2), int(fraction * free))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that the kernel reports for CPU 0, or 64 MiB where it says nothing."""
    found = []
    for path in sorted(root.glob("index*/size")):
        try:
            text = path.read_text().strip()
            found.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(found, default=DEFAULT_CACHE_BYTES)


def _free_host_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 4 << 30


@dataclass
class Prepared:
    """A case ready to run. `run(i)` does one call on rotation `i` (0 <= i < rotations) and may return anything.

    `bytes` and `flop` are the least that one call must move and compute, for refusing what cannot be.
    `clock` says what times it: `thread` (CPU time of one thread; wall where the plan has more), `wall`, `cuda`
    (events). `graph`: may be captured into a CUDA graph. `close` frees what the pool does not own.
    `timed`, where there is one, is used in place of `run` under any clock: it does one call on rotation `i` and
    returns its nanoseconds (a collective's slowest rank, a read after its blocks have left the cache). `note` says
    what the log must say beside the times. `follows`: in a step the same call has just run for the layer before, so a
    sample begins with an untimed one, however long it takes. `cool`: on a CPU, what has run before each call in a step
    has left nothing of it in the caches, code included; it is run, untimed, before every timed call.
    """

    run: Callable[[int], Any]
    rotations: int
    bytes: float
    flop: float
    clock: str
    graph: bool = False
    close: Callable[[], None] = lambda: None
    timed: Callable[[int], int] | None = None
    note: str = ""
    follows: bool = False
    cool: Callable[[], Any] | None = None


@dataclass
class Pool:
    """Tensors shared between cases, at most `device.capacity_bytes` in all."""

    device: Device
    used_bytes: int = 0
    _kept: dict[Hashable, tuple[Any, int]] = field(default_factory=dict)

    def get(self, key: Hashable, bytes_: int, make: Callable[[], T]) -> T:
        """What `make` returns, made once a key. Raises PoolFull where `bytes_` more would break the bound."""
        if key in self._kept:
            kept: T = self._kept[key][0]
            return kept
        if self.used_bytes + bytes_ > self.device.capacity_bytes:
            raise PoolFull(self.used_bytes + bytes_, self.device.capacity_bytes)
        made = make()
        self._kept[key] = (made, bytes_)
        self.used_bytes += bytes_
        return made

    def drop(self, key: Hashable) -> None:
        """Forget a tensor; its memory is freed once no case holds it."""
        if key in self._kept:
            self.used_bytes -= self._kept.pop(key)[1]

    def release(self) -> None:
        """Forget everything but the arenas."""
        for key in [key for key in self._kept if not (isinstance(key, tuple) and key[0] == "arena")]:
            self.drop(key)

    def arena(self, kind: str, dtype: Any, elements: int) -> Any:
        """At least `elements` random normal numbers of a torch dtype, flat, shared by all that ask for this kind.

        Kind `weight` has standard deviation 0.02, `input` 1; `scratch` holds what was last written. A larger request
        replaces the arena; reserve the largest first, so that it never happens. Raises PoolFull.
        """
        key = ("arena", kind, dtype)
        if key in self._kept and self._kept[key][0].numel() >= elements:
            return self._kept[key][0]
        self.drop(key)
        return self.get(key, elements * dtype.itemsize, lambda: self._normal(kind, dtype, elements))

    def rotate(self, dtype: Any, shapes: list[tuple[int, ...]]) -> list[list[Any]]:
        """Views of the weight arena: one list of tensors (one a shape) a rotation, on other memory each.

        As many sets as `rotations` says for the bytes of one. Raises PoolFull.
        """
        total = self.rotated_elements(dtype, shapes)
        flat = self.arena("weight", dtype, total)
        sets = total // _set_elements(shapes)
        out, at = [], 0
        for _ in range(sets):
            views = []
            for shape in shapes:
                views.append(flat[at : at + math.prod(shape)].view(shape))
                at += _padded(math.prod(shape))
            out.append(views)
        return out

    def rotated_elements(self, dtype: Any, shapes: list[tuple[int, ...]]) -> int:
        """Elements of the weight arena that `rotate` takes for these shapes."""
        elements = _set_elements(shapes)
        return elements * self.rotations(elements * dtype.itemsize)

    def rotations(self, call_bytes: float) -> int:
        """Calls of `call_bytes` each that read more than the cache keeps: 5x on CUDA, 2x on a CPU; from 1 to 1024."""
        beyond = (5 if self.device.kind == "cuda" else 2) * self.device.cache_bytes
        return max(1, min(MAX_ROTATIONS, math.ceil(beyond / max(1.0, call_bytes))))

    def _normal(self, kind: str, dtype: Any, elements: int) -> Any:
        import torch

        where = self.device.torch_device
        if kind == "scratch":
            return torch.zeros(elements, dtype=dtype, device=where)
        generator = torch.Generator(device=where).manual_seed(20_261_122)
        block = torch.randn(min(_BLOCK, elements), generator=generator, device=where)
        spread = 1.0 if kind == "input" else 0.02
        if dtype.itemsize == 1:  # e4m3: the whole of its range, as quantised weights use it
            spread, block = 1.0, (block * (0.02 / FP8_SCALE)).clamp(-448.0, 448.0)
        block = (block * spread).to(dtype)
        flat = torch.empty(elements, dtype=dtype, device=where)
        for at in range(0, elements, block.numel()):
            flat[at : at + block.numel()].copy_(block[: min(block.numel(), elements - at)])
        return flat


def torch_dtype(name: str) -> Any:
    """torch's dtype of a plan's; fp8 is e4m3."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[name]


def _set_elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(_padded(math.prod(shape)) for shape in shapes)


def _padded(elements: int) -> int:
    """Elements rounded up to 512, so that every view is aligned to at least 512 bytes."""
    return -(-elements // 512) * 512
