"""The recipe of the demo's weights.

    python -m fpsc.demo.train --out DIR

Flow matching on clips that are drawn as they are needed; short clips first, the full grid last.
Every random number is a function of (seed, step), so a run that is stopped and started again goes
on exactly where it was. Runs on two CPU cores; no GPU is used.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fpsc.demo.clips import clip, encode_prompt
from fpsc.demo.model import (
    TRAIN_TIMESTEPS,
    build_model,
    encode_clip,
    load_model,
    save_model,
    with_places,
)
from fpsc.train.memory import keep_memory

# Seeds of clips: training counts up from 0, validation from here.
HELD_OUT = 2**31
WORKERS = 2


@dataclass(frozen=True)
class Stage:
    """`steps` steps on batches of `batch` clips of `frames` frames.

    `shift` moves the noise levels towards 1. Learning rates go from the first to the second factor
    of `lr` in a straight line. With `places` the model is told where each pixel is. `levels` is the
    distribution of noise before the shift; "uniform" is that of the sampler's steps.
    """

    frames: int
    batch: int
    steps: int
    shift: float = 3.0
    lr: tuple[float, float] = (1.0, 1.0)
    places: bool = False
    levels: Literal["logit-normal", "uniform"] = "logit-normal"


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters. The defaults are those of the shipped weights.

    Short clips teach colours, textures and outlines at a seventh of the cost; the long ones teach
    motion. The last stages train at high noise, where the sampler decides what goes where. At
    shift 3 only one clip in seven is noisier than 0.9, and shapes came out torn; at shift 6 they
    were whole, but one clip in fifty is noisier than 0.98, and they did not move as told.

    Matrices of the blocks are trained by Muon, everything else by AdamW; both learning rates rise
    over the first `warmup` steps.
    """

    stages: tuple[Stage, ...] = (
        Stage(4, 8, 1200),
        Stage(8, 4, 300),
        Stage(16, 2, 100),
        Stage(16, 2, 2000, lr=(1.0, 1 / 6)),
        Stage(16, 2, 1200, shift=6.0, lr=(0.8, 0.8 * 7 / 13)),
        Stage(16, 2, 900, shift=6.0, lr=(0.8, 0.8 * 17 / 26), places=True),
        Stage(16, 2, 500, 6.0, (0.8, 0.8 * 17 / 22), places=True, levels="uniform"),
        Stage(16, 2, 700, 6.0, (0.8 * 17 / 22, 0.0), places=True, levels="uniform"),
    )
    heads: int = 3
    head_dim: int = 64
    layers: int = 6
    ffn_dim: int = 512
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.995
    no_prompt: float = 0.1
    sigma_floor: float = 0.1
    clip_gradient: float = 1.0
    validation_clips: int = 8
    validation_sigmas: tuple[float, ...] = (0.98, 0.9, 0.75, 0.5, 0.25, 0.1)
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> tuple[Stage, int]:
        """The stage that `step` belongs to, and how many of its steps lie before."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError(f"step is past the end of the recipe ({self.steps} steps)")

    def first_clip(self, step: int) -> int:
        """How many clips the steps before `step` have used."""
        used = 0
        for stage in self.stages:
            here = min(step, stage.steps)
            used, step = used + here * stage.batch, step - here
        return used

    def lr_scale(self, step: int) -> float:
        """Factor on both learning rates."""
        stage, done = self.stage(step)
        first, last = stage.lr
        return min(1.0, (step + 1) / self.warmup) * (first + (last - first) * done / stage.steps)


class MatmulAttention:
    """Attention as two matrix products, for training on CPU.

    In bfloat16 the CPU's flash attention takes 2.3 times as long as this, forward and backward, on
    2,048 tokens. It needs O(N^2) memory, which at this size is small.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        q_BHND, k_BHND, v_BHND = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        score = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHND.transpose(-1, -2)
        # Softmax in the dtype of the scores: autocast would copy the N x N matrix to float32.
        with torch.autocast("cpu", enabled=False):
            weight = score.softmax(-1)
        out = (weight @ v_BHND).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Batch:
    """clean, noise: float32 [B, 3, F, H, W]; text: float32 [B, tokens, dim]; sigma: float32 [B].

    `places` is whether the model is told where each pixel is.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    text: torch.Tensor
    sigma: torch.Tensor
    places: bool = True

    @property
    def noisy(self) -> torch.Tensor:
        """(1 - sigma) clean + sigma noise: the straight path of flow matching."""
        sigma = self.sigma[:, None, None, None, None]
        return torch.lerp(self.clean, self.noise, sigma)

    def part(self, index: int, parts: int) -> Batch:
        """The index-th of `parts` equal parts; the batch must divide by `parts`."""
        clean, noise, text, sigma = (
            x.chunk(parts)[index] for x in (self.clean, self.noise, self.text, self.sigma)
        )
        return Batch(clean, noise, text, sigma, self.places)


def training_batch(recipe: Recipe, step: int) -> Batch:
    """The batch of a step: the same whenever and wherever it is asked for."""
    stage, _ = recipe.stage(step)
    rng = np.random.RandomState((recipe.seed * 1_000_003 + step) % 2**32)
    first = recipe.first_clip(step)
    drawn = [clip(first + i, stage.frames) for i in range(stage.batch)]
    text = [
        encode_prompt(None if rng.uniform() < recipe.no_prompt else scene) for _, scene in drawn
    ]
    clean = encode_clip(torch.stack([picture for picture, _ in drawn]))
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape)).astype(np.float32))
    if stage.levels == "logit-normal":
        # Esser et al. 2024, "Scaling Rectified Flow Transformers".
        level = 1 / (1 + np.exp(-rng.standard_normal(stage.batch)))
    else:  # one in each of `batch` equal parts of (0, 1)
        level = (np.arange(stage.batch) + rng.uniform(size=stage.batch)) / stage.batch
    sigma = torch.from_numpy(level.astype(np.float32))
    sigma = stage.shift * sigma / (1 + (stage.shift - 1) * sigma)
    return Batch(clean, noise, torch.stack(text), sigma, stage.places)


def losses(model: Callable[..., Any], batch: Batch, sigma_floor: float) -> torch.Tensor:
    """Mean squared error of the velocity that each prediction implies.

    The (compiled) model predicts the clean latent x0; velocity = (noisy - x0) / sigma, so the error
    of x0 counts 1 / sigma^2, with sigma no smaller than `sigma_floor`.

    Returns:
        float32 [B].
    """
    latent = with_places(batch.noisy, batch.places)
    out = model(latent, batch.sigma * TRAIN_TIMESTEPS, batch.text, return_dict=False)[0]
    error = (out.float() - batch.clean).square().mean((1, 2, 3, 4))
    return error / batch.sigma.clamp(min=sigma_floor).square()


@torch.no_grad()
def validation_loss(
    model: Callable[..., Any],
    clips: int,
    sigmas: Sequence[float],
    sigma_floor: float,
) -> list[list[float]]:
    """Losses on held-out clips with fixed noise, on the full grid: one row a clip, one a sigma."""
    table = []
    for index in range(clips):
        picture, scene = clip(HELD_OUT + index)
        rng = np.random.RandomState(HELD_OUT + index)
        noise = torch.from_numpy(rng.standard_normal(tuple(picture.shape)).astype(np.float32))
        row = []
        for sigma in sigmas:
            batch = Batch(
                encode_clip(picture)[None],
                noise[None],
                encode_prompt(scene)[None],
                torch.tensor([sigma]),
            )
            row.append(losses(model, batch, sigma_floor).item())
        table.append(row)
    return table


class Trainer:
    """The state of a run: weights, their moving average, optimisers and the step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        shape = {"heads": recipe.heads, "head_dim": recipe.head_dim}
        self.model = build_model(**shape, layers=recipe.layers, ffn_dim=recipe.ffn_dim)
        self.model.set_attn_processor(MatmulAttention())
        self.average = build_model(**shape, layers=recipe.layers, ffn_dim=recipe.ffn_dim)
        self.average.load_state_dict(self.model.state_dict())
        self.average.requires_grad_(False)
        named = list(self.model.named_parameters())
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
        others = [p for name, p in named if p.ndim != 2 or not name.startswith("blocks.")]
        self.optimisers: list[torch.optim.Optimizer] = [
            # RMS-matched updates (Liu et al. 2025, "Muon is Scalable for LLM Training").
            torch.optim.Muon(
                matrices,
                lr=recipe.muon_lr,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = 0

    def train_step(self, pool: ThreadPoolExecutor) -> float:
        """One optimiser step; returns the loss of its batch.

        The batch is cut in two and each half runs on one core: one meeting a step, where two
        threads inside each operator would meet a thousand times.
        """
        batch = training_batch(self.recipe, self.step)
        halves = list(pool.map(lambda i: self._gradients(batch.part(i, WORKERS)), range(WORKERS)))
        for index, parameter in enumerate(self.parameters):
            parameter.grad = sum(grads[index] for _, grads in halves) / WORKERS
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_gradient)
        scale = self.recipe.lr_scale(self.step)
        rates = (self.recipe.muon_lr, self.recipe.adam_lr)
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.step()
        self.step += 1
        decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
        averaged = list(self.average.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in self.parameters], 1 - decay)
        return sum(loss for loss, _ in halves) / WORKERS

    def _gradients(self, batch: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = losses(self.model, batch, self.recipe.sigma_floor).mean()
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def save(self, path: Path) -> None:
        """Write the whole state under a temporary name, then rename: never half a checkpoint."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

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
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def train(
    recipe: Recipe,
    out: Path,
    *,
    save_every: int = 200,
    stop_at: int | None = None,
    show: bool = True,
) -> Path | None:
    """Run a recipe, from its last checkpoint in `out` where there is one.

    Writes `out/checkpoint.pt` and `out/log.jsonl` as it goes; at the end `out/weights/`, a
    diffusers folder with `validation.json` in it.

    Args:
        stop_at: leave after this step, as if interrupted just after a checkpoint.

    Returns:
        The weights folder, or None if it stopped before the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    keep_memory()
    torch.set_num_threads(1)  # of the optimisers; the workers have a thread each
    checkpoint = out / "checkpoint.pt"
    trainer = Trainer(recipe)
    if checkpoint.is_file():
        trainer.load(checkpoint)
    end = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    recent: list[float] = []
    began = time.monotonic()
    with (
        ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not show,
        ) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step)
        while trainer.step < end:
            recent.append(trainer.train_step(pool))
            stage, _ = recipe.stage(trainer.step - 1)
            if trainer.step % 50 == 0:
                line = {
                    "step": trainer.step,
                    "frames": stage.frames,
                    "loss": round(sum(recent) / len(recent), 5),
                    "seconds": round(time.monotonic() - began, 1),
                }
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                progress.update(task, description=f"{stage.frames} frames, loss {line['loss']:.4f}")
                recent.clear()
            if trainer.step % save_every == 0 or trainer.step == end:
                trainer.save(checkpoint)
            progress.update(task, completed=trainer.step)
    if trainer.step < recipe.steps:
        return None
    return finish(trainer, out)


def finish(trainer: Trainer, out: Path) -> Path:
    """Write the averaged weights as a diffusers folder, and their validation loss beside them."""
    recipe = trainer.recipe
    folder = out / "weights"
    save_model(trainer.average, folder)
    # Of the weights as they are stored, so that anyone who loads them can repeat it.
    table = validation_loss(
        load_model(folder), recipe.validation_clips, recipe.validation_sigmas, recipe.sigma_floor
    )
    report = {
        "command": "python -m fpsc.demo.train --out DIR",
        "validation_loss": float(np.mean(table)),
        "validation_table": table,
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
        },
    }
    temporary = folder / f"validation.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, folder / "validation.json")
    return folder


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and weights.")],
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
) -> None:
    """Train the demo's weights; start the same command again to go on after a stop."""
    folder = train(Recipe(), out, save_every=save_every)
    assert folder is not None
    report = json.loads((folder / "validation.json").read_text())
    typer.echo(f"{folder}: validation loss {report['validation_loss']:.5f}")


if __name__ == "__main__":
    typer.run(main)
