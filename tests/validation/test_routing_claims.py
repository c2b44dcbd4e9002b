"""Claims of papers that cost little to check: identities, exact balance, shares of FLOP, and how far fitted ones carry.

The page results/validation/routing.md has all of them; `python benchmarks/routing/claims.py` writes it. What holds of
every page of claims is asked here of results/validation/placement.md, too.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.model import ModelSpec
from moesim.model_changes import ModelChanges, change_model
from moesim.routing import NONE, RoutingContext
from moesim.routing.expert_choice import Policy as ExpertChoice
from moesim.scenario.load import load_model

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """A maintainers' script, imported where it lies."""
    folder = str(ROOT / "benchmarks" / "routing")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


# ---- AdaMoE


@pytest.fixture(scope="module")
def expert_share() -> float:
    return float(
        tool("claims_counts").expert_flop_share(load_model(ROOT / "workloads" / "models" / "mixtral-8x7b.yaml"))
    )


def test_experts_do_88_percent_of_mixtral(expert_share: float) -> None:
    """The six rows of AdaMoE's table 1 lie at 0.8812 to 0.8818; without attention scores it is a little more."""
    assert expert_share == pytest.approx(0.8815, abs=0.004)
    model = load_model(ROOT / "workloads" / "models" / "mixtral-8x7b.yaml")
    # a sequence of 300 tokens, whose tokens see 150 in the mean
    assert tool("claims_counts").expert_flop_share(model, seen=150) == pytest.approx(0.8815, abs=0.0005)


@pytest.mark.parametrize("row", ["WINO", "HELLA", "PIQA", "SIQA", "OQA", "ARC-C"])
def test_saved_flop_follow_from_the_load(row: str, expert_share: float) -> None:
    """Within what two digits of the load leave open (0.22 points), and 0.1."""
    counts = tool("claims_counts")
    saved, load = counts.TABLE_1[row]
    assert counts.saved_percent(expert_share, load) == pytest.approx(saved, abs=0.32)


def test_one_null_logit_does_not_carry_over() -> None:
    """Table 2's other rows: what the page states, a mean error under 20 % and a row that misses by over a quarter."""
    counts = tool("claims_counts")
    logit, loads = counts.held_out_loads(counts.mixtral_scores()["gumbel"][:4096])
    assert loads[8, 3] == pytest.approx(1.63, abs=0.005)
    error = counts.errors(loads, {(8, 3)})
    assert error.mean() < 0.20
    assert error.max() > 0.25
    assert -1 < logit < 1


def test_more_null_experts_take_more() -> None:
    counts = tool("claims_counts")
    score = counts.mixtral_scores()["gumbel"][:2048]
    load = [counts.null_load(score, nulls, 6, 0.0) for nulls in (8, 16, 32, 64)]
    assert load == sorted(load, reverse=True)
    assert counts.null_load(score, 8, 3, -6) == pytest.approx(3, abs=0.02)


# ---- experts choose


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(8192, 64, 6), (1000, 64, 6), (4096, 8, 2), (513, 512, 20)])
def test_expert_choice_is_even(tokens: int, experts: int, top_k: int) -> None:
    score = np.random.default_rng(3).normal(size=(tokens, experts)).astype(np.float32) * 3
    score += np.linspace(0, 4, experts, dtype=np.float32)  # the last expert is everyone's favourite
    found = ExpertChoice().route(score, RoutingContext(top_k))
    load = np.bincount(found.expert_TK[found.expert_TK != NONE], minlength=experts)
    assert load.max() == load.min() == tokens * top_k // experts


@pytest.mark.parametrize("kind", ["linear", "linear_reverse", "cosine", "cosine_reverse"])
def test_schedules_cost_what_static_k_does(kind: str) -> None:
    """EC-DLM: k from 8 to 32 against a static 20."""
    policy = ExpertChoice.model_validate({"schedule": kind, "k_min": 8, "k_max": 32, **tool("claims_counts").EC_DLM})
    score = np.random.default_rng(4).normal(size=(512, 512)).astype(np.float32)
    k = [tool("claims_counts").ec_dlm_k(policy, score, r) for r in np.linspace(0, 1, 9)]
    assert np.mean(k) == pytest.approx(20, abs=1e-9)
    assert (k[0], k[-1]) == ((32, 8) if kind.endswith("reverse") else (8, 32))


