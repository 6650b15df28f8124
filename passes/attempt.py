"""An error of ours while looking at a graph is no error of the model: what it met stays dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(look: Callable[[], T], failed: Callable[[str], T], what: str, *, strict: bool) -> T:
    """What `look` returns, or `failed` with the reason in words where it raises.

    Args:
        what: what is looked at, for the reason.
        strict: let the error through.
    """
    try:
        return look()
    except Exception as error:
        if strict:
            raise
        return failed(
            f"fpsc could not read {what} ({type(error).__name__}: {error}); "
            "please report this with the model's code"
        )
