"""The level `compile`: from torch.compile to the end of the first call, in fresh processes.

Every sample is a process of its own with cache folders of its own: empty for `cold`, those that the
cold one left for `warm`. Contenders take turns. The clock does not see imports, the model's
construction, nor a first eager call; it sees one forward, which is short on a small grid.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fpsc.bench import allowed
from fpsc.bench.admission import first_line
from fpsc.bench.contenders import policy_of
from fpsc.bench.environment import load, now, state
from fpsc.bench.measure import Effort, relative_rms
from fpsc.bench.progress import Tell, quiet
from fpsc.bench.record import Case, Gate, Problem, Result, Role, Status, Times, compared, rounded
from fpsc.bench.subject import Machine, Sized
from fpsc.models.build import ModelSpec

COLD, WARM = "cold", "warm"
INDUCTOR = "Inductor"
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
LONGEST = 3600.0


def measure(case: Sized, machine: Machine, effort: Effort, tell: Tell = quiet) -> list[Case]:
    """Two cases: cold and warm."""
    began, start, before = now(), time.monotonic(), load()
    names = [INDUCTOR, *(f"fpsattn keep {keep:g}" for keep in case.spec.keeps)]
    policies = {f"fpsattn {policy_of(name).name}": name for name in case.spec.policies}
    names += policies
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    total = effort.rounds * len(names) * 2
    done = 0
    for _ in range(effort.rounds):
        for name in names:
            with tempfile.TemporaryDirectory(prefix="fpsc-bench-") as caches:
                for cache in (COLD, WARM):
                    tell(f"{name}, {cache}", done, total)
                    found[name, cache].append(
                        child(case, machine, policies.get(name, name), Path(caches))
                    )
                    done += 1
    cases = []
    for cache in (COLD, WARM):
        results, best = compared([result_of(name, found[name, cache], case) for name in names])
        cases.append(
            Case(
                name=f"{case.spec.name}/{cache}",
                problem=case.problem.model_copy(update={"cache": cache}),
                status=Status.measured,
                results=results,
                best=best,
                rounds=effort.rounds,
                load=before,
                device_state=state(machine.device),
                began=began,
                took=rounded(time.monotonic() - start),
                notes=(
                    "seconds from torch.compile to the end of the first call, imports apart; each "
                    "sample is a new process",
                ),
            )
        )
    return cases


def result_of(name: str, samples: list[dict[str, Any]], case: Sized) -> Result:
    role = Role.baseline if name == INDUCTOR else Role.fpsattn
    failed = next((each["failed"] for each in samples if "failed" in each), None)
    if failed is not None:
        return Result(name=name, role=role, status=Status.failed, reason=failed)
    error = max(each["error"] for each in samples)
    gates: tuple[Gate, ...] = ()
    reason = ""
    if role is Role.baseline:
        limit = allowed.MODEL[case.problem.dtype]
        gates = (Gate(against="eager", error=error, allowed=limit, passed=error <= limit),)
        reason = "" if error <= limit else f"error {error} to eager, allowed is {limit:g}"
    elif any(each["replaced"] < case.problem.layers for each in samples):
        least = min(each["replaced"] for each in samples)
        reason = f"replaced {least} of {case.problem.layers} attentions"
    again = sorted(each["second"] for each in samples)[len(samples) // 2]
    keep = name.removeprefix("fpsattn keep ")
    return Result(
        name=name,
        role=role,
        status=Status.wrong if reason else Status.measured,
        reason=reason,
        policy=None if role is Role.baseline else name.removeprefix("fpsattn "),
        keep=float(keep) if keep != name else None,
        seconds=None if reason else Times.of([each["seconds"] for each in samples]),
        error=error,
        gates=gates,
        notes=(f"of it, about {again:.2g} s are the forward itself",),
    )


# ---- the process


def child(case: Sized, machine: Machine, name: str, caches: Path) -> dict[str, Any]:
    """One sample: {"seconds", "second", "error", "replaced"}, or {"failed"}."""
    assert case.model is not None
    request = {
        "problem": case.problem.model_dump(mode="json"),
        "model": vars(case.model),
        "contender": name,
        "device": str(machine.device),
        "threads": torch.get_num_threads(),
        "mode": machine.mode,
        "emulate_fp8": machine.emulate_fp8,
    }
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment |= {variable: str(caches / variable.lower()) for variable in CACHES}
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (package, os.environ.get("PYTHONPATH")) if part
    )
    try:
        ended = subprocess.run(
            (sys.executable, "-m", "fpsc.bench.compiling"),
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {LONGEST:.0f} s"}
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not lines:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        return {"failed": said[-1][:300] if said else f"ended with status {ended.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def sample(request: dict[str, Any]) -> dict[str, Any]:
    """What the process does."""
    import torch._inductor.compile_fx

    import fpsc
    import fpsc.backend
    from fpsc.bench.cases import Spec
    from fpsc.bench.contenders import fpsattn, inductor
    from fpsc.bench.forward import forward
    from fpsc.bench.policies import constant
    from fpsc.bench.subject import subject

    torch.set_num_threads(request["threads"])
    problem = Problem.model_validate(request["problem"])
    machine = Machine(
        torch.device(request["device"]),
        getattr(torch, problem.dtype),
        emulate_fp8=request["emulate_fp8"],
        mode=request["mode"],
    )
    spec = Spec("", problem.level)
    given = subject(Sized(spec, problem, ModelSpec(**request["model"])), machine)
    expected = forward(given.model, given)
    name = request["contender"]
    if name == INDUCTOR:
        contender = inductor(machine)
    elif name.startswith("fpsattn keep "):
        keep = float(name.removeprefix("fpsattn keep "))
        contender = fpsattn(constant(keep), machine, name=name)
    else:
        contender = fpsattn(policy_of(name), machine, name=name)
    _wait(machine)
    start = time.perf_counter()
    called = contender.prepare(given.model)
    found = forward(called, given)
    _wait(machine)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    forward(called, given)
    _wait(machine)
    second = time.perf_counter() - start
    replaced = sum(report.replaced for report in fpsc.reports())
    error = relative_rms(found, expected)
    return {
        "seconds": rounded(seconds),
        "second": rounded(second),
        "error": float(f"{error:.2g}"),
        "replaced": replaced,
    }


def _wait(machine: Machine) -> None:
    if machine.cuda:
        torch.cuda.synchronize(machine.device)


if __name__ == "__main__":
    try:
        answer = sample(json.load(sys.stdin))
    except Exception as error:
        print(first_line(error), file=sys.stderr)
        sys.exit(1)
    print(json.dumps(answer))
