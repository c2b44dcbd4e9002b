"""The simulator's device: steps whose nanoseconds are worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moesim.errors import Infeasible
from moesim.offload import StepRoutes
from moesim.offload.drive import LayerWork, Work
from moesim.tiers import LinkRates
from moesim.tiers.device import Cpu, DeviceOptions, SimDevice
from moesim.tiers.links import LANES, REASONS, Links
from moesim.tiers.records import PARTS
from moesim.tiers.store import Home, TierStore

SIZE = 2400
"""bytes of an expert: 100 ns over a link of 24 B/ns"""


class Times:
    """own 100, experts 20 a product and 5 a row, CPU 60 an expert, sync 30, join 7, end 11."""

    def begin(self, tokens: int) -> None:
        pass

    def own_ns(self, layer: int) -> int:
        return 100

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return 20 + 5 * sum(rows)

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return 60 * len(rows)

    def sync_ns(self, layer: int) -> int:
        return 30

    def join_ns(self, layer: int) -> int:
        return 7

    def end_ns(self) -> int:
        return 11


def device(
    home: Home | None = None, rates: LinkRates | None = None, present: Sequence[int] = (), **options: object
) -> SimDevice:
    links = Links(rates if rates is not None else LinkRates(24.0, 1000.0, 6.0))
    how = DeviceOptions(**options)  # type: ignore[arg-type]
    sizes = np.full(32, SIZE)
    store = TierStore(links, [sizes], home, how.staging, None, how.on_host, how.duplex)
    store.place(0, present)
    store.start()
    return SimDevice(Times(), links, sizes, options=how, store=store)


STEP = StepRoutes(0, np.zeros((1, 1, 1), np.int64), np.zeros(1, np.int64))


def run(dev: SimDevice, *layers: LayerWork) -> dict[str, int]:
    """A step of these layers, nothing asked ahead; ns by part, those that are not 0."""
    dev.begin(STEP)
    for layer, work in enumerate(layers):
        dev.own(layer, 1)
        for one in work.coming:
            if one.key not in dev.store.way(0):
                dev.fetch(one.key, one.size_bytes, urgent=True)
        dev.experts(layer, work)
    dev.end()
    dev.store._check()
    dev.links._check()
    record = dev.records
    assert sum(record.part_ns[-1]) == record.step_ns[-1]
    return {part: ns for part, ns in zip(PARTS, record.part_ns[-1], strict=True) if ns}


def works(*keys: int) -> list[Work]:
    return [Work(key, 1, SIZE) for key in keys]


FIXED = {"own": 100, "join": 7, "end": 11}


def test_everything_there_is_the_sum_and_no_stall():
    dev = device()
    assert run(dev, LayerWork(here=works(0, 1)), LayerWork()) == {"own": 200, "experts": 30, "join": 14, "end": 11}
    assert dev.now_ns == 255
    assert dev.records.moved_bytes_SXR().sum() == 0


def test_missed_experts_compute_as_they_arrive():
    """Asked for at 100, there at 200 and 300. What is there computes 100-125, then 200-225, then 300-325. With all
    there: one product of 35, so 190 are stalled."""
    dev = device()
    assert run(dev, LayerWork(here=works(0), coming=works(1, 2))) == {**FIXED, "experts": 35, "stall": 190}
    assert dev.now_ns == 100 + 225 + 7 + 11


@pytest.mark.parametrize(("compute", "end"), [("arrival", 325), ("after", 330), ("once", 335)])
def test_when_missed_experts_compute(compute: str, end: int):
    """after: 1 and 2 in one product at 300 (30); once: all three at 300 (35)."""
    dev = device(compute=compute)
    run(dev, LayerWork(here=works(0), coming=works(1, 2)))
    assert dev.now_ns == end + 7 + 11


def test_those_that_arrived_together_share_a_product():
    """While 40 rows compute until 320, 1 and 2 arrive (200, 300): one product of 30 follows."""
    dev = device()
    assert run(dev, LayerWork(here=[Work(0, 40)], coming=works(1, 2))) == {**FIXED, "experts": 230, "stall": 20}
    assert dev.now_ns == 350 + 7 + 11


def test_streams_wait_for_a_free_buffer():
    """One buffer. 1: asked for at 100, there at 200, computed at 225; then 2: there at 325, computed at 350."""
    dev = device(staging=1)
    assert run(dev, LayerWork(streams=works(1, 2))) == {**FIXED, "experts": 30, "stall": 220}
    assert dev.now_ns == 350 + 7 + 11


def test_two_buffers_hide_the_products():
    """Two: 1 at 200, 2 at 300; the first buffer is free at 225, and 3 follows 2 on the link: there at 400."""
    dev = device(staging=2)
    run(dev, LayerWork(streams=works(1, 2, 3)))
    assert dev.now_ns == 425 + 7 + 11
    assert dev.records.moved_bytes_SXR()[0, 0].tolist() == [0, 0, 3 * SIZE, 0, 0]


@pytest.mark.parametrize("compute", ["after", "once"])
def test_streams_in_rounds_of_as_many_as_there_are_buffers(compute: str):
    """Two at 300 in one product of 30, then the third: asked for at 330, there at 430."""
    dev = device(staging=2, compute=compute)
    run(dev, LayerWork(streams=works(1, 2, 3)))
    assert dev.now_ns == 455 + 7 + 11


def test_an_expert_that_counts_as_there_is_waited_for():
    """Logical completion: prefetched at 0 behind another, so there at 200, and the layer's product starts then."""
    dev = device()
    dev.fetch(5, SIZE, urgent=False)
    dev.fetch(1, SIZE, urgent=False)
    assert run(dev, LayerWork(here=works(1))) == {**FIXED, "experts": 25, "stall": 100}
    assert dev.arrived() == [5, 1]


