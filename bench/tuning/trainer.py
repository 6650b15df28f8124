"""A variant's training: a configuration and a policy for `fpsc train`, and what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.tuning.record import Training, rounded
from bench.tuning.variants import Document, Run, Scale
from fpsc.policy import Policy
from fpsc.train import config
from fpsc.train.loop import train as fpsc_train


def train(
    run: Run, scale: Scale, folder: Path, tell: Callable[[str, int, int], None]
) -> tuple[Training, Path]:
    """Train a variant, from its last checkpoint in `folder` where there is one.

    Returns:
        What the record says of it, and the folder of the weights.

    Raises:
        UserError, TrainingFailed: as `fpsc train`.
    """
    given = configuration(run, scale, folder)
    output, policy = Path(given["output"]), run.variant.train
    assert policy is not None
    if not (output / "result.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Policy.from_dict(policy).save(folder / "policy.yaml")

        def on_step(what: str, done: int, total: int) -> None:
            tell(f"{run.name}: training", done, total)

        fpsc_train(config.from_value(given), on_step=on_step)
    found = json.loads((output / "result.json").read_text(encoding="utf-8"))
    curve = [
        (each["step"], each["dense_mean"], each["sparse_mean"]) for each in found["validations"]
    ]
    training = Training(
        steps=found["steps"],
        seconds=found["seconds"],
        curve=tuple((int(step), dense, sparse) for step, dense, sparse in rounded(curve)),
    )
    return training, output / "weights"


def configuration(run: Run, scale: Scale, folder: Path) -> dict[str, Any]:
    """What `fpsc train` gets."""
    steps = scale.training["optimiser"]["steps"]
    fixed: Document = {
        "fpsc-train": 1,
        "model": scale.model,
        "policy": str(folder / "policy.yaml"),
        "output": str(folder / "output"),
        "data": {"train": "demo", "validation": "demo"},
        "baseline": run.variant.baseline,
        "validation": {
            "every": max(steps // 4, 1),
            "clips": min(scale.validation_clips, 2),  # its course; the losses are measured apart
            "noise": list(scale.noise),
        },
        "checkpoints": {"every": max(steps // 16, 1), "keep": 1},
        "tensorboard": False,
        "seed": run.seed,
    }
    how = {k: v for k, v in scale.training.items() if k != "ramp" or not run.variant.baseline}
    return fixed | how
