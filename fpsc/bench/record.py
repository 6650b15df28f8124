"""What a run of the benchmarks writes: one JSON file, checked when it is read.

Times are seconds, sizes bytes, errors relative root mean squares. A number that follows from others
(a median from its samples, a speedup from two lists of samples) is stored beside them, so that a
reader needs no arithmetic, and checked against them, so that nobody edits it by hand.

    run = Run.load("bench/results/transformer.json")
    for case in run.cases:
        print(case.name, case.best, [(r.name, r.to_best) for r in case.results])
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 1
"""Rises when a reader of the older files would misunderstand a newer one."""

DIGITS = 6
"""Significant digits of what is written."""


class RecordError(Exception):
    """A file is no record of this schema. The message names the file, the place and what to do."""


class Level(StrEnum):
    """What is timed, from the smallest to the largest."""

    attention = "attention"  # one attention op
    block = "block"  # one transformer block
    transformer = "transformer"  # the whole transformer, one denoising step
    sampling = "sampling"  # a whole loop of denoising steps
    training = "training"  # forward, backward and the optimizer's step
    compile = "compile"  # from torch.compile to the end of the first call
    memory = "memory"  # peak, without a clock


class Role(StrEnum):
    """How a contender counts. All but `fpsattn` are what one could use instead of it."""

    eager = "eager"  # dense and uncompiled, as the model comes
    baseline = "baseline"  # computes what was asked for: dense, or with the same lists of tiles
    approximate = "approximate"  # dense, and rounds (SageAttention, FP8): has an error of its own
    fpsattn = "fpsattn"


class Status(StrEnum):
    measured = "measured"
    wrong = "wrong"  # the gate is red: not timed
    absent = "absent"  # not installed, or not for this device
    skipped = "skipped"  # could run and was left out
    failed = "failed"  # an error while it ran


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quartiles(_Model):
    """The middle half of some samples."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Of one sample or more, by linear interpolation, its ends included."""
        if len(samples) == 1:
            samples = [samples[0]] * 2
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median=rounded(median), q1=rounded(q1), q3=rounded(q3))


class Times(Quartiles):
    """Seconds of one contender, one sample a round; round i of all contenders belongs together."""

    samples: tuple[float, ...] = Field(min_length=1)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        exact = tuple(rounded(x) for x in samples)
        return cls(samples=exact, **Quartiles.of(exact).model_dump())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _same(Quartiles.of(self.samples), self, "samples")
        return self


class Gate(_Model):
    """The check before the clock: the distance to something that is known to be right.

    against: what, in words.
    """

    against: str
    error: float | None  # None where it is not finite
    allowed: float
    passed: bool


class Kernel(_Model):
    """One op or device kernel of a profile, with all its calls."""

    name: str
    kind: str  # attention, linear or rest
    seconds: float
    calls: int


class Split(_Model):
    """Where the time of one call goes, from the profiler: the three parts add up to the total.

    top: the kernels that take most, longest first.
    trace: a file for Perfetto (ui.perfetto.dev), beside the record.
    """

    attention: float
    linear: float
    rest: float
    top: tuple[Kernel, ...] = ()
    trace: str | None = None

    @property
    def total(self) -> float:
        return self.attention + self.linear + self.rest

    def bound(self, attention: float = math.inf) -> float:
        """Amdahl: the speedup of the whole if attention alone were faster by this factor."""
        left = self.linear + self.rest + self.attention / attention
        return self.total / left if left else math.inf


class Step(_Model):
    """One denoising step of a sampling loop.

    noise: from 1 (noise) to 0 (clean). modes: of the policy at this noise, most frequent first;
    empty for a contender without a policy. keep: mean fraction of video key tiles visited.
    """

    index: int
    timestep: float
    noise: float
    modes: tuple[str, ...] = ()
    keep: float | None = None
    seconds: Times


class Memory(_Model):
    """Peak of one call, and what was there before it (weights and inputs).

    source: what counted, as `allocator` (the device's) or `process` (its resident set).
    """

    peak: int
    before: int
    source: str


