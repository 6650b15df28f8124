"""The model that a graph belongs to, found on the Python stack, and what its arguments say.

A backend is given a graph, not a model. But it is called from inside the model's forward, so the
model and the arguments of the running call are on the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fpsc.passes.thread import TIMESTEP


@dataclass
class RunningModule:
    """A module whose forward is on the stack, with the arguments of that call.

    Attributes:
        compiled: whether the graph begins where this call begins, so that what the graph takes are
            the arguments of this call.
        called: whether its hooks ran outside compiled code.
    """

    module: nn.Module
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    compiled: bool = False
    called: bool = False


def running_modules() -> list[RunningModule]:
    """Modules whose forward is running now, outermost first, without wrappers of
    `torch.compile`."""
    found: dict[int, RunningModule] = {}
    for variables, code, traced in _calls(sys._getframe(1)):
        module = variables.get("self")
        if traced and not isinstance(module, nn.Module):
            module = variables.get("module")  # a hook around forward: `new_forward(module, ...)`
        if not isinstance(module, nn.Module) or hasattr(module, "_orig_mod"):
            continue
        known = found.setdefault(id(module), RunningModule(module, None, {}))
        # After a graph break a local variable may be something else than the argument of its name.
        known.compiled |= traced and not code.co_name.startswith(RESUMED)
        known.called |= not traced and code is nn.Module._call_impl.__code__
        args, kwargs = variables.get("args"), variables.get("kwargs")
        if known.args is None and isinstance(args, tuple) and isinstance(kwargs, dict):
            known.args, known.kwargs = args, kwargs
    return list(reversed(found.values()))


RESUMED = "torch_dynamo_resume_in"
"""How the functions are named that Dynamo makes of what follows a graph break."""


def _calls(frame: FrameType | None) -> Iterator[tuple[Mapping[str, Any], CodeType, bool]]:
    """Local variables and code of all calls, innermost first; also of one that is being compiled,
    of which the last value is true."""
    while frame is not None:
        variables = frame.f_locals
        traced: Any = variables.get("frame")  # Dynamo keeps the frame that it converts here
        if hasattr(traced, "f_locals") and hasattr(traced, "f_code"):
            yield traced.f_locals, traced.f_code, True
        yield variables, frame.f_code, False
        frame = frame.f_back


def root_for(running: Sequence[RunningModule]) -> RunningModule | None:
    """The outermost running module that takes a timestep, else the outermost one."""
    for candidate in running:
        if timestep_argument(candidate.module) is not None:
            return candidate
    return running[0] if running else None


def root_holding(weight: Tensor) -> RunningModule | None:
    """The root of the running modules that hold a parameter, or None."""
    running = running_modules()
    return root_for([r for r in running if any(p is weight for p in r.module.parameters())])


def argument_names(module: nn.Module) -> list[str]:
    """Names of the positional arguments of a module's forward, without `self`."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def timestep_argument(module: nn.Module, stated: str | None = None) -> str | None:
    """Name of the argument of a module's forward that holds the timestep, or None."""
    names = argument_names(module)
    if stated is not None:
        return stated if stated in names else None
    return next((name for name in names if TIMESTEP.match(name)), None)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a module's forward, by name."""
    return {**dict(zip(argument_names(module), args, strict=False)), **kwargs}


def latent_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """The video latent among the arguments: the first floating-point tensor with five axes."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim == 5 and value.is_floating_point():
            return value
    return None


def latent_grids(module: nn.Module, shape: torch.Size) -> list[tuple[int, int, int]]:
    """Token grids that a latent of a shape [B, C, T, Y, X] or [B, T, C, Y, X] can have in a model,
    most certain first.

    A 3D convolution that takes the latent's channels says it outright. Else the patch is unknown,
    and every common patch that divides the latent is a candidate.
    """
    _, channels, *size = shape
    grids = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d) and layer.in_channels == channels:
            grid = _convolved(layer, size)
            if grid is not None and grid not in grids:
                grids.append(grid)
    if not grids:
        for axes in ((2, 3, 4), (1, 3, 4)):  # [B, C, T, Y, X], then [B, T, C, Y, X]
            t, y, x = (int(shape[a]) for a in axes)
            for patch_t in (1, 2):
                for patch in (1, 2, 4):
                    if t % patch_t == 0 and y % patch == 0 and x % patch == 0:
                        grids.append((t // patch_t, y // patch, x // patch))
    return grids


def _convolved(layer: nn.Conv3d, size: Sequence[int]) -> tuple[int, int, int] | None:
    if isinstance(layer.padding, str):
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            size, layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return (sizes[0], sizes[1], sizes[2]) if min(sizes) > 0 else None


def owner_of(parameter: Tensor) -> nn.Module | None:
    """The outermost running module that holds a parameter, or None."""
    for candidate in running_modules():
        if any(p is parameter for p in candidate.module.parameters()):
            return candidate.module
    return None
