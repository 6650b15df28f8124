"""Pass 3: the token grid (T, Y, X) of a self-attention, read from reshapes.

A raster event is a reshape that merges three neighbouring axes (T, Y, X) into one of length T*Y*X,
or splits one into three: patch embedding, RoPE tables and un-patchify all leave such an event, for
any model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import (
    Dim,
    Program,
    argument,
    example,
    is_cat,
    is_linear,
    op_name,
    product,
    same,
    shape,
)
from fpsc.passes.match import Candidate, Role, projected_from
from fpsc.passes.streams import Segment, Streams

_PUT = frozenset(["setitem", "index_put_", "index_copy_", "index_add_", "scatter_"])
_INDEXED = _PUT | frozenset(
    ["index_put", "index_copy", "index_add", "scatter", "gather", "index_select", "take_along_dim"]
)
_RESHAPES = frozenset(["reshape", "view", "flatten", "unflatten", "_unsafe_view"])

Grid = tuple[Dim, Dim, Dim]


@dataclass(frozen=True)
class Hints:
    """What is known of the grid from outside the graph.

    Attributes:
        grids: what the user stated, or what the root module's latent allows, most certain first.
        origin: `options` or `latent`, where they come from.
    """

    grids: tuple[tuple[int, int, int], ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class Event:
    """A reshape that merges `grid` to `length` tokens, or splits them."""

    length: Dim
    grid: Grid
    node: fx.Node


@dataclass(frozen=True)
class Unfit:
    """Why an attention stays dense; `role` where more is known of it than the match knew."""

    reason: str
    role: Role | None = None


@dataclass(frozen=True)
class Found:
    """The video span of a sequence.

    Attributes:
        grid: sizes along (T, Y, X).
        origin: `graph`, `latent` or `options`. From the latent it is the grid of the call that is
            traced: another call may have another grid, of as many tokens or, where `tokens` is
            symbolic, of more or less.
        tokens: length of the video span.
        prefix, suffix: text tokens before and after the video span.
        in_graph: whether only the running graph knows prefix and suffix.
    """

    grid: Grid
    origin: str
    tokens: Dim
    prefix: Dim = 0
    suffix: Dim = 0
    in_graph: bool = False


def infer_grid(program: Program, candidates: list[Candidate], hints: Hints) -> list[Found | Unfit]:
    """For each candidate its grid, or the reason why it stays dense."""
    streams = Streams(program, frozenset(c.call.node for c in candidates))
    events = raster_events(program)
    now = _current(program)
    if streams.latents:
        sizes = [s[1:] for node in streams.latents if (s := shape(node)) is not None]
        events = [e for e in events if _divides_a_latent(e.grid, sizes, now)]
    tables = [] if streams.latents else [_table_votes(program, c, events) for c in candidates]
    found: list[Found | Unfit] = []
    for index, candidate in enumerate(candidates):
        if candidate.reason or candidate.role not in (Role.VIDEO, Role.JOINT):
            found.append(Unfit(candidate.reason))
        elif reason := _moved(streams, candidate):
            found.append(Unfit(reason))
        elif streams.latents:
            found.append(_from_latent(streams, candidate, events, hints, now))
        elif any(tables) and not tables[index]:
            found.append(
                Unfit(
                    "self-attention without positions on a (T, Y, X) grid, beside others that have "
                    "them: text or audio",
                    Role.OTHER,
                )
            )
        elif not tables[index] and (reason := _several_tables(program, candidate)):
            found.append(Unfit(reason))
        elif hints.grids or not tables[index]:
            found.append(_from_hints(candidate, hints, now))
        else:
            found.append(_from_tables(candidate, tables[index]))
    known = {s for node in program.placeholders for s in _symbols(node)}
    return [
        _readable(streams, candidate.call, each, known)
        for candidate, each in zip(candidates, found, strict=True)
    ]


def _symbols(node: fx.Node) -> set[sympy.Symbol]:
    value = example(node)
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return {
        size.node.expr
        for size in sizes
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
    }


def _readable(
    streams: Streams, call: AttentionCall, found: Found | Unfit, known: set[sympy.Symbol]
) -> Found | Unfit:
    """Where a span's sizes can be read: from the graph's inputs, else inside the graph."""
    if isinstance(found, Unfit):
        return found
    for size in (*found.grid, found.tokens):
        if not _free(size) <= known:
            return Unfit(f"a token grid with an axis of {size}, a length that depends on data")
    text = [streams.sizes.of(size) for size in (found.prefix, found.suffix)]
    needed = _free(text[0]) | _free(text[1])
    if needed <= known:
        return found
    body = streams.program.body_of[call.sdpa]
    if not needed <= streams.sizes.readable(body, call.sdpa).keys():
        return Unfit(
            f"text of {text[0]} and {text[1]} tokens before and after the video: lengths that "
            "depend on data, and that no tensor in front of this attention has"
        )
    return replace(found, prefix=text[0], suffix=text[1], in_graph=True)


def _free(size: Dim) -> set[sympy.Symbol]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _moved(streams: Streams, candidate: Candidate) -> str:
    """Why raster order cannot be relied on, where tokens are put into the sequence, or picked from
    it, by tensors of indices; "" where they are not.

    Only what the projections read counts: tables of positions are picked by indices too.
    """
    program = streams.program
    indexed = [node for node in program.nodes if _indexed(node)]
    if not indexed:
        return ""
    lengths = [s.length for s in candidate.segments]
    sources = projected_from(program, candidate.call.query) if candidate.call.query else set()
    behind = {
        node
        for source in sources
        for node in program.walk_back(source, stop=lambda n: n in streams.attention)
    }
    for node in indexed:
        written = node.args[0] if op_name(node) in _PUT and node.args else node
        sizes = shape(written)
        if written not in behind or sizes is None or len(sizes) not in (2, 3):
            continue
        whole = any(same(sizes[-2], length) for length in (*lengths, sum(lengths)))
        if whole:
            return (
                f"tokens are put in their places by indices that are data ({op_name(node)}), so "
                "where the video lies, and in which order, is not known before the graph runs; "
                "where you know it, call fpsc.attention(q, k, v, grid=..., prefix=..., suffix=...) "
                "from the model's attention processor"
            )
    return ""


def _indexed(node: fx.Node) -> bool:
    if op_name(node) in ("getitem", "setitem"):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return any(isinstance(example(i), torch.Tensor) for i in index)
    return op_name(node) in _INDEXED


def _several_tables(program: Program, candidate: Candidate) -> str:
    """What the tables of positions are joined from, where one clip alone would not be."""
    lengths = [s.length for s in candidate.segments]
    for node in _path(program, candidate.call, is_linear):
        sizes, axis = shape(node), argument(node, 1, "dim", 0)
        operands = argument(node, 0, "tensors")
        if not is_cat(node) or sizes is None or not isinstance(axis, int) or axis == -1:
            continue
        if not isinstance(operands, list | tuple) or axis == len(sizes) - 1:
            continue
        parts = [(shape(o) or sizes)[axis] for o in operands]
        if len(parts) > 1 and any(same(sizes[axis], length) for length in lengths):
            return (
                f"the tables of positions of {sizes[axis]} tokens are joined from {parts}: several "
                "clips or images in one sequence, of which no single grid can be stated"
            )
    return ""


def raster_events(program: Program) -> list[Event]:
    """What the reshapes of a program merge or split in raster order."""
    events: list[Event] = []
    for node in program.nodes:
        if op_name(node) not in _RESHAPES or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before, after = shape(node.args[0]), shape(node)
        if before is None or after is None:
            continue
        for fine, coarse in ((before, after), (after, before)):
            events += [Event(n, grid, node) for n, grid in _merged_triples(fine, coarse)]
    return events


def _merged_triples(fine: list[Dim], coarse: list[Dim]) -> list[tuple[Dim, Grid]]:
    """Three neighbouring axes of `fine` that are one axis of `coarse`.

    Y or X of size 1 is refused, because (1, N, 1) is what every unsqueeze looks like; so is 0.
    """
    found: list[tuple[Dim, Grid]] = []
    for i in range(len(fine) - 2):
        t, y, x = fine[i : i + 3]
        if same(y, 1) or same(x, 1) or same(product((t, y, x)), 0):
            continue
        for j, length in enumerate(coarse):
            if same(product((t, y, x)), length) and same(product(fine[:i]), product(coarse[:j])):
                found.append((length, (t, y, x)))
                break
    return found


def _vote(votes: Counter[Grid]) -> Grid | None:
    """The grid with most votes; None where there is none, or two have as many.

    (1, T, Y X) stands beside (T, Y, X) where rows and columns are merged first: it is no grid.
    """
    votes = Counter(
        {
            grid: n
            for grid, n in votes.items()
            if not same(grid[0], 1)
            or not any(same(grid[1], t) and same(grid[2], y * x) for t, y, x in votes)
        }
    )
    best = votes.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return None
    return best[0][0]


def _whole(length: Dim) -> Dim:
    """A length without d * (n // d), which is n: a reshape that leaves one axis open divides."""
    factors = list(length.args) if isinstance(length, sympy.Mul) else []
    for quotient in factors:
        if not isinstance(quotient, FloorDiv):
            continue
        others = [f for f in factors if f is not quotient]
        divisor = quotient.args[1]
        parts = divisor.args if isinstance(divisor, sympy.Mul) else [divisor]
        if all(part in others for part in parts):
            for part in parts:
                others.remove(part)
            return _whole(product([quotient.args[0], *others]))
    return length


def _count(events: list[Event], length: Dim, path: set[fx.Node], others: int = 1) -> Counter[Grid]:
    votes: Counter[Grid] = Counter()
    whole = _whole(length)
    for event in events:
        if same(_whole(event.length), whole):
            votes[event.grid] += 3 if event.node in path else others
    return +votes


def _path(program: Program, call: AttentionCall, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """What the queries and keys of an attention are made from."""
    assert call.query is not None and call.key is not None
    return {n for side in (call.query, call.key) for n in program.walk_back(side, stop)}


def _table_votes(
    program: Program, candidate: Candidate, events: list[Event]
) -> dict[int, Counter[Grid]]:
    """For each span of a sequence, what its tables of positions say of its grid.

    Tables meet queries and keys behind their projections: nothing before those is looked at.
    """
    if candidate.reason:
        return {}
    path = _path(program, candidate.call, is_linear)
    votes = {
        i: _count(events, segment.length, path, others=0)
        for i, segment in enumerate(candidate.segments)
    }
    return {i: v for i, v in votes.items() if v}


def _from_latent(
    streams: Streams,
    candidate: Candidate,
    events: list[Event],
    hints: Hints,
    now: Mapping[sympy.Symbol, int],
) -> Found | Unfit:
    lengths = [s.length for s in candidate.segments]
    video = [i for i, s in enumerate(candidate.segments) if streams.is_video(s.node)]
    if not video:
        return Unfit(
            f"self-attention over {lengths} tokens that do not come from a latent: text or audio",
            Role.OTHER,
        )
    if hints.origin == "options":
        return _from_hints(candidate, hints, now, video)
    path = _path(streams.program, candidate.call, lambda n: n in streams.attention)
    grids = {i: _vote(_count(events, lengths[i], path)) for i in video}
    fitting = [(i, grid) for i, grid in grids.items() if grid is not None]
    if not fitting:
        joined = _rejoined(streams, candidate.segments)
        if len(joined) < len(lengths):
            return _from_latent(streams, replace(candidate, segments=joined), events, hints, now)
        return Unfit(
            f"no reshape to or from (T, Y, X) found for a sequence of {lengths} tokens that comes "
            'from a latent, or several that differ; state the grid with options={"grid": [T, Y, X]}'
        )
    if len(fitting) > 1:
        fitting = _longest([_value(length, now) for length in lengths], fitting)
    if len(fitting) > 1:
        return Unfit(
            f"several spans of {lengths} tokens come from a latent; which of them is the video "
            "cannot be told"
        )
    index, grid = fitting[0]
    return _spans(candidate.segments, index, grid, "graph")


def _rejoined(streams: Streams, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments, with neighbours joined that are neighbouring spans of one video.

    A first frame that is modulated apart from the others is sliced off and put back.
    """
    found: list[Segment] = []
    spans: list[tuple[fx.Node, Dim, Dim] | None] = []
    for segment in segments:
        span = streams.span_of(segment)
        last = spans[-1] if spans else None
        if span and last and span[0] is last[0] and same(span[1], last[2]):
            found[-1] = Segment(found[-1].length + segment.length, found[-1].node)
            spans[-1] = (last[0], last[1], span[2])
        else:
            found.append(segment)
            spans.append(span)
    return tuple(found)


def _current(program: Program) -> dict[sympy.Symbol, int]:
    """What the symbols of a graph stand for in the call that it is traced for."""
    values = [example(node) for node in program.placeholders]
    sizes = [
        size
        for value in values
        for size in (value.shape if isinstance(value, torch.Tensor) else [value])
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
    ]
    return {size.node.expr: size.node.hint for size in sizes if size.node.has_hint()}


def _value(size: Dim, now: Mapping[sympy.Symbol, int]) -> int | None:
    """A size in the call that a graph is traced for; None where it depends on data."""
    value = size if isinstance(size, int) else size.xreplace(now)
    return int(value) if isinstance(value, int) or value.is_Integer else None


def _divides_a_latent(
    grid: Grid, latents: Iterable[Sequence[Dim]], now: Mapping[sympy.Symbol, int]
) -> bool:
    """Whether a latent can be cut into such a grid by patches that are as high as wide.

    Heads and windows are reshaped too, and their sizes may multiply to the number of tokens. Where
    sizes depend on data nothing is ruled out.

    Args:
        latents: sizes of each latent, without its batch.
    """
    known = [_value(n, now) for n in grid]
    sizes = [[_value(n, now) for n in latent] for latent in latents]
    if None in (*known, *(n for latent in sizes for n in latent)):
        return True
    return any(
        t % known[0] == y % known[1] == x % known[2] == 0 and y // known[1] == x // known[2]  # type: ignore[operator]
        for latent in sizes
        for t, y, x in itertools.combinations(latent, 3)
    )


def _longest(lengths: list[int | None], fitting: list[tuple[int, Grid]]) -> list[tuple[int, Grid]]:
    """Of several spans of video the longest: the others are what it is conditioned on."""
    known = [length for i, _ in fitting if (length := lengths[i]) is not None]
    if len(known) < len(fitting):
        return fitting
    return [f for f, length in zip(fitting, known, strict=True) if length == max(known)]


def _from_tables(candidate: Candidate, votes: dict[int, Counter[Grid]]) -> Found | Unfit:
    """The grid where the model is given tokens: its tables of positions are all there is."""
    lengths = [s.length for s in candidate.segments]
    grids = [(i, grid) for i, v in votes.items() if (grid := _vote(v)) is not None]
    if len(grids) != 1:
        return Unfit(
            f"the tables of positions of {lengths} tokens show no grid, or several; state it with "
            'options={"grid": [T, Y, X]}'
        )
    index, grid = grids[0]
    if same(grid[0], 1):
        return Unfit(
            "the model is given tokens, and their positions are those of one frame: an image; for "
            'a video of one frame state options={"grid": [1, Y, X]}'
        )
    return _spans(candidate.segments, index, grid, "graph")


def _from_hints(
    candidate: Candidate,
    hints: Hints,
    now: Mapping[sympy.Symbol, int],
    among: Sequence[int] | None = None,
) -> Found | Unfit:
    """The grid that is known from outside; `among`: the spans that may be the video.

    What the latent says is asked again at every call, so that a length may be symbolic. What a user
    states is for one length: that becomes a guard, and calls of other lengths another graph.
    """
    lengths = [s.length for s in candidate.segments]
    current = [_value(n, now) for n in lengths]
    if not hints.grids:
        return Unfit(
            "this graph has no latent, and the model's own input gave no grid; state it with "
            'options={"grid": [T, Y, X]}'
        )
    fitting = [
        (i, grid)
        for i, length in enumerate(current)
        for grid in hints.grids
        if (among is None or i in among) and length is not None and same(length, product(grid))
    ]
    if hints.origin == "options" and None not in current:
        _guard_lengths(candidate, hints.grids)
    if not fitting:
        shown = " or ".join(str(list(grid)) for grid in hints.grids[:3])
        return Unfit(
            f"self-attention over spans of {lengths} tokens, and grid {shown} (from "
            f"{hints.origin}) has another number of tokens"
        )
    if len({i for i, _ in fitting}) > 1:
        return Unfit(
            f"several spans of {lengths} tokens fit the grid; which is the video cannot be told"
        )
    index, grid = fitting[0]
    return _spans(candidate.segments, index, grid, hints.origin)


def _guard_lengths(candidate: Candidate, grids: Sequence[Grid]) -> None:
    """Have the graph serve calls only whose lengths equal those of stated grids, or differ from
    them, as in the call that is traced."""
    assert candidate.call.query is not None
    query: Any = example(candidate.call.query)
    sizes: Sequence[Any] = query.shape
    env = next((n.node.shape_env for n in sizes if isinstance(n, torch.SymInt)), None)
    if env is not None:
        for segment, grid in itertools.product(candidate.segments, grids):
            env.evaluate_expr(sympy.Eq(segment.length, product(grid)))


def _spans(segments: tuple[Segment, ...], index: int, grid: Grid, origin: str) -> Found:
    prefix: Dim = 0
    suffix: Dim = 0
    for position, segment in enumerate(segments):
        if position < index:
            prefix = prefix + segment.length
        elif position > index:
            suffix = suffix + segment.length
    return Found(grid, origin, segments[index].length, prefix, suffix)
