"""A model in every way that it can be run: eager, compiled, with each attention, with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

import fpsc
from fpsc.bench.admission import Absent, first_line
from fpsc.bench.environment import version
from fpsc.bench.policies import constant
from fpsc.bench.record import Role
from fpsc.bench.subject import Machine
from fpsc.models.materialise import sharing
from fpsc.policy import Policy, find
from fpsc.unseen import FLAGS

Called = Callable[..., Any]
EAGER, INDUCTOR = "eager", "Inductor"
FP8_LINEARS = "FP8 linears"


@dataclass(frozen=True)
class Contender:
    """One way to run a module.

    prepare: makes of the module, whose weights all share, what is called. policy: of fpsattn.
    keep: the one of its policy, where it has but one.
    """

    name: str
    role: Role
    prepare: Callable[[nn.Module], Called]
    policy: Policy | None = None
    keep: float | None = None


def eager() -> Contender:
    return Contender(EAGER, Role.eager, lambda module: sharing(module))


def inductor(machine: Machine, *, attention: str = "") -> Contender:
    """Plain torch.compile. attention: a backend of diffusers instead of SDPA's default."""

    def prepare(module: nn.Module) -> Called:
        copy: Any = sharing(module)
        if not attention:
            return _flagged(torch.compile(copy, **_mode(machine)))
        with attention_backend(copy, attention):
            compiled = torch.compile(copy, **_mode(machine))
        return partial(_call_with, copy, attention, _flagged(compiled))

    role = Role.approximate if "sage" in attention else Role.baseline
    return Contender(INDUCTOR + (f", {attention}" if attention else ""), role, prepare)


def fpsattn(
    policy: Policy,
    machine: Machine,
    *,
    name: str,
    keep: float | None = None,
    grid: tuple[int, int, int] | None = None,
    **options: Any,
) -> Contender:
    """grid: for a part of a model, which does not show it. options: of the backend."""
    given: dict[str, Any] = {"emulate_fp8": machine.fp8, **options}
    if grid is not None:
        given["grid"] = tuple(grid)
    if machine.mode:
        given["mode"] = machine.mode

    def prepare(module: nn.Module) -> Called:
        return fpsc.compile(sharing(module), policy=policy.document.text, options=given)

    return Contender(name, Role.fpsattn, prepare, policy, keep)


def with_fp8_linears(contender: Contender) -> Contender:
    """The same on a model whose linear layers torchao has made FP8 (dynamic activations)."""
    torchao = import_module("torchao.quantization")  # optional
    rows = torchao.PerRow()

    def prepare(module: nn.Module) -> Called:
        copy = sharing(module)
        how = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=rows)
        torchao.quantize_(copy, how)
        return contender.prepare(copy)

    role = contender.role if contender.role is Role.fpsattn else Role.approximate
    name = f"{contender.name}, {FP8_LINEARS}"
    return Contender(name, role, prepare, contender.policy, contender.keep)


def contenders(
    machine: Machine,
    keeps: tuple[float, ...],
    policies: tuple[str, ...],
    *,
    tokens: int,
    heads: int,
    grid: tuple[int, int, int] | None = None,
) -> Iterator[Contender | Absent]:
    """Everything that can be tried with a model here; what cannot, with the reason."""
    yield eager()
    yield inductor(machine)
    for name in ("_native_flash", "_native_cudnn", "_native_efficient", "_native_math"):
        yield from _attention(name, machine, tokens, heads)
    for name in ("_flash_3", "flash", "sage", "flex", "xformers"):
        yield from _attention(name, machine, tokens, heads)
    yield Absent(
        "FlexAttention, the same tiles",
        Role.baseline,
        "no model calls it with tokens in tile order; it is timed at the level attention",
    )
    ours = [
        fpsattn(constant(keep, "fp8"), machine, name=f"fpsattn keep {keep:g}", keep=keep, grid=grid)
        for keep in keeps
    ]
    ours += [
        fpsattn(policy_of(name), machine, name=f"fpsattn {policy_of(name).name}", grid=grid)
        for name in policies
    ]
    yield from ours
    if machine.fp8_linears:
        yield from _fp8([inductor(machine), *ours], machine)


