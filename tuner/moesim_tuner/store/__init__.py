"""Studies that survive anything: a journal of our own that knows first, Optuna's tables that follow, each made anew
from the other.

`open_store` is for the coordinator, one process a study; `read_study` and `list_studies` look at what is kept, also
while it grows, and change nothing.
"""

from __future__ import annotations

from moesim_tuner.store.durable import DurableStore, definition_of, open_store
from moesim_tuner.store.kept import Kept, canonical_export
from moesim_tuner.store.looking import StudyLine, list_studies, read_study

__all__ = [
    "DurableStore",
    "Kept",
    "StudyLine",
    "canonical_export",
    "definition_of",
    "list_studies",
    "open_store",
    "read_study",
]
