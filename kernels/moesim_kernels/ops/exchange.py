"""The exchange of one MoE layer between ranks that hold whole experts: tokens to their experts, and results back.

As Megatron-Core's and DeepSpeed's all-to-all dispatchers do it, a copy of a token for each (token, expert) pair:

    dispatch: how many rows each slot of each rank will get (all-to-all of counts) -> the rows, in the order of slots
    combine:  the experts' results, the same way back, in the order in which the rows were sent

G ranks, S slots a rank, T tokens of this rank, R rows = pairs. All ranks call both, those without a token too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["TokenExchange", "all_to_allv", "composed_all_to_allv", "row_tokens"]


def all_to_allv(out: torch.Tensor, buffer: torch.Tensor, received: list[int], sent: list[int]) -> None:
    """As `all_to_all` with sent[j] elements (rows) to rank j and received[i] from rank i; zeros are allowed."""
    dist.all_to_all_single(out, buffer, received, sent)


def composed_all_to_allv(out: torch.Tensor, buffer: torch.Tensor, received: list[int], sent: list[int]) -> None:
    """`all_to_allv` as a send to and a receive from every other rank, all posted at once."""
    me = dist.get_rank()
    from_R, to_R = list(torch.split(out, received)), list(torch.split(buffer, sent))
    from_R[me].copy_(to_R[me])
    posts = [dist.P2POp(dist.irecv, part, i) for i, part in enumerate(from_R) if i != me and part.numel()]
    posts += [dist.P2POp(dist.isend, part, j) for j, part in enumerate(to_R) if j != me and part.numel()]
    for work in dist.batch_isend_irecv(posts) if posts else []:
        work.wait()


def row_tokens(tokens: int, rows: int) -> torch.Tensor:
    """A token for each row, round and round: int64 [rows]."""
    return torch.arange(rows) % max(tokens, 1)


class TokenExchange:
    """One rank's side. native: the back end brings all-to-alls with uneven splits."""

    def __init__(self, native: bool = True) -> None:
        self._ranks = dist.get_world_size()
        self._swap = all_to_allv if native else composed_all_to_allv
        self.sent_G: list[int] = []
        self.received_G: list[int] = []

    def dispatch(
        self, hidden_TH: torch.Tensor, token_R: torch.Tensor, count_GS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send row i, token token_R[i], to its slot. Rows stand in the order of slots, count_GS (int64) of each.

        Returns the rows that came, [R', H], sorted by source rank and then slot, and the slot of each among this
        rank's, int64 [R'].
        """
        come_GS = torch.empty_like(count_GS)
        ones = [1] * self._ranks
        self._swap(come_GS, count_GS, ones, ones)
        both_2G = torch.stack([count_GS.sum(1), come_GS.sum(1)])
        self.sent_G, self.received_G = both_2G.tolist()
        row_RH = self._moved(hidden_TH.index_select(0, token_R), self.received_G, self.sent_G)
        slot_S = torch.arange(count_GS.shape[1], device=count_GS.device).repeat(self._ranks)
        return row_RH, slot_S.repeat_interleave(come_GS.flatten(), output_size=row_RH.shape[0])

    def combine(self, out_RH: torch.Tensor) -> torch.Tensor:
        """Send the results of the rows that the last dispatch brought back: [R, H], in the order they were sent."""
        return self._moved(out_RH, self.sent_G, self.received_G)

    def _moved(self, row_RH: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        out_RH = row_RH.new_empty(sum(received), row_RH.shape[1])
        self._swap(out_RH, row_RH.contiguous(), received, sent)
        return out_RH
