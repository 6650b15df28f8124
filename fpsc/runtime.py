"""State of a model: its policy on the device, its layers, and the noise row of this forward.

A model has one `ModelState`, however many graphs it was compiled into. Where a graph sees the
timestep it finds the row by itself; where it does not (blocks that are compiled one by one), a hook
on the root module writes it here before every forward.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fpsc import roots
from fpsc.choice import Choice, for_component
from fpsc.grid import Layout, layout
from fpsc.kernels import spans
from fpsc.kernels.rows import noise_level, noise_rows
from fpsc.kernels.select import fp8_support
from fpsc.options import Options
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy, find
from fpsc.policy.lookup import hub_id_of
from fpsc.policy.resolve import ROWS, Plan, Table, plan, resolve
from fpsc.recompute import Pins
from fpsc.report import Phase, Site

TABLE_FIELDS = ("edges", "cells", "modes")
PLANS = 64
"""Plans that a model keeps: there is one for every grid and every length of text."""


class StructureError(ValueError):
    """A policy differs from the compiled one in its structure, not only in its numbers."""


@dataclass(frozen=True)
class Span:
    """A video span in a sequence: grid (T, Y, X), and text tokens before and after it."""

    grid: tuple[int, int, int]
    prefix: int = 0
    suffix: int = 0

    @property
    def tokens(self) -> int:
        t, y, x = self.grid
        return t * y * x + self.prefix + self.suffix


@dataclass
class DeviceTable:
    """A resolved policy on a device; its tensors keep their addresses for as long as it lives."""

    table: Table
    edges: Tensor
    cells: Tensor
    modes: Tensor


@dataclass
class DevicePlan:
    """A policy's lists for a span, on a device."""

    plan: Plan
    tensors: dict[str, Tensor]


@dataclass
class Forward:
    """What the side channel knows of a forward.

    Attributes:
        latent: shape of the video latent.
        timestep: as the model was given it.
        rows: noise rows, int32 [B], once a graph has asked for them.
        differentiated: whether its blocks may be computed again, in backward.
    """

    latent: torch.Size | None = None
    timestep: Tensor | None = None
    rows: Tensor | None = None
    differentiated: bool = False


@dataclass
class _Layers:
    """Weights that stand for layers, in the order in which the model defines them."""

    number_of: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    patterns: set[tuple[str, ...]] = field(default_factory=set)
    count: int = 0


