"""A model with random weights and real inputs, on a device: what a benchmark runs."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fpsc.errors import UserError
from fpsc.families import family_of
from fpsc.kernels.rows import CONVENTIONS
from fpsc.models.build import ModelSpec, build

LAYERS = ("num_layers", "num_single_layers")
"""Settings that say how many blocks of a kind a model has."""


def layers_of(config: dict[str, Any]) -> int:
    """Transformer blocks, of all kinds."""
    return sum(int(config.get(name) or 0) for name in LAYERS)


def settings_of(spec: ModelSpec) -> dict[str, Any]:
    """Every setting of a model, defaults too. It is built with one layer: to be asked is cheap.

    Raises:
        UserError: as `build`.
    """
    import diffusers

    model_class: Any = getattr(diffusers, spec.class_name, None)
    parameters = inspect.signature(model_class.__init__).parameters if model_class else {}
    few = {name: 1 for name in LAYERS if name in parameters}
    built: Any = build(replace(spec, config={**spec.config, **few}), torch.float32)
    full = {name: spec.config.get(name, parameters[name].default) for name in few}
    return {**dict(built.config), **full}


def with_layers(spec: ModelSpec, config: dict[str, Any], layers: int) -> ModelSpec:
    """The same model with fewer blocks; where it has two kinds, of each as many as before in
    proportion, and of the first at least one.

    config: all its settings, defaults too.

    Raises:
        UserError: the configuration does not say how many it has, or has fewer.
    """
    kinds = [name for name in LAYERS if config.get(name)]
    full = layers_of(config)
    if not 1 <= layers <= full:
        raise UserError(f"--layers {layers}: expected 1 to {full}, as {spec.class_name} has")
    rest = {name: max(1, round(layers * int(config[name]) / full)) for name in kinds[1:]}
    if sum(rest.values()) >= layers:
        rest = dict.fromkeys(rest, 0)
    counts = {kinds[0]: layers - sum(rest.values()), **rest}
    return replace(spec, config={**spec.config, **counts})


def random_model(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> nn.Module:
    """The model with random weights: no memory but that of its weights is taken.

    Matrices are scaled so that activations keep their size; norms are 1, biases 0. The same seed
    gives the same weights on one kind of device.

    Raises:
        UserError: as `build`.
    """
    from accelerate import init_empty_weights

    build(spec, dtype)  # its errors are the user's
    with init_empty_weights(include_buffers=False):  # buffers are tables, and are not drawn
        import diffusers

        values = {key: value for key, value in spec.config.items() if not key.startswith("_")}
        model: nn.Module = getattr(diffusers, spec.class_name).from_config(values)
    generator = torch.Generator(device).manual_seed(seed)
    in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in list(model.named_parameters()):
        keep = any(part in name.split(".") for part in in_fp32)
        drawn = _drawn(name, parameter, torch.float32 if keep else dtype, device, generator)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(drawn, requires_grad=False))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.eval()


def _drawn(
    name: str,
    like: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    if like.ndim == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        return torch.full(like.shape, value, dtype=dtype, device=device)
    drawn = torch.randn(like.shape, generator=generator, dtype=dtype, device=device)
    return drawn / math.sqrt(like[0].numel())


def sharing(model: nn.Module) -> nn.Module:
    """A copy with modules and parameters of its own, and the same memory for the weights."""
    memo: dict[int, Any] = {id(x): x for x in model.buffers()}
    for x in model.parameters():  # objects of its own: by them fpsc knows a model's layers
        memo[id(x)] = nn.Parameter(x.detach(), requires_grad=x.requires_grad)
    return copy.deepcopy(model, memo)


def timestep_for(model: nn.Module, noise: float) -> float:
    """The timestep that stands for a noise level in [0, 1], in the convention of the model's
    family; counted to 1000 where it is unknown."""
    family = family_of(model)
    inverse = {
        "flow": lambda n: 1000 * n,
        "reversed": lambda n: 1000 * (1 - n),
        "unit": lambda n: n,
        "sigma": lambda n: n / max(1 - n, 1e-3),
        "log-sigma": lambda n: math.log(max(n, 1e-3) / max(1 - n, 1e-3)) / 4,
    }
    assert set(inverse) == set(CONVENTIONS)
    return float(inverse[family.convention if family else "flow"](noise))


def real_inputs(
    model: nn.Module,
    examples: dict[str, Any],
    device: torch.device,
    *,
    noise: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Values for inputs that have only shapes (`fpsc.models.inputs.example_inputs`).

    Latents and text are drawn from a normal distribution, masks let everything through, rotary
    tables are cosines and sines, and the timestep stands for `noise`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: _real(name, value, device, generator, timestep_for(model, noise))
        for name, value in examples.items()
    }


def _real(
    name: str, value: Any, device: torch.device, generator: torch.Generator, timestep: float
) -> Any:
    if isinstance(value, tuple):  # a table of cosines and one of sines
        n, d = value[0].shape
        angles = torch.arange(n, device=device)[:, None] * 1e4 ** (
            -torch.arange(d, device=device).div(2, rounding_mode="floor") * 2 / d
        )
        return angles.cos().to(value[0].dtype), angles.sin().to(value[0].dtype)
    if not isinstance(value, Tensor):
        return value
    if name == "timestep":
        return torch.full(value.shape, timestep, device=device).to(value.dtype)
    if "mask" in name:
        fill = torch.zeros if name == "padding_mask" else torch.ones
        return fill(value.shape, dtype=value.dtype, device=device)
    if name == "guidance":
        return torch.full(value.shape, 6000.0, dtype=value.dtype, device=device)
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    return torch.randn(value.shape, generator=generator, device=device).to(value.dtype)
