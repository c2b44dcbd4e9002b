"""Host memory as a cache of experts in front of the drives: places, the least recently used one leaves first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moesim.tiers.links import Transfer

__all__ = ["HostCache", "HostPlace", "Place", "live"]

Place = tuple[int, int, int]
"""(device, key, bytes of the copy): copies of other precision are other copies."""


def live(one: Transfer) -> bool:
    """It will still move bytes."""
    return not one.done and not one.cancelled


@dataclass(slots=True)
class HostPlace:
    """What fills it (None: filled before the start), and who copies from it."""

    size: int
    fill: Transfer | None
    users: list[Transfer] = field(default_factory=list)

    @property
    def free(self) -> bool:
        """Nobody fills it or copies from it."""
        self.users = [one for one in self.users if live(one)]
        return not self.users and (self.fill is None or not live(self.fill))


class HostCache:
    """Places within `capacity` bytes (None: any number). held: places that the CPU computes from."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.used = 0
        self.held: dict[Place, None] = {}
        self._places: dict[Place, HostPlace] = {}

    def get(self, place: Place) -> HostPlace | None:
        """What is at `place`, without using it."""
        return self._places.get(place)

    def touch(self, place: Place) -> HostPlace | None:
        """What is at `place`, which is the most recently used one from now on."""
        found = self._places.pop(place, None)
        if found is not None:
            self._places[place] = found
        return found

    def add(self, place: Place, fill: Transfer | None) -> HostPlace:
        """Take `place`, for which `make_room` has made room."""
        found = self._places[place] = HostPlace(place[2], fill)
        self.used += place[2]
        return found

    def forget(self, place: Place) -> None:
        """Its bytes are free."""
        self.used -= self._places.pop(place).size

    def make_room(self, size: int) -> bool:
        """The least recently used ones leave: as many as are needed, or nobody where that is not enough."""
        short = 0 if self.capacity is None else self.used + size - self.capacity
        leaving = []
        for place, found in self._places.items():
            if short <= 0:
                break
            if place not in self.held and found.free:
                leaving.append(place)
                short -= found.size
        if short > 0:
            return False
        for place in leaving:
            self.forget(place)
        return True

    def fill(self, places: Iterable[Place]) -> None:
        """Start with these, best first, as far as they fit."""
        left, fitting = self.capacity, []
        for place in places:
            if left is None or place[2] <= left:
                left = None if left is None else left - place[2]
                fitting.append(place)
        for place in reversed(fitting):
            self.add(place, None)

    def drop(self, device: int, keys: list[int]) -> None:
        """Forget the copies of these keys of a device, where nobody uses them."""
        for place in [one for one in self._places if one[0] == device and one[1] in keys]:
            if place not in self.held and self._places[place].free:
                self.forget(place)

    def _check(self) -> None:
        """Invariants: bytes are accounted for and fit; nothing counts on a transfer that was given up."""
        assert self.used == sum(found.size for found in self._places.values())
        assert self.capacity is None or self.used <= self.capacity
        assert all(place[2] == found.size for place, found in self._places.items())
        assert all(found.fill is None or not found.fill.cancelled for found in self._places.values())
        assert all(place in self._places for place in self.held)
