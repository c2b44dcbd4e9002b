"""Inclusion probabilities kept exactly, K distinct items a draw, tilts that leave the mean."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.workload.strata import Strata, Tilts


def off(found, chance, draws):
    """Squared deviations over binomial ones, in standard deviations above what they add up to (about normal)."""
    inside = chance * draws > 5
    terms = ((found - chance) ** 2 * draws / (chance * (1 - chance)))[inside]
    return float((terms.sum() - len(terms)) / np.sqrt(2 * len(terms)))


def chances(items, slots, skew, seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(items, skew))
    for _ in range(50):
        p = np.minimum(p * slots / p.sum(), 0.999)
    return p * slots / p.sum()


@pytest.mark.parametrize(
    ("items", "slots", "skew"), [(64, 6, 0.5), (8, 2, 0.3), (256, 8, 2.0), (9, 8, 1.0), (5, 1, 1.0)]
)
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_every_item_with_exactly_its_chance_and_never_twice(items, slots, skew, shared):
    draws = 40_000
    rng = np.random.default_rng(items)
    chance = chances(items, slots, skew, items)
    strata = Strata(chance, rng.permutation(items), slots)
    latent = rng.random((draws, slots))
    common = rng.random((draws, slots)) < shared
    latent = np.where(common, rng.random((draws, 1)), latent)
    picked = np.sort(strata.pick(latent), axis=1)
    assert (picked[:, 1:] > picked[:, :-1]).all()
    assert picked.min() >= 0
    assert picked.max() < items
    found = np.bincount(picked.ravel(), minlength=items) / draws
    if shared in (0.0, 1.0):
        assert off(found, chance, draws) < 5
    else:  # some slots together, some apart: borders of items that are nearly always taken are off a little
        assert np.abs(found - chance).max() < 0.012


def test_equal_latents_pick_equal_items():
    strata = Strata(chances(32, 4, 0.5, 1), np.random.default_rng(0).permutation(32), 4)
    latent = np.random.default_rng(1).random((100, 4))
    np.testing.assert_array_equal(strata.pick(latent), strata.pick(np.repeat(latent, 3, axis=0))[::3])


@pytest.mark.parametrize(("tilts", "correlation"), [(8, 0.05), (200, 0.05), (200, 0.3)])
def test_tilts_are_uniform_together_and_correlated_alone(tilts, correlation):
    rng = np.random.default_rng(tilts)
    bins = Tilts.bins(correlation, tilts)
    density = Tilts(Tilts.dirichlet(correlation, (tilts, 3, bins), rng), np.ones(tilts))
    per = 400_000 // tilts
    latent = density(np.arange(tilts).repeat(per), rng.random((tilts * per, 3)))
    assert latent.min() >= 0
    assert latent.max() < 1
    inside = (latent < 0.25).reshape(tilts, per, 3)
    assert abs(inside.mean() - 0.25) < 0.005
    between = inside.mean(1).var(0, ddof=1).mean() - 0.25 * 0.75 / per
    assert between / (0.25 * 0.75) == pytest.approx(correlation, rel=0.45)


def test_a_correlation_next_to_nothing_stays_a_number():
    weight = Tilts.dirichlet(2.2250738585e-313, (2, 1, 8), np.random.default_rng(0))
    assert np.isfinite(weight).all()
