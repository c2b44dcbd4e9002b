"""Three contested choices on a CPU: what the simulator picks, beside everything measured.

python benchmarks/validate/spaces.py [--spaces offload capacity placement] [--profile FILE] [--rounds N] [--page]

1. *Calibrate* the operators that the deployments need (`--profile`: take this profile).
2. *Predict* every candidate of every space, and put that on disk, hashed.
3. *Measure* every candidate once a round, in a fresh order each round.
4. *Judge*: regret of the simulator's pick, of the default, of a bare roofline's pick and of a random one, into
   results/validation/contested.json and contested.md. `--page` writes the page again from the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import contested  # noqa: E402  after its folder is on the path
import space_capacity  # noqa: E402
import space_offload  # noqa: E402
import space_placement  # noqa: E402
from moesim_kernels.bench.machine import facts  # noqa: E402
from moesim_kernels.bench.plan import Plan, save_plan  # noqa: E402
from moesim_kernels.bench.pool import Device  # noqa: E402
from moesim_kernels.bench.pressure import cpu_pressure  # noqa: E402
from moesim_kernels.calibrate.deployment import from_scenario  # noqa: E402
from moesim_kernels.calibrate.fitted import calibrate_log  # noqa: E402
from moesim_kernels.calibrate.plan import make_plan  # noqa: E402
from moesim_kernels.calibrate.run import bench_command, measure  # noqa: E402
from moesim_kernels.calibrate.write import write_profile  # noqa: E402

from moesim.scenario.load import load_profile  # noqa: E402

SCENARIO = HERE / "contested.yaml"
OUT = ROOT / "results" / "validation"
FOLDER = ROOT / "results" / "contested"
ROUNDS = {"offload": 4, "capacity": 4, "placement": 7}
_APART = ("storage", "copy", "permute", "combine", "all_gather", "reduce_scatter", "all_reduce")
"""operators that no step here is priced with"""


def main() -> None:
    """Calibrate, predict, measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=sorted(ROUNDS), default=sorted(ROUNDS))
    parser.add_argument("--profile", type=Path, help="take this profile instead of calibrating")
    parser.add_argument("--budget", type=float, default=110.0, help="seconds to calibrate")
    parser.add_argument("--rounds", type=int, help="rounds of every space")
    parser.add_argument("--link", choices=("disk", "memory"), default="disk", help="where offloaded experts are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="model, profile and predictions")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="write the page from the JSON that is there")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < contested.LEAST_ROUNDS:
        parser.error(f"--rounds: at least {contested.LEAST_ROUNDS}, for fewer say nothing of noise")
    if not options.page:
        report = campaign(options)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "contested.json").write_text(json.dumps(report, separators=(",", ":")) + "\n", "utf-8")
    text = contested.page(json.loads((options.out / "contested.json").read_text("utf-8")))
    (options.out / "contested.md").write_text(text, "utf-8")
    print(text.split("\n## ")[0])


def campaign(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but the page."""
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    profile = options.profile or calibrated(options.folder, options.budget)
    profile = profile.resolve()
    made = {}
    for key in options.spaces:
        say(f"{key}: predicting")
        made[key] = predicted(key, profile, options)
    spaces = [space.to_json() for space, _ in made.values()]
    seal = sealed(options.folder / "predictions.json", spaces)
    samples = {}
    for key, (space, measuring) in made.items():
        rounds = options.rounds or ROUNDS[key]
        samples[key] = contested.measured(key, len(space.candidates), rounds, measuring.open, say)
    machine = facts(Device("cpu", 1))
    about = {
        "command": " ".join(["python", "benchmarks/validate/spaces.py", *sys.argv[1:]]),
        "date": machine["date"],
        "cpu": machine["cpu"],
        "cpus": machine["cpus"],
        "torch": machine["torch"],
        "profile": load_profile(profile).name,
        "seal": seal,
        "seconds": round(time.monotonic() - began, 1),
    }
    return {"about": about, "spaces": spaces, "samples": samples}


def predicted(key: str, profile: Path, options: argparse.Namespace) -> tuple[contested.Space, Any]:
    """A space with its predictions, and what measures it."""
    if key == "offload":
        rate = load_profile(profile).hbm_bytes_per_s * 1e-9
        return space_offload.predict(options.folder, options.link, rate)
    return (space_capacity if key == "capacity" else space_placement).predict(SCENARIO, profile)


def calibrated(folder: Path, budget_s: float) -> Path:
    """A profile of this machine for both deployments."""
    say(f"calibrating, {budget_s:g} s")
    deployments = [from_scenario(SCENARIO, []), from_scenario(SCENARIO, [*space_placement.EP2])]
    whole = make_plan(deployments, "cpu")
    plan = Plan("cpu", tuple(c for c in whole.cases if c.op not in _APART), 1, whole.note)
    out = folder / "contested.yaml"
    log = folder / "contested.log.jsonl"
    log.unlink(missing_ok=True)
    save_plan(plan, folder / "contested.plan.json")
    measure(bench_command(folder / "contested.plan.json", log, budget_s, "cpu"), log, True)
    made = calibrate_log(plan, log, "contested", "benchmarks/validate/spaces.py")
    write_profile(out, made.spec, made.curves)
    return out


def sealed(path: Path, spaces: list[dict[str, Any]]) -> str:
    """Predictions, whole and on disk before anything is measured; their SHA-256."""
    from moesim_kernels.bench.strict import canonical
    from moesim_kernels.validate.predict import seal_of

    from moesim.results import replacing_file

    with replacing_file(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        file.write(canonical({"spaces": spaces}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return seal_of(path)


def say(text: str) -> None:
    """To stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}, PSI {cpu_pressure()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
