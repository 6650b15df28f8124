"""`options={"backward": "fp8"}`, from the public line to the op, and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import fpsc
from fpsc import backend, runtime
from fpsc.cache_key import HOOK, CacheKey
from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.train import config as train_config
from tests.compiled import compile_whole, graphs
from tests.thresholds import COMPILED_GRAD, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan

GRID = (2, 4, 5)
KEYS: list[Any] = []


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(gm: torch.fx.GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        key = config_patches.get(HOOK)
        if isinstance(key, CacheKey):
            KEYS.append(key.uuid())
        return aot_eager(gm, inputs)

    monkeypatch.setattr("fpsc.backend.inductor", compiler)
    fpsc.reports(clear=True)
    counters.clear()
    KEYS.clear()


def gradients(run: Any, of: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    of.zero_grad()
    out = run(**inputs)
    out = out if isinstance(out, Tensor) else out[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    return {
        name: p.grad.clone()
        for name, p in of.named_parameters()
        if p.grad is not None and p.grad.norm() > 1e-6 * p.numel() ** 0.5
    }


def test_gradients_are_those_of_the_reference_in_one_compile(phases: str) -> None:
    """Phases with FP8 cells and one without, all by one graph; the report and the key know."""
    wan, policy = small_wan(), Policy.load(phases)
    compiled = compile_whole(wan, policy=phases, backward="fp8")
    for timestep in (950.0, 600.0, 100.0):
        inputs = small_inputs((timestep,), GRID)
        found = gradients(compiled, wan, inputs)
        expected, plain = (
            gradients(
                lambda fp8=fp8, **x: reference_forward(wan, x, policy, fp8_backward=fp8),
                wan,
                inputs,
            )
            for fp8 in (True, False)
        )
        for name, gradient in expected.items():
            assert relative_rms(found[name], gradient) <= COMPILED_GRAD, name
        some = next(n for n in expected if n.endswith("attn1.to_v.weight"))
        changed = relative_rms(plain[some], expected[some])
        assert changed < 1e-6 if timestep > 900 else changed > 1e-3
    assert graphs() == 1
    (kernel,) = fpsc.reports()[0].kernels
    assert kernel.endswith("; products of backward in FP8)") and not fpsc.reports()[0].notes
    torch._dynamo.reset()
    gradients(compile_whole(wan, policy=phases), wan, small_inputs((600.0,), GRID))
    assert len({repr(key) for key in KEYS}) == 2


def test_where_nothing_is_fp8_it_says_why(phases: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, lead = small_inputs((100.0,), GRID), "option 'backward': the products of backward are"
    with torch.no_grad():
        compile_whole(small_wan(), policy="dense", backward="fp8")(**inputs)
        torch._dynamo.reset()
        for module in (backend, runtime):
            monkeypatch.setattr(module, "fp8_support", lambda device: (False, "it is old"))
        with pytest.warns(UserWarning, match="not in FP8: it is old"):
            compile_whole(small_wan(), policy=phases, backward="fp8")(**inputs)
    dense, old = (r.notes for r in fpsc.reports())
    assert dense == [f"{lead} not in FP8: no cell of these sites is computed in FP8"]
    assert f"{lead} not in FP8: it is old" in old


def test_other_values_are_refused() -> None:
    with pytest.raises(Exception, match=r"option 'backward'.*bf16.*fp8.*found 'fp4'"):
        compile_whole(small_wan(), backward="fp4")(**small_inputs((600.0,), GRID))


def test_training_takes_it(tmp_path: Path) -> None:
    given = {"fpsc-train": 1, "model": "demo", "policy": "demo", "output": str(tmp_path)}
    config = train_config.from_value({**given, "backward": "fp8"})
    assert config.spec.backward == "fp8"
    plain = train_config.from_value(given)
    assert plain.spec.backward == "bf16"
    assert train_config.differences(config.values(), plain) == [
        'backward: expected "fp8" as it began, found "bf16"'
    ]
    began = plain.values()
    del began["backward"]  # by a version that did not know of it
    assert train_config.differences(began, plain) == []
    with pytest.raises(UserError, match=r"backward.*baseline"):
        train_config.from_value({**given, "backward": "fp8", "baseline": True})
