"""Norms and rotations done by the op, in every way to compile and train: AOTAutograd's graphs, run
as they are (what Inductor makes of them is tested elsewhere)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import fpsc
from fpsc.policy import Policy
from tests.compiled import compile_blocks, compile_whole, graphs
from tests.thresholds import COMPILED_FP8, COMPILED_GRAD, HALF_AGAINST_FP32, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan

GRID, TURNED = (2, 4, 5), (2, 5, 4)
FUSED = {"fused (rms across heads + rope interleaved)"}


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(gm: torch.fx.GraphModule, inputs: Any, config_patches: object = None) -> Any:
        return aot_eager(gm, inputs)

    monkeypatch.setattr("fpsc.backend.inductor", compiler)
    fpsc.reports(clear=True)
    counters.clear()


def model() -> nn.Module:
    """A small Wan model; weights of its norms are none of them ones."""
    made = small_wan()
    for name, parameter in made.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def fused() -> set[str]:
    return {s.prologue for r in fpsc.reports() for s in r.sites if s.replaced}


def gradients(run: Any, of: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    of.zero_grad()
    out = run(**inputs)
    out = out if isinstance(out, Tensor) else out[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert {n for n in expected if "attn1.norm_q" in n} and found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6 * gradient.numel() ** 0.5:
            assert relative_rms(found[name], gradient) <= limit, name


def test_gradients_are_those_of_the_reference(phases: str) -> None:
    """Batch elements in different phases; with checkpointed blocks too."""
    wan, inputs = model(), small_inputs((600.0, 100.0), GRID)
    policy = Policy.load(phases)
    expected = gradients(lambda **x: reference_forward(wan, x, policy), wan, **inputs)
    for checkpointed in (False, True):
        torch._dynamo.reset()
        if checkpointed:
            wan.train()
            wan.enable_gradient_checkpointing()
        found = gradients(compile_whole(wan, policy=phases, fuse_prologue=True), wan, **inputs)
        check_gradients(found, expected, COMPILED_GRAD)
    assert fused() == FUSED


@torch.no_grad()
def test_one_graph_for_blocks_and_grids_of_one_length(phases: str) -> None:
    wan, policy = model(), Policy.load(phases)
    compile_blocks(wan, policy=phases, fuse_prologue=True)
    for i, grid in enumerate((GRID, TURNED)):
        inputs = small_inputs((100.0,), grid)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = wan(**inputs)[0]
        assert relative_rms(found, reference_forward(model(), inputs, policy)) <= COMPILED_FP8
    assert graphs() == 1 and fused() == FUSED


@torch.no_grad()
def test_any_grid_with_dynamic_shapes(phases: str) -> None:
    wan, policy = model(), Policy.load(phases)
    compiled = compile_whole(wan, dynamic=True, policy=phases, fuse_prologue=True)
    for grid in (GRID, (3, 4, 5)):
        inputs = small_inputs((100.0,), grid)
        found = compiled(**inputs)[0]
        assert relative_rms(found, reference_forward(wan, inputs, policy)) <= COMPILED_FP8
    assert fused() == FUSED


def test_autocast(phases: str) -> None:
    """Projections in bfloat16, weights of norms and tables in float32."""
    wan, inputs = model(), small_inputs((950.0,), GRID)
    found = []
    for wanted in (False, True):
        torch._dynamo.reset()
        compiled = compile_whole(wan, policy=phases, fuse_prologue=wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(compiled, wan, **inputs))
    assert any(p.startswith("fused") for p in fused())
    check_gradients(found[1], found[0], 20 * HALF_AGAINST_FP32)


@torch.no_grad()
def test_exported(phases: str) -> None:
    wan, inputs = model(), small_inputs((600.0,), GRID)
    program = fpsc.export(wan, (), inputs, policy=phases, options={"fuse_prologue": True})
    (site, *_) = [n for n in program.graph.nodes if n.target is torch.ops.fpsc.attention.default]
    arguments = torch.ops.fpsc.attention.default._schema.arguments
    given = {a.name: value for a, value in zip(arguments, site.args, strict=False)} | site.kwargs
    assert given["norm"] == "rms-across" and given["rotation"] == "interleaved"
    found = program.module()(**inputs)[0]
    expected = reference_forward(wan, inputs, Policy.load(phases))
    assert relative_rms(found, expected) <= COMPILED_FP8


def test_options_are_known() -> None:
    with pytest.raises(Exception, match="fuse_prologue"):
        compile_whole(model(), fuse_prologue="sometimes")(**small_inputs((600.0,), GRID))
