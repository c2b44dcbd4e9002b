"""Routers on torch: which experts each token takes, with gates that gradients flow through. torch and numpy alone.

Each is a function of scores [T, E] (the router's logits, float32, finite) and, where the method has one, a state, to
a `Choice` (and the next state). The choice itself carries no gradient; the gates do. On the same float32 scores on a
CPU the choice is the one that `moesim.routing` makes, ties included (of equal scores the lowest id):
tests/kernels/test_routers_agree.py compares. What is drawn (a table, random numbers) is handed in.

Legend: T tokens, E experts, K experts a token, W places a token has in a choice, C the most tokens of an expert, N
columns with the null experts', D features, V vocabulary.
"""

from moesim_kernels.routers.balancing import auxiliary_loss, bip, loss_free, loss_free_step, sinkhorn
from moesim_kernels.routers.select import NONE, Choice, counts, max_violation, probabilities, top_ids
from moesim_kernels.routers.sparse import expert_choice, null_experts, top_p
from moesim_kernels.routers.topk import grouped_sigmoid, softmax_topk, topk_softmax
from moesim_kernels.routers.unscored import centroid, centroid_step, drawn, table

__all__ = [
    "NONE", "Choice", "auxiliary_loss", "bip", "centroid", "centroid_step", "counts", "drawn", "expert_choice",
    "grouped_sigmoid", "loss_free", "loss_free_step", "max_violation", "null_experts", "probabilities", "sinkhorn",
    "softmax_topk", "table", "top_ids", "top_p", "topk_softmax",
]  # fmt: skip
