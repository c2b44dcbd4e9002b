"""The dimensions of a model that the mini-runtime builds: from a small JSON file, or a model file made smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moesim.errors import BadInput, Problem
from moesim.model import MoEModel
from moesim.policy import spec_problems
from moesim.spec import Spec
from moesim.strict_json import load_json

__all__ = ["ALIGN", "ITEM_BYTES", "ModelSizes", "read_sizes", "shrunk", "sizes_from"]

ALIGN = 4096
"""What direct reads begin and end on: a multiple of every logical block size in use."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_MAX_BYTES = 1 << 42
_Count = Annotated[int, Field(ge=1, le=4096)]
_Width = Annotated[int, Field(ge=8, le=1 << 16, multiple_of=8)]


class ModelSizes(Spec):
    """A decoder of `layers` MoE layers: RMS norm, grouped-query attention with rotary positions and a KV cache, RMS
    norm, router, `experts` gated experts of `inner` columns of which a token takes `top_k`, and a shared expert where
    shared_inner is not 0. max_context: tokens that a sequence can have."""

    layers: _Count = 6
    hidden: _Width = 512
    inner: _Width = 256
    experts: Annotated[int, Field(ge=1, le=65_536)] = 32
    top_k: _Count = 4
    shared_inner: Annotated[int, Field(ge=0, le=1 << 16, multiple_of=8)] = 0
    heads: _Count = 8
    kv_heads: _Count = 2
    head_dim: Annotated[int, Field(ge=8, le=1024, multiple_of=2)] = 64
    vocabulary: Annotated[int, Field(ge=2, le=1 << 20)] = 512
    max_context: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"a token takes top_k of the experts: top_k={self.top_k}, experts={self.experts}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads: kv_heads={self.kv_heads}, heads={self.heads}")
        if self.file_bytes > _MAX_BYTES:
            raise ValueError(f"the weights would take {self.file_bytes} bytes; at most {_MAX_BYTES} are written")
        return self

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices."""
        return 3 * self.hidden * self.inner * self.item_bytes

    @property
    def slot_bytes(self) -> int:
        """What one expert takes in the file and in a buffer: whole pages."""
        return -(-self.expert_bytes // ALIGN) * ALIGN

    @property
    def num_keys(self) -> int:
        return self.layers * self.experts

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that is not an expert's, in the order of the file."""
        h, d = self.hidden, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, h)}
        for layer in range(self.layers):
            shapes |= {
                f"{layer}.norm1": (h,),
                f"{layer}.qkv": ((self.heads + 2 * self.kv_heads) * d, h),
                f"{layer}.out": (h, self.heads * d),
                f"{layer}.norm2": (h,),
                f"{layer}.router": (self.experts, h),
            }
            if self.shared_inner:
                shapes |= {f"{layer}.shared13": (2 * self.shared_inner, h), f"{layer}.shared2": (h, self.shared_inner)}
        return shapes | {"norm": (h,), "head": (self.vocabulary, h)}

    @property
    def dense_bytes(self) -> int:
        total = 0
        for shape in self.dense_shapes.values():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total * self.item_bytes

    @property
    def file_bytes(self) -> int:
        """At least; the header apart."""
        return self.num_keys * self.slot_bytes + self.dense_bytes


def sizes_from(values: Any, where: str) -> ModelSizes:
    """Raises BadInput with every problem."""
    if not isinstance(values, dict):
        raise BadInput(Problem(where, "the sizes of a model are a mapping, such as {layers: 4, experts: 16}"))
    try:
        return ModelSizes.model_validate(values)
    except ValidationError as error:
        raise BadInput(spec_problems(error, where, ModelSizes)) from None


def read_sizes(path: Path) -> ModelSizes:
    """From a JSON file of the fields of ModelSizes. Raises BadInput."""
    values, _ = load_json(path)
    return sizes_from(values, str(path))


def shrunk(model: MoEModel, divide: int, dtype: str = "float32", max_context: int = 512) -> ModelSizes:
    """`model` with every width divided by `divide` and rounded up to 8, its MoE layers, experts and top-k as they are.
    Attention becomes grouped-query attention with as many heads, their width divided alike; dense layers are left
    out. Raises BadInput for a dense model."""
    if not model.moe_layers:
        raise BadInput(f"{model.name} is dense: it has no experts to keep elsewhere. Name an MoE model")

    def width(value: int) -> int:
        return max(8, -(-value // (8 * divide)) * 8)

    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    values = {
        "layers": len(model.moe_layers),
        "hidden": width(model.hidden_size),
        "inner": width(model.moe_intermediate_size),
        "experts": model.num_experts,
        "top_k": model.top_k,
        "shared_inner": width(model.shared_intermediate_size) if model.shared_intermediate_size else 0,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width(model.attention.head_dim),
        "vocabulary": max(2, model.vocab_size // divide),
        "max_context": max_context,
        "dtype": dtype,
    }
    return sizes_from(values, f"{model.name} divided by {divide}")
