"""Compile caches: our sources and a policy's structure are in their key, its numbers are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpsc.policy import Policy
from tests.wan import PHASES

# One block in a process of its own, forward and backward; prints how the caches answered.
SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
import fpsc.backend

class Video(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, latent, timestep):
        x = self.patch(latent)
        t, y, w = x.shape[2:]
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x.transpose(1, 2).reshape(1, t, y, w, 32) * timestep

torch.manual_seed(0)
compiled = torch.compile(
    Video(), backend=fpsc.backend.fpsattn, fullgraph=True,
    options={"policy": sys.argv[1], "timestep": {"convention": "flow"}, "strict": True},
)
compiled(torch.randn(1, 4, 3, 16, 20), torch.tensor([600.0])).sum().backward()
aot, fx = counters["aot_autograd"], counters["inductor"]
print(json.dumps({
    "aot": [aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"]],
    "inductor": [fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"]],
}))
"""
MISS = {"aot": [0, 1, 0], "inductor": [0, 2]}


@pytest.fixture
def copy(tmp_path: Path, checkout: Path) -> Path:
    """A copy of the sources that a test may edit."""
    for folder in ("fpsc", "passes", "kernels"):
        shutil.copytree(
            checkout / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "weights"),
        )
    edit_policy(tmp_path)
    (tmp_path / "run.py").write_text(SCRIPT)
    return tmp_path


def run(copy: Path) -> dict[str, list[int]]:
    env = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "TORCHINDUCTOR_CACHE_DIR": str(copy / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "run.py", "policy.yaml"],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "replaced 1 of 1 video self-attentions" in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {file}"
    file.write_text(text.replace(old, new, 1))


def edit_policy(copy: Path, **changes: object) -> None:
    policy = {**PHASES, "except": [], **changes}
    Policy.from_dict(policy).save(copy / "policy.yaml")


def test_what_misses_the_caches_and_what_does_not(copy: Path):
    assert run(copy) == MISS
    hit = run(copy)
    assert hit["aot"] == [1, 0, 0] and hit["inductor"][1] == 0

    modes = {**PHASES["modes"], "near": {"pattern": "near", "keep": 0.25, "dtype": "fp8"}}
    edit_policy(copy, modes=modes, schedule=[{"noise": "1.0..0.0", "use": "near"}])
    assert run(copy) == hit, "a number in a policy must not recompile"

    edit_policy(copy, tile=[3, 4, 5])
    assert run(copy) == MISS, "a policy's structure"

    edit(copy / "kernels" / "ops.py", "def _backward(", "# changed\ndef _backward(")
    assert run(copy) == MISS, "the op's backward"

    edit(copy / "kernels" / "ops.py", "def _attention_fake(", "# changed\ndef _attention_fake(")
    assert run(copy) == MISS, "the op's fake"

    edit(copy / "kernels" / "cpu.py", "def backward(", "# changed\ndef backward(")
    assert run(copy) == MISS, "a kernel"

    edit(copy / "passes" / "rewrite.py", "def rewrite(", "# changed\ndef rewrite(")
    assert run(copy) == MISS, "a pass"