class ModelState:
    """Policy, tables and layers of one model.

    Args:
        root: the model; None when a graph belongs to no module.
        chosen: what its attentions do, and where that comes from.
        options: of the backend.
        convention: how its timestep becomes a noise level; None if unknown.
    """

    def __init__(
        self, root: nn.Module | None, chosen: Choice, options: Options, convention: str | None
    ) -> None:
        self._root = weakref.ref(root) if root is not None else lambda: None
        self.chosen = chosen
        self.loaded = chosen.policy  # `set_policy` may have given it another one since
        self.structure = structure_text(chosen.policy)
        self.options = options
        self.convention = convention
        self.forward = Forward()
        self.pins: Pins[Forward] = Pins()
        self.version = 0
        self._layers = _Layers()
        self._tables: dict[tuple[int, torch.device, bool], DeviceTable] = {}
        self._plans: OrderedDict[tuple[Span, torch.device], DevicePlan] = OrderedDict()
        self._grids: dict[torch.Size, tuple[tuple[int, int, int], ...]] = {}
        self.number = spans.register(self)  # by which a graph names this model
        self._used: Tensor | None = None
        self._last_timestep: Tensor | None = None
        self.unknown_layers = False
        self.saw_video = False  # in any of its graphs
        self._hook: Any = None

    @property
    def policy(self) -> Policy:
        return self.chosen.policy

    @property
    def origin(self) -> str:
        """Where the policy comes from, in words."""
        return self.chosen.origin

    @property
    def notes(self) -> list[str]:
        return self.chosen.notes

    @property
    def root(self) -> nn.Module | None:
        return self._root()

    # ---- layers

    def add_layers(self, weights: Sequence[Tensor]) -> None:
        """Make weights known as layers, one for every site of a graph.

        A weight also stands for its siblings in the model, which differ only in the index into a
        list of modules (`blocks.0.attn1.to_q.weight`, `blocks.1...`), because a graph may hold one
        block of many. Layers are numbered in the order in which the model defines them.
        """
        names = {id(p): name for name, p in self._named_tensors()}
        for weight in weights:
            if id(weight) in names:
                self._layers.patterns.add(self._wildcard(names[id(weight)]))
            elif weight not in self._layers.number_of:
                self._layers.number_of[weight] = self._layers.count
                self._layers.count += 1
        if self._layers.patterns:
            self.refresh_layers()

    def refresh_layers(self) -> None:
        """Look the layers up again: parameters may have been replaced (offload, quantisation)."""
        layers = self._layers
        found = [
            parameter
            for name, parameter in self._named_tensors()
            if any(_fits(name.split("."), pattern) for pattern in layers.patterns)
        ]
        layers.number_of = WeakTensorKeyDictionary()
        for number, parameter in enumerate(found):
            layers.number_of[parameter] = number
        if len(found) != layers.count:
            layers.count = len(found)
            self._tables.clear()
            self.version += 1

    def layer_of(self, weight: Tensor) -> int | None:
        """Number of the layer that a weight belongs to, or None."""
        number = self._layers.number_of.get(weight)
        if number is None and self.root is not None and self._layers.patterns:
            self.refresh_layers()
            number = self._layers.number_of.get(weight)
        return number

    @property
    def layers(self) -> int:
        return max(self._layers.count, 1)

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        root = self.root
        if root is None:
            return []
        return [*root.named_parameters(), *root.named_buffers()]

    def _wildcard(self, name: str) -> tuple[str, ...]:
        """A parameter's name with `*` for every index into a list of modules."""
        parts, module = [], self.root
        for part in name.split("."):
            is_list = isinstance(module, nn.ModuleList | nn.Sequential)
            parts.append("*" if is_list and part.isdigit() else part)
            module = getattr(module, part, None) if isinstance(module, nn.Module) else None
        return tuple(parts)

    # ---- tables and plans

    def runs_fp8(self, device: torch.device) -> bool:
        """Whether fp8 cells run as such on a device; if not, they run in the input's dtype."""
        wanted = device.type != "cpu" or self.options.emulate_fp8
        return wanted and fp8_support(device)[0]

    def table(self, heads: int, device: torch.device) -> DeviceTable:
        """The policy's table for this model on a device.

        Raises:
            PolicyError: a rule names a layer or head that this model does not have.
        """
        fp8 = self.runs_fp8(device)
        key = (heads, device, fp8)
        if key not in self._tables:
            with torch.inference_mode(False):
                table = resolve(self.policy, layers=self.layers, heads=heads, fp8=fp8)
                held = [getattr(table, n).to(device, copy=True) for n in TABLE_FIELDS]
            self._tables[key] = DeviceTable(table, *held)
        return self._tables[key]

    def plan(self, span: Span, device: torch.device) -> DevicePlan:
        """The policy's lists for a span on a device."""
        key = (span, device)
        if key not in self._plans:
            tile = self.policy.tile_for(span.grid)
            with torch.inference_mode(False):
                made = plan(self.policy, layout(span.grid, tile, span.prefix, span.suffix))
                tensors = {name: getattr(made, name).to(device) for name in PLAN}
            self._plans[key] = DevicePlan(made, tensors)
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    @property
    def layouts(self) -> list[Layout]:
        """The tiles of every span that was laid out and is still held."""
        return [held.plan.layout for held in self._plans.values()]

    def lists(
        self, grid: tuple[int, int, int], prefix: int, suffix: int, device: torch.device
    ) -> list[Tensor]:
        """The tables of a span, in the order of `PLAN`, for graphs that look them up."""
        tensors = self.plan(Span(grid, prefix, suffix), device).tensors
        return [tensors[name] for name in PLAN]

    def take(self, chosen: Choice) -> None:
        """Put a policy that was found again, and says other numbers now, in place of this one's."""
        self.loaded = chosen.policy
        self.set_policy(chosen)

    def check_policy(self, policy: Policy, recompile: bool) -> None:
        """Whether `set_policy` will work; changes nothing.

        Raises:
            StructureError: without `recompile`, the policies differ in their structure.
            PolicyError: a rule names a layer or head that this model does not have.
        """
        before, after = structure_of(self.policy), structure_of(policy)
        if before != after and not recompile:
            changed = ", ".join(
                f"{name} (compiled with {before[name]}, now {after[name]})"
                for name in before
                if before[name] != after[name]
            )
            raise StructureError(
                f"policy {policy.name} differs in structure from {self.policy.name}: {changed}; "
                "set_policy(model, policy, recompile=True) compiles the model again at its next "
                "call"
            )
        for heads, _, fp8 in self._tables:
            resolve(policy, layers=self.layers, heads=heads, fp8=fp8)

    def set_policy(self, chosen: Choice) -> None:
        """Put another policy in place of this one.

        Other numbers are there at the next forward. With another structure the model's compiled
        code is out of date: its guard fails (`fpsc.guard`), and the model is compiled again.

        Raises:
            PolicyError: a rule names a layer or head that this model does not have.
        """
        fresh = {
            key: resolve(chosen.policy, layers=self.layers, heads=key[0], fp8=key[2])
            for key in self._tables
        }
        self.chosen = chosen
        self.structure = structure_text(chosen.policy)
        for key, table in fresh.items():
            held = self._tables[key]
            held.table = table
            for name in TABLE_FIELDS:
                getattr(held, name).copy_(getattr(table, name))
        self._plans.clear()
        if self._used is not None:
            self._used.zero_()
        self.version += 1

    # ---- the side channel

    def observe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take timestep and latent from the arguments of the root's forward."""
        root = self.root
        if root is None:
            return
        arguments = roots.bind(root, args, kwargs)
        name = roots.timestep_argument(root, self.options.timestep.argument)
        self.see(roots.latent_of(arguments), arguments.get(name) if name else None)

    def see(self, latent: Tensor | None, timestep: object) -> None:
        """A forward begins, with this latent and this timestep (a tensor or a number)."""
        if isinstance(timestep, int | float):
            device = latent.device if latent is not None else None
            timestep = torch.tensor([float(timestep)], device=device)
        self.pins.sweep()
        self.forward = Forward(
            latent.shape if latent is not None else None,
            timestep.detach() if isinstance(timestep, Tensor) else None,
            differentiated=torch.is_grad_enabled(),
        )

    def rows(self, forward: Forward, table: DeviceTable) -> Tensor:
        """Rows of a forward; its policy's densest one where the noise is not known."""
        device = table.edges.device
        if forward.rows is None:
            if forward.timestep is None or self.convention is None:
                return torch.full((1,), table.table.densest, dtype=torch.int32, device=device)
            timestep = forward.timestep.to(device)
            forward.rows = noise_rows(timestep, table.edges, self.convention)
            self.count(forward.rows, timestep)
        return forward.rows.to(device)

    @property
    def hooked(self) -> bool:
        """Whether every forward of the root is observed."""
        return self._hook is not None

    def install_hook(self) -> None:
        """Observe every forward of the root from now on."""
        root = self.root
        if root is None or self.hooked:
            return
        state = weakref.ref(self)

        @torch.compiler.disable(reason="fpsattn reads the timestep in a hook of the model here")
        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            this = state()
            if this is not None:
                this.observe(args, kwargs)

        self._hook = root.register_forward_pre_hook(before_forward, with_kwargs=True)

    def remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def hints(self) -> tuple[tuple[tuple[int, int, int], ...], str]:
        """Grids that this forward can have, and where that is known from."""
        if self.options.grid is not None:
            return (self.options.grid,), "options"
        grids = self.grids(self.forward)
        return grids, "latent" if grids else ""

    def grids(self, forward: Forward) -> tuple[tuple[int, int, int], ...]:
        """(T, Y, X) that the latent of a forward can have."""
        root, shape = self.root, forward.latent
        if root is None or shape is None:
            return ()
        if shape not in self._grids:
            self._grids[shape] = tuple(roots.latent_grids(root, shape))
        return self._grids[shape]

    # ---- what was used

    def count(self, rows: Tensor, timestep: Tensor | None) -> None:
        """Note which rows a forward used; nothing is read from the device."""
        if self._used is None or self._used.device != rows.device:
            with torch.inference_mode(False):
                self._used = torch.zeros(ROWS, dtype=torch.int64, device=rows.device)
        self._used.index_add_(0, rows.long(), torch.ones_like(rows, dtype=torch.int64))
        if timestep is not None:
            self._last_timestep = timestep.detach().clone()

    def phases(self) -> list[Phase]:
        """The rows of the table with their keep and use. Reads a counter from the device."""
        if not self._tables:
            return []
        table = next(iter(self._tables.values())).table
        used = self._used.tolist() if self._used is not None else [0] * ROWS
        keep = self._mean_keep(table)
        names = [
            [table.mode_names[m] for m in table.cells[:, row].flatten().tolist()]
            for row in range(table.n_rows)
        ]
        return [
            Phase(
                noise=(float(interval.hi), float(interval.lo)),
                modes=tuple(sorted(set(names[row]), key=lambda n: -names[row].count(n))),
                keep=keep[row],
                forwards=used[row],
            )
            for row, interval in enumerate(table.noise_ranges)
        ]

    def keep_now(self) -> tuple[float, float] | None:
        """Noise level of the last forward and mean keep there; reads the timestep from the
        device."""
        if self._last_timestep is None or self.convention is None or not self._tables:
            return None
        table = next(iter(self._tables.values())).table
        noise = float(noise_level(self._last_timestep, self.convention)[0])
        return noise, self._mean_keep(table)[table.row_of(noise)]

    def _mean_keep(self, table: Table) -> list[float]:
        plans = list(self._plans.values())
        return table.keep(plans[0].plan) if plans else [1.0] * table.n_rows


