"""The one error of a plan or a log that cannot be used: place, value, mend."""

from __future__ import annotations

__all__ = ["BadPlan"]


class BadPlan(ValueError):
    """A plan, a case or a log that cannot be used. `where` is `file` or `file:line`; the message ends with the mend."""

    def __init__(self, message: str, where: str = "") -> None:
        self.where = where
        self.message = message
        super().__init__(f"{where}: {message}" if where else message)
