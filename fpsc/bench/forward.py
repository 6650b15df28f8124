"""The levels that call a module: `block`, `transformer`, `training` and `memory`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fpsc
from fpsc.bench import allowed
from fpsc.bench.admission import Absent, admitted, first_line, left
from fpsc.bench.cases import smaller
from fpsc.bench.contenders import (
    EAGER,
    INDUCTOR,
    Called,
    Contender,
    contenders,
    fpsattn,
)
from fpsc.bench.environment import load, now, state
from fpsc.bench.measure import Effort, clock_for, gate, relative_rms, take_turns
from fpsc.bench.policies import constant, identity
from fpsc.bench.profile import peak, split
from fpsc.bench.progress import Tell, quiet
from fpsc.bench.record import Case, Gate, Level, Result, Role, Status, Times, compared, rounded
from fpsc.bench.subject import Machine, Sized, Subject, first_tensor, subject
from fpsc.compiling import repeated_blocks
from fpsc.errors import UserError
from fpsc.models.materialise import LAYERS, layers_of, settings_of, timestep_for, with_layers
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve

GATE_TOKENS = 512
"""Of the model that the gates run: the reference op is slow."""


@dataclass
class Entrant:
    """A contender that passed its gates: what is called, what is timed, and its result so far."""

    contender: Contender
    call: Called
    work: Callable[[], object]
    result: Result


def measure(case: Sized, machine: Machine, effort: Effort, tell: Tell = quiet) -> Case:
    began, start = now(), time.monotonic()
    level = case.problem.level
    tell("building the model")
    given = subject(case, machine)
    call = CALLS[level]
    target = given
    grid = None
    if level is Level.block:
        target, grid = block_of(given), case.problem.grid
    green = gates_of(case, machine, tell)
    entered, results = enter(case, machine, target, call, green, grid, tell)
    before = load()
    if level is not Level.memory:
        works = {name: entrant.work for name, entrant in entered.items()}
        times = take_turns(
            works,
            clock_for(machine.device),
            effort,
            lambda done, total: tell(f"round {done} of {total}", done, total),
        )
        for name, samples in times.items():
            results[name] = results[name].model_copy(update={"seconds": Times.of(samples)})
    whole, best = compared(list(results.values()))
    results = {result.name: result for result in whole}
    for name in looked_into(list(results.values()), best, level):
        tell(f"profiling {name}")
        results[name] = _profiled(results[name], entered[name], case, machine)
    return Case(
        name=case.spec.name,
        problem=case.problem,
        status=Status.measured if entered else Status.failed,
        reason="" if entered else "no contender could be measured",
        results=tuple(results.values()),
        best=best,
        rounds=max((len(r.seconds.samples) for r in whole if r.seconds), default=0),
        warmup=effort.warmup,
        load=before,
        device_state=state(machine.device),
        began=began,
        took=rounded(time.monotonic() - start),
        notes=("weights are random: the error of a sparse contender says nothing of its quality",),
    )


# ---- what is called


def forward(call: Called, given: Subject) -> Tensor:
    with torch.no_grad():
        return first_tensor(call(**given.inputs))


def train(call: Called, given: Subject) -> Tensor:
    """Forward, backward, and AdamW with a rate of zero: its work without its effect, so that all
    contenders keep the same weights. Returns the gradients of all parameters, one after another."""
    module = _module_of(call)
    parameters = list(module.parameters())
    optimizer = _optimizer(module, parameters)
    optimizer.zero_grad(set_to_none=True)
    out = first_tensor(call(**given.inputs))
    out.float().square().mean().backward()
    optimizer.step()
    gradients = [p.grad.flatten().float() for p in parameters if p.grad is not None]
    return torch.cat(gradients) if gradients else out.new_zeros(1)


def _optimizer(module: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    found = module.__dict__.get("_bench_optimizer")
    if found is None:
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        found = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        module.__dict__["_bench_optimizer"] = found
    return found  # type: ignore[no-any-return]


def _module_of(call: Any) -> nn.Module:
    """The module behind what is called."""
    while not isinstance(call, nn.Module):
        call = call.args[0]  # of a partial
    return getattr(call, "_orig_mod", call)


CALLS: dict[Level, Callable[[Called, Subject], Tensor]] = {
    Level.block: forward,
    Level.transformer: forward,
    Level.memory: forward,
    Level.training: train,
}


def block_of(given: Subject) -> Subject:
    """The first of the model's repeated blocks, with what the model gives it."""
    blocks = repeated_blocks(given.model)
    if not blocks:
        raise UserError(f"{type(given.model).__name__} repeats no block that could be measured")
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))

    handle = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward(given.model, given)
    finally:
        handle.remove()
    args, kwargs = caught[0]
    names = list(_arguments(blocks[0]))
    return Subject(blocks[0], dict(zip(names, args, strict=False)) | kwargs)


