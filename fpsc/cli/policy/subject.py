"""What `fpsc policy show` and `explain` look at: a policy, the sizes of a model, and a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fpsc.cli.errors import UserError

if TYPE_CHECKING:
    from fpsc.grid import TokenGrid
    from fpsc.policy import Policy
    from fpsc.policy.models import ModelSize
    from fpsc.policy.schema import Sampling


class Subject(NamedTuple):
    """A policy on a model: `levels` is the noise of each step, `assumed` the model that what was
    not given is taken from."""

    policy: Policy
    size: ModelSize
    levels: tuple[float, ...]
    assumed: str


def subject(
    source: str,
    *,
    component: str | None = None,
    grid: str | None = None,
    layers: int | None = None,
    heads: int | None = None,
    scheduler: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
) -> Subject:
    """A policy with everything about the model and the run; what is None is taken from the policy
    itself, else from the published model that its name stands for.

    Raises:
        UserError: the policy cannot be used, or an option is not what it should be.
    """
    from fpsc.policy import PolicyError, find
    from fpsc.policy.axis import levels
    from fpsc.policy.models import size_for

    try:
        policy = find(source)
    except PolicyError as error:
        raise UserError(str(error)) from error
    if component is not None and component not in policy.components:
        known = ", ".join(policy.components) or "none"
        raise UserError(f"--component {component}: {policy.name} has {known}")
    policy = policy.component(component)
    size = size_for(policy.name)
    assumed = size.name
    if grid is not None:
        size = size.with_(grid=parsed_grid(grid))
    elif policy.tuned_on.grid is not None:
        size = size.with_(grid=policy.tuned_on.grid)
    table = policy.table
    if table is not None:  # made for one model
        layers, heads = layers or table.layers, heads or table.heads
    if layers is not None or heads is not None:
        width = size.width
        size = size.with_(layers=layers, heads=heads)
        if size.width != width:  # the rest of a layer of another width is not known
            size = size.with_(ffn=0)
    run = policy.spec.sampling or size.sampling
    changes = {"scheduler": scheduler, "steps": steps, "shift": shift}
    given = {name: value for name, value in changes.items() if value is not None}
    return Subject(policy, size, levels(_sampling(run, given)), assumed)


def parsed_grid(text: str) -> TokenGrid:
    """The grid that T,Y,X says.

    Raises:
        UserError: it is no such thing.
    """
    from fpsc.grid import TokenGrid

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--grid {text}: expected three positive integers T,Y,X, as 21,30,52")
    return TokenGrid(*map(int, parts))


def _sampling(run: Sampling, given: dict[str, Any]) -> Sampling:
    """The run with what was given."""
    from pydantic import ValidationError

    values = {**run.model_dump(exclude_none=True), **given}
    if "scheduler" in given and given["scheduler"] != run.scheduler:
        values["sigmas"] = "scheduler"  # how the other scheduler was called says nothing here
        if given["scheduler"].startswith("CogVideoX"):
            values.pop("shift", None)
    try:
        return type(run).model_validate(values)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        description = type(run).model_fields[field].description
        raise UserError(f"--{field} {values[field]}: expected {description}") from error
