"""Pass 4: what the attention must be told at run time, and where a graph can take it from.

The noise row comes from the timestep where the graph has it among its inputs, else from a side
channel. The layer is known by the identity of a weight in front of the attention: graphs are shared
between layers and between models, so neither may be a constant of a graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fpsc.passes.graph import (
    Program,
    argument,
    example,
    is_linear,
    is_parameter,
    source_name,
)

TIMESTEP = re.compile(r"^(timesteps?|t|ts|time_?steps?|sigmas?|noise_level|vision_timesteps)$")
"""Argument names by which models take the noise level; names of arguments are their public
interface."""

_LAST_KEY = re.compile(r"\['([^']+)'\]$")
_POSITION = re.compile(r"\['args'\]\[(\d+)\]$")


@dataclass(frozen=True)
class Weight:
    """A parameter that tells one layer from another.

    Attributes:
        position: its position among the inputs of the root graph.
    """

    node: fx.Node
    position: int


def find_timestep(
    program: Program, argument_names: Sequence[str], stated: str | None = None
) -> fx.Node | None:
    """The input of the root graph that holds the timestep, or None.

    Args:
        argument_names: names of the positional arguments of the module that is compiled, without
            `self`, for models that are called by position.
        stated: name of the argument that holds it, where the user says so.
    """
    for node in program.placeholders:
        if is_parameter(node) or not isinstance(example(node), torch.Tensor):
            continue
        name = argument_name(node, argument_names)
        if name == stated or (stated is None and TIMESTEP.match(name)):
            return node
    return None


def argument_name(node: fx.Node, argument_names: Sequence[str]) -> str:
    """Name of the argument that an input came in by; "" when it came in another way."""
    source = source_name(node)
    by_position = _POSITION.search(source)
    if by_position:
        index = int(by_position.group(1))
        return argument_names[index] if index < len(argument_names) else ""
    by_name = _LAST_KEY.search(source)
    return by_name.group(1) if by_name else ""


def layer_weight(program: Program, query: fx.Node) -> Weight | None:
    """A parameter that only the layer of these queries has, or None when there is none.

    The weight of the projection that they come from; where that is no parameter (some quantised
    layers hold it outside of their parameters), its bias, or the norm between them.
    """
    between: list[fx.Node] = []
    for node in program.walk_back(query, stop=is_linear):
        if not is_linear(node) or node is query:
            between.append(node)
            continue
        operands = [argument(node, 1, "weight"), argument(node, 2, "bias"), *node.all_input_nodes]
        own = [n for n in operands if isinstance(n, fx.Node)]
        own = [n for n in own if n is not argument(node, 0, "input")]
        for operand in own:
            for source in program.walk_back(operand):
                weight = _parameter(program, source)
                if weight is not None:
                    return weight
        break
    found = (_parameter(program, node) for node in between)
    return next((weight for weight in found if weight is not None), None)


def _parameter(program: Program, node: fx.Node) -> Weight | None:
    """A trainable input of the root graph, as a weight; buffers are shared between layers.

    A tensor that hangs on a parameter (`weight.CB` of bitsandbytes) has no name in the model, which
    tells what the other layers' are called.
    """
    source = program.root_of(node)
    name = source_name(source)
    if source.op != "placeholder" or "_buffers" in name:
        return None
    own = name.endswith("]") or isinstance(example(source), torch.nn.Parameter)
    if "_parameters" in name and not own:
        return None
    if not is_parameter(source) or source not in program.placeholders:
        return None
    return Weight(source, program.placeholders.index(source))
