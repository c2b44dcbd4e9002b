"""The studies of the kill campaign, their processes, and what must hold after each death."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.tuner.kill_child import Plan, command, run, seal
from moesim.rng import generator

__all__ = ["KINDS", "Study", "write_scenarios"]

_MODEL = """\
name: tiny-moe
source: made up
num_layers: 2
hidden_size: 256
vocab_size: 1024
tie_word_embeddings: false
max_position_embeddings: 65536
dense_intermediate_size: 512
attention: {kind: gqa, num_heads: 8, num_kv_heads: 8, head_dim: 32}
moe: {num_experts: 8, top_k: 2, intermediate_size: 128, first_dense_layers: 1}
"""
_SCENARIO = """\
name: %(name)s
seed: 1
model: tiny.yaml
cluster: {device: rtx_4090, nodes: 1, gpus_per_node: 1}
parallel: {tp: 1, dp: 1, ep: 1}
requests:
  format: poisson
  rate_per_s: 200
  num_requests: 6
  prompt_tokens: {distribution: lognormal, mean: 100, cv: 1.0, max: 400}
  output_tokens: {distribution: lognormal, mean: 6, cv: 0.8, max: 20}
routing: {popularity_zipf: 0.8, fidelity: token}
engine: {max_num_seqs: 64, max_num_batched_tokens: 512}
tune:
  space:
    engine.max_num_seqs: {range: [1, 200]}
    engine.max_num_batched_tokens: {choices: [128, 256, 384, 512, 1024, 2048]}
    engine.host_overhead_us: {range: [0.0, 500.0]}
  judge: {finalists: 1, seeds: 2, fit_share: 0}
  batch: 4
  trials: %(trials)d
%(rest)s"""
KINDS = {
    "one objective": "  objectives: [ttft_p99_ms]\n",
    "two objectives": "  objectives: [ttft_p99_ms, output_tok_per_s]\n  sampler: nsga2\n",
    "rungs": (
        "  objectives: [ttft_p99_ms]\n  sampler: tpe\n  rungs: [{set: {requests.num_requests: 2}}, {}, {seeds: 2}]\n"
    ),
}
"""kind -> the rest of its `tune` block"""


def write_scenarios(folder: Path, trials: int) -> dict[str, Path]:
    """The scenarios' files, by kind."""
    (folder / "tiny.yaml").write_text(_MODEL)
    out = {}
    for kind, rest in KINDS.items():
        out[kind] = folder / f"{kind.replace(' ', '_')}.yaml"
        out[kind].write_text(_SCENARIO % {"name": kind.replace(" ", "-"), "trials": trials, "rest": rest})
    return out


