"""The public line with the Triton kernels, in Triton's interpreter, on a small Wan transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fpsc
from fpsc.kernels.triton import interpreter
from fpsc.policy import Policy
from tests.thresholds import COMPILED_FP8, COMPILED_GRAD, TRITON_MODEL_BF16, relative_rms
from tests.wan import PHASES, reference_forward, small_inputs, small_wan

if not interpreter.ACTIVE:
    pytest.skip("kernels are compiled here: TRITON_INTERPRET=0", allow_module_level=True)

from fpsc.kernels.triton import prologue

GRID = (2, 5, 8)
RULES = {**PHASES, "tile": [1, 5, 4]}
"""Four tiles; phases of 4, 2 and 1 key tiles a query."""


@pytest.fixture(autouse=True)
def _few_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue, "CHUNKS", 3)
    fpsc.reports(clear=True)
    counters.clear()


@pytest.fixture
def policy(tmp_path: Path) -> str:
    Policy.from_dict(RULES).save(tmp_path / "phases.yaml")
    return str(tmp_path / "phases.yaml")


def compiled(model: torch.nn.Module, policy: str, kernel: str = "triton", **more: Any) -> Any:
    options = {"kernel": kernel, "policy": policy, **more}
    return torch.compile(model, backend="fpsattn", fullgraph=True, options=options)


def test_every_phase_equals_the_reference_and_is_compiled_once(policy):
    model, rules = small_wan(), Policy.load(policy)
    timesteps = ((950.0,), (600.0,), (100.0,))
    fast = compiled(model, policy)
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            inputs = small_inputs(t, GRID)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                found = fast(**inputs)[0]
            assert relative_rms(found, reference_forward(model, inputs, rules)) <= COMPILED_FP8
    assert counters["stats"]["unique_graphs"] == 1
    (report,) = fpsc.reports()
    assert [p.forwards for p in report.phases] == [1, 1, 1]
    (kernel,) = report.kernels
    assert kernel.startswith("triton (the Triton kernels, on Triton's interpreter")


def test_gradients_equal_the_reference(policy):
    """Each batch element in a phase of its own."""
    model, inputs = small_wan(), small_inputs((950.0, 600.0), GRID)
    weight = torch.randn(inputs["hidden_states"].shape)
    (reference_forward(model, inputs, Policy.load(policy)) * weight).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    (compiled(model, policy)(**inputs)[0] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if expected[name].norm() > 1e-6 * parameter.numel() ** 0.5:
            assert relative_rms(parameter.grad, expected[name]) <= COMPILED_GRAD, name


def test_bfloat16_equals_the_cpu_kernel(policy):
    """With norm and rotation left in the graph, whose results are rounded alike for both."""
    model = small_wan().bfloat16()
    for block in model.blocks:  # so that its attention counts
        block.attn1.to_out[0].weight.data *= 30
    inputs = small_inputs((600.0,), GRID)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].bfloat16()
    found = []
    with torch.no_grad():
        for kernel in ("triton", "cpu"):
            torch._dynamo.reset()
            fast = compiled(model, policy, kernel, fuse_prologue=False)
            found.append(fast(**inputs)[0])
    assert found[0].dtype == torch.bfloat16
    assert [r.kernels[0].split()[0] for r in fpsc.reports()] == ["triton", "cpu"]
    assert relative_rms(*found) <= TRITON_MODEL_BF16
