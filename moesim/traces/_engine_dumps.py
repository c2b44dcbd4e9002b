"""Files that an engine wrote with torch, read by a process of its own: `python -m moesim_kernels.dumps`.

The other process has limits of memory and time and hands back plain arrays in a file (see there). What comes back is
read as strictly as any other file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.traces._npy import BROKEN, read_member
from moesim.traces._routing_checks import bad

__all__ = ["MODULE", "read_arrays", "read_converted"]

MODULE = "moesim_kernels.dumps"
MOST_BYTES = 2 << 30
"""of one file, and of all the arrays of one"""
_MOST_FILES = 4096
_NO_TORCH, _NO_MODULE = 3, 1
_SECONDS = 600


def read_arrays(files: Sequence[Path]) -> list[dict[str, NDArray[Any]]]:
    """The arrays of each `.pt` file. Raises BadInput: torch is missing, a file is refused, it takes too long."""
    if len(files) > _MOST_FILES:
        raise BadInput(f"{len(files)} files; at most {_MOST_FILES} are read at once", str(files[0].parent))
    for file in files:
        if not file.is_file():
            raise bad(file, "no ordinary file.")
        if file.stat().st_size > MOST_BYTES:
            raise bad(file, f"{file.stat().st_size} bytes; at most {MOST_BYTES} are read.")
    with tempfile.TemporaryDirectory(prefix="moesim-dump-") as folder:
        _convert(files, Path(folder))
        return [read_converted(Path(folder) / f"{file.stem}.npz", file) for file in files]


def _convert(files: Sequence[Path], folder: Path) -> None:
    # -P: a module of this name in the current folder, which may be where strangers' files lie, is not run
    command = [sys.executable, "-P", "-m", MODULE, "--into", str(folder), *(str(file.resolve()) for file in files)]
    try:  # S603: the program is our own, the arguments are no options
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise bad(files[0], f"reading it took more than {_SECONDS} seconds. Record fewer steps.") from None
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1].strip()[:400] if lines else ""
    if done.returncode == _NO_TORCH or (done.returncode == _NO_MODULE and "No module named" in said):
        raise bad(
            files[0],
            f"a .pt file is read with torch, which is not here ({said}). Install moesim with the extra `kernels`, or"
            f" run `python -m {MODULE} {files[0].name}` where torch is and give the .npz that it writes.",
        )
    if done.returncode == 2 and said:
        where, _, what = said.partition(": ")
        raise BadInput(what, where)
    raise bad(files[0], f"the process that read it ended with code {done.returncode} (time or memory ran out?). {said}")


def read_converted(path: Path, named: Path | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz that `moesim_kernels.dumps` wrote; `named`: the file to name in errors."""
    where = named or path
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise bad(where, f"packed members, which `python -m {MODULE}` does not write.")
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise bad(where, "members that claim more than the file has. Convert it again.")
            return {
                m.filename.removesuffix(".npy"): read_member(archive, m, where, m.filename.removesuffix(".npy"))
                for m in members
            }
    except BROKEN as error:
        raise bad(where, f"not a readable .npz file ({error}). Convert it again.") from None
