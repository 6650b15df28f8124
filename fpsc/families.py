"""What a model's class tells: the convention of its timestep and the preset that suits it.

A class name is never evidence of what is matched in a graph. A model that is not listed here is
matched all the same; its timestep's convention must then be stated, or the densest row of the
policy is used.
"""

from __future__ import annotations

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


FAMILIES: dict[str, Family] = {
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
    "Kandinsky5": Family("flow"),
    "Kandinsky6": Family("flow"),
    "MotifVideo": Family("flow"),
    "JoyImageEdit": Family("flow"),
}
"""Families by the beginning of their transformers' class names.

Cosmos is not among them: one class is given ln(sigma) / 4 in version 1 (`log-sigma`) and a level
from 0 to 1 in version 2 (`unit`).
"""


def family_of(model: nn.Module | None) -> Family | None:
    """The family that a model, or one of its base classes, belongs to."""
    for cls in type(model).__mro__ if model is not None else ():
        for prefix, family in FAMILIES.items():
            if cls.__name__.startswith(prefix):
                return family
    return None
