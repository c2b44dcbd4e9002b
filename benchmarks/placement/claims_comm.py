"""Claims about exchanges: DeepEP's published tables, and where each back end wins.

Nothing of DeepEP's README is fitted but V2's parameters: the profile h100_sxm rests on tables that NVIDIA measured on
H100 (benchmarks/profiles/fit_exchange.py). Its H800 differs by NVLink alone, 400 GB/s both ways together instead of
900, so 200 GB/s one way (README: about 160 of them at best).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import FITTED, MISSED, REPRODUCED, SHAPE, Row, Section, table, within

from moesim.cost.exchange import Ports
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.touch import count_slots, touch
from moesim.hardware import GRADES
from moesim.layout import Layout
from moesim.memory import low_latency_buffer_bytes, rank_memory
from moesim.rng import generator
from moesim.scenario.load import Scenario, scenario_from_dict

SEED = 1
H800_NVLINK = 200.0
WAYS = ("dispatch", "combine")
BANDWIDTH, LATENCY = 0.10, 0.25
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
"""ranks -> GB/s of dispatch and combine; DeepEP V1 README, 4,096 tokens, hidden 7,168, top 8 in top-4 groups"""
QUICK = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
"""ranks -> us of dispatch and combine; the same, 128 tokens, top 8 of 256"""
V2 = (
    ("h100_sxm", 16, 12, (90, 81)),
    ("h100_sxm", 32, 6, (61, 61)),
    ("b200_sxm", 16, 12, (90, 91)),
    ("b200_sxm", 8, 64, (726, 740)),
    ("b200_sxm", 8, 24, (643, 675)),
)
"""device, ranks, SMs, GB/s; DeepEP V2 README, 8,192 tokens, hidden 7,168, top 8"""
DISPATCH_CAPS = (128, 512, 1024, 2048)


class Sent(NamedTuple):
    """One layer's tokens: their slots [T, 1, K], source ranks [T], and the copies that travel."""

    slot_TLK: np.ndarray
    source_T: np.ndarray
    ports: Ports