@dataclass
class Study:
    """One study that is killed again and again. journals: its folder; warm: processes are forks of this one, whose
    imports are done, instead of new interpreters."""

    name: str
    kind: str
    storage: str
    workers: int
    file: Path
    folder: Path
    warm: bool = False
    acknowledged: dict[int, str] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    resumed_s: list[float] = field(default_factory=list)
    ended: bool = False
    faults: list[str] = field(default_factory=list)

    def again(self) -> Study:
        """The same kind of study, not begun."""
        name, _, turn = self.name.partition("~")
        study = Study(f"{name}~{int(turn or 1) + 1}", self.kind, self.storage, self.workers, self.file, self.folder)
        study.warm = self.warm
        return study

    def plan(self, seed: int, number: int, begin_s: float) -> Plan:
        """The number-th death, drawn from the campaign's seed."""
        rng = generator(seed, "kill-campaign", *self.name.encode(), number)
        at = str(rng.choice(["start", "search", "search", "coordinator", "write", "write", "tables"]))
        if at == "start":
            return Plan(at, after_s=float(rng.uniform(0, begin_s)))
        if at == "write":
            return Plan(at, int(rng.integers(1, 12)), share=float(rng.choice([0, rng.uniform(0, 1), 1])))
        if at == "tables":
            return Plan(at, int(rng.integers(1, 4)), share=float(rng.choice([0, 1])))
        return Plan(at, int(rng.integers(1, 6)), after_s=float(rng.exponential(0.03)))

    def live(self, plan: Plan) -> bool:
        """Start the command, or go on with it, until it dies as planned or is done. Was it killed?"""
        again = bool(self.acknowledged)
        verb = ["tune", "resume", self.name] if again and len(self.kills) % 2 else ["tune", str(self.file)]
        study = [] if verb[1] == "resume" else ["--study", self.name]
        arguments = [*verb, *study, "--storage", self.storage, "--workers", str(self.workers), "--quiet"]
        began = time.monotonic()
        read, write = os.pipe()
        pid = self._start(write, plan, arguments)
        os.close(write)
        seen = 0
        buffer = b""
        deadline = None if plan.at != "start" else began + plan.after_s
        status: int | None = None
        killed = False
        while True:
            if select.select([read], [], [], 0.005)[0]:
                data = os.read(read, 1 << 16)
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    number, sealed = line.decode().split()
                    self._acknowledge(int(number), sealed)
                    seen += 1
                    if seen == 1 and again:
                        self.resumed_s.append(time.monotonic() - began)
                    if seen >= plan.count and deadline is None and plan.at in ("search", "coordinator"):
                        deadline = time.monotonic() + plan.after_s
            if deadline is not None and not killed and status is None and time.monotonic() >= deadline:
                killed = True
                with contextlib.suppress(ProcessLookupError):
                    (os.kill if plan.at == "coordinator" else os.killpg)(pid, signal.SIGKILL)
            if status is not None:
                break  # what was left in the pipe has been read
            done, found = os.waitpid(pid, os.WNOHANG)
            if done:
                status = found
        os.close(read)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if died:
            self.kills[plan.at] = self.kills.get(plan.at, 0) + 1
        else:
            self.ended = os.WEXITSTATUS(status) == 0
            if not self.ended:
                self.faults.append(f"exit code {os.WEXITSTATUS(status)}: {self._said()}")
            elif again and not seen:
                self.resumed_s.append(time.monotonic() - began)
        self._check_processes(pid)
        return died

    def _start(self, told: int, plan: Plan, arguments: list[str]) -> int:
        log = self.folder / f"{self.name}.log"
        if not self.warm:
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command(told, plan, arguments), stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                    cwd=self.folder, pass_fds=(told,), start_new_session=True,
                )  # fmt: skip
            process.returncode = 0  # it is waited for by its id
            return process.pid
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(self.folder)
            run(told, plan, arguments)
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        except BaseException:  # noqa: BLE001 this is a fork; nothing may leave it
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(99)

    def _said(self) -> str:
        """The last that it said."""
        return " ".join((self.folder / f"{self.name}.log").read_text(errors="replace").splitlines()[-3:])

    def _acknowledge(self, number: int, sealed: str) -> None:
        if self.acknowledged.setdefault(number, sealed) != sealed:
            self.faults.append(f"trial {number} was acknowledged twice, differently")

    def _check_processes(self, session: int) -> None:
        """Workers end by themselves once their coordinator is gone."""
        end = time.monotonic() + 10
        while left := _of_session(session):
            if time.monotonic() > end:
                self.faults.append(f"processes {left} live on")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    def check(self, journals: Path) -> None:
        """What must hold of the journal and of the tables, each read by itself."""
        from moesim_tuner.store.journal import read_journal
        from moesim_tuner.store.looking import _read_tables
        from moesim_tuner.store.urls import place_of

        place = place_of(self.storage, journals)
        path = place.journal(self.name)
        kept = read_journal(path).kept if path.exists() else None
        trials = {} if kept is None else kept.by_number
        for number, sealed in self.acknowledged.items():
            if number not in trials:
                self.faults.append(f"trial {number} was acknowledged and is lost")
            elif seal(trials[number]) != sealed:
                self.faults.append(f"trial {number} is not what was acknowledged")
        there = _read_tables(place, self.name)
        for trial in there.trials if there is not None else []:
            if trial.number not in trials or seal(trials[trial.number]) != seal(trial):
                self.faults.append(f"trial {trial.number} of the tables is not the journal's")
        if self.ended and (there is None or len(there.by_number) != len(trials)):
            self.faults.append("the study has ended, and its tables are behind")


def _of_session(session: int) -> list[int]:
    """Processes of a session that are not dead."""
    out = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    out.append(int(entry))
    return out


def unfinished(storage: str) -> int:
    """Trials of any study that Optuna's tables call running or waiting."""
    import sqlalchemy
    from moesim_tuner.store.looking import _is_database
    from moesim_tuner.store.sql import engine_of
    from moesim_tuner.store.urls import place_of

    place = place_of(storage)
    if place.file is not None and not _is_database(place.file):
        return 0
    with engine_of(place, writing=False).connect() as connection:
        if not sqlalchemy.inspect(connection).has_table("trials"):
            return 0
        query = "SELECT count(*) FROM trials WHERE state IN ('RUNNING', 'WAITING')"
        return int(connection.exec_driver_sql(query).scalar() or 0)


def campaign(
    study: Study, journals: Path, kills: int, seed: int, begin_s: float, told: Callable[[Study], None]
) -> None:
    """Kill a study up to `kills` times, checking after each, then let it end; it may end before."""
    number = 0
    while sum(study.kills.values()) < kills and not study.ended and number < 4 * kills + 8:
        study.live(study.plan(seed, number, begin_s))
        study.check(journals)
        stuck = unfinished(study.storage)
        if stuck:
            study.faults.append(f"{stuck} trials are left running")
        told(study)
        number += 1
    if not study.ended:
        study.live(Plan())
        study.check(journals)
    if not study.ended:
        study.faults.append("it did not end")
