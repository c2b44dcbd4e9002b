"""`python -m moesim_kernels.bench.compare_moe --out FILE.json`: the fused Triton layer beside torch's grouped_mm.

Both run in one process on the same weights and rows, each in its own CUDA graph over rotating weights, and are sampled
in turns; before they are timed their results are compared. Beside every time stands the part it reaches of what this
device was just measured to do: bytes at its read or copy bandwidth, operations at its 8192^3 bf16 rate. Needs torch,
triton and numpy alone, and a CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from moesim_kernels.bench import cases, clock, machine
from moesim_kernels.bench.floors import floors
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool, PoolFull

__all__ = ["LAYERS", "Ceilings", "Layer", "Row", "ceilings", "compare", "main", "summary", "table"]

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
QUICK_TOKENS = (1, 16, 256, 4096)
HISTOGRAMS = ("uniform", "zipf:1.2")
SAMPLES, QUICK_SAMPLES = 20, 8
CEILING_BYTES = 4 << 30
CEILING_SIDE = 8192
# Two bf16 results of the same layer, each with three roundings of 2^-8 at most, differ by far less in norm.
MOST_DIFFERENCE = 2.0**-6
LONG_FLOOR_NS = 100_000.0  # below, launches weigh as much as bytes


@dataclass(frozen=True)
class Layer:
    """An MoE layer as one rank sees it: of `ranks` ranks each has `slots` experts and 1/ranks of all rows."""

    name: str
    hidden: int
    intermediate: int
    slots: int
    top_k: int
    ranks: int = 1

    def case(self, tokens: int, histogram: str, backend: str, seed: int) -> Case:
        """The case that times it: `tokens` tokens choose `top_k` of all ranks' experts."""
        rows = -(-tokens * self.top_k // self.ranks)
        shape: dict[str, int | float | str | bool] = {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "slots": self.slots,
            "top_k": self.top_k,
        }
        return Case("moe", shape, {"tokens": tokens, "rows": rows, "histogram": histogram}, "bf16", backend, seed=seed)


LAYERS = (
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("DeepSeek-V3 EP8", 7168, 2048, 32, 8, ranks=8),
)


@dataclass(frozen=True)
class Ceilings:
    """What this device was measured to do: bytes a second (the better of reading and copying), FLOP a second."""

    bytes_per_s: float
    flop_per_s: float


@dataclass
class Row:
    """One layer at one size: floors, and for each back end the median, p25 and p75 of its times, all in ns a call."""

    layer: str
    tokens: int
    rows: int
    histogram: str
    bytes_floor_ns: float
    flop_floor_ns: float
    ns: dict[str, tuple[float, float, float]]
    remarks: dict[str, str]
    difference: dict[str, float]

    def part_of(self, floor_ns: float, backend: str) -> float:
        """floor / measured, 1 being perfect."""
        return floor_ns / self.ns[backend][0]


def ceilings(device: Device, pool: Pool, bytes_: int, side: int, samples: int) -> Ceilings:
    """Measure both ceilings: `bytes_` read, and copied; a product of `side` cubed in bf16."""
    rates = []
    for case in (
        Case("read_bandwidth", {}, {"bytes": bytes_}),
        Case("copy_bandwidth", {}, {"bytes": bytes_}),
        Case("peak_gemm", {}, {"n": side}),
    ):
        sampler = clock.sampler(cases.build(case, device, pool), device, pool)
        ns = float(np.median([sampler.sample()[0] for _ in range(samples)]))
        sampler.close()
        rates.append(floors(case)[case.op == "peak_gemm"] / ns * 1e9)
    return Ceilings(max(rates[:2]), rates[2])


def _configured(name: str) -> AbstractContextManager[Any]:
    """While a back end runs (or its graph is captured), one configuration in place of the choice."""
    if not name:
        return nullcontext()
    from moesim_kernels.ops import triton_moe
    from moesim_kernels.ops.triton_config import CONFIGS

    return patch.object(triton_moe, "choose_config", lambda *sizes: CONFIGS[name])


def compare(
    layer: Layer,
    tokens: int,
    histogram: str,
    backends: tuple[str, ...],
    device: Device,
    ceiling: Ceilings,
    samples: int,
    seed: int = 0,
) -> Row:
    """Time the back ends on one layer, sampled in turns. A back end is a `Case` backend, or triton:CONFIGURATION.

    `difference` is each back end's norm of the deviation from the first one's result, over that result's norm.
    Raises PoolFull where the weights do not fit, and what the operators raise.
    """
    pool = Pool(device)
    first = layer.case(tokens, histogram, backends[0], seed)
    cases.reserve([first], pool)
    prepared, results, samplers = {}, {}, {}
    for backend in backends:
        how, _, configuration = backend.partition(":")
        prepared[backend] = cases.build(layer.case(tokens, histogram, how, seed), device, pool)
        with _configured(configuration):
            out_TH = prepared[backend].run(0)
        results[backend] = out_TH.float().cpu()
        out_TH.fill_(float("nan"))  # all write to the same memory: what the next does not write shows
    for backend in backends:
        with _configured(backend.partition(":")[2]):
            samplers[backend] = clock.sampler(prepared[backend], device, pool)
    taken: dict[str, list[float]] = {backend: [] for backend in backends}
    for turn in range(samples):
        for backend in backends if turn % 2 else reversed(backends):
            taken[backend].append(samplers[backend].sample()[0])
    for sampler in samplers.values():
        sampler.close()
    moved, flop = floors(first)
    truth = results[backends[0]]
    return Row(
        layer.name,
        tokens,
        int(first.size["rows"]),
        histogram,
        moved / ceiling.bytes_per_s * 1e9,
        flop / ceiling.flop_per_s * 1e9,
        {name: tuple(float(q) for q in np.percentile(ns, (50, 25, 75))) for name, ns in taken.items()},  # type: ignore[misc]
        {name: sampler.remark for name, sampler in samplers.items() if sampler.remark},
        {name: float((result - truth).norm() / truth.norm()) for name, result in results.items()},
    )


def table(rows: list[Row]) -> Iterator[str]:
    """Lines: per back end us, the part of the byte floor and of the measured peak, and how many times faster than the
    first back end."""
    backends = list(dict.fromkeys(name for row in rows for name in row.ns))
    width = max([len("DeepSeek-V3 EP8"), *(len(row.layer) for row in rows)])
    cell = max([30, *(len(name) + 2 for name in backends)])
    yield f"{'layer':{width}} {'T':>6} {'rows':>7} {'histogram':9}" + "".join(f" | {name:^{cell}}" for name in backends)
    heads = f"{'us':>9} {'bytes':>6} {'peak':>6} {'ratio':>6}"
    yield " " * (width + 25) + "".join(f" | {heads:{cell}}" for _ in backends)
    for row in rows:
        base = next(iter(row.ns))
        line = f"{row.layer:{width}} {row.tokens:6} {row.rows:7} {row.histogram:9}"
        for name in backends:
            if name not in row.ns:
                line += f" | {'-':^{cell}}"
                continue
            parts = row.part_of(row.bytes_floor_ns, name), row.part_of(row.flop_floor_ns, name)
            ratio = row.ns[base][0] / row.ns[name][0]
            text = f"{row.ns[name][0] / 1e3:9.1f} {parts[0]:6.1%} {parts[1]:6.1%} {ratio:6.2f}"
            line += f" | {text:{cell}}"
        yield line


def summary(rows: list[Row], backend: str) -> Iterator[str]:
    """The least part of the byte floor where that floor is long and the larger one, and each layer's best part of the
    measured peak, for one back end."""
    timed = [row for row in rows if backend in row.ns]
    for histogram in dict.fromkeys(row.histogram for row in timed):
        long = [
            (row.part_of(row.bytes_floor_ns, backend), row)
            for row in timed
            if row.histogram == histogram and row.bytes_floor_ns >= max(LONG_FLOOR_NS, row.flop_floor_ns)
        ]
        if long:
            part, row = min(long, key=lambda pair: pair[0])
            yield f"{backend}, {histogram}: at least {part:.1%} of the byte floor ({row.layer}, T={row.tokens})"
        for name in dict.fromkeys(row.layer for row in timed):
            parts = [
                (row.part_of(row.flop_floor_ns, backend), row.tokens)
                for row in timed
                if (row.layer, row.histogram) == (name, histogram)
            ]
            if parts:
                yield f"{backend}, {histogram}: {name} reaches {max(parts)[0]:.1%} of the peak at T={max(parts)[1]}"


def _wrong(row: Row) -> list[str]:
    """Back ends whose result is not the first one's."""
    return [name for name, value in row.difference.items() if not value <= MOST_DIFFERENCE]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.bench.compare_moe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="fewer token counts and samples")
    parser.add_argument("--sweep", action="store_true", help="also time every fixed configuration of the Triton kernel")
    return parser


