"""Masks of a plain SDPA call: which are key padding, and what is left dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpsc.passes import manager
from fpsc.passes.edit import Sketch
from fpsc.passes.graph import op_name, writers_of
from fpsc.passes.masks import keys_that_take_part
from tests.passes.test_passes import Video, inputs, only, text_last
from tests.passes.test_spellings import HEADS, capture, masked, replaced, traced

LOWEST = torch.finfo(torch.float32).min
Make = Callable[[Tensor], Tensor]


def build(make: Make) -> Video:
    """A video model whose SDPA gets `make(padding)`, padding [B, N] with True for tokens."""
    return masked(lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, make(keep)))


def fill(keep: Tensor) -> Tensor:
    bias = torch.zeros_like(keep, dtype=torch.float32)
    return bias.masked_fill(~keep, float("-inf"))[:, None, None]


def fill_in_place(keep: Tensor) -> Tensor:
    bias = torch.zeros(keep.shape)
    bias.masked_fill_(keep.logical_not(), float("-inf"))
    return bias[:, None, None, :]


def where(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, LOWEST).unsqueeze(1).unsqueeze(1)


def one_minus(keep: Tensor) -> Tensor:
    return (1.0 - keep.float().unsqueeze(1).unsqueeze(1)) * -10000.0


def minus_one(keep: Tensor) -> Tensor:
    return (keep[:, None, None].to(torch.float32) - 1) * 1e9


def inverted(keep: Tensor) -> Tensor:
    return (~keep).view(-1, 1, 1, 60).to(torch.float32) * LOWEST


def expanded(keep: Tensor) -> Tensor:
    return one_minus(keep).expand(-1, HEADS, 60, -1)


def repeated(keep: Tensor) -> Tensor:
    return one_minus(keep).repeat(1, HEADS, 60, 1)


def per_head(keep: Tensor) -> Tensor:
    """As diffusers' `prepare_attention_mask` has it."""
    bias = ((1 - keep.to(torch.float32)) * -10000.0).unsqueeze(1)
    return bias.repeat_interleave(HEADS, dim=0).view(keep.shape[0], HEADS, -1, 60)


def joined(keep: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, 1, 1, 10), one_minus(keep)[..., 10:]], dim=-1)


def rounded(keep: Tensor) -> Tensor:
    return (one_minus(keep).bfloat16() * 2).to(torch.float32)


FLOATS = [
    fill, fill_in_place, where, one_minus, minus_one, inverted, expanded, repeated, per_head,
    joined, rounded,
]  # fmt: skip


@pytest.mark.parametrize("make", FLOATS)
def test_additive_key_padding(make: Make) -> None:
    gm, given = capture(build(make), *inputs())
    analysis = manager.analyse(gm)
    target = replaced(analysis)
    assert target.candidate.call.spelling == "sdpa"
    mask = target.candidate.key_mask
    assert mask is not None
    rewritten = manager.apply(analysis, None).module
    (call,) = (n for n in rewritten.graph.nodes if "fpsc.attention" in str(n.target))
    keep = values(rewritten, call.args[14], given)
    assert torch.equal(keep, torch.arange(60)[None] < 50)


def values(module: torch.fx.GraphModule, node: torch.fx.Node, given: list[Tensor]) -> Tensor:
    """What a node of a rewritten graph holds; it does not depend on the inputs of ours."""
    needed, queue = {node}, [node]
    for current in queue:
        for source in (*current.all_input_nodes, *writers_of(current)):
            if source not in needed:
                needed.add(source)
                queue.append(source)
    graph, copied = torch.fx.Graph(), {}
    for old in module.graph.nodes:
        if old in needed or (old.op == "placeholder" and not old.name.startswith("fpsc_")):
            copied[old] = graph.node_copy(old, lambda n: copied[n])
    graph.output(copied[node])
    return torch.fx.GraphModule(module, graph)(*given)


BOOLEANS: dict[str, Make] = {
    "view": lambda keep: keep.view(-1, 1, 1, 60),
    "expand": lambda keep: keep[:, None, None].expand(-1, HEADS, 60, -1),
    "expand, then made dense": lambda keep: keep[:, None, None].expand(-1, 1, 60, -1).contiguous(),
    "repeat": lambda keep: keep[:, None, None].repeat(1, HEADS, 60, 1),
    "repeat, inverted twice": lambda keep: ~(~keep)[:, None, None].repeat(1, 1, 60, 1),
    "compared": lambda keep: keep.long()[:, None, None].expand(-1, 1, 60, -1) == 1,
    "two": lambda keep: (
        keep[:, None, None].repeat(1, 1, 60, 1) & keep[:, None, None].repeat(1, 1, 60, 1)
    ),
    "joined": lambda keep: torch.cat(
        [torch.ones(1, 1, 60, 10, dtype=torch.bool), keep[:, None, None, 10:].repeat(1, 1, 60, 1)],
        -1,
    ),
}


