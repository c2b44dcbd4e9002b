"""The folded price of a step is the walk of its layers: `StepPricer` against `moesim.program.play`, touched ranks and
port bytes against Python sets.

The reference knows nothing of folding, of cumulative tables or of whole runs: it walks stage by stage, adds what each
rank does, and lets every meeting start when the last rank is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.cost.bank import _SKEWS, CountExperts
from moesim.cost.experts import LayerPrices, Ports
from moesim.cost.pricer import Batch, Chunk
from moesim.cost.step import StepPricer
from moesim.cost.tokens import TokenExperts
from moesim.cost.touch import touch
from moesim.program import Stage, play, stages
from moesim.rng import generator
from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

Ints = NDArray[np.int64]
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128, 192, 256, 384, 512)
"""sizes at which a bank is priced layer by layer (it interpolates whole steps between them)"""
REQUESTS = 700
MODELS: dict[str, dict[str, Any]] = {
    "leading_dense": {"num_layers": 5, "moe": {"first_dense_layers": 2, "shared_intermediate_size": 64}},
    "interleaved": {"num_layers": 6, "moe": {"first_dense_layers": 0, "layer_step": 2}},
    "window": {"num_layers": 5, "attention": {"window": 40, "layer_pattern": ["window", "window", "full"]}},
}


class Load(NamedTuple):
    """A batch by hand: KV length of each decoding sequence by rank, prompt chunks, ranks that do not decode."""

    lengths: list[list[int]]
    chunks: list[Chunk]
    paused: list[int]
    tick: int

    def tokens_D(self, decode: bool = False) -> Ints:
        """Tokens on each rank, before padding."""
        out = np.array([0 if d in self.paused else len(n) for d, n in enumerate(self.lengths)])
        for chunk in [] if decode else self.chunks:
            out[chunk.rank] += chunk.tokens
        return out

    def sampled_D(self) -> Ints:
        out = self.tokens_D(decode=True)
        for chunk in self.chunks:
            out[chunk.rank] += chunk.last
        return out

    def rows(self, ahead: int) -> list[tuple[int, int, int]]:
        """(request, position, rank) of every token, as the engine lists them: decodes by rank, then chunks."""
        out, request = [], 0
        for d, lengths in enumerate(self.lengths):
            for n in lengths:
                if d not in self.paused:
                    out.append((request, n + ahead, d))
                request += 1
        for c in self.chunks:
            out.extend((c.request, c.start + i, c.rank) for i in range(c.tokens))
        return out

    def batch(self, window: int) -> Batch:
        def tokens() -> tuple[Ints, Ints, Ints]:
            rows = np.array(Load(self.lengths, [], [], 0).rows(0), np.int64).reshape(-1, 3)
            return rows[:, 0], rows[:, 1], rows[:, 2]

        batch = Batch.idle(len(self.lengths), tokens)
        for d, lengths in enumerate(self.lengths):
            growing = sum(n < window for n in lengths)
            batch.set(d, len(lengths), sum(n + 1 for n in lengths), growing, sum(min(n + 1, window) for n in lengths))
        batch.tick = self.tick
        return batch


def draw(ranks: int, total: int, mixed: bool, window: int, seed: int) -> Load:
    """`total` tokens over the ranks; window lengths far enough from saturating for a few steps ahead."""
    rng = generator(seed, "test/program", ranks, total, int(mixed))
    prompts = int(rng.integers(1, total + 1)) if mixed else 0
    lengths: list[list[int]] = [[] for _ in range(ranks)]
    for d in rng.integers(ranks, size=total - prompts).tolist():
        n = int(rng.integers(1, 300))
        lengths[d].append(n if n >= window or n + 8 < window else window)
    chunks, request = [], total - prompts
    while prompts:
        tokens = int(rng.integers(1, prompts + 1))
        start = int(rng.choice([0, int(rng.integers(1, 200))]))
        chunks.append(Chunk(int(rng.integers(ranks)), request, start, tokens, bool(rng.random() < 0.5)))
        prompts -= tokens
        request += 1
    return Load(lengths, chunks, [], int(rng.integers(1000)))


def with_paused(load: Load) -> Load:
    """Ranks with prompts do not decode, as when prompts go first."""
    return load._replace(paused=sorted({c.rank for c in load.chunks if load.lengths[c.rank]}))


def deployment(folder: Path, model: str, dp: int, fidelity: str) -> RunResult:
    """Pricers of a deployment that is stopped at once."""
    parallel = {"tp": 2, "dp": 1, "ep": 2} if dp == 1 else {"dp": dp, "ep": dp}
    requests = {
        "format": "closed_loop", "concurrency": 1, "num_requests": REQUESTS, "prompt_tokens": 20, "output_tokens": 2,
    }  # fmt: skip
    engine = {"max_num_seqs": 512, "max_num_batched_tokens": 512, "graph_batch_sizes": [1, 2, 4, 8, 16],
              "bank_entries": 4, "max_duration_s": 1e-9}  # fmt: skip
    routing = {"fidelity": fidelity, "pool_tokens": 2048, "popularity_zipf": 1.0}
    return simulate(scenario(folder, model, parallel=parallel, requests=requests, engine=engine, routing=routing))


class Reference:
    """Times of one step, layer by layer, from the same operators."""

    def __init__(self, result: RunResult) -> None:
        assert result.layout is not None
        assert result.experts is not None
        self.result, self.layout, self.experts = result, result.layout, result.experts
        self.pricer: StepPricer = result.pricers[0]
        self.model = result.scenario.model
        self.window = max(self.model.window_of_layer)
        dense = self.pricer.dense
        blocks = {"attention": dense._attention(), "dense": dense._dense_block(), "moe": dense._moe_block(),
                  "first": dense._first(), "last": dense._last()}  # fmt: skip
        self.block = {name: np.sum([p.ns_N for p in parts], axis=0) for name, parts in blocks.items()}
        self.head = np.sum([p.ns_N for p in dense._head()], axis=0)

    def step_ns(self, load: Load, ahead: int) -> int:
        """ns of the step `ahead` steps from now."""
        tokens_D = load.tokens_D()
        most = int(tokens_D.max())
        graphs = self.result.scenario.engine.graph_batch_sizes
        padded = next((g for g in graphs if g >= most), None)
        computed_D = np.maximum(tokens_D, 1) if padded is None else np.full_like(tokens_D, padded)
        kernel_D = {kind: self.attention(load, ahead, kind) for kind in ("full", "window")}

        def stage_ns(stage: Stage) -> Ints:
            out = stage.full * kernel_D["full"] + stage.window * kernel_D["window"]
            for name, times in (("attention", stage.full + stage.window), ("dense", stage.dense), ("moe", stage.moe),
                                ("first", int(stage.first)), ("last", int(stage.last))):  # fmt: skip
                out = out + times * self.block[name][computed_D]
            return out

        layers = self.layers(load, ahead)
        spread = self.layout.ranks // self.layout.ep // self.layout.tp if self.layout.meets else 1

        def meeting_ns(layer: int) -> tuple[int, Ints, int]:
            expert_D = np.repeat(layers.expert_LP[layer], spread)
            return int(layers.dispatch[layer]), expert_D, int(layers.combine[layer])

        end_D, idle = play(stages(self.model, self.layout.meets), stage_ns, meeting_ns)
        assert (idle >= 0).all()
        assert (idle.min(axis=1) == 0).all() or self.layout.meets, "somebody never waits"
        alone = 0 if self.layout.meets else int(layers.expert_LP.max(axis=1).sum())
        return int(end_D.max()) + alone + int(self.head[load.sampled_D().max()])

    def attention(self, load: Load, ahead: int, kind: str) -> Ints:
        """One layer's kernel on each rank [D]."""
        table = self.pricer.full if kind == "full" else self.pricer.window
        out = np.zeros(len(load.lengths), np.int64)
        if table is None:
            return out
        for d, lengths in enumerate(load.lengths):
            keys = [n + 1 + ahead if kind == "full" else min(n + 1 + ahead, self.window) for n in lengths]
            if lengths and d not in load.paused:
                out[d] += table.decode_BC[len(lengths), sum(keys) >> table.shift]
        for chunk in load.chunks:
            out[chunk.rank] += table.prefill(chunk.start, chunk.tokens)
        return out

    def layers(self, load: Load, ahead: int) -> LayerPrices:
        moe = self.pricer.moe
        priced = self.from_bank(moe, load, ahead) if isinstance(moe, CountExperts) else self.from_tokens(load, ahead)
        return LayerPrices(*(x[0] for x in priced))

    def from_tokens(self, load: Load, ahead: int) -> LayerPrices:
        """Counts and copies of the very tokens, by hand."""
        layout, placement, replay = self.layout, self.experts.placement, self.experts.replay
        assert replay is not None
        assert placement.max_replicas == 1
        rows = load.rows(ahead)
        ids = self.experts.source.expert_TLK[[int(replay.rows(r, p)) for r, p, _ in rows]]
        slot_TLK = placement.first_slot_LE[np.arange(placement.num_layers)[:, None], ids]
        source = [d * layout.tp + i % layout.tp for i, (_, _, d) in enumerate(rows)]
        count_LS = np.zeros((placement.num_layers, placement.num_slots), np.int64)
        for layer, slot in ((layer, s) for token in slot_TLK for layer, slots in enumerate(token) for s in slots):
            count_LS[layer, slot] += 1
        ports = None
        if layout.exchanges:
            share = np.bincount(source, minlength=layout.ranks).max() / len(rows)
            ports = by_hand(slot_TLK, source, placement.slots_per_rank, layout.ranks, layout.gpus_per_node, share)
        prices = self.experts.prices
        return prices.price(prices.compute(count_LS[None]), np.array([load.tokens_D().max()]), ports)

    def from_bank(self, moe: CountExperts, load: Load, ahead: int) -> LayerPrices:
        """The entry of the bank that this step uses; the busiest rank's share rounded up to a step of _SKEWS."""
        tokens_D, decode = load.tokens_D(), int(load.tokens_D(decode=True).sum())
        total, dp = int(tokens_D.sum()), self.layout.dp
        assert total in GRID
        phase = "prefill" if total - decode > decode else "decode"
        count_BLS, ports = moe._blocks[phase].draw(total, moe._entries, moe._seed, phase)
        entry = int(moe.sequence[load.tick + ahead])
        skew = min(next(s for s in (*_SKEWS, dp) if s >= tokens_D.max() * dp / total), dp) if self.layout.meets else 1.0
        busiest = total / dp * skew
        if ports is not None:
            sent = busiest / self.layout.tp / total
            ports = Ports(*(x[entry : entry + 1].astype(np.float64) for x in ports))
            ports = ports._replace(
                nvlink=np.maximum(ports.nvlink, ports.nvlink_total * sent),
                nic=np.maximum(ports.nic, ports.nic_total * sent),
            )
        return self.experts.prices.price(
            self.experts.prices.compute(count_BLS[entry][None]), np.array([busiest]), ports
        )


