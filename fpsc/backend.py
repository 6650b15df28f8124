"""`torch.compile(model, backend="fpsattn")`: find the attentions of a graph, replace them, hand
over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast
from warnings import warn

from torch import Tensor, fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from fpsc import roots, runtime
from fpsc.cache_key import HOOK, CacheKey
from fpsc.choice import choose
from fpsc.families import family_of
from fpsc.guard import guard_structure
from fpsc.kernels.kinds import FP8_CELLS
from fpsc.kernels.select import PACKING, Choice, fp8_support, select
from fpsc.launch import Launcher, Observer
from fpsc.options import OptionError, Options, inductor_patches, parse
from fpsc.passes import manager
from fpsc.passes.attempt import attempt
from fpsc.passes.graph import is_parameter
from fpsc.passes.infer_grid import Hints
from fpsc.passes.manager import Analysis, Limits
from fpsc.passes.match import Role
from fpsc.passes.rewrite import Rewritten
from fpsc.passes.streams import latents
from fpsc.passes.thread import argument_name
from fpsc.policy.resolve import kinds_of
from fpsc.recompute import in_backward
from fpsc.report import NothingReplacedWarning, Report, record, sites_of
from fpsc.roots import RunningModule
from fpsc.runtime import ModelState
from fpsc.unseen import Watched, shows_video, takes_video

inductor: Callable[..., Callable[..., Any]] = cast(Any, compile_fx)
"""Inductor, as a backend gets it: it returns a callable here, whatever its type says."""


class StrictError(RuntimeError):
    """`strict: true`, and a video self-attention was left dense."""


def fpsattn(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: 3D self-attention becomes `fpsc::attention`, all else goes to Inductor.

    Args:
        gm: graph from Dynamo. It is not changed.
        example_inputs: its inputs.
        mode: Inductor's mode.
        options: see `fpsc.options.Options`; all other keys are Inductor's.

    Raises:
        OptionError, PolicyError: an option or the policy cannot be used.
        StrictError: with `strict`, a video self-attention was left dense.
    """
    parsed = parse(mode, options)
    root = _root(example_inputs)
    state = _state(root, parsed)
    analysis = _analysed(gm, state, root)
    launcher = _rewrite(analysis, example_inputs, root, state) if analysis else None
    compiled: Callable[..., Any]
    if launcher is not None:
        compiled = _compile(launcher, example_inputs, inductor_patches(parsed))
    else:
        compiled = inductor(gm, list(example_inputs), config_patches=inductor_patches(parsed))
        if root is not None and root.args is not None:
            watched = takes_video(root.module, root.args, root.kwargs)
            compiled = Watched(compiled, state) if watched else compiled
    if analysis is not None and root is not None and root.compiled:
        return _observed(compiled, analysis, state, root)
    return compiled


def rewrite_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Launcher | None:
    """What the backend does before it compiles: a rewritten graph, or None where nothing is
    replaced."""
    root = _root(example_inputs)
    state = _state(root, options)
    analysis = _analysed(gm, state, root)
    return _rewrite(analysis, example_inputs, root, state) if analysis else None


def _root(example_inputs: Sequence[Any]) -> RunningModule | None:
    """The model that a graph belongs to: it runs now, or backward computes a part of it again."""
    if in_backward():
        for value in example_inputs:
            state = runtime.state_of(value) if isinstance(value, Tensor) else None
            if state is not None and state.root is not None:
                return RunningModule(state.root, None, {}, called=True)
    return roots.root_for(roots.running_modules())


def analyse_graph(gm: fx.GraphModule, options: Mapping[str, Any] | None = None) -> Report:
    """What the backend would do with a graph, without doing it.

    Args:
        gm: graph from Dynamo.
        options: as for the backend.
    """
    state = _state(None, parse(None, options))
    analysis = _analyse(gm, state, None, strict=state.options.strict)
    _read_fronts(analysis, state)
    return _report(analysis, state, "the root module")


def _state(root: RunningModule | None, options: Options) -> ModelState:
    """The state of the model that is compiled, with the policy that it has or now gets."""
    module = root.module if root else None
    family = family_of(module)
    chosen = choose(options, module, family)
    known = runtime.state_of_root(module) if module is not None else None
    if known is not None and options == known.options:
        if chosen.policy.same_as(known.loaded):
            return known  # what `set_policy` gave it since stays
        if runtime.structure_of(chosen.policy) == runtime.structure_of(known.policy):
            known.take(chosen)  # the file was edited since
            return known
    convention = options.timestep.convention or (family.convention if family else None)
    state = ModelState(module, chosen, options, convention)
    if module is not None:
        if known is not None:
            known.remove_hook()
        runtime.remember_root(module, state)
    return state


