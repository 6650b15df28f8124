"""What is compared: how each variant is trained, and under which policy it then runs.

All variants start from the demo's dense weights. Those of one seed see the same clips, noise and
timesteps, for as many steps, and sample from the same noise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

Document = dict[str, Any]

SEEDS = (0, 1, 2)
DENSE, CONTROL = "dense", "control"


# A tile is a strip of one frame, 4 tokens wide. `fpsc tune` says of the demo's model that most
# heads look at their own frame and what is next to it in time, and these four at what is near in
# space and time.
TILE = [1, 16, 4]
NEAR = ({"layers": [0, 5], "heads": [2]}, {"layers": [4], "heads": [0, 1]})
DENSE_MODE = {"keep": 1.0, "dtype": "bf16"}


@dataclass(frozen=True)
class Phase:
    """A part of the schedule in FP8; dense where `keep` is 1.

    scales: of Q and K. near: the keep of the heads in `NEAR`, where it is another.
    """

    name: str
    noise: str
    keep: float
    scales: str = "tile"
    near: float | None = None

    @property
    def modes(self) -> dict[str, Document]:
        """The mode of most heads, and that of `NEAR`."""
        if self.keep == 1:
            return {self.name: DENSE_MODE}
        how = {"dtype": "fp8", "scales": {"qk": self.scales, "v": "channel"}}
        return {
            self.name: {"pattern": "frame", "keep": self.keep, **how},
            f"{self.name}-near": {"pattern": "near", "keep": self.near or self.keep, **how},
        }

    @property
    def rules(self) -> list[Document]:
        if self.keep == 1:
            return []
        return [rule | {"noise": self.noise, "use": f"{self.name}-near"} for rule in NEAR]


def policy(name: str, *phases: Phase) -> Document:
    """A policy for the demo's model."""
    return {
        "fpsc": 1,
        "name": name,
        "for": {"grid": [8, 16, 16]},
        "tile": TILE,
        "modes": {name: mode for phase in phases for name, mode in phase.modes.items()},
        "schedule": [{"noise": phase.noise, "use": phase.name} for phase in phases],
        "except": [rule for phase in phases for rule in phase.rules],
        "limits": {"min_tokens": 0, "unsupported": "dense"},
    }


# Thirds of the 20 steps of the demo's sampler begin at noise 1, 0.92 and 0.75.
EARLY, MIDDLE, LATE = "1.00..0.92", "0.92..0.75", "0.75..0.00"

# The paper's order: sparse and coarse early, dense and fine in the middle, intermediate late.
PAPER = policy(
    "demo-paper",
    Phase("early", EARLY, 0.21875, "coarse"),
    Phase("middle", MIDDLE, 0.25, "fine"),
    Phase("late", LATE, 0.21875, "intermediate", near=0.25),
)
# Ours for weights that were not trained for it: nothing is left out while the layout is decided.
SAFE = policy(
    "demo-safe",
    Phase("dense", EARLY, 1.0),
    Phase("middle", MIDDLE, 0.25),
    Phase("late", LATE, 0.1875),
)
# As much work as the paper's order takes on average, the same at every step.
CONSTANT = policy(
    "demo-constant", Phase("always", "1.00..0.00", 0.21875, "intermediate", near=0.28125)
)
NOTHING = policy("demo-dense", Phase("dense", "1.00..0.00", 1.0))


def without_fp8(given: Document) -> Document:
    """The same tiles, in the input's dtype."""
    modes = {
        name: {key: value for key, value in mode.items() if key != "scales"} | {"dtype": "bf16"}
        for name, mode in given["modes"].items()
    }
    return given | {"name": f"{given['name']}-sparse", "modes": modes}


def without_sparsity(given: Document) -> Document:
    """The same precision, every tile visited."""
    modes = {
        name: {k: v for k, v in mode.items() if k != "pattern"} | {"keep": 1.0}
        for name, mode in given["modes"].items()
    }
    return given | {"name": f"{given['name']}-fp8", "modes": modes}