def _arguments(module: nn.Module) -> Iterable[str]:
    import inspect

    return inspect.signature(module.forward).parameters


# ---- entering the race


def enter(
    case: Sized,
    machine: Machine,
    given: Subject,
    call: Callable[[Called, Subject], Tensor],
    green: dict[str, tuple[Gate, ...]],
    grid: tuple[int, int, int] | None,
    tell: Tell,
) -> tuple[dict[str, Entrant], dict[str, Result]]:
    """Compile every contender, judge it, and keep those that may be timed.

    green: gates by the name of the cells they are for. A contender with a policy of several phases
    enters once for each.
    """
    p = case.problem
    entered: dict[str, Entrant] = {}
    results: dict[str, Result] = {}
    expected: dict[float | None, Tensor] = {}

    def dense(noise: float | None) -> Tensor:
        if noise not in expected:
            expected[noise] = call(given.model, at(given, noise)).detach().clone()
        return expected[noise]

    policies = () if grid is not None else case.spec.policies  # a block sees no noise level
    field = contenders(
        machine, case.spec.keeps, policies, tokens=p.tokens, heads=p.heads, grid=grid
    )
    for contender in admitted(field, case, results):
        tell(f"compiling {contender.name}")
        try:
            first = prepared(contender, given, call)
        except Exception as error:  # one that fails is a finding
            results[contender.name] = left(contender, Status.failed, first_line(error))
            continue
        why = not_replaced(contender, first.reports)
        if why:
            results[contender.name] = left(contender, Status.wrong, why)
            continue
        for name, noise, visited in phases(contender, case, machine):
            there = at(given, noise)
            found = first.out if noise is None else call(first.called, there)
            result = judged(contender, found, dense(noise), green["fpsattn"], p.dtype)
            results[name] = result.model_copy(
                update={
                    "name": name,
                    "keep": contender.keep if contender.keep is not None else visited,
                    "visited": visited,
                    "compile_seconds": rounded(first.seconds) if contender.name != EAGER else None,
                }
            )
            if result.status is Status.measured:
                work = _work(call, first.called, there)
                entered[name] = Entrant(contender, first.called, work, results[name])
    if not machine.fp8 and p.level is not Level.sampling:  # a loop's error is not one forward's
        _add_fp8_errors(case, machine, given, call, dense, grid, results, tell)
    expected.clear()
    return entered, results


def judged(
    contender: Contender, found: Tensor, expected: Tensor, green: tuple[Gate, ...], dtype: str
) -> Result:
    """Whether a contender may be timed, and its error against the dense model.

    green: the gates of fpsattn. What is dense and does not round must be near eager itself.
    """
    gates: tuple[Gate, ...] = ()
    if contender.role is Role.fpsattn:
        gates = green
    elif contender.role is Role.baseline:
        gates = (gate(found, expected, allowed.MODEL[dtype], "eager"),)
    red = [each for each in gates if not each.passed]
    reason = "; ".join(f"error {g.error} to {g.against}, {g.allowed:g} allowed" for g in red)
    distance = relative_rms(found, expected)
    if not red and distance == float("inf"):
        reason = "its output is not finite"
    return Result(
        name=contender.name,
        role=contender.role,
        status=Status.wrong if reason else Status.measured,
        reason=reason,
        policy=contender.policy.name if contender.policy else None,
        error=float(f"{distance:.2g}") if distance < float("inf") else None,
        gates=gates,
    )


