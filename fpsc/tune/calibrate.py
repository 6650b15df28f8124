"""The calibration of a model: dense runs of a few prompts, and what every mode does at some levels.

For each prompt the model runs dense once, and its calls are noted. At one call for each bin of
noise all modes are measured in all heads (`fpsc.tune.measure`). Then the run is repeated with one
bin at a time in a sparse mode, a gentle and a strong one: what is left of these errors in the
result tells how much an error in the bin counts (`Calibration.gains_at`).
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fpsc import __version__
from fpsc.bench.op import Shape
from fpsc.bench.progress import Tell, quiet
from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.policy.accounting import visits
from fpsc.policy.resolve import plan, resolve
from fpsc.policy.values import level
from fpsc.tune import cost, modes, timing
from fpsc.tune.instrument import Call, Instrument
from fpsc.tune.measure import Measurement
from fpsc.tune.modes import DENSE_FP8, Candidates
from fpsc.tune.parts import Parts
from fpsc.tune.record import Calibration, Facts, Run, bin_of
from fpsc.tune.subjects import Subject

LEAST_PROMPTS = 2
"""Fewer say more of themselves than of the model."""

MOST_BINS = 16
SMALLEST_SHARE = 1 / 16
"""Of the query tiles, below which memory is short for another reason."""

RUN = "run.json"

FILE, PARTS = "calibration.safetensors", "calibration.parts"


@dataclass(frozen=True)
class Settings:
    """What a calibration measures.

    Attributes:
        candidates: the modes.
        prompts: that are measured on.
        carried: of these, how many are run again to see what is left of an error; the costliest
            part where a clip takes long.
        bins: of noise, of equally many steps each; `edges` states them instead, from 1 to 0.
        probes: random directions for each forward.
        cost: `measured` on this device, or `pairs`, counted.
        tile: as in a policy.
        seed: of the directions.
    """

    candidates: Candidates
    prompts: int = 3
    carried: int = 2
    bins: int = 5
    edges: tuple[float, ...] = ()
    probes: int = 1
    cost: Literal["measured", "pairs"] = "measured"
    tile: tuple[int, int, int] | Literal["auto"] = "auto"
    seed: int = 0

    def check(self, available: int) -> None:
        """Raises: UserError, where they are not possible with so many prompts."""
        if self.prompts < LEAST_PROMPTS:
            raise UserError(
                f"{self.prompts} prompts to measure on: expected {LEAST_PROMPTS} or more, because "
                "what one prompt needs is not what others need"
            )
        if self.prompts > available:
            raise UserError(
                f"{self.prompts} prompts to measure on, and there are {available}: give more, or "
                "ask for fewer with --measure"
            )
        if not 1 <= self.carried <= self.prompts:
            raise UserError(f"carried: expected 1 to {self.prompts}, found {self.carried}")
        if not 1 <= self.bins <= MOST_BINS:
            raise UserError(f"bins: expected 1 to {MOST_BINS}, found {self.bins}")
        good = not self.edges or (self.edges[0] == 1 and self.edges[-1] == 0)
        if not good or any(a <= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise UserError(
                f"edges: expected levels from 1 down to 0, found {', '.join(map(str, self.edges))}"
            )


def calibrate(
    subject: Subject,
    settings: Settings,
    folder: Path,
    *,
    fresh: bool = False,
    tell: Tell = quiet,
) -> Calibration:
    """Measure a model; goes on where an earlier call with the same settings stopped.

    Writes `calibration.safetensors` into the folder; returns what is in it. Under `accelerate
    launch` each process measures a part of the prompts, on its own device.

    Raises:
        UserError: the model has no 3D attention, there are too few prompts, memory is short, or the
            folder holds something else.
    """
    settings.check(subject.prompts)
    (rank, processes), wait = _processes()
    described = {
        **asdict(settings),
        "model": subject.name,
        "class": type(subject.model).__name__,
        "sampling": dict(subject.about),
        "order": list(settings.candidates),
    }
    target = folder / FILE
    if rank == 0:  # before the others look
        if fresh:
            target.unlink(missing_ok=True)
        Parts(folder / PARTS, described, fresh=fresh)
    wait()
    parts = Parts(folder / PARTS, described)
    if target.is_file() and parts.finished:
        return Calibration.load(target)
    work = _Work(subject, settings, parts, tell)
    work.measure(range(rank, settings.prompts, processes))
    wait()
    if rank == 0:
        merge(subject, settings, parts).save(target)
        parts.finish()
    wait()
    return Calibration.load(target)


def _processes() -> tuple[tuple[int, int], Callable[[], None]]:
    """(rank, processes), and how to wait for the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return (0, 1), lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return (state.process_index, state.num_processes), state.wait_for_everyone


