"""Counter-based random draws: keyed by (seed, component, keys...), never consumed from a shared stream.

Two draws with the same key are the same numbers in any process, in any order, with any hash seed; so the
order in which parts of the simulator run cannot change a result. Philox4x64 (Salmon et al., SC'11), NumPy's.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["generator"]


def generator(seed: int, component: str, *keys: int) -> np.random.Generator:
    """A Generator of its own for (`seed`, `component`, `keys`); `component` names who draws and for what."""
    text = f"{int(seed)}/{component}/" + ",".join(str(int(k)) for k in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
