"""What a model's class tells: the convention of its timestep and the preset that suits it.

A class name is never evidence of what is matched in a graph. A model that is not listed here is
matched all the same; its timestep's convention must then be stated, or the densest row of the
policy is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """What models of one kind have in common.

    Attributes:
        convention: key of `fpsc.kernels.rows.CONVENTIONS`.
        policy: name of the built-in policy that is used when the user names none.
    """

    convention: str
    policy: str = "generic"


def _cosmos(model: nn.Module) -> Family:
    """One class serves two conventions, and its config tells them apart.

    Version 1, the one with learnable positions, is given ln(sigma) / 4 by its EDM scheduler;
    versions 2 and 2.5 are given sigma / (1 + sigma), or the sigma of flow matching.
    """
    learnable = getattr(getattr(model, "config", None), "extra_pos_embed_type", None)
    return Family("log-sigma" if learnable == "learnable" else "unit")


FAMILIES: dict[str, Family | Callable[[nn.Module], Family]] = {
    "Wan": Family("flow"),
    "SkyReelsV2": Family("flow"),
    "ChronoEdit": Family("flow"),
    "AnyFlow": Family("flow"),
    "Helios": Family("flow"),
    "HunyuanVideo": Family("flow"),
    "CogVideoX": Family("flow"),
    "ConsisID": Family("flow"),
    "LTXVideo": Family("flow"),
    "LTX2Video": Family("flow"),
    "Mochi": Family("reversed"),
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
"""Families by the beginning of their transformers' class names."""


def family_of(model: nn.Module | None) -> Family | None:
    """The family that a model, or one of its base classes, belongs to."""
    if model is None:
        return None
    for cls in type(model).__mro__:
        for prefix, family in FAMILIES.items():
            if cls.__name__.startswith(prefix):
                return family if isinstance(family, Family) else family(model)
    return None
