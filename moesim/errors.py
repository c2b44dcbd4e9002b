"""Errors a user may meet: each names the place, the value and the mend; the CLI prints it and exits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXIT_BAD_INPUT", "EXIT_INFEASIBLE", "BadInput", "Infeasible", "MoesimError", "Problem"]

EXIT_BAD_INPUT = 2
EXIT_INFEASIBLE = 3


class MoesimError(Exception):
    """Base of every error meant for a user. `exit_code` is what the command line returns."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in one place: `where` is `file:line:col` (or as much of it as is known)."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class BadInput(MoesimError):
    """Input that cannot be used. Carries every problem found, not only the first."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: Problem | str | list[Problem], where: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem(where, problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class Infeasible(MoesimError):
    """A legal deployment that cannot run: `reasons` say what does not fit, by how much, and what would.

    over: bytes that are missing as a share of those that are there; None where no number says so.
    """

    exit_code = EXIT_INFEASIBLE

    def __init__(self, reasons: list[str], over: float | None = None) -> None:
        self.reasons: tuple[str, ...] = tuple(reasons)
        self.over = over
        super().__init__("\n".join(reasons))
