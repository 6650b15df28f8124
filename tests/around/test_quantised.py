"""Quantised linear layers around the attention: sites and layers are found all the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fpsc
from fpsc.policy import Policy
from tests.around.common import POLICY, TIMESTEPS, compiled
from tests.compiled import NO_RECOMPILE
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan


def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))


def bitsandbytes_4bit(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        return new.to("cpu")

    _replace_linears(model, quantised)


def bitsandbytes_8bit(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    _replace_linears(model, quantised)


@torch.library.custom_op("fpsc_tests::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return nn.functional.linear(x, packed.to(x.dtype) * scale[:, None], bias)


@packed_linear.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class PackedLinearDouble(nn.Module):
    """A test double of a quantised linear layer: int8 weights, multiplied by an operator that
    belongs to a library."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        scale = old.weight.detach().abs().amax(1) / 127
        packed = (old.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = old.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.weight, self.scale, self.bias)


def packed_double(model: nn.Module) -> None:
    _replace_linears(model, PackedLinearDouble)


def _replace_linears(model: nn.Module, quantised: Callable[[nn.Linear], nn.Module]) -> None:
    linears = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks")
    ]
    assert linears
    for name, layer in linears:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, quantised(layer))


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.parametrize(
    "quantise", [torchao_int8, bitsandbytes_4bit, bitsandbytes_8bit, packed_double]
)
def test_sites_and_layers_are_known(
    quantise: Callable[[nn.Module], None], way: str, policy: str, no_inductor: None
) -> None:
    model, plain = small_wan(), small_wan()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        quantise(model)
        quantise(plain)
        run = compiled(model, way, policy)
        rules = Policy.from_dict(POLICY)
        with torch.no_grad():
            expected = [reference_forward(plain, small_inputs((t,)), rules) for t in TIMESTEPS]
            run(**small_inputs((TIMESTEPS[0],)))
            run(**small_inputs((TIMESTEPS[0],)))  # bitsandbytes packs at the first call
            with NO_RECOMPILE:
                found = [run(**small_inputs((t,)))[0] for t in TIMESTEPS]
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= COMPILED_FP8
    report = fpsc.reports()[-1]
    assert report.replaced == (1 if way == "blocks" else 2)
    assert report.layers == 2
