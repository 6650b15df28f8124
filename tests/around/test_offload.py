"""Hooks that move a model's weights in and out, with the CPU as both places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from torch import nn

import fpsc
from fpsc.policy import Policy
from tests.around.common import POLICY, TIMESTEPS
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan

RULES = Policy.from_dict(POLICY)
CPU = torch.device("cpu")


def by_blocks(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaves(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def whole_model(model: nn.Module) -> None:
    """What a pipeline's `enable_model_cpu_offload` does to each model."""
    add_hook_to_module(model, CpuOffload(execution_device="cpu"))


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.parametrize("offload", [by_blocks, whole_model])
def test_every_forward_has_its_own_row(
    offload: Callable[[nn.Module], None], way: str, policy: str, no_inductor: None
) -> None:
    """The hooks break the graph before the blocks, which then see no timestep."""
    model = small_wan()
    offload(model)
    options = {"policy": policy}
    run: nn.Module = model
    if way == "blocks":
        model.compile_repeated_blocks(backend="fpsattn", options=options)
    else:
        run = torch.compile(model, backend="fpsattn", options=options)
    with torch.no_grad():
        for timestep in TIMESTEPS:
            inputs = small_inputs((timestep,))
            expected = reference_forward(small_wan(), inputs, RULES)
            assert relative_rms(run(**inputs)[0], expected) <= COMPILED_FP8
    (report,) = fpsc.reports()
    assert report.replaced >= 1 and report.layers == 2
    assert sum(p.forwards for p in report.phases) == len(TIMESTEPS)


def test_hooks_on_every_leaf_are_named(policy: str, no_inductor: None) -> None:
    """No graph holds an attention with its projections: all stays dense, and is said so."""
    model = small_wan()
    by_leaves(model)
    with torch._dynamo.config.patch(recompile_limit=100), torch.no_grad():
        run = torch.compile(model, backend="fpsattn", options={"policy": policy})
        inputs = small_inputs((600.0,))
        with pytest.warns(fpsc.NothingReplacedWarning, match="use block-level group offload"):
            found = run(**inputs)[0]
        assert relative_rms(found, small_wan()(**inputs)[0]) <= COMPILED_FP8
    assert not any(r.replaced for r in fpsc.reports())
