"""The values of a policy that have a spelling of their own: ranges, sizes, lists of layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import PlainValidator, WithJsonSchema

from ..grid import BLOCK, TileShape, TokenGrid
from .errors import shown

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3

QKNames = Literal["tile", "fine", "intermediate", "coarse", "head"]
"""How many tiles share a scale of Q and K, by name; `fine` is `tile`."""

Number = TypeVar("Number", int, float)

# Five decimals: ten times coarser than the tolerance with which a level is compared to an edge.
NUMBER = r"\d{1,3}(?:\.\d{1,5})?"
NOISE = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*")
SPAN = re.compile(r"\s*(\d{1,6})\s*\.\.\s*(\d{1,6})\s*")
PERCENT = NOISE  # spelled alike; what differs is which numbers are allowed


class NoiseRange(NamedTuple):
    """A stretch of noise from noisy to clean: `hi` belongs to it, `lo` only when it is 0."""

    hi: float
    lo: float

    def __str__(self) -> str:
        return f"{level(self.hi)}..{level(self.lo)}"


def level(noise: float) -> str:
    """A noise level as people write it: two decimals, more where it needs them."""
    return f"{noise:.2f}" if round(noise, 2) == noise else f"{noise:.5f}".rstrip("0")


class StepRange(NamedTuple):
    """Steps of a sampling run from `first` up to, and without, `stop`, counted from 0."""

    first: int
    stop: int

    def __str__(self) -> str:
        return f"{self.first}..{self.stop}"


class PercentRange(NamedTuple):
    """A part of a sampling run in percent of its steps, from `first` up to, and without, `stop`."""

    first: float
    stop: float

    def __str__(self) -> str:
        return f"{self.first:g}..{self.stop:g}"


class Span(NamedTuple):
    """Layers or heads from `first` to `last`, both included, counted from 0."""

    first: int
    last: int


def _noise(value: Any) -> NoiseRange:
    match = NOISE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise TypeError
    noise = NoiseRange(float(match[1]), float(match[2]))
    if max(noise) > 1:
        raise ValueError(f"noise lies between 1 (pure noise) and 0 (clean); found {shown(value)}")
    if noise.hi <= noise.lo:
        fix = f"; write {match[2]}..{match[1]}" if noise.hi < noise.lo else ""
        raise ValueError(f"a range runs from noisy to clean, a..b with a > b; found {value}{fix}")
    return noise


def _steps(value: Any) -> StepRange:
    match = SPAN.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise TypeError
    return StepRange(*_counting_up(value, int(match[1]), int(match[2])))


def _percent(value: Any) -> PercentRange:
    match = PERCENT.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise TypeError
    percent = PercentRange(*_counting_up(value, float(match[1]), float(match[2])))
    if percent.stop > 100:
        raise ValueError(f"percent lies between 0 (the first step) and 100; found {shown(value)}")
    return percent


def _counting_up(text: str, first: Number, stop: Number) -> tuple[Number, Number]:
    if first > stop:
        raise ValueError(f"a range counts up; write {stop:g}..{first:g}, found {text}")
    if first == stop:
        raise ValueError(f"a range leaves its end out, so {text} is empty")
    return first, stop


def _spans(value: Any) -> tuple[Span, ...]:
    spans = []
    for item in value if isinstance(value, list) and value else [value]:
        match = SPAN.fullmatch(item) if isinstance(item, str) else None
        if match:
            span = Span(int(match[1]), int(match[2]))
        elif isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            span = Span(item, item)
        else:
            raise TypeError
        if span.first > span.last:
            raise ValueError(f"a range counts up; write {span.last}..{span.first}, found {item}")
        spans.append(span)
    return tuple(spans)


def _triple(value: Any) -> tuple[int, int, int]:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_size, value))):
        raise TypeError
    t, y, x = value
    return t, y, x


def _grid(value: Any) -> TokenGrid:
    return TokenGrid(*_triple(value))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20


def _tile(value: Any) -> TileShape | Literal["auto"]:
    if value == "auto":
        return "auto"
    tile = TileShape(*_triple(value))
    if tile.tokens > BLOCK:
        raise ValueError(f"{shown(value)} holds {tile.tokens} tokens; a tile holds {BLOCK} at most")
    return tile


def _qk_scales(value: Any) -> QKNames | tuple[int, int, int]:
    return value if value in get_args(QKNames) else _triple(value)


def _offsets(value: Any) -> tuple[tuple[int, int, int], ...]:
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(o, list) and len(o) == 3 and all(type(n) is int for n in o) for o in value
        )
    )
    if not good:
        raise TypeError
    return tuple((t, y, x) for t, y, x in value)


def _lists(value: Any) -> tuple[tuple[int, ...], ...]:
    good = isinstance(value, list) and value and all(isinstance(keys, list) for keys in value)
    if not good or not all(type(key) is int for keys in value for key in keys):
        raise TypeError
    for tile, keys in enumerate(value):
        for key in keys:
            if not 0 <= key < len(value):
                raise ValueError(
                    f"list {tile} names tile {key}; {len(value)} lists are for tiles "
                    f"0..{len(value) - 1}"
                )
    return tuple(tuple(sorted({tile, *keys})) for tile, keys in enumerate(value))


def _weights(value: Any) -> tuple[float, float, float]:
    good = isinstance(value, list) and len(value) == 3
    if not good or not all(
        type(w) in (int, float) and MIN_WEIGHT <= w <= MAX_WEIGHT for w in value
    ):
        raise TypeError
    t, y, x = map(float, value)
    return t, y, x


def _reader(read: Callable[[Any], Any]) -> PlainValidator:
    """A field that one function reads; its TypeError means "not what the description says"."""

    def validate(value: Any) -> Any:
        try:
            return read(value)
        except TypeError:
            raise AssertionError from None

    return PlainValidator(validate)


_TRIPLE = {"type": "array", "minItems": 3, "maxItems": 3}
_SIZES = WithJsonSchema(_TRIPLE | {"items": {"type": "integer", "minimum": 1}})
_OFFSET = _TRIPLE | {"items": {"type": "integer"}}
_NOISE = WithJsonSchema({"type": "string", "pattern": rf"^{NUMBER}\.\.{NUMBER}$"})
_STEPS = WithJsonSchema({"type": "string", "pattern": r"^\d+\.\.\d+$"})
_SPAN = [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+\.\.\d+$"}]
_SPANS = WithJsonSchema(
    {"anyOf": [*_SPAN, {"type": "array", "minItems": 1, "items": {"anyOf": _SPAN}}]}
)
_TILE = WithJsonSchema(
    {"anyOf": [{"const": "auto"}, _TRIPLE | {"items": {"type": "integer", "minimum": 1}}]}
)
_QK_SCALES = WithJsonSchema(
    {
        "anyOf": [
            {"enum": list(get_args(QKNames))},
            _TRIPLE | {"items": {"type": "integer", "minimum": 1}},
        ]
    }
)
_OFFSETS = WithJsonSchema({"type": "array", "minItems": 1, "items": _OFFSET})
_KEYS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_LISTS = WithJsonSchema({"type": "array", "minItems": 1, "items": _KEYS})
_WEIGHTS = WithJsonSchema(
    _TRIPLE | {"items": {"type": "number", "minimum": MIN_WEIGHT, "maximum": MAX_WEIGHT}}
)

Noise = Annotated[NoiseRange, _reader(_noise), _NOISE]
Steps = Annotated[StepRange, _reader(_steps), _STEPS]
Percent = Annotated[PercentRange, _reader(_percent), _NOISE]
Spans = Annotated[tuple[Span, ...], _reader(_spans), _SPANS]
Grid = Annotated[TokenGrid, _reader(_grid), _SIZES]
Window = Annotated[tuple[int, int, int], _reader(_triple), _SIZES]
Tile = Annotated[TileShape | Literal["auto"], _reader(_tile), _TILE]
QKScales = Annotated[QKNames | tuple[int, int, int], _reader(_qk_scales), _QK_SCALES]
Offsets = Annotated[tuple[tuple[int, int, int], ...], _reader(_offsets), _OFFSETS]
Lists = Annotated[tuple[tuple[int, ...], ...], _reader(_lists), _LISTS]
Weights = Annotated[tuple[float, float, float], _reader(_weights), _WEIGHTS]
