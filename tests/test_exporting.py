"""`fpsc.export`: the rewritten model as an ExportedProgram, in AOTInductor, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import fpsc
from fpsc.policy import Policy
from tests.thresholds import COMPILED_DENSE, COMPILED_FP8, relative_rms
from tests.wan import PHASES, reference_forward, small_inputs, small_wan

TIMESTEPS = (950.0, 500.0, 100.0)
"""One in every phase of `PHASES`."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_dict(PHASES)


@pytest.fixture(scope="module")
def program(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> ExportedProgram:
    path = tmp_path_factory.mktemp("policy") / "phases.yaml"
    policy.save(path)
    return fpsc.export(small_wan(), (), small_inputs(), policy=str(path))


def check(call: Any, policy: Policy) -> None:
    """A call of the model, at every phase, against the reference in the uncompiled model."""
    model = small_wan()
    for timestep in TIMESTEPS:
        inputs = small_inputs((timestep,))
        with torch.no_grad():
            expected = reference_forward(model, inputs, policy)
            assert relative_rms(call(**inputs)[0], expected) <= COMPILED_FP8


def test_program_follows_the_timestep(program: ExportedProgram, policy: Policy) -> None:
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("fpsc.attention.default") == 2
    assert names.count("fpsc.noise_rows.default") == 1
    check(program.module(), policy)


def test_program_has_the_weights_by_their_names(program: ExportedProgram) -> None:
    """And the tables of the policy, so that both can be loaded into it."""
    weights = {n: v for n, v in program.state_dict.items() if not n.startswith("fpsc_")}
    expected = small_wan().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {"fpsc_cells", "fpsc_modes", "fpsc_edges", "fpsc_list_idx_0"} <= set(program.state_dict)


def test_saved_and_loaded(program: ExportedProgram, policy: Policy, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "wan.pt2")
    check(torch.export.load(tmp_path / "wan.pt2").module(), policy)


def test_aot_inductor(program: ExportedProgram, policy: Policy, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "wan.pt2")
    )
    check(torch._inductor.aoti_load_package(package), policy)


def test_other_shapes_are_refused(program: ExportedProgram) -> None:
    with pytest.raises((AssertionError, RuntimeError), match="hidden_states"):
        program.module()(**small_inputs(grid=(3, 8, 6)))


def test_output_is_what_the_model_returns() -> None:
    """Also of a model that is compiled already, which stays as it is."""
    model = fpsc.compile(small_wan(), policy="dense")
    inputs = {**small_inputs(), "return_dict": True}
    with torch.no_grad():
        expected = small_wan()(**inputs)
        found = fpsc.export(model, (), inputs, policy="dense").module()(**inputs)
    assert type(found) is type(expected)
    assert relative_rms(found.sample, expected.sample) <= COMPILED_DENSE


def test_what_cannot_be_exported_says_why() -> None:
    with pytest.raises(fpsc.ExportError, match="_Doubled: no attention in it was replaced"):
        fpsc.export(_Doubled(), (torch.randn(1, 2),))
    inputs = small_inputs()
    latent, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with pytest.raises(fpsc.ExportError, match="the timestep is not a tensor"):
        options = {"timestep": {"convention": "flow"}}
        fpsc.export(_Numbered(), (latent, 500.0, text), policy="dense", options=options)
    with pytest.raises(fpsc.ExportError, match="is not one graph"):
        fpsc.export(_Broken(), (torch.randn(1, 2),))


class _Numbered(nn.Module):
    """A model that takes its timestep as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_wan()

    def forward(self, latent: torch.Tensor, timestep: float, text: torch.Tensor) -> torch.Tensor:
        return self.inner(latent, torch.full((1,), timestep), text, return_dict=False)[0]


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class _Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x