def structure_of(policy: Policy) -> dict[str, object]:
    """What compiled code depends on; everything else in a policy is data."""
    return {
        "tile": policy.tile,
        "dtypes": sorted({mode.dtype for mode in policy.modes.values()}),
        "limits.min_tokens": policy.limits.min_tokens,
        "roles": sorted(policy.roles),
    }


def structure_text(policy: Policy) -> str:
    """The structure of a policy as text, which is quickly compared."""
    return ", ".join(f"{name} {value}" for name, value in structure_of(policy).items())


def mismatches(state: ModelState, policy: Policy, sites: Sequence[Site] = ()) -> list[str]:
    """One line for each thing that is not what a policy says, under `for`, that it was tuned on."""
    grids = [site.grid for site in sites if site.replaced and site.grid]
    grids += [span.grid for span, _ in state._plans]
    known = next((g for g in grids if all(isinstance(n, int) for n in g)), None)
    grid = [int(n) for n in known] if known else None
    return [f"for.{line}" for line in policy.mismatches(model=hub_id_of(state.root), grid=grid)]


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(
        p in ("*", n) for n, p in zip(name, pattern, strict=True)
    )


# ---- all models of this process

_by_root: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
_by_weight = WeakTensorKeyDictionary()


def state_of(weight: Tensor) -> ModelState | None:
    """The state of the model that a weight belongs to, if that model was seen before."""
    return _by_weight.get(weight)