class Result(_Model):
    """One contender in one case.

    error: of its output against the dense model's (relative RMS): what its speed costs.
    error_fp8: the same with FP8 rounding emulated, where what is timed does not round.
    gates: whether it computes what it says it computes; one that fails is not timed.
    best: the fastest that one could use instead: whatever is dense, and what skips the same tiles.
    to_eager, to_best: how many times as fast as eager, and as `best`: quartiles over the rounds.
    keep: as asked for; None where dense. visited: fraction of query and key pairs that it computes.
    compile_seconds: of its first call, which compiled.
    """

    name: str
    role: Role
    status: Status
    reason: str = ""
    policy: str | None = None
    keep: float | None = None
    visited: float | None = None
    seconds: Times | None = None
    best: str | None = None
    to_eager: Quartiles | None = None
    to_best: Quartiles | None = None
    error: float | None = None
    error_fp8: float | None = None
    gates: tuple[Gate, ...] = ()
    memory: Memory | None = None
    split: Split | None = None
    steps: tuple[Step, ...] = ()
    compile_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status is not Status.measured and not self.reason:
            raise ValueError(f"{self.name}: {self.status} without a reason")
        if self.status is Status.measured and not all(gate.passed for gate in self.gates):
            raise ValueError(f"{self.name}: measured, though a gate is red")
        return self


class Problem(_Model):
    """What every contender of a case is given. Two cases are compared only where these agree.

    model: the name asked for; model_class: of diffusers, "" for the op alone.
    reduced: what was cut to fit this machine, in words; empty where everything is as in real life.
    full_layers, full_grid: of the model as it is.
    threads: of the CPU.
    mode: of Inductor, for every compiled contender.
    noise: level of one denoising step, from 1 (noise) to 0 (clean).
    cache: `cold` or `warm`, of a case that compiles.
    """

    level: Level
    model: str
    model_class: str = ""
    layers: int = 1
    full_layers: int = 1
    grid: tuple[int, int, int]
    full_grid: tuple[int, int, int]
    size: str = ""  # as 480p; "" for a grid that was given
    prefix: int = 0
    suffix: int = 0
    text_tokens: int = 0
    heads: int
    head_dim: int
    batch: int = 1
    dtype: str
    steps: int = 1
    emulate_fp8: bool = True
    mode: str = ""
    noise: float | None = None
    cache: str = ""
    seed: int = 0
    threads: int | None = None
    reduced: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        t, y, x = self.grid
        return self.prefix + t * y * x + self.suffix


class Case(_Model):
    """One case: every contender on one problem.

    best: the fastest dense contender but fpsattn; None where none was timed.
    rounds, warmup: rounds that count, and calls before them.
    """

    name: str
    problem: Problem
    status: Status
    reason: str = ""
    results: tuple[Result, ...] = ()
    best: str | None = None
    rounds: int = 0
    warmup: int = 0
    load: float | None = None  # of the machine, before
    device_state: dict[str, str] = {}  # clocks, power and temperature after
    began: str
    took: float
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _ratios(self) -> Self:
        if len({result.name for result in self.results}) < len(self.results):
            raise ValueError(f"{self.name}: two results of one name")
        for result in self.results:
            for other, stored in (
                (self.eager, result.to_eager),
                (self.of(result.best), result.to_best),
            ):
                expected = ratio(other, result)
                if (expected is None) != (stored is None):
                    raise ValueError(f"{self.name}, {result.name}: a ratio and samples disagree")
                if expected is not None and stored is not None:
                    _same(expected, stored, f"{self.name}, {result.name}: samples of both")
        return self

    def of(self, name: str | None) -> Result | None:
        """The result of a contender."""
        return next((result for result in self.results if result.name == name), None)

    @property
    def eager(self) -> Result | None:
        return next((result for result in self.results if result.role is Role.eager), None)

    @property
    def measured(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status is Status.measured)


def ratio(slower: Result | None, faster: Result) -> Quartiles | None:
    """How many times as fast the second is, round by round; None where one was not timed."""
    if slower is None or slower.seconds is None or faster.seconds is None:
        return None
    pairs = zip(slower.seconds.samples, faster.seconds.samples, strict=True)
    return Quartiles.of([a / b for a, b in pairs])


def compared(results: Sequence[Result]) -> tuple[tuple[Result, ...], str | None]:
    """The results with their ratios, and the name of the fastest that is dense.

    fpsattn is compared with whatever is dense and with what skips as much; others with what is
    dense.
    """
    others = [r for r in results if r.role is not Role.fpsattn and r.seconds is not None]
    eager = next((r for r in others if r.role is Role.eager), None)

    def fastest(keep: float | None) -> Result | None:
        rivals = [r for r in others if r.keep is None or r.keep == keep]
        return min(rivals, key=lambda r: r.seconds.median if r.seconds else math.inf, default=None)

    def whole(r: Result) -> Result:
        best = fastest(r.keep if r.role is Role.fpsattn else None)
        found = {"to_eager": ratio(eager, r), "to_best": ratio(best, r)}
        return r.model_copy(update={"best": best.name if best and r.seconds else None, **found})

    dense = fastest(None)
    return tuple(map(whole, results)), dense.name if dense else None


