"""A rewritten and compiled graph, called with what its sites need: rows, table, lists.

Runs before every call of a compiled graph, so it only looks things up; nothing is read from the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils.weak import WeakTensorKeyDictionary

from fpsc import roots, runtime
from fpsc.choice import Choice
from fpsc.passes.graph import Dim, Program, example, is_parameter, shape
from fpsc.passes.infer_grid import Found
from fpsc.passes.rewrite import PLAN, PREFIX, Rewritten
from fpsc.policy.resolve import GROUPINGS, MODES, PATTERNS, ROWS
from fpsc.recompute import in_backward
from fpsc.report import Report, log, record
from fpsc.roots import RunningModule
from fpsc.runtime import Forward, ModelState, Span, StructureError

_DYNAMIC = 5
"""Hint for sizes that differ between models and grids; 0 and 1 would be specialised."""


@dataclass
class _Bound:
    """What a graph needs of one model and one set of layers."""

    version: int
    cells: Tensor


class Launcher:
    """Calls a compiled graph; finds out which model and which layers it is called for.

    Args:
        rewritten: the graph, and what it needs.
        program: the graph before rewriting.
        state: the model that it was compiled for. Other models may share the compiled code.
        timestep: position of the timestep among the inputs, or None.
        report: whose summary is logged after the first call.
    """

    def __init__(
        self,
        rewritten: Rewritten,
        program: Program,
        state: ModelState,
        timestep: fx.Node | None,
        report: Report,
    ) -> None:
        self.rewritten = rewritten
        self.state = state
        self.report = report
        self._chosen = state.chosen
        self.structure = state.structure
        self.compiled: Callable[..., Any] | None = None
        placeholders = program.placeholders
        self._timestep = placeholders.index(timestep) if timestep is not None else None
        self._weights = [t.weight.position if t.weight else None for t in rewritten.targets]
        self._symbols = _symbol_positions(placeholders)
        self._activations = [
            position
            for position, node in enumerate(placeholders)
            if not is_parameter(node) and isinstance(example(node), torch.Tensor)
        ]
        first = rewritten.targets[0].candidate
        query, sizes = example(first.call.query), shape(first.call.query)
        assert isinstance(query, torch.Tensor) and sizes is not None
        self._tokens = [_tokens_of(rewritten, found) for found in rewritten.spans]
        self._heads = int(query.shape[1])
        self._batch = first.element.batch if first.element else sizes[0]
        self._device = query.device
        self._bound = WeakTensorKeyDictionary()
        self._unbound: _Bound | None = None
        self._first = True

    def __call__(self, *args: Any) -> Any:
        assert self.compiled is not None
        state = self._state(args)
        if state.structure != self.structure:
            raise StructureError(
                f"fpsattn: this code was compiled for {self.structure}, and the policy of the "
                f"model now has {state.structure}; torch._dynamo.reset() compiles it again"
            )
        outputs = self.compiled(*args, *self._tables(state, args))
        if self.rewritten.returns_rows:
            *outputs, rows = outputs
            assert self._timestep is not None
            state.count(rows, args[self._timestep])
            state.forward.rows = rows  # for graphs that follow in this forward
        if self._first:
            self._first = False
            log.info("fpsc: %s", self.report.summary())
        return tuple(outputs)

    # ---- for the first compilation

    def prepare(self) -> None:
        """Resolve the policy for this model, so that its errors come at compile time."""
        self.state.table(self._heads, self._device)

    def example_inputs(self, fake_mode: FakeTensorMode) -> list[Tensor]:
        """Fake tensors for the appended inputs; sizes that policy or grid decide are dynamic."""
        return [self._example(name, fake_mode) for name in self.rewritten.inputs]

    def _example(self, name: str, fake_mode: FakeTensorMode) -> Tensor:
        if name == "rows" and self._is_known(self._batch) and not isinstance(self._batch, int):
            # Had they a size of their own, backward would not know that it is that of q.
            assert fake_mode.shape_env is not None
            batch = fake_mode.shape_env.create_symintnode(self._batch, hint=None)
            with fake_mode:
                return torch.empty((batch,), dtype=torch.int32, device=self._device)
        sizes: dict[str, tuple[list[int], list[int]]] = {  # shape, dynamic axes
            "edges": ([ROWS], []),
            "rows": ([self._batch], []) if isinstance(self._batch, int) else ([_DYNAMIC], [0]),
            "cells": ([len(self._weights), ROWS, self._heads], []),
            "modes": ([MODES, 3], []),
            "list_ptr": ([PATTERNS, _DYNAMIC], [1]),
            "list_idx": ([_DYNAMIC], [0]),
            "back_ptr": ([PATTERNS, _DYNAMIC], [1]),
            "back_idx": ([_DYNAMIC], [0]),
            "order": ([PATTERNS, _DYNAMIC], [1]),
            "groups": ([GROUPINGS, _DYNAMIC], [1]),
            "gather": ([_DYNAMIC, 128], [0]),
            "valid": ([_DYNAMIC], [0]),
            "span": ([4], []),
        }
        kind = name.partition(".")[0]
        shape, dynamic = sizes[kind]
        dtype = {"edges": torch.float32, "span": torch.int64}.get(kind, torch.int32)
        device = torch.device("cpu") if kind == "span" else self._device
        axes = [
            DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC
            for axis in range(len(shape))
        ]
        return fake_mode.from_tensor(
            torch.empty(shape, dtype=dtype, device=device),
            source=ConstantSource(PREFIX + name.replace(".", "_")),
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=axes, constraint_sizes=[None] * len(shape)
            ),
        )

    # ---- for every call

    def _state(self, args: Sequence[Any]) -> ModelState:
        """The model that this call belongs to: known by a weight among the inputs."""
        position = self._weights[0]
        if position is None:
            return self.state
        weight = args[position]
        state = runtime.state_of(weight)
        if state is None:
            state = self._adopt(weight, [args[p] for p in self._weights if p is not None])
        return state

    def _adopt(self, weight: Tensor, weights: Sequence[Tensor]) -> ModelState:
        """State for a model that shares compiled code, or whose parameters were replaced."""
        root = roots.root_holding(weight)
        if root is None:
            return self.state
        state, fresh = _state_like(self.state, self._chosen, root.module)
        runtime.remember(weights, state)
        state.table(self._heads, self._device)
        if fresh:
            adopted = replace(self.report, model=type(root.module).__name__)
            adopted.attach(state)
            record(adopted)
            if not self.rewritten.returns_rows:
                self.follow(root, state)
        return state

    def follow(self, root: RunningModule, state: ModelState | None = None) -> None:
        """Let timestep and grid come from every forward of the root, and from the one that runs."""
        state = state or self.state
        if root.called and not state.hooked:
            state.install_hook()
            if root.args is not None:
                state.observe(root.args, root.kwargs)
                # A reentrant checkpoint has turned gradients off here, inside of the forward.
                state.forward.differentiated = True

    def _forward(self, state: ModelState, args: Sequence[Any]) -> Forward:
        """The forward that a call belongs to: the running one, or an earlier one in backward.

        Raises:
            RuntimeError: backward computes a block again, and its forward is not known.
        """
        if in_backward():
            inputs = [args[p] for p in self._activations]
            found = state.pins.find(inputs) if state.hooked else state.forward
            if found is None:
                raise RuntimeError(
                    "fpsattn: backward computes a block again, and nothing tells which forward it "
                    "belongs to, so its noise level is not known. Checkpoint the blocks with "
                    "torch.utils.checkpoint and leave their inputs on the device, or compile the "
                    "whole model: torch.compile(model, backend='fpsattn')"
                )
            return found
        if state.forward.differentiated:
            state.pins.pin([args[p] for p in self._activations], state.forward)
        return state.forward

    def layers(self, args: Sequence[Any]) -> list[int | None]:
        """The layer of each site of a call with these arguments; None where it is not known."""
        state = self._state(args)
        return [None if p is None else state.layer_of(args[p]) for p in self._weights]

    def tables(self, args: Sequence[Any]) -> list[Tensor]:
        """The inputs that are appended for a call with these arguments."""
        return self._tables(self._state(args), args)

    def _tables(self, state: ModelState, args: Sequence[Any]) -> list[Tensor]:
        bound = self._bind(state, args)
        table = state.table(self._heads, self._device)
        tensors = {"edges": table.edges, "cells": bound.cells, "modes": table.modes}
        forward = state.forward if self.rewritten.returns_rows else self._forward(state, args)
        if not self.rewritten.returns_rows:
            rows = state.rows(forward, table)
            batch = self._value(self._batch, args) if self._is_known(self._batch) else len(rows)
            tensors["rows"] = rows.expand(batch) if len(rows) == 1 else rows
        for index, found in enumerate(self.rewritten.spans):
            grid = self._grid(state, forward, found, args)
            if found.in_graph:
                tensors[f"span.{index}"] = torch.tensor([state.number, *grid])
                continue
            span = Span(grid, self._value(found.prefix, args), self._value(found.suffix, args))
            self._check(span, index, args)
            plan = state.plan(span, self._device)
            tensors.update({f"{name}.{index}": plan.tensors[name] for name in PLAN})
        return [tensors[name] for name in self.rewritten.inputs]

    def _bind(self, state: ModelState, args: Sequence[Any]) -> _Bound:
        position = self._weights[0]
        held = self._bound.get(args[position]) if position is not None else self._unbound
        table = state.table(self._heads, self._device)
        if held is not None and held.version == state.version:
            return held
        layers = self.layers(args)
        held = _Bound(state.version, _cells_of(table, layers))
        state.unknown_layers = None in layers
        if position is None:
            self._unbound = held
        else:
            self._bound[args[position]] = held
        return held

    def _grid(
        self, state: ModelState, forward: Forward, found: Found, args: Sequence[Any]
    ) -> tuple[int, int, int]:
        if found.origin != "latent":
            t, y, x = (self._value(size, args) for size in found.grid)
            return t, y, x
        # The graph does not hold the grid: another one may have as many tokens.
        tokens, grids = self._value(found.tokens, args), state.grids(forward)
        for grid in grids:
            if math.prod(grid) == tokens:
                return grid
        raise RuntimeError(
            f"fpsattn: this attention has {tokens} video tokens, and the latent of this forward "
            f"gives grid {[list(g) for g in grids] or 'none'}; call the model through its root "
            'module, or state options={"grid": [T, Y, X]}'
        )

    def _check(self, span: Span, index: int, args: Sequence[Any]) -> None:
        """On a GPU nothing else would see that a grid is not that of the sequence."""
        for size in self._tokens[index]:
            tokens = self._value(size, args)
            if tokens != span.tokens:
                raise ValueError(
                    f"fpsattn: grid {list(span.grid)} with {span.prefix} + {span.suffix} text "
                    f"tokens makes {span.tokens} tokens, and this attention has {tokens}; state "
                    'the right one with options={"grid": [T, Y, X]}'
                )

    def _is_known(self, size: Dim) -> bool:
        """Whether a size can be read from the inputs."""
        return isinstance(size, int) or size.free_symbols <= self._symbols.keys()

    def _value(self, size: Dim, args: Sequence[Any]) -> int:
        if isinstance(size, int):
            return size
        values = {}
        for symbol in size.free_symbols:
            position, axis = self._symbols[symbol]
            values[symbol] = int(args[position] if axis is None else args[position].size(axis))
        return int(size.xreplace(values))


class Observer:
    """Calls a compiled graph with which a forward begins, and notes what it is given.

    Graphs after a break of the graph have neither the latent nor the timestep among their inputs.

    Args:
        compiled: the graph.
        state: the model that it was compiled for. Other models may share the compiled code.
        latent, timestep: positions among the inputs, or None.
        weight: position of a parameter, by which the model is known; None if there is none.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        state: ModelState,
        latent: int | None,
        timestep: int | None,
        weight: int | None,
    ) -> None:
        self.compiled = compiled
        self._positions = latent, timestep, weight
        self._state = state
        self._chosen = state.chosen
        self._states = WeakTensorKeyDictionary()

    def __call__(self, *args: Any) -> Any:
        latent, timestep, weight = (None if p is None else args[p] for p in self._positions)
        self._state_for(weight).see(latent, timestep)
        return self.compiled(*args)

    def _state_for(self, weight: Tensor | None) -> ModelState:
        if weight is None:
            return self._state
        state = self._states.get(weight)
        if state is None:
            root = roots.root_holding(weight)
            state = _state_like(self._state, self._chosen, root.module)[0] if root else self._state
            self._states[weight] = state
        return state


