"""`fpsc policy schema`: the JSON Schema by which an editor completes and checks a policy."""

from typing import Annotated

import typer


def schema(
    json: Annotated[bool, typer.Option("--json", help="It is JSON either way.")] = False,
) -> None:
    """Print the JSON Schema of policy files, for editors.

    A policy names it in its first line: "# yaml-language-server: $schema=fpsc-policy-1.json".
    """
    from fpsc.policy.json_schema import dumps

    typer.echo(dumps(), nl=False)
