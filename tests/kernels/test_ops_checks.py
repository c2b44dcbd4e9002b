"""Every operator against its float64 reference: the checks of `moesim_kernels.ops.selftest`, and that they can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_kernels.ops import attention, backward, dense, fp8, moe, selftest
from moesim_kernels.ops.bounds import FP32, exact
from moesim_kernels.ops.checks import LAYERS, Layer, check_backward, check_layer, compare, poisoned
from moesim_kernels.ops.checks_around import Router, acceptable, check_gemm_fp8

CPU = torch.device("cpu")
CHECKS = selftest.all_checks(CPU)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CHECKS)
def test_operator_within_its_bound(name):
    outcome = CHECKS[name]()
    assert outcome.ok, f"{outcome.error:.3e} where {outcome.bound:.3e} is allowed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_operator_on_cuda(capsys):
    status = selftest.main(["--device", "cuda"])
    assert status == 0, capsys.readouterr().out


@st.composite
def layers(draw):
    tokens, slots = draw(st.integers(0, 24)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["uniform", "balanced", "zipf:1.2", "few:1"]))
    most = tokens * (1 if kind == "few:1" else slots)
    rows = draw(st.integers(0, min(most, 60)))
    hidden, intermediate = (8 * draw(st.integers(1, 9)) for _ in range(2))
    return Layer("drawn", tokens, slots, rows, hidden, intermediate, kind)


@settings(max_examples=25)
@given(
    layers(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["loop", "grouped"]), st.integers(0, 9)
)
def test_random_layers(layer, dtype, how, seed):
    assert check_layer(layer, dtype, CPU, how, seed).ok
    assert check_backward(layer, dtype, CPU, how).ok


class TestChecksCanFail:
    """A check that passes a wrong operator is worth nothing: each of these mistakes must be seen."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gate_and_up_exchanged(self, monkeypatch, dtype):
        right = moe.swiglu
        monkeypatch.setattr(moe, "swiglu", lambda x: right(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)))
        assert not check_layer(LAYERS[0], dtype, CPU, "loop").ok

    def test_an_expert_left_out_leaves_the_poison(self, monkeypatch):
        right = moe.spans
        monkeypatch.setattr(moe, "spans", lambda end_E: right(end_E)[:-1])
        assert not CHECKS["experts-uniform-bf16-loop"]().ok

    def test_silu_without_its_curvature(self, monkeypatch):
        def straight(grad_RI, x_R2I):
            gate_RI, up_RI = x_R2I.chunk(2, dim=-1)
            silu_RI = torch.nn.functional.silu(gate_RI)
            slope_RI = torch.sigmoid(gate_RI)
            return torch.cat((grad_RI * up_RI * slope_RI, grad_RI * silu_RI), dim=1), silu_RI * up_RI

        monkeypatch.setattr(backward, "swiglu_backward", straight)
        assert not check_backward(LAYERS[0], torch.bfloat16, CPU, "loop").ok

    def test_gates_left_biased(self, monkeypatch):
        right = moe.route
        monkeypatch.setattr(
            moe, "route", lambda *a, bias_E, **k: (lambda e, g: (e, g + 0.02))(*right(*a, bias_E=bias_E, **k))
        )
        assert not CHECKS["gates-sigmoid-bias-bf16"]().ok

    def test_bf16_sums_in_fp32s_place(self):
        x, w = (torch.randn(9, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        ball = exact(x).matmul(exact(w).t, FP32)
        assert compare((x @ w.t(), ball)).ok
        assert not compare(((x.bfloat16() @ w.bfloat16().t()).float(), ball)).ok

    def test_nan_is_never_within_a_bound(self):
        ball = replace(exact(torch.zeros(2)), error=torch.full((2,), 1e30))
        assert compare((torch.tensor([0.0, 1.0]), ball)).ok
        assert not compare((torch.tensor([0.0, torch.nan]), ball)).ok

    def test_an_infinite_bound_is_no_bound(self):
        ball = replace(exact(torch.zeros(2)), error=torch.tensor([1.0, torch.inf]))
        with pytest.raises(AssertionError, match="not finite"):
            compare((torch.zeros(2), ball))

    def test_poison_reaches_unwritten_memory(self):
        with poisoned(CPU):
            assert torch.empty(3).isnan().all()
            assert torch.zeros(2).new_empty(3, dtype=torch.bfloat16).isnan().all()


class TestGroupedRule:
    case = Router("", 1, 6, 2, score="sigmoid", groups=3, top_groups=1)

    def test_the_best_pair_wins_over_the_best_single(self):
        biased = [0.9, 0.1, 0.6, 0.5, 0.2, 0.2]  # groups are worth 1.0, 1.1, 0.4
        assert acceptable(biased, [2, 3], self.case)
        assert not acceptable(biased, [0, 1], self.case)

    def test_softmax_groups_are_worth_their_best(self):
        case = replace(self.case, score="softmax")
        assert acceptable([0.9, 0.1, 0.6, 0.5, 0.2, 0.2], [0, 1], case)

    def test_equal_groups_may_either_be_chosen(self):
        biased = [0.5, 0.5, 0.7, 0.3, 0.1, 0.1]
        assert acceptable(biased, [0, 1], self.case)
        assert acceptable(biased, [2, 3], self.case)
        assert not acceptable(biased, [0, 2], self.case)

    @pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(5, 1, 1), (4, 5, 1), (4, 1, 4), (2, 1, 0), (0, 1, 1)])
    def test_impossible_rules_are_refused(self, groups, top_groups, top_k):
        with pytest.raises(ValueError, match="groups must divide experts"):
            moe.route(torch.ones(2, 4), torch.ones(12, 4), top_k, groups=groups, top_groups=top_groups)