def _state_like(own: ModelState, chosen: Choice, module: nn.Module) -> tuple[ModelState, bool]:
    """The state of a model that shares compiled code with another one, and whether it is new.

    Args:
        own: state of the model that the code was compiled for.
        chosen: the policy that it had then.
    """
    state = runtime.state_of_root(module)
    if state is not None:
        return state, False
    # `set_policy` may since have given the other model a policy that this code is not for.
    serves = own.structure == runtime.structure_text(chosen.policy)
    state = ModelState(module, own.chosen if serves else chosen, own.options, own.convention)
    runtime.remember_root(module, state)
    return state, True


def _cells_of(table: runtime.DeviceTable, layers: Sequence[int | None]) -> Tensor:
    """int32 [len(layers), ROWS, H]: rows of these layers; for an unknown one its densest row."""
    cells = table.cells
    known = [layer for layer in layers if layer is not None]
    first = known[0] if known else 0
    if known == list(layers) == list(range(first, first + len(layers))):
        return cells[first : first + len(layers)]  # a view: edits of the table reach it
    dense = cells[:, table.table.densest]
    fallback = dense[:1].unsqueeze(1).expand(1, cells.shape[1], cells.shape[2])
    return torch.cat([fallback if i is None else cells[i : i + 1] for i in layers])


def _tokens_of(rewritten: Rewritten, found: Found) -> set[Dim]:
    """Lengths of the sequences that have a span."""
    queries = [t.candidate.call.query for t in rewritten.targets if t.found == found]
    return {size[2] for size in map(shape, queries) if size is not None}


def _symbol_positions(
    placeholders: Sequence[fx.Node],
) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where every symbol of a graph can be read: an input, and the axis of a tensor."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, node in enumerate(placeholders):
        value = example(node)
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
        for axis, size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, (position, axis))
    return found
