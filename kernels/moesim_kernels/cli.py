"""The verbs `calibrate`, `profile`, `runtime` and `validate`, found by moesim's command line through the entry-point
group moesim.commands."""

from __future__ import annotations

from moesim_kernels.calibrate.command import calibrate
from moesim_kernels.profiles.command import profile
from moesim_kernels.runtime.command import runtime
from moesim_kernels.validate.command import validate

__all__ = ["calibrate", "profile", "runtime", "validate"]
