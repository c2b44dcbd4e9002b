"""What tokens pay to travel: byte rules, back ends, shares of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.communication_spec import CommunicationSpec
from moesim.cost.exchange import Exchange, Ports
from moesim.cost.operators import Operators
from moesim.layout import Layout
from moesim.model import MoEModel
from tests.build import scenario, tiny_model


def build(
    folder: Path, dp: int = 16, ep: int = 16, dtype: str = "fp8_block", **communication: Any
) -> tuple[Exchange, Operators, MoEModel]:
    """The tiny model's exchange over dp ranks of measured H100s."""
    s = scenario(
        folder, {"name": tiny_model(folder), "expert_dtype": dtype}, cluster={"device": "h100_sxm", "nodes": 8}
    )  # type: ignore[arg-type]
    ops = Operators(s.cluster.profile)
    layout = Layout.of(s.model, s.cluster, 1, dp, ep)
    return Exchange(s.model, layout, ops, CommunicationSpec(**communication)), ops, s.model


def ports(near: Any, far: Any) -> Ports:
    """Copies through the busiest ports; totals as if all ports carried as many."""
    near, far = np.asarray(near, float), np.asarray(far, float)
    return Ports(near, far, near * 16, far * 16)


def test_auto_is_the_faster_of_deepeps_two_kernels(tmp_path: Path) -> None:
    exchange, ops, model = build(tmp_path)
    copies = ports([[40.0, 900.0]], [[20.0, 500.0]])
    priced = exchange.price((1, 2), 128, copies)
    for found, width in (
        (priced.dispatch_ns, model.hidden_size * (1 + 4 / 128)),
        (priced.combine_ns, model.hidden_size * 2),
    ):
        expected = ops.all_to_all(copies.nvlink * width, copies.nic * width, 16, 2, model.top_k).ns
        np.testing.assert_array_equal(found, np.rint(expected).astype(np.int64))


def test_experts_split_over_ranks_gather_all_tokens(tmp_path: Path) -> None:
    exchange, ops, model = build(tmp_path, ep=8)
    priced = exchange.price((3, 2), np.array([5, 6, 7]), None)
    size = np.array([5.0, 6.0, 7.0]) * model.hidden_size * 2
    np.testing.assert_array_equal(priced.dispatch_ns[:, 1], np.rint(ops.all_gather(size, 16, True).ns))
    np.testing.assert_array_equal(priced.combine_ns[:, 0], np.rint(ops.reduce_scatter(size, 16, True).ns))


@pytest.mark.parametrize("ep", [16, 8])
def test_a_share_of_the_tokens_is_priced_as_that_many(tmp_path: Path, ep: int) -> None:
    exchange, _, _ = build(tmp_path, ep=ep)
    whole = ports([[400.0, 900.0]], [[200.0, 500.0]]) if ep == 16 else None
    part = ports([[100.0, 225.0]], [[50.0, 125.0]]) if ep == 16 else None
    quarter, own = exchange.price((1, 2), 64, whole, share=0.25), exchange.price((1, 2), 16, part)
    for a, b in zip(quarter, own, strict=True):
        np.testing.assert_array_equal(a, b)
