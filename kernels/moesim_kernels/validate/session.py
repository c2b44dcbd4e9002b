"""A validation as stages over a folder, each file complete before the next begins; what is there is not done again.

scenario.yaml  options.json        what is validated, as written
profile.yaml ...                   measured now, unless one was given
anchors.json  anchors.jsonl        steps measured before anything is predicted: how far whole steps are off, from which
                                   the predictions take their intervals
host.json                          other requests served: what planning a step takes
settings.json                      what the measuring process will be given
predictions.json                   sealed: its SHA-256 goes into the head of every record
measured.jsonl  measured-2.jsonl   records; the first one is judged, later ones are compared with it (--again)
measured-fresh.jsonl               a study's winner, measured again on steps that nothing was chosen by
served-1.json  served-2.json       the scenario's requests, served for real
report.json  report.md
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, MoesimError, Problem
from moesim.results import json_text, rebased, replacing_file
from moesim.scenario.files import profile_hash
from moesim.scenario.load import Scenario, load_profile, load_scenario
from moesim.simulate import Prepared
from moesim_kernels.bench.strict import canonical
from moesim_kernels.real.work import Setting, prepare_real, price, resolve
from moesim_kernels.validate.anchors import Anchored, anchored_by
from moesim_kernels.validate.baseline import roofline_ns
from moesim_kernels.validate.measure import measure_command, read_settings, write_settings
from moesim_kernels.validate.predict import Predictions, predict, read_predictions, seal_of, write_sealed
from moesim_kernels.validate.profile import made_profile, profile_facts
from moesim_kernels.validate.record import read_record
from moesim_kernels.validate.serving import host_of, predicted_run, serve_command, served_file
from moesim_kernels.validate.settings import Limits, allowed_variants, draw_settings
from moesim_kernels.validate.steps import representative_steps

__all__ = ["Options", "Session"]

PREDICTIONS, SETTINGS, SCENARIO = "predictions.json", "settings.json", "scenario.yaml"
ANCHORS, HOST, BEFORE = "anchors.json", "host.json", "before any prediction"
FIRST, FRESH = "measured.jsonl", "measured-fresh.jsonl"
SERVED_RUNS = 2
STEPS_OF_A_RUN = 6
"""steps that stand for a candidate's run, and as many fresh ones"""


@dataclass(frozen=True)
class Options:
    """As the command line says it. overrides: `--set`; calibrate_s: seconds for a profile where none is given."""

    scenario: Path
    overrides: tuple[str, ...] = ()
    profile: Path | None = None
    calibrate_s: float = 150.0
    settings: int = 44
    anchors: int = 29
    rounds: int = 9
    ranks: int | None = None
    study: str | None = None
    storage: str = ""
    top: int = 5
    device: str = "cpu"
    threads: int = 1
    backend: str = "torch"
    seed: int | None = None
    serve: bool = True
    quiet: bool = False


def _together(scenario: Path, overrides: tuple[str, ...], ranks: int | None) -> tuple[str, ...]:
    """Overrides that make `ranks` processes of the scenario: an expert-parallel group on one machine."""
    if ranks is None or ranks == load_scenario(scenario, overrides).parallel.dp:
        return overrides
    exchange = ("communication.all_to_all=pairwise",) if ranks > 1 else ()
    layout = (f"cluster.gpus_per_node={ranks}", "parallel.tp=1", f"parallel.dp={ranks}", f"parallel.ep={ranks}")
    return (*overrides, *layout, *exchange)


