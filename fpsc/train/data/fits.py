"""Whether clips are what a model takes, before any step is spent on them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fpsc.errors import UserError
from fpsc.models.inputs import TEXT_WIDTHS, patch
from fpsc.train.data.sample import Bucketed, Sample, Source

_PER_STEP = frozenset({"hidden_states", "timestep"})
_OF_THE_SHAPE = frozenset({"num_frames", "height", "width"})


def check_fits(source: Source, model: nn.Module) -> None:
    """Compare one sample of every bucket with a diffusers transformer.

    Raises:
        UserError: the sample's channels, sizes, embeddings or arguments are not those of the model.
    """
    encoded = getattr(source, "encoded", {}).get("transformer")
    name = type(model).__name__
    if encoded not in (None, name):
        raise UserError(
            f"the clips were encoded for {encoded}, the model is {name}. Encode them with the "
            "model's own pipeline: fpsc encode SOURCE OUT --model MODEL"
        )
    buckets = source.buckets if isinstance(source, Bucketed) else []
    for first in [bucket.first for bucket in buckets] or [0]:
        _check(source.sample(first), model)


def _check(sample: Sample, model: nn.Module) -> None:
    config: dict[str, Any] = dict(getattr(model, "config", {}))
    name = type(model).__name__
    parameters = inspect.signature(type(model).forward).parameters
    for argument in sample.conditioning:
        if argument not in parameters:
            raise _unfit(sample, f"{name}.forward takes no {argument}, which the sample has")
    for argument, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        known = {"self", *_PER_STEP, *_OF_THE_SHAPE, *sample.conditioning}
        if needed and argument not in known:
            raise _unfit(sample, f"{name}.forward needs {argument}, which the sample has not")
    if config.get("use_rotary_positional_embeddings") and "image_rotary_emb" in parameters:
        raise UserError(
            f"{name} is given its rotary embeddings by its pipeline (image_rotary_emb), which no "
            "source of clips has. Train it with a loop of your own, which makes them"
        )
    channels, *sizes = sample.latents.shape
    beside = 0 if sample.beside is None else len(sample.beside)
    steps = patch(config)
    packed = steps.tokens if _OF_THE_SHAPE <= parameters.keys() else 1
    if "in_channels" in config and config["in_channels"] != (channels + beside) * packed:
        more = f" and {beside} beside them" if beside else ""
        raise _unfit(
            sample,
            f"expected latents of {config['in_channels']} channels for {name}, found {channels}"
            + more,
        )
    for axis, size, step in zip(
        ("frames", "height", "width"), sizes, (steps.t, steps.y, steps.x), strict=True
    ):
        if size % step:
            raise _unfit(
                sample,
                f"expected latents whose {axis} is a multiple of {step}, the patch of {name}, "
                f"found {size}",
            )
    for argument, keys in (
        ("encoder_hidden_states", TEXT_WIDTHS),
        ("pooled_projections", ("pooled_projection_dim",)),
    ):
        width = next((config[key] for key in keys if config.get(key)), None)
        found = sample.conditioning.get(argument)
        if width is not None and found is not None and found.shape[-1] != width:
            raise _unfit(
                sample,
                f"expected {argument} of width {width} for {name}, found {found.shape[-1]}",
            )


def _unfit(sample: Sample, what: str) -> UserError:
    return UserError(
        f"{sample.key}: {what}. Train the model that the clips were encoded for, or encode them "
        "with this one: fpsc encode SOURCE OUT --model MODEL"
    )
