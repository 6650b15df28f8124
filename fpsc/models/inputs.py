"""Example inputs for a video transformer of diffusers, from its forward's signature and config.

Everything is on the meta device: only shapes and dtypes matter to what Dynamo captures.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fpsc.errors import UserError
from fpsc.grid import TokenGrid

IMAGE_TOKENS = 257  # CLIP ViT-H/14: 16 x 16 patches and the class token


@dataclass(frozen=True)
class Family:
    """How a family of models lays out its latents.

    `frames` and `pixels` are the strides of its VAE: video frames per latent frame after the
    first one, and pixels per latent pixel along height and width.
    """

    prefix: str  # of the class name
    frames: int
    pixels: int
    frames_first: bool = False  # latents are [B, T, C, Y, X] rather than [B, C, T, Y, X]


# Strides: the defaults in diffusers' pipeline of each family (vae_scale_factor_*).
FAMILIES = (
    Family("Wan", 4, 8),
    Family("SkyReelsV2", 4, 8),
    Family("ChronoEdit", 4, 8),
    Family("HunyuanVideo15", 4, 16),
    Family("HunyuanVideo", 4, 8),
    Family("CogVideoX", 4, 8, frames_first=True),
    Family("ConsisID", 4, 8, frames_first=True),
    Family("LTX", 8, 32),
    Family("Mochi", 6, 8),
    Family("Allegro", 4, 8),
)


def family(class_name: str, config: dict[str, Any]) -> Family | None:
    """The family of a class of diffusers, or None for one that is not in the table."""
    found = next((each for each in FAMILIES if class_name.startswith(each.prefix)), None)
    if found is not None and found.prefix == "Wan" and config.get("in_channels") == 48:
        return Family("Wan", 4, 16)  # Wan 2.2 TI2V: the VAE with 48 channels
    return found


def patch(config: dict[str, Any]) -> TokenGrid:
    """Latent pixels per token along (T, Y, X)."""
    size = config.get("patch_size") or 1
    if isinstance(size, int):
        return TokenGrid(config.get("patch_size_t") or 1, size, size)
    return TokenGrid(*size)


def grid_of_video(
    class_name: str, config: dict[str, Any], *, frames: int, height: int, width: int
) -> TokenGrid:
    """The token grid of a clip of `frames` frames of `height` x `width` pixels.

    Raises:
        UserError: the family's VAE is not known, or a size is not a multiple of what it needs.
    """
    known = family(class_name, config)
    if known is None:
        raise UserError(
            f"how {class_name}'s VAE compresses a clip is not known: give --grid T,Y,X in tokens"
        )
    steps = patch(config)
    for name, value, step in (
        ("--height", height, known.pixels * steps.y),
        ("--width", width, known.pixels * steps.x),
    ):
        if value < step or value % step:
            raise UserError(f"{name} {value}: {class_name} takes multiples of {step}")
    if frames < 1 or (frames - 1) % known.frames:
        raise UserError(f"--frames {frames}: {class_name} takes {known.frames} n + 1 frames")
    latent_frames = 1 + (frames - 1) // known.frames
    return TokenGrid(
        -(-latent_frames // steps.t),  # the pipelines pad to whole patches
        height // (known.pixels * steps.y),
        width // (known.pixels * steps.x),
    )


@dataclass(frozen=True)
class _Request:
    """What the rules below read."""

    class_name: str
    config: dict[str, Any]
    accepts: frozenset[str]  # the arguments of forward
    grid: TokenGrid
    batch: int
    text_tokens: int
    dtype: torch.dtype

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def ints(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def width(self, *keys: str) -> int:
        """The first of these settings that the configuration has."""
        for key in keys:
            if self.config.get(key):
                return int(self.config[key])
        raise UserError(f"{self.class_name}: none of {', '.join(keys)} is in the configuration")

    @property
    def packed(self) -> bool:
        """Whether the latents arrive as tokens [B, N, C], with their grid as arguments."""
        return {"num_frames", "height", "width"} <= self.accepts

    def latent(self, channels: int) -> torch.Tensor:
        steps, grid = patch(self.config), self.grid
        t, y, x = grid.t * steps.t, grid.y * steps.y, grid.x * steps.x
        if self.packed:
            return self.floats(self.batch, t * y * x, channels)
        known = family(self.class_name, self.config)
        if known is not None and known.frames_first:
            return self.floats(self.batch, t, channels, y, x)
        return self.floats(self.batch, channels, t, y, x)


TEXT_WIDTHS = (
    "text_dim",
    "text_embed_dim",
    "caption_channels",
    "joint_attention_dim",
    "cross_attention_dim",
)
"""Settings that name the width of a text embedding; the first one that a model has."""


def _text(r: _Request) -> torch.Tensor:
    return r.floats(r.batch, r.text_tokens, r.width(*TEXT_WIDTHS))


def _image_tokens(r: _Request) -> torch.Tensor | None:
    width = r.config.get("image_dim")
    return r.floats(r.batch, IMAGE_TOKENS, width) if width else None


def _guidance(r: _Request) -> torch.Tensor | None:
    return r.floats(r.batch) if r.config.get("guidance_embeds") else None


def _rotary(r: _Request) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not r.config.get("use_rotary_positional_embeddings"):
        return None
    shape = (r.grid.tokens, int(r.config["attention_head_dim"]))
    table = torch.empty(shape, dtype=torch.float32, device="meta")
    return table, table.clone()


def _padding_mask(r: _Request) -> torch.Tensor | None:
    if not r.config.get("concat_padding_mask"):
        return None
    steps = patch(r.config)
    return r.floats(1, 1, r.grid.y * steps.y, r.grid.x * steps.x)


# Argument of forward -> its example; None leaves the argument out.
_RULES: dict[str, Callable[[_Request], Any]] = {
    "hidden_states": lambda r: r.latent(r.width("in_channels")),
    "control_hidden_states": lambda r: r.latent(r.width("vace_in_channels")),
    "timestep": lambda r: r.ints(r.batch),
    "encoder_hidden_states": _text,
    "encoder_hidden_states_image": _image_tokens,
    "encoder_attention_mask": lambda r: r.ints(r.batch, r.text_tokens),
    "pooled_projections": lambda r: r.floats(r.batch, r.width("pooled_projection_dim")),
    "guidance": _guidance,
    "image_rotary_emb": _rotary,
    "padding_mask": _padding_mask,
    "num_frames": lambda r: r.grid.t if r.packed else None,
    "height": lambda r: r.grid.y if r.packed else None,
    "width": lambda r: r.grid.x if r.packed else None,
    "return_dict": lambda r: False,
}


def example_inputs(
    model: torch.nn.Module,
    *,
    grid: TokenGrid,
    batch: int,
    text_tokens: int | None,
    dtype: torch.dtype,
    given: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `model.forward`, on the meta device.

    `text_tokens` of None is the length that the configuration names, else 512. `given` holds the
    user's own values; they replace the rules.

    Raises:
        UserError: forward needs an argument that no rule covers, or has no such argument.
    """
    given = given or {}
    parameters = inspect.signature(type(model).forward).parameters
    accepts = frozenset(parameters) - {"self"}
    name = type(model).__name__
    if unknown := sorted(set(given) - accepts):
        raise UserError(
            f"--input {unknown[0]}: {name}.forward has no such argument; it takes "
            + ", ".join(sorted(accepts))
        )
    config = dict(getattr(model, "config", {}))
    if text_tokens is None:
        text_tokens = config.get("max_text_seq_length") or config.get("max_sequence_length") or 512
    request = _Request(name, config, accepts, grid, batch, text_tokens, dtype)
    inputs: dict[str, Any] = {}
    for argument in parameters:
        if argument in given:
            inputs[argument] = given[argument]
        elif argument in _RULES and (value := _RULES[argument](request)) is not None:
            inputs[argument] = value
        elif argument != "self" and parameters[argument].default is inspect.Parameter.empty:
            raise UserError(
                f"no example is known for the argument {argument!r} of {name}.forward: give one "
                f"with --input {argument}=SHAPE[:DTYPE], as in --input {argument}=1x77x768:float32"
            )
    return inputs


def parse_input(text: str) -> tuple[str, torch.Tensor | int | float]:
    """Read `NAME=SHAPE[:DTYPE]` (as 1x77x768:float32) or `NAME=NUMBER`.

    Raises:
        UserError: the text is neither.
    """
    name, equals, value = text.partition("=")
    shape, _, dtype_name = value.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        if not (name.isidentifier() and equals and isinstance(dtype, torch.dtype)):
            raise ValueError
        if not dtype_name and "x" not in shape:
            return name, float(value) if "." in value else int(value)
        sizes = [int(size) for size in shape.split("x")]
        if min(sizes) < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--input {text}: expected NAME=SHAPE[:DTYPE], as x=1x77x768:float32, or NAME=NUMBER"
        ) from None
    return name, torch.empty(sizes, dtype=dtype, device="meta")
