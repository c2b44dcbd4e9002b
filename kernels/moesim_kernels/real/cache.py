"""A rank's KV cache: for each layer one tensor of keys and values, a row for each sequence.

The memory of a layer is cut into rows of `context` tokens by `arrange`. What a request has in the cache and was not
computed here (the prompt of a step that stands alone) is drawn: a pure function of (seed, layer, request, position).

Suffixes: S sequences, G key-value heads, C context a row has room for, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.errors import BadInput
from moesim.rng import generator
from moesim_kernels.ops.block import Heads
from moesim_kernels.real.weights import Values

__all__ = ["KvCache", "layer_bytes"]

_LAYER_STRIDE = 1_000_003  # between the drawn tokens of two layers


def layer_bytes(heads: Heads, item_bytes: int, tokens: int) -> int:
    """Bytes of one layer's cache of so many tokens."""
    return 2 * tokens * heads.kv * heads.dim * item_bytes


class KvCache:
    """Rows of requests. `layers`: [2, S, G, C, D] each, keys first. length: tokens of each request that stand there."""

    def __init__(self, layers: int, heads: Heads, tokens: int, values: Values, dtype: Any) -> None:
        """tokens: room of each layer. The memory is filled with numbers, so that nothing read is NaN."""
        import torch

        self._heads, self._values, self._dtype, self.tokens = heads, values, dtype, tokens
        block = values.block(dtype)
        size = 2 * tokens * heads.kv * heads.dim
        self._flat = [torch.empty(size, dtype=dtype, device=values.device) for _ in range(layers)]
        for flat in self._flat:
            for at in range(0, size, block.numel()):
                flat[at : at + block.numel()].copy_(block[: min(block.numel(), size - at)])
        self._token_XM = block[: block.numel() // (2 * heads.kv * heads.dim) * (2 * heads.kv * heads.dim)].view(
            -1, 2 * heads.kv * heads.dim
        )
        self.layers: list[Any] = []
        self.sequences = self.context = 0
        self.row_of: dict[int, int] = {}
        self.length: dict[int, int] = {}
        self._free: list[int] = []

    def arrange(self, sequences: int, context: int) -> None:
        """Cut the memory anew, which forgets every request. Raises BadInput where it is too small."""
        if sequences < 1 or context < 1 or sequences * context > self.tokens:
            raise BadInput(
                f"a cache of {sequences} sequences of {context} tokens takes {sequences * context:,} tokens, and there "
                f"is room for {self.tokens:,}; make the cache larger (engine.max_num_seqs, engine.max_model_len)"
            )
        self.sequences, self.context = sequences, context
        shape = (2, sequences, self._heads.kv, context, self._heads.dim)
        used = 2 * sequences * context * self._heads.kv * self._heads.dim
        self.layers = [flat[:used].view(shape) for flat in self._flat]
        self.row_of, self.length = {}, {}
        self._free = list(range(sequences))

    def rows(self, requests: Sequence[int]) -> list[int]:
        """The row of each request; new ones take the lowest free rows in their order. Raises BadInput when full."""
        new = [r for r in dict.fromkeys(requests) if r not in self.row_of]
        if len(new) > len(self._free):
            raise BadInput(
                f"{len(self.row_of) + len(new)} sequences at once, and the KV cache has rows for {self.sequences}; "
                "raise engine.max_num_seqs, or forget requests that have ended"
            )
        for request in new:
            self.row_of[request] = self._free.pop(0)
            self.length[request] = 0
        return [self.row_of[r] for r in requests]

    def extend(self, request: int, start: int, stop: int) -> None:
        """The step computes tokens start .. stop - 1: those before that are missing are drawn. Raises BadInput where
        the row is too short."""
        if stop > self.context:
            raise BadInput(
                f"request {request} has {stop} tokens, and a row of the KV cache has room for {self.context}; raise "
                "engine.max_model_len"
            )
        have = self.length[request]
        if have < start:
            self._draw(request, have, start)
        self.length[request] = stop

    def _draw(self, request: int, start: int, stop: int) -> None:
        import torch

        row, heads = self.row_of[request], self._heads
        first = int(generator(self._values.seed, "real/kv", request).integers(1 << 40))
        position = torch.arange(start, stop, device=self._token_XM.device)
        for number, layer in enumerate(self.layers):
            at = (position + first + number * _LAYER_STRIDE) % self._token_XM.shape[0]
            drawn = self._token_XM.index_select(0, at).view(-1, 2, heads.kv, heads.dim)
            layer[:, row, :, start:stop] = drawn.permute(1, 2, 0, 3)

    def forget(self, request: int) -> None:
        """Free a request's row."""
        if request in self.row_of:
            self._free.append(self.row_of.pop(request))
            self._free.sort()
            del self.length[request]
