"""Axes of a value as digits of the axes of a leaf, which any reshape only regroups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import sympy

from fpsc.passes.before.declined import Declined, require
from fpsc.passes.graph import Dim, product, same


class Digit(NamedTuple):
    """A digit of an index along an axis of a leaf: (index // stride) % size."""

    axis: int
    stride: Dim
    size: Dim


Axis = tuple[Digit, ...]
"""Digits that an axis is made of, the slowest first; none where it has one element."""


def axis_of(*digits: Digit) -> Axis:
    return tuple(digit for digit in digits if not same(digit.size, 1))


def size_of(axis: Axis) -> Dim:
    return product(digit.size for digit in axis)


def merged(axis: Iterable[Digit]) -> Axis:
    """The same with neighbours joined that are one digit."""
    found: list[Digit] = []
    for digit in axis:
        last = found[-1] if found else None
        if last and last.axis == digit.axis and same(last.stride, digit.stride * digit.size):
            found[-1] = Digit(last.axis, digit.stride, last.size * digit.size)
        else:
            found.append(digit)
    return tuple(found)


def reshaped(axes: Iterable[Axis], sizes: Sequence[Dim]) -> tuple[Axis, ...]:
    """Axes of other sizes, with the same elements in the same order."""
    require(0 not in sizes, "a tensor of no elements")
    left = [digit for axis in axes for digit in axis]
    found = tuple(merged(_taken(left, size)) for size in sizes)
    require(not left, "a reshape")
    return found


def _taken(digits: list[Digit], size: Dim) -> list[Digit]:
    """The leading digits that make an axis of a size; they are removed."""
    found: list[Digit] = []
    taken: Dim = 1
    while not same(taken, size):
        require(digits, "a reshape")
        digit = digits.pop(0)
        if isinstance(size, int) and isinstance(taken, int) and isinstance(digit.size, int):
            left = size // taken
            if digit.size > left and digit.size % left == 0:
                inner = digit.size // left
                digits.insert(0, digit._replace(size=inner))
                digit = Digit(digit.axis, digit.stride * inner, left)
            require(left % digit.size == 0, "a reshape")
        found.append(digit)
        taken = taken * digit.size
    return found


def halved(axis: Axis) -> tuple[Digit, Axis]:
    """Which half of an axis, and where in it."""
    first, *rest = axis
    size = _half(first, "half of an odd number of channels")
    inner = axis_of(Digit(first.axis, first.stride, size))
    return Digit(first.axis, first.stride * size, 2), (*inner, *rest)


def alternated(axis: Axis) -> tuple[Digit, Axis]:
    """Which of two neighbours along an axis, and which pair of them."""
    *rest, last = axis
    size = _half(last, "every other of an odd number of channels")
    outer = axis_of(Digit(last.axis, last.stride * 2, size))
    return Digit(last.axis, last.stride, 2), (*rest, *outer)


def _half(digit: Digit, otherwise: str) -> int:
    if not isinstance(digit.size, int) or digit.size % 2:
        raise Declined(otherwise)
    return digit.size // 2


def canonical(size: Dim) -> Dim:
    """One expression for all that are equal."""
    if isinstance(size, int):
        return size
    size = sympy.expand(size)
    return int(size) if size.is_Integer else size


def at_most(a: Dim, b: Dim) -> bool:
    """Whether a <= b is known: sizes are not negative."""
    difference = canonical(b - a)
    if isinstance(difference, int):
        return difference >= 0
    return all(c >= 0 for c in difference.as_coefficients_dict().values())
