"""Tokens whose expert is gone take the next of those that are kept: the router ranks kept experts alone.

What PreMoe's rebuilt model does (arXiv 2505.17639; `model_v3_partial.py` of its repository: the gate's rows of experts
that are not loaded are left out). It needs the scores of all experts; where a trace has none, `precision.premoe`'s own
map stands in for it.
"""

from __future__ import annotations

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.offload import OffloadContext
from moesim.offload.rerouting.scored import ScoredReroute, ranked
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def start(self, context: OffloadContext, gone_LE: BoolArray | None = None) -> ScoredReroute:
        """See `moesim.offload.ReroutingPolicy.start`."""
        return _Kept(context, gone_LE)


class _Kept(ScoredReroute):
    def order(self, score_TE: FloatArray, resident_E: BoolArray, layer: int) -> IntArray:
        return ranked(score_TE)
