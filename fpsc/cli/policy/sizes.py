"""Sizes that commands take as text."""

from fpsc.cli.errors import UserError


def grid_of(text: str | None) -> tuple[int, int, int] | None:
    """The token grid behind `--grid T,Y,X`."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--grid {text}: expected three positive integers T,Y,X, as 21,30,52")
    t, y, x = map(int, parts)
    return t, y, x
