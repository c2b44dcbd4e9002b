"""Local search for the balance of rank loads: swaps of two slots, and kicks out of local optima.

Rows are searched side by side as rows of arrays and do not see each other. A row's step swaps the slot of its fullest
rank and the slot elsewhere that leave the smaller maximum. Where no swap helps, the row is at a local optimum: kept if
no worse than its best, else undone, and then kicked: half the time a slot changes its expert (one of the fullest rank's
experts gets a slot of another that has several, or loses one of its own to another), half the time two pairs of slots
trade places. The budget counts kicks, never seconds.

Loads are held as whole numbers (in float64, below 2^53), so sums are exact in any order, every step is a true gain and
nothing depends on the machine or on what experts are called.

Legend: R rows (layers, or layers x nodes), E experts, S slots, G ranks, Q slots of a rank (S = G * Q), K kicks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.placement import EMPTY, PlacementContext
from moesim.rng import generator

__all__ = ["better_of", "improve", "pack_uneven"]

_DRAWS = 5
"""of 32 bits, for a kick: what kind, a slot of the fullest rank, the slot it trades with, two more slots"""
_TOTAL = 2.0**52
"""the load of a row; a rank's is at most that"""
_GOOD = 1e-4
"""above the mean (or a bound given) by less than this share, a row is done"""
_HALF = 1 << 31
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(slots=True)
class _Rows:
    """The search's state: experts by slot (E where empty) [R, S], replicas [R, E + 1], whole-number loads of experts
    [R, E + 1], of slots [R, S] and ranks [R, G], kicks had and the least maximum so far [R]; `goal`: good enough [R].
    """

    expert_RS: Ints
    count_RE: Ints
    weight_RE: Floats
    slot_RS: Floats
    load_RG: Floats
    kicks_R: Ints
    best_R: Floats
    goal_R: Floats
    id_R: Ints

    def only(self, keep_R: NDArray[np.bool_]) -> _Rows:
        """Some of the rows, copied."""
        return _Rows(*(getattr(self, name)[keep_R] for name in self.__dataclass_fields__))


