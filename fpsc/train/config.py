"""The configuration of a run: a YAML file, typed, with errors that name the place and the way out.

Read by the reader of policies. A field's description completes the sentence "expected ...", in
messages as in editors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fpsc.errors import UserError
from fpsc.policy import Policy, PolicyError, find
from fpsc.policy import document as doc
from fpsc.policy.errors import Problem, either, nearest
from fpsc.policy.fields import validated
from fpsc.policy.json_schema import tidy
from fpsc.policy.schema import Spec
from fpsc.policy.values import Steps
from fpsc.train.data import Data

FIRST = "fpsc-train: 1"
"""How a configuration starts."""

SCHEMA = "fpsc-train-1.json"
"""The committed schema: `fpsc train --schema > fpsc/train/fpsc-train-1.json`."""

RECIPES = ("demo",)
"""The configurations that come with the package."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(gt=0, le=1)]


class Lora(Spec):
    """The adapters of `method: lora`."""

    rank: int = Field(default=32, ge=1, description="a whole number, 1 or more")
    alpha: float = Field(
        default=32.0, gt=0, description="a number above 0; the scale is alpha / rank"
    )
    targets: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="a list of names with which the modules that get one end",
    )


class Objective(Spec):
    """Which error is minimised, and at which noise."""

    prediction: Literal["auto", "velocity", "sample", "v"] = Field(
        default="auto",
        description="auto (what the scheduler beside the model says, else velocity), velocity "
        "(noise - clean), sample (the clean latents) or v (of a variance preserving schedule)",
    )
    levels: Literal["logit-normal", "uniform"] = Field(
        default="logit-normal",
        description="logit-normal or uniform: how noise levels are drawn, before the shift",
    )
    mean: float = Field(default=0.0, description="a number, the mean of the logits of levels")
    std: float = Field(default=1.0, gt=0, description="a number above 0, their deviation")
    shift: float = Field(
        default=3.0, gt=0, description="a number above 0; above 1 it moves levels towards noise"
    )
    floor: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="a number above 0 and at most 1: an error of the clean sample counts "
        "1 / max(noise, floor)^2",
    )
    no_prompt: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="a number from 0 to 1, the share of clips whose prompt is dropped",
    )
    timestep: Literal["auto", "flow", "reversed", "unit"] = Field(
        default="auto",
        description="auto (by the family of the model), flow (1000 noise), reversed "
        "(1000 - 1000 noise) or unit (noise)",
    )


class Distil(Spec):
    """Weights of what is learned from the dense model as it was before training."""

    output: Weight = Field(default=0.0, description="a weight of 0 or more, for its output")
    attention: Weight = Field(
        default=0.0, description="a weight of 0 or more, for the outputs of its video attentions"
    )


class Optimiser(Spec):
    """AdamW, and how long it runs."""

    lr: float = Field(default=5e-6, gt=0, description="a number above 0, the learning rate")
    betas: list[Share] = Field(
        default=[0.9, 0.999],
        min_length=2,
        max_length=2,
        description="two numbers from 0 to below 1",
    )
    warmup: Count = Field(
        default=200, description="a whole number of steps over which the rate rises from 0"
    )
    decay: Literal["none", "linear", "cosine"] = Field(
        default="none", description="none, linear or cosine: how the rate falls to 0 at the end"
    )
    weight_decay: Weight = Field(default=1e-4, description="a number, 0 or more")
    clip: float = Field(
        default=1.0, gt=0, description="a number above 0, the largest norm of a gradient"
    )
    steps: Positive = Field(default=2000, description="a whole number of steps, 1 or more")
    batch: Positive = Field(
        default=2, description="a whole number of clips in a step, over all processes"
    )
    accumulate: Positive = Field(
        default=1,
        description="a whole number of parts that a process computes a step in, one by one",
    )


class Ramp(Spec):
    """How the model is led from dense to what the policy says."""

    keep: Steps | None = Field(
        default=None,
        description="a range of steps over which keep falls from 1, for example 0..500",
    )
    fp8: Count = Field(default=0, description="a whole number, the step at which fp8 begins")


class Validation(Spec):
    """Losses on clips that training never sees, with fixed noise, dense and sparse."""

    every: Positive = Field(default=200, description="a whole number of steps, 1 or more")
    clips: Positive = Field(default=8, description="a whole number of clips, 1 or more")
    noise: list[Level] = Field(
        default=[0.98, 0.9, 0.75, 0.5, 0.25, 0.1],
        min_length=1,
        description="a list of noise levels above 0 and at most 1",
    )


