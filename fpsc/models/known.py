"""Published models by name: the configuration of their transformers, and the clips they are for.

The configurations are those that diffusers' repositories of the models hold; what is not listed is
the class's default. The names are those of the policies made for them (`fpsc.policy.models`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fpsc.errors import UserError
from fpsc.models.build import ModelSpec


class Clip(NamedTuple):
    """A video: its frames and its size in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    Attributes:
        title: for people.
        spec: its class and configuration.
        clips: by the name of the resolution, what it is usually asked for.
    """

    title: str
    spec: ModelSpec
    clips: Mapping[str, Clip]


def _known(title: str, name: str, clips: Mapping[str, Clip], **config: Any) -> KnownModel:
    return KnownModel(title, ModelSpec(name, config, title), clips)


_WAN = {"480p": Clip(81, 480, 832), "720p": Clip(81, 720, 1280)}

KNOWN: dict[str, KnownModel] = {
    "wan-2.1-1.3b": _known(
        "Wan2.1-T2V-1.3B",
        "WanTransformer3DModel",
        _WAN,
        num_attention_heads=12,
        num_layers=30,
        ffn_dim=8960,
    ),
    "wan-2.1-14b": _known("Wan2.1-T2V-14B", "WanTransformer3DModel", _WAN),
    "hunyuan-video": _known(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {"480p": Clip(129, 480, 832), "720p": Clip(129, 720, 1280)},
    ),
    "cogvideox": _known(
        "CogVideoX-5B",
        "CogVideoXTransformer3DModel",
        {"480p": Clip(49, 480, 720), "720p": Clip(49, 720, 1280)},
        num_attention_heads=48,
        num_layers=42,
        use_rotary_positional_embeddings=True,
    ),
    "ltx-video": _known(  # its VAE takes multiples of 32 pixels
        "LTX-Video 2B",
        "LTXVideoTransformer3DModel",
        {"480p": Clip(161, 480, 832), "720p": Clip(161, 704, 1280)},
    ),
    "mochi": _known(
        "Mochi 1",
        "MochiTransformer3DModel",
        {"480p": Clip(163, 480, 848), "720p": Clip(163, 720, 1280)},
    ),
}


def known(name: str) -> KnownModel:
    """A published model by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"model {name}: not one of {', '.join(KNOWN)}{hint} For your own, name a folder with "
        "config.json or a class of diffusers"
    )
