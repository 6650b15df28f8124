"""A model whose video attentions can be given any policy and be measured, without Inductor.

The compiler's own matching finds the sites: the model is compiled in place with a backend that
rewrites its graphs as `fpsattn` does, and runs them as they are. So q, k, v, the lists and the
layer arrive exactly as `fpsc::attention` sees them in a compiled model.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fpsc import roots, runtime
from fpsc.backend import rewrite_graph
from fpsc.errors import UserError
from fpsc.families import family_of
from fpsc.grid import Layout
from fpsc.kernels.rows import noise_level
from fpsc.launch import Launcher
from fpsc.options import Options
from fpsc.policy import Policy
from fpsc.report import Report, reports
from fpsc.runtime import ModelState
from fpsc.tune.measure import SITE, Measurement, Observed
from fpsc.unseen import FLAGS

RECOMPILES = 64
"""Graphs of one model: with and without gradients, for each size of latent and each instrument."""


@dataclass(frozen=True)
class Call:
    """One call of the model: its noise level, arguments and outputs, and how long it took."""

    noise: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    seconds: float


class Instrument:
    """Compiles a model in place, inside of a `with`; then the model is as it was.

    Args:
        model: takes a timestep and a latent.
        policy: has all candidates as modes and is dense everywhere; every policy that is given
            later has its structure.
        options: of the backend, beside the policy: `grid`, `timestep`, `emulate_fp8`, `kernel`.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.policy = model, policy
        # The plain op: what is measured is q, k and v as they are attended to.
        plain = {"fuse_prologue": False, "backward": "bf16"}
        self.options = Options(policy=policy, **{**(options or {}), **plain})
        family = family_of(model)
        stated = self.options.timestep.convention
        self.convention = stated or (family.convention if family else None)
        if self.convention is None:
            raise UserError(
                f"{type(model).__name__}: how its timestep tells the noise is not known; state it: "
                '"flow" for 1000 down to 0, "reversed" for 0 up to 1000, "unit" for 1 down to 0, '
                '"sigma" for EDM noise levels, "log-sigma" for ln(sigma) / 4'
            )
        self.measurement: Measurement | None = None
        self.reports: list[Report] = []
        self.query: tuple[int, ...] = ()
        self._record: list[Call] | None = None
        self._known: list[Call] = []
        self._before = len(reports())
        self._stack = ExitStack()

    # ---- as a context

    def __enter__(self) -> Instrument:
        compiled = torch.compile(self.model._call_impl, backend=self._backend, dynamic=False)
        before = self.model._compiled_call_impl
        gradients = [(p, p.requires_grad) for p in self.model.parameters()]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._known:
                device = next(self.model.parameters()).device
                return pytree.tree_map(lambda x: _on(x, device), self._known.pop(0).outputs)
            began = time.perf_counter()
            outputs = compiled(*args, **kwargs)
            if self._record is not None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self._note(args, kwargs, outputs, time.perf_counter() - began)
            return outputs

        def restore() -> None:
            self.model._compiled_call_impl = before
            for parameter, wanted in gradients:
                parameter.requires_grad_(wanted)

        self._stack.callback(restore)
        self._stack.enter_context(torch._dynamo.config.patch(**FLAGS, recompile_limit=RECOMPILES))
        self._stack.enter_context(warnings.catch_warnings())
        # What the backend warns of, and what the policies are not tuned on, is said by errors here.
        warnings.filterwarnings("ignore", message="fpsattn", category=UserWarning)
        self.model.requires_grad_(False)
        self.model._compiled_call_impl = call
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        launcher = rewrite_graph(gm, example_inputs, self.options)
        if launcher is None:
            return gm.forward
        self.reports.append(launcher.report)
        return _Graph(launcher, self)

    # ---- what the model is

    @property
    def state(self) -> ModelState:
        """Of the model, once it has run.

        Raises:
            UserError: it has no attention over space and time that the backend replaces.
        """
        states = runtime.states_in(self.model)
        if not self.reports or not states:
            told = [site for report in reports()[self._before :] for site in report.sites]
            reasons = sorted({f"{site.role}: {site.reason}" for site in told if site.reason})
            raise UserError(
                f"{type(self.model).__name__} has no 3D attention that a policy could act on"
                + (f" ({'; '.join(reasons)})" if reasons else "")
                + "; `fpsc inspect` lists the attentions of a model"
            )
        return states[0]

    @property
    def layout(self) -> Layout:
        """The tiles of the video, the largest where there are several."""
        return max(self.state.layouts, key=lambda layout: layout.tokens)

    # ---- what it can do

    def use(self, policy: Policy | None) -> None:
        """Run with a policy from now on; None is dense."""
        wanted = policy or self.policy
        if not self.reports:  # nothing is compiled yet: the first graph starts with it
            self.options = self.options.model_copy(update={"policy": wanted})
        elif self.state.policy is not wanted:
            runtime.set_policy(self.model, wanted)

    @contextmanager
    def recorded(self) -> Iterator[list[Call]]:
        """Notes the calls of the model."""
        found: list[Call] = []
        self._record = found
        try:
            yield found
        finally:
            self._record = None

    @contextmanager
    def following(self, calls: Sequence[Call], noise: float) -> Iterator[None]:
        """Answers the first calls as they were answered before, down to a noise level.

        For a run that is the same as that of `calls` so far.
        """
        self._known = list(itertools.takewhile(lambda call: call.noise > noise + 1e-6, calls))
        try:
            yield
        finally:
            self._known = []

    def _note(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, seconds: float
    ) -> None:
        arguments = roots.bind(self.model, args, kwargs)
        name = roots.timestep_argument(self.model, self.options.timestep.argument)
        timestep = arguments.get(name) if name else None
        if timestep is None:
            raise UserError(
                f"{type(self.model).__name__} was called without a timestep; name its argument"
            )
        assert self._record is not None and self.convention is not None
        level = noise_level(torch.as_tensor(timestep), self.convention)
        args, kwargs, outputs = pytree.tree_map(_on_host, (args, kwargs, outputs))
        self._record.append(Call(float(level.max()), args, kwargs, outputs, seconds))

    def measure(self, call: Call, measurement: Measurement, generator: torch.Generator) -> float:
        """Measure every mode in every attention of a call; returns the squared prediction.

        generator: draws the random direction, on the CPU.
        """
        self.use(None)
        device = next(self.model.parameters()).device
        args, kwargs = pytree.tree_map(lambda x: _on(x, device), (call.args, call.kwargs))
        self.measurement = measurement
        measurement.leaves.clear()
        try:
            with torch.enable_grad():
                prediction = prediction_of(self.model(*args, **kwargs)).float()
                drawn = torch.randn(prediction.shape, generator=generator).to(prediction.device)
                torch.autograd.grad(
                    (prediction * drawn).sum(), measurement.leaves, allow_unused=True
                )
        finally:
            self.measurement = None
            measurement.leaves.clear()
        return float(prediction.detach().double().square().sum())


