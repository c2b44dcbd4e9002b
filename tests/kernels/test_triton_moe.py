"""The fused Triton layer against float64, on edge cases, for every configuration.

On a CPU the kernels run in Triton's interpreter, which must be chosen before they are decorated: this file runs itself
as a child process (`python test_triton_moe.py bf16`). With a CUDA device the same checks run compiled.
Suffixes: T tokens, E experts, R rows, H hidden, I intermediate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from moesim_kernels.ops.bounds import FP32, Ball, exact, swiglu_ball
from moesim_kernels.ops.reference import moe_reference
from moesim_kernels.ops.triton_config import CONFIGS, Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: FP32}
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}  # half a step below fp16's normals
RUN_SECONDS = 300
PARTS = ("edges", "short", "ragged", "even")
SHORT_ROWS = 19


class Layer(NamedTuple):
    """A layer's inputs, and the expert of each row."""

    hidden_TH: torch.Tensor
    token_R: torch.Tensor
    gate_R: torch.Tensor
    end_E: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    expert_R: torch.Tensor


def layer(counts: list[int], tokens: int, hidden: int, intermediate: int, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Rows by the given counts, each expert's tokens drawn without repetition, in random order."""
    draw = torch.Generator().manual_seed(seed)
    token_R = torch.cat([torch.randperm(tokens, generator=draw)[:count] for count in counts])
    expert_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

    return Layer(
        (normal(tokens, hidden) * hidden**0.5).to(dtype),
        token_R,
        torch.rand(len(token_R), generator=draw) * 2.5,
        torch.tensor(counts).cumsum(0).to(torch.int32),
        normal(len(counts), 2 * intermediate, hidden).to(dtype),
        normal(len(counts), hidden, intermediate).to(dtype),
        expert_R,
    )


def expected(it: Layer) -> Ball:
    """Float64 values, and how far a right kernel may be off: products and sums in fp32, three roundings on the way."""
    dtype = it.hidden_TH.dtype

    def stored(ball: Ball) -> Ball:
        rounded = ball.rounded(UNIT[dtype])
        return Ball(rounded.value, rounded.error + SMALLEST[dtype])

    total = Ball(*torch.zeros(2, *it.hidden_TH.shape, dtype=torch.float64))
    for row, (token, expert) in enumerate(zip(it.token_R.tolist(), it.expert_R.tolist(), strict=True)):
        both = exact(it.hidden_TH[token : token + 1]).matmul(exact(it.w13[expert]).t, 0.0)
        act = stored(swiglu_ball(both, 4 * FP32)[3])
        gate = exact(it.gate_R[row])
        out = stored(act.matmul(exact(it.w2[expert]).t, 0.0).times(gate, FP32))
        total.value[token] += out.value[0]
        # each later addition in fp32 rounds what stands so far: counted once a row, on the magnitudes
        total.error[token] += out.error[0] + 16 * FP32 * out.largest[0]
    return stored(total)


def worst(it: Layer, config: Config | None, device: str, out: torch.Tensor | None = None) -> float:
    """The largest error over its bound, element by element; infinite where the output is not finite."""
    from moesim_kernels.ops.triton_moe import fused_moe

    ball = expected(it)
    reference = moe_reference(it.hidden_TH, it.token_R, it.expert_R, it.gate_R, it.w13, it.w2)
    torch.testing.assert_close(ball.value, reference, rtol=1e-12, atol=1e-12)  # the oracle's values by another road
    args = [tensor.to(device) for tensor in it[:6]]
    got = fused_moe(*args, out, config=config).cpu().double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float(((got - ball.value).abs() / ball.error.clamp_min(1e-300)).max()) if got.numel() else 0.0


def edge_cases(dtype: torch.dtype) -> dict[str, Layer]:
    """Layers at every edge of rows, experts and tokens; widths that no tile divides."""
    return {
        "no token": layer([0, 0, 0], 0, 24, 8, dtype),
        "tokens without a row": layer([0, 0, 0], 3, 24, 8, dtype),
        "one token": layer([0, 1, 1, 0], 1, 40, 24, dtype),
        "one row, one expert": layer([1], 1, 24, 8, dtype),
        "empty experts first, between, last": layer([0, 3, 0, 0, 5, 2, 0], 6, 40, 24, dtype),
        "one expert takes all, and a block is full": layer([0, 0, 32, 0], 32, 24, 8, dtype),
        "one row more than a block": layer([17, 1, 16], 17, 24, 8, dtype),
        "some tokens here, others on other ranks": layer([2, 1, 3, 1], 12, 24, 8, dtype),
        "a token on every one of many experts": layer([1] * 37, 1, 24, 8, dtype),
        "more blocks than a group": layer([5, 1, 20, 3, 0, 2, 1, 1, 9, 4, 1], 20, 24, 8, dtype),
    }


def config_cases(config: Config, dtype: torch.dtype) -> dict[str, Layer]:
    """A block and a bit of one expert: widths of one tile and a bit, with few rows and all, then even widths."""
    up, down = config.up, config.down
    rows = config.block_rows + 3
    ragged = max(down.columns, up.depth) + 8, up.columns // 2 + 8
    even = max(up.depth, down.columns), down.depth * -(-up.columns // 2 // down.depth)
    return {
        "short": layer([3, min(rows, SHORT_ROWS), 0, 2], SHORT_ROWS, *ragged, dtype),
        "ragged": layer([3, rows, 0, 2], rows, *ragged, dtype),
        "even": layer([config.block_rows, 1], config.block_rows, *even, dtype),
    }


def check_all(name: str, device: str, parts: tuple[str, ...] = PARTS) -> list[str]:
    """The checks of one dtype; the failures, each a line. The interpreter takes about 20 ms a program."""
    dtype = DTYPES[name]
    tries = [(label, it, None) for label, it in edge_cases(dtype).items()] if "edges" in parts else []
    configs = [config for config in CONFIGS.values() if name in config.items]
    tries += [
        (f"{c.name}, {label}", it, c) for c in configs for label, it in config_cases(c, dtype).items() if label in parts
    ]
    failures = []
    for label, it, config in tries:
        out = torch.full_like(it.hidden_TH, float("nan"), device=device)
        ratio = worst(it, config, device, out)
        if not ratio <= 1.0:
            failures.append(f"{name}, {label}: error is {ratio:.3g} x its bound")
    return failures


def poison_uninitialised() -> None:
    """torch fills memory that nobody wrote with NaN and the largest integer, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def mend_interpreter() -> None:
    """Triton's interpreter keeps bf16 as bare 16-bit integers: it multiplies those, and cuts where a GPU rounds.
    Widen them to float32 before a product, and round to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_trunc = builder.create_dot, builder.create_fp_trunc

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(x, tl.block_type(tl.float32, list(x.data.shape))) for x in (a, b))
        return plain_dot(self, a, b, *rest)

    def create_fp_trunc(self, x, to):  # type: ignore[no-untyped-def]
        if to.scalar != tl.bfloat16:
            return plain_trunc(self, x, to)
        bits = torch.from_numpy(x.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, to.scalar)

    builder.create_dot, builder.create_fp_trunc = create_dot, create_fp_trunc


def interpreted(name: str, parts: tuple[str, ...]) -> str:
    """What the child process says about the checks of one dtype."""
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root / "kernels"), str(root)])}
    command = [sys.executable, __file__, name, *parts]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if "only 0-dimensional arrays can be converted" in child.stderr:
        pytest.skip("this Triton's interpreter is older than this numpy: they do not work together")
    return child.stdout.strip() if child.returncode == 0 else child.stdout + child.stderr[-3000:]


