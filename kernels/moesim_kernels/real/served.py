"""A served run as a process of its own: scenario in, records out, no price anywhere.

python -m moesim_kernels.real.served SCENARIO --out FILE.json [--set KEY=VALUE ...] [--clock wall|cpu] [--device cpu]
    [--seed N] [--requests N] [--seal TEXT]

The records are those of requests (arrival, first token, end) and steps (start, duration, waiting, host's part), with
the machine's facts and the seal, which is passed through unread: the checksum of predictions that were written before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared
from moesim.workload.requests import RequestStream
from moesim_kernels.real.serve import CpuClock, Served, WallClock, serve
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve

__all__ = ["first_requests", "main", "records", "served"]

_WARM = 12
"""steps before the clock starts"""


def served(prepared: Prepared, executor: Any, clock: str, idle: Callable[[], None] | None = None) -> Served:
    """Serve a scenario on an executor (`real.rank.RealRank`) that has been warmed up. clock: wall or cpu; idle: called
    in pauses of the wall's."""
    _warm_up(prepared, executor)
    if clock == "wall":
        return serve(prepared, executor, WallClock(), idle=idle)
    return serve(prepared, executor, CpuClock())


def _warm_up(prepared: Prepared, executor: Any) -> None:
    """Steps of the sizes to come, whose requests are forgotten again."""
    deployment, lengths = prepared.deployment, prepared.stream.prompt_tokens.tolist()
    assert deployment is not None
    most = min(deployment.max_num_seqs, len(lengths))
    for turn in range(_WARM):
        decoding = max(1, most * (turn + 1) // _WARM)
        chunk = min(lengths[0], deployment.max_num_batched_tokens)
        chunks = ((0, 0, chunk, 0, 1),) if turn % 3 == 0 else ()
        decode = tuple((r, lengths[r], 0) for r in range(1 if chunks else 0, decoding))
        setting = Setting(f"warm {turn}", (), decode, chunks)
        if not setting.tokens:
            continue
        work: StepWork = resolve(prepared, setting)
        executor.run(executor.load(work))
        for request in range(decoding):
            executor.forget(request)


def first_requests(stream: RequestStream, count: int) -> RequestStream:
    """The first requests of a stream alone."""
    return replace(
        stream,
        arrival_ns=stream.arrival_ns[:count],
        prompt_tokens=stream.prompt_tokens[:count],
        output_tokens=stream.output_tokens[:count],
        session_id=stream.session_id[:count],
    )


def records(run: Served) -> dict[str, Any]:
    """As JSON values: columns of requests and steps, ns."""
    requests, steps = run.outcome.requests, run.outcome.steps
    return {
        "requests": {
            name: getattr(requests, name).tolist()
            for name in (
                "arrival_ns", "first_token_ns", "finish_ns", "prompt_tokens", "output_tokens", "target", "preemptions"
            )
        },
        "steps": {
            "start_ns": steps.start_ns().tolist(),
            "duration_ns": steps.duration_ns.tolist(),
            "decoding": steps.per_step(steps.run_decoding).tolist(),
            "waiting": steps.per_step(steps.run_waiting).tolist(),
            "host_ns": run.host_ns,
            "wall_ns": [int(t.wall_ns) for t in run.times],
            "cpu_ns": [int(t.cpu_ns) for t in run.times],
        },
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.real.served")
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--requests", type=int, help="the first N alone")
    parser.add_argument("--seal", default="")
    args = parser.parse_args(arguments)
    from moesim_kernels.bench.harness import reference_product
    from moesim_kernels.bench.machine import facts
    from moesim_kernels.bench.pool import Device, Pool
    from moesim_kernels.bench.pressure import cpu_pressure
    from moesim_kernels.real.rank import RealRank

    scenario = load_scenario(args.scenario, tuple(args.overrides))
    if args.seed is not None:
        scenario = replace(scenario, seed=args.seed)
    prepared = prepare_real(scenario)
    if args.requests is not None:
        prepared.stream = first_requests(prepared.stream, args.requests)
    executor = RealRank(prepared, device=args.device, graphs=False)  # every step is new: none is captured for one run
    before = cpu_pressure()
    device = Device.find(args.device)
    reference = reference_product(device, Pool(device))
    speed = [reference()]  # how fast the machine is: before, in pauses, after
    run = served(prepared, executor, args.clock, lambda: speed.append(reference()))
    speed.append(reference())
    host = [t for t in run.host_ns if t >= 0]
    found = {
        "seal": args.seal,
        "scenario": scenario.hash,
        "clock": args.clock,
        "machine": facts(device),
        "reference_ns": speed,
        "psi": [before, cpu_pressure()],
        "host_us_median": float(np.median(host)) / 1e3 if host else None,
        **records(run),
    }
    part = args.out.with_name(f".{args.out.name}.part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(args.out)
    return 0


if __name__ == "__main__":
    from moesim.errors import MoesimError

    try:
        raise SystemExit(main())
    except MoesimError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
