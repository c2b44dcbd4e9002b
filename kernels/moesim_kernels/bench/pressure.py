"""How much others are in the way: the pressure stall figure of Linux (Documentation/accounting/psi) for the CPU."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["cpu_pressure"]

_AVG10 = re.compile(r"^some avg10=(\d{1,3}\.\d{1,4})\b", re.MULTILINE)


def cpu_pressure(path: Path = Path("/proc/pressure/cpu")) -> float | None:
    """Percent of the last ten seconds in which some task waited for a CPU; None where the kernel does not say."""
    try:
        found = _AVG10.search(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return float(found[1]) if found else None