def _work(
    call: Callable[[Called, Subject], Tensor], called: Called, given: Subject
) -> Callable[[], object]:
    return lambda: call(called, given)


@dataclass(frozen=True)
class First:
    """The first call of a contender: what is called from then on, what came out, how long it took,
    which includes compiling, and the reports of what was replaced."""

    called: Called
    out: Tensor
    seconds: float
    reports: list[Any]


def prepared(
    contender: Contender, given: Subject, call: Callable[[Called, Subject], Tensor]
) -> First:
    """Compile a contender by calling it once."""
    fpsc.reports(clear=True)
    called = contender.prepare(given.model)
    start = time.perf_counter()
    out = call(called, given).detach().clone()
    return First(called, out, time.perf_counter() - start, fpsc.reports(clear=True))


def not_replaced(contender: Contender, reports: list[Any]) -> str:
    """Why an accelerated contender is none, or ""."""
    if contender.role is not Role.fpsattn or any(report.replaced for report in reports):
        return ""
    reasons = {site.reason for report in reports for site in report.sites if site.reason}
    return "no attention was replaced" + (f": {'; '.join(sorted(reasons))}" if reasons else "")


def phases(
    contender: Contender, case: Sized, machine: Machine
) -> list[tuple[str, float | None, float | None]]:
    """(name, noise level inside, keep) of what a contender is timed at: every phase of its policy,
    or the case's own level."""
    policy = contender.policy
    if policy is None:
        return [(contender.name, None, None)]
    ranges, keeps = rows_of(policy, case, machine)
    if len(ranges) == 1 or case.problem.noise is None:
        return [(contender.name, None, keeps[0] if len(keeps) == 1 else None)]
    return [
        (f"{contender.name}, noise {high:g}..{low:g}", (high + low) / 2, keep)
        for (high, low), keep in zip(ranges, keeps, strict=True)
    ]


def rows_of(
    policy: Policy, case: Sized, machine: Machine
) -> tuple[list[tuple[float, float]], list[float]]:
    """The ranges of noise of a policy's table, and the mean keep of each on this grid."""
    from fpsc.grid import layout

    p = case.problem
    table = resolve(policy, layers=p.layers, heads=p.heads, fp8=machine.fp8)
    found = plan(policy, layout(p.grid, policy.tile_for(p.grid)))
    ranges = [(float(r[0]), float(r[1])) for r in table.noise_ranges]
    if p.tokens < policy.limits.min_tokens:  # the video stays dense
        return ranges, [1.0] * len(ranges)
    return ranges, [rounded(keep) for keep in table.keep(found)]


def at(given: Subject, noise: float | None) -> Subject:
    """The same call at another noise level."""
    if noise is None or "timestep" not in given.inputs:
        return given
    timestep = given.inputs["timestep"]
    value = torch.full_like(timestep, timestep_for(given.model, noise))
    return Subject(given.model, {**given.inputs, "timestep": value})


def _add_fp8_errors(
    case: Sized,
    machine: Machine,
    given: Subject,
    call: Callable[[Called, Subject], Tensor],
    dense: Callable[[float | None], Tensor],
    grid: tuple[int, int, int] | None,
    results: dict[str, Result],
    tell: Tell,
) -> None:
    """What FP8 would cost where the clock ran without it: one call with its rounding emulated."""
    rounding = replace(machine, emulate_fp8=True)
    for contender in contenders(
        rounding, case.spec.keeps, case.spec.policies, tokens=1, heads=1, grid=grid
    ):
        if isinstance(contender, Absent) or contender.role is not Role.fpsattn:
            continue
        names = phases(contender, case, rounding)
        if not any(
            name in results and results[name].status is Status.measured for name, *_ in names
        ):
            continue
        tell(f"emulating FP8 for {contender.name}")
        first = prepared(contender, given, call)
        for name, noise, _ in names:
            if name in results:
                there = at(given, noise)
                found = first.out if noise is None else call(first.called, there)
                error = relative_rms(found, dense(noise))
                results[name] = results[name].model_copy(
                    update={"error_fp8": float(f"{error:.2g}")}
                )
        gc.collect()


