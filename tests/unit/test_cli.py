"""The command line: verbs, exit codes, what goes to stdout and what to stderr, and what is left on disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moesim
from moesim import cli, results, terminal
from moesim.errors import BadInput
from moesim.scenario.load import load_scenario

SCENARIO = """\
name: small
seed: 7
model: olmoe-1b-7b
cluster: {device: h100_sxm_datasheet, nodes: 1}
parallel: {dp: 2, ep: 2}
requests: {format: poisson, rate_per_s: 50, num_requests: 6, prompt_tokens: 20, output_tokens: 4}
routing: {fidelity: count}
engine: {max_num_seqs: 8, max_num_batched_tokens: 64, bank_entries: 2}
"""
FILES = {"scenario.yaml", "result.json", "requests.parquet", "steps.parquet", "provenance.json"}
PLUGIN = """\
import os, signal
from moesim.placement.contiguous import Policy as Contiguous

class Interrupt(Contiguous):
    def place(self, weight_LE, ctx):
        os.kill(os.getpid(), getattr(signal, os.environ.get("HIT", "SIGINT")))
        return super().place(weight_LE, ctx)

class Mistake(Contiguous):
    def place(self, weight_LE, ctx):
        return 1 / 0

class Greedy(Contiguous):
    def place(self, weight_LE, ctx):
        raise MemoryError("Unable to allocate 7.28 TiB")

