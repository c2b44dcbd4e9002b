"""How one replica of a deployment is laid over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moesim.communication_spec import CommunicationSpec
from moesim.hardware import Cluster
from moesim.model import MoEModel

__all__ = ["Copies", "Layout"]

Copies = Literal["distinct", "pairs", "two_level", "coherent"]
"""How copies of a token are counted; see `moesim.cost.touch.touch`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` * `dp` = `ranks` consecutive ranks; experts in `ep` parts, each split over `expert_tp` ranks.

    `meets`: data-parallel ranks share experts, so they exchange tokens at every MoE layer and step together.
    `communication`: how.
    """

    tp: int
    dp: int
    ep: int
    gpus_per_node: int
    meets: bool
    communication: CommunicationSpec = field(default_factory=CommunicationSpec)

    @classmethod
    def of(
        cls,
        model: MoEModel,
        cluster: Cluster,
        tp: int,
        dp: int,
        ep: int,
        communication: CommunicationSpec | None = None,
    ) -> Layout:
        """The layout of `model` on `cluster`; a dense model's data-parallel ranks never meet."""
        how = communication or CommunicationSpec()
        return cls(tp, dp, ep, cluster.gpus_per_node, model.is_moe and dp > 1, how)

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.ranks // self.ep

    @property
    def exchanges(self) -> bool:
        """Tokens travel to their experts (all-to-all); else every rank gets all tokens."""
        return self.meets and self.expert_tp == 1 and self.communication.all_to_all != "allgather_reducescatter"

    @property
    def copies(self) -> Copies:
        """How the back end counts copies of a token. `auto` counts as DeepEP's normal kernels do."""
        if self.communication.coherent:
            return "coherent"
        pairs: dict[str, Copies] = {"deepep_low_latency": "pairs", "pairwise": "pairs", "hierarchical": "two_level"}
        return pairs.get(self.communication.all_to_all, "distinct")

    @property
    def nics_shared(self) -> int:
        """NICs over which the copies of one column of `Touch.node_in_BLN` come in: those of a node, where a sender uses
        the NIC of its own number in the node (DeepEP's normal kernels); else the target's alone."""
        return self.gpus_per_node if self.copies in ("distinct", "coherent") else 1

    @property
    def nodes(self) -> int:
        """Nodes that one replica spans."""
        return -(-self.ranks // self.gpus_per_node)

    @property
    def node_of_part(self) -> tuple[int, ...]:
        """Node of each expert-parallel part (of its first rank)."""
        return tuple(part * self.expert_tp // self.gpus_per_node for part in range(self.ep))

    @property
    def tp_spans_nodes(self) -> bool:
        return self.tp > self.gpus_per_node
