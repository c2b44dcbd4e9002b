"""Who is where on one node: rooms and staging buffers of each device, host memory, NVMe; and the ways between them.

An expert's room on a device is empty, waits for its transfer, is being filled, is full, or is computed with; so is a
staging buffer, and a place in host memory. The state is read off the transfer, so it cannot disagree with the links.

Three kinds of home:
- `dram`, with copies: host memory has every expert. What leaves a device is dropped, or written back on request.
- `dram`, without copies: an expert is on a device or in host memory. A load is a swap: it goes into a spare buffer, and
  who left for it travels into the place in host memory that the load has left. Then its room is the spare buffer.
- `nvme`: drives have every expert; host memory is a cache in front of them, least recently used first out. Each load
  passes through it (store and forward, an expert at a time), or, without room there, through a bounce buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesim.arrays import IntArray
from moesim.errors import Infeasible
from moesim.tiers.host import HostCache, HostPlace, live
from moesim.tiers.links import NVME, TO_DEVICE, TO_HOST, Links, Transfer

__all__ = ["STATES", "Home", "State", "TierStore"]

State = Literal["absent", "queued", "in flight", "present", "in use"]
STATES: tuple[State, ...] = ("absent", "queued", "in flight", "present", "in use")


@dataclass(frozen=True, slots=True)
class Home:
    """Where experts are besides the device.

    tier: `dram` or `nvme` holds every expert. dram_bytes: host memory for experts; None: as much as it takes.
    copies: host memory keeps what is on a device, too. bounce: with `nvme`, host buffers of a device, one expert each,
    for what finds no room in host memory's cache (two: one is filled while the other is emptied).
    """

    tier: Literal["dram", "nvme"] = "dram"
    dram_bytes: int | None = None
    copies: bool = True
    bounce: int = 2


class _Leaving(NamedTuple):
    """A written-back expert: its transfer to the host, and the one that was still bringing it when it was evicted."""

    key: int
    back: Transfer
    way: Transfer | None


class _Victim(NamedTuple):
    """Evicted, and there is no place in host memory for it yet."""

    key: int
    way: Transfer | None


class _Rooms:
    """What a device's memory holds. rooms: keys that have one. way: those that are not known to be filled yet."""

    def __init__(self, size_K: IntArray, capacity: int | None) -> None:
        self.size: list[int] = size_K.tolist()
        self.capacity = capacity
        self.used = 0
        self.rooms: dict[int, None] = {}
        self.way: dict[int, Transfer] = {}
        self.using: frozenset[int] = frozenset()
        self.streams: list[tuple[int, Transfer]] = []
        self.leaving: list[_Leaving] = []
        self.victims: deque[_Victim] = deque()
        self.kept: dict[int, Transfer | None] = {}
        """loaded again before they found a place in host memory, so their bytes have never left; what brought them"""
        self.promises: deque[tuple[Transfer | None, int]] = deque()
        """(load, bytes) of host memory that loads leave when they end, and nobody has been sent to; None: free now"""
        self.bounced: list[tuple[Transfer, Transfer]] = []
        """(read, who empties the buffer) through bounce buffers, oldest first"""


