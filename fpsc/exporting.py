"""`fpsc.export`: the rewritten model as an ExportedProgram, for AOTInductor and for storage.

The program holds `fpsc::attention` and the policy's table and lists as buffers (`fpsc_cells`, ...).
Like every exported program without dynamic shapes it is for inputs of one shape, hence one grid;
the noise row still comes from the timestep of every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fpsc import backend
from fpsc.options import Options, parse
from fpsc.policy import Policy
from fpsc.unseen import FLAGS


class ExportError(RuntimeError):
    """A model cannot be exported with its attentions replaced."""


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    policy: str | os.PathLike[str] | Policy | None = None,
    options: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Export a video transformer with its 3D self-attentions replaced.

    The program takes and returns what the model does, on the device of the arguments, and needs
    `import fpsc.kernels.ops` where it is loaded.

    Args:
        args, kwargs: of one call of the model; it is called once.
        policy: a built-in name, the path of a file or a `Policy`; if None the one beside the
            weights, or the preset of the model's family.
        options: of the backend (`fpsc.options.Options`).

    Raises:
        ExportError: the model is not one graph, nothing in it was replaced, or lengths in it depend
            on data; says what to do.
        OptionError, PolicyError, StrictError: as `torch.compile` with this backend.
    """
    given = {**(options or {})}
    if policy is not None:
        given["policy"] = policy
    capture = _Capture(parse(None, given))
    # Not `model` itself: it may be compiled already.
    compiled = torch.compile(model._call_impl, backend=capture, fullgraph=True, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(**FLAGS):
        try:
            outputs = compiled(*args, **(kwargs or {}))
        except torch._dynamo.exc.Unsupported as error:
            raise ExportError(
                f"{type(model).__name__} is not one graph, and only one can be exported: "
                f"{str(error).splitlines()[0]}"
            ) from error
        call = capture.call
        if call is None:
            raise ExportError(
                f"{type(model).__name__}: no attention in it was replaced; fpsc.reports() says why"
            )
        if capture.timed and "rows" in call.tables:
            raise ExportError(
                f"{type(model).__name__}: the timestep is not a tensor among the arguments, and "
                "one noise level would be written into the program; pass it as a tensor"
            )
        program = _Program(model, call, (args, dict(kwargs or {})), outputs)
        return torch.export.export(program, args, dict(kwargs or {}), strict=False)


@dataclass
class _Call:
    """A rewritten graph, and what it was called with and returned.

    Attributes:
        tables: its last inputs, by name.
        outputs: what the graph before rewriting returned.
    """

    graph: fx.GraphModule
    inputs: Sequence[Any]
    tables: dict[str, Tensor]
    outputs: Sequence[Any] = ()


@dataclass
class _Capture:
    """A backend that keeps the rewritten graph, and runs it as it is.

    Attributes:
        timed: whether the convention of the model's timestep is known.
    """

    options: Options
    call: _Call | None = None
    timed: bool = False

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        launcher = backend.rewrite_graph(gm, example_inputs, self.options)
        if launcher is None:
            return gm.forward
        graph = launcher.rewritten.module
        self.timed = launcher.state.convention is not None

        def run(*inputs: Any) -> Any:
            tables = dict(zip(launcher.rewritten.inputs, launcher.tables(inputs), strict=True))
            outputs = graph(*inputs, *tables.values())
            if launcher.rewritten.returns_rows:
                outputs = outputs[:-1]
            self.call = _Call(graph, inputs, tables, outputs)
            return outputs

        return run


class _Program(nn.Module):
    """A rewritten graph in the shape of the model: same weights by the same names, same call.

    Dynamo made the model's weights, and the tensors of a call, inputs of the graph; they are told
    apart by identity.
    """

    def __init__(
        self, model: nn.Module, call: _Call, arguments: tuple[Any, ...], outputs: Any
    ) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, table in call.tables.items():
            self.register_buffer(_buffer(name), table.clone())
        named = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        leaves = {id(leaf): i for i, leaf in enumerate(pytree.tree_leaves(arguments))}
        sources: list[str | int] = []
        for index, value in enumerate(call.inputs):
            if id(value) in named:
                sources.append(named[id(value)])
            elif id(value) in leaves:
                sources.append(leaves[id(value)])
            else:  # a tensor that the model holds outside of its buffers
                self.register_buffer(f"fpsc_constant_{index}", value)
                sources.append(f"fpsc_constant_{index}")
        self._sources = [*sources, *(_buffer(name) for name in call.tables)]
        returned = {id(value): i for i, value in enumerate(call.outputs)}
        flat, self._out_spec = pytree.tree_flatten(outputs)
        self._results = [(returned.get(id(value)), value) for value in flat]
        self._graph = [call.graph]  # in a list: its weights are this module's own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = [leaves[s] if isinstance(s, int) else _attribute(self, s) for s in self._sources]
        outputs = self._graph[0](*inputs)
        results = [value if i is None else outputs[i] for i, value in self._results]
        return pytree.tree_unflatten(results, self._out_spec)


def _buffer(name: str) -> str:
    return "fpsc_" + name.replace(".", "_")


def _attribute(module: nn.Module, path: str) -> Any:
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return getattr(module, name)
