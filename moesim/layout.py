"""How one replica of a deployment is laid over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.hardware import Cluster
from moesim.model import MoEModel

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` * `dp` = `ranks` consecutive ranks; experts in `ep` parts, each split over `expert_tp` ranks.

    `meets`: data-parallel ranks share experts, so they exchange tokens at every MoE layer and step together.
    """

    tp: int
    dp: int
    ep: int
    gpus_per_node: int
    meets: bool

    @classmethod
    def of(cls, model: MoEModel, cluster: Cluster, tp: int, dp: int, ep: int) -> Layout:
        """The layout of `model` on `cluster`; a dense model's data-parallel ranks never meet."""
        return cls(tp, dp, ep, cluster.gpus_per_node, model.is_moe and dp > 1)

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.ranks // self.ep

    @property
    def exchanges(self) -> bool:
        """Tokens travel to their experts (all-to-all); else all ranks of a part hold all tokens."""
        return self.meets and self.expert_tp == 1

    @property
    def nodes(self) -> int:
        """Nodes that one replica spans."""
        return -(-self.ranks // self.gpus_per_node)

    @property
    def tp_spans_nodes(self) -> bool:
        return self.tp > self.gpus_per_node
