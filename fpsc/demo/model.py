"""The demo's model: diffusers' own Wan transformer, small, over a fixed linear codec.

The model predicts the clean latent ("sample" prediction). A small network learns flat colours and
sharp edges far sooner that way than when it must also carry the noise through to its output
(Li and He, "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720). UniPC
takes such predictions as they are.

Wan's positions are rotations of queries and keys, so only distances between tokens are known to
it. Where a shape must be at the start to move right is learned sooner with the place as an input:
twelve channels beside the latent, as Wan's image-to-video models take their first frame.
"""

from __future__ import annotations

import importlib.resources
import math
from functools import cache
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from fpsc.demo.clips import FRAMES, HEIGHT, TEXT_DIM, WIDTH

PATCH = (2, 4, 4)
GRID = (FRAMES // PATCH[0], HEIGHT // PATCH[1], WIDTH // PATCH[2])  # 8 x 16 x 16 = 2,048 tokens
TRAIN_TIMESTEPS = 1000
FLOW_SHIFT = 6.0

LATENT_CHANNELS, PLACE_CHANNELS = 3, 12

# Mean and standard deviation of the clips' RGB in [-1, 1], all channels together.
CODEC_MEAN, CODEC_STD = -0.16, 0.33


def encode_clip(rgb: torch.Tensor) -> torch.Tensor:
    """RGB in [-1, 1] to latents of mean 0 and standard deviation 1; any shape."""
    return (rgb - CODEC_MEAN) / CODEC_STD


def decode_clip(latent: torch.Tensor) -> torch.Tensor:
    """Latents to RGB in [-1, 1], clamped; any shape."""
    return (latent * CODEC_STD + CODEC_MEAN).clamp(-1, 1)


@cache
def places(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Where each pixel of a clip is: float32 [1, PLACE_CHANNELS, frames, height, width].

    For u from -1 to 1 along each axis: sin and cos of pi u / 2 and of pi u.
    """
    axes = torch.meshgrid(
        *(torch.linspace(-1, 1, n) for n in (frames, height, width)), indexing="ij"
    )
    waves = [
        wave(math.pi * u * turn)
        for u in axes
        for turn in (0.5, 1)
        for wave in (torch.sin, torch.cos)
    ]
    return torch.stack(waves)[None]


def with_places(latent: torch.Tensor, told: bool = True) -> torch.Tensor:
    """The model's input for latents [B, 3, F, H, W]: [B, 15, F, H, W], zeros where not `told`."""
    place = places(*latent.shape[2:]).expand(len(latent), -1, -1, -1, -1)
    return torch.cat([latent, place if told else torch.zeros_like(place)], dim=1)


def build_model(
    *, heads: int = 3, head_dim: int = 64, layers: int = 6, ffn_dim: int = 512
) -> WanTransformer3DModel:
    """A Wan transformer with fresh weights; the defaults are the shipped one (3.3 M parameters).

    The output layer starts at zero, so that the first prediction is the mean clip, and so do the
    weights of the places.
    """
    config = {
        "patch_size": PATCH,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 256,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "rope_max_seq_len": 64,
    }
    start = WanTransformer3DModel(**config, in_channels=LATENT_CHANNELS)
    torch.nn.init.zeros_(start.proj_out.weight)
    torch.nn.init.zeros_(start.proj_out.bias)
    state = start.state_dict()
    weight = state["patch_embedding.weight"]
    extra = weight.new_zeros(weight.shape[0], PLACE_CHANNELS, *weight.shape[2:])
    state["patch_embedding.weight"] = torch.cat([weight, extra], dim=1)
    model = WanTransformer3DModel(**config, in_channels=LATENT_CHANNELS + PLACE_CHANNELS)
    model.load_state_dict(state)
    return model


def shipped_weights() -> Path:
    """The folder of the weights that come with the package."""
    return Path(str(importlib.resources.files("fpsc.demo"))) / "weights"


def tuned_weights() -> Path | None:
    """The folder of the weights that were tuned jointly with the policy beside them, if they come
    with the package."""
    folder = shipped_weights().with_name("tuned")
    return folder if (folder / "config.json").is_file() else None


def load_model(
    folder: Path | None = None, dtype: torch.dtype = torch.float32
) -> WanTransformer3DModel:
    """Load a diffusers folder (default: the shipped weights) for inference, on CPU.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
    """
    folder = folder or shipped_weights()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}; expected a diffusers folder. "
            "Train one with `python -m fpsc.demo.train --out DIR`"
        )
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def save_model(model: WanTransformer3DModel, folder: Path) -> None:
    """Write a diffusers folder, weights in bfloat16 safetensors."""
    stored = type(model).from_config(model.config)
    stored.load_state_dict(model.state_dict())
    for parameter in stored.parameters():  # all of them; `stored.to` would warn of the norms
        parameter.data = parameter.data.bfloat16()
    stored.save_pretrained(folder, safe_serialization=True)


def build_scheduler() -> UniPCMultistepScheduler:
    """The sampler: UniPC on flow sigmas, which takes sample predictions."""
    return UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type="sample",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
    )
