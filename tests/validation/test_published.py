"""Predictions against others' measurements (benchmarks/validation): bounds, recorded figures, the page made of them.

A bound that is missed is recorded as missed; then the figure may not get worse than recorded by more than 5 % of it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.fit.samples import Samples
from moesim_kernels.validate.predict import Predicted, Predictions, write_sealed

from benchmarks.validation import page, raw, verdict
from benchmarks.validation.rows import Beside, Bound, Errors, Found, Row, beside, found, interpolated
from moesim.errors import BadInput

ROOT = Path(__file__).parents[2]
OUT = ROOT / "results" / "validation"
RECORDED = json.loads((OUT / "published.json").read_text("utf-8"))
OTHERS = [name for name in page.names() if not page.check(name).SOURCE.committed]
OWN = [name for name in page.names() if page.check(name).SOURCE.committed]
COMMAND = re.compile(r"`(?:PYTHONPATH=\S+ )?(?:\.venv/bin/)?(python|make|moesim) ([^`]+)`")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if getattr(page.check(n), "SLOW", False) else []) for n in OTHERS],
)
def test_bounds_hold_or_are_missed_by_no_more_than_is_recorded(name: str) -> None:
    gone = page.missing(name)
    if gone:
        pytest.skip(f"not here: {', '.join(gone)}")
    before, now = [Row.of(row) for row in RECORDED[name]], page.check(name).rows()
    assert [(r.what, r.held_out, r.found.n) for r in now] == [(r.what, r.held_out, r.found.n) for r in before]
    worse = [text for row, old in zip(now, before, strict=True) for text in row.worse_than(old)]
    assert not worse
    for row, old in zip(now, before, strict=True):  # what stands on the page is what the check gives
        assert row.found.median == pytest.approx(old.found.median, rel=0.1, abs=2e-3), row.what
        for a, b in zip(row.beside, old.beside, strict=True):
            assert a.median == pytest.approx(b.median, rel=0.1, abs=2e-3), (row.what, a.name)


@pytest.mark.parametrize("name", OWN)
def test_our_own_measurements_are_here(name: str) -> None:
    """Their verdicts stand on the page, which is compared byte for byte below."""
    assert not page.missing(name)
    assert page.check(name).rows()


def test_the_page_is_made_of_committed_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[Row]:
        raise AssertionError("the page ran a check that reads tables of others")

    for name in OTHERS:
        monkeypatch.setattr(page.check(name), "rows", refuse)
    assert page.page() == (OUT / "README.md").read_text("utf-8")


def test_every_check_is_recorded_and_every_row_says_what_it_must() -> None:
    assert list(RECORDED) == OTHERS
    rows = {name: page.found_in(name, RECORDED) for name in page.names()}
    for name, found_rows in rows.items():
        module, source = page.check(name), page.check(name).SOURCE
        assert module.GROUP in page.GROUPS
        assert source.repository
        assert source.machine
        assert source.committed or (source.licence and source.commit)
        assert source.committed == hasattr(module, "COMMAND")
        assert found_rows
        keys = [(row.what, row.calibrated, row.held_out) for row in found_rows]
        assert len(set(keys)) == len(keys)
        for row in found_rows:
            assert row.calibrated
            assert row.held_out
            assert row.bound is None or row.bound.why
            assert row.inside is not None or (row.found.n > 0 and row.found.median <= max(row.found.p90, 1e-9))
    says = [row.verdict() for found_rows in rows.values() for row in found_rows]
    assert says.count("missed") > 10  # honest: they are there
    text = (OUT / "README.md").read_text("utf-8")
    assert text.count("**missed**") == says.count("missed")


def test_every_page_names_the_command_that_made_its_figures() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    with (ROOT / "pyproject.toml").open("rb") as file:
        verbs = set(tomllib.load(file)["project"]["entry-points"]["moesim.commands"])
    verbs |= set(re.findall(r'command\("?([a-z-]*)', (ROOT / "moesim" / "cli.py").read_text("utf-8")))
    pages = sorted(OUT.glob("**/*.md"))
    assert len(pages) > 15
    for path in pages:
        lines = path.read_text("utf-8").splitlines()
        commands = [(i, *m) for i, line in enumerate(lines) for m in COMMAND.findall(line)]
        first_table = next((i for i, line in enumerate(lines) if line.startswith("|")), len(lines))
        assert commands, f"{path.name} names no command"
        assert path.name == "README.md" or commands[0][0] < first_table, f"{path.name}: figures before a command"
        for _, tool, rest in commands:
            word = rest.split()[0]
            if tool == "make":
                assert word in [*targets, "validation"], f"{path.name}: make {word}"
            elif tool == "moesim":
                assert word in verbs or word == "validate", f"{path.name}: moesim {word}"
            elif word == "-m":
                assert importlib.util.find_spec(rest.split()[1]), f"{path.name}: python -m {rest.split()[1]}"
            else:
                assert (ROOT / word).is_file(), f"{path.name}: {word}"
    readme = (OUT / "README.md").read_text("utf-8").splitlines()
    for i, line in enumerate(readme):  # on this page every table of rows has its own
        if line.startswith("| predicted |"):
            assert COMMAND.search(readme[i - 2]), readme[i - 3]


def test_what_is_committed_stays_small() -> None:
    files = [*(OUT / "raw").glob("**/*"), OUT / "published.json"]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 1 << 20


# ---- rows by hand


def row(median: float, p90: float, bound: Bound | None, tau: float | None = None) -> Row:
    return Row("what", "this", "that", Found(10, median, p90, tau), bound)


def test_a_verdict_needs_every_part_of_the_bound() -> None:
    both = Bound("why", 0.05, 0.15, 0.9)
    assert row(0.05, 0.15, both, 0.9).verdict() == "within"
    assert row(0.051, 0.15, both, 0.9).verdict() == "missed"
    assert row(0.05, 0.151, both, 0.9).verdict() == "missed"
    assert row(0.05, 0.15, both, 0.89).verdict() == "missed"
    assert row(0.05, 0.15, both).verdict() == "missed"
    assert row(9.0, 9.0, None).verdict() == "no bound"
    held = replace(row(0.0, 0.0, None), inside=9)
    assert held.verdict() == "within"
    assert replace(held, found=Found(100, 0.0, 0.0), inside=70).verdict() == "missed"


def test_a_miss_may_not_get_worse() -> None:
    bound = Bound("why", 0.05, None, 0.9)
    good, bad = row(0.04, 0.1, bound, 0.95), row(0.20, 0.3, bound, 0.8)
    assert not row(0.05, 9.0, bound, 0.9).worse_than(good)  # not as good as it was, but within
    assert row(0.051, 9.0, bound, 0.9).worse_than(good)
    assert not row(0.209, 9.0, bound, 0.77).worse_than(bad)
    assert row(0.211, 9.0, bound, 0.8).worse_than(bad)
    assert row(0.2, 9.0, bound, 0.7).worse_than(bad)
    assert not row(9.0, 9.0, None).worse_than(row(0.1, 0.1, None))


def test_rows_come_back_from_json() -> None:
    one = Row("a", "b", "c", Found(3, 0.25, 0.5, 0.75), Bound("d", 0.1), (Beside("e", 1.0, 2.0),), "worst", "f", 2)
    assert Row.of(json.loads(json.dumps(one.plain()))) == one
    assert Row.of(row(0.123449, 1.0, None).plain()).found.median == 0.1234


def test_errors_are_relative_to_what_was_measured() -> None:
    errors = Errors()
    errors.add([110.0, 80.0], [100.0, 100.0])
    errors.add(100.0, 100.0)
    assert errors.found().median == pytest.approx(0.1)
    assert found([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], ranked=True).tau == pytest.approx(1.0)
    assert beside("x", [2.0], [1.0]).median == pytest.approx(1.0)


def test_interpolating_knows_points_alone() -> None:
    some = Samples("gemm", "", [("a",)] * 2, np.array([[1.0], [16.0]]), np.array([1.0, 16.0]))
    rest = Samples("gemm", "", [("a",), ("a",), ("b",)], np.array([[4.0], [64.0], [1.0]]), np.ones(3))
    np.testing.assert_allclose(interpolated(some, rest), [4.0, 16.0, np.nan])
    # of two sizes the nearest batch's line
    some = Samples("a", "", [()] * 4, np.array([[1, 1], [1, 4], [64, 1], [64, 4.0]]), np.array([1.0, 4.0, 10.0, 40.0]))
    rest = Samples("a", "", [()] * 2, np.array([[2.0, 2.0], [32.0, 2.0]]), np.ones(2))
    np.testing.assert_allclose(interpolated(some, rest), [2.0, 20.0])


def columns(end_ns: int) -> dict[str, list[int]]:
    """Two served requests of five tokens, 1 ms apart; the first one ends at end_ns."""
    first, gap = 2_000_000, 1_000_000
    times = {"arrival_ns": [0, gap], "first_token_ns": [first, first + gap], "finish_ns": [end_ns, end_ns + gap]}
    return times | {"output_tokens": [5, 5]}


@pytest.fixture
def validated(tmp_path: Path) -> Path:
    """What moesim validate leaves behind: 40 steps predicted 10 % too long, each measured three times."""
    facts = {
        "scenario": "hand", "scenario_hash": "0", "device": "cpu", "ranks": 1, "layers": 1, "seed": 1, "study": None,
        "held_out": [f"s{i}" for i in range(40)], "variants_refused": {}, "not_served": "", "anchors": None,
        "served": columns(10_000_000),
        "profile": {
            "name": "p", "kind": "measured", "source": "/some/where/p.yaml", "speed_error": 0.02,
            "made_on": None, "kernel": None, "threads": None, "torch": None,
        },
    }  # fmt: skip
    firm = (1.0, 0.0, 0.0, 0.0)
    steps = tuple(
        Predicted(
            f"s{i}", "decode", (), i + 1, 9, 1_100_000 * (i + 1), {"experts": 1_100_000 * (i + 1)}, {"experts": "moe"},
            {"experts": 1_100_000 * (i + 1)}, 0.2, {"experts": 0.2}, firm, {"experts": firm}, 500_000.0 * (i + 1),
        )
        for i in range(40)
    )  # fmt: skip
    seal = write_sealed(tmp_path / "predictions.json", Predictions(steps, facts))
    for number in (1, 2):  # 1.75 ms a token where 2 were predicted
        run = {"seal": seal, "clock": "wall", "psi": [0.0], "requests": columns(9_000_000)}
        (tmp_path / f"served-{number}.json").write_text(json.dumps(run), "utf-8")
    machine = {"device": "cpu", "cpu": "a CPU", "date": "2026-01-02T03:04:05+00:00"}
    lines = [{"schema": 1, "seal": seal, "ranks": 1, "machine": machine}]
    for again in range(3):
        for i in range(40):
            ns = 1_000_000 * (i + 1)
            lines.append(
                {
                    "setting": f"s{i}",
                    "round": again,
                    "wall_ns": ns,
                    "cpu_ns": ns,
                    "part_ns": {"experts": ns},
                    "psi": 0.0,
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"end": {}}])
    (tmp_path / "measured.jsonl").write_text(text, "utf-8")
    (tmp_path / "report.md").write_text(
        "Made by `moesim validate x.yaml --out /tmp/x --rounds 3` (exit code 4).\n", "utf-8"
    )
    return tmp_path


def test_a_kept_validation_is_judged_anew(validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "RAW", tmp_path / "raw")
    kept = raw.keep(validated, "hand")
    assert sorted(p.name for p in kept.iterdir()) == [
        "about.json", "measured.jsonl.gz", "predictions.json.gz", "served-1.json.gz", "served-2.json.gz"
    ]  # fmt: skip
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    assert {p.name: p.read_bytes() for p in raw.keep(validated, "hand").iterdir()} == before
    (check,) = raw.raw_checks().values()
    assert check.COMMAND == "moesim validate x.yaml --rounds 3"
    assert "hand" in check.TITLE
    step, _, held, *served = check.rows()
    assert (step.found.n, step.found.median, step.found.tau) == (40, pytest.approx(0.1), pytest.approx(1.0))
    assert step.beside[0].median == pytest.approx(0.5)
    assert (step.verdict(), held.inside) == ("missed", 40)
    token = next(row for row in served if "TPOT" in row.what)
    assert (token.found.n, token.found.median, token.verdict()) == (
        2,
        pytest.approx(2.0 / 1.75 - 1, abs=1e-5),
        "missed",
    )
    lines = (validated / "measured.jsonl").read_text("utf-8")
    (validated / "measured.jsonl").write_text(lines.replace('"seal": "', '"seal": "0', 1), "utf-8")
    with pytest.raises(BadInput, match="seal"):
        raw.RawCheck(raw.keep(validated, "hand")).rows()


def test_a_kept_validation_names_no_file_of_its_machine(validated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "RAW", validated / "raw")
    with pytest.raises(ValueError, match="relative"):
        raw.keep(validated, "hand", "moesim validate /home/me/x.yaml")
    (validated / "report.md").unlink()
    with pytest.raises(ValueError, match="command"):
        raw.keep(validated, "hand")


def test_the_first_words_do_not_outlive_their_figures() -> None:
    module = page.check("a800")
    parts = {"a800": (module, [row(0.01, 0.02, Bound("why", 0.05))])}
    assert verdict.pick(parts, "a800", "what", "", "within").found.median == 0.01
    with pytest.raises(ValueError, match="says missed"):
        verdict.pick(parts, "a800", "what", "", "missed")
    with pytest.raises(ValueError, match="no row"):
        verdict.pick(parts, "a800", "else", "", "within")
