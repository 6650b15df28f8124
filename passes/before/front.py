"""What the op is to do of what stands in front of a site."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fpsc.kernels.before import ACROSS, LAYER, NO_NORM, RMS
from fpsc.passes.graph import Dim

_NAMES = {RMS: "rms per head", ACROSS: "rms across heads", LAYER: "layer norm per head"}


@dataclass(frozen=True)
class Source:
    """Where queries or keys, or the tokens of one stream of them, come from.

    Attributes:
        x: the tensor as the op gets it, but for the order of its axes.
        order: what each axis of it is: letters of "b", "n", "h", "d", or "c" for heads and channels
            in one.
        length: tokens.
        weight, bias: of the norm.
    """

    x: fx.Node
    order: str
    length: Dim
    weight: fx.Node | None = None
    bias: fx.Node | None = None


@dataclass(frozen=True)
class RopeTable:
    """cos or sin, as it becomes an argument of the op.

    Attributes:
        node, value, part: see `fpsc.passes.before.matrix.Table`.
        axes: for each axis the letters it is made of, "" for one of one element.
    """

    node: fx.Node = field(compare=False)
    value: fx.Node
    part: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        rotation: as the op takes it.
        start: the first token that is rotated.
        negative: sin has the other sign.
        every: keep one channel of each pair of both tables, whose channels are alike.
    """

    rotation: str
    start: Dim
    cos: RopeTable
    sin: RopeTable
    negative: bool
    every: bool


@dataclass(frozen=True)
class Front:
    """What the op is to do with queries and keys, beginning with `query` and `key`.

    Attributes:
        query, key: what they come from, in the order of tokens.
        heads, head_dim: of both.
        norm, epsilon: as the op takes them.
        rope: None where nothing is rotated.
        notes: what was left to the graph, and why.
    """

    query: tuple[Source, ...]
    key: tuple[Source, ...]
    heads: tuple[int, int]
    head_dim: int
    norm: str = NO_NORM
    epsilon: float = 0.0
    rope: Rope | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        parts = [_NAMES[self.norm]] if self.norm in _NAMES else []
        if self.rope is not None:
            parts.append(f"rope {self.rope.rotation}")
        return " + ".join(parts) + "".join(f"; {note}" for note in self.notes)