def test_a_late_prefetch_overtakes_others_that_are_queued():
    """5 is under way until 100, 6 and 1 are queued; at 100 6 has started; 1 is hurried: 7 waits."""
    dev = device()
    for key in (5, 6, 7, 1):
        dev.fetch(key, SIZE, urgent=False)
    run(dev, LayerWork(coming=works(1)))
    assert dev.now_ns == 300 + 25 + 7 + 11
    assert dev.cancel(7) is False  # it started at 300


def test_the_room_of_a_transfer_under_way_goes_to_another():
    """1 is void at 0, but its bytes hold the link until 100; what comes in its place follows."""
    dev = device()
    dev.fetch(1, SIZE, urgent=False)
    dev.evict(1, write_back=False)
    dev.fetch(2, SIZE, urgent=False)
    dev.fetch(1, SIZE, urgent=False)
    run(dev, LayerWork(here=works(2)), LayerWork(here=works(1)))
    assert dev.arrived() == [2, 1]
    assert dev.records.moved_bytes_SXR()[0, 0].tolist() == [0, 3 * SIZE, 0, 0, 0]


def test_experts_on_the_cpu_run_beside_the_device():
    """Sync 100-130, then CPU 130-250 beside the device's 130-155."""
    dev = device()
    assert run(dev, LayerWork(here=works(0), cpu=works(1, 2))) == {**FIXED, "sync": 30, "experts": 25, "cpu": 95}
    assert dev.now_ns == 250 + 7 + 11


def test_the_device_may_go_on_while_work_is_handed_over():
    """The device computes 100-125 during the sync; the CPU has 130-190: of the 65 that are exposed 5 are sync."""
    dev = device(sync_blocks=False)
    assert run(dev, LayerWork(here=works(0), cpu=works(1))) == {**FIXED, "sync": 5, "experts": 25, "cpu": 60}


def test_deferred_experts_are_joined_one_layer_later():
    """Layer 0: sync until 130, CPU 130-190 now, 190-250 deferred; device until 155; it ends at 190, join 197. Layer 1:
    own until 297, where the deferred ones have ended: nothing of them is exposed."""
    dev = device()
    first = LayerWork(here=works(0), cpu=works(1), deferred=works(2))
    parts = run(dev, first, LayerWork(here=works(8)))
    assert parts == {"own": 200, "sync": 30, "experts": 50, "cpu": 35, "join": 14, "end": 11}


def test_deferred_experts_that_take_long_are_exposed_later():
    """Layer 0: sync until 130, five deferred 130-430; the device is ready at 155 and goes on. Layer 1: own 162-262, its
    expert until 287, then it waits until 430: 143 ns."""
    dev = device()
    parts = run(dev, LayerWork(here=works(0), deferred=works(1, 2, 3, 4, 5)), LayerWork(here=works(8)))
    assert parts == {"own": 200, "sync": 30, "experts": 50, "cpu": 143, "join": 14, "end": 11}


