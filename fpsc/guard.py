"""A guard of our own: compiled code serves a model as long as its policy keeps its structure.

Models of one class share compiled code, and Dynamo knows nothing of policies. What it can watch is
a weight, and a weight belongs to one model: so every compiled graph gets one more guard, on the
weight by which a call tells its model, and changing the structure of one model's policy makes that
model compile again, and no other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._guards import Guard, TracingContext

from fpsc import runtime


def guard_structure(weight: fx.Node, structure: str) -> None:
    """Guard the graph that is being compiled on the structure of the policy behind a weight.

    Args:
        weight: an input of the graph from Dynamo.
        structure: of the policy that the graph is compiled for (`ModelState.structure`).
    """
    source = getattr(weight, "_dynamo_source", None)
    context = TracingContext.try_get()
    if source is None or context is None:
        return  # not from Dynamo; the launcher still checks

    def holds(value: Tensor) -> bool:
        state = runtime.state_of(value)
        return state is None or state.structure == structure

    def add_policy_structure_guard(builder: Any, guard: Guard) -> None:
        what = [f"the structure of the fpsc policy of {guard.name} is {structure}"]
        builder.get_guard_manager(guard).add_lambda_guard(holds, what, guard.user_stack)

    context.guards_context.dynamo_guards.add(Guard(source, add_policy_structure_guard))
