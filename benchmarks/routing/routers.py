"""How fast every router is, in NumPy alone and compiled: a table on screen and in results/validation/routing_speed.md.

python benchmarks/routing/routers.py [-n 15] [--only KIND]

One call of `route` on float32 scores of 8,192 tokens and 64 experts, K = 8, in training, with the state of the call
before (assignments are T * K, or the choices made where a router makes more of them). The large case is softmax top-k
over 58 layers of 256 experts, scores of each layer in an array of its own. NumPy (`MOESIM_COMPILED=0`, one thread but
for BLAS) and compiled (numba's keys, two threads) take turns; the least of n calls stands, because noise only ever
adds. CPU time, of all threads, tells what a wall time would be on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moesim.policy import load_policy, policy_kinds
from moesim.routing import NONE, Routed, RoutingContext

TABLE = Path(__file__).resolve().parents[2] / "results" / "validation" / "routing_speed.md"
TOKENS, EXPERTS, TOP_K = 8192, 64, 8
LAYERS, WIDE = 58, 256
MODES = {"NumPy": "0", "compiled": "1"} if importlib.util.find_spec("numba") else {"NumPy": "0"}
TARGETS = {"topk": (8, 20), "bip": (2, 2), "sinkhorn": (2, 2)}
"""Million assignments a second in NumPy and compiled; other routers, in one pass, 3."""
LARGE_S = (2.0, 1.0)
WHY = (
    "What costs most in the slower ones: `null_experts` draws a normal number for each null column; `product` compares"
    " sums of the grid in float64, which float32 would round together; `growing_topk` makes a matrix product in float64"
    " and many choices; `bip` sorts rows and columns once for each sweep."
)


def context(**more: object) -> RoutingContext:
    """Everything a router may ask about 8,192 tokens in sequences of 512."""
    token = np.arange(TOKENS)
    return RoutingContext(
        TOP_K, num_groups=8, top_groups=4, seed=1, training=True, progress=0.5, token_T=token * 2_654_435_761 % 50_000,
        sequence_T=token // 512, position_T=token % 512, class_T=token // 512 % 2, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def scores(experts: int, seed: int = 0) -> np.ndarray:
    """Normal scores with experts of unlike popularity, float32 [T, experts]."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (TOKENS, experts)) + 0.5 * rng.normal(0, 1, experts)).astype(np.float32)


def least(calls: dict[str, Callable[[], object]], times: int) -> dict[str, tuple[float, float]]:
    """Least wall and CPU seconds of each of the calls, which take turns under their mode."""
    out = dict.fromkeys(calls, (np.inf, np.inf))
    for turn in range(times + 1):
        for mode, call in calls.items():
            os.environ["MOESIM_COMPILED"] = MODES[mode]
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:  # the first is for compiling
                out[mode] = (min(out[mode][0], wall), min(out[mode][1], cpu))
    return out


def one_layer(kind: str) -> Callable[[], Routed]:
    """A call of `kind` on the scores of one layer, its state carried on."""
    policy, score, state = load_policy("routing", kind), scores(EXPERTS), {}

    def call() -> Routed:
        nonlocal state
        routed = policy.route(score, context(state=state))
        state = routed.state
        return routed

    return call


def all_layers(normalise: bool) -> Callable[[], object]:
    """Softmax top-k over every layer of a DeepSeek-V3-sized model."""
    policy = load_policy("routing", {"kind": "topk", "norm_topk_prob": normalise})
    layers = [scores(WIDE, seed) for seed in range(LAYERS)]
    return lambda: [policy.route(score, context()) for score in layers]


def verdict(value: float, target: float, higher: bool) -> str:
    return "met" if (value >= target if higher else value <= target) else "missed"


def router_rows(kinds: list[str], times: int) -> list[str]:
    """One row a router: milliseconds and million assignments a second."""
    head = "".join(f" {mode} ms | CPU ms | M/s | target | |" for mode in MODES)
    rows = [f"| router |{head}", "|---|" + "--:|--:|--:|--:|---|" * len(MODES)]
    for kind in kinds:
        call = one_layer(kind)
        made = max(TOKENS * TOP_K, int(np.count_nonzero(call().expert_TK != NONE)))
        found = least(dict.fromkeys(MODES, call), times)
        cells = [f"| `{kind}` |"]
        for (wall, cpu), target in zip(found.values(), TARGETS.get(kind, (3, 3)), strict=False):
            rate = made / wall / 1e6
            cells.append(
                f" {wall * 1e3:.2f} | {cpu * 1e3:.2f} | {rate:.1f} | {target} | {verdict(rate, target, True)} |"
            )
        rows.append("".join(cells))
        print(rows[-1], flush=True)
    return rows


def large_rows(times: int) -> list[str]:
    """The large case, with gates normalised over the chosen and with gates of the whole softmax."""
    head = "".join(f" {mode} s | CPU s | target s | |" for mode in MODES)
    rows = [f"| softmax top-k, {TOKENS:,} tokens x {LAYERS} layers x {WIDE} experts |{head}"]
    rows.append("|---|" + "--:|--:|--:|---|" * len(MODES))
    for normalise, name in ((True, "gates normalised over the K"), (False, "gates of the whole softmax")):
        call = all_layers(normalise)
        found = least(dict.fromkeys(MODES, call), times)
        cells = [f"| {name} |"]
        for (wall, cpu), target in zip(found.values(), LARGE_S, strict=False):
            cells.append(f" {wall:.2f} | {cpu:.2f} | {target:g} | {verdict(wall, target, False)} |")
        rows.append("".join(cells))
        print(rows[-1], flush=True)
    return rows


def machine() -> str:
    """The machine and what ran on it, in words."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(": ")[2] if names else platform.processor()
    flags = info.read_text() if info.exists() else ""
    simd = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    numba = importlib.import_module("numba").__version__ if len(MODES) > 1 else "none"
    return (
        f"{os.cpu_count()} cores of {name} ({simd}), {platform.system()} {platform.machine()}, Python"
        f" {platform.python_version()}, NumPy {np.__version__}, numba {numba}; load average"
        f" {os.getloadavg()[0]:.1f} at the start, niceness {os.nice(0)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=15)
    parser.add_argument("--only")
    given = parser.parse_args()
    where = machine()
    kinds = [given.only] if given.only else policy_kinds("routing")
    rows = router_rows(kinds, given.n)
    if given.only:
        return
    text = [
        "# Speed of the routers", "",
        f"`python benchmarks/routing/routers.py -n {given.n}` printed this on {where}. The least of {given.n} calls;"
        " CPU ms are those of all threads.", "",
        f"{TOKENS:,} tokens, {EXPERTS} experts, K = {TOP_K}, float32 scores, one layer; M/s are million assignments"
        " (T * K, or the choices made where a router makes more) a second of wall time. Targets: softmax top-k 8"
        " (20 compiled, two threads), BIP and Sinkhorn 2, other routers 3.", "",
        *rows, "", *large_rows(max(3, given.n // 5)), "", WHY, "",
    ]  # fmt: skip
    TABLE.write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