class Bench:
    """Exchanges of one deployment of whole experts, one rank a data-parallel rank."""

    def __init__(self, model: str, ranks: int, how: str, device: str = "h100_sxm", **more: Any) -> None:
        cluster = {"device": device, "nodes": -(-ranks // 8), "gpus_per_node": min(ranks, 8), **more.pop("cluster", {})}
        self.scenario: Scenario = scenario_from_dict(
            {
                "model": model, "cluster": cluster, "parallel": {"dp": ranks, "ep": ranks},
                "communication": {"all_to_all": how, **more},
                "requests": {"format": "poisson", "rate_per_s": 1.0, "num_requests": 1, "prompt_tokens": 1,
                             "output_tokens": 1},
            },
            Path(__file__).parent,
        )  # fmt: skip
        s = self.scenario
        self.layout = Layout.of(s.model, s.cluster, 1, ranks, ranks, s.communication)
        self.ops = Operators(s.cluster.profile)
        self.spr = s.model.num_experts // ranks
        self.prices = ExpertPrices(s.model, self.layout, self.ops, self.spr)

    def send(self, tokens: int, top_groups: int = 0, own: bool = False) -> Sent:
        """Every rank's `tokens` tokens, experts picked by random scores. top_groups: nodes that a token may use
        (DeepEP's tests/legacy/test_internode.py). own: copies of a mean rank instead of the busiest one, for times that
        ranks take of themselves."""
        model, layout = self.scenario.model, self.layout
        ranks, nodes = layout.ranks, layout.nodes
        rng = generator(SEED, "claims/exchange", ranks, tokens, top_groups)
        ids = []
        for _ in range(ranks):
            score_TE = rng.random((tokens, model.num_experts))
            if 0 < top_groups < nodes:
                best_TN = score_TE.reshape(tokens, nodes, -1).max(axis=2)
                worst = np.argsort(best_TN, axis=1)[:, : nodes - top_groups]
                np.put_along_axis(score_TE.reshape(tokens, nodes, -1), worst[:, :, None], -1.0, axis=1)
            ids.append(np.argpartition(-score_TE, model.top_k - 1, axis=1)[:, : model.top_k])
        slot_TLK = np.concatenate(ids)[:, None].astype(np.int64)
        source_T = np.repeat(np.arange(ranks), tokens)
        node_G = np.arange(ranks) // layout.gpus_per_node
        copies = touch(slot_TLK, source_T, np.zeros(1, np.int64), self.spr, node_G, layout.copies)
        out, far = copies.out_BL.astype(float), copies.node_out_BL.astype(float)
        near_most = np.maximum(copies.in_BLG.max(axis=-1), out / ranks)
        far_most = np.maximum(copies.node_in_BLN.max(axis=-1) / layout.nics_shared, far / ranks)
        most = (out / ranks, far / ranks) if own else (near_most, far_most)
        ports = Ports(*most, out[:, 0], far[:, 0])
        return Sent(slot_TLK, source_T, ports)

    def ns(self, sent: Sent, tokens: int, counts: bool = True) -> tuple[tuple[float, float], str]:
        """Dispatch and combine, and the grade. counts: with the exchange of counts, which DeepEP's tests leave out."""
        ports = sent.ports if self.layout.exchanges else None
        priced = self.prices.exchange.price((1, 1), float(tokens), ports)
        how = self.scenario.communication.all_to_all
        kind = {"deepep_normal": "normal", "deepep_v2": "v2"}.get(how)
        less = 0.0
        if kind is not None and not counts:
            less = self.ops.swaps.notify_ns(kind, self.layout.nodes)  # type: ignore[arg-type]
        times = (float(priced.dispatch_ns[0, 0]) - less, float(priced.combine_ns[0, 0]) - less)
        return times, str(GRADES[int(priced.grade[0, 0])])

    def layer_ns(self, sent: Sent, tokens: int) -> float:
        """Dispatch, the slowest rank's experts, combine."""
        count = count_slots(sent.slot_TLK, np.zeros(len(sent.source_T), np.int64), 1, self.scenario.model.num_experts)
        ports = sent.ports if self.layout.exchanges else None
        priced = self.prices.price(self.prices.compute(count), np.array([float(tokens)]), ports)
        return float(priced.dispatch[0, 0] + priced.experts[0, 0] + priced.combine[0, 0])


def logical_bytes(bench: Bench, sent: Sent, way: str) -> float:
    """What DeepEP's tests divide by the time: a rank's copies, one a node (one a rank on a single node), those that
    stay included; fp8 with scales or bf16."""
    place_TK = sent.slot_TLK[:, 0] // bench.spr
    if bench.layout.nodes > 1:
        place_TK = place_TK // bench.layout.gpus_per_node
    ordered = np.sort(place_TK, axis=1)
    copies = len(ordered) + int((ordered[:, 1:] != ordered[:, :-1]).sum())
    exchange = bench.prices.exchange
    width = exchange.dispatch_bytes if way == "dispatch" else exchange.combine_bytes
    return copies / bench.layout.ranks * width


def normal_rates(ranks: int, own: bool = True) -> tuple[list[float], str]:
    """GB/s of dispatch and combine as DeepEP V1 counts them, on the H800-like cluster, with the 24 SMs of its test.
    own: by the mean rank's own time, as its tests do, instead of the busiest one's."""
    bench = Bench("deepseek-v3", ranks, "deepep_normal", cluster={"nvlink_gb_per_s": H800_NVLINK}, sms=24)
    sent = bench.send(4096, top_groups=4, own=own)
    times, grade = bench.ns(sent, 4096, counts=False)
    return [logical_bytes(bench, sent, way) / ns for way, ns in zip(WAYS, times, strict=True)], grade


def quick_us(ranks: int) -> tuple[list[float], str]:
    """us of dispatch and combine of 128 tokens a rank, on the H800-like cluster."""
    bench = Bench("deepseek-v3", ranks, "deepep_low_latency", cluster={"nvlink_gb_per_s": H800_NVLINK})
    times, grade = bench.ns(bench.send(128, own=True), 128)
    return [ns / 1e3 for ns in times], grade


def v2_rates(device: str, ranks: int, sms: int) -> list[float]:
    """GB/s of dispatch and combine as DeepEP V2 counts them."""
    bench = Bench("deepseek-v3", ranks, "deepep_v2", device, sms=sms, cluster={"nic_gb_per_s": 50.0})
    sent = bench.send(8192, own=True)
    times, _ = bench.ns(sent, 8192, counts=False)
    return [logical_bytes(bench, sent, way) / ns for way, ns in zip(WAYS, times, strict=True)]


def _verdict(ours: Sequence[float], claim: Sequence[float], tolerance: float) -> bool:
    return all(within(a, b, tolerance) for a, b in zip(ours, claim, strict=True))


def _pair(values: Sequence[float], unit: str) -> str:
    return " / ".join(f"{v:.0f}" for v in values) + f" {unit}"


def deepep_v1() -> Section:
    """Both tables of V1's README."""
    rows, lines = [], []
    for ranks, claim in NORMAL.items():
        ours, grade = normal_rates(ranks)
        good = _verdict(ours, claim, BANDWIDTH)
        rows.append(
            Row("DeepEP V1, normal kernels", f"EP {ranks}, H800, 4,096 tokens, top 8, top-4 groups, 24 SMs",
                "nothing; of two readings of a rank's time its tests' own",
                _pair(claim, "GB/s"), _pair(ours, "GB/s"), REPRODUCED if good else MISSED,
                _busiest(ranks, claim) if ranks == 8 else "", "both within 10 %")
        )  # fmt: skip
        lines.append((f"normal, EP {ranks}", _pair(claim, "GB/s"), _pair(ours, "GB/s"), _errors(ours, claim), grade))
    for ranks, claim in QUICK.items():
        us, grade = quick_us(ranks)
        good = _verdict(us, claim, LATENCY)
        rows.append(
            Row("DeepEP V1, low-latency kernels", f"EP {ranks}, H800, 128 tokens, top 8 of 256", "nothing",
                _pair(claim, "us"), _pair(us, "us"), REPRODUCED if good else MISSED, asked="both within 25 %")
        )  # fmt: skip
        lines.append((f"low latency, EP {ranks}", _pair(claim, "us"), _pair(us, "us"), _errors(us, claim), grade))
    said = (
        "The profile was fitted to NVIDIA's tables of H100 (normal kernels on 1, 2, 4 nodes; low latency on 1, 2, 4, 8)"
        f" and asked for an H800: NVLink {H800_NVLINK:.0f} GB/s one way instead of 450, all else the same. No row here"
        " was used. Tokens are drawn as DeepEP's own tests draw them and their copies counted by the simulator; bytes"
        " are divided by time as those tests do: a rank's own by its own time, copies that stay on it count, the"
        " exchange of counts does not. EP 64 of the normal kernels and EP 128, 256 of the others lie beyond any node"
        " count measured."
    )
    return Section(
        "deepep", "DeepEP V1's tables", rows, [said, "", *table(("case", "claim", "ours", "off", "grade"), lines)]
    )


def _busiest(ranks: int, claim: Sequence[float]) -> str:
    """What the same row would be by the time of the rank that a step waits for."""
    off = _errors(normal_rates(ranks, own=False)[0], claim)
    return (
        f"a mean rank's bytes by its own time, as DeepEP's tests divide them, which was settled on with both figures"
        f" known: by the busiest rank's time, which a step waits for, EP {ranks} would be off by {off}"
    )


def _errors(ours: Sequence[float], claim: Sequence[float]) -> str:
    return " / ".join(f"{100 * (a / b - 1):+.1f} %" for a, b in zip(ours, claim, strict=True))


def deepep_v2() -> Section:
    """V2's table, whose rows its parameters were read off."""
    rows = []
    for device, ranks, sms, claim in V2:
        ours = v2_rates(device, ranks, sms)
        good = _verdict(ours, claim, BANDWIDTH)
        fitted = "SM rates, NVLink and NIC shares of V2"
        rows.append(
            Row("DeepEP V2", f"{device}, EP {ranks}, 8,192 tokens, {sms} SMs", fitted, _pair(claim, "GB/s"),
                _pair(ours, "GB/s"), FITTED if good else MISSED, asked="both within 10 %")
        )  # fmt: skip
    said = "It is the table that V2's parameters were read off: nothing is predicted here."
    return Section("deepep_v2", "DeepEP V2's table", rows, [said, ""])


BACK_ENDS = ("allgather_reducescatter", "deepep_normal", "deepep_low_latency", "pairwise")
SIZES = (8, 32, 128, 512, 2048, 8192)


def wins(model: str, device: str, ranks: int) -> dict[int, dict[str, tuple[float, float]]]:
    """tokens a rank -> back end -> us of the exchange, and of the whole layer's dispatch, experts and combine."""
    out: dict[int, dict[str, tuple[float, float]]] = {tokens: {} for tokens in SIZES}
    for how in BACK_ENDS:
        bench = Bench(model, ranks, how, device)
        for tokens in SIZES:
            sent = bench.send(tokens)
            (there, back), _ = bench.ns(sent, tokens)
            out[tokens][how] = ((there + back) / 1e3, bench.layer_ns(sent, tokens) / 1e3)
    return out


def back_ends() -> Section:
    """Question 10: which all-to-all, and where all-gather with reduce-scatter wins."""
    lines: list[str] = []
    found = {}
    deployments = (("qwen3-30b-a3b", "b200_sxm", 4), ("deepseek-v3", "h100_sxm", 8), ("deepseek-v3", "h100_sxm", 32))
    for model, device, ranks in deployments:
        sizes = wins(model, device, ranks)
        found[ranks] = sizes
        lines += [f"{model} on {ranks} {device}, us of dispatch and combine (with the experts between them):", ""]
        cells = []
        for tokens, by in sizes.items():
            fastest = min((layer, how) for how, (_, layer) in by.items())[1]
            cells.append((tokens, *(f"{a:.0f} ({b:.0f})" for a, b in by.values()), fastest))
        lines += table(("tokens a rank", *BACK_ENDS, "fastest layer"), cells)
    large = found[4][8192]
    small = found[4][8]
    faster = large["allgather_reducescatter"][1] < min(large["deepep_normal"][1], large["pairwise"][1])
    quick = small["deepep_low_latency"][0] < small["allgather_reducescatter"][0]
    ratio = large["deepep_normal"][0] / large["allgather_reducescatter"][0]
    rows = [
        Row("vLLM #42254", "4 B200, long prompts: 8,192 tokens a rank, Qwen3-30B-A3B's layer", "nothing",
            "all-gather/reduce-scatter much faster than DeepEP and NCCL's all-to-all",
            f"exchange {ratio:.2f} times as fast as DeepEP's normal kernels", SHAPE if faster else MISSED,
            "the post names no model; DeepEP's 20 SMs carry 0.3 TB/s where NVLink has 0.9, and 4 ranks hold nearly "
            "every token's experts anyway", "the layer is faster than with both"),
        Row("vLLM #42254", "4 B200, short prompts: 8 tokens a rank", "nothing",
            "DeepEP is faster when prompts are small",
            f"{small['deepep_low_latency'][0]:.0f} us against {small['allgather_reducescatter'][0]:.0f} us",
            SHAPE if quick else MISSED,
            "NVIDIA's table of B200 gives DeepEP's low-latency kernels 20 us a direction however few the tokens, twice "
            "the H100's; the post times whole requests and does not say what else changed",
            "the low-latency exchange is the faster one"),
    ]  # fmt: skip
    return Section("back_ends", "Which all-to-all wins where", rows, lines)


def dispatch_caps() -> Section:
    """Question 11: what a cap on dispatched tokens costs in memory."""
    cells = []
    for cap in DISPATCH_CAPS:
        bench = Bench("deepseek-v3", 16, "deepep_low_latency", max_dispatch_tokens=cap)
        s = bench.scenario
        memory = rank_memory(s.model, s.cluster, bench.layout, s.engine, bench.spr)
        size = low_latency_buffer_bytes(cap, 7168, 16, 256)
        cells.append(
            (
                cap,
                f"{size / 2**30:.2f}",
                f"{memory.kv_cache / 2**30:.1f}",
                "yes" if memory.kv_units > s.model.num_layers else "no",
            )
        )
    lines = [
        "DeepEP's low-latency buffers (its own size hint) and what is left for KV, DeepSeek-V3 on 16 H100 of 80 GiB, "
        "16 experts a rank:",
        "",
        *table(("max_dispatch_tokens", "buffers GiB", "KV GiB", "fits"), cells),
    ]
    return Section("dispatch_caps", "Which cap on dispatched tokens fits", [], lines)


def sections() -> list[Section]:
    """All of this file's."""
    return [deepep_v1(), deepep_v2(), back_ends(), dispatch_caps()]


if __name__ == "__main__":
    for section in sections():
        print(f"\n## {section.title}\n")
        for row in section.rows:
            print(f"{row.verdict:12} {row.paper}: {row.setup}: {row.claim} -> {row.ours}")
        print("\n".join(section.lines))