class Samples(Spec):
    """Clips that are sampled at validation, dense and sparse from the same noise."""

    prompts: list[str] = Field(default=[], description="a list of prompts; none: no clips")
    steps: int = Field(default=20, ge=2, description="a whole number of steps, 2 or more")
    size: list[Positive] | None = Field(
        default=None,
        min_length=3,
        max_length=3,
        description="frames, height and width of a clip, for a pipeline of diffusers",
    )


class Checkpoints(Spec):
    """From which a run goes on after a stop."""

    every: Positive = Field(default=200, description="a whole number of steps, 1 or more")
    keep: Positive = Field(default=2, description="a whole number, how many of the last are kept")


class TrainSpec(Spec):
    """A whole configuration."""

    fpsc_train: int = Field(
        ge=1, le=1, alias="fpsc-train", description="1, the version of the format"
    )
    model: str = Field(
        description="demo, a folder of diffusers (a model or a pipeline), or a hub id (owner/name)"
    )
    policy: str = Field(description="a built-in policy, a file, or a hub id, as at inference")
    output: str = Field(description="a folder for checkpoints, logs and weights")
    data: Data = Field(default=Data(), description="a mapping, for example {train: latents}")
    method: Literal["full", "lora"] = Field(
        default="full", description="full (all weights) or lora (adapters on frozen weights)"
    )
    lora: Lora = Field(default=Lora(), description="a mapping, for example {rank: 32}")
    objective: Objective = Field(
        default=Objective(), description="a mapping, for example {levels: logit-normal}"
    )
    distil: Distil = Field(default=Distil(), description="a mapping, for example {output: 0.5}")
    optimiser: Optimiser = Field(
        default=Optimiser(), description="a mapping, for example {lr: 5.0e-6, steps: 2000}"
    )
    ema: Share = Field(
        default=0.99,
        description="a number from 0 (none) to below 1, the decay of the averaged weights",
    )
    ramp: Ramp = Field(default=Ramp(), description="a mapping, for example {keep: 0..500}")
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="bf16 (autocast, weights in fp32) or fp32"
    )
    checkpointing: bool = Field(
        default=False, description="true or false: compute activations again in backward"
    )
    backward: Literal["bf16", "fp8"] = Field(
        default="bf16",
        description="bf16 (as autocast has it) or fp8: the products of backward in attentions that "
        "are FP8 in forward",
    )
    baseline: bool = Field(
        default=False,
        description="true or false: train dense, to compare with; validation is as without it",
    )
    validation: Validation = Field(
        default=Validation(), description="a mapping, for example {every: 200}"
    )
    samples: Samples = Field(
        default=Samples(), description="a mapping, for example {prompts: [a cat]}"
    )
    checkpoints: Checkpoints = Field(
        default=Checkpoints(), description="a mapping, for example {every: 200, keep: 2}"
    )
    save_as: Literal["bf16", "fp32"] = Field(
        default="bf16", description="bf16 or fp32, the dtype of the weights that are written"
    )
    tensorboard: bool = Field(default=True, description="true or false: log to tensorboard too")
    seed: Count = Field(default=0, description="a whole number, 0 or more")


FREE = ("output", "validation", "samples", "checkpoints", "tensorboard", "save_as")
"""Sections that do not change what is learned: a run that goes on may have others."""


@dataclass(frozen=True)
class Config:
    """A configuration with the document that it was read from.

    Attributes:
        folder: where it stands; what it names is looked for there first.
    """

    spec: TrainSpec
    document: doc.Document

    @property
    def folder(self) -> Path:
        return self.document.folder or Path()

    @property
    def output(self) -> Path:
        """The output folder, from the working directory."""
        return Path(self.spec.output)

    def beside(self, name: str) -> str:
        """A name, as a path beside the configuration where there is such a file or folder."""
        path = self.folder / name
        return str(path) if path.exists() else name

    def policy(self) -> Policy:
        """The policy that the model is trained for.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return find(self.beside(self.spec.policy))
        except PolicyError as error:
            place = self.document.where(("policy",))
            raise UserError(f"{place}: {error}") from error

    def values(self) -> dict[str, Any]:
        """Every value, defaults too, as plain JSON."""
        value: dict[str, Any] = json.loads(self.spec.model_dump_json(by_alias=True, warnings=False))
        return value

    def error(self, path: tuple[str | int, ...], message: str) -> UserError:
        """An error about a place in this configuration: ("optimiser", "batch")."""
        return UserError(
            str(PolicyError(self.document.file, [self.document.problem(path, message)]))
        )


def recipe(name: str) -> str:
    """The text of a configuration that comes with the package."""
    return (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")


def load(source: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration: a name of `RECIPES`, or the path of a file.

    Args:
        changes: values to put in place of those of the file, by dotted name:
            {"optimiser.steps": 100}.

    Raises:
        UserError: it is not a valid configuration; one line for each problem, with its place.
    """
    name = str(source)
    path = _recipes() / f"{name}.yaml" if name in RECIPES else Path(source)
    try:
        if name not in RECIPES and not path.is_file():
            message = f"no such file, and not one of {either(RECIPES)}{nearest(name, RECIPES)}"
            raise PolicyError(name, [Problem(None, None, message)])
        return _checked(_changed(doc.read(path, FIRST), changes or {}))
    except PolicyError as error:
        raise UserError(str(error)) from error


