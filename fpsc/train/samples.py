"""Clips at validation: dense, and as the policy says, from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.quality.pictures import write_gif
from fpsc.train.config import Config
from fpsc.train.processes import Processes
from fpsc.train.subject import Subject

Sampler = Callable[[str], Tensor]
"""From a prompt to a clip, float [3, F, H, W] in [-1, 1]."""


class Samples:
    """The clips of a run.

    Raises:
        UserError: there are prompts, and nothing to sample with, or one is not a prompt.
    """

    def __init__(self, config: Config, subject: Subject, processes: Processes) -> None:
        self._spec = config.spec.samples
        self._subject = subject
        self._processes = processes
        self._folder = config.output / "clips"
        self._sampler = self._for(config) if self._spec.prompts else None

    def _for(self, config: Config) -> Sampler:
        device = self._processes.device
        if config.spec.model == "demo":
            return _demo(config, self._subject, device)
        if self._subject.source.pipeline is None:
            raise config.error(
                ("samples", "prompts"),
                "there is nothing to sample with: expected the local folder of a whole pipeline as "
                "model, or no prompts, and then no clips are written",
            )
        return _pipeline(config, self._subject, self._subject.source.pipeline, device)

    def write(self, step: int, dense: Policy, sparse: Policy) -> list[Path]:
        """Write a moving picture for each prompt; the model is left with the sparse policy."""
        if self._sampler is None:
            return []
        files = []
        for number, prompt in enumerate(self._spec.prompts):
            clips = {}
            for name, policy in (("dense", dense), ("sparse", sparse)):
                self._subject.set_policy(policy)
                with torch.no_grad(), self._subject.autocast():
                    clips[name] = self._sampler(prompt).float().cpu()
            path = self._folder / f"step-{step:06}" / f"{number}.gif"
            if self._processes.main:
                write_gif(clips, path, prompt)
            files.append(path)
        return files


def _demo(config: Config, subject: Subject, device: torch.device) -> Sampler:
    from fpsc.demo.clips import PromptError, encode_prompt, parse_prompt
    from fpsc.demo.run import sample, start_noise

    for number, prompt in enumerate(config.spec.samples.prompts):
        try:
            parse_prompt(prompt)
        except PromptError as error:
            raise config.error(("samples", "prompts", number), str(error)) from None
    noise = start_noise(config.spec.seed)

    def model(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
        """The scheduler stays on the CPU."""
        moved = (tensor.to(device) for tensor in inputs)
        return (subject.model(*moved, return_dict=return_dict)[0].float().cpu(),)

    def draw(prompt: str) -> Tensor:
        text = encode_prompt(parse_prompt(prompt))
        return sample(model, text, noise, config.spec.samples.steps)

    return draw


def _pipeline(config: Config, subject: Subject, folder: Path, device: torch.device) -> Sampler:
    from diffusers import DiffusionPipeline

    spec = config.spec.samples
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, transformer=subject.model, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: this pipeline cannot be loaded to sample: {reason}") from error
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = ("num_frames", "height", "width")
    size = dict(zip(names, spec.size, strict=True)) if spec.size else {}

    def draw(prompt: str) -> Tensor:
        frames = pipeline(
            prompt=prompt,
            num_inference_steps=spec.steps,
            generator=torch.Generator().manual_seed(config.spec.seed),
            output_type="pt",
            **size,
        ).frames[0]
        return frames.transpose(0, 1) * 2 - 1  # from [F, 3, H, W] in [0, 1]

    return draw
