"""The `tiers` block of a scenario: how much of each memory experts get, and how they travel between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.spec import Spec
from moesim.units import GBPerS, GiB, Us

__all__ = ["CpuSpec", "TiersSpec"]


class CpuSpec(Spec):
    """Experts computed on the host's CPU.

    gb_per_s: rate at which the cores read weights, all cores of all NUMA domains together; None: the node's memory
    rate. tflops: their peak on activations of a few rows. profile: a calibrated CPU profile whose `moe` curves price
    the experts instead (its rates scaled by cores over its own). cores: None: all of the node's; fewer than that get
    their share of gb_per_s and tflops. sync_us: what a layer pays, once, for having any expert there: activations down,
    results up, two hand-overs between host and device. numa_domains: the cores and the memory come in so many equal
    parts. numa_split: whether each expert's weights are divided over them (all domains read each expert), or each
    expert lies in one (its domain alone reads it).
    """

    gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)] | None = None
    tflops: Annotated[float, Field(gt=0, le=1e5)] = 2.0
    profile: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    cores: Annotated[int, Field(ge=1, le=100_000)] | None = None
    sync_us: Annotated[Us, Field(le=1e6)] = 40.0
    numa_domains: Annotated[int, Field(ge=1, le=64)] = 1
    numa_split: bool = True

    @model_validator(mode="after")
    def _one_price(self) -> CpuSpec:
        if self.profile is not None and self.gb_per_s is not None:
            raise ValueError("a profile says what experts take on the CPU, and gb_per_s says it, too; remove one")
        return self


class TiersSpec(Spec):
    """Memory tiers of one node for experts that do not stay on the device.

    vram: device memory that may be used, instead of engine.gpu_memory_utilization of it. experts: device memory for
    experts on each rank (fixed ones and caches; staging buffers apart), or `rest`: what kv_tokens leaves.
    kv_tokens: KV cache to keep room for when experts get the rest; with `experts` given KV gets the rest.
    home: the tier that holds every expert. dram: host memory of the node for experts, None: all the node has; with home
    `nvme` it is a cache (least recently used) in front of it. host_copies: experts on the device have a copy in host
    memory, too (as most systems do), else only what is not on the device has room there: a load is a swap (with home
    `nvme`: it leaves host memory's cache). staging: buffers on the
    device, of one expert each, that streamed experts pass through. pinned: host memory is page-locked; else a transfer
    passes through a bounce buffer and gets half the link's rate. chunk: transfers are cut into pieces of so many bytes,
    between which an urgent one may go first; None: a transfer that has started ends. numa_domains: host memory comes in
    so many parts of equal rate, and ranks are dealt out to them in order. pooled, miss, cold, completion: see
    `moesim.offload.CacheSemantics`. fit_share: the first sequences of the routing pool, this share of them, are what
    policies may learn from (popularity, tables of transitions), and requests take the others; 0: they know nothing. A
    `placement_from` of the scenario stands before it.
    """

    vram: Annotated[GiB, Field(gt=0, le=1e6)] | None = None
    experts: Annotated[GiB, Field(ge=0, le=1e6)] | Literal["rest"] = "rest"
    kv_tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    home: Literal["dram", "nvme"] = "dram"
    dram: Annotated[GiB, Field(gt=0, le=1e7)] | None = None
    host_copies: bool = True
    staging: Annotated[int, Field(ge=1, le=4096)] = 2
    pinned: bool = True
    chunk: Annotated[int, Field(ge=4096, le=1 << 40)] | None = None
    numa_domains: Annotated[int, Field(ge=1, le=64)] = 1
    cpu: CpuSpec = Field(default_factory=CpuSpec)
    pooled: bool = False
    miss: Literal["evict", "bypass"] = "evict"
    cold: Literal["miss", "hit"] = "miss"
    completion: Literal["raced", "logical"] = "raced"
    fit_share: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _one_of_them(self) -> TiersSpec:
        if self.experts != "rest" and self.kv_tokens is not None:
            raise ValueError("experts and kv_tokens are both given; one of them gets what the other leaves, remove one")
        return self
