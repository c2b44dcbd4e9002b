"""The project's own recorded traces (workloads/routing): whole, small, and their scores give their experts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from moesim.routing import RoutingContext, loss_free, topk
from moesim.traces import routing_npz

FOLDER = Path(__file__).parents[2] / "workloads" / "routing"
FILES = sorted(FOLDER.glob("*.npz"))
LIMIT_BYTES = 700 * 1024
NEAR = 1e-6
"""Scores this near to each other may change places with the last bit of another machine's exp"""


def test_the_traces_are_there():
    assert [f.stem for f in FILES] == ["stdlib_moe_auxiliary_loss", "stdlib_moe_loss_free"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
class TestTrace:
    def test_every_field_is_there_in_few_bytes(self, file):
        source = routing_npz.read(file)
        assert file.stat().st_size < LIMIT_BYTES
        assert source.warnings == ()
        assert (source.num_experts, source.top_k, source.num_layers) == (16, 2, 4)
        assert source.score_TLE is not None
        assert source.token_T is not None
        assert source.phase_T is not None
        assert source.token_T.max() < 256

    def test_decode_follows_prefill_in_every_sequence_that_has_it(self, file):
        source = routing_npz.read(file)
        edges = source.sequence_start
        phases = [source.phase_T[a:b] for a, b in itertools.pairwise(edges)]
        assert all((np.diff(p.astype(int)) >= 0).all() for p in phases)
        assert all(p[0] == 0 for p in phases)
        shares = sorted({float(p.mean()) for p in phases})
        assert shares == [0.0, 0.5], "whole sequences, and prompts continued to twice their length"

    def test_scores_give_the_experts_and_gates(self, file):
        source = routing_npz.read(file)
        with np.load(file, allow_pickle=False) as stored:
            bias_LE = stored["bias"] if "bias" in stored.files else None
        for layer in range(source.num_layers):
            score_TE = source.score_TLE[:, layer].astype(np.float32)
            if bias_LE is None:
                routed = topk.Policy().route(score_TE, RoutingContext(top_k=2))
                clear_T = np.ones(len(score_TE), bool)
            else:
                context = RoutingContext(top_k=2, scoring="sigmoid", bias_E=bias_LE[layer])
                routed = loss_free.Policy().route(score_TE, context)
                order_TE = np.sort(1 / (1 + np.exp(-score_TE)) + bias_LE[layer].astype(np.float32), axis=1)
                clear_T = (np.diff(order_TE[:, -3:], axis=1) > NEAR).all(1)
            assert clear_T.mean() > 0.99
            np.testing.assert_array_equal(routed.expert_TK[clear_T], source.expert_TLK[clear_T, layer])
            near_TK = np.abs(routed.gate_TK - source.weight_TLK[:, layer].astype(np.float32))
            assert near_TK[clear_T].max() < 1e-3

    def test_load_is_balanced_as_its_method_leaves_it(self, file):
        count_LE = routing_npz.read(file).count_LE()
        violation_L = count_LE.max(1) / count_LE.mean(1) - 1
        assert violation_L.max() < 1.5
