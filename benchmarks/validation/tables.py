"""Tables of aiconfigurator-core as the fits of benchmarks/profiles read them, a part of the rows held out.

Files below ../shared/data/kernels/h100_sxm are read there; the tables across nodes are in the package alone
(`pip install --no-deps aiconfigurator-core==0.12.0`), whose code is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.validation.rows import DATA, ROOT

__all__ = ["Part", "profiles"]

Table = dict[str, np.ndarray]
Keep = Callable[[Table], np.ndarray]


def profiles() -> None:
    """Make the maintainers' fits importable; they import each other by their bare names."""
    folder = str(ROOT / "benchmarks" / "profiles")
    if folder not in sys.path:
        sys.path.insert(0, folder)


class Part:
    """Stands in for `fit_exchange.Wheel`: the rows of each table for which `keep` is true. folder: of the device."""

    def __init__(self, keep: Keep | None = None, folder: Path = DATA / "kernels" / "h100_sxm") -> None:
        self._keep, self._folder = keep, folder

    def read(self, name: str) -> Table:
        """All columns of a table, the kept rows."""
        read = pq.read_table(self._folder / name)
        table = {c: read[c].to_numpy(zero_copy_only=False) for c in read.column_names}
        if self._keep is None:
            return table
        mask = self._keep(table)
        return {c: values[mask] for c, values in table.items()}
