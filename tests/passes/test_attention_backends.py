"""`model.set_attention_backend(...)` of diffusers before the model is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import fpsc
from fpsc.policy import Policy
from tests.families import MODELS
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import PHASES, reference_forward, small_inputs, small_wan

pytestmark = pytest.mark.usefixtures("no_inductor", "native_again")


@pytest.fixture
def native_again() -> Iterator[None]:
    """The setting is the process's."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize("name", ["native", "flex", "_native_math", "_native_flash"])
def test_backends_that_are_rewritten(name: str, tmp_path: Path) -> None:
    """Of the same numbers as the reference with a sparse policy, whatever computed attention."""
    policy = Policy.from_dict(PHASES)
    policy.save(tmp_path / "phases.yaml")
    inputs = small_inputs((600.0,))
    expected = reference_forward(small_wan(), inputs, policy)
    model = small_wan()
    model.set_attention_backend(name)
    options = {"policy": str(tmp_path / "phases.yaml")}
    fpsc.reports(clear=True)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fpsattn", fullgraph=True, options=options)
        found = compiled(**inputs)[0]
    assert relative_rms(found, expected) <= COMPILED_FP8
    (report,) = fpsc.reports()
    assert [(s.role, s.replaced) for s in report.sites] == [("video", True), ("cross", False)] * 2


def test_flex_with_a_block_mask_is_named_with_the_fix() -> None:
    """Hunyuan's key padding becomes a block mask there, of values that the graph does not show."""
    case = next(m for m in MODELS if m.key == "HunyuanVideoTransformer3DModel")
    model: Any = case.build((3, 4, 5))
    inputs = case.inputs((3, 4, 5))
    fpsc.reports(clear=True)
    model.set_attention_backend("flex")
    with torch.no_grad(), pytest.warns(fpsc.NothingReplacedWarning):
        torch.compile(model, backend="fpsattn", options={"policy": "dense"})(**inputs)
    left = [s for r in fpsc.reports() for s in r.sites if "FlexAttention" in s.reason]
    assert left
    assert all('model.set_attention_backend("native")' in s.reason for s in left)
    torch._dynamo.reset()
    fpsc.reports(clear=True)
    model.set_attention_backend("native")
    with torch.no_grad():
        torch.compile(model, backend="fpsattn", options={"policy": "dense"})(**inputs)
    assert sum(r.replaced for r in fpsc.reports()) == 3


@pytest.mark.parametrize("name", ["sage", "flash", "flash_varlen", "_flash_3", "xformers"])
def test_backends_that_are_not_installed_are_diffusers_own_error(name: str) -> None:
    model = small_wan()
    with pytest.raises(RuntimeError, match="not usable because of missing package"):
        model.set_attention_backend(name)
    assert all(
        getattr(getattr(m, "processor", None), "_attention_backend", None) is None
        for m in model.modules()
    )
