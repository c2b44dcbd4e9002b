"""docs/tune.md: its block has every key and is valid, its commands and options are the program's, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from moesim_tuner.cli import tune
from moesim_tuner.export import ENGINES, MARKER
from moesim_tuner.figures import known_figures
from moesim_tuner.report import to_json
from typer.main import get_command

from moesim.observe import FIGURES
from moesim.tune_spec import JudgeSpec, LimitSpec, ParameterSpec, RungSpec, TuneSpec
from tests.tuner.studies import Found, definition

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tune.md").read_text()
EXAMPLES = sorted(file.stem for file in (ROOT / "workloads").glob("tune_*.yaml"))


def test_the_block_has_every_key_and_is_valid() -> None:
    block = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])["tune"]
    assert set(block) == set(TuneSpec.model_fields)
    assert set(block["judge"]) == set(JudgeSpec.model_fields)
    assert {key for one in block["space"].values() for key in one} == set(ParameterSpec.model_fields)
    assert {key for one in block["rungs"] for key in one} == set(RungSpec.model_fields)
    assert {key for one in block["constraints"].values() for key in one} <= set(LimitSpec.model_fields)
    TuneSpec.model_validate(block)


def test_every_example_is_on_the_page() -> None:
    assert sorted(re.findall(r"^\| `(tune_\w+)` \|", PAGE, re.MULTILINE)) == EXAMPLES


def test_the_figures_are_known() -> None:
    table = PAGE.split("| figure | better | |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \| (more|less) \|", table, re.MULTILINE)
    named = {name: better for cell, better in rows for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) >= 8
    assert named == {name: "more" if known_figures()[name].more_is_better else "less" for name in named}
    assert set(known_figures()) - set(FIGURES) <= set(named)


def test_commands_are_the_programs_own() -> None:
    """Every word after `moesim tune` is a subcommand or a file, every option one that it has."""
    commands = get_command(tune).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^moesim tune (.*)$", PAGE, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)
        verb = words[0] if words[0] in commands else "run"
        if verb == "run":
            assert (ROOT / words[0]).is_file()
        known = {option for parameter in commands[verb].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_options_of_the_table_are_the_programs_own() -> None:
    run = get_command(tune).commands["run"]  # type: ignore[attr-defined]
    known = {option for parameter in run.params for option in parameter.opts if option.startswith("-")}
    table = PAGE.split("| option of `moesim tune FILE` |")[1].split("\n\n")[0]
    listed = set(re.findall(r"`(-[-a-z]+)", table.replace("`--set tune", "")))
    assert listed <= known
    assert known - listed <= {"--quiet"}


def test_the_table_of_the_report_has_every_key() -> None:
    table = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    keys = set(to_json(Found(definition(), []))) - {"schema_version"}
    assert keys <= set(re.findall(r"`([a-z_]+)(?:\[\])?`", table))


def test_files_of_the_export_are_named() -> None:
    for engine in ENGINES:
        assert f"`{engine}.sh`" in PAGE
    assert f"`{MARKER}`" in PAGE