def from_value(value: Mapping[str, Any]) -> Config:
    """A configuration from plain Python values, spelled as in the file.

    Raises:
        UserError: it is not a valid configuration.
    """
    try:
        return _checked(doc.from_value(value, "<configuration>"))
    except PolicyError as error:
        raise UserError(str(error)) from error


def _recipes() -> Path:
    return Path(str(resources.files("fpsc.train"))) / "recipes"


def _changed(document: doc.Document, changes: Mapping[str, Any]) -> doc.Document:
    """The document with other values; sections that it does not have are added."""
    for path, value in changes.items():
        section, _, rest = path.partition(".")
        if rest and section not in document.value:
            for part in reversed(rest.split(".")):
                value = {part: value}
            path = section
        try:
            document = doc.edited(document, {path: value})
        except KeyError as error:
            raise UserError(f"--set {error.args[0]}") from None
    return document


def _checked(document: doc.Document) -> Config:
    spec = validated(document, TrainSpec)
    problems = [document.problem(*conflict) for conflict in _conflicts(spec)]
    if problems:
        raise PolicyError(document.file, problems)
    return Config(spec, document)


def _conflicts(spec: TrainSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What single fields cannot know."""
    steps, batch = spec.optimiser.steps, spec.optimiser.batch
    if batch % spec.optimiser.accumulate:
        message = f"{batch} clips in a step do not divide into {spec.optimiser.accumulate} parts"
        yield ("optimiser", "accumulate"), message
    ramp = spec.ramp.keep
    if ramp is not None and ramp.stop > steps:
        yield (
            ("ramp", "keep"),
            f"ends after the last of {steps} steps, so what the policy says is never trained",
        )
    if spec.ramp.fp8 >= steps:
        yield ("ramp", "fp8"), f"fp8 begins after the last of {steps} steps (0..{steps - 1})"
    if "lora" in spec.model_fields_set and spec.method != "lora":
        yield ("lora",), "belongs to method: lora; set that, or remove this"
    if spec.baseline and "ramp" in spec.model_fields_set:
        yield ("ramp",), "has nothing to act on in a baseline, which trains dense; remove one"
    if spec.baseline and spec.backward == "fp8":
        yield ("backward",), "a baseline has no FP8 attention: remove one, or set this to bf16"


def differences(before: Mapping[str, Any], after: Config) -> list[str]:
    """What a run that goes on has otherwise than when it began, of what it may not have.

    Args:
        before: `Config.values` of then.
    """
    now = after.values()
    # A key that was not known when a run began had its default, then as now.
    fields = TrainSpec.model_fields.items()
    plain = {name: f.default for name, f in fields if isinstance(f.default, str | int | float)}
    found = []
    for name in sorted(now.keys() | before.keys()):
        if name in FREE:
            continue
        was_given = before.get(name, plain.get(name))
        for key, was, is_ in _leaves(name, was_given, now.get(name)):
            # With a constant rate a longer run is the same run, longer.
            longer = key == "optimiser.steps" and now["optimiser"]["decay"] == "none"
            if was != is_ and not longer:
                found.append(f"{key}: expected {_shown(was)} as it began, found {_shown(is_)}")
    return found


def _leaves(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _leaves(f"{name}.{key}", a.get(key), b.get(key))
    else:
        yield name, a, b


def _shown(value: Any) -> str:
    return json.dumps(value)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of configurations (draft 2020-12), for editors."""
    schema = tidy(TrainSpec.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fpsc training configuration",
        **schema,
    }


def dumps_schema() -> str:
    """The text of the committed schema."""
    return json.dumps(json_schema(), indent=2) + "\n"
