"""Which policy a model gets: the options', the one beside its weights, its family's, or generic."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fpsc.families import Family
from fpsc.options import Options
from fpsc.policy import Policy, find
from fpsc.policy.lookup import beside, component_of


class Choice(NamedTuple):
    """A policy, in words where it comes from, and what the user should know about that."""

    policy: Policy
    origin: str
    notes: list[str]


def choose(options: Options, module: nn.Module | None, family: Family | None) -> Choice:
    """The policy for a model.

    Raises:
        PolicyError: the first policy that is found cannot be read. The next one is not tried: what
            a user wrote is never passed over.
    """
    saved = beside(module) if module is not None and options.policy is None else None
    if options.policy is not None:
        policy, origin = find(options.policy), "named in the options"
    elif saved is not None:
        policy, origin = find(saved), f"saved beside the weights, {saved}"
    elif family is not None:
        policy, origin = find(family.policy), f"preset for {type(module).__name__}"
    else:
        policy, origin = find("generic"), "default"
    return Choice(*for_component(policy, module, options.component, origin))


def for_component(
    policy: Policy, module: nn.Module | None, stated: str | None, origin: str
) -> tuple[Policy, str, list[str]]:
    """What a policy says for one transformer of a pipeline, where it has parts.

    Args:
        stated: its name, where the user gives it; else what it was loaded as.
    """
    if not policy.components:
        return policy, origin, []
    name = stated or component_of(module)
    if name in policy.components:
        return policy.component(name), f"{origin}, component {name}", []
    if name is not None:
        return policy, f"{origin}, which has no component {name}", []
    names = ", ".join(policy.components)
    note = (
        f"policy {policy.name} has parts of its own for {names}, and it is not known whether this "
        "model is one of them: it gets the common part; name it with "
        f'options={{"component": "{policy.components[0]}"}}'
    )
    return policy, origin, [note]
