"""`torch.compile(model, backend="fpsattn")`: find the attentions of a graph, replace them, hand
over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast
from warnings import warn

from torch import fx
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
from fpsc.families import family_of
from fpsc.kernels.kinds import FP8_CELLS
from fpsc.kernels.select import Choice, fp8_support, select
from fpsc.launch import Launcher
from fpsc.options import OptionError, Options, inductor_patches, parse
from fpsc.passes import manager
from fpsc.passes.attempt import attempt
from fpsc.passes.infer_grid import Hints
from fpsc.passes.manager import Analysis, Limits
from fpsc.passes.match import Role
from fpsc.passes.rewrite import Rewritten
from fpsc.policy import Policy, find
from fpsc.policy.resolve import kinds_of
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
    root = roots.root_for(roots.running_modules())
    state, origin = _state(root, parsed)
    launcher = _rewrite(gm, example_inputs, root, state, origin)
    if launcher is not None:
        return _compile(launcher, example_inputs, inductor_patches(parsed))
    compiled = inductor(gm, list(example_inputs), config_patches=inductor_patches(parsed))
    if root is None or root.args is None or not takes_video(root.module, root.args, root.kwargs):
        return compiled
    return Watched(compiled, state)


def rewrite_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Launcher | None:
    """What the backend does before it compiles: a rewritten graph, or None where nothing is
    replaced."""
    root = roots.root_for(roots.running_modules())
    return _rewrite(gm, example_inputs, root, *_state(root, options))


def analyse_graph(gm: fx.GraphModule, options: Mapping[str, Any] | None = None) -> Report:
    """What the backend would do with a graph, without doing it.

    Args:
        gm: graph from Dynamo.
        options: as for the backend.
    """
    state, origin = _state(None, parse(None, options))
    analysis = _analyse(gm, state, None, strict=state.options.strict)
    return _report(analysis, state, origin, hooked=True)


def _state(root: RunningModule | None, options: Options) -> tuple[ModelState, str]:
    """The state of the model that is compiled, and why it has the policy that it has."""
    module = root.module if root else None
    family = family_of(module)
    if options.policy is not None:
        policy, origin = find(options.policy), "named in the options"
    elif family is not None:
        policy, origin = find(family.policy), f"preset for {type(module).__name__}"
    else:
        policy, origin = find("generic"), "default"
    known = runtime.state_of_root(module) if module is not None else None
    if known is not None and _serves(known, policy, options):
        if policy.spec != known.loaded.spec:  # the file was edited since
            known.loaded = policy
            known.set_policy(policy)
        return known, origin
    convention = options.timestep.convention or (family.convention if family else None)
    state = ModelState(module, policy, options, convention)
    if module is not None:
        if known is not None:
            known.remove_hook()
        runtime.remember_root(module, state)
    return state, origin


def _serves(state: ModelState, policy: Policy, options: Options) -> bool:
    """Whether the state that a model has serves these options too; numbers may differ."""
    same_structure = runtime.structure_of(policy) == runtime.structure_of(state.policy)
    return same_structure and options == state.options


def _nothing(reason: str) -> None:
    warn(f"fpsattn replaced nothing in this graph: {reason}", NothingReplacedWarning, 2)


def _analyse(
    gm: fx.GraphModule, state: ModelState, root: RunningModule | None, *, strict: bool
) -> Analysis:
    if root is not None and root.args is not None and not root.compiled:
        state.observe(root.args, root.kwargs)
    names = roots.argument_names(root.module) if root else []
    return manager.analyse(
        gm,
        Hints(*state.hints()),
        Limits(min_tokens=state.policy.limits.min_tokens),
        names,
        state.options.timestep.argument,
        strict=strict,
    )


def _rewritten(analysis: Analysis, state: ModelState) -> Rewritten | None:
    """The graph with its sites replaced; None where that fails, and then all of them stay dense."""
    convention = state.convention if analysis.timestep is not None else None
    kinds, kernel = _kinds(analysis, state), state.options.kernel
    return attempt(
        partial(manager.apply, analysis, convention, kinds=kinds, kernel=kernel),
        analysis.leave,
        "this graph",
        strict=state.options.strict,
    )


def _takes_hook(root: RunningModule | None) -> bool:
    """Whether a hook on the root runs outside compiled code: it does where a part is compiled."""
    return root is not None and not root.compiled


def _report(analysis: Analysis, state: ModelState, origin: str, hooked: bool) -> Report:
    threaded = analysis.timestep is not None and state.convention is not None
    notes = list(analysis.warnings)
    if state.convention is not None and not threaded and not hooked:
        notes.append(
            "the timestep is not a tensor among the inputs of this graph: every forward uses the "
            "policy's densest row; pass it as a tensor, and name its argument with "
            'options={"timestep": {"argument": ...}} if it has an unusual name'
        )
    elif state.convention is None:
        notes.append(
            "the convention of this model's timestep is not known: every forward uses the policy's "
            'densest row; state it with options={"timestep": {"convention": "flow"}}'
        )
    choices = _choices(analysis, state)
    device = analysis.queries[0].device if analysis.targets else None
    supported, reason = fp8_support(device) if device else (True, "")
    if not supported and kinds_of(state.policy, fp8=True) & FP8_CELLS:
        notes.append(f"fp8 modes of the policy run in the input's dtype: {reason}")
    module = state.root
    return Report(
        model=type(module).__name__ if module is not None else "",
        policy=state.policy.name,
        policy_source=origin,
        sites=sites_of(analysis),
        timestep="an input of the graph"
        if threaded
        else "the root module"
        if hooked
        else "nowhere",
        kernels=sorted({f"{choice.name} ({choice.reason})" for choice in choices}),
        notes=notes,
        _state=None,
    )


def _kinds(analysis: Analysis, state: ModelState) -> int:
    """The dtypes that cells of a graph's sites may have."""
    return kinds_of(state.policy, state.runs_fp8(analysis.queries[0].device))


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


def _rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    root: RunningModule | None,
    state: ModelState,
    origin: str,
) -> Launcher | None:
    """Analyse, report, rewrite; the launcher has no compiled graph yet."""
    strict = state.options.strict
    look = partial(_analyse, gm, state, root, strict=strict)
    analysis = attempt(look, _nothing, "this graph", strict=strict)
    if analysis is None:
        return None
    state.saw_video |= shows_video(analysis)
    if not analysis.candidates:
        return None
    rewritten = _rewritten(analysis, state) if analysis.targets else None
    report = _report(analysis, state, origin, hooked=_takes_hook(root))
    record(report)
    _check(report, state.options)
    if rewritten is None:
        return None
    timestep = analysis.timestep if rewritten.returns_rows else None
    launcher = Launcher(rewritten, analysis.program, state, timestep, report)
    weights = [example_inputs[t.weight.position] for t in analysis.targets if t.weight]
    runtime.remember(weights, state)
    launcher.prepare()
    if root is not None and _takes_hook(root) and not rewritten.returns_rows:
        state.install_hook()
        if root.args is not None:
            state.observe(root.args, root.kwargs)
    report.attach(state)
    return launcher


def _compile(
    launcher: Launcher, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Launcher:
    policy, kernels = launcher.state.policy, launcher.report.kernels
    structure = repr([*sorted(runtime.structure_of(policy).items()), kernels])
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
