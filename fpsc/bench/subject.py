"""A case on this machine: sizes filled in and cut, the model built, its inputs, its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fpsc.bench.cases import STEPS, Spec, reduced
from fpsc.bench.environment import memory
from fpsc.bench.record import Level, Problem
from fpsc.errors import UserError
from fpsc.grid import TokenGrid
from fpsc.models.build import ModelSpec, build
from fpsc.models.inputs import example_inputs, grid_of_video
from fpsc.models.known import known
from fpsc.models.materialise import (
    layers_of,
    random_model,
    real_inputs,
    settings_of,
    with_layers,
)

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What every case of a run shares.

    Attributes:
        device, dtype: of models and inputs.
        emulate_fp8: on a CPU, time FP8 as it is emulated, instead of the input's dtype.
        mode: of Inductor, for every compiled contender.
        fp8_linears: beside each compiled contender, one whose linear layers are FP8 (torchao).
        seed: of weights and inputs.
        profile: whether to split the time by the profiler.
        traces: a folder for Perfetto's files; None writes none.
    """

    device: torch.device
    dtype: torch.dtype
    emulate_fp8: bool = False
    mode: str = ""
    fp8_linears: bool = False
    seed: int = 0
    profile: bool = True
    traces: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def fp8(self) -> bool:
        """Whether what is timed rounds to FP8."""
        return self.cuda or self.emulate_fp8

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Sized:
    """A case with its sizes: `spec` as it will run, `problem` as it is recorded, and the model's
    class and configuration with as many layers as will run; None for the op alone."""

    spec: Spec
    problem: Problem
    model: ModelSpec | None


def sized(spec: Spec, machine: Machine, forced: frozenset[str] = frozenset()) -> Sized:
    """Fill in what the model says, then cut what the machine cannot do.

    Raises:
        UserError: the model does not exist, or rejects a size.
    """
    source = spec.own or (known(spec.model).spec if spec.model else None)
    if source is None:
        full = replace(spec, layers=1)
    else:
        full, config = _of_model(spec, source)
    filled = replace(
        full,
        grid=spec.grid or full.grid,
        layers=spec.layers or full.layers,
        heads=spec.heads or full.heads,
        steps=spec.steps or full.steps,
    )
    cut, words = reduced(filled, full, cuda=machine.cuda, forced=forced)
    model = None
    if source is not None:
        layers = cut.layers or 1
        model = with_layers(source, config, layers) if layers != full.layers else source
    assert cut.grid is not None and cut.heads and cut.head_dim and full.grid and full.layers
    problem = Problem(
        level=spec.level,
        model=spec.own.origin if spec.own is not None else spec.model,
        model_class=source.class_name if source else "",
        layers=cut.layers or 1,
        full_layers=full.layers,
        grid=cut.grid,
        full_grid=full.grid,
        size=spec.size,
        text_tokens=cut.text_tokens or 0,
        heads=cut.heads,
        head_dim=cut.head_dim,
        batch=cut.batch,
        dtype=machine.dtype_name,
        steps=cut.steps or 1,
        emulate_fp8=machine.fp8,
        mode=machine.mode,
        noise=spec.noise if spec.level is Level.transformer else None,
        seed=machine.seed,
        threads=None if machine.cuda else torch.get_num_threads(),
        reduced=words,
    )
    return Sized(cut, problem, model)


def _of_model(spec: Spec, source: ModelSpec) -> tuple[Spec, dict[str, Any]]:
    """The case in real life, and every setting of the model."""
    config = settings_of(source)
    heads, dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    if not heads or not dim or not layers_of(config):
        raise UserError(
            f"{source.class_name}: expected num_attention_heads, attention_head_dim and num_layers "
            "in its configuration, which say how large it is"
        )
    grid = spec.grid
    if spec.size:
        clips = known(spec.model).clips
        if spec.size not in clips:
            raise UserError(f"{spec.model}: no clip of {spec.size}; known: {', '.join(clips)}")
        clip = clips[spec.size]
        grid = tuple(  # type: ignore[assignment]
            grid_of_video(
                source.class_name,
                config,
                frames=clip.frames,
                height=clip.height,
                width=clip.width,
            )
        )
    text = spec.text_tokens or int(
        config.get("max_text_seq_length") or config.get("max_sequence_length") or 512
    )
    if source.class_name.startswith("HunyuanVideo"):
        text = spec.text_tokens or 256
    full = replace(
        spec,
        grid=grid,
        heads=int(heads),
        head_dim=int(dim),
        layers=layers_of(config),
        text_tokens=text,
        steps=STEPS if spec.level is Level.sampling else None,
    )
    return full, config


