"""The format of a policy: one pydantic model for every mapping.

A field's description completes the sentence "expected ...", in messages as in editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..grid import BLOCK
from .values import (
    Grid,
    Lists,
    Noise,
    NoiseRange,
    Offsets,
    Percent,
    QKScales,
    Spans,
    Steps,
    Tile,
    Weights,
    Window,
)

MODES = 32
"""Most modes of a policy: a capacity of the table, so that edits never change a shape."""

ROWS = 64
"""Most rows (different stretches of noise) of a policy, for the same reason."""

NOISE_RANGE = "a range from noisy to clean of at most 5 decimals, for example 0.90..0.40"
STEP_RANGE = "a range of steps counted from 0 without its end, for example 0..10"
PERCENT_RANGE = "a range of percent of the steps without its end, for example 0..20"

WHOLE = NoiseRange(1.0, 0.0)
"""All noise; what `noise` of a phase is until its steps or percent are known as noise."""

Role = Literal["video", "joint"]

ROLES: list[Role] = ["video", "joint"]
"""Roles of attention that a policy can cover: video alone, or video and text in one sequence."""


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _something(cls, value: Any) -> Any:
        """`keep:` with nothing behind it is a slip, not a way to say "the default"."""
        assert value is not None
        return value


class Scales(Spec):
    """How much one FP8 scale covers."""

    qk: QKScales = Field(
        default="tile",
        description="tile (one scale of Q and K for each tile; fine is the same), intermediate "
        "(for 2 x 2 x 2 tiles), coarse (4 x 4 x 4), head (all of the video), or a box of tiles "
        "[t, y, x]",
    )
    v: Literal["channel"] = Field(
        default="channel", description="channel (one scale for each channel)"
    )


class Mode(Spec):
    """A named choice: what a query tile sees, and in which precision."""

    pattern: Literal["dense", "window", "near", "frame", "column", "radial", "explicit"] | None = (
        Field(
            default=None,
            description="a pattern: dense, window, near, frame, column, radial or explicit",
        )
    )
    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="a number above 0 and at most 1, the fraction of video key tiles visited",
    )
    window: Window | None = Field(
        default=None, description="three positive whole numbers of tiles [t, y, x]"
    )
    weights: Weights | None = Field(
        default=None,
        description="three numbers [t, y, x] from 0.001 to 1000, how far one token counts per axis",
    )
    offsets: Offsets | None = Field(
        default=None, description="a list of tile offsets [t, y, x], whole numbers"
    )
    lists: Lists | None = Field(
        default=None,
        description="for each tile of the video a list of the tiles that it sees, counted from 0, "
        "x fastest",
    )
    dtype: Literal["bf16", "fp8"] = Field(
        default="bf16", description="bf16 (not quantised: computed in the input's dtype) or fp8"
    )
    scales: Scales = Field(
        default=Scales(), description="a mapping, for example {qk: tile, v: channel}"
    )


class Phase(Spec):
    """The mode of a part of the run: by noise, steps or percent, one axis a file.

    A loaded policy has `noise` in either case.
    """

    noise: Noise = Field(default=WHOLE, description=NOISE_RANGE)
    steps: Steps | None = Field(default=None, description=STEP_RANGE)
    percent: Percent | None = Field(default=None, description=PERCENT_RANGE)
    use: str = Field(description="the name of a mode")


class Rule(Spec):
    """Another mode for some layers, heads or noise; of several rules the last one wins."""

    layers: Spans | None = Field(
        default=None,
        description="layers counted from 0: a number, a range 12..18, or a list of these",
    )
    heads: Spans | None = Field(
        default=None, description="heads counted from 0: a number, a range 0..3, or a list of these"
    )
    noise: Noise | None = Field(default=None, description=NOISE_RANGE)
    steps: Steps | None = Field(default=None, description=STEP_RANGE)
    percent: Percent | None = Field(default=None, description=PERCENT_RANGE)
    use: str = Field(description="the name of a mode")


class Sampling(Spec):
    """The run that `steps` and `percent` count in; where they are not used, it says nothing."""

    scheduler: Literal[
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ] = Field(
        description="a scheduler of diffusers: FlowMatchEulerDiscreteScheduler, "
        "UniPCMultistepScheduler, DPMSolverMultistepScheduler, CogVideoXDDIMScheduler or "
        "CogVideoXDPMScheduler"
    )
    steps: int = Field(ge=1, le=1000, description="a whole number of steps, 1 to 1000")
    shift: float | None = Field(
        default=None, gt=0, le=100, description="a number above 0 and at most 100, the flow's shift"
    )
    sigmas: Literal["scheduler", "uniform", "linear-quadratic"] = Field(
        default="scheduler",
        description="scheduler (it spaces its levels itself), uniform (from 1 to 1 / steps, as "
        "the pipelines of HunyuanVideo and LTX hand them over) or linear-quadratic (as that of "
        "Mochi does)",
    )


class Tuned(Spec):
    """What a policy was tuned on; elsewhere it still runs, with a warning."""

    model: str | None = Field(default=None, description="the model's name in text")
    grid: Grid | None = Field(
        default=None, description="three positive whole numbers of tokens [t, y, x]"
    )
    weights: Literal["base", "jointly-tuned"] | None = Field(
        default=None, description="base or jointly-tuned"
    )


class Limits(Spec):
    """Where a policy does not apply."""

    min_tokens: int = Field(
        default=4096,
        ge=0,
        description="a whole number of video tokens, 0 or more; shorter sequences stay dense",
    )
    unsupported: Literal["dense"] = Field(
        default="dense", description="dense (what cannot be replaced stays as it was)"
    )


Schedule = Annotated[
    list[Phase],
    Field(min_length=1, description="a list of phases like {noise: 1.00..0.90, use: dense}"),
]
Rules = Annotated[
    list[Rule], Field(description="a list of rules like {layers: [0, 39], use: dense}")
]
TileField = Annotated[
    Tile, Field(description=f"auto, or a tile [t, y, x] of at most {BLOCK} tokens")
]
Roles = Annotated[
    list[Role],
    Field(min_length=1, max_length=2, description="a list of roles: video, joint, or both"),
]
TableFile = Annotated[
    str,
    Field(
        pattern=r"\.safetensors$",
        description="the name of a .safetensors file in the folder of the policy",
    ),
]


class Component(Spec):
    """What one transformer of a pipeline does otherwise; what it leaves out holds for it too."""

    schedule: Schedule | None = None
    except_: Rules | None = Field(default=None, alias="except")
    tile: TileField | None = None
    limits: Limits | None = Field(
        default=None, description="a mapping, for example {min_tokens: 4096}"
    )
    roles: Roles | None = None
    table: TableFile | None = None


class PolicySpec(Spec):
    """A whole policy."""

    fpsc: int = Field(ge=1, le=1, description="1, the version of the format")
    import_: str | None = Field(
        default=None,
        alias="$import",
        description="a built-in policy, or a file in the folder of this one, to start from",
    )
    name: str | None = Field(default=None, description="a name in text")
    for_: Tuned = Field(
        default=Tuned(),
        alias="for",
        description="a mapping, for example {model: name, grid: [21, 45, 80]}",
    )
    tile: TileField = "auto"
    roles: Roles = ROLES
    modes: dict[str, Mode] = Field(
        min_length=1,
        max_length=MODES,
        description=f"a mapping of 1 to {MODES} modes, for example dense: {{keep: 1.0}}",
    )
    sampling: Sampling | None = Field(
        default=None,
        description="a mapping, for example {scheduler: UniPCMultistepScheduler, steps: 50, "
        "shift: 5.0}",
    )
    schedule: Schedule
    except_: Rules = Field(default=[], alias="except")
    table: TableFile | None = None
    components: dict[str, Component] = Field(
        default={},
        max_length=8,
        description="a mapping of transformers, for example transformer_2: {schedule: [...]}",
    )
    limits: Limits = Field(
        default=Limits(), description="a mapping, for example {min_tokens: 4096}"
    )
    measured: dict[str, Any] = Field(default={}, description="a mapping, written by tools")


def component_spec(spec: PolicySpec, name: str) -> PolicySpec:
    """A policy as it holds for one of its components."""
    given = spec.components[name]
    changes = {field: getattr(given, field) for field in given.model_fields_set}
    return spec.model_copy(update={**changes, "components": {}})


def edges(spec: PolicySpec) -> list[float]:
    """Noise levels, descending, at which a schedule or a rule changes: between the rows."""
    ranges = [p.noise for p in spec.schedule] + [r.noise for r in spec.except_ if r.noise]
    return sorted({n for noise in ranges for n in noise} - {0.0, 1.0}, reverse=True)
