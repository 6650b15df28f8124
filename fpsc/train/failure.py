"""A loss that is no number: which clip, which noise, which layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpsc.errors import UserError
from fpsc.train.objective import Noisy
from fpsc.train.sharding import local
from fpsc.train.subject import Subject


class TrainingFailed(UserError):
    """A run that cannot go on, though nothing was wrong with what it was asked for."""


def explain(subject: Subject, noisy: Noisy, step: int) -> str:
    """Why the loss or the gradient of a step is not finite, as far as forwards can tell.

    The model runs again as diffusers made it, with a look at every module's output; and as it is
    compiled, with a look at every block's. All processes must call it.
    """
    return f"step {step}: {_clips(noisy)}: {_cause(subject, noisy)}"


def _clips(noisy: Noisy) -> str:
    return ", ".join(
        f"{key} at noise {level:.4f} (timestep {timestep:g})"
        for key, level, timestep in zip(
            noisy.batch.keys, noisy.level.tolist(), noisy.timestep.tolist(), strict=True
        )
    )


def _cause(subject: Subject, noisy: Noisy) -> str:
    plain = _first_in(subject, noisy, list(subject.model.named_modules()), compiled=False)
    names = {module: name for name, module in subject.model.named_modules()}
    blocks = [(names[block], block) for block in subject.blocks]
    compiled = _first_in(subject, noisy, blocks, compiled=True)
    for key, latents in zip(noisy.batch.keys, noisy.batch.latents, strict=True):
        if not latents.isfinite().all():
            return f"the latents of {key} are not finite; leave that clip out"
    for name, parameter in subject.model.named_parameters():
        if not local(parameter.detach()).isfinite().all():
            return f"the weight {name} is not finite; the model was loaded with it"
    if plain:
        return f"the first layer whose output is not finite is {plain}"
    if compiled:
        return (
            f"the first layer whose output is not finite is {compiled}, as the policy has it; with "
            "dense attention all outputs are finite"
        )
    for name, parameter in subject.parameters.items():
        if parameter.grad is not None and not local(parameter.grad).isfinite().all():
            return f"all outputs are finite; the first gradient that is not is that of {name}"
    return "all outputs and gradients are finite now; the failure does not repeat"


@torch.no_grad()
def _first_in(
    subject: Subject, noisy: Noisy, modules: list[tuple[str, nn.Module]], *, compiled: bool
) -> str | None:
    """The first of some modules whose output is not finite; inner ones come before outer ones."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _floats(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in modules]
    try:
        if compiled:
            subject.predict(noisy)
        else:
            with subject.plain():
                subject.predict(noisy)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [t for value in output.values() for t in _floats(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in _floats(value)]
    return []
