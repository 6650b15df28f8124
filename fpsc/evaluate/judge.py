"""The recipe of the judge's weights.

    python -m fpsc.evaluate.judge --out DIR

Clips are drawn as they are needed, each once. Every random number is a function of (seed, step), so
a run that is stopped and started again goes on exactly where it was. On two CPU cores: one draws
the next batch while the other computes, and no GPU is used.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from fpsc.demo.clips import clip, random_scene
from fpsc.evaluate.network import NAME, Judge, answers_of, load_judge, read, save_judge
from fpsc.files import replacing

# Seeds of clips, away from those that the demo's model was trained and validated on.
TRAINING, HELD_OUT = 2**30, 3 * 2**30


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters. The defaults are those of the shipped weights.

    A third of the clips is blurred and a third gets noise, both up to the given strength, so that
    clips that a model drew, which are never as sharp, are read as well as these.
    """

    steps: int = 2500
    batch: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.02
    blur: float = 1.5  # pixels, standard deviation
    noise: float = 0.15  # of RGB in [-1, 1], standard deviation
    held_out: int = 512
    seed: int = 0


def training_batch(recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, wherever it is asked for: [B, 3, F, H, W] and int64 [B, questions]."""
    rng = np.random.RandomState((recipe.seed * 1_000_003 + step) % 2**32)
    clips, answers = [], []
    for index in range(recipe.batch):
        picture, scene = clip(TRAINING + step * recipe.batch + index)
        clips.append(_worn(picture, recipe, rng))
        answers.append(answers_of(scene))
    return torch.stack(clips), torch.stack(answers)


def _worn(picture: Tensor, recipe: Recipe, rng: np.random.RandomState) -> Tensor:
    kind, strength = rng.randint(3), rng.uniform()
    if kind == 1:
        return _blurred(picture, strength * recipe.blur)
    if kind == 2:
        noise = rng.standard_normal(tuple(picture.shape)).astype(np.float32)
        return picture + strength * recipe.noise * torch.from_numpy(noise)
    return picture


def _blurred(picture_CFHW: Tensor, sigma: float) -> Tensor:
    """Every frame under a Gaussian of this standard deviation, its edges repeated."""
    offset = torch.arange(-4.0, 5.0)
    gauss = torch.exp(-offset.square() / (2 * max(sigma, 0.1) ** 2))
    gauss /= gauss.sum()
    frames = F.pad(picture_CFHW.flatten(0, 1)[:, None], (4, 4, 4, 4), mode="replicate")
    columns, rows = gauss[None, None, :, None], gauss[None, None, None, :]
    return F.conv2d(F.conv2d(frames, columns), rows).view_as(picture_CFHW)


class Trainer:
    """The state of a run: weights, optimiser, schedule and the step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.judge = Judge()
        self.optimiser = torch.optim.AdamW(
            self.judge.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, recipe.lr, total_steps=recipe.steps, pct_start=0.2
        )
        self.step = 0

    def train_step(self, clips: Tensor, answers: Tensor) -> float:
        """One optimiser step; returns the mean cross entropy of the questions."""
        self.judge.train()
        logits = self.judge(clips)
        loss = torch.stack(
            [F.cross_entropy(each, answers[:, index]) for index, each in enumerate(logits)]
        ).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the whole state, whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "judge": self.judge.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with replacing(path) as beside:
            torch.save(state, beside)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the checkpoint is of another recipe.
        """
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"{path} was written with another recipe: expected {asdict(self.recipe)}, "
                f"found {state['recipe']}. Choose another --out, or delete it to start afresh"
            )
        self.step = state["step"]
        self.judge.load_state_dict(state["judge"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def train(
    recipe: Recipe,
    out: Path,
    *,
    save_every: int = 50,
    stop_at: int | None = None,
    show: bool = True,
) -> Path | None:
    """Run a recipe, from its last checkpoint in `out` where there is one.

    Writes `out/checkpoint.pt` as it goes; at the end `out/judge.safetensors`, and `out/judge.json`
    with what it gets right of clips that it has not seen.

    Args:
        stop_at: leave after this step, as if interrupted just after a checkpoint.

    Returns:
        The weights, or None if it stopped before the end.
    """
    torch.set_num_threads(1)  # the other core draws
    trainer, checkpoint = Trainer(recipe), out / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.load(checkpoint)
    end = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not show
    ) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step)
        for clips, answers in _ahead(recipe, trainer.step, end):
            loss = trainer.train_step(clips, answers)
            if trainer.step % save_every == 0 or trainer.step == end:
                trainer.save(checkpoint)
            progress.update(task, description=f"loss {loss:.4f}", completed=trainer.step)
    if trainer.step < recipe.steps:
        return None
    save_judge(trainer.judge, out / NAME)
    with replacing(out / "judge.json") as beside:
        beside.write_text(json.dumps(_report(recipe, out / NAME), indent=1) + "\n")
    return out / NAME


def _ahead(recipe: Recipe, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of steps first..end, each drawn while the one before it is used."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = pool.submit(training_batch, recipe, first) if first < end else None
        for step in range(first, end):
            assert waiting is not None
            batch = waiting.result()
            waiting = pool.submit(training_batch, recipe, step + 1) if step + 1 < end else None
            yield batch


def held_out_accuracy(judge: Judge, clips: int) -> dict[str, float]:
    """How often a judge is right on clips that it has not seen, by question."""
    seeds = range(HELD_OUT, HELD_OUT + clips)
    reading = read(judge, (clip(seed)[0] for seed in seeds))
    return reading.accuracy(random_scene(np.random.RandomState(seed)) for seed in seeds)


def _report(recipe: Recipe, weights: Path) -> dict[str, Any]:
    # Of the weights as they are stored, so that anyone who loads them can repeat it.
    accuracy = held_out_accuracy(load_judge(weights), recipe.held_out)
    return {
        "command": "python -m fpsc.evaluate.judge --out DIR",
        "held_out_clips": recipe.held_out,
        "accuracy": float(np.mean(list(accuracy.values()))),
        "by_question": accuracy,
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, weights and report.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the judge; start the same command again to go on after a stop."""
    weights = train(Recipe(), out)
    assert weights is not None
    report = json.loads(weights.with_suffix(".json").read_text())
    if json_:
        typer.echo(json.dumps(report, indent=1))
    else:
        typer.echo(f"{weights}: {report['accuracy']:.2%} of {report['held_out_clips']} x 9 answers")


if __name__ == "__main__":
    typer.run(main)
