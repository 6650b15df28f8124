"""bench/gradients.py: its roundings are those of the specification, its file says what docs say."""

from __future__ import annotations

import json
from itertools import islice

import torch

from bench import gradients
from bench.gradients import FP8, PAIR, RESULTS, WAYS, Forward, Head, exact, random_heads
from fpsc.kernels import reference
from tests.kernels.cases import DENSE_FP8, tables
from tests.thresholds import KERNEL_FP8_BACKWARD, KERNEL_HALF, relative_rms


def specified(head: Head, fp8: bool) -> tuple[torch.Tensor, ...]:
    """Gradients by the reference, of tiles that follow one another."""
    t = tables((len(head.q) // 128, 8, 16), (1, 8, 16), [[DENSE_FP8]])
    q, k, v = (x.bfloat16()[None, None] for x in (head.q, head.k, head.v))
    dout = head.dout.bfloat16()[None, None]
    out, lse, _ = reference.forward(q, k, v, *t.forward, None, head.scale)
    found = reference.backward(
        dout, q.float(), k.float(), v.float(), out, lse, None, *t.backward, None, head.scale,
        fp8_backward=fp8,
    )  # fmt: skip
    return tuple(x[0, 0] for x in found)


def test_the_roundings_are_those_of_the_specification() -> None:
    (head,) = random_heads(384, 64, outliers=True)
    half = Head(*(x.bfloat16().float() for x in (head.q, head.k, head.v, head.dout)))
    forward = Forward(half)
    for x, y in zip(forward.backward(FP8), specified(half, True), strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8_BACKWARD
    # The reference rounds neither P nor dS where these are in 16 bits.
    for x, y in zip(forward.backward(WAYS["bf16"]), specified(half, False), strict=True):
        assert relative_rms(x, y) <= 10 * KERNEL_HALF


def test_data_of_the_demo() -> None:
    """A head of every self-attention, with a gradient of its own."""
    heads = list(islice(gradients.demo_heads(0.5), 2))
    assert all(h.q.shape == (2048, 64) and h.dout.abs().max() > 0 for h in heads)
    for x, y in zip(exact(heads[0]), exact(heads[1]), strict=True):
        assert x.shape == (2048, 64) and relative_rms(x, y) > 0.1


def test_what_is_committed() -> None:
    """What docs/kernels.md says of it in words."""
    data = json.loads(RESULTS.read_text())["data"]
    assert list(data) == list(gradients.DATA)
    for name, ways in data.items():
        assert list(ways) == list(WAYS)
        plain, fp8 = (ways[way] for way in PAIR)
        for x in ("dq", "dk", "dv"):
            assert plain[x] < fp8[x] <= 1.5 * plain[x]
            assert fp8[x] <= ways["fp8, dS in e5m2"][x]
        measured = ways["fp8, dS with the scale of its block"]
        assert fp8["dq"] <= 1.05 * measured["dq"] and fp8["dk"] <= 1.05 * measured["dk"]
        if name.startswith("demo"):  # values with a mean
            assert fp8["dq"] < ways["fp8, delta of dO as given"]["dq"]
