"""The one error of an operator that this machine cannot run."""

from __future__ import annotations

__all__ = ["NotSupported"]


class NotSupported(RuntimeError):
    """The operator cannot run here; the message says what is missing and what to use instead."""