def _backends(sweep: bool) -> tuple[str, ...]:
    from moesim_kernels.ops.moe import has_grouped
    from moesim_kernels.ops.triton_config import CONFIGS

    every = tuple(f"triton:{config.name}" for config in CONFIGS.values() if "bf16" in config.items) if sweep else ()
    return (("grouped",) if has_grouped() else ("loop",)) + ("triton", *every)


def _measure(options: argparse.Namespace, device: Device, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole run: ceilings, every row, ceilings again (a device that has slowed down shows)."""
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    before = ceilings(device, Pool(device), CEILING_BYTES, CEILING_SIDE, samples)
    say(f"ceilings: {before.bytes_per_s / 1e12:.2f} TB/s, {before.flop_per_s / 1e12:.0f} TFLOP/s bf16")
    rows: list[Row] = []
    skipped: list[str] = []
    for layer in LAYERS:
        for histogram in HISTOGRAMS:
            for tokens in QUICK_TOKENS if options.quick else TOKENS:
                try:
                    row = compare(layer, tokens, histogram, _backends(options.sweep), device, before, samples)
                except (PoolFull, RuntimeError, ValueError) as error:
                    skipped.append(f"{layer.name}, T={tokens}, {histogram}: {str(error).splitlines()[0][:200]}")
                    say(f"skipped: {skipped[-1]}")
                    continue
                finally:
                    gc.collect()
                rows.append(row)
                say(list(table([row]))[-1] + "".join(f"  WRONG: {name}" for name in _wrong(row)))
    try:
        after = asdict(ceilings(device, Pool(device), CEILING_BYTES, CEILING_SIDE, samples))
    except RuntimeError as error:  # a kernel has broken the device: keep what was measured before
        after = {}
        skipped.append(f"ceilings after: {str(error).splitlines()[0][:200]}")
    for line in (*table(rows), *summary(rows, "triton")):
        say(line)
    return {
        "schema": 1,
        "machine": machine.facts(device),
        "ceilings": {"before": asdict(before), "after": after},
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
        "wrong": [f"{row.layer}, T={row.tokens}, {row.histogram}: {name}" for row in rows for name in _wrong(row)],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code: 0 measured, 1 some result differs or was skipped, 2 this machine or the path cannot do it."""
    options = _parser().parse_args(arguments)
    try:
        import triton  # noqa: F401

        device = Device.find("cuda")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except (ImportError, ValueError, OSError) as error:
        reason = "torch sees no CUDA device" if isinstance(error, ValueError) else str(error)
        print(f"error: comparing the back ends needs a CUDA device, torch and triton: {reason}", file=sys.stderr)
        return 2
    found = _measure(options, device, lambda line: print(line, flush=True))
    partial = options.out.with_name(options.out.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.out)
    print(f"written: {options.out}")
    return 1 if found["wrong"] or found["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
