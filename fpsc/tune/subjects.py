"""What is tuned: a model, and something that calls it as it is called to make a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpsc.errors import UserError
from fpsc.policy.lookup import hub_id_of

DEMO_SEEDS = 3 * 2**30
"""Clips and noise of the demo's prompts count up from here: training and its validation stay
below."""


@dataclass(frozen=True)
class Subject:
    """A model and the prompts that it is measured on.

    Attributes:
        name: for people.
        model: the video transformer, as it is: not compiled.
        prompts: how many there are.
        sample: the result of a prompt (its final latents), made by calling `model` with noise from
            high to low. The same whenever it is called.
        decode: a result as a clip, float [3, F, H, W] in [-1, 1]; None where it is not known how.
        options: of the backend, where the model alone does not say enough: `grid`, `timestep`.
        about: how its prompts are sampled, as plain values: a calibration goes on only where
            they are the same.
    """

    name: str
    model: nn.Module
    prompts: int
    sample: Callable[[int], Tensor]
    decode: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The hub id that policies are for, "" for a model of one's own."""
        return hub_id_of(self.model) or ""


def demo(seed: int = 0, steps: int = 20) -> Subject:
    """The model that ships, on sentences of its language.

    seed: prompts of different seeds differ, and so does their noise.
    """
    from fpsc.demo.clips import encode_prompt, random_scene
    from fpsc.demo.model import build_scheduler, decode_clip, load_model, with_places
    from fpsc.demo.run import start_noise

    model = load_model()

    @torch.no_grad()
    def sample(prompt: int) -> Tensor:
        number = DEMO_SEEDS + 10_000 * seed + prompt
        text = encode_prompt(random_scene(np.random.RandomState(number)))[None]
        latent = start_noise(number)
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            clean = model(with_places(latent), timestep[None], text, return_dict=False)[0]
            latent = scheduler.step(clean, timestep, latent, return_dict=False)[0]
        return latent[0]

    return Subject("demo", model, 10_000, sample, decode_clip, about={"seed": seed, "steps": steps})


def pipeline(
    pipe: Any,
    prompts: Sequence[str],
    arguments: Mapping[str, Any] | None = None,
    *,
    component: str = "transformer",
    seed: int = 0,
    name: str | None = None,
) -> Subject:
    """A pipeline of diffusers, on the user's prompts.

    Args:
        pipe: a video pipeline.
        prompts: one clip each.
        arguments: of its call (num_frames, height, num_inference_steps, guidance_scale ...).
        component: the transformer that is tuned.
        seed: of the noise, drawn on the CPU; every prompt has noise of its own.

    Raises:
        UserError: it has no such transformer.
    """
    model = pipe.components.get(component)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{type(pipe).__name__}: expected a transformer {component!r}, found "
            + ", ".join(pipe.components)
        )
    pipe.set_progress_bar_config(disable=True)

    def sample(prompt: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed * 10_000 + prompt)
        given = {"output_type": "latent", **(arguments or {})}
        with torch.no_grad():
            made = pipe(prompt=prompts[prompt], generator=generator, **given)
        found: Tensor = made.frames if hasattr(made, "frames") else made[0]
        return found.float().cpu()

    about = {"prompts": list(prompts), "seed": seed, "component": component, **(arguments or {})}
    return Subject(name or type(pipe).__name__, model, len(prompts), sample, about=about)


def latents(
    model: nn.Module,
    samples: Sequence[Mapping[str, Tensor]],
    *,
    levels: int = 10,
    shift: float = 3.0,
    seed: int = 0,
    name: str | None = None,
) -> Subject:
    """A transformer without its pipeline, on given clips and conditioning.

    The result of a sample is the model's predictions at `levels` noise levels, on the straight path
    between the latents and noise that flow matching takes.

    Args:
        samples: arguments of the model's forward by name, with a batch dimension; `latents` are the
            clean ones, which with noise become the first argument.
        shift: of the levels: s n / (1 + (s - 1) n) for n from 1 down to 1 / levels.
    """
    from fpsc import roots
    from fpsc.models.materialise import timestep_for
    from fpsc.tune.instrument import prediction_of

    first, *_ = roots.argument_names(model)
    when = roots.timestep_argument(model)
    if when is None:
        raise UserError(f"{type(model).__name__}: its forward takes no timestep")
    even = [1 - i / levels for i in range(levels)]
    noises = [shift * n / (1 + (shift - 1) * n) for n in even]
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    @torch.no_grad()
    def sample(number: int) -> Tensor:
        given = {n: x.to(device) for n, x in samples[number].items()}
        given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}
        clean = given.pop("latents")
        generator = torch.Generator("cpu").manual_seed(seed * 10_000 + number)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        found = []
        for level in noises:
            timestep = torch.full((len(clean),), timestep_for(model, level), device=device)
            named = {first: torch.lerp(clean, noise, level), when: timestep, **given}
            found.append(prediction_of(model(**named)).float().cpu())
        return torch.stack(found)

    about = {"samples": len(samples), "levels": levels, "shift": shift, "seed": seed}
    return Subject(name or type(model).__name__, model, len(samples), sample, about=about)


def read_samples(folder: Path) -> list[dict[str, Tensor]]:
    """The samples of a folder: one safetensors file each, in the order of their names.

    Raises:
        UserError: there is none, or one cannot be read or has no `latents`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: expected safetensors files with latents, found none")
    found = []
    for file in files:
        try:
            tensors = dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from error
        if "latents" not in tensors or tensors["latents"].ndim != 5:
            raise UserError(
                f"{file}: expected a tensor `latents` of 5 dimensions (a batch of one clip), found "
                + (", ".join(f"{n} {list(x.shape)}" for n, x in tensors.items()) or "nothing")
            )
        found.append(tensors)
    return found