@pytest.mark.parametrize("fidelity", ["token", "count"])
@pytest.mark.parametrize("dp", [1, 2, 8, 64])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_step_costs_what_its_layers_cost(tmp_path: Path, name: str, dp: int, fidelity: str) -> None:
    result = deployment(tmp_path, tiny_model(tmp_path, **MODELS[name]), dp, fidelity)
    reference = Reference(result)
    pricer = reference.pricer
    assert isinstance(pricer.moe, TokenExperts if fidelity == "token" else CountExperts)
    for seed, total in enumerate((1, 3, 16, 32, 96, 256)):
        load = draw(dp, total, False, reference.window, seed)
        for lengths in load.lengths:
            pricer.prepare(len(lengths))
        run = pricer.decode(load.batch(reference.window), 3)
        want = [reference.step_ns(load, ahead) for ahead in range(3)]
        assert np.diff(run.cumulative_ns, prepend=0).tolist() == want
    for seed, total in enumerate((2, 8, 24, 64, 128, 384)):
        load = draw(dp, total, True, reference.window, seed)
        for lengths in load.lengths:
            pricer.prepare(len(lengths))
        for one in (load, with_paused(load)):
            if int(one.tokens_D().sum()) not in GRID:
                continue  # the bank interpolates there
            run = pricer.mixed(one.batch(reference.window), one.chunks, one.paused)
            assert run.cumulative_ns.tolist() == [reference.step_ns(one, 0)]