def paged(dev: SimDevice) -> dict[str, int]:
    """Two layers of 4,800 B pages (200 ns), the next one asked for while one computes."""
    dev.begin(STEP)
    dev.page(0, 4800)
    for layer in range(2):
        dev.own(layer, 1)
        if layer == 0:
            dev.page(1, 4800)
        dev.experts(layer, LayerWork(here=works(8 * layer), paged=True))
    dev.end()
    return {part: ns for part, ns in zip(PARTS, dev.records.part_ns[-1], strict=True) if ns}


def test_pages_of_experts_are_waited_for_by_the_experts():
    """0 is there at 200: its expert runs 200-225, joined at 232, own until 332; 1 was asked for at 100, so it follows
    on the link and is there at 400."""
    dev = device()
    assert paged(dev) == {"own": 200, "experts": 50, "stall": 100 + 68, "join": 14, "end": 11}


def test_pages_of_whole_layers_are_waited_for_by_the_layer():
    """0: waits until 200, own until 300, where page 1 is asked for; expert until 325, join 332; page 1 at 500: 168."""
    dev = device(whole_pages=True)
    assert paged(dev) == {"own": 200, "experts": 50, "stall": 200 + 168, "join": 14, "end": 11}


def test_write_backs_have_the_other_direction():
    dev = device(present=[1])
    dev.evict(1, write_back=True)
    assert run(dev, LayerWork(coming=works(2)))["stall"] == 100
    moved = dev.records.moved_bytes_SXR()[0]
    assert moved[LANES.index("to_host"), REASONS.index("write_back")] == SIZE


def test_write_backs_on_the_same_stream_are_in_the_way():
    """Asked for at 100, both: the write-back first, the load 200-300."""
    dev = device(present=[1], duplex=False)
    dev.begin(STEP)
    dev.own(0, 1)
    dev.evict(1, write_back=True)
    dev.fetch(2, SIZE, urgent=True)
    dev.experts(0, LayerWork(coming=works(2)))
    assert dev.now_ns == 300 + 25 + 7


