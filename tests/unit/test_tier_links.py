"""Copy links against timelines worked out by hand, and against a fluid played in fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from moesim.tiers import LinkRates
from moesim.tiers.links import NVME, REASONS, TO_DEVICE, TO_HOST, Links, Transfer


def links(devices: int = 1, **changes: float) -> Links:
    rates: dict[str, float] = {"to_device": 24.0, "host": 1000.0, "nvme": 6.0, **changes}
    return Links(LinkRates(**rates), devices)  # type: ignore[arg-type]


def ask(on: Links, size: int, at: int | None = None, urgent: bool = True, lane: int = 0, **more: object) -> Transfer:
    if at is not None:
        on.advance(at)
    return on.ask(lane, size, urgent, "demand" if urgent else "prefetch", **more)  # type: ignore[arg-type]


def test_one_after_the_other_each_with_its_latency():
    on = links(to_device_latency_ns=10)
    first, second = ask(on, 2400, 5), ask(on, 1200)
    assert on.finish_ns(second) == 5 + 10 + 100 + 10 + 50
    assert (first.started_ns, first.done_ns, second.started_ns) == (5, 115, 115)
    assert on.busy_ns_X().tolist() == [170, 0, 0]


def test_an_end_is_rounded_up():
    on = links()
    assert on.finish_ns(ask(on, 25)) == 2
    assert on.finish_ns(ask(on, 24)) == 3


def test_urgent_ones_first_then_first_come():
    on = links()
    order = [ask(on, 240, urgent=u) for u in (False, False, True, False, True)]
    on.drain()
    assert [one.done_ns for one in order] == [10, 40, 20, 50, 30]  # the first had started


def test_a_hurried_one_goes_behind_those_that_were_urgent_before():
    on = links()
    running, late, urgent = ask(on, 240), ask(on, 240, urgent=False), ask(on, 240)
    on.hurry(late)
    after = ask(on, 240)
    on.drain()
    assert [one.done_ns for one in (running, urgent, late, after)] == [10, 20, 30, 40]


def test_only_what_has_not_started_can_be_cancelled():
    on = links()
    running, queued, behind = ask(on, 240), ask(on, 240), ask(on, 240)
    assert not on.cancel(running)
    assert on.cancel(queued)
    assert not on.cancel(queued)
    on.drain()
    assert behind.done_ns == 20
    assert queued.done_ns == -1
    assert on.cancelled_XR().sum() == 240
    with pytest.raises(ValueError, match="cancelled"):
        on.finish_ns(queued)


def test_a_transfer_in_chunks_makes_way_and_goes_on():
    on = links(to_device=1.0, chunk_bytes=250)
    slow = ask(on, 1000, urgent=False)
    urgent = ask(on, 100, 100)
    on.drain()
    assert (urgent.started_ns, urgent.done_ns, slow.done_ns) == (250, 350, 1100)


def test_every_chunk_pays_the_latency():
    on = links(to_device=1.0, chunk_bytes=400, to_device_latency_ns=7)
    assert on.finish_ns(ask(on, 1000)) == 3 * 7 + 1000


def test_a_hurried_transfer_is_not_preempted():
    on = links(to_device=1.0, chunk_bytes=250)
    slow = ask(on, 1000, urgent=False)
    on.advance(100)
    on.hurry(slow)
    urgent = ask(on, 100)
    on.drain()
    assert (slow.done_ns, urgent.done_ns) == (1000, 1100)


def test_what_nobody_wants_stops_at_the_end_of_its_chunk():
    on = links(to_device=1.0, chunk_bytes=250)
    void, behind = ask(on, 1000, urgent=False), ask(on, 100, urgent=False)
    on.advance(300)
    on.stop(void)
    on.drain()
    assert behind.done_ns == 600
    assert (on.moved_XR()[0, 1], on.cancelled_XR()[0, 1]) == (600, 500)
    on._check()


def test_devices_of_a_domain_share_its_memory():
    """24 B/ns each, 30 together: alone until 50 (1,200 B), both at 15 until the second's 600 B are there at 90, alone
    again for the last 600 B."""
    on = links(2, host=30.0)
    first, second = ask(on, 2400), ask(on, 600, 50, lane=3 + TO_DEVICE)
    on.drain()
    assert (second.done_ns, first.done_ns) == (90, 115)


def test_another_domain_does_not_share():
    on = links(2, host=30.0, domains=2)
    first, second = ask(on, 2400), ask(on, 600, 50, lane=3 + TO_DEVICE)
    on.drain()
    assert (first.done_ns, second.done_ns) == (100, 75)


def test_both_directions_run_at_once_and_share_the_memory():
    on = links(host=30.0)
    down, up = ask(on, 1500), ask(on, 1500, lane=TO_HOST)
    on.drain()
    assert (down.done_ns, up.done_ns) == (100, 100)


def test_latency_takes_nothing_of_what_is_shared():
    """The second holds its lane from 10 on, but bytes flow from 60 on: the first has the memory alone until then."""
    on = links(2, host=24.0, to_device_latency_ns=50)
    first, second = ask(on, 2400), ask(on, 1200, 10, lane=3)
    on.drain()
    # first: flows from 50, alone until 60 (240 B), then 12 B/ns each; the second's 1,200 B take 100 ns
    assert second.done_ns == 160
    assert first.done_ns == 160 + (2400 - 240 - 1200) // 24


def test_store_and_forward():
    on = links(nvme_latency_ns=20, to_device_latency_ns=10)
    read = ask(on, 600, lane=NVME)
    copy = ask(on, 600, after=[read])
    other = ask(on, 240)  # the lane is free meanwhile
    on.drain()
    assert (read.done_ns, other.done_ns, copy.started_ns, copy.done_ns) == (120, 20, 120, 155)


def test_readers_share_the_drives():
    on = links(2)
    first, second = ask(on, 600, lane=NVME), ask(on, 300, lane=3 + NVME)
    on.drain()
    assert (second.done_ns, first.done_ns) == (100, 150)


def test_hurry_reaches_what_is_waited_for():
    on = links()
    running, before = ask(on, 60, lane=NVME), ask(on, 60, urgent=False, lane=NVME)
    read = ask(on, 60, urgent=False, lane=NVME)
    copy = ask(on, 240, urgent=False, after=[read])
    on.hurry(copy)
    on.drain()
    assert [one.done_ns for one in (running, read, copy, before)] == [10, 20, 30, 30]


def test_who_waits_for_a_cancelled_one_waits_no_more():
    on = links()
    ask(on, 600, lane=NVME)
    queued = ask(on, 600, lane=NVME)
    waits = ask(on, 240, after=[queued])
    on.advance(30)
    assert on.cancel(queued)
    on.drain()
    assert waits.done_ns == 40
    on._check()


def test_bad_calls_are_refused():
    on = links(nvme=0.0)
    on.advance(10)
    with pytest.raises(ValueError, match="time goes back from 10 to 9"):
        on.advance(9)
    with pytest.raises(ValueError, match="needs bytes"):
        ask(on, 0)
    with pytest.raises(ValueError, match="no drives"):
        ask(on, 1, lane=NVME)
    with pytest.raises(ValueError, match="above 0"):
        links(to_device=0.0)
    assert on.next_ns() is None


def fluid(rates: LinkRates, devices: int, asks: list[tuple[int, int, int]]) -> list[Fraction]:
    """Ends of (at, lane, bytes), first come first served on each lane, in exact fractions: rates are found by filling
    all lanes' rates together until a port is full, from the definition."""
    latency = (rates.to_device_latency_ns, rates.to_device_latency_ns, rates.nvme_latency_ns)

    def ports(lane: int) -> list[str]:
        device, kind = divmod(lane, 3)
        return [f"m{device * rates.domains // devices}", "nvme" if kind == NVME else f"d{lane}"]

    capacity = {"nvme": Fraction(rates.nvme)}
    capacity |= {f"m{d}": Fraction(rates.host) for d in range(rates.domains)}
    capacity |= {f"d{x}": Fraction(rates.to_device) for x in range(3 * devices)}

    def shares(flowing: list[int]) -> dict[int, Fraction]:
        rate: dict[int, Fraction] = {}
        while len(rate) < len(flowing):
            best = None
            for port, room in capacity.items():
                users = [x for x in flowing if port in ports(x)]
                rising = [x for x in users if x not in rate]
                if rising:
                    level = (room - sum((rate[x] for x in users if x in rate), Fraction(0))) / len(rising)
                    if best is None or level < best[0]:
                        best = (level, rising)
            assert best is not None
            rate |= dict.fromkeys(best[1], best[0])
        return rate

    now, ends = Fraction(0), [Fraction(-1)] * len(asks)
    waiting = list(range(len(asks)))
    current: dict[int, tuple[int, Fraction, Fraction]] = {}  # lane -> (ask, bytes left, flows from)
    while waiting or current:
        for number in list(waiting):
            at, lane, size = asks[number]
            earlier = any(asks[n][1] == lane for n in waiting if n < number)
            if at <= now and lane not in current and not earlier:
                current[lane] = (number, Fraction(size), now + latency[lane % 3])
                waiting.remove(number)
        rate = shares([x for x, (_, _, since) in current.items() if since <= now])
        steps = [since - now for _, _, since in current.values() if since > now]
        steps += [current[x][1] / r for x, r in rate.items()]
        steps += [asks[n][0] - now for n in waiting if asks[n][0] > now]
        step = min(steps)
        now += step
        for lane, r in rate.items():
            number, left, since = current[lane]
            current[lane] = (number, left - r * step, since)
        for lane, (number, left, _) in list(current.items()):
            if left == 0:
                ends[number] = now
                del current[lane]
    return ends


