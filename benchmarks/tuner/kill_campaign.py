"""Kill `moesim tune` again and again, and show that nothing that was acknowledged is lost.

python benchmarks/tuner/kill_campaign.py [--kills 200] [--storage sqlite|postgres|both] [--seed 1] [--lanes 2]
    [--out results/validation/tuner_kills.md]

Each study (one objective, two objectives, a ladder of rungs; one and two workers; SQLite and a real PostgreSQL) is the
real command as a process of its own, killed with SIGKILL at keyed random moments: while it starts, during the search,
inside the write of a journal's record, inside and right after a transaction of Optuna's tables; the whole process group
or the coordinator alone. Which trials were acknowledged is told by a pipe, not by what is kept. After each death the
journal and the tables are read; after the last one the study runs to its end, and its canonical export must equal, byte
for byte, that of the same study run once, by one worker, without a death.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tuner")]

from benchmarks.tuner.kill_child import Plan  # noqa: E402
from benchmarks.tuner.kill_studies import KINDS, Study, campaign, write_scenarios  # noqa: E402
from benchmarks.tuner.postgres_server import postgres_server  # noqa: E402

TRIALS = 60
_PLACES = ("start", "search", "coordinator", "write", "tables")


def export_of(study: Study, journals: Path) -> str:
    """Its canonical export."""
    from moesim_tuner.store import canonical_export, read_study

    return canonical_export(read_study(study.storage, study.name, journals=journals))


def journals_of(storage: str, folder: Path) -> Path:
    """Where the command, run in `folder`, keeps the journals."""
    from moesim_tuner.store.urls import place_of

    return folder / place_of(storage).journals


def studies(folder: Path, storages: dict[str, str], trials: int, kinds: list[str], warm: bool) -> list[Study]:
    """Every kind, with one and with two workers, in every storage."""
    files = write_scenarios(folder, trials)
    return [
        Study(f"{kind.replace(' ', '-')}-{workers}-{name}", kind, url, workers, files[kind], folder, warm)
        for kind in kinds
        for workers in (1, 2)
        for name, url in storages.items()
    ]


def uninterrupted(folder: Path, trials: int, kinds: list[str], warm: bool) -> tuple[dict[str, str], float]:
    """The export of each kind that nobody kills, and how long one took, in seconds. warm: run here, so that forks of
    this process have everything imported."""
    files = write_scenarios(folder, trials)
    out, longest_s = {}, 0.0
    for kind in kinds:
        storage = f"sqlite:///{folder}/undisturbed.db"
        study = Study(kind.replace(" ", "-"), kind, storage, 1, files[kind], folder)
        began = time.monotonic()
        if warm:
            ended_well = _here(["tune", str(files[kind]), "--storage", storage, "--quiet"])
        else:
            study.live(Plan())
            ended_well = study.ended and not study.faults
        longest_s = max(longest_s, time.monotonic() - began)
        if not ended_well:
            raise SystemExit(f"{kind} does not run undisturbed: {study.faults}")
        out[kind] = export_of(study, journals_of(storage, folder))
    return out, longest_s


def _here(arguments: list[str]) -> bool:
    """`moesim ARGUMENTS` in this process. Did it end well?"""
    from moesim.cli import main as moesim

    before = signal.getsignal(signal.SIGTERM)
    try:
        moesim(arguments)
    except SystemExit as ended:
        return ended.code == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def table(found: list[Study], same: dict[str, bool], took_s: float, arguments: list[str]) -> str:
    """The page."""
    killed = sum(sum(s.kills.values()) for s in found)
    lines = [
        "# The tuner, killed",
        "",
        f"`{' '.join(['python', 'benchmarks/tuner/kill_campaign.py', *arguments])}`",
        "",
        f"{killed} SIGKILLs over {len(found)} studies of {TRIALS} trials, at random moments, in {took_s / 60:.1f}"
        " minutes. Killed while starting (start), while searching (search; or the coordinator alone, whose workers must"
        " end by themselves), inside the write of a journal's record (write), in or right after a transaction of"
        " Optuna's tables (tables). Resumed: from the start of the process to its first new trial, or to its end where"
        " there is nothing to do; seconds.",
        "",
        "| study | killed | "
        + " | ".join(_PLACES)
        + " | acknowledged | lost or changed | left running | as undisturbed |",
        "|---|--:|" + "--:|" * len(_PLACES) + "--:|--:|--:|---|",
    ]
    for s in found:
        lost = sum("lost" in fault or "not what" in fault or "differently" in fault for fault in s.faults)
        running = sum("left running" in fault for fault in s.faults)
        cells = [
            s.name,
            sum(s.kills.values()),
            *(s.kills.get(p, 0) for p in _PLACES),
            len(s.acknowledged),
            lost,
            running,
        ]
        lines.append("| " + " | ".join(map(str, [*cells, "yes" if same[s.name] else "**no**"])) + " |")
    resumed = sorted(t for s in found for t in s.resumed_s)
    if resumed:
        at = [resumed[min(len(resumed) - 1, int(q * len(resumed)))] for q in (0.5, 0.9, 0.99)]
        lines += [
            "",
            f"Resumed {len(resumed)} times: median {at[0]:.2f} s, 90 % {at[1]:.2f} s, 99 % {at[2]:.2f} s, longest "
            f"{resumed[-1]:.2f} s.",
        ]
    faults = [f"- {s.name}: {fault}" for s in found for fault in s.faults]
    lines += ["", "No fault." if not faults else "Faults:", *faults]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it; 1 where anything was lost, stuck or different."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--storage", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2, help="studies at a time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = None if args.out is None else args.out.resolve()
    # an installed package has its bytecode; without it every start would compile some 200 modules anew
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moesim-kills-")))
        os.chdir(folder)
        storages = {} if args.storage == "postgres" else {"sqlite": f"sqlite:///{folder}/tune.db"}
        if args.storage != "sqlite":
            storages["postgres"] = stack.enter_context(postgres_server()).create("tune")
        undisturbed, once_s = uninterrupted(folder, TRIALS, list(KINDS), warm=False)
        print(f"undisturbed: {once_s:.1f} s at most", flush=True)
        found = studies(folder, storages, TRIALS, list(KINDS), warm=False)
        share, rest = divmod(args.kills, len(found))
        queue = [(study, share + (i < rest)) for i, study in enumerate(found)]
        lock = threading.Lock()

        def told(study: Study) -> None:
            with lock:
                total = sum(sum(s.kills.values()) for s in found)
                print(f"{time.monotonic() - began:5.0f} s, {total:3} killed: {study.name}, "
                      f"{len(study.acknowledged)} acknowledged", flush=True)  # fmt: skip

        def lane() -> None:
            while True:
                with lock:
                    if not queue:
                        return
                    study, kills = queue.pop(0)
                campaign(study, journals_of(study.storage, folder), kills, args.seed, 2.5, told)
                left = kills - sum(study.kills.values())
                if left > 0 and study.ended:  # it was done before all its deaths had come: a fresh one has the rest
                    with lock:
                        found.append(study.again())
                        queue.append((found[-1], left))

        lanes = [threading.Thread(target=lane) for _ in range(args.lanes)]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
        same = {}
        for study in found:
            journals = journals_of(study.storage, folder)
            same[study.name] = study.ended and export_of(study, journals) == undisturbed[study.kind]
        page = table(found, same, time.monotonic() - began, sys.argv[1:])
    print(page)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page)
    return int(any(s.faults for s in found) or not all(same.values()))


if __name__ == "__main__":
    raise SystemExit(main())