@dataclass(frozen=True)
class Variant:
    """One way to get fast attention.

    Attributes:
        name: of its runs and its row.
        title: the row in words.
        train: the policy that it is trained with; None where it is not trained.
        run: the policy that it is validated and sampled with.
        v_scale: `channel`, or `tensor` for one scale of V in each head.
        untrained: the variant that it is compared with: the same policy, not trained.
        baseline: trained with dense attention, whatever `train` says.
        ablation: of one part of the policy; those are run last.
    """

    name: str
    title: str
    train: Document | None
    run: Document
    v_scale: str = "channel"
    untrained: str = ""
    baseline: bool = False
    ablation: bool = False


def _family(suffix: str, words: str, given: Document) -> tuple[Variant, ...]:
    untrained = f"untrained{suffix}"
    return (
        Variant(untrained, f"{words}: not trained", None, given),
        Variant(
            *(f"sparse{suffix}", f"{words}: trained sparse, without FP8"),
            *(without_fp8(given), given),
            untrained=untrained,
        ),
        Variant(
            *(f"fp8{suffix}", f"{words}: trained in FP8, every tile"),
            *(without_sparsity(given), given),
            untrained=untrained,
        ),
        Variant(f"joint{suffix}", f"{words}: trained jointly", given, given, untrained=untrained),
    )


_VARIANTS = (
    Variant(DENSE, "dense, as it ships", None, NOTHING),
    Variant(CONTROL, "dense, trained on", PAPER, NOTHING, baseline=True),
    *_family("", "paper's order", PAPER),
    *_family("-safe", "dense early", SAFE),
    Variant("untrained-constant", "constant: not trained", None, CONSTANT, ablation=True),
    Variant(
        *("joint-constant", "constant: trained jointly", CONSTANT, CONSTANT),
        untrained="untrained-constant",
        ablation=True,
    ),
    Variant(
        *("untrained-v-tensor", "paper's order, one scale for V: not trained", None, PAPER),
        v_scale="tensor",
        ablation=True,
    ),
    Variant(
        *("joint-v-tensor", "paper's order, one scale for V: trained jointly", PAPER, PAPER),
        v_scale="tensor",
        untrained="untrained-v-tensor",
        ablation=True,
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _VARIANTS}


@dataclass(frozen=True)
class Scale:
    """How much of everything: the same for all variants. The defaults are the experiment's.

    Attributes:
        training: the sections of `fpsc train`'s configuration that say how, as in its file.
        model: `demo`, or a folder of weights that all start from.
        validation_clips, noise: of the validation loss.
        clips, steps: of a set of samples.
    """

    training: Document = field(
        default_factory=lambda: {
            "objective": {
                "prediction": "sample", "levels": "uniform", "shift": 6.0, "floor": 0.1,
                "no_prompt": 0.1,
            },
            "optimiser": {
                "lr": 5e-4, "betas": [0.9, 0.98], "warmup": 20, "decay": "cosine", "steps": 500,
                "batch": 2,
            },
            "ema": 0.98,
            "precision": "bf16",
        }
    )  # fmt: skip
    model: str = "demo"
    seeds: tuple[int, ...] = SEEDS
    validation_clips: int = 24
    noise: tuple[float, ...] = (0.98, 0.9, 0.75, 0.5, 0.25, 0.1)
    clips: int = 32
    steps: int = 20


@dataclass(frozen=True)
class Run:
    """A variant with a seed: of the order of clips, of noise and timesteps, and of the samples."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-s{self.seed}"

    def settings(self, scale: Scale) -> Document:
        """Everything that its result depends on, as plain JSON.

        More seeds change no run, and how others are trained none that is not.
        """
        variant, how = asdict(self.variant), asdict(scale)
        told = {key: variant[key] for key in ("train", "run", "v_scale", "baseline")}
        del how["seeds"]
        if self.variant.train is None:
            del how["training"]
        found: Document = json.loads(json.dumps({"seed": self.seed, **told, "scale": how}))
        return found


def runs(scale: Scale) -> dict[str, Run]:
    """All runs by name, what others need first, then seed by seed, the ablations last."""
    found = [Run(VARIANTS[DENSE], seed) for seed in scale.seeds]
    for ablation in (False, True):
        found += [
            Run(variant, seed)
            for seed in scale.seeds
            for variant in VARIANTS.values()
            if variant.ablation is ablation and variant.name != DENSE
        ]
    return {run.name: run for run in found}
