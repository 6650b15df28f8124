"""One run of the experiment: train, validate, sample, score. Whatever is done already is not done
again, so a run that was killed goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.tuning.record import Distance, Losses, Record, Samples, SettingsError, rounded
from bench.tuning.trainer import train
from bench.tuning.v_scale import v_scale
from bench.tuning.variants import DENSE, NOTHING, VARIANTS, Run, Scale
from fpsc.bench.environment import environment
from fpsc.bench.record import rounded as digits
from fpsc.demo.model import load_model
from fpsc.demo.train import Recipe, validation_loss
from fpsc.evaluate.distance import kernel_distance
from fpsc.evaluate.network import load_judge, read
from fpsc.evaluate.sampling import ClipSet
from fpsc.files import replacing
from fpsc.policy import Policy
from fpsc.quality.metrics import psnr, ssim

Tell = Callable[[str, int, int], None]
"""Called with (what is going on, how much of it is done, how much there is)."""

Model = Callable[..., tuple[Tensor, ...]]


@dataclass
class Clock:
    """Seconds of the parts of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - began, 1)


def carry_out(run: Run, scale: Scale, work: Path, tell: Tell) -> Record:
    """Do what is missing of a run.

    Args:
        work: the folder of checkpoints, weights and clips, one for all runs.

    Raises:
        SettingsError: `work` holds this run, or one that it needs, with other settings.
        ValueError: one scale for V on a GPU, where this experiment cannot have it.
    """
    variant, folder, clock = run.variant, work / run.name, Clock()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if variant.v_scale != "channel" and device.type != "cpu":
        raise ValueError(f"{run.name}: one scale for V is only on CPU; found {device}")
    start = None if scale.model == "demo" else Path(scale.model)
    dense = [Run(VARIANTS[DENSE], seed) for seed in scale.seeds]
    for each in dense if run.variant.name == DENSE else (run, *dense):
        claim(each, scale, work)

    undrawn = [each for each in dense if _set(each, scale).missing(work / each.name / "clips")]
    if undrawn:  # what every variant is compared with
        with clock.part("dense clips"):
            model = compiled(load_model(start), NOTHING, device)
            for each in undrawn:
                _draw(each, scale, model, work, tell)
    with v_scale(variant.v_scale):
        training, weights = None, start
        if variant.train is not None:
            training, weights = train(run, scale, folder / "training", tell)
        model = compiled(load_model(weights), variant.run, device)
        plain = model
        if variant.run != NOTHING:
            plain = compiled(load_model(weights), NOTHING, device)
        with clock.part("losses"):
            losses = _losses(run, scale, plain, model, tell)
        with clock.part("clips"):
            _draw(run, scale, model, work, tell)
    with clock.part("scores"):
        samples = _samples(run, scale, work, tell)
    return Record(
        name=run.name,
        variant=variant.name,
        seed=run.seed,
        settings=run.settings(scale),
        training=training,
        losses=losses,
        samples=samples,
        seconds=clock.seconds,
        environment=environment(device),
    )


def claim(run: Run, scale: Scale, work: Path) -> None:
    """Write down what a run's folder is for.

    Raises:
        SettingsError: it is for something else.
    """
    path = work / run.name / "settings.json"
    text = json.dumps(run.settings(scale), indent=1) + "\n"
    if not path.is_file():
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise SettingsError(
            f"{path.parent} was begun with other settings, which {path} lists; delete the folder "
            "to start this run afresh, or choose another --work"
        )


def compiled(model: nn.Module, policy: dict[str, Any], device: torch.device) -> Model:
    """A model as it runs under a policy: dense by Inductor alone, else by this backend.

    Takes and returns tensors on the CPU, wherever it computes.
    """
    if policy == NOTHING:
        fast = torch.compile(model.to(device))
    else:
        options = {"policy": Policy.from_dict(policy), "strict": True}
        fast = torch.compile(model.to(device), backend="fpsattn", options=options)

    def forward(
        latent: Tensor, timestep: Tensor, text: Tensor, **arguments: Any
    ) -> tuple[Tensor, ...]:
        # Samplers count timesteps in int64, the loss in float32: one type is one compile.
        inputs = (each.to(device) for each in (latent, timestep.float(), text))
        return tuple(tensor.cpu() for tensor in fast(*inputs, **arguments))

    return forward


def _set(run: Run, scale: Scale) -> ClipSet:
    return ClipSet(run.seed, scale.clips, scale.steps)


def _draw(run: Run, scale: Scale, model: Model, work: Path, tell: Tell) -> None:
    sets = _set(run, scale)
    sets.draw(
        model, work / run.name / "clips", lambda done: tell(f"{run.name}: clips", done, sets.clips)
    )


def _losses(run: Run, scale: Scale, dense: Model, as_run: Model, tell: Tell) -> Losses:
    def table(model: Model, done: int) -> tuple[tuple[float, ...], ...]:
        tell(f"{run.name}: losses", done, 2)
        floor = Recipe().sigma_floor
        return rounded(validation_loss(model, scale.validation_clips, scale.noise, floor))

    first = table(dense, 0)
    second = first if as_run is dense else table(as_run, 1)
    tell(f"{run.name}: losses", 2, 2)
    return Losses(noise=scale.noise, dense=first, as_run=second)


def _samples(run: Run, scale: Scale, work: Path, tell: Tell) -> Samples:
    sets, judge = _set(run, scale), load_judge()
    folders = {seed: work / Run(VARIANTS[DENSE], seed).name / "clips" for seed in scale.seeds}
    tell(f"{run.name}: scores", 0, 1 + len(folders))
    seen = read(judge, sets.read(work / run.name / "clips"))
    distances = {}
    for done, (seed, folder) in enumerate(folders.items(), 1):
        tell(f"{run.name}: scores", done, 1 + len(folders))
        if seed != run.seed:
            others = read(judge, sets.read(folder))
            found = kernel_distance(seen.features, others.features)
            distances[seed] = Distance(value=digits(found.value), error=digits(found.error))
    pairs = zip(sets.read(work / run.name / "clips"), sets.read(folders[run.seed]), strict=True)
    alike = [(psnr(a, b), ssim(a, b)) for a, b in pairs]
    tell(f"{run.name}: scores", 1 + len(folders), 1 + len(folders))
    return Samples(
        clips=sets.clips,
        steps=sets.steps,
        psnr=tuple(None if math.isinf(decibel) else round(decibel, 3) for decibel, _ in alike),
        ssim=tuple(round(each, 5) for _, each in alike),
        distances=distances,
        accuracy={name: digits(value) for name, value in seen.accuracy(sets.scenes).items()},
    )