@pytest.mark.parametrize("name", BOOLEANS)
def test_boolean_key_padding(name: str) -> None:
    gm, _ = capture(build(BOOLEANS[name]), *inputs())
    decision = only(manager.analyse(gm))
    if name == "joined":  # ones for all queries beside a repetition: not shown to be one row
        assert "expected key padding" in decision
    else:
        assert decision.candidate.key_mask is not None


def one_row_written(keep: Tensor) -> Tensor:
    mask = keep[:, None, None].repeat(1, 1, 60, 1)
    mask[:, :, 3] = True
    return mask


def one_row_written_later(keep: Tensor) -> Tensor:
    bias = one_minus(keep).repeat(1, 1, 60, 1)
    bias[:, :, 3] = -5.0
    return bias


def written_elsewhere(keep: Tensor) -> Tensor:
    bias = torch.zeros(1, 60).masked_fill(~keep, -1e9)
    bias[:, :4] = -2.0
    return bias[:, None, None]


def written_after(keep: Tensor) -> Tensor:
    bias = torch.zeros(1, 60)
    mask = bias[:, None, None]
    bias.masked_fill_(~keep, -1e9)
    bias += 1.0
    return mask


DENSE: dict[str, tuple[Make, str]] = {
    "soft": (lambda keep: (1 - keep.float()[:, None, None]) * -5.0, "additive mask"),
    "not a number": (
        lambda keep: (1 - keep.float()[:, None, None]) * float("-inf"),
        "additive mask",
    ),
    "also another number": (lambda keep: one_minus(keep) + 1.0, "additive mask"),
    "of values": (lambda keep: keep.float().cumsum(-1)[:, None, None] * -1e9, "additive mask"),
    "one row written": (one_row_written, "expected key padding"),
    "one row of a bias written": (one_row_written_later, "additive mask"),
    "written elsewhere": (written_elsewhere, "additive mask"),
    "written after": (written_after, "additive mask"),
    "by queries": (
        lambda keep: torch.where(torch.ones(60, 60).tril() > 0, 0.0, -1e9)[None, None],
        "expected key padding",
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_masks_that_stay_dense(name: str) -> None:
    make, reason = DENSE[name]
    gm, _ = capture(build(make), *inputs())
    assert reason in only(manager.analyse(gm))


def test_a_mask_from_outside_may_hold_anything() -> None:
    model = Video(lambda block, x, text, grid: block(x, mask=text[:, None, None, :, 0]))
    gm, _ = capture(model, *inputs(text=60))
    reason = only(manager.analyse(gm))
    assert "0 and numbers of -10000 or less; pass the mask of the keys as bool" in reason


def test_a_low_number_that_is_scaled_later_is_not_low() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return ((q @ k.mT + one_minus(keep)) * 0.125).softmax(-1) @ v

    gm, _ = capture(masked(call), *inputs())
    assert "additive mask" in only(manager.analyse(gm))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-1e4, -1e9, LOWEST, float("-inf")])
def test_numbers_are_followed_through_dtypes(dtype: torch.dtype, low: float) -> None:
    keep = torch.arange(6)[None, None, None] < 4

    def model(keep: Tensor, q: Tensor) -> Tensor:
        return q.new_zeros(1, 1, 1, 6).masked_fill(~keep, low).to(dtype) + q

    gm = traced(model, keep, torch.zeros(1))
    add = next(n for n in gm.graph.nodes if op_name(n) == "add")
    assert keys_that_take_part(Sketch(add), add) is None  # an input is added
    found = keys_that_take_part(Sketch(add), add.args[0])
    if dtype == torch.bfloat16 and low == -1e4:  # rounds to -9984
        assert found is None
    else:
        assert found is not None and torch.equal(found.meta["example_value"], keep)


def test_queries_that_see_no_key_are_zeros_as_in_sdpa() -> None:
    """Text that is padding, in a mask of queries and keys, and read by nobody or by everybody."""

    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        rows = keep[:, None, None].repeat(1, 1, keep.shape[1], 1)
        return F.scaled_dot_product_attention(q, k, v, rows & rows.transpose(2, 3))

    model = masked(call)
    model.padding = torch.arange(67)[None] < 64
    model.inner = text_last
    gm, _ = capture(model, *inputs())
    analysis = manager.analyse(gm)
    target = only(analysis)
    assert target.candidate.query_mask is target.candidate.key_mask is not None
    names = [op_name(n) for n in manager.apply(analysis, None).module.graph.nodes]
    assert "masked_fill" in names
