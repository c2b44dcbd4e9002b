"""What a step of a deployment costs when its experts' loads are known: what a placement changes, and the rest.

A step here is a decode step of a deployment that has enough to do: every rank runs as many requests as `max_num_seqs`
and its KV cache allow, at their mean length. So a slot more for an expert is a smaller batch where memory binds.

Legend: R rows (batches), L layers, E experts, S slots, G ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.exchange import Ports
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.rebalancing import MoveCosts
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.memory import rank_memory
from moesim.placement import Placement
from moesim.scenario.load import Scenario

__all__ = ["Batch", "LayerTimes", "StepPrices"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What fits beside so many expert slots. requests: running on a rank at once; tokens: of a step, all ranks.
    kv_tokens: that the KV cache of a rank holds. expert_bytes: of the slots of a rank, all layers. bound: what limits
    the requests: `max_num_seqs` or `KV memory`. own_ns: of a step without MoE exchange and experts, by operator."""

    slots: int
    requests: int
    tokens: int
    kv_tokens: int
    expert_bytes: int
    bound: str
    own_ns: dict[str, float]


class LayerTimes(NamedTuple):
    """ns of a step's MoE layers together, [R]: exchange, and experts of the slowest rank; and the mean over layers of
    the busiest rank's rows over the mean rank's, and of its inverse."""

    exchange: FloatArray
    experts: FloatArray
    balance: FloatArray
    utilisation: FloatArray


