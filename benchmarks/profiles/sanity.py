"""One DeepSeek-V3 MoE layer at EP 32 on the measured H100 profile, operator by operator, beside its roofline floor.

`python benchmarks/profiles/sanity.py` writes results/validation/deepseek_v3_layer.md. Exits 1 if a time lies below
its floor.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from moesim.cost.operators import AttentionShape, MoEShape, Operators, Priced
from moesim.hardware import GRADES, DeviceProfile

ROOT = Path(__file__).resolve().parents[2]
RANKS, NODES, TOP_K, HIDDEN, INTER = 32, 4, 8, 7168, 2048
MLA = AttentionShape("mla", 128, 128, 192, 128, 576, "bf16", "bf16")


class Line(NamedTuple):
    """One operation: its time, and the time that no H100 can beat."""

    name: str
    priced: Priced
    floor_ns: float


def layer(ops: Operators, tokens: int, context: int) -> list[Line]:
    """Operations of a layer on one rank: a decode batch with `context` each, or (0) one prompt of `tokens`."""
    hbm, fp8, bf16 = 3350.0, 1978e3, 989e3
    out = []
    shapes = {"q_a": (1536, HIDDEN), "q_b": (24576, 1536), "kv_a": (576, HIDDEN), "o": (HIDDEN, 16384)}
    shapes |= {"shared gate+up": (2 * INTER, HIDDEN), "shared down": (HIDDEN, INTER)}
    for name, (n, k) in shapes.items():
        floor = max((n * k + 2.0 * tokens * (n + k)) / hbm, 2.0 * tokens * n * k / fp8)
        out.append(Line(f"gemm {name}, fp8_block", ops.gemm(tokens, n, k, "fp8_block"), floor))
    if context:
        floor = max(tokens * context * 1152 / hbm, tokens * context * 2.0 * 128 * 1088 / bf16)
        priced = ops.attention_decode(tokens, tokens * context, MLA)
        out.append(Line(f"MLA decode, context {context}", priced, floor))
    else:
        floor = 2.0 * 128 * 320 * tokens * (tokens + 1) / 2 / bf16
        out.append(Line(f"MLA prefill of {tokens}", ops.attention_prefill(tokens, tokens, MLA), floor))
    rows = tokens * TOP_K
    for slots in (8, 9, 1):
        shape = MoEShape(HIDDEN, INTER, slots, TOP_K, "fp8_block")
        block = ops.moe_block_rows
        padded = -(-rows // (slots * block)) * slots * block
        floor = max(slots * 3.0 * HIDDEN * INTER / hbm, rows * 6.0 * HIDDEN * INTER / fp8)
        out.append(Line(f"MoE, {slots} slots, {rows} rows, even", ops.moe(rows, slots, padded, 0, shape), floor))
    near = tokens * RANKS * (1 - (1 - 1 / RANKS) ** TOP_K) * (RANKS - 1) / RANKS
    far = tokens * (NODES - 1) * (1 - (1 - 1 / NODES) ** TOP_K)
    for name, size in (("dispatch", HIDDEN * (1 + 4 / 128)), ("combine", HIDDEN * 2.0)):
        floor = max(near * size / 450.0, far * size / 50.0)
        out.append(Line(f"{name}, EP 32", ops.all_to_all(near * size, far * size, RANKS, NODES, TOP_K), floor))
    return out


def main() -> None:
    """Print and write the table."""
    path = ROOT / "hw_profiles" / "h100_sxm.yaml"
    ops = Operators(DeviceProfile.from_spec(yaml.safe_load(path.read_text()), path.parent, str(path)))
    text = ["# One DeepSeek-V3 MoE layer at EP 32 on the measured H100 profile", ""]
    text += ["Command: `python benchmarks/profiles/sanity.py`. Floor: datasheet HBM, FLOP and link rates.", ""]
    below = []
    for title, tokens, context in (("Decode, 128 tokens a rank", 128, 4096), ("Prefill, 4,096 tokens a rank", 4096, 0)):
        text += [f"## {title}", "", "| operation | us | floor us | times floor | grade |", "|---|---|---|---|---|"]
        for line in layer(ops, tokens, context):
            us, floor = float(line.priced.ns) / 1e3, line.floor_ns / 1e3
            text.append(
                f"| {line.name} | {us:.1f} | {floor:.1f} | {us / floor:.2f} | {GRADES[int(line.priced.grade)]} |"
            )
            if us < floor * (1 - 1e-9):
                below.append(line.name)
        text.append("")
    print("\n".join(text))
    (ROOT / "results" / "validation" / "deepseek_v3_layer.md").write_text("\n".join(text))
    if below:
        sys.exit(f"below the floor: {', '.join(below)}")


if __name__ == "__main__":
    main()
