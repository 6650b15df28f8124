"""`fpsc version`: what is installed, read from package metadata, so that torch is not imported."""

import json as jsonlib
import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

PACKAGES = ("fpsc", "torch", "triton", "diffusers")


def installed() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it stands on; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def backend_registered() -> bool:
    """Whether `torch.compile(model, backend="fpsattn")` finds the backend in this environment."""
    return "fpsattn" in metadata.entry_points(group="torch_dynamo_backends").names


def version(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the versions of fpsc, torch, Triton and diffusers, and whether the backend is found."""
    versions, registered = installed(), backend_registered()
    if json:
        typer.echo(jsonlib.dumps({**versions, "backend_registered": registered}))
        return
    for name, found in versions.items():
        typer.echo(f"{name:10} {found or 'not installed'}")
    state = "registered" if registered else f"not registered: install fpsc into {sys.prefix}"
    typer.echo(f"{'fpsattn':10} {state}")