class _Graph:
    """A rewritten graph as it is, with an observer in the place of the op."""

    def __init__(self, launcher: Launcher, instrument: Instrument) -> None:
        self.launcher, self.instrument = launcher, instrument
        self.layers: list[int | None] = []
        launcher.compiled = launcher.rewritten.module
        for module in launcher.rewritten.module.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.target is torch.ops.fpsc.attention.default:
                        node.target = self.attention
                    elif node.target is tag_activation_checkpoint:
                        node.target = _checkpointed  # for a compiler it is only a mark
                module.recompile()

    def __call__(self, *args: Any) -> Any:
        self.layers = self.launcher.layers(args)
        return self.launcher(*args)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *tables: Any) -> tuple[Tensor, ...]:
        """The op; while something is measured, one that backward observes."""
        measurement = self.instrument.measurement
        self.instrument.query = tuple(q.shape)
        if measurement is None or not torch.is_grad_enabled():
            found: tuple[Tensor, ...] = torch.ops.fpsc.attention(q, k, v, *tables)
            return found
        layer = self.layers[tables[SITE]]
        if layer is None:
            raise UserError(
                "the layer of an attention is not known: no weight of the model stands before it"
            )
        if not q.requires_grad:
            q = q.detach().requires_grad_()
            measurement.leaves.append(q)
        return (Observed.apply(q, k, v, layer, tables, measurement),)


def _checkpointed(body: fx.GraphModule, *args: Any, **_: Any) -> Any:
    """A checkpoint region, computed again in backward."""
    return checkpoint(body, *args, use_reentrant=False)


def prediction_of(outputs: Any) -> Tensor:
    """The first tensor of what a model returns."""
    found = next((x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)), None)
    if found is None and hasattr(outputs, "values"):  # an output class of diffusers
        found = next((x for x in outputs.values() if isinstance(x, Tensor)), None)
    if found is None:
        raise UserError(f"expected a model that returns a tensor, found {type(outputs).__name__}")
    return found


def _on_host(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x


def _on(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
