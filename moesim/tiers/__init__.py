"""Memory tiers in time: links that carry one transfer after another, who is where, and a step of layers over them.

`links` and `store` know bytes and nanoseconds, `device.SimDevice` is what `moesim.offload.drive.Driver` tells what to
move and to compute. All times are integer nanoseconds. No event loop is needed: a device's clock moves forward layer by
layer, and links are played up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["LayerTimes", "LinkRates"]


class LayerTimes(Protocol):
    """What a device's operations take, ns, in the step whose routes `begin` told."""

    def begin(self, tokens: int) -> None:
        """A step of so many tokens starts."""
        ...

    def own_ns(self, layer: int) -> int:
        """Everything between the experts of the layer before and the look-up of `layer`; for the first layer also what
        comes before all layers."""
        ...

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """One grouped product over experts with so many rows each."""
        ...

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """Experts with so many rows each on the CPU, all cores, `sync_ns` apart."""
        ...

    def sync_ns(self, layer: int) -> int:
        """Once a layer that has any expert on the CPU."""
        ...

    def join_ns(self, layer: int) -> int:
        """After the experts (ranks meet, results are added)."""
        ...

    def end_ns(self) -> int:
        """After the last layer: final norm, head, sampling, host overhead."""
        ...


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Links of a node towards its devices. Rates in bytes a ns, one direction; latency ns a transfer.

    to_device: each device's own. host: all of one NUMA domain's devices together (memory rate that copies get).
    nvme: the node's drives, all together. domains: NUMA domains. chunk_bytes: see `TiersSpec.chunk`; 0: none.
    """

    to_device: float
    host: float
    nvme: float
    to_device_latency_ns: int = 0
    nvme_latency_ns: int = 0
    domains: int = 1
    chunk_bytes: int = 0
