"""Messages about values of a JSON file."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from moesim.workload.generators import MAX_TOKENS

__all__ = ["json_tokens", "near_key", "shown"]


def shown(value: Any) -> str:
    """A value for a message, never long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def near_key(key: str, present: Iterable[str]) -> str:
    """That `key` is missing, with the nearest key that is there."""
    near = get_close_matches(key, list(present), n=1, cutoff=0.6)
    return f"{key} is missing" + (f"; rename {near[0]!r}?" if near else "")


def json_tokens(value: Any) -> str | None:
    """What is wrong with a number of tokens, or None."""
    if type(value) is not int:
        return f"a whole number of tokens is needed, got {shown(value)}"
    if not 1 <= value <= MAX_TOKENS:
        return f"from 1 to {MAX_TOKENS:,} tokens, got {shown(value)}"
    return None