# ---- gates


def gates_of(case: Sized, machine: Machine, tell: Tell = quiet) -> dict[str, tuple[Gate, ...]]:
    """Whether fpsattn computes what it says, on a small copy of the model: its widths and heads, a
    layer of each kind, a small grid. The specification is too slow for the whole."""
    if not (case.spec.keeps or case.spec.policies):
        return {"fpsattn": ()}
    tell("gates")
    return {"fpsattn": _gates(_small(case), machine)}


def _small(case: Sized) -> Sized:
    assert case.model is not None
    config = settings_of(case.model)
    kinds = sum(1 for name in LAYERS if config.get(name))
    layers = min(max(kinds, 1), layers_of(config))
    problem = case.problem.model_copy(
        update={
            "grid": tuple(smaller(case.problem.grid, GATE_TOKENS)),
            "layers": layers,
            "batch": 1,
            "level": Level.transformer,
        }
    )
    model = with_layers(case.model, config, layers)
    spec = replace(case.spec, name="", keeps=(), policies=(), noise=0.5)  # what differs is cached
    return Sized(spec, problem, model)


_KNOWN: dict[str, tuple[Gate, ...]] = {}
"""Gates that ran in this process: cases of one model share them."""


def _gates(case: Sized, machine: Machine) -> tuple[Gate, ...]:
    p, plain = case.problem, replace(machine, mode="", traces=None, profile=True)
    key = f"{case.model} {p.grid} {plain}"
    if key not in _KNOWN:
        _KNOWN[key] = _run_gates(case, plain)
    return _KNOWN[key]


def _run_gates(case: Sized, machine: Machine) -> tuple[Gate, ...]:
    p = case.problem
    given = subject(case, machine)
    size = f"{p.layers} layers, grid {'x'.join(map(str, p.grid))}"
    dense = forward(given.model, given)

    def found(policy: Policy, **options: Any) -> Tensor:
        contender = fpsattn(policy, machine, name="gate", **options)
        first = prepared(contender, given, forward)
        why = not_replaced(contender, first.reports)
        if why:
            raise UserError(f"{p.model or p.model_class}: {why}; nothing can be measured")
        return first.out

    same = gate(found(identity()), dense, allowed.MODEL[p.dtype], f"eager, dense policy, {size}")
    sparse = constant(0.5)
    limits = allowed.MODEL_FP8 if machine.fp8 else allowed.MODEL
    right = gate(
        found(sparse), found(sparse, kernel="reference"), limits[p.dtype], f"reference op, {size}"
    )
    return (same, right)


# ---- the profiler


def looked_into(results: list[Result], best: str | None, level: Level) -> list[str]:
    """Before and after: eager, Inductor, the best, and ours."""
    timed = [r for r in results if r.status is Status.measured]
    if level is Level.memory:
        return [r.name for r in timed]
    wanted = {EAGER, INDUCTOR, best}
    return [r.name for r in timed if r.name in wanted or r.role is Role.fpsattn]


def _profiled(result: Result, entrant: Entrant, case: Sized, machine: Machine) -> Result:
    changes: dict[str, Any] = {}
    if case.problem.level is Level.memory or machine.cuda:
        changes["memory"] = peak(entrant.work, machine.device)
    if case.problem.level is not Level.memory and machine.profile:
        trace = None
        if machine.traces is not None:
            file = f"{case.spec.name}-{result.name}".replace("/", "-").replace(" ", "-")
            trace = Path(machine.traces) / f"{file.replace(',', '')}.json.gz"
        changes["split"] = split(entrant.work, machine.device, trace)
    return result.model_copy(update=changes)
