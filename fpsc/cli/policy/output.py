"""Where commands write the policies that they make."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fpsc.cli.errors import UserError

if TYPE_CHECKING:
    from fpsc.policy import Policy

STDOUT = "-"


def target_of(output: str, force: bool) -> Path | None:
    """The file to write, None for standard output; an existing one only with `force`."""
    if output == STDOUT:
        return None
    path = Path(output)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if path.exists() and not force:
        raise UserError(f"{path} is there already; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is no folder")
    return path


def write(policy: "Policy", target: Path | None) -> None:
    """Write a policy that was checked by being one."""
    if target is None:
        typer.echo(policy.document.text, nl=False)
        return
    try:
        policy.save(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