# ---- Expert Upcycling


def test_savings_follow_from_two_step_times() -> None:
    """Expert Upcycling, section 6: 32, 24, 67, 50 %, within a point."""
    cost = tool("claims_cost")
    assert cost.savings(2.2, 4.2) == pytest.approx({"half": 32, "all": 24, "sunk, half": 67, "sunk, all": 50}, abs=1)
    # by hand: 1 + 0.5 * 2 against 1.5 * 2
    assert cost.savings(1, 2)["half"] == pytest.approx(100 / 3)


def test_upcycling_multiplies_experts_alone() -> None:
    cost = tool("claims_cost")
    model = ModelSpec.model_validate(cost.upcycling_dimensions()).build()
    twice = change_model(model, ModelChanges(upcycle=2))
    assert model.total_params() == pytest.approx(7.6e9, rel=0.01)
    assert twice.total_params() - model.total_params() == pytest.approx(10 * 32 * 3 * 2048 * 3072, rel=0.001)
    assert twice.top_k == model.top_k == 2


# ---- bytes and rows


def test_token_centric_reads_every_pairs_weights() -> None:
    """OmniMoE, section 2.3: T k rows against one for each expert in use."""
    body = tool("claims_cost").omni_row(32)
    assert body.token_bytes == 4096 * 32 * 2 * 1024 * 2
    assert body.expert_bytes == body.active * 2 * 1024 * 2
    assert body.token_ns > body.expert_ns


def test_what_published_parameters_ask_of_one_a100() -> None:
    """OmniMoE, section 3.2, by hand: 4,096 x 26M x 2 bytes at 2,039 GB/s; 2 x 4,096 x 28M FLOP at 312 TFLOP/s."""
    floors = tool("claims_cost").omni_floors()
    assert floors.read_bytes == pytest.approx(212.992e9)
    assert floors.read_s == pytest.approx(0.10446, rel=1e-4)
    assert floors.flop == pytest.approx(229.376e9)
    assert floors.compute_s == pytest.approx(0.73518e-3, rel=1e-4)


def test_more_capacity_costs_throughput() -> None:
    """The sign and the order of marin#4017 at one micro-batch; the page has the curve."""
    cost = tool("claims_cost")
    ms = cost.capacity_steps(cost.grug(1536, 2), "h100_sxm", 4, "full", (1.0, 1.25, 2.0))
    assert ms == sorted(ms)
    loss = cost.lost(ms, (1.0, 1.25, 2.0))
    assert loss[0] == 0
    assert 0 < loss[1] < 20  # 25 % more expert rows are 20 % of throughput at the very most
    assert loss[1] < loss[2] < 50


# ---- the page

PAGE = ROOT / "results" / "validation" / "routing.md"
PAGES = [PAGE, PAGE.with_name("placement.md")]
page_of_claims = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def told_counts(text: str) -> tuple[int, dict[str, int]]:
    """The number of claims and of each verdict that a page states."""
    (line,) = re.findall(r"^\*\*(\d+) claims: (\d+ [a-z ]+(?:, \d+ [a-z ]+)*)\.\*\*$", text, re.MULTILINE)
    pairs = re.findall(r"(\d+) ([a-z ]+)", line[1])
    assert len(dict(map(reversed, pairs))) == len(pairs), "a verdict is counted once"
    return int(line[0]), {verdict: int(number) for number, verdict in pairs}


