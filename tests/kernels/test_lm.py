"""The small language model: its parts against plain references, a few steps of training, a trace written and read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from moesim.model import ModelSpec, MoEModel
from moesim.traces import routing_npz

torch = pytest.importorskip("torch")
from moesim_kernels.lm import __main__ as command  # noqa: E402  needs torch
from moesim_kernels.lm import text as lm_text  # noqa: E402
from moesim_kernels.lm.methods import METHODS, Router  # noqa: E402
from moesim_kernels.lm.model import Cache, LanguageModel, Sizes, grouped_experts  # noqa: E402
from moesim_kernels.lm.record import DECODE, PREFILL, record, save_trace  # noqa: E402
from moesim_kernels.lm.store import load_model, save_run, settings  # noqa: E402
from moesim_kernels.lm.train import Course, max_violations, train  # noqa: E402
from moesim_kernels.routers import NONE, Choice, softmax_topk  # noqa: E402

TINY = Sizes(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=4, top_k=2, intermediate=16, context=64)
SHORT = Course(steps=25, sequences=4, length=32, peak_rate=1e-2, warm_up_steps=2, held_out_sequences=8)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    for i in range(90):
        lines = [f"def function_{i}_{j}(value):\n    return value + {i * j}\n" for j in range(60)]
        (folder / f"module_{i}.py").write_text("".join(lines))
    return lm_text.load_text(folder)


@pytest.fixture(scope="module")
def trained(text):
    return train(text, "loss_free", TINY, SHORT)


# ------------------------------------------------------------------------------------------------------- text


def test_text_is_the_same_every_time_and_held_out_files_are_not_trained_on(tmp_path):
    for name in ("a.py", "b.py", "c.py", "d/e.py", "test/f.py", "small.py", *(f"m{i}.py" for i in range(30))):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x" if name == "small.py" else f"# {name}\n" * 600)
    first, again = lm_text.load_text(tmp_path), lm_text.load_text(tmp_path)
    assert first.digest == again.digest
    assert first.files == 34, "tests and small files are left out"
    named = [{line for line in part.tobytes().split(b"\n") if b"#" in line} for part in (first.train, first.held_out)]
    clean = [{line.lstrip(b"\0") for line in part} for part in named]
    assert clean[0]
    assert clean[1]
    assert not clean[0] & clean[1]


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        lm_text.load_text(tmp_path)


def test_batches_hang_on_seed_and_step_alone(text):
    np.testing.assert_array_equal(lm_text.batch(text.train, 3, 8, 1, 5), lm_text.batch(text.train, 3, 8, 1, 5))
    assert (lm_text.batch(text.train, 3, 8, 1, 5) != lm_text.batch(text.train, 3, 8, 1, 6)).any()
    assert lm_text.windows(text.held_out, 5, 8).shape == (5, 9)


def test_unigram_entropy_of_two_even_bytes_is_log_2():
    assert lm_text.unigram_entropy(np.array([1, 2, 1, 2], np.uint8)) == pytest.approx(np.log(2))


# ------------------------------------------------------------------------------------------------------ model


def test_grouped_experts_are_the_sum_over_each_tokens_experts():
    draws = torch.Generator().manual_seed(1)
    hidden_TH, w13, w2 = (
        torch.randn(*shape, generator=draws, dtype=torch.float64, requires_grad=True)
        for shape in [(9, 6), (4, 10, 6), (4, 6, 5)]
    )
    expert_TK = torch.tensor([[0, 3], [1, NONE], [NONE, NONE], [3, 0], [2, 1], [2, NONE], [0, 1], [3, 2], [1, 0]])
    gate_TK = torch.rand(9, 2, generator=draws, dtype=torch.float64) * (expert_TK != NONE)
    plain_TH = torch.zeros(9, 6, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            e = int(expert_TK[t, k])
            if e != NONE:
                gate, up = (w13[e] @ hidden_TH[t]).chunk(2)
                plain_TH[t] = plain_TH[t] + gate_TK[t, k] * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    out_TH = grouped_experts(hidden_TH, Choice(expert_TK, gate_TK), w13, w2)
    torch.testing.assert_close(out_TH, plain_TH)
    assert (out_TH[2] == 0).all()
    grads = torch.autograd.grad(out_TH.square().sum(), (hidden_TH, w13, w2))
    plain = torch.autograd.grad(plain_TH.square().sum(), (hidden_TH, w13, w2))
    for one, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_nobody_routed_is_zero_work():
    nothing = Choice(torch.full((3, 2), NONE), torch.zeros(3, 2))
    assert (grouped_experts(torch.ones(3, 6), nothing, torch.ones(4, 10, 6), torch.ones(4, 6, 5)) == 0).all()


def route(score_TE, _layer):
    return softmax_topk(score_TE, TINY.top_k)


def test_decode_from_the_cache_equals_the_full_pass():
    model = LanguageModel(TINY, 3)
    token_BS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(token_BS, route)
        cache = Cache()
        parts = [model(token_BS[:, :7], route, cache)]
        parts += [model(token_BS[:, i : i + 1], route, cache) for i in range(7, 20)]
    assert cache.tokens == 20
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_no_byte_sees_a_later_one():
    model = LanguageModel(TINY, 3)
    token_BS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(2))
    other_BS = token_BS.clone()
    other_BS[0, 9] = (other_BS[0, 9] + 1) % 256
    with torch.no_grad():
        one, other = model(token_BS, route), model(other_BS, route)
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert (one[:, 9:] - other[:, 9:]).abs().max() > 1e-4


def test_the_model_file_states_the_models_sizes():
    data = yaml.safe_load((ROOT / "workloads" / "models" / "stdlib-moe-16e.yaml").read_text())
    stated = MoEModel.from_spec(ModelSpec.model_validate(data))
    sizes = Sizes()
    assert sum(p.numel() for p in LanguageModel(sizes, 0).parameters()) == stated.total_params()
    assert data["max_position_embeddings"] == sizes.context
    assert (stated.num_experts, stated.top_k, stated.num_moe_layers) == (sizes.experts, sizes.top_k, sizes.layers)


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", [m for m in METHODS if m != "loss_free"])
def test_every_method_trains(text, method):
    run = train(text, method, TINY, Course(steps=4, sequences=2, length=16, held_out_sequences=2))
    assert np.isfinite(run.loss_S).all()
    assert np.isfinite([run.held_out.loss, run.held_out_token_local.loss]).all()
    assert (run.count_SLE.sum(2) == 2 * 16 * TINY.top_k).all()


def test_loss_falls_and_the_bias_moves(text, trained):
    assert trained.loss_S[-3:].mean() < 0.75 * trained.loss_S[0]
    assert trained.held_out.loss < trained.loss_S[0]
    assert sorted(trained.router.state_L) == [0, 1]
    assert all(0 < abs(b).max() <= SHORT.steps * METHODS["loss_free"].rate for b in trained.router.state_L.values())
    assert trained.held_out.loss == trained.held_out_token_local.loss, "loss-free choice is the token's own"


def test_the_same_run_twice_is_the_same(text, trained):
    again = train(text, "loss_free", TINY, SHORT)
    np.testing.assert_array_equal(again.loss_S, trained.loss_S)
    np.testing.assert_array_equal(again.count_SLE, trained.count_SLE)


def test_balancing_balances_from_the_first_step(text):
    course = Course(steps=3, sequences=4, length=32, held_out_sequences=2)
    most = {m: max_violations(train(text, m, TINY, course).count_SLE).mean() for m in ("none", "bip_cold")}
    assert most["bip_cold"] < 0.25 < most["none"]
    exact = train(text, "expert_choice", TINY, course).count_SLE
    assert (exact == exact[0, 0, 0]).all()


def test_max_violation_by_hand():
    np.testing.assert_allclose(max_violations(np.array([[4, 0], [2, 2]])), [1.0, 0.0])


# -------------------------------------------------------------------------------------------------- recording


def test_a_trace_is_recorded_and_read_back(tmp_path, text, trained):
    save_run(tmp_path / "run", "loss_free", trained, settings(text, TINY, SHORT))
    name, model, router, about = load_model(tmp_path / "run")
    assert (name, about["text"]["digest"]) == ("loss_free", text.digest)
    trace = record(model, router, text.held_out, whole=2, prompts=3, length=24, prompt_length=10, seed=1)
    save_trace(trace, router, tmp_path / "trace.npz")
    source = routing_npz.read(tmp_path / "trace.npz")
    assert (source.num_tokens, source.num_sequences, source.num_layers) == (5 * 24, 5, 2)
    assert source.phase_T.tolist() == [PREFILL] * 48 + ([PREFILL] * 10 + [DECODE] * 14) * 3
    assert source.warnings == ()
    bias_LE = np.load(tmp_path / "trace.npz")["bias"]
    gate_TLE = 1 / (1 + np.exp(-source.score_TLE.astype(np.float32)))
    chosen = np.argsort(-(gate_TLE + bias_LE.astype(np.float32)), axis=2, kind="stable")[:, :, : TINY.top_k]
    np.testing.assert_array_equal(source.expert_TLK, chosen)
    np.testing.assert_allclose(source.weight_TLK.astype(np.float32).sum(2), 1, atol=2e-3)
    # what was decoded from the cache is what the model makes of the whole sequence at once
    byte_T = np.concatenate(trace.token_T).astype(np.int64)
    np.testing.assert_array_equal(source.token_T, [list(dict.fromkeys(byte_T.tolist())).index(b) for b in byte_T])
    token_S = byte_T[48:72]
    frozen = router.frozen()
    with torch.no_grad():
        model(torch.from_numpy(token_S)[None], lambda score_TE, layer: frozen(score_TE.half().float(), layer))
    for layer in range(2):
        near = np.abs(frozen.score_L[layer].numpy() - source.score_TLE[48:72, layer].astype(np.float32))
        assert np.median(near) < 1e-3, "rounding to float16 may tip a choice, and with it what follows: not the median"
        assert (frozen.choice_L[layer].expert_TK.numpy() == source.expert_TLK[48:72, layer]).mean() > 0.9


def test_a_method_that_looks_at_the_batch_cannot_be_recorded(text):
    router = Router(METHODS["bip"], TINY, training=False)
    with pytest.raises(ValueError, match="token by token"):
        record(LanguageModel(TINY, 1), router, text.held_out, whole=1, prompts=0, length=8, prompt_length=4, seed=1)


def test_the_command_trains_compares_and_records(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_text", lambda: text)
    monkeypatch.setattr(command, "Sizes", lambda: TINY)
    monkeypatch.setattr(command, "Course", lambda steps, seed: Course(steps, 2, 16, seed=seed, held_out_sequences=2))
    out, keep = tmp_path / "maxvio.json", tmp_path / "keep"
    arguments = ["compare", "--methods", "none", "bip", "--steps", "3", "--out", str(out), "--keep", str(keep)]
    assert command.main(arguments) == 0
    written = out.read_bytes()
    made = json.loads(written)
    assert list(made["methods"]) == ["none", "bip"]
    assert len(made["methods"]["bip"]["maxvio_S"]) == 3
    assert np.load(keep / "none" / "scores.npy").shape == (3, 2, 32, 4)
    stamp = (keep / "bip" / "model.npz").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert (keep / "bip" / "model.npz").stat().st_mtime_ns == stamp, "a run that is there is not made again"
    assert out.read_bytes() == written
    trace = tmp_path / "t.npz"
    sizes = ["--whole", "1", "--prompts", "1", "--length", "8", "--prompt-length", "4"]
    assert command.main(["record", "--model", str(keep / "none"), "--out", str(trace), *sizes]) == 0
    assert routing_npz.read(trace).num_tokens == 16
    assert command.main(["record", "--model", str(keep / "bip"), "--out", str(trace), *sizes]) == command.EXIT_BAD_INPUT
    assert "token by token" in capsys.readouterr().err
    assert command.main(["record", "--model", str(tmp_path / "no"), "--out", str(trace)]) == command.EXIT_BAD_INPUT
