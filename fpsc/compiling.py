"""`fpsc.compile`: one call for every video transformer, also those that need more than a backend.

It does two things that `torch.compile(model, backend="fpsattn")` cannot. Some models decide on
numbers that are on the device (lengths of text), where Dynamo by default breaks the graph; the
settings that keep it whole are in force while this model is called, and for no other. And it
compiles the blocks of a model instead of the whole, also where the model does not list them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fpsc import runtime
from fpsc.backend import fpsattn
from fpsc.policy import Policy
from fpsc.unseen import FLAGS, takes_video, warn_unseen

Model = TypeVar("Model", bound=nn.Module)


def compile(  # as torch calls it
    model: Model,
    *,
    policy: str | os.PathLike[str] | Policy | None = None,
    blocks: bool = False,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile a video transformer in place with this backend, as `model.compile()` does.

    Args:
        model: any module; of a diffusers pipeline its `transformer`.
        policy: a built-in name, the path of a file or a `Policy`; if None the one beside the
            weights, or the preset of the model's family.
        blocks: compile the repeated blocks of the model, each once for all, instead of the whole;
            compiles faster.
        fullgraph: an error where the graph breaks.
        dynamic, mode: as for `torch.compile`.
        options: of the backend (`fpsc.options.Options`) and of Inductor.

    Returns: the model itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `blocks`, and the model has no list of blocks of one class.
    """
    _check_module(model)
    given = {**(options or {})}
    if policy is not None:
        given["policy"] = policy
    if mode is not None:
        given["mode"] = mode
    targets = repeated_blocks(model) if blocks else [model]
    if not targets:
        raise ValueError(
            f"blocks: expected a ModuleList of two or more blocks of one class in "
            f"{type(model).__name__}, found none; compile the whole model (blocks=False)"
        )
    for target in targets:
        compiled = torch.compile(
            target._call_impl, backend=fpsattn, fullgraph=fullgraph, dynamic=dynamic, options=given
        )
        # What `nn.Module.compile` sets, and what calling the module looks for.
        target._compiled_call_impl = _flagged(compiled, None if blocks else target)
    return model


def compile_forwards(modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
    """Compile the `forward` of modules in place, and leave their hooks outside of what is compiled.

    For hooks that cannot be traced, as those with which FSDP2 gathers parameters. `del
    module.forward` takes it back.

    Args:
        options: as for `compile`.
    """
    for module in modules:
        compiled = torch.compile(module.forward, backend=fpsattn, options={**options})
        module.forward = _flagged(compiled, None)  # type: ignore[method-assign]


def _check_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    hint = " Compile its transformer: fpsc.compile(pipe.transformer)"
    raise TypeError(
        f"model: expected a torch.nn.Module, found {type(model).__name__}."
        + (hint if hasattr(model, "transformer") else "")
    )


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in order: those that diffusers lists in `_repeated_blocks`,
    else the members of every outermost list of two or more modules of one class."""
    names = getattr(model, "_repeated_blocks", None) or ()
    listed = [module for module in model.modules() if type(module).__name__ in names]
    return listed or _members(model)


def _members(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList) else []
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        found += members if alike else _members(child)
    return found


def _flagged(compiled: Callable[..., Any], whole: nn.Module | None) -> Callable[..., Any]:
    """`compiled` with Dynamo's settings in force while it is called, which is when it compiles.

    Args:
        whole: the model, where all of it is compiled: its first call must show its attention.
    """
    unchecked = whole is not None

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal unchecked
        if torch.compiler.is_compiling():  # a part of something larger that is compiled
            return compiled(*args, **kwargs)
        with torch._dynamo.config.patch(**FLAGS):
            outputs = compiled(*args, **kwargs)
        if unchecked and whole is not None:
            unchecked = False
            state = runtime.state_of_root(whole)
            if state is not None and takes_video(whole, args, kwargs):
                warn_unseen(state, flagged=True)
        return outputs

    return call
