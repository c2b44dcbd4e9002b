"""The device a rank runs on, and what of its memory may be taken: what does not fit is refused before it is made."""

from __future__ import annotations

from typing import Any

from moesim.dtypes import dtype_bytes
from moesim.errors import BadInput, Infeasible
from moesim.model import MoEModel
from moesim_kernels.bench.pool import Device
from moesim_kernels.ops.block import Heads

__all__ = ["Room", "find_device", "step_bytes"]

_FRACTION = {"cpu": 0.7, "cuda": 0.9}  # of the memory that is free
_REST_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # code, libraries' workspaces, graphs


def find_device(name: str) -> Any:
    """torch's device of a name, made the current one where it is CUDA. Raises BadInput where there is none."""
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        raise BadInput(f"no device {name!r}: cpu, cuda or cuda:N is meant") from None
    if found.type not in _FRACTION:
        raise BadInput(f"steps run on cpu, cuda or cuda:N, not on {name}")
    if found.type == "cuda":
        if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
            raise BadInput(f"torch sees no such CUDA device ({name}); use device cpu, or see that the driver is loaded")
        found = torch.device("cuda", found.index or 0)
        torch.cuda.set_device(found)
    return found


class Room:
    """Free memory of a device. together: processes that take theirs at the same time."""

    def __init__(self, device: Any, threads: int, together: int) -> None:
        self._device, self._threads, self._together = device, threads, together
        self._known_to_fit = 0

    def free_bytes(self) -> int:
        """What may be taken now."""
        import torch

        kind, index = self._device.type, self._device.index or 0
        free = Device.find(kind, self._threads, index, _FRACTION[kind] / self._together).capacity_bytes
        if kind == "cuda":
            free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)  # freed, and kept by torch
        return free - _REST_BYTES[kind]

    def require(self, bytes_: int, what: str) -> None:
        """Raise Infeasible where so much is not there."""
        if bytes_ <= self._known_to_fit:
            return
        free = self.free_bytes()
        if bytes_ > free:
            reason = f"{what} takes {bytes_ / 2**30:.2f} GiB, and {max(free, 0) / 2**30:.2f} GiB are free"
            raise Infeasible([f"{reason}; lower engine.max_num_seqs or max_model_len"], (bytes_ - free) / max(free, 1))

    def require_step(self, bytes_: int, what: str) -> None:
        """The same for what is taken and given back with every step: a smaller one then fits, too."""
        self.require(bytes_, what)
        self._known_to_fit = max(self._known_to_fit, bytes_)


def step_bytes(model: MoEModel, heads: Heads, tokens: int, rows: int, sampled: int) -> int:
    """The most that a step takes besides weights and cache: the rows of its experts as they are gathered, multiplied
    and summed in float32, the states around them, and logits."""
    item = int(dtype_bytes(model.activation_dtype))
    row = model.hidden_size * (2 * item + 8) + 2 * model.moe_intermediate_size * item
    wide = 6 * model.hidden_size + 2 * heads.fused * heads.dim
    wide += 3 * max(model.dense_intermediate_size, model.shared_intermediate_size)
    return rows * row + tokens * wide * item + 8 * sampled * model.vocab_size