def claim_rows(text: str) -> list[dict[str, str]]:
    """The rows of the table of all claims, by the names of its columns."""
    lines = text.split("\n## All claims\n")[1].split("\n## ")[0].strip().splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" |")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def assert_counts(text: str) -> None:
    """Every verdict's number is that of its rows, none left out."""
    total, told = told_counts(text)
    found = Counter(row["verdict"].strip("*") for row in claim_rows(text))
    assert told == {verdict: found[verdict] for verdict in tool("claim_page").VERDICTS}
    assert total == sum(told.values()) == sum(found.values())


@page_of_claims
def test_the_page_holds_what_it_counts(path: Path) -> None:
    text = path.read_text("utf-8")
    assert_counts(text)
    _, told = told_counts(text)
    missed = text.split("\n## Missed, and why\n")[1].split("\n## ")[0]
    assert sum(line.startswith("- ") for line in missed.splitlines()) == told["missed"] > 0
    assert "**Not blind.**" in text.split("\n## All claims\n")[0]


def test_pictures_lie_beside_the_page() -> None:
    text = PAGE.read_text("utf-8")
    for picture in ("routing_balance.png", "routing_drops.png", "routing_capacity.png"):
        assert f"({picture})" in text
        assert 0 < (PAGE.parent / picture).stat().st_size < 150_000


def test_a_page_counts_more_than_ten_and_none() -> None:
    """A page of 11 and 1 rows, its other verdicts at 0; a wrong number is noticed, a digit left out too."""
    page = tool("claim_page")
    rows = [page.Row("paper", "set-up", "nothing", "claim", "ours", page.MISSED, asked="equal")] * 11
    sections = [page.Section("one", "One", [*rows, page.Row("paper", "", "", "", "", page.NOT_CHECKED)])]
    text = page.page("Claims", ["Made here.", "Read on."], sections)
    assert told_counts(text) == (12, {**dict.fromkeys(page.VERDICTS, 0), "missed": 11, "not checked": 1})
    assert_counts(text)
    for wrong in ("1 missed", "12 missed", "0 missed"):
        with pytest.raises(AssertionError):
            assert_counts(text.replace("11 missed", wrong, 1))


@page_of_claims
def test_every_table_has_as_many_cells_as_its_head(path: Path) -> None:
    """A line of another width breaks a Markdown table; so does one that nothing parts from the text before it."""
    lines = path.read_text("utf-8").splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("|") and before.startswith("|"):
            assert line.count("|") == before.count("|"), line
        elif line.startswith("|"):
            assert before == "", line


@page_of_claims
def test_what_is_fitted_names_the_parameter(path: Path) -> None:
    rows = claim_rows(path.read_text("utf-8"))
    assert {row["fitted"] for row in rows if row["verdict"] == "**fitted**"}.isdisjoint({"", "-", "nothing"})


@page_of_claims
def test_every_verdict_has_a_rule(path: Path) -> None:
    """What was asked stands before our figure, wherever a figure is judged."""
    rows = claim_rows(path.read_text("utf-8"))
    assert list(rows[0]).index("asked") < list(rows[0]).index("ours")
    judged = [row for row in rows if row["verdict"].strip("*") not in ("fitted", "not checked")]
    assert [row["claim"] for row in judged if not (row["asked"] and row["ours"])] == []


def test_what_nobody_simulated_is_called_an_identity() -> None:
    """And a total 5.1 % off, or a last stretch off by more than the factor asked, is a miss."""
    verdicts: dict[str, set[str]] = {}
    for row in claim_rows(PAGE.read_text("utf-8")):
        verdicts.setdefault(row["claim"], set()).add(row["verdict"].strip("*"))
    for claim in (
        "max / mean load = 1 exactly",
        "32, 24, 67, 50 % of GPU hours saved",
        "linear and cosine schedules and their reverses cost what static k = 20 does",
        "8, 10, 12, 14, 16",
    ):
        assert verdicts[claim] == {"identity"}
    assert verdicts["7.6B -> 13B parameters"] == verdicts["as in the real trainings"] == {"missed"}
    assert verdicts["MaxVio_global 0.04"] == {"shape"}