# ---- memory


def needed(case: Sized, machine: Machine) -> int:
    """Bytes that a case takes, roughly: weights, the activations of a layer, and what is kept for
    backward."""
    p, item = case.problem, machine.dtype.itemsize
    tokens, width = (p.tokens + p.text_tokens) * p.batch, p.heads * p.head_dim
    if case.model is None:
        return 8 * tokens * width * item + tokens * 4096  # q, k, v, copies of them; lists
    weights = _weights(case.model, machine.dtype)
    activation = tokens * width * item
    if p.level is Level.training:  # gradients, two moments, and all that backward reads
        return 4 * weights + activation * 40 * p.layers
    return weights + activation * 14


_WEIGHTS: dict[tuple[str, torch.dtype], int] = {}


def _weights(model: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of a model's weights."""
    key = repr(model), dtype
    if key not in _WEIGHTS:
        parameters = build(model, dtype).parameters()
        _WEIGHTS[key] = sum(x.numel() * x.element_size() for x in parameters)
    return _WEIGHTS[key]


def check_memory(case: Sized, machine: Machine) -> None:
    """Refuse what does not fit.

    Raises:
        UserError: says how much is needed, how much is free, and the largest case that fits.
    """
    free, want = memory(machine.device)[0], needed(case, machine)
    if want <= free:
        return
    where = "on the GPU" if machine.cuda else "of memory"
    raise UserError(
        f"{case.spec.name}: needs about {want / GIB:.1f} GiB {where}, {free / GIB:.1f} are free; "
        + _largest(case, machine, lambda other: needed(other, machine) <= free)
    )


def _largest(case: Sized, machine: Machine, fits: Callable[[Sized], bool]) -> str:
    """The largest case that fits: fewer layers first, then fewer frames."""
    spec = case.spec
    t, y, x = case.problem.grid
    layers = case.problem.layers
    while layers > 1:
        layers = -(-layers // 2)
        try:
            if fits(sized(replace(spec, layers=layers), machine, frozenset({"layers", "grid"}))):
                return f"what fits: --layers {layers}"
        except UserError:
            break
    while t > 1:
        t = -(-t // 2)
        smaller = replace(spec, grid=(t, y, x), layers=layers)
        if fits(sized(smaller, machine, frozenset({"layers", "grid"}))):
            return f"what fits: --layers {layers} --grid {t},{y},{x}"
    return "nothing of this model fits; name a smaller one"


# ---- the model


@dataclass(frozen=True)
class Subject:
    """A model with weights, and what it is called with."""

    model: nn.Module
    inputs: dict[str, Any]


def subject(case: Sized, machine: Machine, noise: float | None = None) -> Subject:
    """Build the model and its inputs on the device."""
    assert case.model is not None
    p = case.problem
    model = random_model(case.model, machine.dtype, machine.device, machine.seed)
    examples = example_inputs(
        model,
        grid=TokenGrid(*p.grid),
        batch=p.batch,
        text_tokens=p.text_tokens,
        dtype=machine.dtype,
    )
    level = noise if noise is not None else p.noise if p.noise is not None else 0.5
    inputs = real_inputs(model, examples, machine.device, noise=level, seed=machine.seed)
    return Subject(model, inputs)


def first_tensor(found: Any) -> Tensor:
    """Of what a model returns: a tensor, or a tuple or an output of diffusers that begins so."""
    while not isinstance(found, Tensor):
        found = found[0]
    return found