def by_hand(
    slot_TLK: Any, source: list[int], slots_per_rank: int, ranks: int, per_node: int, busiest_share: float
) -> Ports:
    """Busiest ports of an exchange [1, L], from sets: a token goes once to each other rank, once to each other node."""
    layers = len(slot_TLK[0])
    out = np.zeros((4, 1, layers))
    for layer in range(layers):
        into, onto = [0] * ranks, [0] * (-(-ranks // per_node))
        for token, here in zip(slot_TLK, source, strict=True):
            there = {int(s) // slots_per_rank for s in token[layer]} - {here}
            for rank in there:
                into[rank] += 1
            for node in {rank // per_node for rank in there} - {here // per_node}:
                onto[node] += 1
        sent, far = sum(into), sum(onto)
        out[:, 0, layer] = (
            max(max(into), sent * busiest_share), max(max(onto) / per_node, far * busiest_share), sent, far
        )  # fmt: skip
    return Ports(*out)


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 8), (4, 8), (8, 4), (12, 5), (16, 2)])
def test_touch_counts_what_sets_count(ranks: int, per_node: int) -> None:
    rng = generator(ranks, "test/touch")
    layers, top_k, slots_per_rank = 3, 4, 3
    starts = np.array([0, 1, 40, 41, 90])
    edges = [*starts.tolist(), 130]
    slot_TLK = np.argsort(rng.random((130, layers, max(ranks * slots_per_rank, top_k))), axis=-1)[..., :top_k]
    slot_TLK = np.minimum(slot_TLK, ranks * slots_per_rank - 1)
    source = rng.integers(ranks, size=130)
    node_G = np.arange(ranks) // per_node
    found = touch(slot_TLK, source, starts, slots_per_rank, node_G)
    for b in range(len(starts)):
        for layer in range(layers):
            into, onto = [0] * ranks, [0] * int(node_G[-1] + 1)
            for t in range(edges[b], edges[b + 1]):
                there = {int(s) // slots_per_rank for s in slot_TLK[t, layer]} - {int(source[t])}
                for rank in there:
                    into[rank] += 1
                for node in {int(node_G[r]) for r in there} - {int(node_G[source[t]])}:
                    onto[node] += 1
            assert found.in_BLG[b, layer].tolist() == into
            assert found.node_in_BLN[b, layer].tolist() == onto
            assert found.out_BL[b, layer] == sum(into)
            assert found.node_out_BL[b, layer] == sum(onto)


@pytest.mark.parametrize("dp", [8, 16])
@pytest.mark.parametrize("expert_dtype", ["bf16", "fp8_block"])
def test_an_exchange_moves_the_bytes_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: int, expert_dtype: str
) -> None:
    """On one node and on two: bytes through the busiest ports are copies times the bytes of a token, both ways."""
    name = tiny_model(tmp_path)
    result = simulate(
        scenario(
            tmp_path, {"name": name, "expert_dtype": expert_dtype},  # type: ignore[arg-type]
            parallel={"dp": dp, "ep": dp}, routing={"fidelity": "token"},
            requests={"format": "closed_loop", "concurrency": 1, "num_requests": 200, "prompt_tokens": 30,
                      "output_tokens": 2}, engine={"max_duration_s": 1e-9},
        )
    )  # fmt: skip
    reference = Reference(result)
    load = draw(dp, 96, True, 0, 5)
    seen: list[tuple[Any, Any]] = []
    prices = reference.experts.prices
    exchange = prices._ops.all_to_all

    def spy(near: Any, far: Any, *rest: Any) -> Any:
        seen.append((np.asarray(near), np.asarray(far)))
        return exchange(near, far, *rest)

    monkeypatch.setattr(prices._ops, "all_to_all", spy)
    reference.pricer.mixed(load.batch(0), load.chunks, [])
    rows = load.rows(0)
    assert reference.experts.replay is not None
    ids = reference.experts.source.expert_TLK[[int(reference.experts.replay.rows(r, p)) for r, p, _ in rows]]
    placement = reference.experts.placement
    slot_TLK = placement.first_slot_LE[np.arange(placement.num_layers)[:, None], ids]
    source = [d for _, _, d in rows]
    share = np.bincount(source).max() / len(rows)
    ports = by_hand(slot_TLK, source, placement.slots_per_rank, dp, 8, share)
    hidden = result.scenario.model.hidden_size
    there = hidden * (2 if expert_dtype == "bf16" else 1 + 4 / 128)
    assert len(seen) == 2
    for (near, far), size in zip(seen, (there, hidden * 2), strict=True):
        np.testing.assert_allclose(near, ports.nvlink * size, rtol=1e-12)
        np.testing.assert_allclose(far, ports.nic * size, rtol=1e-12)
        assert (far > 0).all() == (dp > 8)