def _nothing(reason: str) -> None:
    warn(f"fpsattn replaced nothing in this graph: {reason}", NothingReplacedWarning, 2)


def _analysed(gm: fx.GraphModule, state: ModelState, root: RunningModule | None) -> Analysis | None:
    """What a graph holds; None, with a warning, where an error of ours hides it."""
    strict = state.options.strict
    look = partial(_analyse, gm, state, root, strict=strict)
    return attempt(look, _nothing, "this graph", strict=strict)


def _analyse(
    gm: fx.GraphModule, state: ModelState, root: RunningModule | None, *, strict: bool
) -> Analysis:
    if root is not None and root.args is not None and not (root.compiled or state.hooked):
        state.observe(root.args, root.kwargs)
    analysis = manager.analyse(
        gm,
        Hints(*state.hints()),
        Limits(min_tokens=state.policy.limits.min_tokens, roles=state.policy.roles),
        roots.argument_names(root.module) if root else [],
        state.options.timestep.argument,
        strict=strict,
    )
    if root is not None and not root.compiled:
        # What a block, or the rest of a broken forward, calls `timestep` may be an embedding of it.
        analysis.timestep = None
    return analysis


def _read_fronts(analysis: Analysis, state: ModelState) -> None:
    """Find out which norms and rotations the op does itself."""
    wanted, why_not = state.options.fuse_prologue, ""
    if wanted is False:
        why_not = "fuse_prologue is false"
    elif wanted == "auto":
        others = {str(c.name) for c in _choices(analysis, state)} - {*PACKING}
        if others:
            why_not = f"the {', '.join(sorted(others))} kernel gains nothing by it"
    manager.read_fronts(analysis, why_not, strict=state.options.strict)


def _replace(analysis: Analysis, state: ModelState) -> Rewritten | None:
    """The graph with its sites replaced; None where that fails, and then all of them stay dense."""
    convention = state.convention if analysis.timestep is not None else None
    kinds, kernel = _kinds(analysis, state), state.options.kernel
    fp8 = _fp8_backward(analysis, state)
    return attempt(
        partial(manager.apply, analysis, convention, kinds=kinds, kernel=kernel, fp8_backward=fp8),
        analysis.leave,
        "this graph",
        strict=state.options.strict,
    )


def _observed(
    compiled: Callable[..., Any], analysis: Analysis, state: ModelState, root: RunningModule
) -> Callable[..., Any]:
    """The graph with which a forward begins, so that later ones know its latent and timestep."""
    placeholders = analysis.program.placeholders
    names = roots.argument_names(root.module)

    def place(node: fx.Node) -> int:
        name = argument_name(node, names)
        return names.index(name) if name in names else len(names)

    latent = min(latents(analysis.program), key=place, default=None)
    weight = next((node for node in placeholders if is_parameter(node)), None)
    if latent is None and analysis.timestep is None:
        return compiled
    positions = (
        None if node is None else placeholders.index(node)
        for node in (latent, analysis.timestep, weight)
    )
    return Observer(compiled, state, *positions)


def _takes_hook(root: RunningModule | None) -> bool:
    """Whether a hook on the root will run before each of its forwards."""
    return root is not None and root.called


def _side_channel(state: ModelState, root: RunningModule | None) -> str:
    """Where a graph without a timestep has its noise level from; "" for nowhere."""
    if _takes_hook(root):
        return "the root module"
    return "the first graph of the forward" if state.forward.timestep is not None else ""


def _report(analysis: Analysis, state: ModelState, elsewhere: str) -> Report:
    threaded = analysis.timestep is not None and state.convention is not None
    sites = sites_of(analysis)
    notes = [*analysis.warnings, *state.notes, *runtime.mismatches(state, state.policy, sites)]
    if state.convention is not None and not threaded and not elsewhere:
        notes.append(
            "the timestep is not a tensor among the inputs of this graph: every forward uses the "
            "policy's densest row; pass it as a tensor, and name its argument with "
            'options={"timestep": {"argument": ...}} if it has an unusual name'
        )
    elif state.convention is None:
        notes.append(
            "the convention of this model's timestep is not known: every forward uses the policy's "
            'densest row; state it with options={"timestep": {"convention": ...}}: "flow" for 1000 '
            'down to 0, "reversed" for 0 up to 1000, "unit" for 1 down to 0, "sigma" for EDM noise '
            'levels, "log-sigma" for ln(sigma) / 4'
        )
    choices = _choices(analysis, state)
    device = analysis.queries[0].device if analysis.targets else None
    supported, reason = fp8_support(device) if device else (True, "")
    if not supported and kinds_of(state.policy, fp8=True) & FP8_CELLS:
        notes.append(f"fp8 modes of the policy run in the input's dtype: {reason}")
    products = "; products of backward in FP8" if _fp8_backward(analysis, state) else ""
    if state.options.backward == "fp8" and analysis.targets and not products:
        why = reason if not supported else "no cell of these sites is computed in FP8"
        notes.append(f"option 'backward': the products of backward are not in FP8: {why}")
    module = state.root
    return Report(
        model=type(module).__name__ if module is not None else "",
        policy=state.policy.name,
        policy_source=state.origin,
        sites=sites,
        timestep="an input of the graph" if threaded else elsewhere or "nowhere",
        kernels=sorted({f"{choice.name} ({choice.reason}{products})" for choice in choices}),
        notes=notes,
        _state=None,
    )