class TierStore:
    """See the module. D devices, K keys. All calls happen at the links' present time."""

    def __init__(
        self,
        links: Links,
        size_DK: Sequence[IntArray],
        home: Home | None = None,
        staging: int = 2,
        device_bytes: Sequence[int | None] | None = None,
        on_host: bool = False,
        duplex: bool = True,
    ) -> None:
        """size_DK: bytes of each expert by device (its part of it). staging: buffers of each device. device_bytes: for
        fixed experts and caches; None: not limited here (the cache keeps its own account). on_host: devices compute
        from host memory, loads come from NVMe straight into their rooms. duplex: see `DeviceOptions`.

        Raises Infeasible where host memory cannot be the home of what it must hold.
        """
        self.links, self.home, self.staging = links, home if home is not None else Home(), staging
        limits = [None] * len(size_DK) if device_bytes is None else device_bytes
        self._devices = [_Rooms(size, limit) for size, limit in zip(size_DK, limits, strict=True)]
        if len(self._devices) != links.devices:
            raise ValueError(f"{links.devices} devices hang on the links, sizes are of {len(self._devices)}")
        self.on_host, self.duplex = on_host, duplex
        if staging < 1 or self.home.bounce < 1:
            raise ValueError("at least one staging and one bounce buffer are needed")
        self._swaps = self.home.tier == "dram" and not self.home.copies and not on_host
        self._cached = self.home.tier == "nvme" and not on_host
        self._straight = not (on_host or self._swaps or self._cached)
        """a load is one copy out of host memory, which loses nothing by it"""
        self._dram = HostCache(self.home.dram_bytes)
        """with NVMe as home"""
        if self.home.tier == "dram" and self.home.copies and not on_host:
            self._require(sum(sum(one.size) for one in self._devices))

    # -- set-up -------------------------------------------------------------------------------------------------
    def place(self, device: int, keys: Iterable[int]) -> None:
        """These are on the device when serving starts. Raises ValueError where they do not fit."""
        rooms = self._devices[device]
        for key in keys:
            self._take_room(rooms, key)

    def start(self, warm: Iterable[tuple[int, int]] = ()) -> None:
        """All devices have been filled; warm: (device, key), best first, that host memory's cache starts with, as far
        as they fit. Raises Infeasible where the rest does not fit into host memory."""
        if self._swaps:
            used = self.dram_bytes()
            self._require(used)
            if self.home.dram_bytes is not None:
                spare = (self.home.dram_bytes - used) // len(self._devices)
                for rooms in self._devices:
                    rooms.promises.append((None, spare))
        if self._cached:
            self._dram.fill((device, key, self._devices[device].size[key]) for device, key in warm)

    def _require(self, used: int) -> None:
        if self.home.dram_bytes is not None and used > self.home.dram_bytes:
            raise Infeasible(
                [
                    f"Experts need {used:,} bytes of host memory, {self.home.dram_bytes:,} are there for them. Set "
                    "tiers.home to nvme, or give them more memory (tiers.dram)."
                ],
                used / max(self.home.dram_bytes, 1) - 1,
            )

    # -- what is where ------------------------------------------------------------------------------------------
    @property
    def all_in_dram(self) -> bool:
        """The CPU finds every expert in host memory."""
        return not self._cached

    def way(self, device: int) -> dict[int, Transfer]:
        """Transfers into rooms by key, those that have ended since the last `settle` included. Not to be changed."""
        return self._devices[device].way

    def buffers_free(self, device: int) -> int:
        """Staging buffers that neither a streamed nor a leaving expert has."""
        rooms = self._devices[device]
        if rooms.leaving:
            rooms.leaving = [one for one in rooms.leaving if not one.back.done]
        return self.staging - len(rooms.streams) - len(rooms.leaving)

    def device_state(self, device: int, key: int) -> State:
        """Of its room."""
        rooms = self._devices[device]
        if key not in rooms.rooms:
            return "absent"
        way = rooms.way.get(key)
        if way is not None and not way.done:
            return "in flight" if way.started else "queued"
        return "in use" if key in rooms.using else "present"

    def staging_state(self, device: int, key: int) -> State:
        """Of its staging buffer: streamed through it, or leaving from it (in flight until it has left)."""
        rooms = self._devices[device]
        for one, way in rooms.streams:
            if one == key:
                return "in use" if way.done else "in flight" if way.started else "queued"
        for left in rooms.leaving:
            if left.key == key and not left.back.done:
                return "in flight" if left.back.started else "queued"
        return "queued" if any(one.key == key for one in rooms.victims) else "absent"

    def dram_state(self, device: int, key: int) -> State:
        """Of the copy in host memory that a load of the expert as stored would read."""
        if self.home.tier == "nvme":
            entry = self._dram.get((device, key, self._devices[device].size[key]))
            if entry is None:
                return "absent"
            if entry.fill is not None and not entry.fill.done:
                return "in flight" if entry.fill.started else "queued"
            return "present" if entry.free else "in use"
        return "absent" if self._swaps and not self._at_home(self._devices[device], key) else "present"

    def _at_home(self, rooms: _Rooms, key: int) -> bool:
        """Without copies: whether its bytes take room in host memory."""
        for left in rooms.leaving:
            if left.key == key and not left.back.done:
                return left.back.started or (left.way is not None and not left.way.done)
        for victim in rooms.victims:
            if victim.key == key:
                return victim.way is not None and not victim.way.done
        way = rooms.kept[key] if key in rooms.kept else rooms.way.get(key)
        return key not in rooms.rooms or (way is not None and not way.done)

    def device_bytes(self, device: int) -> int:
        """Taken by rooms, buffers apart."""
        return self._devices[device].used

    def dram_bytes(self) -> int:
        """Of experts in host memory, bounce buffers apart."""
        if self.home.tier == "nvme":
            return self._dram.used
        if not self._swaps:
            return 0 if self.on_host else sum(sum(one.size) for one in self._devices)
        return sum(size for rooms in self._devices for key, size in enumerate(rooms.size) if self._at_home(rooms, key))

    # -- moving -------------------------------------------------------------------------------------------------
    def settle(self, device: int) -> list[int]:
        """Keys whose rooms have been filled since the last call, in that order."""
        ended = self.links.ended[device]
        if not ended:
            return []
        rooms, out = self._devices[device], []
        for one in ended:
            if rooms.way.get(one.key) is one:
                del rooms.way[one.key]
                rooms.kept.pop(one.key, None)
                out.append(one.key)
        ended.clear()
        if out and self._cached and not self.home.copies:
            self._dram.drop(device, out)
        return out

    def load(self, device: int, key: int, size_bytes: int, urgent: bool, reason: str) -> Transfer:
        """Bring a copy of so many bytes into a room for `key`. Raises ValueError where it has one, or there is none."""
        rooms = self._devices[device]
        self._take_room(rooms, key)
        if self._straight and not rooms.leaving:
            one = rooms.way[key] = self.links.ask(3 * device + TO_DEVICE, size_bytes, urgent, reason, key)
            return one
        wait = self._spare_buffer(rooms, key)
        one = rooms.way[key] = self._from_home(device, key, size_bytes, urgent, reason, wait)
        if self._swaps:
            if size_bytes != rooms.size[key]:
                raise Infeasible(["Without host copies an expert cannot be fetched in fewer bits: the rest were lost."])
            if key not in rooms.kept:
                rooms.promises.append((one, size_bytes))
            self._send_back(device, rooms)
        return one

    def stream(self, device: int, key: int, size_bytes: int) -> Transfer:
        """Bring a copy into a staging buffer, until `release`. Raises ValueError where none is free."""
        if self.buffers_free(device) < 1:
            raise ValueError("no staging buffer is free")
        one = self._from_home(device, key, size_bytes, True, "stream", ())
        self._devices[device].streams.append((key, one))
        return one

    def release(self, device: int, one: Transfer) -> None:
        """A streamed expert has computed: its buffer is free. Raises ValueError where it is not streamed."""
        rooms = self._devices[device]
        kept = [(key, way) for key, way in rooms.streams if way is not one]
        if len(kept) == len(rooms.streams) or not one.done:
            raise ValueError("the transfer has no staging buffer, or has not ended")
        rooms.streams = kept

    def page(self, device: int, size_bytes: int) -> Transfer:
        """Bring a layer's weights into a page buffer, whose bytes whoever asks accounts for."""
        return self._from_home(device, -1, size_bytes, False, "page", ())

    def use(self, device: int, keys: Iterable[int]) -> None:
        """These compute until the next call. Raises ValueError for one without a room."""
        rooms = self._devices[device]
        rooms.using = frozenset(keys)
        if rooms.capacity is not None and not rooms.using <= rooms.rooms.keys():
            raise ValueError("an expert without a room cannot compute")

    def cancel(self, device: int, key: int) -> bool:
        """Give up the load of a key that has not started; its room is free then. False: it has, or others count on
        it."""
        rooms = self._devices[device]
        one = rooms.way.get(key)
        if one is None or self._swaps or not self._drop(device, one):
            return False
        self._free_room(rooms, key)
        return True

    def evict(self, device: int, key: int, write_back: bool) -> None:
        """Free a key's room; a load on its way is void. write_back: what is there travels to host memory; without host
        copies it does in any case. Raises ValueError for a key that has no room (where the device's bytes are limited;
        else it is taken as one that was there from the start), or that computes."""
        rooms = self._devices[device]
        if (key not in rooms.rooms and rooms.capacity is not None) or key in rooms.using:
            raise ValueError(f"expert {key} has no room on device {device}, or computes")
        way = rooms.way.get(key)
        if way is None and self._straight and not write_back:
            self._free_room(rooms, key)
            return
        way = None if way is None or way.done else way
        before = rooms.kept.get(key, way)
        self._free_room(rooms, key)
        if self._swaps:
            rooms.victims.append(_Victim(key, before))
            self._send_back(device, rooms)
        elif way is not None:
            if not self._drop(device, way) and all(one is not way for _, one in rooms.bounced):
                self.links.stop(way)
        elif write_back:
            self._write_back(device, rooms, key)

    def need_in_dram(self, device: int, key: int) -> Transfer | None:
        """The CPU wants to read an expert: what brings it into host memory, or None where it is there."""
        if not self._cached:
            return None
        size = self._devices[device].size[key]
        place = (device, key, size)
        found = self._dram.touch(place)
        if found is None:
            read, found = self._read(device, key, size, True, "demand")
            if found is None:
                self._devices[device].bounced.append((read, read))
                return read
        self._dram.held[place] = None
        if found.fill is None or found.fill.done:
            return None
        self.links.hurry(found.fill)
        return found.fill

    def cpu_done(self, device: int) -> None:
        """The CPU does not read any more what it needed for this device."""
        if self._dram.held:
            for place in [one for one in self._dram.held if one[0] == device]:
                del self._dram.held[place]

    # -- rooms and buffers --------------------------------------------------------------------------------------
    def _take_room(self, rooms: _Rooms, key: int) -> None:
        used = rooms.used + rooms.size[key]
        if key in rooms.rooms or (rooms.capacity is not None and used > rooms.capacity):
            raise ValueError(f"expert {key} has a room, or there is none for it: {used} of {rooms.capacity} bytes")
        rooms.used = used
        rooms.rooms[key] = None

    def _free_room(self, rooms: _Rooms, key: int) -> None:
        rooms.way.pop(key, None)
        rooms.kept.pop(key, None)
        if key in rooms.rooms:
            del rooms.rooms[key]
            rooms.used -= rooms.size[key]

    def _spare_buffer(self, rooms: _Rooms, key: int) -> list[Transfer]:
        """What a load has to wait for besides its bytes: where write-backs hold all spare buffers, the one whose end
        frees it one; and its own way back."""
        if rooms.leaving:
            rooms.leaving = [one for one in rooms.leaving if not one.back.done]
        if not self._swaps:
            beyond = len(rooms.leaving) - self.staging
            return [rooms.leaving[beyond - 1].back] if beyond > 0 else []
        for victim in [one for one in rooms.victims if one.key == key]:
            rooms.victims.remove(victim)
            rooms.kept[key] = victim.way
        wait = [one.back for one in rooms.leaving if one.key == key]
        beyond = len(rooms.leaving) - self.staging + 1
        if rooms.victims and beyond > 0:
            wait.append(rooms.leaving[beyond - 1].back)
        return wait

    def _send_back(self, device: int, rooms: _Rooms) -> None:
        """Without copies: who was evicted travels into what loads leave, in order, as far as that is enough."""
        while rooms.victims:
            victim = rooms.victims[0]
            size = rooms.size[victim.key]
            if sum(room for _, room in rooms.promises) < size:
                return
            after = [] if victim.way is None else [victim.way]
            left = size
            while left:
                load, room = rooms.promises.popleft()
                if room > left:
                    rooms.promises.appendleft((load, room - left))
                left -= min(room, left)
                after += [] if load is None else [load]
            rooms.victims.popleft()
            back = self.links.ask(self._back_lane(device), size, True, "write_back", after=after)
            rooms.leaving.append(_Leaving(victim.key, back, victim.way))

    def _back_lane(self, device: int) -> int:
        return 3 * device + (TO_HOST if self.duplex else TO_DEVICE)

    def _write_back(self, device: int, rooms: _Rooms, key: int) -> None:
        """With copies, or with NVMe as home: into its place in host memory, if it has one or can get one."""
        if self.on_host:
            raise ValueError("a device in host memory has nowhere to write back to")
        size, place = rooms.size[key], (device, key, rooms.size[key])
        if self._cached and (self._dram.get(place) is not None or not self._dram.make_room(size)):
            return
        back = self.links.ask(self._back_lane(device), size, True, "write_back")
        rooms.leaving.append(_Leaving(key, back, None))
        if self._cached:
            self._dram.add(place, back)

    # -- ways ---------------------------------------------------------------------------------------------------
    def _from_home(
        self, device: int, key: int, size: int, urgent: bool, reason: str, wait: Sequence[Transfer]
    ) -> Transfer:
        """The transfer at whose end the bytes are on the device."""
        ask, lane = self.links.ask, 3 * device + TO_DEVICE
        if self.on_host:
            return ask(3 * device + NVME, size, urgent, reason, key, wait)
        if not self._cached:
            return ask(lane, size, urgent, reason, key, wait)
        place = (device, key, size)
        found = self._dram.touch(place)
        if found is not None:
            fill = [] if found.fill is None else [found.fill]
            if urgent and fill:
                self.links.hurry(fill[0])
            one = ask(lane, size, urgent, reason, key, [*fill, *wait])
            found.users.append(one)
            return one
        read, found = self._read(device, key, size, urgent, reason)
        one = ask(lane, size, urgent, reason, key, [read, *wait])
        if found is not None:
            found.users.append(one)
        else:
            self._devices[device].bounced.append((read, one))
        return one

    def _read(self, device: int, key: int, size: int, urgent: bool, reason: str) -> tuple[Transfer, HostPlace | None]:
        """From NVMe into a place of host memory's cache, or, where there is none, through a bounce buffer (None)."""
        lane = 3 * device + NVME
        if key >= 0 and self._dram.make_room(size):
            read = self.links.ask(lane, size, urgent, reason, key)
            return read, self._dram.add((device, key, size), read)
        rooms = self._devices[device]
        rooms.bounced = [pair for pair in rooms.bounced if live(pair[0]) or live(pair[1])]
        beyond = len(rooms.bounced) - self.home.bounce + 1
        wait = [rooms.bounced[beyond - 1][1]] if beyond > 0 else []
        if urgent and wait:
            self.links.hurry(wait[0])
        return self.links.ask(lane, size, urgent, reason, key, wait), None

    def _drop(self, device: int, one: Transfer) -> bool:
        """Give up a load that has not started, and the read behind it where that has not and nobody else wants it."""
        rooms = self._devices[device]
        bounced = any(way is one for _, way in rooms.bounced)
        reads = [other for other in one.after if other.lane % 3 == NVME]
        if bounced and not all(not other.started for other in reads):
            return False
        if bounced and not reads:  # it has been read, and holds its buffer
            return False
        if one.started or one.done:
            return False
        for read in reads:
            if read.followers == [one] and self.links.cancel(read) and not bounced:
                self._dram.forget((device, one.key, one.size_bytes))
        return self.links.cancel(one)

    # -- invariants ---------------------------------------------------------------------------------------------
    def _check(self) -> None:
        """Nothing has two states in a tier, every byte is accounted for, and no capacity exceeded."""
        for number, rooms in enumerate(self._devices):
            assert rooms.used == sum(rooms.size[key] for key in rooms.rooms)
            assert rooms.capacity is None or rooms.used <= rooms.capacity
            assert rooms.way.keys() <= rooms.rooms.keys()
            assert not any(one.cancelled for one in rooms.way.values())
            assert len(rooms.streams) <= self.staging
            self._check_buffers(rooms)
            for key in range(len(rooms.size)):
                places = [self.device_state(number, key), self.dram_state(number, key)]
                assert all(place in STATES for place in places)
                if self.home.tier == "dram" and not self.on_host:  # somebody has it
                    held = key in rooms.kept or places[0] in ("present", "in use") or places[1] != "absent"
                    assert held or self.staging_state(number, key) != "absent"
        self._dram._check()
        assert self.home.dram_bytes is None or self.dram_bytes() <= self.home.dram_bytes

    def _check_buffers(self, rooms: _Rooms) -> None:
        """What is under way has a buffer, and bytes are where they are taken from."""
        leaving = [one for one in rooms.leaving if not one.back.done]
        for one in leaving:  # it has come before it leaves, and has left before it comes again
            assert not one.back.started or one.way is None or one.way.done or one.way.cancelled
            again = rooms.way.get(one.key)
            assert not self._swaps or again is None or not again.started
        if rooms.capacity is not None:
            ways = rooms.way
            held = sum(rooms.size[key] for key in rooms.rooms if key not in ways or ways[key].started)
            evicted = [(one.key, one.way) for one in leaving] + [(one.key, one.way) for one in rooms.victims]
            gone = [key for key, way in evicted if way is None or way.started]
            held += sum(rooms.size[key] for key in gone)
            # a large one finds a place only when several small ones have come: it needs a buffer meanwhile
            more = self._swaps and min(rooms.size) != max(rooms.size)
            assert held <= rooms.capacity + (self.staging + more) * max(rooms.size)
        reads = [(read, way) for read, way in rooms.bounced if read.started and (live(read) or live(way))]
        assert len(reads) <= self.home.bounce
