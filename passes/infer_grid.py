"""Pass 3: the token grid (T, Y, X) of a self-attention, read from reshapes.

A raster event is a reshape that merges three neighbouring axes (T, Y, X) into one of length T*Y*X,
or splits one into three: patch embedding, RoPE tables and un-patchify all leave such an event, for
any model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from fpsc.passes.graph import Dim, Program, op_name, product, same, shape
from fpsc.passes.match import Candidate, Role, Segment, latents, residual_stream

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
class Found:
    """The video span of a sequence.

    Attributes:
        grid: sizes along (T, Y, X).
        origin: `graph`, `latent` or `options`.
        prefix, suffix: text tokens before and after the video span.
    """

    grid: Grid
    origin: str
    prefix: Dim = 0
    suffix: Dim = 0


def infer_grid(program: Program, candidates: list[Candidate], hints: Hints) -> list[Found | str]:
    """For each candidate its grid, or the reason why it stays dense."""
    events = raster_events(program)
    attention = {c.call.node for c in candidates}
    has_latent = bool(latents(program))
    found: list[Found | str] = []
    for candidate in candidates:
        if candidate.reason or candidate.role not in (Role.VIDEO, Role.JOINT):
            found.append(candidate.reason)
        elif has_latent and hints.origin != "options":
            found.append(_from_graph(program, candidate, events, attention))
        else:
            found.append(_from_hints(candidate, hints))
    return found


def raster_events(program: Program) -> list[tuple[Dim, Grid]]:
    """All (length, grid) that a reshape of the program merges or splits in raster order."""
    events: list[tuple[Dim, Grid]] = []
    for node in program.nodes:
        if op_name(node) not in _RESHAPES or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before, after = shape(node.args[0]), shape(node)
        if before is None or after is None:
            continue
        for fine, coarse in ((before, after), (after, before)):
            events += _merged_triples(fine, coarse)
    return events


def _merged_triples(fine: list[Dim], coarse: list[Dim]) -> list[tuple[Dim, Grid]]:
    """Three neighbouring axes of `fine` that are one axis of `coarse`.

    Y or X of size 1 is refused, because (1, N, 1) is what every unsqueeze looks like.
    """
    found: list[tuple[Dim, Grid]] = []
    for i in range(len(fine) - 2):
        t, y, x = fine[i : i + 3]
        if same(y, 1) or same(x, 1):
            continue
        for j, length in enumerate(coarse):
            if same(product((t, y, x)), length) and same(product(fine[:i]), product(coarse[:j])):
                found.append((length, (t, y, x)))
                break
    return found


def _vote(events: list[tuple[Dim, Grid]], length: Dim) -> Grid | None:
    """The grid that most events of this length agree on; T = 1 only where nothing else is seen.

    (1, 3, 20) also appears beside (3, 4, 5), when frames and rows are merged first.
    """
    votes = Counter(grid for size, grid in events if same(size, length))
    moving = Counter({grid: n for grid, n in votes.items() if not same(grid[0], 1)})
    best = (moving or votes).most_common(1)
    return best[0][0] if best else None


def _from_graph(
    program: Program,
    candidate: Candidate,
    events: list[tuple[Dim, Grid]],
    attention: set[fx.Node],
) -> Found | str:
    sources = set(latents(program))
    fitting: list[tuple[int, Grid]] = []
    for index, segment in enumerate(candidate.segments):
        stream = residual_stream(program, segment.node, attention)
        if not stream & sources:
            continue
        grid = _vote(events, segment.length)
        if grid is not None:
            fitting.append((index, grid))
    lengths = [s.length for s in candidate.segments]
    if not fitting:
        return (
            f"no reshape to or from (T, Y, X) found for a sequence of {lengths} tokens that comes "
            'from a latent; state the grid with options={"grid": [T, Y, X]}'
        )
    if len(fitting) > 1:
        return (
            f"several spans of {lengths} tokens come from a latent; which of them is the video "
            "cannot be told"
        )
    index, grid = fitting[0]
    return _spans(candidate.segments, index, grid, "graph")


def _from_hints(candidate: Candidate, hints: Hints) -> Found | str:
    lengths = [s.length for s in candidate.segments]
    if not hints.grids:
        return (
            "this graph has no latent, and the model's own input gave no grid; state it with "
            'options={"grid": [T, Y, X]}'
        )
    fitting = [
        (i, grid)
        for i, length in enumerate(lengths)
        for grid in hints.grids
        if same(length, product(grid))
    ]
    if not fitting:
        shown = " or ".join(str(list(grid)) for grid in hints.grids[:3])
        return (
            f"self-attention over spans of {lengths} tokens, and grid {shown} (from "
            f"{hints.origin}) has another number of tokens"
        )
    if len({i for i, _ in fitting}) > 1:
        return f"several spans of {lengths} tokens fit the grid; which is the video cannot be told"
    index, grid = fitting[0]
    return _spans(candidate.segments, index, grid, hints.origin)


def _spans(segments: tuple[Segment, ...], index: int, grid: Grid, origin: str) -> Found:
    prefix: Dim = 0
    suffix: Dim = 0
    for position, segment in enumerate(segments):
        if position < index:
            prefix = prefix + segment.length
        elif position > index:
            suffix = suffix + segment.length
    return Found(grid, origin, prefix, suffix)
