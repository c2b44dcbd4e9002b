"""A group of real worker processes that run collectives for a parent (`moesim_kernels.ops.processes`).

The parent needs numpy alone: torch is imported by the workers (`moesim_kernels.ops.collectives` run as a module).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from moesim_kernels.ops.processes import WorkerFailed, Workers

__all__ = ["DTYPES", "EXCHANGES", "OPS", "SPLIT", "Call", "Group", "WorkerFailed"]

EXCHANGES = ("dispatch", "combine")
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_allv", *EXCHANGES)
SPLIT = ("all_to_allv", *EXCHANGES)
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes an element
_MAX_VALUES = 1 << 16


@dataclass(frozen=True)
class Call:
    """One collective over a group of ranks.

    count, in elements: all_reduce the buffer; all_gather and reduce_scatter one rank's part; all_to_all the block
    that a rank sends to each rank, itself included; unused where there are splits. splits: [source rank][destination
    rank] elements of all_to_allv, rows of `width` elements of dispatch and combine (both as dispatch sends them).
    These two exchange tokens (`moesim_kernels.ops.exchange`): slots of a rank, and rows that each token has.
    composed: use the composition of point-to-point sends even where the back end has the primitive (reduce_scatter and
    the all-to-alls). Raises ValueError for anything else.
    """

    op: str
    count: int = 0
    dtype: str = "fp32"
    splits: tuple[tuple[int, ...], ...] = ()
    composed: bool = False
    width: int = 1
    slots: int = 1
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"a collective is one of {', '.join(OPS)}, not {self.op!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.op} runs in {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.count < 0 or any(n < 0 for row in self.splits for n in row):
            raise ValueError(f"{self.op} cannot move a negative number of elements")
        if bool(self.splits) != (self.op in SPLIT):
            raise ValueError(f"splits belong to {', '.join(SPLIT)}, which need them")
        if min(self.width, self.slots, self.top_k) < 1:
            raise ValueError(f"rows, slots and top_k count from 1: {self.width}, {self.slots}, {self.top_k}")
        if any(len(row) != len(self.splits) for row in self.splits):
            raise ValueError("splits are one row and one column a rank")
        if self.composed and self.op in ("all_reduce", "all_gather"):
            raise ValueError(f"{self.op} has no composition: every back end brings it")

    def elements(self, rank: int, ranks: int) -> tuple[int, int]:
        """Elements of the buffer that `rank` of `ranks` gives, and of the one that it ends with."""
        if self.splits:
            if len(self.splits) != ranks:
                raise ValueError(f"splits are for {len(self.splits)} ranks, the group has {ranks}")
            sent, received = sum(self.splits[rank]), sum(row[rank] for row in self.splits)
            if self.op == "dispatch":
                return self.tokens(rank) * self.width, received * self.width
            return (received * self.width, sent * self.width) if self.op == "combine" else (sent, received)
        wide = ranks * self.count
        return {
            "all_reduce": (self.count, self.count),
            "all_gather": (self.count, wide),
            "reduce_scatter": (wide, self.count),
            "all_to_all": (wide, wide),
        }[self.op]

    def tokens(self, rank: int) -> int:
        """Tokens of a rank whose copies a dispatch sends."""
        return -(-sum(self.splits[rank]) // self.top_k)

    def buffer_bytes(self, ranks: int) -> int:
        """Bytes that all ranks together allocate for this call (a source that all_reduce copies from included)."""
        both = sum(sum(self.elements(rank, ranks)) for rank in range(ranks))
        if self.op == "dispatch":
            both += sum(map(sum, self.splits)) * self.width  # the copies
        return both * DTYPES[self.dtype]


class Group(Workers):
    """`ranks` worker processes of `backend` that run collectives.

    native: which collectives the back end brings itself; the others are composed of point-to-point sends.
    buffers_bytes bounds what all calls of the group may allocate together.
    """

    def __init__(
        self, ranks: int, backend: str = "gloo", *, timeout_s: float = 120.0, buffers_bytes: int = 4 << 30
    ) -> None:
        super().__init__("moesim_kernels.ops.collectives", ranks, backend, timeout_s=timeout_s)
        self.buffers_bytes = buffers_bytes
        self._calls: dict[Call, int] = {}
        self.native: dict[str, bool] = {str(op): bool(has) for op, has in self.ready[0]["native"].items()}

    def rank_ns(self, call: Call) -> list[int]:
        """Wall nanoseconds of one execution on each rank, from when it begins; CUDA events with nccl.

        All begin after a barrier. Exchanges of tokens: the mean of several, before each of which the ranks compute for
        some milliseconds, as in a step. Buffers hold random normal values and are allocated at the first use of a call,
        until `release`.
        """
        return [round(sum(end - begin for begin, end in spans) / len(spans)) for spans in self._spans(call)]

    def time_ns(self, call: Call) -> int:
        """Wall nanoseconds of one execution: that of the slowest rank, or of an exchange of tokens from when the last
        rank is there to when the last one has all it gets."""
        if call.op not in EXCHANGES or self.backend == "nccl":
            return max(self.rank_ns(call))
        ns: list[int] = [
            max(end for _, end in spans) - max(begin for begin, _ in spans)
            for spans in zip(*self._spans(call), strict=True)
        ]
        return round(sum(ns) / len(ns))

    def _spans(self, call: Call) -> list[list[tuple[int, int]]]:
        """Begin and end of each execution on each rank."""
        self._admit(call)
        answers = self.ask({"do": "time", "call": asdict(call)}, call.op)
        return [[(int(begin), int(end)) for begin, end in answer["spans"]] for answer in answers]

    def values(self, call: Call, given: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """What each rank ends with when rank r gives given[r] (flat); outputs are poisoned with NaN before."""
        for rank in range(self.ranks):
            need = call.elements(rank, self.ranks)
            if given[rank].size != need[0] or max(need) > _MAX_VALUES:
                raise ValueError(f"rank {rank} gives {need[0]} elements (at most {_MAX_VALUES}): {given[rank].size}")
        requests = [{"do": "values", "call": asdict(call), "given": part.ravel().tolist()} for part in given]
        return [np.array(answer["values"], dtype=np.float32) for answer in self.ask_each(requests, call.op)]

    def release(self, call: Call) -> None:
        """Free the buffers that timing this call took."""
        if self._calls.pop(call, None) is not None and self._end.alive:
            self.ask({"do": "release", "call": asdict(call)}, "release")

    def _admit(self, call: Call) -> None:
        if call in self._calls:
            return
        need = call.buffer_bytes(self.ranks)
        taken = sum(self._calls.values())
        if taken + need > self.buffers_bytes:
            raise ValueError(
                f"the buffers of all calls of a group stay below {self.buffers_bytes} bytes: {taken} are taken and "
                f"{call.op} of {call.count} elements on {self.ranks} ranks needs {need}. Use smaller sizes."
            )
        self._calls[call] = need
