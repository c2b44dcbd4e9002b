"""`python -m moesim_kernels.runtime`: the verb without moesim's command line around it, with its exit codes."""

from __future__ import annotations

import sys

import typer

from moesim.errors import BadInput, Infeasible, MoesimError
from moesim_kernels.runtime.command import runtime
from moesim_kernels.runtime.errors import EXIT_RESOURCES, no_room

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb: 0, 1 our mistake, 2 bad input, 3 infeasible, 5 memory or disk, 130 interrupted; a line an error."""
    command = typer.main.get_command(runtime)
    try:
        with no_room("output"):
            command.main(args=arguments, prog_name="python -m moesim_kernels.runtime")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except MoesimError as error:
        many = isinstance(error, BadInput | Infeasible)
        parts = getattr(error, "problems", None) or getattr(error, "reasons", None) if many else [error]
        for part in parts or [error]:
            print("error: " + " ".join(str(part).split()), file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("error: out of memory; use a smaller model or cache", file=sys.stderr)
        return EXIT_RESOURCES
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  the last resort: a line, never a traceback
        print(f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
