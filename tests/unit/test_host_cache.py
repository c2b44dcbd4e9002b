"""Host memory in front of the drives, place by place: cases worked by hand."""

from __future__ import annotations

import numpy as np

from moesim.tiers import LinkRates
from moesim.tiers.host import HostCache
from moesim.tiers.links import NVME, TO_DEVICE, Links
from moesim.tiers.store import Home, TierStore


def places(cache: HostCache, *keys: int) -> list[bool]:
    return [cache.get((0, key, 10)) is not None for key in keys]


def filled(*keys: int, capacity: int = 30) -> HostCache:
    """Best first."""
    cache = HostCache(capacity)
    cache.fill((0, key, 10) for key in keys)
    cache._check()
    return cache


def test_the_least_recently_used_ones_leave_as_many_as_are_needed():
    cache = filled(1, 2, 3, 4)
    assert places(cache, 1, 2, 3, 4) == [True, True, True, False]  # the last one did not fit
    cache.touch((0, 3, 10))
    assert cache.make_room(15)
    assert places(cache, 1, 2, 3) == [False, False, True]
    cache._check()


def test_all_or_nobody():
    cache = filled(1, 2)
    assert not cache.make_room(31)
    assert cache.make_room(10)
    assert places(cache, 1, 2) == [True, True]


def test_who_is_read_by_the_cpu_or_copied_from_stays():
    links = Links(LinkRates(1.0, 1.0, 1.0))
    cache = filled(1, 2, 3)
    cache.held[0, 3, 10] = None  # the least recent one of them
    copy = links.ask(TO_DEVICE, 10, True, "demand")
    cache.get((0, 2, 10)).users.append(copy)
    assert not cache.make_room(20)
    assert cache.make_room(10)
    assert places(cache, 1, 2, 3) == [False, True, True]
    links.drain()
    cache.held.clear()
    assert cache.make_room(30)
    assert places(cache, 1, 2, 3) == [False, False, False]
    cache._check()


def test_what_is_still_read_from_the_drives_stays():
    links = Links(LinkRates(1.0, 1.0, 1.0))
    cache = HostCache(10)
    read = links.ask(NVME, 10, True, "demand")
    assert cache.make_room(10)
    cache.add((0, 1, 10), read)
    assert not cache.make_room(10)
    links.drain()
    assert cache.make_room(10)


def test_a_store_keeps_what_the_cpu_asked_for_until_it_has_computed():
    links = Links(LinkRates(1.0, 2.0, 1.0))
    store = TierStore(links, [np.full(4, 10)], Home("nvme", dram_bytes=20))
    store.start([(0, 0), (0, 1)])
    assert store.need_in_dram(0, 1) is None
    assert store.need_in_dram(0, 0) is None
    through = store.need_in_dram(0, 2)  # no place is free: through a bounce buffer
    links.finish_ns(through)
    assert [store.dram_state(0, key) for key in range(3)] == ["present", "present", "absent"]
    store.cpu_done(0)
    links.finish_ns(store.need_in_dram(0, 3))
    assert [store.dram_state(0, key) for key in range(4)] == ["present", "absent", "absent", "present"]
    store._check()
