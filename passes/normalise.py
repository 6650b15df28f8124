"""Pass 1: every spelling of attention that a graph may hold becomes one `AttentionCall`."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from fpsc.passes.attempt import attempt
from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import Sketch, copy_module, unsupported
from fpsc.passes.graph import Program, argument, example, fixed, op_name, shape
from fpsc.passes.libraries import is_library, read_library
from fpsc.passes.linear_attention import read_linear
from fpsc.passes.masks import keys_that_take_part
from fpsc.passes.softmax import is_softmax, read_softmax

_SDPA = "scaled_dot_product_attention"


def normalise(
    module: fx.GraphModule, *, strict: bool = True
) -> tuple[Program, list[AttentionCall]]:
    """A program and all attention calls in it, in execution order.

    A graph that holds only SDPA calls without additive masks is taken as it is. Of any other a copy
    is made, and beside each attention that can be rewritten stands an SDPA call of the same value,
    without users; before an SDPA call, its additive mask as a boolean one.

    Args:
        strict: an error of ours is raised, else it is the reason why an attention stays dense.
    """
    program = Program(module)
    copied = any(map(_needs_more, program.nodes))
    if copied:
        program = Program(copy_module(module))
    read = (
        attempt(partial(_read, n), partial(unsupported, n, "unknown"), "this call", strict=strict)
        for n in program.nodes
        if _is_call(n)
    )
    calls = [call for call in read if call is not None]
    if copied:
        program = Program(program.root.module)  # with what was inserted
    return program, calls


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _needs_more(node: fx.Node) -> bool:
    """Whether nodes are inserted to read this one."""
    if not _is_call(node):
        return False
    return is_softmax(node) or is_library(node) or (op_name(node) == _SDPA and _is_biased(node))


def _is_biased(sdpa: fx.Node) -> bool:
    value = example(argument(sdpa, 3, "attn_mask"))
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _read(node: fx.Node) -> AttentionCall | None:
    if op_name(node) == _SDPA:
        return _read_sdpa(node)
    if is_library(node):
        return read_library(node)
    return read_softmax(node) if is_softmax(node) else read_linear(node)


def _read_sdpa(node: fx.Node) -> AttentionCall:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    scale = argument(node, 6, "scale") if "scale" not in node.kwargs else node.kwargs["scale"]
    scale, dropout = fixed(scale), fixed(argument(node, 4, "dropout_p", 0.0))
    unsupported = ""
    if any(not isinstance(x, float | int) for x in (dropout, scale if scale is not None else 0.0)):
        unsupported = "dropout_p or scale is computed by the graph; pass them as numbers"
    sizes = shape(query)
    if sizes is None or len(sizes) != 4:
        unsupported = f"query has shape {sizes}, expected [batch, heads, tokens, head_dim]"
    mask = argument(node, 3, "attn_mask")
    if _is_biased(node):
        assert isinstance(mask, fx.Node)
        mask = keys_that_take_part(Sketch(node), mask) or mask
    return AttentionCall(
        node,
        "sdpa",
        query,
        key,
        value,
        mask=mask,
        causal=bool(argument(node, 5, "is_causal", False)),
        dropout=dropout if isinstance(dropout, float | int) else 0.0,
        scale=scale if isinstance(scale, float | int) else None,
        unsupported=unsupported,
    )
