"""Pass 1: every spelling of attention that a graph may hold becomes one `AttentionCall`."""

from __future__ import annotations

from torch import fx

from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import copy_module
from fpsc.passes.graph import Program, argument, op_name, shape
from fpsc.passes.libraries import is_library, read_library
from fpsc.passes.linear_attention import read_linear
from fpsc.passes.softmax import is_softmax, read_softmax

_SDPA = "scaled_dot_product_attention"


def normalise(module: fx.GraphModule) -> tuple[Program, list[AttentionCall]]:
    """A program and all attention calls in it, in execution order.

    A graph that holds only SDPA calls is taken as it is. Of any other a copy is made, and beside
    each attention that can be rewritten stands an SDPA call of the same value, without users.
    """
    program = Program(module)
    copied = any(_is_call(n) and (is_softmax(n) or is_library(n)) for n in program.nodes)
    if copied:
        program = Program(copy_module(module))
    read = (_read_other(node) for node in program.nodes if _is_call(node))
    found = {call.node: call for call in read if call is not None}
    if copied:
        program = Program(program.root.module)  # with what was inserted
    return program, _in_order(program, found)


def _in_order(program: Program, found: dict[fx.Node, AttentionCall]) -> list[AttentionCall]:
    twins = {call.twin for call in found.values()}
    calls = []
    for node in program.nodes:
        if node in found:
            calls.append(found[node])
        elif _is_call(node) and op_name(node) == _SDPA and node not in twins:
            calls.append(_read_sdpa(node))
    return calls


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _read_other(node: fx.Node) -> AttentionCall | None:
    if is_library(node):
        return read_library(node)
    return read_softmax(node) if is_softmax(node) else read_linear(node)


def _read_sdpa(node: fx.Node) -> AttentionCall:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    scale = argument(node, 6, "scale") if "scale" not in node.kwargs else node.kwargs["scale"]
    dropout = argument(node, 4, "dropout_p", 0.0)
    unsupported = ""
    if any(not isinstance(x, float | int) for x in (dropout, scale if scale is not None else 0.0)):
        unsupported = "dropout_p or scale is computed by the graph; pass them as numbers"
    sizes = shape(query)
    if sizes is None or len(sizes) != 4:
        unsupported = f"query has shape {sizes}, expected [batch, heads, tokens, head_dim]"
    return AttentionCall(
        node,
        "sdpa",
        query,
        key,
        value,
        mask=argument(node, 3, "attn_mask"),
        causal=bool(argument(node, 5, "is_causal", False)),
        dropout=dropout if isinstance(dropout, float | int) else 0.0,
        scale=scale if isinstance(scale, float | int) else None,
        unsupported=unsupported,
    )
