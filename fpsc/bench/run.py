"""A run: cases one after another, each kept as soon as it is done."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpsc.bench import attention, compiling, forward, sampling
from fpsc.bench.admission import first_line
from fpsc.bench.cases import Spec
from fpsc.bench.contenders import policy_of
from fpsc.bench.environment import environment, now
from fpsc.bench.fits import break_evens, fits_of
from fpsc.bench.measure import Effort
from fpsc.bench.progress import Tell, quiet
from fpsc.bench.record import Case, Level, RecordError, Run, Status
from fpsc.bench.subject import Machine, Sized, check_memory, sized
from fpsc.errors import UserError

KEPT = (Status.measured, Status.wrong)
"""What a resumed run does not measure again."""


@dataclass(frozen=True)
class Plan:
    """What a run will do: cases with their sizes, the machine, the effort, the file, the sizes that
    the user set (`forced`)."""

    specs: Sequence[Spec]
    machine: Machine
    effort: Effort
    output: Path | None
    command: str
    forced: frozenset[str] = frozenset()
    fresh: bool = False


def run(plan: Plan, tell: Tell = quiet, on_case: Callable[[Case], None] = lambda case: None) -> Run:
    """Measure what the file does not have yet.

    on_case: called with every case that is done, also with those that were before.

    Raises:
        UserError: a model or size is not possible, a case does not fit into memory, or the file is
            of another machine, libraries or sources.
    """
    cases = [sized(spec, plan.machine, plan.forced) for spec in plan.specs]
    for case in cases:
        check_memory(case, plan.machine)
    record = _begun(plan, cases)
    with settings():
        for case in cases:
            done = _done(case, record)
            if done:
                for each in done:
                    on_case(each)
                continue
            for each in _measured(case, plan, tell):
                record = record.with_case(each)
                on_case(each)
            record = _finished(record)
            _save(record, plan.output)
            _free(plan.machine)
    return record


def _begun(plan: Plan, cases: Sequence[Sized]) -> Run:
    """The record to go on with, or a new one."""
    here = environment(plan.machine.device)
    names = tuple(name for case in cases for name in case.spec.names())
    if plan.output is not None and plan.output.exists() and not plan.fresh:
        try:
            before = Run.load(plan.output)
        except RecordError as error:
            raise UserError(f"{error}; --fresh replaces the file") from error
        differing = before.environment.differences(here)
        if differing:
            raise UserError(
                f"{plan.output} is of another environment: {'; '.join(differing)}. Name another "
                "file with --output, or replace it with --fresh"
            )
        planned = (*before.planned, *(name for name in names if name not in before.planned))
        return before.model_copy(update={"planned": planned})
    record = Run(command=plan.command, environment=here, planned=names)
    _save(record, plan.output)
    return record


def _done(case: Sized, record: Run) -> list[Case]:
    """The cases of an earlier run of the same problem; none where one is missing."""
    found = [record.of(name) for name in case.spec.names()]
    kept = [each for each in found if each is not None and _same(case, each)]
    return kept if len(kept) == len(found) else []


def _same(case: Sized, kept: Case) -> bool:
    """Whether a record answers the case: the same problem, and every keep and policy."""
    problem = kept.problem.model_copy(update={"cache": ""})
    keeps = {result.keep for result in kept.results}
    policies = {result.policy for result in kept.results}
    return (
        kept.status in KEPT
        and problem == case.problem
        and set(case.spec.keeps) <= keeps
        and {policy_of(name).name for name in case.spec.policies} <= policies
    )


def _measured(case: Sized, plan: Plan, tell: Tell) -> list[Case]:
    began, start = now(), time.monotonic()
    named: Tell = _named(tell, case.spec.name)
    try:
        if case.spec.level is Level.compile:
            return compiling.measure(case, plan.machine, plan.effort, named)
        module = {Level.attention: attention, Level.sampling: sampling}.get(
            case.spec.level, forward
        )
        return [module.measure(case, plan.machine, plan.effort, named)]  # type: ignore[attr-defined]
    except UserError:
        raise
    except Exception as error:  # one case that fails is a finding, not the end of the run
        return [
            Case(
                name=name,
                problem=case.problem,
                status=Status.failed,
                reason=f"{type(error).__name__}: {first_line(error)}",
                began=began,
                took=round(time.monotonic() - start, 2),
            )
            for name in case.spec.names()
        ]


def _named(tell: Tell, name: str) -> Tell:
    def told(what: str, done: int = 0, total: int = 0) -> None:
        tell(f"{name}: {what}", done, total)

    return told


def _finished(record: Run) -> Run:
    return record.model_copy(
        update={
            "fits": tuple(fits_of(record.cases)),
            "break_evens": tuple(break_evens(record.cases)),
        }
    )


def _save(record: Run, output: Path | None) -> None:
    if output is None:
        return
    try:
        record.save(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def _free(machine: Machine) -> None:
    """Memory and compiled code of one case must not weigh on the next."""
    torch._dynamo.reset()
    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()


@contextmanager
def settings() -> Iterator[None]:
    """What holds for every contender: one class compiled in many ways, float32 as it says, and no
    line of a report in the middle of a table."""
    import torch._dynamo

    log = logging.getLogger("fpsc")
    before, level = torch.get_float32_matmul_precision(), log.level
    torch.set_float32_matmul_precision("highest")
    log.setLevel(logging.WARNING)
    many: dict[str, Any] = {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}
    try:
        with torch._dynamo.config.patch(**many):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        log.setLevel(level)