@pytest.mark.parametrize(("name", "parts"), [("bf16", ("edges", "short")), ("fp32", ("short",))])
def test_interpreted_kernels_are_within_their_bounds(name: str, parts: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    assert interpreted(name, parts) == "all within bounds"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("bf16", PARTS[2:]), ("fp16", PARTS), ("fp32", PARTS)])
def test_the_other_interpreted_configurations_are_too(name: str, parts: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    assert interpreted(name, parts) == "all within bounds"


def test_tensors_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("triton")
    from moesim_kernels.ops.triton_moe import fused_moe

    good = layer([2, 1], 2, 8, 4, torch.float32)
    bad = {
        "w13 must be": good._replace(w13=good.w13[:, :4]),
        "contiguous": good._replace(w2=good.w2.transpose(1, 2).contiguous().transpose(1, 2)),
        "end_E must be": good._replace(end_E=good.end_E.long()),
        "gate_R must be": good._replace(gate_R=good.gate_R[:-1]),
        "float64": good._replace(hidden_TH=good.hidden_TH.double()),
    }
    for message, it in bad.items():
        with pytest.raises(ValueError, match=message):
            fused_moe(*it[:6])
    with pytest.raises(ValueError, match="out must be"):
        fused_moe(*good[:6], torch.empty(3, 8))
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match="CUDA"):
            fused_moe(*good[:6])


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_compiled_kernels_are_within_their_bounds(name: str) -> None:
    poison_uninitialised()
    try:
        assert check_all(name, "cuda") == []
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs_and_repeats_its_bits() -> None:
    from moesim_kernels.ops.triton_moe import fused_moe

    first = layer([40, 0, 7, 90], 90, 264, 136, torch.bfloat16)
    second = layer([3, 80, 50, 4], 90, 264, 136, torch.bfloat16, seed=1)
    held = [tensor.to("cuda") for tensor in first[:6]]
    out = torch.empty_like(held[0])
    fused_moe(*held, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(*held, out)
    for it in (second, first):
        for tensor, value in zip(held, it[:6], strict=True):
            tensor.copy_(value)
        seen = []
        for _ in range(5):
            out.fill_(float("nan"))
            graph.replay()
            seen.append(out.cpu())
        ball = expected(it)
        assert bool(((seen[0].double() - ball.value).abs() <= ball.error).all())
        assert all(torch.equal(seen[0], again) for again in seen[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_uninitialised()
    mend_interpreter()
    found = check_all(sys.argv[1], "cpu", tuple(sys.argv[2:]))
    print("\n".join(found) or "all within bounds")
    sys.exit(bool(found))