def remember(weights: Sequence[Tensor], state: ModelState) -> None:
    """Make the weights in front of the sites of a graph known as layers of a model."""
    state.add_layers(weights)
    for weight in weights:
        recognise(weight, state)


def recognise(weight: Tensor, state: ModelState) -> None:
    """Make a weight known as one of a model."""
    _by_weight[weight] = state


def state_of_root(root: nn.Module) -> ModelState | None:
    return _by_root.get(root)


def remember_root(root: nn.Module, state: ModelState) -> None:
    _by_root[root] = state


def states_in(model: nn.Module) -> list[ModelState]:
    """States of a model and of the models inside it."""
    inner = getattr(model, "_orig_mod", model)
    return [_by_root[m] for m in inner.modules() if m in _by_root]


def set_policy(model: nn.Module, policy: Policy | str, recompile: bool = False) -> None:
    """Give a compiled model another policy; seen by its next forward.

    Other numbers (keep, windows, patterns, ranges, rules) recompile nothing. Where the model, or
    its grid, is not what the policy names under `for`, a warning says so.

    Args:
        model: a model that was compiled with this backend and has run, or a module around it.
        policy: a policy, or a built-in name, path or hub id.
        recompile: accept a policy of another structure (tile, dtypes, roles, limits.min_tokens):
            the model is compiled again at its next call. Other models keep their compiled code.

    Raises:
        ValueError: the model was not compiled with this backend.
        StructureError: the policy differs in structure, and `recompile` is not set.
        PolicyError: the policy cannot be read, or names a layer or head that the model lacks.
    """
    loaded = find(policy)
    states = _states_that_ran(model)
    choices = [
        Choice(*for_component(loaded, state.root, state.options.component, "given to set_policy"))
        for state in states
    ]
    for state, chosen in zip(states, choices, strict=True):  # before any of them changes
        state.check_policy(chosen.policy, recompile)
    for state, chosen in zip(states, choices, strict=True):
        for line in [*chosen.notes, *mismatches(state, chosen.policy)]:
            warn(f"fpsattn: {line}", UserWarning, 2)
        state.set_policy(chosen)


def save_policy(
    model: nn.Module, folder: str | os.PathLike[str], policy: Policy | str | None = None
) -> Path:
    """Save a policy beside the weights of a model, where the backend finds it.

    Args:
        model: a model; without `policy`, one that was compiled with this backend and has run.
        folder: what `model.save_pretrained` was given.
        policy: None saves the one that the model has now.

    Returns:
        The path of the file, `fpsc-policy.yaml`.

    Raises:
        ValueError: the model has no policy yet, or several.
        PolicyError: the policy cannot be read.
    """
    if policy is not None:
        return find(policy).save_beside(folder)
    found = [state.policy for state in _states_that_ran(model)]
    if any(not other.same_as(found[0]) for other in found):
        names = ", ".join(p.name for p in found)
        raise ValueError(f"the models in it have different policies ({names}); save each by itself")
    return found[0].save_beside(folder)


def _states_that_ran(model: nn.Module) -> list[ModelState]:
    states = states_in(model)
    if not states:
        raise ValueError(
            f"{type(model).__name__} has not run with backend='fpsattn' yet; compile it and run it "
            "once, or name the policy in the options"
        )
    return states