class Point(_Model):
    """One measured point of a curve: x, and the seconds of the case it came from."""

    x: float
    seconds: float
    case: str


class Fit(_Model):
    """How the cost of one contender grows along one axis: overhead + factor * x ** exponent.

    axis: `tokens`, `keep`, `batch` or `visited pairs` (query rows times keys that they see).
    exponent_range: of the fits that leave one point out; None where the points are too few.
    r2: of the fit, on logarithms.
    overhead: seconds that do not grow, at least 0.
    dominated_below: x where overhead is as long as the rest; below it overhead dominates.
    """

    axis: str
    contender: str
    points: tuple[Point, ...]
    exponent: float
    exponent_range: tuple[float, float] | None = None
    factor: float
    overhead: float
    r2: float
    dominated_below: float | None = None


class BreakEven(_Model):
    """Where an accelerated contender is as fast as a dense one, along one axis.

    at: x of the crossing, None where there is none among the points. faster: the side on which the
    accelerated one wins: `below`, `above`, `always` or `never`.
    """

    axis: str
    contender: str
    against: str
    at: float | None
    faster: str


class Device(_Model):
    """What computes.

    state: clocks, power and temperature when the run began, as far as they can be read.
    """

    kind: str  # cpu or cuda
    name: str
    capability: str = ""
    memory: int
    driver: str | None = None
    state: dict[str, str] = {}


class Environment(_Model):
    """Where a run came from. Runs are compared only where device and libraries agree.

    packages: versions, None where not installed.
    commit: of the checkout, with a plus where a source was changed; None for an installed package.
    source: a hash of all sources of fpsc.
    """

    time: str
    fpsc: str | None
    commit: str | None
    source: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    threads: int
    device: Device
    load: float | None = None

    def differences(self, other: Environment, *, source: bool = True) -> list[str]:
        """What forbids to compare times, in words. source: whether another source counts too."""
        pairs = {
            "device": (self.device.name, other.device.name),
            "driver": (self.device.driver, other.device.driver),
            "cpu": (self.cpu, other.cpu),
            "cores": (self.cores, other.cores),
            "threads": (self.threads, other.threads),
            "python": (self.python, other.python),
        }
        if source:
            pairs["source"] = (self.source, other.source)
        names = sorted({*self.packages, *other.packages})
        pairs |= {name: (self.packages.get(name), other.packages.get(name)) for name in names}
        return [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]


class Run(_Model):
    """One run: the file.

    command: that wrote it. planned: every case that was asked for, done or not.
    """

    schema_version: int = SCHEMA
    command: str
    environment: Environment
    planned: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    fits: tuple[Fit, ...] = ()
    break_evens: tuple[BreakEven, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Planned cases that have no record yet: the run was interrupted."""
        done = {case.name for case in self.cases}
        return tuple(name for name in self.planned if name not in done)

    def of(self, name: str) -> Case | None:
        return next((case for case in self.cases if case.name == name), None)

    def with_case(self, case: Case) -> Run:
        """With this case in place of an earlier one of its name."""
        others = tuple(old for old in self.cases if old.name != case.name)
        return self.model_copy(update={"cases": (*others, case)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a record.

        Raises:
            RecordError: there is no such file, or it is no record of this schema.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"cannot read {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, origin: str) -> Run:
        """Read a record's text; `origin` is what an error calls it."""
        try:
            found: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{origin}, line {error.lineno}: not JSON: {error.msg}; it is no whole record of "
                "`fpsc bench`"
            ) from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA:
            raise RecordError(
                f"{origin}: expected a record of `fpsc bench` with schema_version {SCHEMA}, found "
                f"{version}; measure again with this version of fpsc"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the record"
            raise RecordError(f"{origin}: {place}: {first['msg']}") from error

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name and rename it: a reader never sees half of it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(self.text(), encoding="utf-8")
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _same(expected: Quartiles, found: Quartiles, what: str) -> None:
    for name in ("median", "q1", "q3"):
        a, b = getattr(expected, name), getattr(found, name)
        if not math.isclose(a, b, rel_tol=10.0 ** (1 - DIGITS)):
            raise ValueError(f"{name} is {b}, but {what} say {a}: was it edited?")
