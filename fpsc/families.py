"""What a model's class tells: the convention of its timestep and the preset that suits it.

A class name is never evidence of what is matched in a graph. A model that is not listed here is
matched all the same; its timestep's convention must then be stated, or the densest row of the
policy is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Family:
    """What models of one kind have in common.

    Attributes:
        convention: key of `fpsc.kernels.rows.CONVENTIONS`.
        policy: name of the built-in policy that is used when the user names none. It is for
            original weights: whether others were trained for it cannot be seen.
        by_heads: other built-in policies, for models of that many attention heads.
    """

    convention: str
    policy: str = "generic"
    by_heads: Mapping[int, str] = field(default_factory=dict)

    def policy_for(self, model: nn.Module | None) -> str:
        """Name of the built-in policy for a model of this family."""
        config = getattr(model, "config", None)
        return self.by_heads.get(getattr(config, "num_attention_heads", 0), self.policy)


FAMILIES: dict[str, Family] = {
    # 12 heads: 1.3B; 24: Wan2.2 TI2V-5B. Wan2.2 A14B has the sizes of Wan2.1 14B, whose preset
    # keeps more steps dense in its sampling than its own would.
    "Wan": Family("flow", "wan-2.1-14b", {12: "wan-2.1-1.3b", 24: "wan-2.2"}),
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
    "Kandinsky5": Family("flow"),
    "Kandinsky6": Family("flow"),
    "MotifVideo": Family("flow"),
    "JoyImageEdit": Family("flow"),
}
"""Families by the beginning of their transformers' class names; the first that fits.

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
