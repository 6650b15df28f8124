"""Errors that a user can put right: a short message and an exit status, never a traceback."""

import functools
import json
from collections.abc import Callable
from typing import Any

import typer

from fpsc.errors import UserError as UserError

NOTHING_FOUND = 1  # the command ran, and the answer to its question is no
BAD_INPUT = 2  # what click and argparse use for usage errors


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """End a command that raised UserError with its message and exit status 2.

    The message goes to stderr; a command called with `json=True` writes `{"error": message}` to
    stdout instead, so that one parser reads both outcomes. The wrapped function keeps its
    signature: typer reads the options from it.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            if kwargs.get("json"):
                typer.echo(json.dumps({"error": str(error)}))
            else:
                typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(BAD_INPUT) from None

    return run
