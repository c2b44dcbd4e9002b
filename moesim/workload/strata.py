"""Drawing K distinct items with given inclusion probabilities, so that copying a draw copies its items.

Items in some order are laid end to end with lengths equal to their probabilities, which add up to K; slot k
takes the item at k + v for a *latent* v in [0, 1) of its own: stratified systematic sampling (Madow 1949;
Chromy 1979). A border between two slots may cut an item in two pieces. That it is not taken twice is seen to
by keeping the second slot's piece as often as the rule "not both" allows and drawing it anew otherwise, so
that latents mean the same items as far as can be. Legend: N draws, K slots, E items, P pieces, W tilts, C
columns, B bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Strata", "Tilts"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LOW_BITS = 65536.0
_TINY = 1e-12
_MAX_BINS = 256
_ROUNDS = 30
_CLOSE = 1e-3


class Strata:
    """`prob_E`: inclusion probabilities, each at most 1, scaled to add up to `slots`; `order_E`: the items'
    order."""

    def __init__(self, prob_E: Floats, order_E: Ints, slots: int) -> None:
        end = np.cumsum(prob_E[order_E])
        end *= slots / end[-1]
        end[-1] = slots
        self.slots = slots
        self._end_P: Floats = np.sort(np.concatenate([end, np.arange(1, slots)]))
        self._item_P: Ints = order_E[np.searchsorted(end, self._end_P, side="left")]
        self._prob_P: Floats = np.diff(self._end_P, prepend=0.0)
        edge = np.searchsorted(self._end_P, np.arange(1, slots + 1), side="right").tolist()
        self._ranges: list[tuple[int, int]] = list(zip([0, *edge[:-1]], edge, strict=True))

    def pick(self, latent_NK: Floats) -> Ints:
        """The item of each slot, [N, K], all distinct in a draw, for latents in [0, 1).

        Independent uniform latents give exactly the inclusion probabilities. So do slots with one uniform
        latent between them (systematic sampling), which cannot meet at a border.
        """
        piece_NK = np.searchsorted(self._end_P[:-1], latent_NK + np.arange(self.slots), side="right")
        for k in range(1, self.slots):
            second, first = self._ranges[k][0], self._ranges[k][0] - 1
            if self._item_P[second] == self._item_P[first]:
                self._part(k, latent_NK, piece_NK)
        item_NK: Ints = self._item_P[piece_NK]
        return item_NK

    def _part(self, k: int, latent_NK: Floats, piece_NK: Ints) -> None:
        """Settle slot k, in place, where its first piece and the last one of slot k - 1 (settled) are one
        item's.

        With a and b the pieces' lengths, the second is wanted with chance b / (1 - a) when the first is not
        taken and never when it is, the slot's other pieces in proportion.
        """
        second = self._ranges[k][0]
        a, b = float(self._prob_P[second - 1]), float(self._prob_P[second])
        wanted = min(1.0, b / max(1 - a, _TINY))
        v, piece = latent_NK[:, k], piece_NK[:, k]
        taken = piece_NK[:, k - 1] == second - 1
        together = v == latent_NK[:, k - 1]
        # The latent's low bits decide about keeping: the piece depends on its high bits only.
        w = np.modf(v * _LOW_BITS + 0.618 * k)[0]
        clash = np.flatnonzero(taken & (piece == second))
        piece[clash] = self._other(k, w[clash])
        # Not taken: the others give way to the second piece, from (1 - b) down to (1 - wanted).
        stays = (1 - wanted) / max(1 - b, _TINY)
        more = ~taken & ~together & (piece != second) & (w >= stays)
        piece[np.flatnonzero(more)] = second

    def _other(self, k: int, w_M: Floats) -> Ints:
        """Pieces of slot k but its first, in proportion to their lengths."""
        lo, hi = self._ranges[k]
        if hi - lo < 2:
            return np.full(len(w_M), lo)
        cum = np.cumsum(self._prob_P[lo + 1 : hi])
        found = np.searchsorted(cum[:-1], w_M * cum[-1], side="right") + lo + 1
        pieces: Ints = found.astype(np.int64)
        return pieces


class Tilts:
    """W densities over latents in C columns, whose mean over draws is uniform: what groups of tokens share.

    A density is a Dirichlet draw over B bins (a Dirichlet process, Ferguson 1973), so that any item of
    probability p varies from tilt to tilt with variance correlation * p * (1 - p), as expert shares do
    between stretches of recorded text. Items that follow one latent vary together.
    """

    def __init__(self, weight_WCB: Floats, share_W: Floats) -> None:
        """`weight_WCB`: any positive weights; `share_W`: share of the draws that each tilt gets."""
        weight = np.maximum(weight_WCB, 1e-30)
        share = share_W / share_W.sum()
        for _ in range(_ROUNDS):
            weight /= weight.sum(2, keepdims=True)
            mean = np.tensordot(share, weight, 1)
            if np.abs(mean * weight.shape[2] - 1).max() < _CLOSE:
                break
            weight /= np.maximum(mean, 1e-300) * weight.shape[2]
        cum = np.cumsum(weight / weight.sum(2, keepdims=True), axis=2)
        cum[:, :, -1] = 1.0
        tilts, columns, self._bins = weight.shape
        rows = np.arange(tilts * columns).reshape(tilts, columns, 1)
        self._columns = columns
        self._lower = np.concatenate([np.zeros((tilts, columns, 1)), cum[:, :, :-1]], axis=2).ravel()
        self._width = np.diff(cum, axis=2, prepend=0.0).ravel()
        self._flat = (cum + rows).ravel()

    @staticmethod
    def bins(correlation: float, tilts: int) -> int:
        """How many bins the tilts of that number and correlation can tell apart: two over tilts *
        concentration."""
        return int(np.clip((1 - correlation) / correlation * tilts / 2, 8, _MAX_BINS))

    @staticmethod
    def dirichlet(correlation: float, shape: tuple[int, int, int], rng: np.random.Generator) -> Floats:
        """Gamma weights [W, C, B] whose normalised values are Dirichlet with that correlation, 0 <
        correlation < 1.

        Making W tilts uniform in the mean takes variance from each bin: (W - 1) / (W s + 1) is left of 1 / s
        for gamma shape s; the shape is lowered by 1 / W, which leaves (1 - 1 / W) / s of it as for W
        independent draws.
        """
        correlation = max(correlation, 1e-12)  # below it the quotient may leave the floats
        concentration = (1 - correlation) / correlation / shape[2]
        return rng.standard_gamma(max(concentration - 1 / shape[0], concentration / 4), shape) + 1e-30

    def __call__(self, tilt_N: Ints, uniform_NC: Floats) -> Floats:
        """Latents [N, C] with the density of each draw's tilt, from uniform numbers in [0, 1)."""
        row = tilt_N[:, None] * self._columns + np.arange(self._columns)
        uniform = np.minimum(uniform_NC, 1 - 1e-9)
        at = np.searchsorted(self._flat, uniform + row, side="right")
        at = np.clip(at, row * self._bins, row * self._bins + self._bins - 1)
        inside = (uniform - self._lower[at]) / np.maximum(self._width[at], 1e-300)
        latent: Floats = (at - row * self._bins + np.clip(inside, 0.0, 1 - 1e-9)) / self._bins
        return latent
