"""Part 6: whole models, by the cases of `fpsc bench`, each beside every other way to run it.

Weights are random. Of the models with 40 and 60 layers 4 run, so that a case with all its
contenders compiles in time; the cost of a layer is the cost of the case by its layers. What does
not fit into memory is a problem that says how much it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu.run import Case, Record, Setup
from fpsc.bench.cases import Spec, registry
from fpsc.bench.measure import Effort
from fpsc.bench.record import Level, Role, Run, Status
from fpsc.bench.run import Plan, run
from fpsc.bench.subject import Machine
from fpsc.models.build import ModelSpec

KEEPS = (0.125, 0.25)
FEW = 4
HEADLINE = "transformer/wan-2.1-14b/720p"
SMOKE = Spec(
    "transformer/tiny",
    Level.transformer,
    own=ModelSpec(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
        },
        "tiny",
    ),
    grid=(4, 6, 16),
    text_tokens=4,
    keeps=(0.25,),
    contenders=("eager",),
)


def specs() -> list[Spec]:
    """The headline first, then what the fewest other cases say."""
    known = registry(cuda=True)
    few: dict[str, Any] = {"layers": FEW, "keeps": KEEPS}
    return [
        replace(known[HEADLINE], **few),
        replace(known["transformer/wan-2.1-1.3b/480p"], keeps=KEEPS),
        replace(known["transformer/hunyuan-video/720p"], **few),
        replace(known["sampling/wan-2.1-1.3b/480p"], keeps=(0.125,), policies=("wan-2.1-1.3b",)),
        replace(known["training/wan-2.1-1.3b/480p"], layers=FEW, keeps=(0.25,)),
        replace(known["memory/wan-2.1-14b/720p"], layers=FEW, keeps=(0.125,)),
        *(spec for name, spec in known.items() if name.startswith("scaling/")),
        replace(known["compile/wan-2.1-1.3b"], keeps=(0.25,)),
    ]


def cases(setup: Setup) -> Iterator[Case]:
    for spec in [SMOKE] if setup.smoke else specs():
        yield spec.name, partial(measure, setup, spec)


def measure(setup: Setup, spec: Spec) -> Record:
    """The case's record, and what is wrong in it."""
    machine = Machine(
        setup.device,
        torch.bfloat16 if setup.cuda else torch.float32,
        emulate_fp8=not setup.cuda,
        fp8_linears=setup.cuda and spec.level in (Level.transformer, Level.memory),
    )
    effort = Effort(rounds=2 if setup.smoke else 7, warmup=2, seconds=60.0)
    found = run(Plan([spec], machine, effort, output=None, command="bench/gpu_suite.py"))
    return {
        "problems": problems(found),
        "run": found.model_dump(mode="json"),
    }


def problems(found: Run) -> list[str]:
    """Cases that failed, and contenders of ours that are wrong or failed. torchao is not ours."""
    bad = [f"{c.name}: {c.reason}" for c in found.cases if c.status is not Status.measured]
    return bad + [
        f"{result.name}: {result.reason}"
        for case in found.cases
        for result in case.results
        if result.role is Role.fpsattn and result.status in (Status.wrong, Status.failed)
    ]
