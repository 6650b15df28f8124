"""Triton's interpreter casts as torch and a GPU do, and did not before it was repaired."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fpsc.kernels.triton import interpreter
from fpsc.kernels.triton.launch import launch

if not interpreter.ACTIVE:
    pytest.skip("kernels are compiled here: TRITON_INTERPRET=0", allow_module_level=True)

ROWS = 1 << 14
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)


@triton.jit
def copy(x_ptr, y_ptr, ROWS: tl.constexpr):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def product(x_ptr, y_ptr, z_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(z_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def add_up(x_ptr, ends_ptr, y_ptr):
    total = 0.0
    for i in range(tl.load(ends_ptr), tl.load(ends_ptr + 1)):
        total += tl.load(x_ptr + i)
    for i in tl.range(0, tl.load(ends_ptr + 1)):
        total += tl.load(x_ptr + i)
    tl.store(y_ptr, total)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By a kernel."""
    padded = torch.zeros(-(-len(x) // ROWS) * ROWS, dtype=x.dtype)
    padded[: len(x)] = x
    y = torch.empty_like(padded, dtype=dtype)
    launch(copy, (len(padded) // ROWS,), padded, y, ROWS=ROWS)
    return y[: len(x)]


def torch_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest even; in 8 bits saturated, as `cvt.rn.satfinite`."""
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype) if dtype in LARGEST else x.to(dtype)


def numbers(dtype: torch.dtype) -> dict[str, Tensor]:
    """float32 numbers of every sort, as a cast to `dtype` sees them."""
    width = torch.finfo(dtype).bits
    bits = torch.arange(1 << width, dtype=torch.int32)
    every = bits.to(torch.uint8 if width == 8 else torch.int16).view(dtype).float()
    ordered = every[every.isfinite()].unique()
    middle = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
    tiny = torch.finfo(dtype).tiny
    sorts = {
        "exact": every,
        "ties": middle,
        "beside ties": torch.cat([middle.nextafter(torch.tensor(s)) for s in (-1e38, 1e38)]),
        "subnormal": torch.linspace(-tiny, tiny, 4097),
        "random": torch.randn(1 << 14) * 2.0 ** torch.randint(-20, 12, (1 << 14,)),
        "beyond": torch.tensor([449, 464, 465, 500, 512, 1e5, 6e4, 1e9, 3.4e38, -500, -1e30]),
        "special": torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-40]),
    }
    return sorts


def same(x: Tensor, y: Tensor) -> Tensor:
    """Where both are one number, zeros with one sign, or both NaN."""
    x, y = x.float(), y.float()
    return ((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_torchs(dtype):
    for sort, x in numbers(dtype).items():
        wrong = ~same(cast(x, dtype), torch_cast(x, dtype))
        assert not wrong.any(), f"{sort}: {x[wrong][:5].tolist()}"


@pytest.mark.parametrize("to", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float16], ids=str)
def test_widening_is_exact(dtype, to):
    """Every number, NaN and infinity that a narrow type has."""
    if (dtype, to) == (torch.bfloat16, torch.float16):
        pytest.skip("not a widening")
    width = torch.finfo(dtype).bits
    bits = torch.arange(1 << width, dtype=torch.int32)
    x = bits.to(torch.uint8 if width == 8 else torch.int16).view(dtype)
    assert same(cast(x, to), x.to(to)).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_products_are_of_numbers(dtype):
    x, y = (torch.randn(32, 32).to(dtype) for _ in range(2))
    found = torch.full((32, 32), torch.nan)
    launch(product, (1,), x, y, found, SIZE=32)
    torch.testing.assert_close(found, x.float() @ y.float())
    x[3, 4] = torch.nan
    launch(product, (1,), x, y, found, SIZE=32)
    assert torch.equal(found.isnan().any(dim=1), torch.arange(32) == 3)


def test_loaded_numbers_end_ranges():
    found = torch.empty(1)
    x, ends = torch.arange(20).float(), torch.tensor([3, 11], dtype=torch.int32)
    launch(add_up, (1,), x, ends, found)
    assert found == x[3:11].sum() + x[:11].sum()


UNREPAIRED = """
import sys, torch
from fpsc.kernels.triton import interpreter
interpreter.repair = lambda: None
from tests.kernels import test_interpreter as t
for dtype in t.NARROW:
    for sort, x in t.numbers(dtype).items():
        if not t.same(t.cast(x, dtype), t.torch_cast(x, dtype)).all():
            print(dtype, sort)
"""


def test_without_the_repair_casts_are_wrong(checkout: Path):
    """Were one of them right, less would have to be repaired."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNREPAIRED],
        capture_output=True, text=True, cwd=checkout, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wrong = set(done.stdout.splitlines())
    for dtype in NARROW:
        assert {f"{dtype} ties", f"{dtype} random"} <= wrong
    for dtype in LARGEST:
        assert {f"{dtype} beyond", f"{dtype} subnormal"} <= wrong


def test_repaired_once(monkeypatch):
    from triton.runtime import interpreter as triton_interpreter

    before = triton_interpreter._convert_float
    interpreter.repair()
    assert triton_interpreter._convert_float is before


@pytest.mark.parametrize("name", ["_convert_float", "_patch_lang_tensor", "InterpreterBuilder"])
def test_another_interpreter_is_an_error(name, monkeypatch):
    from triton.runtime import interpreter as triton_interpreter

    monkeypatch.delattr(triton_interpreter, name)
    monkeypatch.setattr(triton_interpreter, "_repaired_by_fpsc", False)
    message = f"interpreter of Triton {triton.__version__} cannot be repaired .*{name}"
    with pytest.raises(RuntimeError, match=message):
        interpreter.repair()
