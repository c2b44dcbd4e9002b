"""Row-work tables: what made the samples comes back, and unseen histograms are priced from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from moesim_kernels.fit.model import fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points
from moesim_kernels.fit.work import fit_work, stairs

from moesim.hardware import DeviceProfile

ROOT = Path(__file__).parents[2]

HIDDEN, INTER, SLOTS, TOP_K = 512, 256, 16, 2


def device(name: str) -> DeviceProfile:
    path = ROOT / "hw_profiles" / f"{name}.yaml"
    return DeviceProfile.from_spec(yaml.safe_load(path.read_text()), path.parent, str(path))


def histograms(seed: int, many: int, slots: int) -> list[np.ndarray]:
    """Balanced, random and very skewed rows of experts, 1 to 4,096 tokens."""
    rng, out = np.random.default_rng(seed), []
    for i in range(many):
        rows = TOP_K * int(2 ** rng.uniform(0, 12))
        weight = [np.ones(slots), rng.dirichlet(np.ones(slots)), rng.dirichlet(np.full(slots, 0.2))][i % 3]
        out.append(rng.multinomial(rows, weight / weight.sum()))
    return out


def samples(counts: list[np.ndarray], ns: np.ndarray, dtype: str) -> Samples:
    keys = [(HIDDEN, INTER, len(c), TOP_K, dtype, 3) for c in counts]
    return sample_points("moe", dtype, keys, [c.sum() for c in counts], ns, counts=counts)


def one_by_one(count: np.ndarray) -> float:
    """A CPU's layer: 20 us, then each expert reads its weights (80 us) or multiplies (7 us a row, slower if few)."""
    n = count[count > 0].astype(float)
    return 20e3 + float(np.maximum(80e3 + 1e3 * n, 60e3 + 7e3 * n).sum())


def test_experts_one_after_the_other_are_learnt_from_histograms() -> None:
    rng = np.random.default_rng(3)
    known, fresh = histograms(1, 60, SLOTS), histograms(2, 60, SLOTS)
    noise = np.exp(rng.normal(0, 0.02, 60))
    cpu = device("cpu_2core")
    fitted = fit_operator(samples(known, np.array([one_by_one(c) for c in known]) * noise, "fp32"), cpu)
    assert fitted.values["serial"] == 1.0
    assert fitted.row_work is not None
    assert (np.diff(fitted.row_work.work) >= 0).all()
    bare = with_fits(cpu, [replace(fitted, curves=[])])
    truth = np.array([one_by_one(c) for c in fresh])
    error = np.abs(predict(bare, samples(fresh, truth, "fp32")) / truth - 1)
    assert np.median(error) < 0.02
    assert np.quantile(error, 0.9) < 0.05


@pytest.mark.parametrize("block", [32, 128])
def test_blocks_of_rows_are_found(block: int) -> None:
    gpu = device("h200_sxm")
    hbm, peak = gpu.hbm_bytes_per_s * 1e-9, gpu.flop_rate("bf16") * 1e-9
    weights = 3 * 4096 * 1536
    known, fresh = histograms(4, 60, 64), histograms(5, 40, 64)

    def layer(c: np.ndarray) -> float:
        work = np.ceil(c / block).sum() * block
        memory, compute = (c > 0).sum() * 2 * weights / hbm / 0.9, work * 2 * weights / peak / 0.7
        return 2e4 + float((memory**4 + compute**4) ** 0.25)

    def of(counts: list[np.ndarray]) -> Samples:
        keys = [(4096, 1536, 64, TOP_K, "bf16", 3) for _ in counts]
        return sample_points("moe", "bf16", keys, [c.sum() for c in counts], [layer(c) for c in counts], counts=counts)

    found = fit_work(of(known), gpu)
    if block == 128:  # below about 180 rows an expert of this size is bound by memory: smaller steps do not show
        assert found.table.rows.tolist() == stairs(block).rows.tolist()
        assert found.values["flop_eff"] == pytest.approx(0.7, rel=0.1)
    assert found.values["mem_eff"] == pytest.approx(0.9, rel=0.05)
    fitted = fit_operator(of(known), gpu)
    error = np.abs(predict(with_fits(gpu, [replace(fitted, curves=[])]), of(fresh)) / of(fresh).ns - 1)
    assert np.quantile(error, 0.9) < 0.03


def test_stairs_are_the_rows_rounded_up() -> None:
    n = np.arange(0, 65)
    assert (stairs(16).at(n) == np.ceil(n / 16) * 16).all()
    assert stairs(16).at(10_000) == pytest.approx(10_008, abs=8)


def test_what_cannot_be_fitted_is_refused() -> None:
    counts = histograms(1, 3, SLOTS)
    with pytest.raises(ValueError, match="at least 4"):
        fit_work(samples(counts, np.ones(3), "fp32"), device("cpu_2core"))
    with pytest.raises(ValueError, match="add up"):
        sample_points("moe", "fp32", [(8, 8, 2, 2, "fp32", 3)], [5], [1.0], counts=[[1, 3]])
    with pytest.raises(ValueError, match="positive"):
        sample_points("gemm", "bf16", [(8, 8, "bf16")], [5], [0.0])
    with pytest.raises(ValueError, match="as many"):
        sample_points("gemm", "bf16", [(8, 8, "bf16")], [5, 6], [1.0, 2.0])
