"""The options of `torch.compile(model, backend="fpsattn", options={...})`, validated."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch._inductor
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from fpsc.kernels.rows import CONVENTIONS
from fpsc.kernels.select import check_kernel
from fpsc.policy import Policy


class OptionError(ValueError):
    """An option of the backend is unknown or has a value that cannot be used."""


class Timestep(BaseModel):
    """How the model's timestep is to be read.

    Attributes:
        convention: key of `fpsc.kernels.rows.CONVENTIONS`.
        argument: name of the argument of the model's forward that holds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    convention: str | None = None
    argument: str | None = None

    @field_validator("convention")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in CONVENTIONS:
            raise ValueError(f"expected one of {', '.join(CONVENTIONS)}, found {value!r}")
        return value


class Options(BaseModel):
    """What a user may say to the backend.

    Attributes:
        policy: name of a built-in policy, path of a file, hub id of a repository that holds one, or
            a `Policy`; None picks one for the model.
        component: name of the model in its pipeline (`transformer_2`), for policies that treat the
            transformers of a pipeline differently; None where diffusers loaded it and knows.
        strict: raise instead of warn when a video self-attention is left dense.
        grid: (T, Y, X), where neither graph nor latent shows it.
        timestep: how to read the timestep.
        mode: Inductor's mode, e.g. `reduce-overhead` or `max-autotune`.
        emulate_fp8: on CPU, round as FP8 would (true) or compute FP8 cells in the input's dtype
            (false, faster).
        kernel: `auto`, or the name of the only implementation that may run
            (`fpsc.kernels.select.KERNELS`): where it cannot, that is an error.
        fuse_prologue: whether the op itself does the norms and rotary embeddings in front of a
            site (true), or leaves them to Inductor (false); `auto` where a Triton kernel computes
            the site. Where they are not understood they stay in the graph, and the report says why.
        backward: in what the products of backward are computed in FP8 cells: `bf16`, which stands
            for the input's dtype, or `fp8`, faster and less exact. Where a device has no FP8, as
            without it, and the report says so.
        inductor: options that are passed on to Inductor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    policy: str | Policy | None = None
    component: str | None = None
    strict: bool = False
    grid: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    timestep: Timestep = Timestep()
    mode: (
        Literal["default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
        | None
    ) = None
    emulate_fp8: bool = True
    kernel: str = "auto"
    fuse_prologue: bool | Literal["auto"] = "auto"
    backward: Literal["bf16", "fp8"] = "bf16"
    inductor: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kernel")
    @classmethod
    def _known(cls, value: str) -> str:
        check_kernel(value)
        return value


OURS = tuple(name for name in Options.model_fields if name != "inductor")


def parse(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Options from what `torch.compile` hands over.

    Args:
        mode: the keyword `mode` of `torch.compile`.
        options: the keyword `options`; keys that are not ours must be Inductor's.

    Raises:
        OptionError: unknown key (with the nearest known one), or a value of the wrong kind.
    """
    given = dict(options or {})
    if mode is not None:
        given.setdefault("mode", mode)
    inductor_keys = set(torch._inductor.list_options())
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in OURS:
            ours[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        elif name in inductor_keys:
            inductor[name] = value
        else:
            near = difflib.get_close_matches(name, [*OURS, *inductor_keys], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"option {key!r} is unknown{hint} Options of fpsattn: {', '.join(OURS)}; "
                "all others must be options of Inductor (torch._inductor.list_options())"
            )
    try:
        return Options(**ours, inductor=inductor)
    except ValidationError as error:
        raise OptionError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        lines.append(f"option {name!r}: {problem['msg']}; found {problem['input']!r}")
    return "; ".join(lines)


def inductor_patches(options: Options) -> dict[str, Any]:
    """The configuration of Inductor that the options ask for."""
    patches: dict[str, Any] = {}
    if options.mode is not None and options.mode != "default":
        patches.update(torch._inductor.list_mode_options(options.mode))
    patches.update(options.inductor)
    return patches
