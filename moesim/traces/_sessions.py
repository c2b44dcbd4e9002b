"""Session names of a trace -> integers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moesim.arrays import IntArray

__all__ = ["session_ids"]


def session_ids(names: Iterable[str]) -> IntArray:
    """int64[R]: -1 for an empty name. Whole numbers stay themselves; if one name is anything else, all are
    numbered 0, 1, ... by first appearance.
    """
    texts = list(names)
    filled = [text for text in texts if text]
    if all(text.isascii() and text.isdigit() and len(text) <= 18 for text in filled):
        return np.array([int(text) if text else -1 for text in texts], dtype=np.int64)
    number: dict[str, int] = {}
    return np.array([number.setdefault(text, len(number)) if text else -1 for text in texts], dtype=np.int64)