def improve(weight_RE: Floats, expert_RS: Ints, ranks: int, effort: int, goal_R: Floats | None = None) -> Ints:
    """A map of the same slots whose fullest rank is no fuller, int64 [R, S].

    weight_RE: loads, some load in every row. expert_RS: the expert of each slot, EMPTY where there is none (at most one
    on a rank). effort: kicks a row at most. goal_R: largest over mean rank load below which a row need not go (1).
    """
    rows, experts = weight_RE.shape
    slots = expert_RS.shape[1]
    if ranks == 1 or rows == 0:
        return expert_RS.copy()
    padded_RS = np.where(expert_RS == EMPTY, experts, expert_RS)
    share_RE = weight_RE / weight_RE.max(axis=1, keepdims=True)
    weight = np.zeros((rows, experts + 1))
    weight[:, :experts] = share_RE * (_TOTAL / share_RE.sum(axis=1, keepdims=True))
    flat = padded_RS + np.arange(rows)[:, None] * (experts + 1)
    count = np.bincount(flat.ravel(), minlength=rows * (experts + 1)).reshape(rows, experts + 1)
    count[:, experts] = 1
    goal = np.ones(rows) if goal_R is None else goal_R
    goal = np.floor(goal * (_TOTAL / ranks) * (1 + _GOOD))
    drawn = (effort, rows, _DRAWS)  # kick by kick, so that more effort goes on where less ends
    draw_KRU = generator(0, "placement.search").integers(0, 1 << 32, drawn, np.uint32)
    out = _search(padded_RS, count, weight, goal, draw_KRU, slots // ranks)
    return np.where(out == experts, EMPTY, out)


def _search(
    expert_RS: Ints, count_RE: Ints, weight_RE: Floats, goal_R: Floats, draw_KRU: NDArray[np.uint32], room: int
) -> Ints:
    """`improve` on prepared arrays (empty slots hold expert E): the best map of each row, [R, S]."""
    rows, budget = len(expert_RS), len(draw_KRU)
    state = _Rows(
        expert_RS.copy(), count_RE.copy(), weight_RE, np.empty(0), np.empty(0), np.zeros(rows, np.int64),
        np.full(rows, np.inf), goal_R, np.arange(rows),
    )  # fmt: skip
    _sum_up(state, room)
    best_RS, best_RE = expert_RS.copy(), count_RE.copy()
    while len(state.id_R):
        stuck_R = ~_swap(state, room)
        if not stuck_R.any():
            continue
        most_R = state.load_RG.max(axis=1)
        kept_R = stuck_R & (most_R <= state.best_R)
        best_RS[state.id_R[kept_R]] = state.expert_RS[kept_R]
        best_RE[state.id_R[kept_R]] = state.count_RE[kept_R]
        state.best_R = np.where(kept_R, most_R, state.best_R)
        done_R = stuck_R & ((state.kicks_R >= budget) | (state.best_R <= state.goal_R))
        if done_R.any():
            state, stuck_R = state.only(~done_R), stuck_R[~done_R]
        if stuck_R.any():
            kicked = state.only(stuck_R)
            kicked.expert_RS, kicked.count_RE = best_RS[kicked.id_R], best_RE[kicked.id_R]
            _sum_up(kicked, room)
            _kick(kicked, draw_KRU[kicked.kicks_R, kicked.id_R].astype(np.int64), room)
            _sum_up(kicked, room)
            for name in ("expert_RS", "count_RE", "slot_RS", "load_RG"):
                getattr(state, name)[stuck_R] = getattr(kicked, name)
            state.kicks_R[stuck_R] += 1
    return best_RS


def _sum_up(state: _Rows, room: int) -> None:
    """Loads of slots and ranks from experts and counts."""
    share_RE = np.rint(state.weight_RE / state.count_RE)
    state.slot_RS = np.take_along_axis(share_RE, state.expert_RS, axis=1)
    state.load_RG = state.slot_RS.reshape(len(share_RE), -1, room).sum(axis=2)


def _swap(state: _Rows, room: int) -> NDArray[np.bool_]:
    """Make each row's best swap with its fullest rank where that lowers its maximum: whether it did, [R]."""
    rows, slots = state.expert_RS.shape
    row_R = np.arange(rows)
    full_R = state.load_RG.argmax(axis=1)
    most_R = state.load_RG[row_R, full_R]
    mine_RQ = state.slot_RS.reshape(rows, -1, room)[row_R, full_R]
    move_RQS = mine_RQ[:, :, None] - state.slot_RS[:, None, :]
    after_RQS = np.repeat(state.load_RG, room, axis=1)[:, None, :] + move_RQS
    np.subtract(most_R[:, None, None], move_RQS, out=move_RQS)
    np.maximum(after_RQS, move_RQS, out=after_RQS)
    empty_RS = state.expert_RS == state.weight_RE.shape[1] - 1
    if empty_RS.any():  # a rank that has an empty slot takes no second one
        short_R = empty_RS.reshape(rows, -1, room)[row_R, full_R].any(axis=1)
        after_RQS[np.broadcast_to((empty_RS & short_R[:, None])[:, None, :], after_RQS.shape)] = np.inf
    at_R = after_RQS.reshape(rows, -1).argmin(axis=1)
    better_R = after_RQS.reshape(rows, -1)[row_R, at_R] < most_R
    row, at = row_R[better_R], at_R[better_R]
    here, there = full_R[better_R] * room + at // slots, at % slots
    for name in ("expert_RS", "slot_RS"):
        array = getattr(state, name)
        array[row, here], array[row, there] = array[row, there], array[row, here]
    moved = state.slot_RS[row, there] - state.slot_RS[row, here]
    state.load_RG[row, here // room] -= moved
    state.load_RG[row, there // room] += moved
    return np.asarray(better_R)


def _kick(state: _Rows, draw_RU: Ints, room: int) -> None:
    """Change experts and counts of every row at random; loads are those before."""
    rows, slots = state.expert_RS.shape
    empty = state.weight_RE.shape[1] - 1
    row_R = np.arange(rows)
    full_R = state.load_RG.argmax(axis=1)
    full_RS = np.repeat(np.arange(slots // room)[None, :] == full_R[:, None], room, axis=1)
    held_RS = state.expert_RS != empty
    several_RS = np.take_along_axis(state.count_RE, state.expert_RS, 1) > 1
    takes_R = draw_RU[:, 0] < _HALF // 2  # the fullest rank's expert takes a slot, else its slot goes to another expert
    known_R = _nth(np.where(takes_R[:, None], held_RS, several_RS) & full_RS, draw_RU[:, 1])
    other_RS = state.expert_RS != np.take_along_axis(state.expert_RS, known_R[:, None], 1)
    other_RS &= np.where(takes_R[:, None], several_RS, held_RS)
    met_R = _nth(other_RS, draw_RU[:, 2])
    giver_R, taker_R = np.where(takes_R, met_R, known_R), np.where(takes_R, known_R, met_R)
    give_R = (draw_RU[:, 0] < _HALF) & other_RS.any(axis=1) & several_RS[row_R, giver_R] & held_RS[row_R, taker_R]
    row, slot, needy = row_R[give_R], giver_R[give_R], state.expert_RS[row_R, taker_R][give_R]
    state.count_RE[row, state.expert_RS[row, slot]] -= 1
    state.count_RE[row, needy] += 1
    state.expert_RS[row, slot] = needy
    first_R = full_R * room + (draw_RU[:, 1] * room >> 32)
    _trade(state.expert_RS, ~give_R, first_R, draw_RU[:, 2] * slots >> 32, room, empty)
    _trade(state.expert_RS, ~give_R, draw_RU[:, 3] * slots >> 32, draw_RU[:, 4] * slots >> 32, room, empty)


def _nth(mask_RI: NDArray[np.bool_], draw_R: Ints) -> Ints:
    """Position of a drawn one of the true entries of each row."""
    nth_R = draw_R * mask_RI.sum(axis=1) >> 32
    return np.asarray((np.cumsum(mask_RI, axis=1) > nth_R[:, None]).argmax(axis=1))


def _trade(expert_RS: Ints, chosen_R: NDArray[np.bool_], one_R: Ints, other_R: Ints, room: int, empty: int) -> None:
    """Swap two slots of the chosen rows, unless they are of one rank or one is empty."""
    row_R = np.arange(len(expert_RS))
    held_R = (expert_RS[row_R, one_R] != empty) & (expert_RS[row_R, other_R] != empty)
    row = row_R[chosen_R & held_R & (one_R // room != other_R // room)]
    one, other = one_R[row], other_R[row]
    expert_RS[row, one], expert_RS[row, other] = expert_RS[row, other], expert_RS[row, one]


def pack_uneven(weight_RI: Floats, bins: int) -> Ints:
    """As `moesim.placement.eplb.pack` where bins do not divide the items: each takes I // B of them or one more.

    Returns items bin after bin, EMPTY in the last place of a bin that has one fewer: int64 [R, B * ceil(I / B)].
    """
    rows, items = weight_RI.shape
    low, room = items // bins, -(-items // bins)
    order_RI = np.argsort(-weight_RI, axis=1, kind="stable")
    row_R = np.arange(rows)
    load_RB, filled_RB = np.zeros((rows, bins)), np.zeros((rows, bins), np.int64)
    more_R = np.full(rows, items % bins if room > low else bins)
    out_RBQ = np.full((rows, bins, room), EMPTY, np.int64)
    for i in range(items):
        open_RB = (filled_RB < low) | ((filled_RB == low) & (more_R > 0)[:, None] & (room > low))
        bin_R = np.where(open_RB, load_RB, np.inf).argmin(axis=1)
        filled_R = filled_RB[row_R, bin_R]
        out_RBQ[row_R, bin_R, filled_R] = order_RI[:, i]
        more_R -= filled_R == low
        filled_RB[row_R, bin_R] += 1
        load_RB[row_R, bin_R] += weight_RI[row_R, order_RI[:, i]]
    return out_RBQ.reshape(rows, -1)


def better_of(one_LS: Ints, other_LS: Ints, weight_LE: Floats, ctx: PlacementContext) -> Ints:
    """Of two maps, layer by layer, the one whose fullest rank is less full; `one_LS` where they are equal."""
    one_L, other_L = (ctx.placement(table_LS, weight_LE.shape[1]).balance(weight_LE) for table_LS in (one_LS, other_LS))
    return np.where((one_L <= other_L * (1 + 1e-12))[:, None], one_LS, other_LS)