@pytest.mark.parametrize(("staging", "ends"), [(1, [10, 110, 210]), (2, [10, 20, 110]), (3, [10, 20, 30])])
def test_loads_wait_for_a_buffer_that_a_write_back_holds(staging: int, ends: list[int]):
    """Victims leave at 100, 200, 300; loads are of a tenth of the bytes. With one spare buffer the second load needs
    the first victim's room, the third the second's; with two buffers the third the first's; with three none waits."""
    dev = device(present=[1, 2, 3], staging=staging)
    loads = []
    for gone, new in ((1, 4), (2, 5), (3, 6)):
        dev.evict(gone, write_back=True)
        dev.fetch(new, SIZE // 10, urgent=True)
        loads.append(dev.store.way(0)[new])
    dev.links.drain()
    assert [one.done_ns for one in loads] == ends


def test_links_and_records_add_up_over_steps():
    dev = device()
    run(dev, LayerWork(coming=works(1)))
    dev.skip_to(1000)
    dev.fetch(2, SIZE, urgent=False)
    run(dev, LayerWork(here=works(1)))
    run(dev, LayerWork(here=works(2)))
    records = dev.records
    assert records.start_ns_S().tolist() == [0, 1000, 1143]
    assert records.step_ns_S().tolist() == [100 + 100 + 25 + 18, 143, 143]
    assert records.moved_bytes_SXR().sum(axis=(0, 1)).tolist() == [SIZE, SIZE, 0, 0, 0]
    assert records.busy_ns_SX()[:, 0].tolist() == [100, 100, 0]
    assert records.part_ns_S("stall").tolist() == [100, 0, 0]
    with pytest.raises(ValueError, match="time goes back"):
        dev.skip_to(5)


# ---- homes


NVME_HOME = Home("nvme", dram_bytes=2 * SIZE)
"""a read takes 400 ns at 6 B/ns"""


def test_from_nvme_through_host_memory():
    """Asked for at 100: read until 500, copied until 600."""
    dev = device(NVME_HOME)
    assert run(dev, LayerWork(coming=works(1)))["stall"] == 500
    assert dev.store.dram_state(0, 1) == "present"
    dev.evict(1, write_back=False)
    assert run(dev, LayerWork(coming=works(1)))["stall"] == 100  # host memory has it
    moved = dev.records.moved_bytes_SXR().sum(axis=(0, 2))
    assert moved.tolist() == [2 * SIZE, 0, SIZE]


def test_reads_and_copies_overlap():
    """Reads end at 500 and 900, copies at 600 and 1000."""
    dev = device(NVME_HOME)
    run(dev, LayerWork(coming=works(1, 2)))
    assert dev.now_ns == 1000 + 25 + 7 + 11


def test_the_least_recently_used_one_leaves_host_memory():
    dev = device(NVME_HOME)
    run(dev, LayerWork(coming=works(1)), LayerWork(coming=works(2)))
    dev.evict(1, write_back=False)
    run(dev, LayerWork(coming=works(1)))  # 1 is the fresher one now
    run(dev, LayerWork(coming=works(3)))
    assert [dev.store.dram_state(0, key) for key in (1, 2, 3)] == ["present", "absent", "present"]


def test_without_room_in_host_memory_loads_pass_through_bounce_buffers():
    """No room for any: one buffer, so the next read starts when the copy before it has ended: 100 + 400 + 100, then
    again 400 + 100."""
    dev = device(Home("nvme", dram_bytes=0, bounce=1))
    run(dev, LayerWork(coming=works(1, 2)))
    assert dev.now_ns == 1100 + 25 + 7 + 11
    two = device(Home("nvme", dram_bytes=0, bounce=2))
    run(two, LayerWork(coming=works(1, 2)))
    assert two.now_ns == 1000 + 25 + 7 + 11


def test_the_cpu_waits_for_weights_on_nvme():
    """Sync until 130; asked for at 100, read until 500; CPU until 560. With it in memory the CPU would end at 190."""
    dev = device(NVME_HOME)
    parts = run(dev, LayerWork(here=works(0), cpu=works(1)))
    assert parts == {**FIXED, "sync": 30, "experts": 25, "cpu": 35, "stall": 370}
    assert run(dev, LayerWork(here=works(0), cpu=works(1))) == {**FIXED, "sync": 30, "experts": 25, "cpu": 35}


def test_exclusive_host_memory_drops_what_the_device_has():
    dev = device(Home("nvme", dram_bytes=2 * SIZE, copies=False))
    run(dev, LayerWork(coming=works(1)))
    assert dev.store.dram_state(0, 1) == "absent"
    assert dev.store.dram_bytes() == 0


def test_a_device_that_is_the_host_loads_from_nvme_at_once():
    dev = device(NVME_HOME, on_host=True)
    assert run(dev, LayerWork(coming=works(1)))["stall"] == 400
    assert dev.records.moved_bytes_SXR()[0].sum(axis=1).tolist() == [0, 0, SIZE]
    with pytest.raises(ValueError, match="nowhere to write back"):
        dev.evict(1, write_back=True)


def test_without_host_copies_a_load_is_a_swap():
    """Host memory has room for what is not on the device, to the byte. 4 comes 0-100 into the spare buffer, then 1
    travels into the place that 4 has left, 100-200; 5 needs the room of 1: 200-300."""
    dev = device(Home(dram_bytes=30 * SIZE, copies=False), present=[1, 2], staging=1)
    assert dev.store.dram_bytes() == 30 * SIZE
    for gone, new in ((1, 4), (2, 5)):
        dev.evict(gone, write_back=False)
        dev.fetch(new, SIZE, urgent=True)
    assert dev.store.staging_state(0, 1) == "queued"
    dev.links.advance(150)
    dev.skip_to(150)
    dev.store._check()
    assert (dev.store.staging_state(0, 1), dev.store.dram_state(0, 4)) == ("in flight", "absent")
    assert dev.store.dram_bytes() == 30 * SIZE
    dev.links.drain()
    assert dev.links.now_ns == 400
    assert dev.store.dram_state(0, 1) == "present"
    dev.store._check()


def test_host_memory_that_is_too_small_is_infeasible():
    with pytest.raises(Infeasible, match="76,800 bytes of host memory"):
        device(Home(dram_bytes=31 * SIZE))
    with pytest.raises(Infeasible, match="72,000 bytes"):
        device(Home(dram_bytes=29 * SIZE, copies=False), present=[1, 2])


def test_a_device_and_its_store_agree():
    links = Links(LinkRates(24.0, 1000.0, 6.0))
    store = TierStore(links, [np.full(4, SIZE)], staging=3)
    with pytest.raises(ValueError, match="differ in staging"):
        SimDevice(Times(), links, np.full(4, SIZE), store=store)


def test_one_cpu_serves_all_devices():
    cpu = Cpu()
    assert (cpu.run(10, 100), cpu.run(50, 20), cpu.run(500, 5)) == (110, 130, 505)
    assert cpu.busy_ns == 125
