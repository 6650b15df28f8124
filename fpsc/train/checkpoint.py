"""Checkpoints: folders that are whole or not there, of safetensors and JSON and nothing else.

    checkpoints/step-000200/
        weights.safetensors     what is trained, fp32, by name
        average.safetensors     its moving average, where there is one
        optimiser.safetensors   "NAME/STATE" of every tensor of the optimiser's state
        state.json              version, step, seconds, configuration, class of the model

A folder is written under a temporary name, flushed to the disk and renamed. Then the oldest ones
go. Tensors are whole: a run can go on with another number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fpsc.errors import UserError
from fpsc.train.average import Average
from fpsc.train.config import Config, differences
from fpsc.train.processes import Processes
from fpsc.train.sharding import assign, spread_like, whole
from fpsc.train.subject import Subject

VERSION = 1
WEIGHTS, AVERAGE, OPTIMISER = (f"{n}.safetensors" for n in ("weights", "average", "optimiser"))
STATE = "state.json"


@dataclass
class Progress:
    """How far a run is: steps done, and seconds that they took."""

    step: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are.
        keep: how many.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder = folder
        self._keep = keep
        self._processes = processes

    def found(self) -> list[Path]:
        """Whole ones, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / STATE).is_file())

    def save(
        self,
        subject: Subject,
        average: Average,
        optimiser: torch.optim.Optimizer,
        progress: Progress,
    ) -> Path:
        """Write a checkpoint; every process must call it.

        Raises:
            OSError: the disk is full, or cannot be written. The checkpoints before are still there.
        """
        target = self.folder / f"step-{progress.step:06}"
        parts: dict[str, Callable[[], Iterator[tuple[str, Tensor]]]] = {
            WEIGHTS: lambda: iter(subject.parameters.items()),
            AVERAGE: lambda: iter(average.tensors.items()),
            OPTIMISER: lambda: _states(subject.parameters, optimiser),
        }
        with whole_folder(target, self._processes.main) as beside:
            for name, tensors in parts.items():
                # One file at a time: a large model's state is gathered in parts.
                gathered = {key: whole(tensor) for key, tensor in tensors()}
                if self._processes.main and gathered:
                    write_tensors(gathered, beside / name)
            if self._processes.main:
                state = {
                    "fpsc-train-checkpoint": VERSION,
                    "step": progress.step,
                    "seconds": progress.seconds,
                    "model": subject.source.spec.class_name,
                    "config": subject.config.values(),
                }
                write_text(beside / STATE, json.dumps(state, indent=1) + "\n")
        self._processes.wait()
        if self._processes.main:
            for old in self.found()[: -self._keep]:
                shutil.rmtree(old)
        return target

    def tidy(self) -> None:
        """Remove what was being written when a run was killed."""
        if self._processes.main:
            for left in [*self.folder.glob(".*.tmp"), *self.folder.parent.glob(".weights.*.tmp")]:
                shutil.rmtree(left, ignore_errors=True)

    def load(
        self,
        path: Path,
        subject: Subject,
        average: Average,
        optimiser: torch.optim.Optimizer,
    ) -> Progress:
        """Put a run back to where a checkpoint was written.

        Raises:
            UserError: it is of another configuration, model or version, or cannot be read.
        """
        state = self._state(path, subject.config)
        try:
            for name, tensor in _tensors(path / WEIGHTS, subject.parameters):
                assign(subject.parameters[name], tensor)
            if average.tensors:
                for name, tensor in _tensors(path / AVERAGE, average.tensors):
                    assign(average.tensors[name], tensor)
            _load_states(path / OPTIMISER, subject.parameters, optimiser)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read: {error}. Remove that folder to go on from the one before "
                "it"
            ) from error
        return Progress(int(state["step"]), float(state["seconds"]))

    def _state(self, path: Path, config: Config) -> Mapping[str, Any]:
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            version, before = state["fpsc-train-checkpoint"], state["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / STATE} cannot be read: {error!r}") from error
        if version != VERSION:
            raise UserError(f"{path}: expected a checkpoint of version {VERSION}, found {version}")
        changed = differences(before, config)
        if changed:
            raise UserError(
                f"{config.output} holds a run of another configuration. "
                + "; ".join(changed)
                + ". Choose another output, or put them back"
            )
        result: Mapping[str, Any] = state
        return result


def _states(
    parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an optimiser's state, by parameter and kind."""
    for name, parameter in parameters.items():
        for kind, value in optimiser.state[parameter].items():
            yield f"{name}/{kind}", torch.as_tensor(value)


def _load_states(
    path: Path, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> None:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  it is no mapping
            name, kind = key.rsplit("/", 1)
            value, parameter = file.get_tensor(key), parameters[name]
            # The counter of steps stays on the CPU; all else is as the parameter is.
            spread = value if kind == "step" else spread_like(value, parameter)
            optimiser.state[parameter][kind] = spread


def _tensors(path: Path, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name, tensor in expected.items():
            found = file.get_tensor(name)
            if found.shape != tensor.shape:
                raise RuntimeError(
                    f"{name}: expected {list(tensor.shape)}, found {list(found.shape)}"
                )
            yield name, found


@contextmanager
def whole_folder(target: Path, writes: bool = True) -> Iterator[Path]:
    """A folder to write to, beside `target`; at the end it takes the place of `target`, and after
    an error it is gone.

    Args:
        writes: whether this process is the one that does.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if not writes:
        yield beside
        return
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        _flush(beside)
        if target.exists():  # a folder cannot replace one that holds files
            old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
            target.rename(old)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file and flush it.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    except SafetensorError as error:  # the library has one class for all
        raise OSError(None, str(error), str(path)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text and flush it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Names in a folder reach the disk only when the folder does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
