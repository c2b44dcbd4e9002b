"""Devices of one replica side by side: they meet at the end of every layer, and share the links of their node.

Tensor parallelism: every device holds its part of each expert, all drivers are told the same routes. Expert
parallelism: each driver holds its own experts (`held_LE`). Between two meetings each device goes its own way, at its
own clock; whoever is earliest goes on first, so nothing is ever asked of the links in their past.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesim.offload import StepRoutes
from moesim.offload.drive import Driver, LayerWork
from moesim.tiers import LinkRates
from moesim.tiers.device import SimDevice, Waits
from moesim.tiers.links import Links

__all__ = ["DeviceGroup", "rates_of_one"]


def rates_of_one(rates: LinkRates, devices: int) -> LinkRates:
    """Links of one of `devices` that do the same at the same time (tensor parallelism): what they share is divided, so
    one stands for all. Exact where the devices of each NUMA domain are as many as in any other; else it is the rate in
    the fullest one."""
    sharing = max(sum(i * rates.domains // devices == d for i in range(devices)) for d in range(rates.domains))
    return replace(rates, host=rates.host / sharing, nvme=rates.nvme / devices, domains=1)


class DeviceGroup:
    """Drives drivers of `SimDevice`s that share `Links`. Raises ValueError where they do not."""

    def __init__(self, drivers: Sequence[Driver], devices: Sequence[SimDevice]) -> None:
        """drivers: one for each device, in the same order."""
        if not devices or len(drivers) != len(devices):
            raise ValueError(f"{len(devices)} devices need as many drivers, got {len(drivers)}")
        if any(d.device is not one for d, one in zip(drivers, devices, strict=True)):
            raise ValueError("each driver has to drive the device at its place")
        self.drivers, self.devices = list(drivers), list(devices)
        self.links: Links = devices[0].links
        if any(one.links is not self.links for one in devices):
            raise ValueError("the devices of a group share their links")
        if len({one.index for one in devices}) != len(devices):
            raise ValueError("each device has its own place at the links")
        for one in devices:
            one.grouped = True

    @property
    def now_ns(self) -> int:
        """Where the last device's clock stands."""
        return max(one.now_ns for one in self.devices)

    def skip_to(self, at_ns: int) -> None:
        """See `SimDevice.skip_to`."""
        for one in self.devices:
            one.skip_to(at_ns)

    def step(self, steps: Sequence[StepRoutes]) -> None:
        """One forward pass: the routes that each device is told (the same ones under tensor parallelism; its own
        attention's tokens do not matter, its experts' do)."""
        start = self.now_ns
        self.skip_to(start)
        parts = [driver.layers(step) for driver, step in zip(self.drivers, steps, strict=True)]
        layers = self.drivers[0].context.num_layers
        for layer in range(layers):
            self._play([self._layer(i, parts[i]) for i in range(len(parts))])
            at = self.now_ns
            for one in self.devices:
                one.meet(layer, at)
        for part in parts:
            for _ in part:
                raise RuntimeError("the drivers of a group have different numbers of layers")
        at = self.now_ns
        for one in self.devices:
            one.wait_to(at)
        self.links.advance(max(at, self.links.now_ns))
        for one in self.devices:
            one.close()

    def _layer(self, index: int, part: Iterator[tuple[int, LayerWork | None]]) -> Waits:
        """A device's way through one layer, up to the meeting."""
        device = self.devices[index]
        layer, _ = next(part)
        yield from device.own_waits(layer)
        layer, work = next(part)
        assert work is not None
        yield from device.experts_waits(layer, work)

    def _play(self, ways: Sequence[Waits]) -> None:
        """Play the devices' ways, the earliest first (of equals the lower number), and the links between them."""
        links = self.links
        until: dict[int, int | None] = dict.fromkeys(range(len(ways)), links.now_ns)
        while until:
            timed = min((at for at in until.values() if at is not None), default=None)
            event = links.next_ns() if None in until.values() else None
            if timed is None and event is None:
                raise RuntimeError("the devices wait, and nothing is on its way")
            at = min(x for x in (timed, event) if x is not None)
            at = max(at, links.now_ns)
            links.advance(at)
            happened = event is not None and event <= at
            for index in list(until):
                want = until[index]
                if happened if want is None else want <= at:
                    try:
                        until[index] = next(ways[index])
                    except StopIteration:
                        del until[index]
