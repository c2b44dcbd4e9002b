"""Hypothesis for the whole suite: no deadlines (machines are shared), and the same examples every time in CI.

Away from CI each run draws new examples, which is how `make test` on a desk finds what the last one did not.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")
