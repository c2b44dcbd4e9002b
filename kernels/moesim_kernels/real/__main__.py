"""`python -m moesim_kernels.real`: run steps of a scenario for real on this machine, and write down what they took."""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path

from moesim.errors import BadInput, Infeasible, MoesimError

__all__ = ["main"]

EXIT_BAD_INPUT, EXIT_RESOURCES, EXIT_INTERRUPTED = 2, 5, 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moesim_kernels.real", description="Measure steps of a scenario.")
    parser.add_argument("file", nargs="?", type=Path, metavar="SCENARIO", help="a serving scenario at token fidelity")
    parser.add_argument("--scenario", type=Path, help="the same, as an option")
    parser.add_argument("--settings", type=Path, required=True, help="steps to run: a JSON list of settings")
    parser.add_argument("--log", type=Path, required=True, help="record to begin or to go on with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the scenario")
    parser.add_argument("--seal", default="", help="text for the head of the record")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--backend", default="torch", help="of the experts: torch or triton (default torch)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each setting (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="order of the rounds (default 0)")
    parser.add_argument("--weights-seed", type=int, default=0, help="values of the weights (default 0)")
    parser.add_argument("--ranks", type=int, help="refuse a scenario of another number of ranks")
    parser.add_argument("--alone", type=int, metavar="RANK", help="play this rank of a larger group, without exchange")
    parser.add_argument("--parent", type=int, help="end, everything kept, once this process is no longer our parent")
    return parser


def _go(options: argparse.Namespace) -> int:
    from moesim_kernels.real.run import Measurement, measure

    scenario = options.scenario or options.file
    if scenario is None:
        raise BadInput("name a scenario", "SCENARIO")
    if not 1 <= options.threads <= 1024:
        raise BadInput(f"threads must be from 1 to 1024; got {options.threads}", "--threads")
    o = options
    asked = Measurement(
        scenario, o.settings, o.log, o.seal, tuple(o.set), o.device, o.threads, o.backend, o.rounds, o.seed,
        o.weights_seed, o.ranks, o.alone, o.parent,
    )  # fmt: skip
    ended = measure(asked)
    if ended.signal is not None:
        return 128 + ended.signal
    print(f"{ended.samples} steps measured in {ended.seconds:.1f} s: {options.log}")
    for name, reason in ended.refused.items():
        print(f"not measured: {name}: {reason}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """0 measured, 1 our mistake, 2 bad input, 3 does not fit, 5 memory or disk, 130 or 143 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _go(options)
    except MoesimError as error:
        many = isinstance(error, BadInput | Infeasible)
        parts = getattr(error, "problems", None) or getattr(error, "reasons", None) if many else [error]
        for part in parts or [error]:
            print("error: " + " ".join(str(part).split()), file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed, and executing needs it; install {error.name}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except MemoryError:
        print("error: out of memory; what was measured is kept", file=sys.stderr)
        return EXIT_RESOURCES
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        print(f"error: {error.filename or options.log}: {error.strerror}", file=sys.stderr)
        return EXIT_RESOURCES if full else EXIT_BAD_INPUT
    except Exception as error:  # noqa: BLE001  the last resort: a line, never a traceback
        print(f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
