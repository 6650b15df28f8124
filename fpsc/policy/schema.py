"""The format of a policy: one pydantic model for every mapping, and what a model cannot say.

A field's description completes the sentence "expected ...", in messages as in editors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from ..grid import BLOCK, TileShape, TokenGrid
from .document import Document, Path_
from .errors import PolicyError, Problem, either, listed, nearest, shown

MODES = 32
"""Most modes of a policy: a capacity of the table, so that edits never change a shape."""

ROWS = 64
"""Most rows (different stretches of noise) of a policy, for the same reason."""

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3

NUMBER = r"\d*\.?\d+"
NOISE = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*")
SPAN = re.compile(r"\s*(\d{1,6})\s*\.\.\s*(\d{1,6})\s*")


class NoiseRange(NamedTuple):
    """A stretch of noise from noisy to clean: `hi` belongs to it, `lo` only when it is 0."""

    hi: float
    lo: float

    def __str__(self) -> str:
        return f"{level(self.hi)}..{level(self.lo)}"


def level(noise: float) -> str:
    """A noise level as people write it: two decimals, more where it needs them."""
    return f"{noise:.2f}" if round(noise, 2) == noise else f"{noise:g}"


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
_SPAN = [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+\.\.\d+$"}]
_SPANS = WithJsonSchema(
    {"anyOf": [*_SPAN, {"type": "array", "minItems": 1, "items": {"anyOf": _SPAN}}]}
)
_TILE = WithJsonSchema(
    {"anyOf": [{"const": "auto"}, _TRIPLE | {"items": {"type": "integer", "minimum": 1}}]}
)
_OFFSETS = WithJsonSchema({"type": "array", "minItems": 1, "items": _OFFSET})
_WEIGHTS = WithJsonSchema(
    _TRIPLE | {"items": {"type": "number", "minimum": MIN_WEIGHT, "maximum": MAX_WEIGHT}}
)

Noise = Annotated[NoiseRange, _reader(_noise), _NOISE]
Spans = Annotated[tuple[Span, ...], _reader(_spans), _SPANS]
Grid = Annotated[TokenGrid, _reader(_grid), _SIZES]
Window = Annotated[tuple[int, int, int], _reader(_triple), _SIZES]
Tile = Annotated[TileShape | Literal["auto"], _reader(_tile), _TILE]
Offsets = Annotated[tuple[tuple[int, int, int], ...], _reader(_offsets), _OFFSETS]
Weights = Annotated[tuple[float, float, float], _reader(_weights), _WEIGHTS]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _something(cls, value: Any) -> Any:
        """`keep:` with nothing behind it is a slip, not a way to say "the default"."""
        assert value is not None
        return value


class Scales(Spec):
    """How much one FP8 scale covers."""

    qk: Literal["tile"] = Field(
        default="tile", description="tile (one scale for each tile of Q and K)"
    )
    v: Literal["channel"] = Field(
        default="channel", description="channel (one scale for each channel)"
    )


class Mode(Spec):
    """A named choice: what a query tile sees, and in which precision."""

    pattern: Literal["dense", "window", "near", "frame", "column", "radial", "explicit"] | None = (
        Field(
            default=None,
            description="a pattern: dense, window, near, frame, column, radial or explicit",
        )
    )
    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="a number above 0 and at most 1, the fraction of video key tiles visited",
    )
    window: Window | None = Field(
        default=None, description="three positive whole numbers of tiles [t, y, x]"
    )
    weights: Weights | None = Field(
        default=None,
        description="three numbers [t, y, x] from 0.001 to 1000, how far one token counts per axis",
    )
    offsets: Offsets | None = Field(
        default=None, description="a list of tile offsets [t, y, x], whole numbers"
    )
    dtype: Literal["bf16", "fp8"] = Field(
        default="bf16", description="bf16 (not quantised: computed in the input's dtype) or fp8"
    )
    scales: Scales = Field(
        default=Scales(), description="a mapping, for example {qk: tile, v: channel}"
    )


class Phase(Spec):
    """The mode of a stretch of noise."""

    noise: Noise = Field(description="a range from noisy to clean, for example 0.90..0.40")
    use: str = Field(description="the name of a mode")


class Rule(Spec):
    """Another mode for some layers, heads or noise; of several rules the last one wins."""

    layers: Spans | None = Field(
        default=None,
        description="layers counted from 0: a number, a range 12..18, or a list of these",
    )
    heads: Spans | None = Field(
        default=None, description="heads counted from 0: a number, a range 0..3, or a list of these"
    )
    noise: Noise | None = Field(
        default=None, description="a range from noisy to clean, for example 0.90..0.40"
    )
    use: str = Field(description="the name of a mode")


class Tuned(Spec):
    """What a policy was tuned on; elsewhere it still runs, with a warning."""

    model: str | None = Field(default=None, description="the model's name in text")
    grid: Grid | None = Field(
        default=None, description="three positive whole numbers of tokens [t, y, x]"
    )
    weights: Literal["base", "jointly-tuned"] | None = Field(
        default=None, description="base or jointly-tuned"
    )


class Limits(Spec):
    """Where a policy does not apply."""

    min_tokens: int = Field(
        default=4096,
        ge=0,
        description="a whole number of video tokens, 0 or more; shorter sequences stay dense",
    )
    unsupported: Literal["dense"] = Field(
        default="dense", description="dense (what cannot be replaced stays as it was)"
    )


class PolicySpec(Spec):
    """A whole policy."""

    fpsc: int = Field(ge=1, le=1, description="1, the version of the format")
    name: str | None = Field(default=None, description="a name in text")
    for_: Tuned = Field(
        default=Tuned(),
        alias="for",
        description="a mapping, for example {model: name, grid: [21, 45, 80]}",
    )
    tile: Tile = Field(
        default="auto", description=f"auto, or a tile [t, y, x] of at most {BLOCK} tokens"
    )
    modes: dict[str, Mode] = Field(
        min_length=1,
        max_length=MODES,
        description=f"a mapping of 1 to {MODES} modes, for example dense: {{keep: 1.0}}",
    )
    schedule: list[Phase] = Field(
        min_length=1, description="a list of phases like {noise: 1.00..0.90, use: dense}"
    )
    except_: list[Rule] = Field(
        default=[], alias="except", description="a list of rules like {layers: [0, 39], use: dense}"
    )
    limits: Limits = Field(
        default=Limits(), description="a mapping, for example {min_tokens: 4096}"
    )
    measured: dict[str, Any] = Field(default={}, description="a mapping, written by tools")


ELSEWHERE = {
    "steps": 'steps are not read yet; say it in noise, "noise: 1.00..0.90" (1 is pure noise)',
    "percent": 'percent is not read yet; say it in noise, "noise: 1.00..0.90" (1 is pure noise)',
    "sampling": 'sampling is not read yet; give the phases in noise and remove "sampling"',
    "table": "tables are not read yet; write the choices as rules under except",
    "roles": "roles are not read yet; a policy covers every video self-attention",
    "components": "components are not read yet; give each transformer its own policy",
    "$import": "imports are not read yet; copy the base policy's lines",
}
"""Keys of the planned format that this version refuses, and what to write instead."""


def validate(document: Document) -> PolicySpec:
    """The model of a document.

    Raises:
        PolicyError: every problem that was found, each with its place.
    """
    try:
        spec = PolicySpec.model_validate(document.value)
    except ValidationError as e:
        errors: list[dict[str, Any]] = [dict(error) for error in e.errors()]
        # A phase by steps lacks its noise: one message says it all.
        refused = {x["loc"][:-1] for x in errors if _is_planned(x)}
        kept = [x for x in errors if x["type"] != "missing" or x["loc"][:-1] not in refused]
        problems = [_problem(document, error) for error in kept]
        raise PolicyError(document.file, problems) from None
    problems = [document.problem(*p) for p in _conflicts(spec)]
    if problems:
        raise PolicyError(document.file, problems)
    return spec


def _problem(document: Document, error: dict[str, Any]) -> Problem:
    path: Path_ = error["loc"]
    model, field, here = _declared(path)
    keys = [f.alias or name for name, f in model.model_fields.items()]
    last = path[-1] if path else ""
    match error["type"]:
        case "extra_forbidden" if _is_planned(error):
            return document.problem(path[:-1], ELSEWHERE[str(last)], at=path)
        case "extra_forbidden":
            message = f'unknown key "{last}"{nearest(last, keys)} (valid: {listed(keys)})'
            return document.problem(path[:-1], message, at=path)
        case "missing":
            message = f'"{last}" is missing: expected {field.description}'
            return document.problem(path[:-1], message)
        case "value_error":
            return document.problem(path, str(error["ctx"]["error"]))
    expected, found = field.description, error["input"]
    if _is_model(here):
        expected = "a mapping with " + listed(f.alias or n for n, f in here.model_fields.items())
    choices = [c for c in get_args(here) if isinstance(c, str)]
    guess = nearest(found, choices) if isinstance(found, str) else ""
    message = f"expected {expected}, found {shown(found)}{guess}"
    # Where nothing stands, YAML's position is that of the next thing: point at the key.
    return document.problem(path, message, at=path if found is None else None)


def _is_planned(error: dict[str, Any]) -> bool:
    return error["type"] == "extra_forbidden" and error["loc"][-1] in ELSEWHERE


def _declared(path: Path_) -> tuple[type[BaseModel], Any, Any]:
    """For a place: the model around it, the field that declares it, and what stands there."""
    model: type[BaseModel] = PolicySpec
    field: Any = None
    here: Any = PolicySpec
    for step in path:
        if _is_model(here):
            model = here
            fields = {f.alias or name: f for name, f in model.model_fields.items()}
            if step not in fields:
                break
            field = fields[str(step)]
            here = field.annotation
            if type(None) in get_args(here):
                here = next(a for a in get_args(here) if a is not type(None))
        else:  # an item of a list or of a mapping
            here = get_args(here)[-1] if get_args(here) else Any
    return model, field, here


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


Conflict = tuple[Path_, str]


def _conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    """What single fields cannot know: names that must exist, ranges that must meet."""
    for name, mode in spec.modes.items():
        if not re.fullmatch(r"[\w-]+", name):
            message = f'a mode\'s name is letters, digits, "-" and "_"; found {shown(name)}'
            yield ("modes", name), message
        for key, message in mode_conflicts(mode):
            yield ("modes", name, *key), message
    parts: dict[str, Sequence[Phase | Rule]]
    parts = {"schedule": spec.schedule, "except": spec.except_}
    for part, entries in parts.items():
        for i, entry in enumerate(entries):
            if entry.use not in spec.modes:
                guess = nearest(entry.use, spec.modes)
                message = f'no mode "{entry.use}"{guess} (modes: {listed(spec.modes)})'
                yield (part, i, "use"), message
    yield from _schedule_conflicts(spec.schedule)
    for i, rule in enumerate(spec.except_):
        if rule.layers is None and rule.heads is None and rule.noise is None:
            message = "says not where: add layers, heads or noise, or change the schedule instead"
            yield ("except", i), message
    rows = len(edges(spec)) + 1
    if rows > ROWS:
        message = (
            f"the ranges of schedule and except cut noise in {rows} rows; a table has {ROWS} at "
            "most, so let rules share their edges"
        )
        yield ("schedule",), message


def _schedule_conflicts(schedule: list[Phase]) -> Iterator[Conflict]:
    end = 1.0
    for i, phase in enumerate(schedule):
        hi, lo = phase.noise
        place = ("schedule", i, "noise")
        fix = f"write {NoiseRange(end, lo)}"
        if i == 0 and hi != end:
            yield place, f"the schedule starts at 1.00 (pure noise), found {phase.noise}; {fix}"
        elif hi < end:
            gap = NoiseRange(end, hi)
            yield place, f"gap: no phase covers {gap}; {fix}, or add a phase before this one"
        elif hi > end and lo < end:
            yield place, f"overlap: {NoiseRange(hi, end)} is covered twice; {fix}"
        elif hi > end:
            message = (
                f"{phase.noise} comes after {level(end)}; phases run from noisy to clean and "
                "cover each level once"
            )
            yield place, message
        end = min(end, lo)
    if end != 0:
        place = ("schedule", len(schedule) - 1, "noise")
        fix = f"write {NoiseRange(schedule[-1].noise.hi, 0)}, or add a phase {NoiseRange(end, 0)}"
        yield place, f"the schedule ends at 0.00 (clean), found {schedule[-1].noise}; {fix}"


def mode_conflicts(mode: Mode) -> Iterator[Conflict]:
    """What does not go together in one mode, with the key inside it."""
    needs = {"window": "window", "near": "keep", "radial": "keep", "explicit": "offsets"}
    owners = {
        "keep": ("near", "radial", "frame", "column"),
        "window": ("window",),
        "weights": ("near",),
        "offsets": ("explicit",),
    }
    kind = mode.pattern or "dense"
    if mode.window is not None and mode.keep is not None:
        yield ("keep",), "a mode sets keep or window, not both; remove one"
        return
    for key, patterns in owners.items():
        value = getattr(mode, key)
        if value is None or kind in patterns or (key, value, kind) == ("keep", 1, "dense"):
            continue
        if mode.pattern is None:
            yield (key,), f"needs a pattern; add pattern: {either(patterns)}"
        else:
            yield (key,), f"belongs to pattern {either(patterns)}, not to {kind}; remove it"
    need = needs.get(kind)
    if need and getattr(mode, need) is None:
        description = type(mode).model_fields[need].description
        yield ("pattern",), f'{kind} needs "{need}": {description}'


def edges(spec: PolicySpec) -> list[float]:
    """Noise levels, descending, at which a schedule or a rule changes: between the rows."""
    ranges = [p.noise for p in spec.schedule] + [r.noise for r in spec.except_ if r.noise]
    return sorted({n for noise in ranges for n in noise} - {0.0, 1.0}, reverse=True)
