"""Which inputs a stretch of tokens comes from, along the residual stream.

Text and video are concatenated, treated alike and taken apart again, many times over. So the walk
back carries the span of tokens that is meant, and a concatenation is left by the operand that holds
it: else text would seem to come from the latent as soon as it once shared a tensor with the video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fpsc.passes.graph import (
    Dim,
    Program,
    argument,
    dim,
    example,
    is_cat,
    is_convolution,
    is_parameter,
    op_name,
    shape,
)
from fpsc.passes.sizes import Sizes

_MIXING = frozenset(
    ["matmul", "__matmul__", "bmm", "baddbmm", "einsum", "gather", "index_select", "sort", "cumsum"]
) | frozenset(
    ["transpose", "permute", "t", "movedim", "swapaxes", "flip", "roll", "reshape", "view"]
)
"""Calls that may move tokens along an axis whose length they keep."""

_ELEMENTWISE = frozenset(["add", "mul", "sub", "to", "type_as", "float", "contiguous"])


@dataclass(frozen=True)
class Segment:
    """A span of a sequence that comes from one stream; `node` yields it."""

    length: Dim
    node: fx.Node


@dataclass(frozen=True)
class _Span:
    """Positions start to stop of one axis of a tensor."""

    axis: int
    start: Dim
    stop: Dim


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


class Streams:
    """Residual streams of a program.

    Args:
        attention: all attention calls: no stream goes through one.
    """

    def __init__(self, program: Program, attention: frozenset[fx.Node]) -> None:
        self.program = program
        self.attention = attention
        self.latents = frozenset(latents(program))
        self.sizes = Sizes(program)
        self._video: dict[fx.Node, bool] = {}

    def is_video(self, node: fx.Node) -> bool:
        """Whether a node depends on a latent without going through an attention."""
        if node not in self._video:
            self._video[node] = any(n in self.latents for n in self._walk(node))
        return self._video[node]

    def holds_video(self, segments: Sequence[Segment]) -> bool:
        """Whether one of these spans is video; true of all where the graph has no latent."""
        return not self.latents or any(self.is_video(s.node) for s in segments)

    def span_of(self, segment: Segment) -> tuple[fx.Node, Dim, Dim] | None:
        """The tensor that a video segment was sliced from, elementwise calls ago, and where."""
        if not self.latents or not self.is_video(segment.node):
            return None
        queue = [segment.node]
        for node in queue:
            sliced, sizes = _slice_of(node), shape(node)
            if sliced is not None:
                source, span = sliced
                along = sizes is not None and self.sizes.same(sizes[span.axis], segment.length)
                return (source, span.start, span.stop) if along else None
            if op_name(node) in _ELEMENTWISE:
                queue += [n for n in node.all_input_nodes if shape(n) == sizes and n not in queue]
        return None

    def _walk(self, node: fx.Node) -> Iterator[fx.Node]:
        start: tuple[fx.Node, _Span | None] = (node, None)
        seen, queue = {start}, [start]
        for current, span in queue:
            yield current
            if current is not node and current in self.attention:
                continue
            for following in self._before(current, span):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)

    def _before(self, node: fx.Node, span: _Span | None) -> list[tuple[fx.Node, _Span | None]]:
        """What a node, or a span of it, reads."""
        sliced = _slice_of(node)
        if sliced is not None:
            source, own = sliced
            if span is None:
                return [(source, own), *((w, None) for w in self._writes(node, source))]
            if span.axis == own.axis:
                own = _Span(own.axis, own.start + span.start, own.start + span.stop)
                return [(source, own), *((w, None) for w in self._writes(node, source))]
        following = self.program.inputs_of(node)
        if span is None:
            return [(previous, None) for previous in following]
        if is_cat(node) and (parts := _operands_within(self.sizes, node, span)) is not None:
            return [(part, None) for part in parts]
        sizes = shape(node)
        keeps = sizes is not None and op_name(node) not in _MIXING and not is_convolution(node)
        return [
            (p, span if keeps and _alike(self.sizes, shape(p), sizes, span.axis) else None)
            for p in following
        ]

    def _writes(self, node: fx.Node, source: fx.Node) -> list[fx.Node]:
        return [n for n in self.program.inputs_of(node) if n is not source]


def _alike(sizes: Sizes, a: list[Dim] | None, b: list[Dim] | None, axis: int) -> bool:
    return a is not None and b is not None and len(a) == len(b) and sizes.same(a[axis], b[axis])


def _slice_of(node: fx.Node) -> tuple[fx.Node, _Span] | None:
    """The tensor that a node takes a span of, and the span; for `x[:, a:b]` and `split`."""
    if op_name(node) != "getitem" or not isinstance(source := node.args[0], fx.Node):
        return None
    index = node.args[1]
    if isinstance(index, int) and op_name(source) in ("split", "split_with_sizes"):
        return _split_part(source, index)
    sizes = shape(source)
    if not isinstance(index, tuple | slice) or sizes is None:
        return None
    given = index if isinstance(index, tuple) else (index,)
    parts = [p for p in given if isinstance(p, slice)]
    if len(parts) != len(given):
        return None
    cut = [(i, p) for i, p in enumerate(parts) if p.start is not None or p.stop is not None]
    if len(cut) != 1 or any(p.step not in (None, 1) for p in parts):
        return None
    axis, part = cut[0]
    start, stop = _bound(part.start, 0, sizes[axis]), _bound(part.stop, sizes[axis], sizes[axis])
    return (source, _Span(axis, start, stop)) if start is not None and stop is not None else None


def _split_part(split: fx.Node, index: int) -> tuple[fx.Node, _Span] | None:
    source, lengths = split.args[0], argument(split, 1, "split_size")
    axis = argument(split, 2, "dim", 0)
    sizes = shape(source)
    if not isinstance(source, fx.Node) or sizes is None or not isinstance(axis, int):
        return None
    axis %= len(sizes)
    if isinstance(lengths, int) and isinstance(size := sizes[axis], int):
        lengths = [min(lengths, size - i) for i in range(0, size, lengths)]
    if not isinstance(lengths, list | tuple):
        return None
    known = [_bound(length, 0, 0) for length in lengths]
    start: Dim = 0
    for length in known[:index]:
        if length is None:
            return None
        start = start + length
    last = known[index]
    return None if last is None else (source, _Span(axis, start, start + last))


def _bound(value: object, default: Dim, size: Dim) -> Dim | None:
    """A bound of a slice as a position; None where it is computed."""
    if value is None:
        return default
    if isinstance(value, int):
        return value if value >= 0 else size + value
    symbol = example(value)
    if not isinstance(symbol, int | torch.SymInt):
        return None
    bound = dim(symbol)
    return size + bound if _is_negative(bound) else bound


def _is_negative(bound: Dim) -> bool:
    """Whether a bound is counted from the end: -n, for a number n of tokens that is not 0."""
    if isinstance(bound, int):
        return bound < 0
    return all(factor < 0 for factor in bound.as_coefficients_dict().values())


def _operands_within(equal: Sizes, cat: fx.Node, span: _Span) -> list[fx.Node] | None:
    """The operands of a concatenation that a span covers exactly; None if it does not."""
    sizes, axis = shape(cat), argument(cat, 1, "dim", 0)
    operands = argument(cat, 0, "tensors")
    if sizes is None or not isinstance(axis, int) or not isinstance(operands, list | tuple):
        return None
    if axis % len(sizes) != span.axis:
        return None
    within: list[fx.Node] = []
    position: Dim = 0
    open_ = False
    for operand in operands:
        part = shape(operand)
        if part is None or not isinstance(operand, fx.Node):
            return None
        open_ = open_ or equal.same(position, span.start)
        if open_ and equal.same(position, span.stop):
            break
        if open_:
            within.append(operand)
        position = position + part[span.axis]
    return within if open_ and equal.same(position, span.stop) else None
