"""LoRA through peft, loaded, swapped and removed by diffusers' own calls."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._dynamo.utils import counters

import fpsc
from fpsc.policy import Policy
from tests.around.common import POLICY, TIMESTEPS, compiled
from tests.compiled import NO_RECOMPILE
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapter(seed: int, rank: int) -> dict[str, torch.Tensor]:
    """Weights of a LoRA as a file has them."""
    model = small_wan()
    model.add_adapter(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False))
    torch.manual_seed(seed)
    state = get_peft_model_state_dict(model)
    return {f"transformer.{k}": 0.2 * torch.randn_like(v) for k, v in state.items()}


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_hot_swap_recompiles_nothing(way: str, policy: str, no_inductor: None) -> None:
    model, plain = small_wan(), small_wan()
    first, second = adapter(1, 4), adapter(2, 6)
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(dict(first), adapter_name="a")
    plain.load_lora_adapter(dict(first), adapter_name="a")
    run = compiled(model, way, policy)
    found = []
    with torch.no_grad():
        found.append(run(**small_inputs((600.0,)))[0])
        model.load_lora_adapter(dict(second), adapter_name="a", hotswap=True)
        with NO_RECOMPILE:
            found += [run(**small_inputs((t,)))[0] for t in TIMESTEPS]
        rules = Policy.from_dict(POLICY)
        expected = [reference_forward(plain, small_inputs((600.0,)), rules)]
        plain.delete_adapters("a")
        plain.load_lora_adapter(dict(second), adapter_name="a")
        expected += [reference_forward(plain, small_inputs((t,)), rules) for t in TIMESTEPS]
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= COMPILED_FP8
    assert relative_rms(found[2], found[0]) > 10 * COMPILED_FP8  # the second is another LoRA
    assert counters["stats"]["unique_graphs"] == 1
    (report,) = fpsc.reports()
    assert report.replaced == (1 if way == "blocks" else 2) and report.layers == 2