class Session:
    """The folder of one validation, and its stages."""

    def __init__(self, options: Options, out: Path) -> None:
        """Raises BadInput for a scenario that cannot be executed."""
        overrides = _together(options.scenario, options.overrides, options.ranks)
        self.written: Scenario = load_scenario(options.scenario, overrides)
        self.options = replace(
            options, overrides=overrides, seed=options.seed if options.seed is not None else self.written.seed
        )
        self.ranks = self.written.parallel.dp
        if options.device == "cuda" and self.ranks > 1:
            message = (
                f"one GPU executes one rank, and this scenario has {self.ranks}; give one of dp=ep=1, or --device cpu"
            )
            raise BadInput(Problem("--device", message))
        prepare_real(self.written)
        self._check_profile()
        self.folder = out / f"validate-{self.written.name}-{self._hash()}"

    def _check_profile(self) -> None:
        """Raise BadInput, before anything is written, for a profile that cannot be read or cannot be measured."""
        from moesim_kernels.calibrate.deployment import deployment_of

        if self.options.profile is not None:
            load_profile(self.options.profile)
            return
        problems = deployment_of(self.written).unmeasured(self.options.device)
        if problems:
            raise BadInput(problems)

    def _hash(self) -> str:
        o = self.options
        told = {
            "scenario": self.written.hash,
            "profile": o.calibrate_s if o.profile is None else profile_hash(o.profile),
            "run": [o.settings, o.anchors, self.ranks, o.device, o.threads, o.backend, o.seed],
            "study": None if o.study is None else [o.study, o.storage, o.top],
            "serve": o.serve,
        }
        return hashlib.blake2b(canonical(told).encode(), digest_size=6).hexdigest()

    @property
    def seed(self) -> int:
        """Of every draw."""
        assert self.options.seed is not None
        return self.options.seed

    def open(self) -> None:
        """Make the folder, and write down what is validated. Raises BadInput where it cannot be written."""
        from moesim.scenario.yamlio import dump_yaml

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(Problem(str(self.folder), f"cannot be made: {error.strerror}; use --out")) from None
        told = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.options).items() if k != "quiet"}
        for name, text in (
            (SCENARIO, dump_yaml(rebased(self.written, self.folder))),
            ("options.json", json_text(told)),
        ):
            with replacing_file(self.folder / name) as hidden:
                hidden.write_text(text, encoding="utf-8")

    # ---- predictions

    def profile(self) -> Path:
        """Given, or measured here and now."""
        o = self.options
        if o.profile is not None:
            return o.profile
        return made_profile(
            self.folder / SCENARIO, (), self.folder, device=o.device, threads=o.threads, backend=o.backend,
            seconds=o.calibrate_s, seed=self.seed, quiet=o.quiet,
        )  # fmt: skip

    def predictions(self, profile: Path) -> Predictions:
        """The sealed ones, made now where they are not there yet."""
        path = self.folder / PREDICTIONS
        if path.exists():
            return read_predictions(path)
        prepared_for = self._preparer(profile)
        variants, refused = allowed_variants(lambda o: prepared_for(o).result.scenario.hash)
        limits = Limits.of(prepared_for(()), alike=self.options.device == "cuda")
        held_out = draw_settings(limits, self.options.settings, self.seed, variants)
        told = "measured for this run" if self.options.profile is None else profile.name
        machine = {
            "device": self.options.device,
            "ranks": self.ranks,
            "profile": profile_facts(load_profile(profile), told),
        }
        anchored = self._anchored(limits, variants, prepared_for, machine)
        study, settings = self._candidates(prepared_for)
        run, why, host_us = self._predicted_run(profile) if self.options.serve else (None, "", None)
        facts = {
            "scenario": self.written.name,
            "scenario_hash": self.written.hash,
            **machine,
            "layers": self.written.model.num_moe_layers,
            "seed": self.seed,
            "variants_refused": refused,
            "anchors": None if anchored is None else anchored.to_json(),
            "held_out": [s.name for s in held_out],
            "study": study,
            "served": run,
            "not_served": why,
            "host_us": host_us,
        }
        found = predict([*held_out, *settings], prepared_for, facts)
        if anchored is not None:
            found = anchored.applied(found)
        write_settings(self.folder / SETTINGS, [*held_out, *settings])
        write_sealed(path, found)
        return found

    def _preparer(self, profile: Path) -> Callable[[tuple[str, ...]], Prepared]:
        """The scenario on the profile, with a setting's overrides, laid out; each once."""
        made: dict[tuple[str, ...], Prepared] = {}
        device = f"cluster.device={profile.resolve()}"

        def prepared_for(overrides: tuple[str, ...]) -> Prepared:
            if overrides not in made:
                made[overrides] = prepare_real(load_scenario(self.folder / SCENARIO, (*overrides, device)))
            return made[overrides]

        return prepared_for

    def _candidates(
        self, prepared_for: Callable[[tuple[str, ...]], Prepared]
    ) -> tuple[dict[str, Any] | None, list[Setting]]:
        """Candidates of the study with the steps that stand for them; those that cannot be executed, and why."""
        o = self.options
        if o.study is None:
            return None, []
        from moesim_kernels.validate.candidates import read_candidates

        candidates, facts = read_candidates(o.study, o.storage, o.top, self.seed)
        rows: list[dict[str, Any]] = []
        settings: list[Setting] = []
        skipped: dict[str, str] = {}
        for c in candidates:
            try:
                prepared = prepared_for(c.overrides)
                seen = representative_steps(prepared, STEPS_OF_A_RUN, self.seed, f"{c.name}/", c.overrides)
                new = representative_steps(prepared, STEPS_OF_A_RUN, self.seed + 1, f"{c.name}/fresh-", c.overrides)
            except MoesimError as error:
                skipped[c.name] = str(error).splitlines()[0]
                continue
            settings += [*seen.settings, *new.settings]
            floor = [roofline_ns(prepared, resolve(prepared, s)) for s in seen.settings]
            priced = [price(prepared, s).ns for s in seen.settings]
            ratio = sum(f / p for f, p in zip(floor, priced, strict=True)) / len(floor)
            rows.append(
                {
                    **c.to_json(),
                    "default": c.role == "default",
                    "predicted_ns_per_token": round(seen.ns_per_token, 1),
                    "roofline_ns_per_token": round(seen.ns_per_token * ratio, 1),
                    "steps": seen.steps,
                    "settings": [s.name for s in seen.settings],
                    "fresh": [s.name for s in new.settings],
                }
            )
        return {**facts, "candidates": rows, "skipped": skipped}, settings

    def _anchored(
        self,
        limits: Limits,
        variants: Sequence[tuple[str, ...]],
        prepared_for: Callable[[tuple[str, ...]], Prepared],
        facts: dict[str, Any],
    ) -> Anchored | None:
        """What whole steps are off by, on steps drawn like the held-out ones and measured now; None where none are
        asked for. Nobody has predicted anything yet that these could be judged by, so their seal says so."""
        if not self.options.anchors:
            return None
        steps = draw_settings(limits, self.options.anchors, self.seed, variants, "anchor-")
        asked, record = self.folder / ANCHORS, self.folder / f"{Path(ANCHORS).stem}.jsonl"
        write_settings(asked, steps)
        if not self._complete(record.name, [s.name for s in steps], BEFORE):
            self._run(asked, record, BEFORE, len(steps))
        return anchored_by(predict(steps, prepared_for, facts), read_record(record, BEFORE))

    def _predicted_run(self, profile: Path) -> tuple[dict[str, list[int]] | None, str, float | None]:
        """The simulated run of the scenario's requests, or why none is served; and us of each step that planning takes
        here: measured now on other requests, it stands for `engine.host_overhead_us`, which no profile knows."""
        device = f"cluster.device={profile.resolve()}"
        run, why = predicted_run(load_scenario(self.folder / SCENARIO, (device,)))
        if run is None:
            return None, why, None
        out = self.folder / HOST
        if not self.options.anchors:  # nothing is measured before the prediction
            return run, why, None
        if not out.exists():
            from moesim_kernels.calibrate.run import measure

            o = self.options
            command = serve_command(self.folder / SCENARIO, out, BEFORE, o.device, "cpu", self.seed + 1)
            measure(command, out, o.quiet)
        host_us = host_of(out)
        overrides = (device,) if host_us is None else (device, f"engine.host_overhead_us={host_us:.1f}")
        return *predicted_run(load_scenario(self.folder / SCENARIO, overrides)), host_us

    # ---- measuring

    def measure(self, predictions: Predictions, again: bool) -> None:
        """Measure all that is not measured yet; again: once more from the beginning, when all is."""
        names = [p.name for p in predictions.settings]
        fresh = {name for c in (predictions.facts.get("study") or {}).get("candidates", []) for name in c["fresh"]}
        first = [name for name in names if name not in fresh]
        self._measured(FIRST, first)
        if again:
            number = 2
            while (self.folder / f"measured-{number + 1}.jsonl").exists():
                number += 1
            if self._complete(f"measured-{number}.jsonl", first):
                number += 1
            self._measured(f"measured-{number}.jsonl", first)

    def measure_fresh(self, names: Sequence[str]) -> None:
        """The steps that a study's winner is judged by; none: nothing."""
        if names:
            self._measured(FRESH, names)

    def _complete(self, record: str, names: Sequence[str], seal: str | None = None) -> bool:
        path = self.folder / record
        if not path.exists():
            return False
        found = read_record(path, seal or seal_of(self.folder / PREDICTIONS))
        counts = dict.fromkeys(found.refused, self.options.rounds)
        for sample in found.samples:
            counts[sample.setting] = counts.get(sample.setting, 0) + 1
        return all(counts.get(name, 0) >= self.options.rounds for name in names)

    def _measured(self, record: str, names: Sequence[str]) -> None:
        if self._complete(record, names):
            return
        wanted = set(names)
        given = [s for s in read_settings(self.folder / SETTINGS) if s.name in wanted]
        asked = self.folder / f"{Path(record).stem}.settings.json"
        write_settings(asked, given)
        self._run(asked, self.folder / record, seal_of(self.folder / PREDICTIONS), len(given))

    def _run(self, asked: Path, record: Path, seal: str, steps: int) -> None:
        """Measure a file of settings in a process of its own."""
        from moesim_kernels.calibrate.run import measure

        o = self.options
        if not o.quiet:
            print(f"measuring {steps} steps, {o.rounds} rounds", file=sys.stderr)
        command = measure_command(
            self.folder / SCENARIO, asked, record, seal, device=o.device, threads=o.threads, backend=o.backend,
            rounds=o.rounds, seed=self.seed,
        )  # fmt: skip
        measure(command, record, o.quiet)

    def serve(self, predictions: Predictions, quiet: bool) -> None:
        """Serve the scenario's requests for real, as often as is asked for and not done yet. quiet: by the wall, on
        which an idle server waits; else by the thread's CPU time, on which it does not."""
        from moesim_kernels.calibrate.run import measure

        if predictions.facts["served"] is None:
            return
        clock = "wall" if quiet or self.options.device == "cuda" else "cpu"
        for number in range(1, SERVED_RUNS + 1):
            out = served_file(self.folder, number)
            if out.exists():
                continue
            if not self.options.quiet:
                print(
                    f"serving {len(predictions.facts['served']['arrival_ns'])} requests, run {number}", file=sys.stderr
                )
            seal = seal_of(self.folder / PREDICTIONS)
            command = serve_command(self.folder / SCENARIO, out, seal, self.options.device, clock)
            measure(command, out, self.options.quiet)