def _kinds(analysis: Analysis, state: ModelState) -> int:
    """The dtypes that cells of a graph's sites may have."""
    return kinds_of(state.policy, state.runs_fp8(analysis.queries[0].device))


def _fp8_backward(analysis: Analysis, state: ModelState) -> bool:
    """Whether the products of backward are in FP8 where those of forward are."""
    wanted = state.options.backward == "fp8" and bool(analysis.targets)
    return wanted and bool(_kinds(analysis, state) & FP8_CELLS)


def _choices(analysis: Analysis, state: ModelState) -> list[Choice]:
    """What computes each site that is replaced.

    Raises:
        OptionError: a kernel was named that does not serve them.
    """
    fp8 = bool(analysis.targets) and bool(_kinds(analysis, state) & FP8_CELLS)
    kernel = state.options.kernel
    choices = [
        select(q.device, q.dtype, int(q.shape[-1]), fp8=fp8, kernel=kernel)
        for q in analysis.queries
        if q.device.type != "meta"  # only looked at
    ]
    for choice in choices:
        if choice.name is None:
            raise OptionError(f"option 'kernel': {choice.reason}")
    return choices


def _check(report: Report, options: Options) -> None:
    """Warn, or raise with `strict`, where attention was left dense that should not be."""
    left = [s for s in report.sites if not s.replaced and s.role in (Role.VIDEO, Role.JOINT)]
    if options.strict and (left or not report.replaced):
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in left or report.sites)
        raise StrictError(f"strict: attention was left dense: {reasons}")
    if not report.replaced:
        warn(f"fpsattn replaced nothing in this graph.\n{report}", NothingReplacedWarning, 2)
    for note in report.notes:
        warn(f"fpsattn: {note}", UserWarning, 2)


def _guard(analysis: Analysis, example_inputs: Sequence[Any], state: ModelState) -> None:
    """Have the graph compiled again when the structure of the model's policy changes.

    One that replaces nothing too: another policy may cover what this one leaves dense.
    """
    weight = next((w for w in manager.weights_of(analysis) if w is not None), None)
    if weight is not None:
        runtime.recognise(example_inputs[weight.position], state)
        guard_structure(weight.node, state.structure)


def _rewrite(
    analysis: Analysis,
    example_inputs: Sequence[Any],
    root: RunningModule | None,
    state: ModelState,
) -> Launcher | None:
    """Report and rewrite; the launcher has no compiled graph yet."""
    state.saw_video |= shows_video(analysis)
    if not analysis.candidates:
        return None
    _read_fronts(analysis, state)
    rewritten = _replace(analysis, state) if analysis.targets else None
    report = _report(analysis, state, _side_channel(state, root))
    record(report)
    _check(report, state.options)
    _guard(analysis, example_inputs, state)
    if rewritten is None:
        return None
    timestep = analysis.timestep if rewritten.returns_rows else None
    launcher = Launcher(rewritten, analysis.program, state, timestep, report)
    weights = [example_inputs[t.weight.position] for t in analysis.targets if t.weight]
    runtime.remember(weights, state)
    launcher.prepare()
    if root is not None and not rewritten.returns_rows:
        launcher.follow(root)
    report.attach(state)
    return launcher


def _compile(
    launcher: Launcher, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Launcher:
    fused = [str(target.front) for target in launcher.rewritten.targets]
    structure = repr([launcher.structure, launcher.report.kernels, fused])
    user_hook = patches.get(HOOK, getattr(inductor_config, HOOK))
    patches = {**patches, HOOK: CacheKey(structure, user_hook)}
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    try:
        launcher.compiled = inductor(
            launcher.rewritten.module,
            [*example_inputs, *launcher.example_inputs(fake_mode)],
            config_patches=patches,
        )
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    ) as error:
        # Dynamo takes these for a graph break, which would be eager execution without a word.
        raise RuntimeError(f"fpsattn: the rewritten graph does not trace: {error}") from error
    return launcher