@pytest.mark.parametrize("seed", range(40))
def test_shared_links_equal_a_fluid_in_fractions(seed: int):
    draw = random.Random(seed)
    devices = draw.choice([1, 2, 3, 4])
    rates = LinkRates(
        to_device=draw.choice([8.0, 24.0]),
        host=draw.choice([10.0, 30.0, 100.0]),
        nvme=draw.choice([3.0, 7.0]),
        to_device_latency_ns=draw.choice([0, 40]),
        nvme_latency_ns=draw.choice([0, 90]),
        domains=draw.choice([1, devices]),
    )
    at, asks = 0, []
    for _ in range(30):
        at += draw.choice([0, draw.randrange(2000)])
        asks.append((at, draw.randrange(3 * devices), draw.randrange(1, 20_000)))
    on = Links(rates, devices)
    got = [ask(on, size, at, lane=lane) for at, lane, size in asks]
    on._check()
    on.drain()
    for one, end in zip(got, fluid(rates, devices, asks), strict=True):
        assert abs(one.done_ns - end) <= 2 * len(asks)  # each end before it was rounded by less than 1 ns
    assert on.moved_XR().sum() == sum(size for _, _, size in asks)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_conserved_whatever_is_done(seed: int):
    draw = random.Random(seed)
    devices = draw.choice([1, 3])
    on = links(devices, host=40.0, chunk_bytes=draw.choice([0, 500]), to_device_latency_ns=3)
    asked: list[Transfer] = []
    size_by_lane_reason = np.zeros((3 * devices, len(REASONS)), np.int64)
    for _ in range(200):
        what = draw.randrange(6)
        if what < 2 or not asked:
            lane, size, reason = draw.randrange(3 * devices), draw.randrange(1, 4000), draw.choice(REASONS)
            after = draw.sample(asked, min(len(asked), draw.randrange(3)))
            asked.append(on.ask(lane, size, draw.random() < 0.5, reason, after=after))
            size_by_lane_reason[lane, REASONS.index(reason)] += size
        elif what == 2:
            on.hurry(draw.choice(asked))
        elif what == 3:
            on.cancel(draw.choice(asked))
        elif what == 4:
            on.stop(draw.choice(asked))
        else:
            on.advance(on.now_ns + draw.randrange(300))
        on._check()
    on.drain()
    assert (on.moved_XR() + on.cancelled_XR() == size_by_lane_reason).all()
    assert (on.asked_XR() == size_by_lane_reason).all()
    assert all(one.done or one.cancelled for one in asked)
    assert sorted(id(one) for ended in on.ended for one in ended) == sorted(id(one) for one in asked if one.done)
