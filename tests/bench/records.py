"""Made-up records, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fpsc.bench.record import (
    Case,
    Device,
    Environment,
    Level,
    Problem,
    Result,
    Role,
    Run,
    Status,
    Times,
    compared,
)


def environment(**changes: Any) -> Environment:
    return Environment(
        **{
            "time": "2026-01-01T00:00:00+00:00",
            "fpsc": "0.1.0",
            "commit": "abcdef0",
            "source": "0123456789abcdef",
            "python": "3.11.7",
            "system": "Linux x86_64",
            "packages": {"torch": "2.13.0", "triton": "3.6.0", "sageattention": None},
            "cpu": "a processor",
            "cores": 2,
            "threads": 2,
            "device": Device(kind="cpu", name="a processor", memory=2**34),
            **changes,
        }
    )


def problem(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "level": Level.transformer,
        "model": "wan2.1-1.3b",
        "layers": 2,
        "full_layers": 30,
        "grid": (3, 10, 16),
        "full_grid": (21, 30, 52),
        "size": "480p",
        "heads": 12,
        "head_dim": 128,
        "dtype": "float32",
        "reduced": ("2 of 30 layers",),
    }
    return Problem(**{**given, **changes})


def result(
    name: str, samples: Sequence[float], role: Role = Role.baseline, **others: Any
) -> Result:
    return Result(name=name, role=role, status=Status.measured, seconds=Times.of(samples), **others)


def case(name: str, slower: float = 1.0, results: Sequence[Result] = (), **changes: Any) -> Case:
    """eager, Inductor and fpsattn in five rounds; fpsattn takes `slower` times as long."""
    fast = [0.25, 0.2505, 0.2495, 0.251, 0.249]
    whole, best = compared(
        results
        or [
            result("eager", [6 * x for x in fast], Role.eager, error=0.0),
            result("Inductor", [4 * x for x in fast], error=1e-7),
            result(
                "fpsattn keep 0.25",
                [slower * x for x in fast],
                Role.fpsattn,
                error=0.02,
                keep=0.25,
                policy="near 0.25",
            ),
        ]
    )
    return Case(
        **{
            "name": name,
            "problem": problem(),
            "status": Status.measured,
            "results": whole,
            "best": best,
            "rounds": 5,
            "warmup": 2,
            "began": "2026-01-01T00:00:00+00:00",
            "took": 12.5,
            **changes,
        }
    )


def run(cases: Sequence[Case] = (), **changes: Any) -> Run:
    return Run(
        **{
            "command": "fpsc bench run",
            "environment": environment(),
            "planned": tuple(case.name for case in cases),
            "cases": tuple(cases),
            **changes,
        }
    )
