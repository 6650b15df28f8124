"""Which implementation serves a call, and why."""

from __future__ import annotations

import pytest
import torch

from fpsc.kernels.ops import IMPLEMENTATIONS
from fpsc.kernels.select import DTYPES, select


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 128, 256])
@pytest.mark.parametrize("device", ["cpu", "cuda", torch.device("cuda", 1)], ids=str)
def test_a_choice_has_an_implementation(device, dim, dtype):
    assert select(device, dtype, dim, fp8=True).name in IMPLEMENTATIONS


def test_reasons():
    assert select("cpu", torch.float32, 64, fp8=False).reason == "the CPU kernel"
    assert "emulate e4m3" in select("cpu", torch.float32, 64, fp8=True).reason
    assert "no kernel for cuda" in select("cuda", torch.float32, 64, fp8=False).reason


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.float64, 64, "dtype torch.float64 is not one of"),
        (torch.float32, 15, "head_dim 15 is not within 16..256"),
        (torch.float32, 257, "head_dim 257 is not within 16..256"),
    ],
)
def test_no_choice_says_why(dtype, dim, reason):
    choice = select("cpu", dtype, dim, fp8=False)
    assert choice.name is None and reason in choice.reason
