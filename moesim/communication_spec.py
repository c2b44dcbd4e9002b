"""How ranks exchange tokens and what runs at the same time: the `communication` block of a scenario."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.spec import Spec

__all__ = ["AllToAll", "CommunicationSpec", "Overlap"]

AllToAll = Literal[
    "auto",
    "deepep_normal",
    "deepep_v2",
    "deepep_low_latency",
    "hierarchical",
    "pairwise",
    "allgather_reducescatter",
]
Overlap = Literal["none", "pipeline", "two_batch", "fsmoe"]


class CommunicationSpec(Spec):
    """all_to_all: what carries tokens to their experts and back. `auto`: the faster of DeepEP's two kernels for every
    batch. `deepep_v2`: its later kernels, which do with fewer multiprocessors. `hierarchical`: all-to-all inside a
    node, then between nodes (Tutel's 2DH). `pairwise`: every pair of ranks by itself (NCCL).
    `allgather_reducescatter`: every rank gets all tokens.

    sms: streaming multiprocessors that exchange kernels run on and take from what computes at the same time; None: the
    back end's own. max_dispatch_tokens: tokens a rank that the low-latency kernels' buffers hold at once (larger
    batches are sent in turns). coherent: every rank keeps the context of all requests, so that a layer needs one
    all-to-all and no combine (ExFlow), and new tokens are gathered once a step.

    overlap: what runs during an exchange. `none`; `pipeline`: the tokens of a layer in `degree` chunks whose exchange
    and experts overlap (Tutel, PipeMoE); `two_batch`: two micro-batches, one computes while the other exchanges
    (DeepSeek-V3); `fsmoe`: chunks of which intra-node and inter-node collectives overlap too (FSMoE). degree: chunks,
    None: the best of 1 to 16 for every size.
    """

    all_to_all: AllToAll = "auto"
    sms: Annotated[int, Field(ge=0, le=1024)] | None = None
    max_dispatch_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    coherent: bool = False
    overlap: Overlap = "none"
    degree: Annotated[int, Field(ge=1, le=64)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> CommunicationSpec:
        if self.degree is not None and self.overlap not in ("pipeline", "fsmoe"):
            raise ValueError(
                f"degree counts the chunks of overlap pipeline or fsmoe, and overlap is {self.overlap}; remove degree "
                "or set overlap to pipeline"
            )
        if "max_dispatch_tokens" in self.model_fields_set and self.all_to_all != "deepep_low_latency":
            raise ValueError(
                "max_dispatch_tokens sizes the buffers of all_to_all deepep_low_latency, and all_to_all is "
                f"{self.all_to_all}; remove max_dispatch_tokens or set all_to_all to deepep_low_latency"
            )
        if (
            self.all_to_all in ("deepep_normal", "deepep_v2")
            and self.sms is not None
            and (self.sms < 2 or self.sms % 2)
        ):
            raise ValueError(
                f"sms of {self.all_to_all} must be even and at least 2 (one half sends, one receives), got {self.sms}; "
                "use 20 or 24"
            )
        if self.all_to_all == "deepep_low_latency" and self.sms:
            raise ValueError(
                "sms of deepep_low_latency must be 0, because its hook leaves the transfer to the NICs: got "
                f"{self.sms}; remove sms"
            )
        return self
