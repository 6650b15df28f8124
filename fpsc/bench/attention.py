"""The level `attention`: one op, every implementation of it that is here."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fpsc.bench import allowed
from fpsc.bench.admission import admitted, first_line, left
from fpsc.bench.environment import load, now, state
from fpsc.bench.measure import Effort, clock_for, gate, relative_rms, take_turns
from fpsc.bench.op import Contender, Shape, SparseOp, contenders, expected, random_qkv
from fpsc.bench.policies import constant, identity
from fpsc.bench.progress import Tell, quiet
from fpsc.bench.record import Case, Gate, Result, Role, Status, Times, compared, rounded
from fpsc.bench.subject import Machine, Sized


def measure(case: Sized, machine: Machine, effort: Effort, tell: Tell = quiet) -> Case:
    began, start = now(), time.monotonic()
    p, device = case.problem, machine.device
    shape = Shape(p.grid, p.heads, p.head_dim, p.batch, p.prefix, p.suffix)
    qkv = random_qkv(shape, machine.dtype, device, machine.seed)
    trial = Trial(shape, qkv, machine)
    results: dict[str, Result] = {}
    works = {}
    tell("building")
    field = contenders(shape, case.spec.keeps, device, fp8=machine.fp8)
    for contender in admitted(field, case, results):
        tell(f"checking {contender.name}")
        try:
            result, work = trial.check(contender)
        except Exception as error:  # one that fails is a finding
            results[contender.name] = left(contender, Status.failed, first_line(error))
            continue
        results[contender.name] = result
        if result.status is Status.measured:
            works[contender.name] = work
    trial.forget()
    before = load()
    times = take_turns(
        works,
        clock_for(device, ahead=True),
        effort,
        lambda done, total: tell(f"round {done} of {total}", done, total),
    )
    for name, samples in times.items():
        results[name] = results[name].model_copy(update={"seconds": Times.of(samples)})
    whole, best = compared(list(results.values()))
    return Case(
        name=case.spec.name,
        problem=p,
        status=Status.measured if works else Status.failed,
        reason="" if works else "no contender could be timed",
        results=whole,
        best=best,
        rounds=len(next(iter(times.values()), ())),
        warmup=effort.warmup,
        load=before,
        device_state=state(device),
        began=began,
        took=rounded(time.monotonic() - start),
        notes=(
            "q, k and v are random: what skipping costs on them says nothing of a model's inputs",
        ),
    )


class Trial:
    """Compares contenders with the specification, in the last head of the last batch element."""

    def __init__(self, shape: Shape, qkv: list[Tensor], machine: Machine) -> None:
        self.shape, self.qkv, self.machine = shape, qkv, machine
        self.dense = SparseOp(shape, identity(), machine.device, fp8=False)
        self.known: dict[tuple[object, ...], Tensor] = {}
        self.exact = self._expected(self.dense)
        self._identity: Gate | None = None

    def check(self, contender: Contender) -> tuple[Result, Callable[[], Tensor]]:
        """The result without times, and what is to be timed. The first call may compile."""
        with torch.no_grad():
            work = contender.make(*self.qkv)
            start = time.perf_counter()
            found = contender.result(work())[-1, -1]
            first = time.perf_counter() - start
        dtype, op = self.machine.dtype_name, contender.op
        rounds = op is not None and op.kinds != 1
        limit = contender.allowed or (allowed.OP_FP8 if rounds else allowed.OP)[dtype]
        against = "the reference op" if op is not None else "dense attention in float32"
        gates = [gate(found, self._expected(op or self.dense), limit, against)]
        ours = contender.role is Role.fpsattn
        if ours:
            gates.append(self.identity())
        passed = all(each.passed for each in gates)
        red = "; ".join(
            f"error {g.error} to {g.against}, allowed is {g.allowed:g}"
            for g in gates
            if not g.passed
        )
        result = Result(
            name=contender.name,
            role=contender.role,
            status=Status.measured if passed else Status.wrong,
            reason=red,
            keep=contender.keep,
            policy=f"near {contender.keep:g}" if ours else None,
            visited=rounded(op.visited) if op is not None else None,
            error=float(f"{relative_rms(found, self.exact):.2g}"),
            error_fp8=self._error_fp8(contender.keep) if ours and not rounds else None,
            gates=tuple(gates),
            compile_seconds=rounded(first),
        )

        def timed() -> Tensor:
            with torch.no_grad():
                return work()

        return result, timed

    def identity(self) -> Gate:
        """The dense policy computes what dense attention does."""
        if self._identity is None:
            with torch.no_grad():
                q, k, v = self.qkv
                found = self.dense(q, k, v)[-1, -1]
            limit = allowed.OP[self.machine.dtype_name]
            self._identity = gate(found, self.exact, limit, "dense attention, by the dense policy")
        return self._identity

    def _error_fp8(self, keep: float | None) -> float:
        op = SparseOp(self.shape, constant(keep or 1.0), self.machine.device, fp8=True)
        return float(f"{relative_rms(self._expected(op), self.exact):.2g}")

    def _expected(self, op: SparseOp) -> Tensor:
        key = (op.kinds, op.layout.tile, rounded(op.visited))
        if key not in self.known:
            self.known[key] = expected(op, *self.qkv)
        return self.known[key]

    def forget(self) -> None:
        """Frees what only the checks need."""
        self.known.clear()
        gc.collect()
