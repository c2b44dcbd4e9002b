"""Claims about prefetch and token scheduling that cost little to check; results/validation/offload.md has all."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
recorded = pytest.mark.skipif(not (DATA / "routing").is_dir(), reason="recorded routes (../shared/data) are not here")


def script(name: str) -> ModuleType:
    """A maintainers' script, imported where it lies."""
    for folder in ("routing", "offload"):
        path = str(ROOT / "benchmarks" / folder)
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def scheduling() -> ModuleType:
    return script("claims_scheduling")


@pytest.fixture(scope="module")
def prefetch() -> ModuleType:
    return script("claims_prefetch")


@pytest.mark.parametrize("batch", [4, 16])
def test_lru_on_synthetic_switch_routes_is_expertflow_s(scheduling: ModuleType, batch: int) -> None:
    """Fitted at batch 4 to 1.5 points, held out at 16: within 5."""
    off = scheduling.lru_hit(batch) - scheduling.HIT_LRU[batch]
    assert abs(off) <= (1.5 if batch == 4 else 5.0)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_read_me_s_hit_table(scheduling: ModuleType, slots: int) -> None:
    """Random and LRU alike, look-ahead well above, both within 5 points of the paper; MIN above all."""
    random, lru, belady = scheduling.HITS[slots]
    ours = [scheduling.read_me_hit(kind, slots) for kind in ("random", "lru", "look_ahead", "belady")]
    assert ours[:3] == pytest.approx([random, lru, belady], abs=5.0)
    assert abs(ours[0] - ours[1]) < 3.0
    assert ours[1] < ours[2] < ours[3]


def test_queues_by_expert_need_fewer_experts_a_batch(scheduling: ModuleType) -> None:
    came, queued = scheduling.unique_experts(11, 1), scheduling.unique_experts(11, 2)
    assert came == pytest.approx(scheduling.UNIQUE[1], rel=0.02)
    assert queued == pytest.approx(scheduling.UNIQUE[2], rel=0.1)


def test_a_predicted_cache_is_better_the_better_its_predictor(scheduling: ModuleType) -> None:
    hits = [scheduling.plec(4, accuracy)[0] for accuracy in (0.5, scheduling.ACCURACY, 1.0)]
    assert scheduling.lru_hit(4) < hits[0] < hits[1] < hits[2] == 100.0
    assert hits[1] == pytest.approx(scheduling.HIT_PLEC[4], abs=1.5)


def test_scheduling_never_activates_more_experts(scheduling: ModuleType) -> None:
    for experts in scheduling.SCHEDULED:
        assert 1.0 <= scheduling.scheduled(experts, 8) <= scheduling.scheduled(experts, 8, 50)


@recorded
def test_what_is_learnt_on_another_task_names_less(prefetch: ModuleType) -> None:
    """Markov transitions know a coming expert in about half the cases on their own task, less on another one."""
    own, other = (prefetch.recalls("markov", task, "summary", tokens=40)[0] for task in ("summary", "intent"))
    assert own == pytest.approx(prefetch.RECALL["markov"], abs=0.08)
    assert other < own - 0.08
    assert prefetch.recalls("frequency", "summary", "summary", tokens=40)[0] < own - 0.15


@recorded
@pytest.mark.slow
def test_prefetch_pays_from_nine_in_ten_where_every_transfer_is_carried_out(prefetch: ModuleType) -> None:
    """The notes' crossing of about 90 %, and that it goes away where late transfers are dropped."""
    carried, dropped, _ = prefetch.WAYS
    assert prefetch.crossing(carried) == pytest.approx(0.9, abs=0.05)
    assert prefetch.stall(dropped, "0.85") < prefetch.stall(carried, "none") < prefetch.stall(carried, "0.85")
    assert prefetch.stall(carried, "1") == pytest.approx(prefetch.NEXT[1.0], rel=0.1)


@recorded
@pytest.mark.slow
def test_a_perfect_prefetch_hides_at_most_what_computes(prefetch: ModuleType) -> None:
    """26 layers of 0.25 ms: no prefetch over the same cache can save more than those 6.5 ms a token."""
    carried = next(iter(prefetch.WAYS))
    saved = prefetch.stall(carried, "none") - prefetch.stall(carried, "1")
    assert 0.5 * 6.5 < saved <= 6.5
