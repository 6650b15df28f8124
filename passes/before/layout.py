"""Where heads, tokens and channels are in the tensor that queries or keys come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fpsc.passes.before.declined import Declined, require
from fpsc.passes.before.digits import Axis, Digit, axis_of, size_of
from fpsc.passes.before.value import Value
from fpsc.passes.graph import Dim, same

_ORDERS = {
    3: ("bnc", "nbc"),
    4: ("bhnd", "bnhd", "nbhd", "hbnd", "hnbd", "nhbd"),
}
"""Letters of its axes, by their number; "c" is heads and channels in one. Where axes have one
element, several may hold, and any is right."""


class Layout(NamedTuple):
    """Of a leaf.

    Attributes:
        order: what each of its axes is: letters of "b", "n", "h", "d", or "c".
        batch, heads, head_dim: sizes.
    """

    order: str
    batch: Dim
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """Their axis."""
        return self.order.index("n")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @staticmethod
    def of(value: Value) -> Layout:
        """From a value that is [B, H, N, D]."""
        batch, head, token, channel = value.axes
        heads, head_dim = size_of(head), size_of(channel)
        if not isinstance(heads, int) or not isinstance(head_dim, int):
            raise Declined("the number of heads is not fixed")
        require(len(value.shape) in _ORDERS, f"a tensor of {len(value.shape)} axes")
        in_order = channel == axis_of(Digit(value.channels, 1, head_dim))
        require(in_order, "channels are in another order")
        for name, axis in (("batch", batch), ("tokens", token)):
            whole = len(axis) <= 1 and all(same(digit.stride, 1) for digit in axis)
            require(whole, f"{name} in another order")
        for order in _ORDERS[len(value.shape)]:
            layout = Layout(order, size_of(batch), heads, head_dim)
            if layout._is_of(value):
                return layout
        raise Declined("queries and keys are laid out in another way")

    def _is_of(self, value: Value) -> bool:
        sizes = {**dict(zip("bhnd", value.sizes, strict=True)), "c": self.width}
        axes = {c: axis_of(Digit(axis, 1, sizes[c])) for axis, c in enumerate(self.order)}
        if "c" in axes:
            axes["h"] = axis_of(Digit(value.channels, self.head_dim, self.heads))
            axes["d"] = axis_of(Digit(value.channels, 1, self.head_dim))
        return value.axes == tuple(axes[c] for c in "bhnd") and all(
            c == "n" or same(sizes[c], size)
            for c, size in zip(self.order, value.shape, strict=True)
        )

    def of_table(self, axes: Iterable[Axis], tokens: Dim, channels: int) -> tuple[str, ...]:
        """For each axis of a table the letters of "b", "h", "n", "d" that it is made of.

        Args:
            tokens, channels: how many it must be for.
        """
        expected = {"b": self.batch, "h": self.heads, "n": tokens, "d": channels}
        parts = [[part for digit in axis for part in self._parts(digit)] for axis in axes]
        found = [part for axis in parts for part in axis]
        whole = all(same(size, expected[letter]) for letter, size in found)
        whole = whole and {"n", "d"} <= {letter for letter, _ in found}
        require(whole, "a rotation of a part of its tokens or channels")
        letters = tuple("".join(letter for letter, _ in axis) for axis in parts)
        plain = {*letters} <= {"", "b", "h", "n", "d", "hd"} and len(found) == len({*found})
        require(plain, "a table whose axes are laid out in another way")
        return letters

    def _parts(self, digit: Digit) -> list[tuple[str, Dim]]:
        """Letters that a digit is of, with their sizes."""
        letter = self.order[digit.axis]
        if letter != "c":
            return [(letter, digit.size)]
        assert isinstance(digit.stride, int) and isinstance(digit.size, int)
        inner = min(max(self.head_dim // digit.stride, 1), digit.size)
        parts: list[tuple[str, Dim]] = [("h", digit.size // inner), ("d", inner)]
        return [(letter, size) for letter, size in parts if size != 1]
