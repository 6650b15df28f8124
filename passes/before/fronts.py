"""What stands in front of a site, from the values of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import fx

from fpsc.kernels.before import ACROSS, LAYER, NO_NORM
from fpsc.passes.before.declined import Declined, require
from fpsc.passes.before.front import Front, Rope, Source
from fpsc.passes.before.layout import Layout
from fpsc.passes.before.norm import Norm
from fpsc.passes.before.reader import Reader
from fpsc.passes.before.rope import read_rope
from fpsc.passes.before.value import Value
from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import Dim, Program, example, is_convolution, is_linear, same
from fpsc.passes.sizes import Sizes


class Fronts:
    """What stands in front of the attentions of a program, which is only read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._sizes = Sizes(program)
        self._carrying = _projected(program)

    def read(self, call: AttentionCall) -> Front | str:
        """What the op can do of what is in front of an attention; why nothing, in words."""
        assert call.query is not None and call.key is not None and call.value is not None
        reader = Reader(self.program, self._sizes, self._carrying, call.sdpa)
        try:
            query, key = (_Side.of(reader, node) for node in (call.query, call.key))
            return _front(reader, call, query, key)
        except Declined as error:
            return str(error) + "".join(f" ({note})" for note in reader.notes[:1])


def _projected(program: Program) -> set[fx.Node]:
    """What depends on a projection in front of it."""
    found: set[fx.Node] = set()
    before = -1
    while before != len(found):
        before = len(found)
        for node in program.nodes:
            if is_linear(node) or is_convolution(node) or found & {*program.inputs_of(node)}:
                found.add(node)
    return found


@dataclass(frozen=True)
class _Side:
    """Queries or keys.

    Attributes:
        norms: of every leaf of the value; None where it is no norm that the op has.
    """

    value: Value
    layout: Layout
    norms: dict[fx.Node, Norm | None]

    @staticmethod
    def of(reader: Reader, node: fx.Node) -> _Side:
        value = reader.value(node, reader.site)
        heads = len(value.axes) == 4 and not value.is_complex
        require(heads, "queries and keys are no tensors of heads")
        layout, value = Layout.of(value), value.along_tokens(2)
        norms: dict[fx.Node, Norm | None] = {}
        for leaf in (piece.leaf for piece in value.pieces):
            norm = norms[leaf] = reader.norm(leaf)
            if norm is None or norm.width == layout.head_dim:
                continue
            if norm.kind == LAYER and norm.width == layout.width:
                reader.notes.append("a layer norm across heads is left to the graph")
            if norm.kind == LAYER or norm.width != layout.width:
                norms[leaf] = None
        return _Side(value, layout, norms)

    def sources(self, reader: Reader, *, normed: bool) -> tuple[Source, ...]:
        """Every leaf, whole, in order.

        Args:
            normed: begin with what the norms were applied to.
        """
        found: list[Source] = []
        for leaf, pieces in groupby(self.value.pieces, key=lambda piece: piece.leaf):
            position: Dim = 0
            for piece in pieces:
                in_order = same(piece.start, position)
                require(in_order, f"tokens of {leaf.name} are in another order")
                position = position + piece.length
            length = reader.shape(leaf)[self.layout.tokens]
            require(same(position, length), f"only a part of {leaf.name} is used")
            norm = self.norms[leaf] if normed else None
            source = Source(leaf, self.layout.order, length)
            if norm is not None:
                source = replace(source, x=norm.x, weight=norm.weight, bias=norm.bias)
            # The op reads it later than the graph did.
            unwritten = reader.unwritten(source.x, source.x, reader.site)
            require(unwritten, f"{source.x.name} is written in place in front of the attention")
            found.append(source)
        return tuple(found)


def _front(reader: Reader, call: AttentionCall, query: _Side, key: _Side) -> Front:
    one_width = query.layout.head_dim == key.layout.head_dim
    require(one_width, "queries and keys have channels of different numbers")
    notes: list[str] = []
    kind, epsilon = _common_norm(query, key, notes)
    normed = kind != NO_NORM
    rope = _common_rope(query, key, reader.sizes)
    require(normed or rope is not None, "; ".join(notes) or "no norm and no rotation")
    if not normed and reader.notes:
        notes.append(f"norm left to the graph: {reader.notes[0]}")
    q, k = (side.sources(reader, normed=normed) for side in (query, key))
    if normed:  # the op has norms of two streams, which begin at the same tokens
        streams = len(q) <= 2 and len(q) == len(k)
        require(streams, f"norms of {len(q)} and {len(k)} parts of the sequence")
        require(same(q[0].length, k[0].length), "parts of queries and of keys differ in length")
    _check_dtypes([*(source.x for source in (*q, *k)), call.value])
    heads = query.layout.heads, key.layout.heads
    return Front(q, k, heads, query.layout.head_dim, kind, epsilon, rope, tuple(notes))


def _common_norm(query: _Side, key: _Side, notes: list[str]) -> tuple[str, float]:
    """Kind and epsilon of the norm that all queries and keys have."""
    norms = [norm for side in (query, key) for norm in side.norms.values()]
    kinds = {n and (n.kind, n.epsilon, n.weight is None, n.bias is None) for n in norms}
    across = {n and n.width != query.layout.head_dim for n in norms}
    if len(kinds) > 1 or len(across) > 1:
        notes.append("norm left to the graph: it differs between queries, keys or their parts")
    elif norms[0] is not None:
        return ACROSS if True in across else norms[0].kind, norms[0].epsilon
    return NO_NORM, 0.0


def _common_rope(query: _Side, key: _Side, sizes: Sizes) -> Rope | None:
    rope, other = (read_rope(side.value, side.layout, sizes) for side in (query, key))
    both = (rope is None) == (other is None)
    require(both, "of queries and keys only one is seen to be rotated")
    require(rope == other, "queries and keys are rotated by different tables")
    if rope is not None and query.layout.heads != key.layout.heads:
        shared = not any("h" in axis for axis in (*rope.cos.axes, *rope.sin.axes))
        require(shared, "tables for each head, and fewer heads of keys")
    return rope


def _check_dtypes(nodes: list[fx.Node | None]) -> None:
    """What the op takes for q, k and v: one dtype, in front of all that is done to them."""
    dtypes = {v.dtype for node in nodes if isinstance(v := example(node), torch.Tensor)}
    names = ", ".join(sorted(map(str, dtypes)))
    require(
        len(dtypes) == 1,
        f"queries, keys and values are of different dtypes ({names}) in front of it",
    )
