"""The fused MoE kernel's few fixed configurations and the choice between them. Pure Python: needs no torch, no triton.

There is no autotuner: each configuration is compiled at most once a process, and the choice is a function of sizes
that the host knows without asking the device (rows, slots, widths), so it is the same in a captured graph.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CONFIGS",
    "HOPPER_SHARED_BYTES",
    "ITEM_BYTES",
    "Config",
    "Tile",
    "active_slots",
    "choose_config",
    "most_blocks",
]

HOPPER_SHARED_BYTES = (
    227 * 1024
)  # what one block may have on compute capability 9.0 (CUDA programming guide, table of limits)
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile: columns of the weight, depth of one step along the reduction, warps, and pipeline stages."""

    columns: int
    depth: int
    warps: int
    stages: int

    def buffer_bytes(self, block_rows: int, item_bytes: int) -> int:
        """Shared memory, in bytes, of the pipeline's buffers for both operands on Hopper; elsewhere no more.

        Blocks of 64 rows and more of two-byte numbers are multiplied from shared memory itself (wgmma), which holds a
        buffer until the product is done; smaller blocks are read into registers first and need one buffer less.
        """
        buffers = self.stages if block_rows >= 64 and item_bytes == 2 else self.stages - 1
        return buffers * (block_rows + self.columns) * self.depth * item_bytes


@dataclass(frozen=True)
class Config:
    """Rows of a block (shared by both GEMMs, so one block map serves them), and the tile of each GEMM.

    `up.columns` counts gate and up columns together: a tile makes `up.columns // 2` intermediate channels.
    """

    name: str
    block_rows: int
    up: Tile
    down: Tile
    items: tuple[str, ...]

    def buffer_bytes(self, dtype: str) -> int:
        """The larger of both GEMMs' pipeline buffers, in bytes."""
        return max(tile.buffer_bytes(self.block_rows, ITEM_BYTES[dtype]) for tile in (self.up, self.down))


_HALF = ("bf16", "fp16")
# Up to 64 rows the layer is bound by reading weights: two blocks fit on a multiprocessor, so that one loads while the
# other starts or ends, and a tile is wide against its rows, because the rows come from L2 again for every column tile.
# From 128 rows on it is bound by the tensor cores: 64 x 256 of accumulators for each group of four warps.
CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        Config("thin16", 16, Tile(32, 256, 4, 5), Tile(32, 256, 4, 5), _HALF),
        Config("rows16", 16, Tile(128, 128, 4, 4), Tile(128, 128, 4, 4), _HALF),
        Config("rows32", 32, Tile(128, 64, 4, 5), Tile(128, 64, 4, 5), _HALF),
        Config("rows64", 64, Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), _HALF),
        Config("rows128", 128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), _HALF),
        Config("wide128", 128, Tile(256, 64, 8, 4), Tile(256, 64, 8, 4), _HALF),
        Config("single16", 16, Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), ("fp32",)),
        Config("single64", 64, Tile(64, 16, 4, 3), Tile(64, 16, 4, 3), ("fp32",)),
    )
}
# The most mean rows of an active expert for which a block of so many rows is taken. Counts under even routing are
# nearly Poisson: at these means fewer than one expert in twenty needs a second block and reads its weights twice.
_MOST_MEAN = (("rows16", 10.0), ("rows32", 22.0), ("rows64", 50.0))


def active_slots(rows: int, slots: int) -> float:
    """Expected number of slots with at least one of `rows` rows, each row's slot drawn evenly: E (1 - (1 - 1/E)^R)."""
    return slots * (1.0 - (1.0 - 1.0 / slots) ** rows) if slots > 1 else float(min(rows, 1))


def most_blocks(rows: int, slots: int, block_rows: int) -> int:
    """The most blocks that any split of `rows` rows over `slots` experts can need; a block serves one expert.

    An active expert's first row opens a block and every further `block_rows` rows another, hence a + (R - a) // BM
    for `a` active experts, which is largest with as many active experts as can be.
    """
    active = min(rows, slots)
    return active + (rows - active) // block_rows


def choose_config(
    rows: int,
    slots: int,
    hidden: int,
    intermediate: int,
    dtype: str,
    sm_count: int,
    shared_bytes: int = HOPPER_SHARED_BYTES,
) -> Config:
    """The configuration for `rows` rows over `slots` experts of width `hidden` x `intermediate`.

    dtype: "bf16", "fp16" or "fp32". sm_count: multiprocessors of the device. shared_bytes: what one block may have
    there. Raises ValueError for another dtype, or a size below one.
    """
    if dtype not in ITEM_BYTES:
        raise ValueError(f"the fused kernel computes in {', '.join(ITEM_BYTES)}: got {dtype!r}. Convert the tensors.")
    sizes = {"rows": rows, "slots": slots, "hidden": hidden, "intermediate": intermediate, "sm_count": sm_count}
    if min(sizes.values()) < 1:
        raise ValueError(f"sizes must be at least 1: got {sizes}.")
    active = active_slots(rows, slots)
    mean = rows / active
    if dtype == "fp32":
        return CONFIGS["single16" if mean <= _MOST_MEAN[0][1] else "single64"]
    name = next((name for name, most in _MOST_MEAN if mean <= most), "wide128")
    config = CONFIGS[name]
    too_large = config.buffer_bytes(dtype) > shared_bytes
    if name == "rows16":
        tiles = active * -(-intermediate // (config.up.columns // 2))
        return CONFIGS["thin16"] if too_large or tiles < 2 * sm_count else config
    if name == "wide128":
        tiles = rows / config.block_rows * -(-hidden // config.down.columns)
        return CONFIGS["rows128"] if too_large or tiles < sm_count else config
    return config
