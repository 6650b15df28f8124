"""Which implementation serves a call, and why."""

from __future__ import annotations

import pytest
import torch

from fpsc.kernels import select as select_
from fpsc.kernels.ops import IMPLEMENTATIONS
from fpsc.kernels.saved import padded_head_dim
from fpsc.kernels.select import DTYPES, KERNELS, fp8_support, select
from fpsc.kernels.triton import configs

TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)


@pytest.fixture(autouse=True)
def _triton(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(select_, "_triton_version", lambda: (3, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 128, 256])
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", torch.device("cuda", 1)], ids=str)
def test_a_choice_has_an_implementation(device, dim, dtype):
    for capability in (TURING, AMPERE, ADA, HOPPER, BLACKWELL):
        assert select(device, dtype, dim, fp8=True, capability=capability).name in IMPLEMENTATIONS


def test_names():
    assert set(IMPLEMENTATIONS) == set(KERNELS)
    with pytest.raises(
        ValueError, match="expected one of auto, cpu, triton, gluon, hopper, reference, found 'x'"
    ):
        select("cpu", torch.float32, 64, fp8=True, kernel="x")


def test_on_cpu():
    assert select("cpu", torch.float32, 64, fp8=False) == select_.Choice("cpu", "the CPU kernel")
    assert "emulate e4m3" in select("cpu", torch.float32, 64, fp8=True).reason
    assert select("cpu", torch.float32, 64, fp8=True, kernel="cpu").name == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_what_runs_anywhere_when_it_is_named(device, kernel):
    choice = select(device, torch.bfloat16, 64, fp8=True, kernel=kernel, capability=HOPPER)
    assert choice.name == kernel


def test_triton_on_cpu_is_the_interpreter(monkeypatch):
    choice = select("cpu", torch.float32, 64, fp8=True, kernel="triton")
    assert choice.name is None and "set TRITON_INTERPRET=1" in choice.reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = select("cpu", torch.float32, 64, fp8=True, kernel="triton")
    assert choice.name == "triton" and "interpreter" in choice.reason
    assert select("cpu", torch.float32, 64, fp8=True).name == "cpu", "never without being named"


@pytest.mark.parametrize(
    ("capability", "fp8", "name", "reason"),
    [
        (TURING, False, "cpu", "compute capability 7.5, older than 8.0"),
        (AMPERE, False, "triton", "the Triton kernels, on cuda"),
        (AMPERE, True, "cpu", "compute capability 8.0, and e4m3 needs 8.9"),
        (ADA, True, "triton", "the Triton kernels, on cuda"),
        (HOPPER, False, "triton", "the Triton kernels, on cuda"),
        (BLACKWELL, True, "triton", "the Triton kernels, on cuda"),
    ],
)
def test_on_cuda(capability, fp8, name, reason):
    found = select("cuda", torch.bfloat16, 128, fp8=fp8, capability=capability)
    assert found.name == name and reason in found.reason
    named = select("cuda", torch.bfloat16, 128, fp8=fp8, kernel="triton", capability=capability)
    assert named.name == ("triton" if name == "triton" else None)
    assert reason in named.reason, "an explicit choice never falls back"


def test_hopper_has_two_kernels_for_fp8_cells():
    found = select("cuda", torch.bfloat16, 128, fp8=True, capability=HOPPER)
    assert found.name == "hopper"
    assert "on cuda; fp8 cells by Gluon's where the first call measures it" in found.reason
    for name in ("triton", "gluon", "hopper"):
        for fp8 in (True, False):
            named = select("cuda", torch.bfloat16, 128, fp8=fp8, kernel=name, capability=HOPPER)
            assert named.name == name
    assert "Gluon" not in select("cuda", torch.bfloat16, 32, fp8=True, capability=HOPPER).reason


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "capability", "reason"),
    [
        ("cpu", torch.float32, 128, None, "runs on a GPU alone, not on cpu"),
        (
            "cuda",
            torch.bfloat16,
            128,
            BLACKWELL,
            "capability 12.0, and the Gluon kernel is for 9.0",
        ),
        ("cuda", torch.bfloat16, 128, AMPERE, "capability 8.0, and the Gluon kernel is for 9.0"),
        ("cuda", torch.bfloat16, 32, HOPPER, "takes a head_dim within 33..128, not 32"),
        ("cuda", torch.bfloat16, 129, HOPPER, "takes a head_dim within 33..128, not 129"),
        ("cuda", torch.float32, 128, HOPPER, "cast q, k and v to bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["gluon", "hopper"])
def test_where_gluon_cannot_serve(name, device, dtype, dim, capability, reason):
    named = select(device, dtype, dim, fp8=True, kernel=name, capability=capability)
    assert named.name is None and reason in named.reason
    assert f'kernel "{name}" was named, but' in named.reason


def test_a_triton_whose_gluon_nobody_tried(monkeypatch):
    monkeypatch.setattr(select_, "_triton_version", lambda: (3, 9))
    named = select("cuda", torch.bfloat16, 128, fp8=True, kernel="gluon", capability=HOPPER)
    assert named.name is None and "written for Triton 3.6 to 3.8, and this is 3.9" in named.reason
    auto = select("cuda", torch.bfloat16, 128, fp8=True, capability=HOPPER)
    assert auto.name == "triton"


def test_gluon_head_dims_are_those_that_its_configurations_take():
    served = {d for d in range(16, 257) if padded_head_dim(d) in configs.GLUON_HEAD_DIMS}
    assert served == set(select_.GLUON_HEAD_DIMS)


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "triton is not installed"), ((3, 5), "triton 3.5 is older than 3.6")],
)
def test_without_a_triton_that_serves(version, reason, monkeypatch):
    monkeypatch.setattr(select_, "_triton_version", lambda: version)
    auto = select("cuda", torch.bfloat16, 128, fp8=True, capability=HOPPER)
    assert auto.name == "cpu" and reason in auto.reason
    assert "torch operators of the CPU kernel" in auto.reason
    named = select("cuda", torch.bfloat16, 128, fp8=True, kernel="triton", capability=HOPPER)
    assert named.name is None and reason in named.reason


