"""Intervals from steps that were measured before: by hand, and at the rate they claim."""

from __future__ import annotations

import numpy as np
import pytest
from moesim_kernels.validate.anchors import anchored_by
from moesim_kernels.validate.predict import Predicted, Predictions
from moesim_kernels.validate.record import Record, Sample

from moesim.errors import BadInput

FACTS = {"device": "cuda", "ranks": 1, "profile": {"speed_error": 0.04, "reference_ns": 1000.0, "made_on": "GPU"}}


def _predicted(name: str, ns: int) -> Predicted:
    return Predicted(name, "decode", (), 1, 1, ns, {}, {}, {}, 0.5, {}, (1.0, 0.0, 0.0, 0.0), {}, 1.0)


def _found(miss: list[float], reference: float = 1001.0) -> tuple[Predictions, Record]:
    """Steps that are `miss` off in ln, by the wall; in CPU time half of it."""
    names = [f"a{i}" for i in range(len(miss))]
    predictions = Predictions(tuple(_predicted(n, 1_000_000) for n in names), FACTS)
    samples = [
        Sample(n, r, 1e6 * np.exp(-x), 1e6 * np.exp(-x / 2), {}, {}, None, reference)
        for r in range(3)
        for n, x in zip(names, miss, strict=True)
    ]
    return predictions, Record("", 1, {"device": "GPU"}, samples)


def test_by_hand() -> None:
    """Of nineteen misses the eighteenth smallest, whatever their signs."""
    rng = np.random.default_rng(3)
    miss = [(-1) ** i * 0.01 * (i + 1) for i in range(19)]
    rng.shuffle(miss)
    found = anchored_by(*_found(miss))
    assert found.half_width == pytest.approx(0.18, abs=2e-5)
    assert found.half_width_cpu == pytest.approx(0.09, abs=2e-5)
    assert found.bias == pytest.approx(float(np.median(miss)))
    again = found.applied(_found(miss)[0])
    assert {p.half_width for p in again.settings} == {round(found.half_width, 5)}
    assert {p.half_width_cpu for p in again.settings} == {round(found.half_width_cpu, 5)}
    assert [p.ns for p in again.settings] == [1_000_000] * 19


def test_a_machine_of_another_speed_is_not_taken_for_the_models_error() -> None:
    """All anchors are half as slow again; what is left of them, and the profile's error of the speed, is the width."""
    miss = [-0.4 + (-1) ** i * 0.01 * (i + 1) for i in range(19)]
    found = anchored_by(*_found(miss, reference=1500.0))
    assert not found.steady
    assert found.bias == pytest.approx(float(np.median(miss)))
    left = np.sort(np.abs(np.array(miss) - np.median(miss)))[17]
    assert found.half_width == pytest.approx(float(np.hypot(left, 1.645 * 0.04)), abs=2e-5)
    assert anchored_by(*_found(miss)).half_width > 0.5  # the same on a steady machine is the model's


def test_too_few() -> None:
    with pytest.raises(BadInput, match="--anchors"):
        anchored_by(*_found([0.1] * 8))


def test_they_hold_nine_in_ten_whatever_the_errors_are() -> None:
    """A biased, skewed distribution: the share of new steps inside is 90 % on average over anchors."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        miss = -0.02 + 0.03 * rng.exponential(size=29)
        width = anchored_by(*_found(list(miss))).half_width
        new = -0.02 + 0.03 * rng.exponential(size=500)
        inside.append(float((np.abs(new) <= width).mean()))
    assert 0.88 < np.mean(inside) < 0.93