POLICIES = {"placement.interrupt": Interrupt, "placement.mistake": Mistake, "placement.greedy": Greedy}
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the real entry point in this process, in a folder of its own with s.yaml and plug.py."""
    (tmp_path / "s.yaml").write_text(SCENARIO)
    (tmp_path / "plug.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        code = ended.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call


def process(arguments: list[str], cwd: Path, **env: str) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "moesim.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def left(folder: Path) -> set[str]:
    return {p.name for p in (folder / "results").rglob("*")} if (folder / "results").exists() else set()


# ---- verbs


def test_help_names_every_verb_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom moesim.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'pydantic', 'yaml', 'rich', 'pyarrow', 'scipy', 'simpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for verb in ("simulate", "compare", "check", "schema", "convert", "models", "profiles"):
        assert f"\n  {verb} " in done.stdout
    assert done.stdout.endswith("[]\n")


def test_simulate_never_imports_the_siblings_libraries(run: Run, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom moesim.cli import main\n"
        "try: main(['simulate', 's.yaml', '-q'])\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "print(sorted({'torch', 'optuna', 'ortools', 'pandas', 'moesim_kernels', 'moesim_tuner'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"moesim {moesim.__version__}\n", "")
    assert importlib.metadata.version("moesim") == moesim.__version__


def test_simulate_prints_a_summary_and_writes_the_results(run: Run, tmp_path: Path) -> None:
    ran = run("simulate", "s.yaml")
    assert ran.code == 0
    assert ran.err == ""
    scenario = load_scenario("s.yaml")
    folder = tmp_path / "results" / f"small-{scenario.hash}"
    assert {p.name for p in folder.iterdir()} == FILES
    assert [p.name for p in (tmp_path / "results").iterdir()] == [folder.name]
    assert ran.out.endswith(f"results: {folder.relative_to(tmp_path)}\n")
    for part in ("Speed", "Latency", "Where the time goes", "Balance", "Memory", "What this rests on", "Bound by"):
        assert part in ran.out
    assert "\x1b" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_the_results_hold_what_happened(run: Run, tmp_path: Path) -> None:
    from pyarrow import parquet

    assert run("simulate", "s.yaml", "--out", "o").code == 0
    (folder,) = (tmp_path / "o").iterdir()
    report = json.loads((folder / "result.json").read_text())
    assert report["schema_version"] == 1
    assert report["feasible"] is True
    requests = parquet.read_table(folder / "requests.parquet")
    steps = parquet.read_table(folder / "steps.parquet")
    assert requests.num_rows == 6
    assert steps.num_rows == report["summary"]["steps"]
    assert requests.schema.metadata == {b"moesim.schema_version": b"1"}
    made = json.loads((folder / "provenance.json").read_text())
    assert made["provenance"]["scenario_hash"] == folder.name.removeprefix("small-")
    again = load_scenario(folder / "scenario.yaml")
    assert again.hash == folder.name.removeprefix("small-")


def test_results_run_again_from_where_they_lie(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,2\n0.5,9,3\n")
    (tmp_path / "in" / "s.yaml").write_text(
        re.sub("requests: .*", "requests: {format: csv_lengths, path: t.csv}", SCENARIO)
    )
    assert run("simulate", "in/s.yaml", "-q", "--out", "x/y").code == 0
    (folder,) = (tmp_path / "x" / "y").iterdir()
    first = json.loads((folder / "result.json").read_text())["summary"]
    assert run("simulate", str(folder / "scenario.yaml"), "-q", "--out", "z").code == 0
    assert json.loads((tmp_path / "z" / folder.name / "result.json").read_text())["summary"] == first


@pytest.mark.parametrize("fidelity", ["count", "token"])
def test_every_process_writes_the_same_bytes(fidelity: str, run: Run, tmp_path: Path) -> None:
    written: list[dict[str, bytes | object]] = []
    for seed in ("0", "1", "random"):
        arguments = ["simulate", "s.yaml", "-q", "--out", seed, "--set", f"routing.fidelity={fidelity}"]
        arguments += ["--set", "routing.popularity_zipf=0.7", "--timeline", f"{seed}.json"]
        assert process(arguments, tmp_path, PYTHONHASHSEED=seed).code == 0
        (folder,) = (tmp_path / seed).iterdir()
        report = json.loads((folder / "result.json").read_text())
        for clock in ("host", "elapsed"):
            del report["provenance"][clock]
        files = ("scenario.yaml", "requests.parquet", "steps.parquet")
        same: dict[str, bytes | object] = {name: (folder / name).read_bytes() for name in files}
        written.append(same | {"result": report, "folder": folder.name, "t": (tmp_path / f"{seed}.json").read_bytes()})
    assert written[0] == written[1] == written[2]


def test_json_alone_goes_to_stdout(run: Run) -> None:
    ran = run("simulate", "s.yaml", "--json", "--seed", "9", "--set", "name=other")
    report = json.loads(ran.out)
    assert (ran.code, report["seed"], report["name"]) == (0, 9, "other")
    assert ran.err.startswith("results: ")


def test_quiet_is_quiet(run: Run) -> None:
    assert run("simulate", "s.yaml", "-q") == (0, "", "")


def test_check_says_ok_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    ran = run("check", "s.yaml", "--set", "parallel.dp=4")
    assert ran.code == 0
    assert re.fullmatch(r"ok: small \([0-9a-f]{16}\): .* dp 4, ep 2, replicas 1; 6 requests\n", ran.out)
    assert not left(tmp_path)


def test_schema_is_json(run: Run) -> None:
    ran = run("schema")
    assert ran.code == 0
    assert json.loads(ran.out)["title"] == "moesim scenario"


def test_models_and_profiles_are_listed_within_80_columns(run: Run) -> None:
    models, profiles = run("models"), run("profiles")
    assert "deepseek-v3 " in models.out
    assert "h100_sxm_datasheet " in profiles.out
    assert max(map(len, (models.out + profiles.out).splitlines())) <= 80


def test_convert_writes_a_folder_that_a_scenario_can_read(run: Run, tmp_path: Path) -> None:
    import numpy as np

    ids = np.argsort(np.random.default_rng(0).random((40, 16, 64)), axis=-1)[..., :8].astype(np.uint8)
    np.savez(tmp_path / "t.npz", expert_ids=ids, sequence_id=np.repeat(np.arange(4), 10))
    ran = run("convert", "t.npz", "t", "--num-experts", "64")
    assert (ran.code, ran.out) == (0, "written: t\n")
    assert run("simulate", "s.yaml", "-q", "--set", "routing={path: t}").code == 0
    assert run("convert", "nothing.npz", "u").code == 2
    assert not (tmp_path / "u").exists()


def test_other_packages_add_verbs_that_load_when_called(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry(NamedTuple):
        name: str
        value: str
        dist: Any
        function: Callable[[], object]

        def load(self) -> object:
            return self.function()

    def tune(depth: int = 1) -> None:
        print(f"tuned {depth}")

    def broken() -> object:
        raise ImportError("No module named 'ortools'")

    entries = [Entry("tune", "a.b:tune", None, lambda: tune), Entry("solve", "c.d:solve", None, broken)]
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: entries if group == cli.COMMANDS else [])
    listed = run("--help").out
    assert "tune      Added by a.b:tune." in listed
    assert "solve     Added by c.d:solve." in listed
    assert run("tune", "--depth", "3") == (0, "tuned 3\n", "")
    ran = run("solve")
    assert ran.code == 2
    assert "No module named 'ortools'" in ran.err


def test_a_plugin_adds_policies(run: Run) -> None:
    assert run("simulate", "s.yaml", "--set", "policies.placement=greedy").code == 2
    assert run("check", "s.yaml", "--plugin", "plug", "--set", "policies.placement=greedy").code == 0
    assert "cannot be imported" in run("check", "s.yaml", "--plugin", "nosuch").err


# ---- exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["simulate"],
        ["simulate", "no.yaml"],
        ["simulate", "."],
        ["simulate", "s.yaml", "--seed", "x"],
        ["simulate", "s.yaml", "--seed", "-1"],
        ["simulate", "s.yaml", "--what"],
        ["simulate", "s.yaml", "--set", "nope=1"],
        ["simulate", "s.yaml", "--out", "s.yaml/x"],
        ["simulate", "s.yaml", "--timeline", "nodir/t.json"],
        ["convert", "s.yaml", "x"],
    ],
)
def test_bad_input_is_exit_code_2_without_a_traceback(arguments: list[str], run: Run, tmp_path: Path) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err
    assert "Traceback" not in ran.err + ran.out


def test_what_does_not_fit_is_exit_code_3_with_bytes_and_a_mend(run: Run, tmp_path: Path) -> None:
    big = [
        "--set",
        "model={name: deepseek-v3, weight_dtype: bf16, expert_dtype: bf16}",
        "--set",
        "parallel={dp: 8, ep: 8}",
    ]
    ran = run("simulate", "s.yaml", *big)
    assert ran.code == 3
    assert all(line.startswith("infeasible: ") for line in ran.err.splitlines())
    assert re.search(r"[\d,]{12,} bytes", ran.err)
    assert "Smallest change" in ran.err
    assert not left(tmp_path)
    report = json.loads(run("simulate", "s.yaml", "--json", *big).out)
    assert report["feasible"] is False
    assert report["summary"] is None
    assert report["reasons"]


def test_running_out_of_memory_is_exit_code_5(run: Run, tmp_path: Path) -> None:
    ran = run("simulate", "s.yaml", "--plugin", "plug", "--set", "policies.placement=greedy")
    assert ran.code == 5
    assert "out of memory (Unable to allocate 7.28 TiB)" in ran.err
    assert not left(tmp_path)


@pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_leaves_nothing_and_says_so(signal_name: str, code: int, run: Run, tmp_path: Path) -> None:
    arguments = ["simulate", "s.yaml", "--plugin", "plug", "--set", "policies.placement=interrupt"]
    ran = process(arguments, tmp_path, HIT=signal_name)
    assert ran.code == code
    assert "Traceback" not in ran.err
    assert not left(tmp_path)


def test_our_own_mistake_is_one_line_and_debug_shows_more(run: Run, tmp_path: Path) -> None:
    arguments = ["simulate", "s.yaml", "--plugin", "plug", "--set", "policies.placement=mistake"]
    ran = process(arguments, tmp_path)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert "internal error: ZeroDivisionError: division by zero (plug.py:11)" in ran.err
    assert "--debug" in ran.err
    assert "Traceback" in process(["--debug", *arguments], tmp_path).err
    assert not left(tmp_path)


def test_a_reader_that_goes_away_is_no_noise(run: Run, tmp_path: Path) -> None:
    command = f"{sys.executable} -m moesim.cli schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{", "")


def test_a_terminal_without_utf_8_is_no_error(run: Run, tmp_path: Path) -> None:
    ran = process(["simulate", "s.yaml"], tmp_path, PYTHONIOENCODING="ascii")
    assert (ran.code, ran.err) == (0, "")
    assert "?" in ran.out


# ---- folders


def test_results_are_replaced_whole(run: Run, tmp_path: Path) -> None:
    assert run("simulate", "s.yaml", "-q").code == 0
    (folder,) = (tmp_path / "results").iterdir()
    (folder / "stale").write_text("x")
    assert run("simulate", "s.yaml", "-q").code == 0
    assert [p.name for p in (tmp_path / "results").iterdir()] == [folder.name]
    assert {p.name for p in folder.iterdir()} == FILES


def test_results_are_replaced_where_the_system_cannot_exchange(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("simulate", "s.yaml", "-q").code == 0
    (folder,) = (tmp_path / "results").iterdir()

    def without(name: None, use_errno: bool) -> object:
        raise OSError("no C library")

    monkeypatch.setattr(results.ctypes, "CDLL", without)
    (folder / "stale").write_text("x")
    assert run("simulate", "s.yaml", "-q").code == 0
    assert {p.name for p in folder.iterdir()} == FILES
    assert [p.name for p in (tmp_path / "results").iterdir()] == [folder.name]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 5)])
def test_a_write_that_breaks_off_leaves_the_old_result(
    error: BaseException, code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("simulate", "s.yaml", "-q").code == 0
    (folder,) = (tmp_path / "results").iterdir()
    before = (folder / "result.json").read_bytes()

    def fails(path: Path, table: object) -> None:
        path.write_text("half")
        raise error

    monkeypatch.setattr(results, "_write_parquet", fails)
    assert run("simulate", "s.yaml", "-q").code == code
    assert (folder / "result.json").read_bytes() == before
    assert [p.name for p in (tmp_path / "results").iterdir()] == [folder.name]


def test_what_is_no_result_is_not_replaced(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "results" / f"small-{load_scenario('s.yaml').hash}"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    ran = run("simulate", "s.yaml", "-q")
    assert ran.code == 2
    assert "is no result" in ran.err
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_timeline_is_written_whole_or_not_at_all(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("simulate", "s.yaml", "-q", "--timeline", "t.json").code == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    before = (tmp_path / "t.json").read_bytes()
    with pytest.raises(BadInput, match="cannot be written"), results.replacing_file(tmp_path / "t.json") as path:
        (path.write_text("half"), (tmp_path / "missing").stat())
    assert (tmp_path / "t.json").read_bytes() == before
    with pytest.raises(BadInput, match="folder"), results.replacing_file(tmp_path):
        pass
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.suffix == ".json"]


# ---- sentences


@pytest.mark.parametrize(
    ("shares", "balance", "start"),
    [
        ({"dispatch": 0.3, "combine": 0.3, "experts": 0.4}, None, "Bound by moving tokens between ranks: 60% of"),
        ({"attention_decode": 0.6, "host": 0.4}, None, "Bound by attention: 60% of the time"),
        (
            {"experts": 0.9, "host": 0.1},
            {"expert_idle_share": 0.4},
            "Bound by the routed experts: 90% of the time, and 40%",
        ),
        ({"lm_head": 0.9, "host": 0.1}, None, "Bound by the dense layers: 90%"),
        ({"host": 0.9, "gate": 0.1}, None, "Bound by the engine's work on the host: 90%"),
    ],
)
def test_what_bounds_a_run_is_said_in_a_sentence(
    shares: dict[str, float], balance: dict[str, float] | None, start: str
) -> None:
    text = terminal.bound_by({"time_share": shares, "balance": balance})
    assert text.startswith(start)
    assert text.endswith(".")


def test_progress_is_for_terminals_only() -> None:
    with terminal.progress_bar(enabled=True) as advance:
        assert advance is None
