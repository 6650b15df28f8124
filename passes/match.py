"""Pass 2: what each attention call is, by data flow; names of modules are never evidence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import (
    Dim,
    Program,
    argument,
    example,
    is_cat,
    is_convolution,
    is_linear,
    is_parameter,
    op_name,
    same,
    shape,
)

_PASS_THROUGH = frozenset(["to", "type_as", "float", "dropout", "contiguous", "mul"])


class Role(StrEnum):
    """What an attention call attends over."""

    VIDEO = "video"  # 3D self-attention over the token grid
    JOINT = "joint"  # video and text in one sequence
    CROSS = "cross"  # queries and keys come from different streams
    FRAME = "frame"  # inside frames or along time, folded into the batch
    OTHER = "other"


@dataclass(frozen=True)
class Segment:
    """A span of a sequence that comes from one stream; `node` yields it."""

    length: Dim
    node: fx.Node


@dataclass(frozen=True)
class Candidate:
    """An attention call with what the data flow says of it.

    Attributes:
        role: for self-attention a guess that the grid confirms: `JOINT` when the sequence is a
            concatenation, else `VIDEO`.
        segments: spans of the sequence, in order.
        key_mask: bool node of shape [B, 1, 1, N], or None.
        reason: why the call stays dense; "" when it is self-attention that may be replaced.
    """

    call: AttentionCall
    role: Role
    segments: tuple[Segment, ...] = ()
    key_mask: fx.Node | None = None
    reason: str = ""


def match(program: Program, calls: list[AttentionCall]) -> list[Candidate]:
    """Classify every attention call of a program."""
    attention = {call.node for call in calls}
    batch = latent_batch(program)
    return [_classify(program, call, attention, batch) for call in calls]


def latents(program: Program) -> list[fx.Node]:
    """Inputs that look like a video latent: floating point, five axes, no parameter."""
    return [
        node
        for node in program.placeholders
        if not is_parameter(node)
        and isinstance(value := example(node), torch.Tensor)
        and value.ndim == 5
        and value.is_floating_point()
    ]


def latent_batch(program: Program) -> Dim | None:
    found = latents(program)
    return (shape(found[0]) or [None])[0] if found else None


def residual_stream(program: Program, node: fx.Node, attention: set[fx.Node]) -> set[fx.Node]:
    """All that `node` depends on without going through an attention: the stream it belongs to."""
    return set(program.walk_back(node, stop=lambda n: n in attention))


def _classify(
    program: Program, call: AttentionCall, attention: set[fx.Node], batch: Dim | None
) -> Candidate:
    def dense(role: Role, reason: str) -> Candidate:
        return Candidate(call, role, reason=reason)

    if call.query is None or call.key is None or call.value is None or call.unsupported:
        return dense(Role.OTHER, call.unsupported)
    query, key, value = shape(call.query), shape(call.key), shape(call.value)
    assert query is not None and key is not None and value is not None
    if not projected_from(program, call.query) & projected_from(program, call.key):
        return dense(Role.CROSS, "cross-attention: queries and keys come from different streams")
    if not same(query[2], key[2]):
        return dense(
            Role.OTHER, f"queries and keys differ in length ({query[2]} and {key[2]} tokens)"
        )
    if batch is not None and not same(query[0], batch):
        return dense(
            Role.FRAME,
            f"batch of {query[0]} against {batch} latents: attention inside frames or along time",
        )
    if call.causal:
        return dense(Role.OTHER, "causal attention")
    if call.dropout > 0:
        return dense(Role.OTHER, f"attention dropout {call.dropout}; set it to 0")
    if not same(query[3], value[3]):
        return dense(Role.OTHER, f"head_dim of values ({value[3]}) differs from {query[3]}")
    key_mask = None
    if call.mask is not None:
        problem = _mask_problem(call.mask)
        if problem:
            return dense(Role.OTHER, problem)
        assert isinstance(call.mask, fx.Node)
        key_mask = call.mask
    segments = _segments(program, call.query, query[2], attention)
    return Candidate(call, Role.JOINT if len(segments) > 1 else Role.VIDEO, segments, key_mask)


def _mask_problem(mask: object) -> str:
    """Why a mask is not a key-padding mask; "" if it is one."""
    value = example(mask)
    if not isinstance(value, torch.Tensor):
        return f"mask of unknown kind: {mask}"
    if value.dtype != torch.bool:
        return f"additive mask of {value.dtype}; only boolean key-padding masks are understood"
    if value.ndim != 4 or value.shape[1] != 1 or value.shape[2] != 1:
        return f"mask of shape {list(value.shape)}; expected key padding, [batch, 1, 1, tokens]"
    return ""


def projected_from(program: Program, node: fx.Node) -> set[fx.Node]:
    """The activations that the projections (linear or convolution) behind `node` read.

    Only what a projection reads counts: position tables (RoPE) meet queries and keys after it. A
    projection of a projection (a LoRA adapter) counts as one: its outer input is what matters.
    """
    inputs: set[fx.Node] = set()
    seen, queue = {node}, [node]
    for current in queue:
        following = program.inputs_of(current)
        if is_linear(current) or is_convolution(current):
            source = _behind_casts(argument(current, 0, "input"))
            if source is None:
                continue
            if not is_linear(source):
                inputs.add(program.root_of(source))
                continue
            following = [source]
        for previous in following:
            if previous not in seen:
                seen.add(previous)
                queue.append(previous)
    return inputs


def _behind_casts(node: object) -> fx.Node | None:
    while (
        isinstance(node, fx.Node)
        and op_name(node) in _PASS_THROUGH
        and len(node.all_input_nodes) == 1
    ):
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) else None


def _segments(
    program: Program, query: fx.Node, length: Dim, attention: set[fx.Node]
) -> tuple[Segment, ...]:
    """Operands of the nearest concatenation along the sequence that the queries come from."""
    for node in program.walk_back(query, stop=lambda n: n in attention):
        if not is_cat(node):
            continue
        axis = argument(node, 1, "dim", 0)
        sizes, operands = shape(node), argument(node, 0, "tensors")
        if sizes is None or not isinstance(axis, int) or not isinstance(operands, list | tuple):
            continue
        axis %= len(sizes)
        if axis == len(sizes) - 1 or not same(sizes[axis], length):
            continue
        shapes = [shape(o) for o in operands]
        if all(s is not None for s in shapes):
            return tuple(
                Segment(s[axis], o)
                for s, o in zip(shapes, operands, strict=True)
                if s is not None and isinstance(o, fx.Node)
            )
    return (Segment(length, query),)