class StepPrices:
    """Prices of one deployment. `layer_scale`: layers of the model for each layer that is looked at."""

    def __init__(self, scenario: Scenario, layer_scale: float) -> None:
        """Raises BadInput where the deployment has no experts to balance, or experts of several sizes."""
        model, parallel = scenario.model, scenario.parallel
        if not model.is_moe or parallel.ep < 2:
            told = f"{model.name} is dense" if not model.is_moe else "parallel.ep is 1"
            raise BadInput(
                Problem("explain eplb", f"experts are balanced between ranks, and {told}; set --ep to 2 or more")
            )
        if model.num_expert_sets != model.num_moe_passes:
            told = f"{model.name}'s layers share experts, which is not judged; simulate the scenario instead"
            raise BadInput(Problem("explain eplb", told))
        if getattr(scenario.policies.dispatch, "guests", False):
            told = "dispatch that moves weights or the shared expert (llep, waterfill) is not judged; use lp, random or"
            raise BadInput(Problem("policies.dispatch", f"{told} local_first, or simulate the scenario instead"))
        how = scenario.communication
        if how.overlap == "two_batch" or how.coherent:
            told = "overlap two_batch" if how.overlap == "two_batch" else "coherent"
            raise BadInput(
                Problem("communication", f"{told} is not judged; leave it out, or simulate the scenario instead")
            )
        if model.expert_size_E:
            raise BadInput(
                Problem("explain eplb", "experts of several sizes are not judged; simulate the scenario instead")
            )
        self.model = model
        self.engine = scenario.engine
        self.cluster = scenario.cluster
        self.layout = Layout.of(model, scenario.cluster, parallel.tp, parallel.dp, parallel.ep, scenario.communication)
        self.ops = Operators(scenario.cluster.profile, scenario.engine.cuda_graph)
        self.layer_scale = layer_scale
        self._experts: dict[int, ExpertPrices] = {}
        self._batches: dict[int, Batch | None] = {}
        self.move_costs = MoveCosts.of(scenario.cluster.profile, self.slot_bytes)
        self._node_P = np.array(self.layout.node_of_part)

    @property
    def nodes(self) -> int:
        """Nodes that the expert-parallel ranks fill."""
        return max(1, min(self.layout.nodes, self.layout.ep))

    @property
    def slot_bytes(self) -> int:
        """One expert slot of one layer on one rank."""
        return int(self.model.expert_bytes()) // self.layout.expert_tp

    # -- what fits ----------------------------------------------------------------------------------------------
    def batch(self, slots: int, mean_tokens: tuple[float, float]) -> Batch | None:
        """The batch beside `slots` expert slots a rank and layer; None where not one request fits. mean_tokens: prompt
        and output of a request."""
        if slots not in self._batches:
            self._batches[slots] = self._fill(slots, mean_tokens)
        return self._batches[slots]

    def _fill(self, slots: int, mean_tokens: tuple[float, float]) -> Batch | None:
        model, engine = self.model, self.engine
        memory = rank_memory(model, self.cluster, self.layout, engine, slots)
        units = memory.kv_units // model.num_layers * engine.block_size  # tokens, every layer holding all of them
        prompt, output = mean_tokens
        # a request that decodes holds its prompt and, in the mean over its life, half of its output; engines admit
        # until blocks run out, so the mean length counts and not the final one
        length = prompt + output / 2
        held = int(units // length)
        requests = min(engine.max_num_seqs, held)
        if requests < 1:
            return None
        return Batch(
            slots=slots,
            requests=requests,
            tokens=requests * self.layout.dp,
            kv_tokens=units,
            expert_bytes=memory.expert_weights,
            bound="max_num_seqs" if held >= engine.max_num_seqs else "KV memory",
            own_ns=self._own(requests, length),
        )

    def _own(self, requests: int, length: float) -> dict[str, float]:
        """ns by operator of what a rank with `requests` requests runs besides MoE exchange and experts."""
        model, engine, layout = self.model, self.engine, self.layout
        padded = requests
        sizes = engine.graph_batch_sizes
        if engine.cuda_graph and sizes and requests <= sizes[-1]:
            padded = int(np.array(sizes)[np.searchsorted(np.array(sizes), requests)])
        dense = DenseTables(model, layout, engine, self.ops, layout.meets, np.array([padded]))
        own: dict[str, float] = {}
        for part in dense.parts:
            own[part.operator] = own.get(part.operator, 0.0) + float(part.ns_N[0])
        for part in dense.head_parts:
            own[part.operator] = own.get(part.operator, 0.0) + float(part.ns_N[requests])
        attention = 0.0
        for layers, window in ((dense.full_layers, False), (dense.window_layers, True)):
            if layers:
                shape = attention_shape(model, layout.tp, window)
                seen = min(length, max(model.window_of_layer)) if window else length
                attention += layers * float(self.ops.attention_decode(padded, requests * seen, shape).ns)
        own["attention_decode"] = own.get("attention_decode", 0.0) + attention
        return own

    # -- MoE layers ---------------------------------------------------------------------------------------------
    def _prices(self, slots: int) -> ExpertPrices:
        found = self._experts.get(slots)
        if found is None:
            found = self._experts[slots] = ExpertPrices(self.model, self.layout, self.ops, slots)
        return found

    def layers(self, count_RLS: AnyArray, tokens: float) -> LayerTimes:
        """Price batches of `tokens` tokens. count_RLS: (token, expert) pairs of each slot."""
        slots = count_RLS.shape[-1] // self.layout.ep
        prices = self._prices(slots)
        computed = prices.compute(count_RLS)
        ports = self._ports(count_RLS, tokens) if self.layout.exchanges else None
        priced = prices.price(computed, np.full(len(count_RLS), tokens / self.layout.dp), ports)
        most, mean = computed.rows_LP.max(axis=-1), computed.rows_LP.mean(axis=-1)
        used = mean > 0
        ratio = np.where(used, most / np.where(used, mean, 1.0), 1.0)
        scale = self.layer_scale
        return LayerTimes(
            exchange=(priced.dispatch + priced.combine).sum(axis=-1) * scale,
            experts=priced.experts.sum(axis=-1) * scale,
            balance=ratio.mean(axis=-1),
            utilisation=(1.0 / ratio).mean(axis=-1),
        )

    def even_ns(self, count_RLS: AnyArray, tokens: float) -> FloatArray:
        """ns of the MoE layers, [R], if all ranks took the mean rank's time and all ports carried alike."""
        prices = self._prices(count_RLS.shape[-1] // self.layout.ep)
        computed = prices.compute(count_RLS)
        ports = None
        if self.layout.exchanges:
            found = self._ports(count_RLS, tokens)
            near, far = (total / self.layout.ranks for total in (found.nvlink_total, found.nic_total))
            ports = found._replace(nvlink=near, nic=far)
        priced = prices.price(computed, np.full(len(count_RLS), tokens / self.layout.dp), ports)
        mean = computed.expert_LP.mean(axis=-1)
        return np.asarray((priced.dispatch + priced.combine + mean).sum(axis=-1) * self.layer_scale)

    def _ports(self, count_RLS: AnyArray, tokens: float) -> Ports:
        """Expected copies of tokens through the busiest ports, sources being all ranks alike; `moesim.cost.touch`
        counts them token by token.

        Counts do not say which experts go together; where a token travels once to a rank or node, see `_reached`.
        """
        lay = self.layout
        ranks, nodes = lay.ranks, lay.nodes
        node = min(lay.gpus_per_node, ranks)
        by_rank = count_RLS.reshape(*count_RLS.shape[:-1], ranks, -1)
        if lay.copies in ("pairs", "two_level"):
            pairs_RLG = by_rank.sum(axis=-1)
            far_RLX = pairs_RLG * max(0.0, 1.0 - node / ranks)
            near_RLG = pairs_RLG * ((node - 1) / ranks)
            if lay.copies == "two_level" and ranks == nodes * node:  # to the rank of the target's number first
                near_RLG = pairs_RLG.reshape(*pairs_RLG.shape[:-1], nodes, node).sum(axis=-2) * ((node - 1) / ranks)
                near_RLG = np.tile(near_RLG, nodes)
        else:
            near_RLG = tokens * (1.0 - 1.0 / ranks) * _reached(by_rank, tokens, self.model.top_k)
            pad = nodes * lay.gpus_per_node - ranks
            whole = np.pad(by_rank, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(*by_rank.shape[:-2], nodes, -1)
            far_RLX = tokens * (1.0 - 1.0 / nodes) * _reached(whole, tokens, self.model.top_k)
        near, far = near_RLG.sum(axis=-1), far_RLX.sum(axis=-1)
        return Ports(
            nvlink=np.maximum(near_RLG.max(axis=-1), near / ranks),
            nic=np.maximum(far_RLX.max(axis=-1) / lay.nics_shared, far / ranks),
            nvlink_total=near,
            nic_total=far,
        )

    # -- maps ---------------------------------------------------------------------------------------------------
    def base_map(self) -> IntArray:
        """Experts in order, as even as can be, empty slots where they do not divide: an engine without EPLB."""
        ranks, experts = self.layout.ep, self.model.num_experts
        slots = -(-experts // ranks)
        out = np.full((ranks, slots), -1, np.int64)
        for rank, part in enumerate(np.array_split(np.arange(experts), ranks)):
            out[rank, : len(part)] = part
        return out.ravel()

    def placement(self, map_LS: AnyArray) -> Placement:
        """A Placement of any number of layers on these ranks."""
        nodes = tuple(int(n) for n in self._node_P)
        return Placement(np.asarray(map_LS), self.model.num_experts, self.layout.ep, nodes)


def _reached(count_RLXS: AnyArray, tokens: float, top_k: int) -> FloatArray:
    """Chance that a token has an expert in each place X, from pairs of its slots, [R, L, X].

    The higher of two estimates that are low for opposite reasons: experts taken independently of each other, 1 -
    prod(1 - count / tokens), as if a token could have fewer than K; and K choices one after the other of as many equal
    experts as the loads are worth (their participation number N), 1 - prod over i < K of (1 - share N / (N - i)), as if
    a place had no expert that nearly all tokens take. Both together are within 5 % of tokens drawn one by one.
    """
    chance = np.minimum(count_RLXS / max(tokens, 1e-9), 1 - 1e-9)
    apart = -np.expm1(np.log1p(-chance).sum(axis=-1))
    total = np.maximum(count_RLXS.sum(axis=(-2, -1)), 1e-9)
    worth = np.maximum(total**2 / np.maximum((count_RLXS.astype(np.float64) ** 2).sum(axis=(-2, -1)), 1e-9), top_k)
    share = count_RLXS.sum(axis=-1) / total[..., None]
    missed = np.ones(share.shape)
    for taken in range(top_k):
        missed *= np.maximum(1.0 - share * (worth / np.maximum(worth - taken, 1.0))[..., None], 0.0)
    return np.asarray(np.maximum(apart, 1.0 - missed))