class _Work:
    """The measuring itself; leaves parts."""

    def __init__(self, subject: Subject, settings: Settings, parts: Parts, tell: Tell) -> None:
        self.subject, self.settings, self.parts, self.tell = subject, settings, parts, tell
        self.candidates = modes.policy(settings.candidates, tile=settings.tile)
        self.share, self.checkpointing = 1.0, False

    def measure(self, prompts: Sequence[int]) -> None:
        """All parts of these prompts that are not there yet."""
        missing = [p for p in prompts if self._missing(p)]
        if not missing:
            return
        with Instrument(self.subject.model, self.candidates, self.subject.options) as instrument:
            clock = Clock(self.tell, missing)
            try:
                for prompt in missing:
                    self._prompt(instrument, prompt, clock)
            finally:
                if self.checkpointing:
                    model: Any = self.subject.model
                    model.disable_gradient_checkpointing()

    def _missing(self, prompt: int) -> list[str]:
        found = self.parts.facts(RUN)
        bins = len(found["levels"]) if found else 1
        wanted = [damage_name(prompt, b) for b in range(bins)]
        wanted += [carried_name(prompt, *place) for place in self._carried(prompt, bins)]
        return [name for name in [RUN, *wanted] if not self.parts.has(name)]

    def _prompt(self, instrument: Instrument, prompt: int, clock: Clock) -> None:
        self.tell(f"prompt {prompt}: the dense run")
        instrument.use(None)
        with instrument.recorded() as calls:
            dense = self.subject.sample(prompt)
        if not calls:
            raise UserError(
                f"{self.subject.name}: sampling did not call {type(self.subject.model).__name__}"
            )
        instrument.state  # noqa: B018  raises where nothing was replaced
        run = self._run(instrument, calls)
        # Not all of the time: the first call compiled.
        clock.run_seconds = statistics.median(call.seconds for call in calls) * len(calls)
        clock.begin(run, self.settings)
        for b, at in enumerate(run.levels):
            name = damage_name(prompt, b)
            if not self.parts.has(name):
                clock.step(f"prompt {prompt}: every mode at noise {level(round(at, 2))}")
                call = min(calls, key=lambda call: abs(call.noise - at))
                self.parts.keep(name, self._damage(instrument, run, call, (prompt, b)))
            clock.done += 1
        for b, strength in self._carried(prompt, run.bins):
            name = carried_name(prompt, b, strength)
            if not self.parts.has(name):
                mode = run.references[strength]
                clock.step(f"prompt {prompt}: what is left of {mode} in bin {b}")
                instrument.use(self._only_in(run, b, mode))
                with instrument.following(calls, run.edges[b]):
                    found = self.subject.sample(prompt)
                self.parts.keep(name, {"carried": np.array(relative_square(found, dense))})
            clock.done += 1
        instrument.use(None)

    def _carried(self, prompt: int, bins: int) -> list[tuple[int, int]]:
        """(bin, reference) of every run again that a prompt needs."""
        again = prompt < self.settings.carried
        return list(itertools.product(range(bins), range(2))) if again else []

    def _run(self, instrument: Instrument, calls: Sequence[Call]) -> Run:
        """What a dense run shows; the first one decides where the others are measured."""
        own = self.parts.facts(RUN)
        if own is not None:
            return Run.model_validate(own)
        steps = tuple(sorted({round(call.noise, 6) for call in calls}, reverse=True))
        edges = self.settings.edges or bins(steps, self.settings.bins)
        layout = instrument.layout
        table = resolve(self.candidates, layers=1, heads=1, fp8=True)
        patterns = table.modes[: len(self.candidates.modes), 0].numpy()
        lists = plan(self.candidates, layout)
        keep, pairs, _ = (x[patterns] for x in visits(lists, layout))
        pairs = pairs / layout.tokens**2
        lengths = lists.list_ptr.diff(dim=1).numpy()[patterns]
        heads, head_dim = instrument.query[1], instrument.query[3]
        layers = instrument.state.layers
        device = next(self.subject.model.parameters()).device
        if not instrument.state.runs_fp8(device) and DENSE_FP8 in self.candidates.modes:
            self.tell("fp8 modes run in the dtype of the input on this device, and are measured so")
        grid = (layout.grid.t, layout.grid.y, layout.grid.x)
        batch = instrument.query[0]
        shape = Shape(grid, heads, head_dim, batch, layout.prefix, layout.suffix)
        t, y, x = layout.tile
        run = Run(
            steps=steps,
            edges=edges,
            levels=tuple(_middle(steps, edges, b) for b in range(len(edges) - 1)),
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            grid=grid,
            tile=(t, y, x),
            prefix=layout.prefix,
            suffix=layout.suffix,
            references=modes.references(self.candidates, layout.grid),
            keep=tuple(keep.tolist()),
            pairs=tuple(pairs.tolist()),
            cost=self._cost(instrument, pairs, lengths, shape, layers, calls),
        )
        self.parts.note(RUN, run.model_dump(mode="json"))
        return run

    def _cost(
        self,
        instrument: Instrument,
        pairs: Sequence[float],
        lengths: np.ndarray,
        shape: Shape,
        layers: int,
        calls: Sequence[Call],
    ) -> cost.Cost:
        """What the candidates cost. lengths: [candidates, tiles], of the query tiles' lists."""
        known = self.parts.facts("cost.json")
        if known is not None:
            return cost.Cost.model_validate(known)
        if self.settings.cost == "pairs":
            found = cost.counted(self.candidates, pairs)
        else:
            device = next(self.subject.model.parameters()).device
            dtype = _dtype(self.subject.model)
            measured = timing.device_cost(
                shape,
                device=device,
                dtype=dtype,
                fp8=instrument.state.runs_fp8(device),
                tile=instrument.layout.tile,
                tell=self.tell,
            )
            if measured.refusal is None:
                found = cost.on_device(
                    self.candidates,
                    list(lengths),
                    measured,
                    shape,
                    element=dtype.itemsize,
                    layers=layers,
                    forward_seconds=statistics.median(call.seconds for call in calls),
                )
            else:
                self.tell(f"times of {measured.device} are not used: {measured.refusal}")
                found = cost.counted(self.candidates, pairs, refused=measured.refusal)
        self.parts.note("cost.json", found.model_dump(mode="json"))
        return found

    def _damage(
        self, instrument: Instrument, run: Run, call: Call, place: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Measure a call; with checkpointing, then with fewer queries, where memory is short."""
        while True:
            try:
                return self._measured(instrument, run, call, place)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            model: Any = self.subject.model
            if not getattr(model, "is_gradient_checkpointing", True):
                self.tell("memory is short: with gradient checkpointing from now on")
                model.enable_gradient_checkpointing()
                self.checkpointing = True
                continue
            self.share /= 2
            if self.share < SMALLEST_SHARE:
                raise UserError(
                    f"{self.subject.name}: memory is short even for {SMALLEST_SHARE:.0%} of the "
                    "queries; calibrate on a smaller grid (fewer frames, a lower resolution): "
                    "policies carry over"
                )
            self.tell(f"memory is short: {self.share:.0%} of the query tiles are measured")

    def _measured(
        self, instrument: Instrument, run: Run, call: Call, place: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        video = instrument.layout.video_tiles
        settings = self.settings
        measurement = Measurement(
            run.layers, run.heads, len(settings.candidates), video, self.share
        )
        size = 0.0
        for probe in range(settings.probes):
            seed = [settings.seed, *place, probe]
            number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
            generator = torch.Generator("cpu").manual_seed(number)
            size += instrument.measure(call, measurement, generator)
        if not measurement.seen.all():
            layer = int(np.argmin(measurement.seen))
            raise UserError(
                f"layer {layer} of {run.layers} did not run at noise {call.noise:.2f}, so nothing "
                "can be measured there; switch off caches that skip blocks"
            )
        found = measurement.damage / max(size, 1e-30)
        if not np.isfinite(found).all():
            bad = np.argwhere(~np.isfinite(found))[0]
            raise UserError(
                f"layer {bad[0]}, head {bad[1]}: the error of mode "
                f"{list(settings.candidates)[bad[2]]} is not finite; the dense model itself may "
                "overflow in this dtype"
            )
        maps = measurement.maps / measurement.seen[:, None, None]
        return {
            "damage": found.astype(np.float32),
            "attention": measurement.attention.astype(np.float32),
            "maps": maps.astype(np.float32),
            "queries": np.array(self.share, np.float32),
        }

    def _only_in(self, run: Run, b: int, mode: str) -> Policy:
        """A policy that is sparse in one bin."""
        chosen = [mode if i == b else modes.DENSE for i in range(run.bins)]
        phases = [(run.edges[i], run.edges[i + 1], chosen[i]) for i in range(run.bins)]
        return modes.policy(self.settings.candidates, phases, tile=self.settings.tile)


def merge(subject: Subject, settings: Settings, parts: Parts) -> Calibration:
    """The calibration that all parts make together; the same whoever measured which."""
    run = Run.model_validate(parts.facts(RUN))
    found = [
        [parts.read(damage_name(p, b)) for b in range(run.bins)] for p in range(settings.prompts)
    ]
    places = itertools.product(range(settings.carried), range(run.bins), range(2))
    carried = [parts.read(carried_name(*place))["carried"].item() for place in places]

    def stacked(name: str) -> np.ndarray:
        return np.stack([np.stack([part[name] for part in row]) for row in found])

    model = subject.model
    facts = Facts(
        model=subject.name,
        origin=subject.origin,
        model_class=type(model).__name__,
        device=_device_name(next(model.parameters()).device),
        dtype=str(_dtype(model)).removeprefix("torch."),
        tile=settings.tile,
        modes=settings.candidates,
        run=run,
        prompts=settings.prompts,
        probes=settings.probes,
        seed=settings.seed,
        queries=float(stacked("queries").min()),
        versions={
            "fpsc": __version__,
            "torch": torch.__version__,
            "diffusers": metadata.version("diffusers"),
        },
    )
    return Calibration(
        facts=facts,
        damage=stacked("damage"),
        attention=stacked("attention"),
        carried=np.array(carried, np.float32).reshape(settings.carried, run.bins, 2),
        maps=stacked("maps").mean(axis=0),
    )


class Clock:
    """Says how long it will take, before anything is measured, and then how far it is.

    prompts: those of which something is missing.
    """

    def __init__(self, tell: Tell, prompts: Sequence[int]) -> None:
        self.tell, self.prompts = tell, prompts
        self.done = self.total = 0
        self.run_seconds = 0.0

    def begin(self, run: Run, settings: Settings) -> None:
        """Called once a prompt's dense run is over; estimates at the first one."""
        if self.total:
            return
        forwards = run.bins * len(self.prompts)
        again = 2 * run.bins * sum(p < settings.carried for p in self.prompts)
        self.total = forwards + again
        # A forward and backward for each bin; the dense runs, and those that are sparse in one bin.
        seconds = forwards * 4 * self.run_seconds / len(run.steps)
        part = (run.bins + 1) / (2 * run.bins)  # what comes before the bin is known
        seconds += (len(self.prompts) + again * part) * self.run_seconds
        least = "more than "
        if run.cost.kind == "measured":
            site = sum(run.cost.heads) * run.heads * settings.probes
            seconds, least = seconds + forwards * run.layers * site, ""
        self.tell(
            f"{forwards} forwards of {run.layers} layers x {run.heads} heads x "
            f"{len(run.keep)} modes: {least}{duration(seconds)}"
        )

    def step(self, what: str) -> None:
        self.tell(what, self.done, self.total)


def duration(seconds: float) -> str:
    """A time for people: "about 40 s", "about 6 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def bins(steps: Sequence[float], n: int) -> tuple[float, ...]:
    """Edges between bins of equally many steps, half-way between two of them, from 1 to 0."""
    n = min(n, len(steps))
    cuts = [round(i * len(steps) / n) for i in range(1, n)]
    inner = [round((steps[c - 1] + steps[c]) / 2, 5) for c in cuts]
    return (1.0, *inner, 0.0)


def _middle(steps: Sequence[float], edges: tuple[float, ...], b: int) -> float:
    """The level of the middle step of a bin; the bin's own middle where it has none."""
    inside = [n for n in steps if bin_of(n, edges) == b]
    return inside[len(inside) // 2] if inside else (edges[b] + edges[b + 1]) / 2


def relative_square(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected|^2 / |expected|^2."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "not enough memory" in str(error) or "out of memory" in str(error).lower()


def damage_name(prompt: int, b: int) -> str:
    return f"damage-{prompt}-{b}.safetensors"


def carried_name(prompt: int, b: int, reference: int) -> str:
    return f"carried-{prompt}-{b}-{reference}.safetensors"


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """Of most of its weights."""
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
