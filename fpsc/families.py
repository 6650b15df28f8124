"""What a model's class tells: the convention of its timestep and the preset that suits it.

A class name is never evidence of what is matched in a graph. A model that is not listed here is
matched all the same; its timestep's convention must then be stated, or the densest row of the
policy is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fpsc.policy.lookup import origin_of


@dataclass(frozen=True)
class Family:
    """What models of one kind have in common.

    Attributes:
        convention: key of `fpsc.kernels.rows.CONVENTIONS`.
        policy: name of the built-in policy that is used when the user names none. It is for
            original weights: whether others were trained for it cannot be seen.
    """

    convention: str
    policy: str = "generic"


def _wan(model: nn.Module) -> Family:
    """Wan2.1 1.3B has 12 heads, Wan2.2 TI2V-5B 24. Wan2.2 A14B has the sizes of Wan2.1 14B; what it
    was loaded from tells them apart."""
    if "wan2.2" in (origin_of(model) or "").lower():
        return Family("flow", "wan-2.2")
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return Family("flow", {12: "wan-2.1-1.3b", 24: "wan-2.2"}.get(heads or 0, "wan-2.1-14b"))


def _cosmos(model: nn.Module) -> Family:
    """One class serves two conventions, and its config tells them apart.

    Version 1, the one with learnable positions, is given ln(sigma) / 4 by its EDM scheduler;
    versions 2 and 2.5 are given sigma / (1 + sigma), or the sigma of flow matching.
    """
    learnable = getattr(getattr(model, "config", None), "extra_pos_embed_type", None)
    return Family("log-sigma" if learnable == "learnable" else "unit")


FAMILIES: dict[str, Family | Callable[[nn.Module], Family]] = {
    "Wan": _wan,
    "SkyReelsV2": Family("flow"),
    "ChronoEdit": Family("flow"),
    "AnyFlow": Family("flow"),
    "Helios": Family("flow"),
    "HunyuanVideo15": Family("flow"),
    "HunyuanVideoFramepack": Family("flow"),
    "HunyuanVideo": Family("flow", "hunyuan-video"),
    "CogVideoX": Family("flow", "cogvideox"),
    "ConsisID": Family("flow", "cogvideox"),  # finetuned from CogVideoX-5B
    "LTXVideo": Family("flow", "ltx-video"),
    "LTX2Video": Family("flow"),
    "Mochi": Family("reversed", "mochi"),
    "Allegro": Family("flow"),
    "EasyAnimate": Family("flow"),
    "Latte": Family("flow"),
    "SanaVideo": Family("flow"),
    "SanaWM": Family("flow"),
    "CosmosTransformer": _cosmos,
    "Cosmos3": Family("flow"),
    "Kandinsky5": Family("flow"),
    "Kandinsky6": Family("flow"),
    "MotifVideo": Family("flow"),
    "JoyImageEdit": Family("flow"),
}
"""Families by the beginning of their transformers' class names; the first that fits."""


def family_of(model: nn.Module | None) -> Family | None:
    """The family that a model, or one of its base classes, belongs to."""
    if model is None:
        return None
    for cls in type(model).__mro__:
        for prefix, family in FAMILIES.items():
            if cls.__name__.startswith(prefix):
                return family if isinstance(family, Family) else family(model)
    return None
