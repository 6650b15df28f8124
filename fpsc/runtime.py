"""State of a model: its policy on the device, its layers, and the noise row of this forward.

A model has one `ModelState`, however many graphs it was compiled into. Where a graph sees the
timestep it finds the row by itself; where it does not (blocks that are compiled one by one), a hook
on the root module writes it here before every forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fpsc import roots
from fpsc.grid import layout
from fpsc.kernels.rows import noise_level, noise_rows
from fpsc.kernels.select import fp8_support
from fpsc.options import Options
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy, find
from fpsc.policy.resolve import ROWS, Plan, Table, plan, resolve
from fpsc.report import Phase

TABLE_FIELDS = ("edges", "cells", "modes")


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
    """What the side channel knows of the running forward."""

    rows: Tensor | None = None
    grids: tuple[tuple[int, int, int], ...] = ()


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
        policy: what its attentions do.
        options: of the backend.
        convention: how its timestep becomes a noise level; None if unknown.
    """

    def __init__(
        self, root: nn.Module | None, policy: Policy, options: Options, convention: str | None
    ) -> None:
        self._root = weakref.ref(root) if root is not None else lambda: None
        self.policy = policy
        self.loaded = policy  # as the options gave it; `set_policy` may have replaced it since
        self.options = options
        self.convention = convention
        self.forward = Forward()
        self.version = 0
        self._layers = _Layers()
        self._tables: dict[tuple[int, torch.device, bool], DeviceTable] = {}
        self._plans: dict[tuple[Span, torch.device], DevicePlan] = {}
        self._used: Tensor | None = None
        self._last_timestep: Tensor | None = None
        self.unknown_layers = False
        self.saw_video = False  # in any of its graphs
        self._hook: Any = None

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
        return self._plans[key]

    def set_policy(self, policy: Policy) -> None:
        """Put another policy's numbers in place of this one's.

        Raises:
            StructureError: the policies differ in tile or in the kinds of kernel they need.
            PolicyError: a rule names a layer or head that this model does not have.
        """
        before, after = structure_of(self.policy), structure_of(policy)
        if before != after:
            changed = ", ".join(
                f"{name} (compiled with {before[name]}, now {after[name]})"
                for name in before
                if before[name] != after[name]
            )
            raise StructureError(
                f"policy {policy.name} differs in structure from {self.policy.name}: {changed}; "
                "compile the model again with it (torch._dynamo.reset(), then torch.compile)"
            )
        fresh = {
            key: resolve(policy, layers=self.layers, heads=key[0], fp8=key[2])
            for key in self._tables
        }
        self.policy = policy
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
        forward = Forward()
        latent = roots.latent_of(arguments)
        if latent is not None:
            forward.grids = tuple(roots.latent_grids(root, latent))
        name = roots.timestep_argument(root, self.options.timestep.argument)
        timestep = arguments.get(name) if name else None
        if isinstance(timestep, int | float):
            device = latent.device if latent is not None else None
            timestep = torch.tensor([float(timestep)], device=device)
        if isinstance(timestep, Tensor) and self.convention is not None and self._tables:
            edges = next(iter(self._tables.values())).edges.to(timestep.device)
            forward.rows = noise_rows(timestep.detach(), edges, self.convention)
            self.count(forward.rows, timestep)
        self.forward = forward

    def install_hook(self) -> None:
        """Observe every forward of the root from now on."""
        root = self.root
        if root is None or self._hook is not None:
            return
        state = weakref.ref(self)

        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            # Under a compile of the whole model the graph finds the row by itself.
            if torch.compiler.is_compiling():
                return
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
        return self.forward.grids, "latent" if self.forward.grids else ""

    def grid_for(self, tokens: int) -> tuple[int, int, int] | None:
        """The grid of this forward that has a number of tokens, or None."""
        grids, _ = self.hints()
        return next((g for g in grids if g[0] * g[1] * g[2] == tokens), None)

    def fallback_rows(self, table: DeviceTable) -> Tensor:
        """The densest row, for forwards whose noise level is not known."""
        return torch.full((1,), table.table.densest, dtype=torch.int32, device=table.edges.device)

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
    }


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
        _by_weight[weight] = state


def state_of_root(root: nn.Module) -> ModelState | None:
    return _by_root.get(root)


def remember_root(root: nn.Module, state: ModelState) -> None:
    _by_root[root] = state


def states_in(model: nn.Module) -> list[ModelState]:
    """States of a model and of the models inside it."""
    inner = getattr(model, "_orig_mod", model)
    return [_by_root[m] for m in inner.modules() if m in _by_root]


def set_policy(model: nn.Module, policy: Policy | str) -> None:
    """Give a compiled model another policy; seen by its next forward, without recompiling.

    Args:
        model: a model that was compiled with this backend and has run, or a module around it.
        policy: a policy, or a built-in name or path.

    Raises:
        ValueError: the model was not compiled with this backend.
        StructureError: the policy differs in structure; the model must be compiled again.
        PolicyError: the policy cannot be read, or names a layer or head that the model lacks.
    """
    loaded = policy if isinstance(policy, Policy) else find(policy)
    states = states_in(model)
    if not states:
        raise ValueError(
            f"{type(model).__name__} has not run with backend='fpsattn' yet; compile it and run it "
            "once, or name the policy in the options"
        )
    for state in states:
        state.set_policy(loaded)