def _fp8(plain: list[Contender], machine: Machine) -> Iterator[Contender | Absent]:
    for contender in plain:
        try:
            if machine.cuda and torch.cuda.get_device_capability(machine.device) < (8, 9):
                raise RuntimeError("needs compute capability 8.9 or newer")
            yield with_fp8_linears(contender)
        except (ImportError, RuntimeError) as error:
            yield Absent(f"{contender.name}, {FP8_LINEARS}", contender.role, first_line(error))


def _attention(
    name: str, machine: Machine, tokens: int, heads: int
) -> Iterator[Contender | Absent]:
    """A backend of diffusers, where it can be used here."""
    full = f"{INDUCTOR}, {name}"
    role = Role.approximate if "sage" in name else Role.baseline
    reason = ""
    if not machine.cuda and name not in ("_native_flash", "_native_math", "flex"):
        package = {"sage": "sageattention", "flash": "flash-attn", "_flash_3": "flash-attn-3"}
        here = version(package.get(name, name)) is not None
        reason = "needs a GPU" if here or name.startswith("_native") else "not installed"
    elif name == "_native_math" and tokens**2 * heads * 8 > 4 * 2**30:
        reason = f"its scores would take {tokens**2 * heads * 8 / 2**30:.0f} GiB"
    elif name == "_native_flash" and not machine.cuda:
        reason = "SDPA's default here"
    else:
        reason = _lacking(name)
    yield Absent(full, role, reason) if reason else inductor(machine, attention=name)


def _lacking(name: str) -> str:
    """Why diffusers cannot use a backend here, or ""."""
    try:
        from diffusers.models import attention_dispatch as dispatch

        backend = dispatch.AttentionBackendName(name)
        dispatch._check_attention_backend_requirements(backend)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        return first_line(error)
    return ""


@contextmanager
def attention_backend(model: Any, name: str) -> Iterator[None]:
    """`model.set_attention_backend(name)`, which is process-wide, undone at the end."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
    from diffusers.utils import logging

    before = Registry._active_backend
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.set_attention_backend(name)
        yield
    finally:
        Registry._active_backend = before
        logging.set_verbosity(level)


def policy_of(name: str) -> Policy:
    """A policy by name or file, as the backend finds it. `quick` is three phases for short videos.

    Raises:
        PolicyError: there is no such policy, or it is not valid.
    """
    return quick_policy() if name == "quick" else find(name)


def quick_policy() -> Policy:
    """Dense, then gentle, then sparse: phases to be seen in a run of few steps."""
    return Policy.from_dict(
        {
            "fpsc": 1,
            "name": "quick",
            "modes": {
                "dense": {"keep": 1.0, "dtype": "bf16"},
                "gentle": {"pattern": "near", "keep": 0.5, "dtype": "fp8"},
                "sparse": {"pattern": "near", "keep": 0.125, "dtype": "fp8"},
            },
            "schedule": [
                {"noise": "1.00..0.95", "use": "dense"},
                {"noise": "0.95..0.80", "use": "gentle"},
                {"noise": "0.80..0.00", "use": "sparse"},
            ],
            "limits": {"min_tokens": 0},
        }
    )


def _mode(machine: Machine) -> dict[str, Any]:
    return {"mode": machine.mode} if machine.mode else {}


def _flagged(compiled: Called) -> Called:
    """With the settings of Dynamo that `fpsc.compile` uses: both sides get the same."""
    return partial(_call_flagged, compiled)


def _call_flagged(compiled: Called, *args: Any, **kwargs: Any) -> Any:
    with torch._dynamo.config.patch(**FLAGS):
        return compiled(*args, **kwargs)


def _call_with(copy: nn.Module, attention: str, compiled: Called, *args: Any, **kwargs: Any) -> Any:
    with attention_backend(copy, attention):
        return compiled(*args, **kwargs)
