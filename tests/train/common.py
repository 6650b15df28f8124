"""A small model with clips of its own, and runs of it; as a program, one run in a process.

    python -m tests.train.common CONFIG [STOP_AT]

Rewritten graphs run as they are, without Inductor, which a test of Inductor's own part leaves on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsc.train.config import Config, load
from fpsc.train.data.write import Encoded, writing
from tests.wan import PHASES, TEXT, small_wan

LATENTS = (4, 3, 16, 20)  # with patches of 1x2x2: a grid of 3x8x10, 12 tiles of `PHASES`
GRID = (3, 8, 10)

RUN: dict[str, Any] = {
    "fpsc-train": 1,
    "model": "model",
    "policy": "policy.yaml",
    "output": "run",
    "data": {"train": "latents", "validation": "latents"},
    "objective": {"prediction": "velocity"},
    "optimiser": {"lr": 1e-3, "warmup": 2, "steps": 4, "batch": 2},
    "precision": "fp32",
    "validation": {"every": 2, "clips": 2, "noise": [0.95, 0.3]},
    "checkpoints": {"every": 2, "keep": 2},
    "save_as": "fp32",
    "tensorboard": False,
}


def prepare(folder: Path, **model: Any) -> None:
    """Write `model/`, `latents/` and `policy.yaml`, which `RUN` names."""
    from fpsc.policy import Policy

    small_wan(**model).save_pretrained(folder / "model")
    Policy.from_dict(PHASES).save(folder / "policy.yaml")
    empty = {"empty.encoder_hidden_states": torch.zeros(TEXT, 32)}
    with writing(folder / "latents", {"vae": "none"}, empty, size=4) as writer:
        for number in range(10):
            writer.add(Encoded(f"clip {number}", "", number >= 8, clip(number)))


def clip(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    wave = torch.linspace(0, 6, LATENTS[3]) + number
    return {
        "latents": wave.sin() + 0.3 * torch.randn(LATENTS, generator=generator),
        "conditioning.encoder_hidden_states": torch.randn(TEXT, 32, generator=generator),
    }


def configured(folder: Path, changes: Mapping[str, Any] | None = None, **values: Any) -> Config:
    """`RUN` with other values, as a file in the folder; changes by dotted name."""
    from ruamel.yaml import YAML

    path = folder / f"{values.get('output', 'run')}.yaml"
    with path.open("w") as file:
        YAML().dump({**RUN, **values, "output": str(folder / values.get("output", "run"))}, file)
    return load(path, changes)


def losses(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without its times."""
    from fpsc.train.log import read

    lines = read(folder / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def without_inductor() -> None:
    import fpsc.backend

    fpsc.backend.inductor = lambda gm, inputs, config_patches=None: gm.forward


def started(
    config: Path, *arguments: str, processes: int = 1, checkout: Path
) -> subprocess.Popen[str]:
    """A run in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, "-m", "tests.train.common", str(config), *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What a run printed; it must have ended well."""
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-4000:]
    return out


def main() -> None:
    from fpsc.train.loop import train

    without_inductor()
    stop_at = int(sys.argv[2]) if len(sys.argv) > 2 else None
    result = train(load(sys.argv[1]), stop_at=stop_at)
    print(json.dumps(None if result is None else result.values["after"]))


if __name__ == "__main__":
    main()
