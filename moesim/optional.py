"""Modules that numba compiles: used where numba is installed and nobody has turned them off."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

__all__ = ["compiled"]


def compiled(name: str) -> Any:
    """The module `name`, or None: numba is not there, or MOESIM_COMPILED is 0."""
    return None if os.environ.get("MOESIM_COMPILED") == "0" else _load(name)


@functools.cache
def _load(name: str) -> Any:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError:  # a numba that does not go with this NumPy or Python
        return None