class TestRefusals:
    def test_experts_whose_shapes_differ(self):
        rows, ends = torch.ones(3, 8), torch.tensor([3], dtype=torch.int32)
        w13, w2 = torch.ones(1, 16, 8), torch.ones(1, 8, 8)
        assert moe.grouped_swiglu(rows, w13, w2, ends).shape == (3, 8)
        for bad in ((rows, w13[:, :8], w2, ends), (rows[:, :4], w13, w2, ends), (rows, w13, w2, ends.long())):
            with pytest.raises(ValueError, match="experts need rows"):
                moe.grouped_swiglu(*bad)

    @pytest.mark.parametrize(
        "product", [lambda x, q: fp8.gemm_fp8(x, q), lambda x, q: fp8.grouped_swiglu_fp8(x, q, q, x)]
    )
    def test_fp8_products_say_why_not_here(self, product):
        x = torch.ones(16, 16)
        with pytest.raises(ValueError, match=r"compute capability 8\.9 or later, not cpu"):
            product(x, fp8.quantise(x))


@pytest.mark.parametrize(("version", "runs"), [("2.6.0+cu126", False), ("2.8.0", False), ("2.9.0a0+git", True)])
def test_grouped_fp8_waits_for_a_torch_that_takes_groups_of_any_size(monkeypatch, version, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "__version__", version)
    assert fp8.why_no_fp8("cuda") is None
    assert (fp8.why_no_fp8("cuda", grouped=True) is None) == runs


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_fp8_product_of_torchs_cpu_kernel_is_within_the_bound(monkeypatch, per):
    """torch multiplies e4m3 on the CPU too, slowly: scales and layouts are as on CUDA, and so is the bound."""
    monkeypatch.setattr(fp8, "why_no_fp8", lambda device, grouped=False: None)
    assert check_gemm_fp8(per, CPU).ok
    right = fp8.quantise
    monkeypatch.setattr(fp8, "quantise", lambda x, per: right(x, per)._replace(scale=right(x, per).scale * 1.5))
    assert not check_gemm_fp8(per, CPU).ok


def test_window_mask_by_hand():
    mask = attention.window_mask(2, 4, 2)
    assert mask.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_products_lift_only_bf16_rows_enough(monkeypatch):
    """Where the CPU lacks bf16 arithmetic the lifted product is float32's, rounded once."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, w = torch.randn(8, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    assert torch.equal(dense.gemm(x, w), (x.float() @ w.float().t()).bfloat16())
    strided = torch.full((8, 600), torch.nan, dtype=torch.bfloat16)[:, ::2]
    assert dense.gemm(x, w, strided) is strided
    assert not strided.isnan().any()


def test_selftest_prints_a_line_a_check_and_tells_failures(capsys, monkeypatch):
    assert selftest.main(["--only", "gemm"]) == 0
    assert capsys.readouterr().out.count("\nok   gemm") == 8
    assert selftest.main(["--only", "no such check"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selftest.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: torch sees no CUDA device")
    monkeypatch.setattr(dense, "gemm", lambda x, w, out: out)
    assert selftest.main(["--only", "gemm-70"]) == 1
    assert "FAIL gemm-70-fp32: inf of the bound" in capsys.readouterr().out