def test_the_installed_triton_has_a_version(monkeypatch):
    monkeypatch.undo()
    version = select_._triton_version()
    assert version is None or version >= (3, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without CUDA")
def test_a_capability_that_nobody_knows():
    assert "the compute capability of cuda is not known" in select(
        "cuda", torch.float32, 64, fp8=False
    ).reason  # fmt: skip
    assert fp8_support("cuda") == (False, "the compute capability of cuda is not known")


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.float64, 64, "dtype torch.float64 is not one of"),
        (torch.float32, 15, "head_dim 15 is not within 16..256"),
        (torch.float32, 257, "head_dim 257 is not within 16..256"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_choice_says_why(dtype, dim, reason, device):
    for kernel in ("auto", *KERNELS):
        choice = select(device, dtype, dim, fp8=False, kernel=kernel, capability=HOPPER)
        assert choice.name is None and reason in choice.reason


def test_fp8_support():
    assert fp8_support("cpu") == (True, "e4m3 rounding is emulated on cpu")
    for capability in (ADA, HOPPER, BLACKWELL):
        assert fp8_support("cuda", capability)[0]
    for capability in (TURING, AMPERE, (8, 6)):
        supported, reason = fp8_support("cuda", capability)
        assert not supported and "e4m3 needs 8.9" in reason


def test_float32_has_no_tensor_cores():
    choice = select("cuda", torch.float32, 128, fp8=True, capability=HOPPER)
    assert choice.name == "cpu" and "cast q, k and v to bfloat16" in choice.reason
    named = select("cuda", torch.float32, 128, fp8=True, kernel="triton", capability=HOPPER)
    assert named.name is None and "cast q, k and v to bfloat16" in named.reason
