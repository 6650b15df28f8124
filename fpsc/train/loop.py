"""A run: steps, validations and checkpoints, from wherever it was stopped to its end."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import fpsc
from fpsc.cli.version import installed
from fpsc.errors import UserError
from fpsc.files import replacing
from fpsc.kernels.select import fp8_support
from fpsc.report import NothingReplacedWarning
from fpsc.train import objective as objectives
from fpsc.train.average import Average
from fpsc.train.checkpoint import Checkpoints, Progress
from fpsc.train.config import Config
from fpsc.train.data import Batch, open_source, order, prefetched
from fpsc.train.data.fits import check_fits
from fpsc.train.distil import Teacher, attention_distance
from fpsc.train.export import export
from fpsc.train.failure import TrainingFailed, explain
from fpsc.train.log import Log
from fpsc.train.memory import keep_memory
from fpsc.train.objective import Noisy
from fpsc.train.processes import Processes
from fpsc.train.ramp import Ramp, trains
from fpsc.train.samples import Samples
from fpsc.train.sharding import whole
from fpsc.train.subject import Subject
from fpsc.train.validation import Validator

RESULT_VERSION = 1

OnStep = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""


@dataclass(frozen=True)
class Result:
    """What a run left: its weights and `result.json`, as plain values."""

    weights: Path
    file: Path
    values: dict[str, Any]


def train(
    config: Config,
    *,
    on_step: OnStep = lambda what, done, total: None,
    stop_at: int | None = None,
) -> Result | None:
    """Run a configuration, from its last checkpoint where there is one.

    Args:
        stop_at: leave after this step, as if killed there.

    Returns:
        None where it was left before its end, and in all processes but the first.

    Raises:
        UserError: something in the configuration, the model or the clips cannot be used, or the
            disk is full.
        TrainingFailed: a loss or a gradient is not finite.
    """
    trainer = None
    try:
        trainer = Trainer(config, on_step)
        return trainer.run(stop_at)
    except OSError as error:
        last = trainer.checkpoints.found()[-1:] if trainer else []
        kept = f"; {last[0]} is whole, and the run goes on from it" if last else ""
        where = error.filename or config.output
        raise UserError(f"{where}: {error.strerror or error}{kept}") from error
    finally:
        if trainer is not None:
            trainer.close()


class Trainer:
    """Everything that a run is made of; `run` runs it."""

    def __init__(self, config: Config, on_step: OnStep = lambda *_: None) -> None:
        keep_memory()
        self._began = time.monotonic()
        self.config = config
        self.processes = Processes()
        self._on_step = on_step
        self._log: Log | None = None
        spec = config.spec
        self._size = self._clips_in_a_forward()
        self._source = open_source(spec.data, held_out=False, base=config.folder)
        self._order = order(self._source, spec.seed)
        self.policy = config.policy()
        self.subject = Subject(config, self.processes)
        held_out = open_source(spec.data, held_out=True, base=config.folder)
        for source in (self._source, held_out):
            check_fits(source, self.subject.model)
        self.objective = objectives.build(
            config, self.subject.convention, self.subject.source.scheduler
        )
        first = self._order.batch(0, 0, self.processes.count, self._size)
        draw = self.objective.draw(first.latents, 0, 0, spec.optimiser.batch)
        noisy = self.objective.noisy(first, draw).to(self.processes.device)
        self.ramp = self._ramp(noisy)
        self.teacher = self._teacher(noisy)
        self._ready(noisy)
        self.average = Average(self.subject.parameters, spec.ema)
        self.optimiser = torch.optim.AdamW(
            list(self.subject.parameters.values()),
            lr=spec.optimiser.lr,
            betas=(spec.optimiser.betas[0], spec.optimiser.betas[1]),
            weight_decay=spec.optimiser.weight_decay,
        )
        folder = config.output / "checkpoints"
        self.checkpoints = Checkpoints(folder, spec.checkpoints.keep, self.processes)
        self._validator = Validator(
            spec.validation,
            held_out,
            self.objective,
            self.processes,
            self._size,
        )
        self._samples = Samples(config, self.subject, self.processes)
        self.progress = Progress()
        self._stage: tuple[int, bool] | None = None  # of the ramp, that the model has now

    # ---- to make it ready

    def _clips_in_a_forward(self) -> int:
        optimiser = self.config.spec.optimiser
        parts = optimiser.accumulate * self.processes.count
        if optimiser.batch % parts:
            raise self.config.error(
                ("optimiser", "batch"),
                f"{optimiser.batch} clips in a step do not divide into {optimiser.accumulate} "
                f"parts of {self.processes.count} processes",
            )
        return optimiser.batch // parts

    def _ramp(self, noisy: Noisy) -> Ramp:
        grid = self.subject.grid(noisy.latents)
        if not trains(self.policy, grid):
            raise self.config.error(
                ("policy",),
                f"{self.policy.name} is dense in the input's dtype at every noise level, so there "
                "is nothing to train for; choose one with a sparse or fp8 mode",
            )
        tokens = math.prod(grid)
        if tokens < self.policy.limits.min_tokens:
            raise self.config.error(
                ("policy",),
                f"{self.policy.name} leaves videos of less than {self.policy.limits.min_tokens} "
                f"tokens dense (limits.min_tokens), and the clips have {tokens}",
            )
        return Ramp(self.policy, self.config.spec.ramp, grid, baseline=self.config.spec.baseline)

    def _teacher(self, noisy: Noisy) -> Teacher | None:
        distil = self.config.spec.distil
        if not (distil.output or distil.attention):
            return None
        return Teacher(self.subject, attention=bool(distil.attention), noisy=noisy)

    def _ready(self, noisy: Noisy) -> None:
        """Compile and spread the model, and run it once: it is then known what is replaced."""
        before = len(fpsc.reports())
        # A refiner of text is a block too. `check` says it where something is missing.
        warnings.filterwarnings("ignore", category=NothingReplacedWarning)
        self.subject.compile(self.ramp.target, noisy.latents)
        self.subject.spread()
        mesh = self.processes.mesh()
        if self.teacher is not None and mesh is not None:
            self.teacher.spread(mesh)
        self._on_step("compiling", 0, self.config.spec.optimiser.steps)
        with torch.no_grad():
            self.subject.predict(noisy)
        self.subject.check(fpsc.reports()[before:])

    # ---- to run

    def run(self, stop_at: int | None = None) -> Result | None:
        """From the last checkpoint to the end, or to `stop_at`. See `train`."""
        spec, processes = self.config.spec, self.processes
        steps = spec.optimiser.steps
        end = steps if stop_at is None else min(stop_at, steps)
        self.checkpoints.tidy()
        found = self.checkpoints.found()
        processes.wait()
        if found:
            self.progress = self.checkpoints.load(
                found[-1], self.subject, self.average, self.optimiser
            )
        if processes.main:
            self._log = Log(self.config.output, self.progress.step, tensorboard=spec.tensorboard)
            self._write_config()
        self._began -= self.progress.seconds
        if self.progress.step == 0:
            self._validate()
        with closing(self._batches()) as batches:
            while self.progress.step < end:
                line = self._step(batches)
                self.progress.step += 1
                self.progress.seconds = time.monotonic() - self._began
                step = self.progress.step
                self._note({"step": step, **line, "seconds": round(self.progress.seconds, 2)})
                self._on_step(f"loss {line['loss']:.4f}", step, steps)
                if step % spec.validation.every == 0 or step == steps:
                    self._validate()
                if step % spec.checkpoints.every == 0 or step == steps:
                    self.progress.seconds = time.monotonic() - self._began
                    self.checkpoints.save(self.subject, self.average, self.optimiser, self.progress)
        return self._finish() if self.progress.step >= steps else None

    def _batches(self) -> Generator[Batch, None, None]:
        parts = self.config.spec.optimiser.accumulate
        return prefetched(
            self._order,
            self.progress.step * parts,
            rank=self.processes.rank,
            ranks=self.processes.count,
            size=self._size,
        )

    def _step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimiser step. Returns what the log says of it."""
        spec, step = self.config.spec, self.progress.step
        parts = spec.optimiser.accumulate
        self._lead(step)
        torch.manual_seed(spec.seed * 1_000_003 + step)  # of dropout, where a model has any
        total: dict[str, Tensor] = {}
        for part in range(parts):
            noisy = self._noisy(next(batches), step, part)
            losses = self._losses(noisy)
            self._backward(losses["loss"] / parts, last=part == parts - 1)
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach() / parts
        parameters = list(self.subject.parameters.values())
        total_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(whole(total_norm))
        numbers = {name: float(self.processes.mean(loss)) for name, loss in total.items()}
        if not (math.isfinite(numbers["loss"]) and math.isfinite(norm)):
            raise TrainingFailed(self._failure(noisy, step, numbers["loss"], norm))
        clip_grads_with_norm_(parameters, spec.optimiser.clip, total_norm)
        rate = self._rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(step + 1)
        return {
            **numbers,
            "gradient": norm,
            "lr": rate,
            "keep": round(self.ramp.keep_at(step), 4),
            "fp8": self.ramp.fp8_at(step),
        }

    def _lead(self, step: int) -> None:
        """Give the model the policy of a step, where another one ran last."""
        stage = self.ramp.stage(step)
        if stage != self._stage:
            self.subject.set_policy(self.ramp.at(step))
            self._stage = stage

    def _noisy(self, batch: Batch, step: int, part: int) -> Noisy:
        of = self.config.spec.optimiser.batch
        first = (part * self.processes.count + self.processes.rank) * self._size
        draw = self.objective.draw(batch.latents, step, first, of)
        return self.objective.noisy(batch, draw).to(self.processes.device)

    def _losses(self, noisy: Noisy) -> dict[str, Tensor]:
        """Means over the clips: `loss`, and where there is a teacher what it consists of."""
        distil = self.config.spec.distil
        if self.teacher is None:
            return {"loss": self.objective.losses(self.subject.predict(noisy), noisy).mean()}
        told, attended = self.teacher.answer(noisy)
        predicted = self.subject.predict(noisy)
        parts = {"data": self.objective.losses(predicted, noisy).mean()}
        loss = parts["data"]
        if distil.output:
            distances = self.objective.distances(predicted, told, noisy.level)
            parts["output"] = distances.mean()
            loss = loss + distil.output * parts["output"]
        if distil.attention:
            parts["attention"] = attention_distance(self.teacher.tapped(), attended).mean()
            loss = loss + distil.attention * parts["attention"]
        return {"loss": loss, **parts}

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; they are averaged over processes with the last part of a step."""
        if self.processes.count > 1:
            self.subject.model.set_requires_gradient_sync(last)
        loss.backward()

    def _rate(self, step: int) -> float:
        """The learning rate of a step: it rises, holds, and falls where it is to."""
        spec = self.config.spec.optimiser
        rise = min(1.0, (step + 1) / max(spec.warmup, 1))
        passed = min(max((step - spec.warmup) / max(spec.steps - spec.warmup, 1), 0.0), 1.0)
        fall = {
            "none": 1.0,
            "linear": 1 - passed,
            "cosine": 0.5 * (1 + math.cos(math.pi * passed)),
        }[spec.decay]
        return spec.lr * rise * fall

    def _failure(self, noisy: Noisy, step: int, loss: float, norm: float) -> str:
        what = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        )
        last = self.checkpoints.found()[-1:]
        kept = f"{last[0]} is the last good checkpoint" if last else "there is no checkpoint yet"
        return (
            f"{what} at {explain(self.subject, noisy, step)}. {kept}; nothing of this step was "
            "kept. A lower optimiser.lr, a longer warmup or precision: fp32 may help"
        )

    # ---- what it tells

    def _validate(self) -> None:
        """Losses and clips of the averaged weights, dense and sparse."""
        step = self.progress.step
        self._on_step("validating", step, self.config.spec.optimiser.steps)
        with self.average.applied():
            found = self._validator.measure(self.subject, self.ramp.dense, self.ramp.target)
            self._samples.write(step, self.ramp.dense, self.ramp.target)
        self._stage = None
        self._note({"step": step, "validation": {"step": step, **found.as_dict()}})

    def _note(self, line: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.add(line)

    def _write_config(self) -> None:
        with replacing(self.config.output / "config.yaml") as beside:
            beside.write_text(self.config.document.text, encoding="utf-8")

    def _finish(self) -> Result | None:
        """Write the averaged weights, their policy, and the result."""
        weights = self.config.output / "weights"
        with self.average.applied():
            export(self.subject, self.policy, weights, self.processes)
        if self._log is None:
            return None
        validations = self._log.validations()
        values = {
            "fpsc-train-result": RESULT_VERSION,
            "config": self.config.values(),
            "policy": self.policy.document.text,
            "versions": installed(),
            "processes": self.processes.count,
            "device": str(self.processes.device),
            "fp8": fp8_support(self.processes.device)[1] or "runs",
            "steps": self.progress.step,
            "seconds": round(time.monotonic() - self._began, 1),
            "before": validations[0],
            "after": validations[-1],
            "validations": validations,
        }
        file = self.config.output / "result.json"
        with replacing(file) as beside:
            beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return Result(weights, file, values)

    def close(self) -> None:
        """Close the log, and what belongs to the processes."""
        if self._log is not None:
            self._log.close()
        self.processes.leave()
