"""Committed runs of `moesim validate` as checks: results/validation/raw/NAME holds sealed predictions and the record of
their measurement, and is judged anew whenever the page is made, so rows of a GPU survive on a machine without one.

python benchmarks/validation/raw.py FOLDER NAME [--command "moesim validate ..."]   keeps a validation's folder as NAME

Files are compressed with no time stamp, so that the same measurement is the same bytes; a seal is of what they hold.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in (".", "kernels", "tuner")]

from moesim_kernels.fit.curves import write_whole
from moesim_kernels.validate.bounds import BOUNDS, Bounds, kind_of

from benchmarks.validation.rows import ROOT, Beside, Bound, Found, Row, Source

__all__ = ["KEPT", "RAW", "RawCheck", "keep", "raw_checks"]

RAW = ROOT / "results" / "validation" / "raw"
KEPT = ("predictions.json", "measured*.jsonl", "served*.json", "served*.jsonl")
"""of a validation's folder"""


class RawCheck:
    """One folder, with the names that a file of checks/ has."""

    GROUP = "whole steps"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.COMMAND = json.loads((folder / "about.json").read_text("utf-8"))["command"]

    @cached_property
    def report(self) -> dict[str, Any]:
        """As `moesim validate judge` makes it."""
        from moesim_kernels.validate.assemble import judge_folder

        with tempfile.TemporaryDirectory() as name:
            for path in self.folder.glob("*.gz"):
                (Path(name) / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            return dict(judge_folder(Path(name)))

    @property
    def TITLE(self) -> str:
        """The scenario, and on what."""
        r = self.report
        return f"moesim validate {r['scenario']}: {self._bounds().title} ({self.folder.name})"

    @property
    def SOURCE(self) -> Source:
        """This project's own measurement."""
        m = self.report["machine"]
        machine = m["cpu"] if m["device"] == "cpu" else m["device"]
        files = tuple(str(p.relative_to(ROOT)) for p in sorted(self.folder.glob("*.gz")))
        return Source(f"own {self.folder.name}", "this project", "", "", files, f"{machine}, {m['date'][:10]}", True)

    def rows(self) -> list[Row]:
        """Step and layer times, intervals, a second measurement, candidates, the served run."""
        r, profile = self.report, self._profile()
        out = [self._times("step", "step time", r["ranking"]["tau"])]
        if r["layer"] is not None:
            out.append(self._times("layer", "layer time: routed experts, exchange included", r["layer"]["tau"]))
        c, state = r["coverage"], self._state()
        out.append(
            Row(
                f"intervals of {c['level']:.0%}, median +-{c['median_half_width']:.1%}",
                profile,
                f"the same {c['settings']}",
                Found(c["settings"], 0.0, 0.0),
                inside=c["inside"],
                level=c["level"],
                state=state,
            )
        )
        out += [
            Row(
                f"measured again ({again['record']}): within both measurements' intervals",
                "the first measurement",
                f"the same settings, all shifted by {again['shift']:+.1%}",
                Found(again["settings"], 0.0, 0.0),
                inside=again["inside"],
                level=c["level"],
                state=state or ("agree" if again["agree"] else ""),
            )
            for again in r["again"]
        ]
        return [*out, *self._candidates(), *self._served()]

    def _bounds(self) -> Bounds:
        return BOUNDS[kind_of(self.report["device"], self.report["ranks"])]

    def _profile(self) -> str:
        profile = self.report["profile"]
        source = Path(profile["source"]).name
        return f"profile {source}" if source.startswith("measured") else f"profile {profile['name']}, {source}"

    def _state(self) -> str:
        """What keeps bounds from binding."""
        return next((str(b["why_not"]) for b in self.report["bounds"] if not b["binds"]), "")

    def _times(self, key: str, what: str, tau: float | None) -> Row:
        """Errors of a kind of time."""
        r, found, own = self.report, self.report[key], self._bounds()
        roof, psi = r["baselines"]["roofline"], r["noise"]["psi_percent"]
        steps = key == "step"
        return Row(
            what,
            self._profile(),
            f"{found['settings']} steps, predicted and sealed before the first ran",
            Found(found["settings"], found["median"], found["p90"], tau),
            Bound(f"`moesim validate`, {own.title}", own.median, own.p90, own.tau),
            (Beside("bare roofline", roof["median"], roof["p90"], roof["tau"]),) if steps else (),
            note=f"by {r['clock']} time, PSI {psi or 0:.0f} %{_speed(r['noise'])}" if steps else "",
            state=self._state(),
        )

    def _candidates(self) -> list[Row]:
        """Regret of the tuner's pick beside that of simpler ones."""
        c = self.report["candidates"]
        if c is None:
            return []
        g, count = c["regret"], len(c["rows"])
        simpler = {name: g[name] for name in ("roofline", "random", "default") if g[name] is not None}
        return [
            Row(
                "regret of the pick",
                self._profile(),
                f"{count} candidates of study {c['study']}, {c['figure']}",
                Found(count, g["pick"], g["pick"], c["tau"]),
                Bound("regret of the tuner's pick", g["bound"]),
                tuple(Beside(name, value, value) for name, value in simpler.items()),
                "regret",
            )
        ]

    def _served(self) -> list[Row]:
        """Figures of a served run."""
        served = self.report["served"] or {"bounds": [], "runs": 0}
        return [
            Row(
                f"served run: {b['figure']}",
                self._profile(),
                "runs on the real clock",
                Found(served["runs"], abs(b["found"]), abs(b["found"])),
                Bound("a served run", b["bound"]),
                unit="one",
                state="" if b["binds"] else str(b["why_not"]),
            )
            for b in served["bounds"]
            if b["at"] == "most"
        ]


def _speed(noise: dict[str, Any]) -> str:
    """How fast the machine was against its calibration."""
    shift = noise.get("speed_shift")
    told = "" if shift is None else f"; its reference product took x {shift:.2f} of what it took while calibrating"
    share = noise.get("same_speed")
    return told + ("" if share is None else f", times are at that speed, which {share:.0%} of the samples had")


def raw_checks() -> dict[str, RawCheck]:
    """By name, as the page lists them."""
    return {f"raw/{p.parent.name}": RawCheck(p.parent) for p in sorted(RAW.glob("*/about.json"))}


def keep(folder: Path, name: str, command: str = "") -> Path:
    """Copy what can be judged again of a validation's folder. Raises ValueError where its command is not known."""
    report = folder / "report.md"
    told = re.search(r"`(moesim validate [^`]+)`", report.read_text("utf-8")) if report.exists() else None
    command = re.sub(r" --out(=| )\S+", "", command or (told[1] if told else ""))
    if not command.startswith("moesim "):
        raise ValueError(f"{folder} does not say which command made it; give --command")
    if re.search(r"(^|[ =])[/~]", command):
        raise ValueError(f"{command}: name files relative to the repository, with --command")
    target = RAW / name
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.gz"):
        old.unlink()
    files = {p for pattern in KEPT for p in folder.glob(pattern)}
    for path in sorted(files):
        (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    write_whole(target / "about.json", json.dumps({"command": command}) + "\n")
    return target


def main() -> None:
    """Keep a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that moesim validate has made")
    parser.add_argument("name", help="of the folder below results/validation/raw")
    parser.add_argument("--command", default="", help="that made it; default: as its report.md says")
    options = parser.parse_args()
    kept = keep(options.folder, options.name, options.command)
    print(f"{kept.relative_to(ROOT)}: {sum(p.stat().st_size for p in kept.iterdir())} bytes; now make validation")


if __name__ == "__main__":
    main()
