"""A profile's two files, written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim.hardware import Curve
from moesim.scenario.files import NAME
from moesim_kernels.fit.curves import curves_text
from moesim_kernels.fit.model import profile_yaml

__all__ = ["HEAD", "check_target", "write_profile", "written"]

HEAD = "Written by moesim calibrate; provenance says how."


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Errors of writing `path` as bad input that names it; a full disk stays an OSError, with its own exit code."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(Problem(str(path), f"cannot be written: {reason}. Name a file in a folder of yours")) from None


def check_target(out: Path) -> None:
    """Make the folder of `out` and see that a profile can be written there, before minutes are spent on measuring.

    Raises BadInput for a name that no scenario could use, a folder that cannot be written, or a file that no
    calibration wrote.
    """
    if out.suffix != ".yaml" or not NAME.fullmatch(out.stem):
        message = f"a profile is a .yaml file named by letters, digits, '.', '_' and '-'; got {out.name!r:.60}"
        raise BadInput(Problem("--out", f"{message}. Use for example hw_profiles/my_gpu.yaml"))
    probe = out.with_name(f".{out.name}.{os.getpid()}.probe")
    with written(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if out.exists():
            with out.open(encoding="utf-8", errors="replace") as file:
                ours = HEAD in file.readline(1000)
            if not ours:
                message = "the file is there, and no calibration wrote it; name another file, or remove it"
                raise BadInput(Problem(str(out), message))


def write_profile(out: Path, spec: Mapping[str, Any], curves: Mapping[str, Sequence[Curve]]) -> None:
    """Write the profile and its curves (`NAME.json` beside it): both are complete on disk before either takes its name.

    Raises BadInput where the folder cannot be written, OSError where the disk is full.
    """
    texts = {out.with_suffix(".json"): curves_text(curves), out: profile_yaml(spec, HEAD)}
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in texts}
    try:
        with written(out):
            for path, text in texts.items():
                with parts[path].open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            for path, part in parts.items():
                part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
