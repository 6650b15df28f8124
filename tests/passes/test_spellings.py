"""Every spelling of attention: what becomes an SDPA call of the same value, and what is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fpsc.passes import manager
from fpsc.passes.graph import op_name
from fpsc.passes.manager import Analysis
from fpsc.passes.match import Role
from fpsc.passes.normalise import normalise
from fpsc.passes.rewrite import Target
from tests.passes.test_passes import Video, inputs, plain
from tests.thresholds import relative_rms

WIDTH, HEADS = 64, 2
SCALE = (WIDTH // HEADS) ** -0.5


def capture(model: Any, *args: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph of a model, and the inputs that it was called with."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            graphs.append((gm, list(given)))
            return gm.forward(*given)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*args)
    (found,) = graphs
    return found


def with_twins(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A graph in which the twins stand for what they are twins of."""
    program, calls = normalise(module)
    count = 0
    for call in calls:
        if call.restored is not None:
            call.node.replace_all_uses_with(call.restored)
            count += 1
    program.root.module.recompile()
    return program.root.module, count


def check(model: Any, *args: Any) -> Analysis:
    """Analyse a model; the twins must compute what it computes."""
    gm, given = capture(model, *args)
    code = gm.print_readable(print_output=False)
    analysis = manager.analyse(gm)
    assert gm.print_readable(print_output=False) == code
    with torch.no_grad():
        expected = gm(*given)
        module, count = with_twins(gm)
        found = module(*given)
    assert count == sum(c.call.twin is not None for c in analysis.candidates)
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= 1e-5
    return analysis


def only(analysis: Analysis) -> Any:
    (decision,) = analysis.decisions
    return decision


def replaced(analysis: Analysis) -> Target:
    decision = only(analysis)
    assert isinstance(decision, Target), decision
    assert decision.found.grid == (3, 4, 5)
    rewritten = manager.apply(analysis, None).module
    names = [op_name(n) for n in rewritten.graph.nodes]
    assert not {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"} & {
        *names
    }
    assert sum("fpsc.attention" in str(n.target) for n in rewritten.graph.nodes) == 1
    rewritten.graph.lint()
    return decision


# ---- in the layout [B, H, N, D]


def after(q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-1) @ v


def before(q, k, v):
    return torch.matmul(F.softmax(torch.matmul(q * SCALE, k.mT), dim=-1), v)


def halves(q, k, v):
    s = math.sqrt(SCALE)
    return torch.softmax((q * s) @ (k * s).transpose(2, 3), -1) @ v


def division(q, k, v):
    return nn.Softmax(dim=-1)(q @ k.permute(0, 1, 3, 2) / math.sqrt(q.shape[-1])) @ v


def upcast(q, k, v):
    weights = F.softmax((q @ k.mT).float() * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.0, training=True) @ v


def dropout_in_eval(q, k, v):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, training=False) @ v


def less_the_largest(q, k, v):
    scores = q @ k.mT * SCALE
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def less_the_largest_by_max(q, k, v):
    scores = q @ k.mT * SCALE
    return (scores - scores.max(-1, keepdim=True)[0].detach()).softmax(-1) @ v


def exponentials(q, k, v):
    scores = q @ k.mT * SCALE
    e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)) @ v


def in_place(q, k, v):
    scores = q @ k.mT
    scores *= SCALE
    return scores.softmax(-1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_other_letters(q, k, v):
    scores = torch.einsum("...qc, ...kc -> ...qk", q * SCALE, k)
    return torch.einsum("nhqk,nhkc->nhqc", scores.softmax(-1), v)


def einsum_keys_first(q, k, v):
    scores = torch.einsum("bhjd,bhid->bhji", k, q) * SCALE
    return torch.einsum("bhji,bhjd->bhid", scores.softmax(-2), v)


def folded(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v).view(b, h, n, d)


def folded_and_unfolded(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(b, h, n, n) * SCALE
    return torch.bmm(scores.softmax(-1).view(b * h, n, n), v).view(b, h, n, d)


def baddbmm(q, k, v):
    b, h, n = q.shape[:3]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    nothing = torch.empty(b * h, n, n, dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (b, h))


def heads_first(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.transpose(0, 1).reshape(h * b, n, d) for x in (q, k, v))
    out = torch.bmm((torch.bmm(q, k.mT) * SCALE).softmax(-1), v)
    return out.view(h, b, n, d).transpose(0, 1)


def values_first(q, k, v):
    weights = (q @ k.mT * SCALE).softmax(-1)
    return (v.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3)


WRITTEN = [
    after, before, halves, division, upcast, dropout_in_eval, less_the_largest,
    less_the_largest_by_max, exponentials, in_place, einsum, einsum_other_letters,
    einsum_keys_first, folded, folded_and_unfolded, baddbmm, heads_first, values_first,
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", WRITTEN)
def test_written_out(call, batch):
    target = replaced(check(Video(plain, call), *inputs(batch=batch)))
    assert target.candidate.role == Role.VIDEO
    assert target.weight is not None
    query = manager.query_of(target)
    assert query.shape == (batch, HEADS, 60, WIDTH // HEADS)


# ---- in other layouts


class Block(nn.Module):
    """Attention on [B, N, H, D] or [B, N, H*D], as `call` likes it."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor], split: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.call, self.split = call, split

    def forward(self, x: Tensor) -> Tensor:
        qkv = [f(x) for f in (self.q, self.k, self.v)]
        if self.split:
            qkv = [y.unflatten(-1, (HEADS, -1)) for y in qkv]
        out = self.call(*qkv)
        return x + self.o(out.flatten(2) if self.split else out)


def video(call: Any, split: bool = True) -> Video:
    model = Video(plain)
    model.block = Block(call, split)
    return model


def einsum_bnhd(q, k, v):
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def einsum_heads_last(q, k, v):
    weights = torch.einsum("bihd,bjhd->bijh", q, k).mul(SCALE).softmax(2)
    return torch.einsum("bijh,bjhd->bihd", weights, v)


def matmul_bnhd(q, k, v):
    weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * SCALE).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def rearranged(q, k, v):
    """(b h) n d, as einops leaves it."""
    b, n, h, d = q.shape
    q, k, v = (x.permute(0, 2, 1, 3).reshape(b * h, n, d) for x in (q, k, v))
    weights = torch.einsum("bid,bjd->bij", q, k).mul(SCALE).softmax(-1)
    out = torch.einsum("bij,bjd->bid", weights, v)
    return out.reshape(b, h, n, d).permute(0, 2, 1, 3)


def one_head(q, k, v):
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.1).softmax(-1), v)


def tokens_first(q, k, v):
    """[N, B * H, D], as fairseq has it."""
    b, n, e = q.shape
    q, k, v = (
        x.transpose(0, 1).contiguous().view(n, b * HEADS, e // HEADS).transpose(0, 1)
        for x in (q, k, v)
    )
    weights = F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, v).transpose(0, 1).contiguous().view(n, b, e).transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", [einsum_bnhd, einsum_heads_last, matmul_bnhd, rearranged])
def test_written_out_on_bnhd(call, batch):
    target = replaced(check(video(call), *inputs(batch=batch)))
    assert manager.query_of(target).shape == (batch, HEADS, 60, WIDTH // HEADS)


@pytest.mark.parametrize(("call", "heads"), [(one_head, 1), (tokens_first, HEADS)])
def test_written_out_without_an_axis_of_heads(call, heads):
    target = replaced(check(video(call, split=False), *inputs(batch=2)))
    assert manager.query_of(target).shape == (2, heads, 60, WIDTH // heads)


def test_per_frame_attention_that_is_written_out_is_left():
    def frames(block, x, text, grid):
        b, t, y, w = grid
        return block(x.reshape(b * t, y * w, -1)).reshape(b, t * y * w, -1)

    for call in (after, folded):
        analysis = check(Video(frames, call), *inputs())
        assert analysis.candidates[0].role == Role.FRAME


# ---- masks


def fill(low: float) -> Callable[..., Tensor]:
    def call(q, k, v, padding):
        return (q @ k.mT * SCALE).masked_fill(~padding[:, None, None], low).softmax(-1) @ v

    return call


def fill_in_place(q, k, v, padding):
    scores = (q @ k.mT) * SCALE
    scores = scores.masked_fill_(~padding[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


def fill_by_where(q, k, v, padding):
    scores = torch.where(padding[:, None, None], q @ k.mT * SCALE, float("-inf"))
    return scores.softmax(-1) @ v


def bias_of_zeros(q, k, v, padding):
    bias = torch.zeros_like(padding, dtype=q.dtype).masked_fill(~padding, float("-inf"))
    return (q @ k.mT * SCALE + bias[:, None, None]).softmax(-1) @ v


def one_minus(q, k, v, padding):
    bias = (1.0 - padding[:, None, None].to(q.dtype)) * -10000.0
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def masked(call: Any) -> Video:
    model = Video(lambda block, x, text, grid: block(x), lambda q, k, v: None)
    model.register_buffer("padding", torch.arange(60)[None] < 50)
    model.block.call = lambda q, k, v: call(q, k, v, model.padding)
    return model


@pytest.mark.parametrize(
    "call", [fill(float("-inf")), fill(-1e9), fill_in_place, fill_by_where, one_minus]
)
def test_key_padding(call):
    target = replaced(check(masked(call), *inputs()))
    assert target.candidate.key_mask is not None


def test_masks_that_are_no_key_padding():
    def small(q, k, v):
        scores = q @ k.mT
        return scores.masked_fill(q.mean(-1)[:, :, None] > 0, -1.0).softmax(-1) @ v

    def causal(q, k, v):
        mask = torch.ones(60, 60, dtype=torch.bool).tril()
        return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def bias(q, k, v):
        return (q @ k.mT + torch.zeros(1, 1, 60, 60)).softmax(-1) @ v

    assert "fills with -1.0" in only(check(Video(plain, small), *inputs()))
    assert "expected key padding" in only(check(Video(plain, causal), *inputs()))
    assert "additive mask" in only(check(Video(plain, bias), *inputs()))


# ---- what must not be taken for softmax(q k^T) v


def learned(q, k, v):
    return (q @ k.mT * q.mean()).softmax(-1) @ v


def used_elsewhere(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean()


def written_in_place(q, k, v):
    scores = q @ k.mT
    scores.masked_fill_(torch.eye(60, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1) @ v


def sliced_in_place(q, k, v):
    scores = q @ k.mT
    scores[..., 50:] = -torch.inf
    return scores.softmax(-1) @ v


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def capped(q, k, v):
    return ((q @ k.mT / 30).tanh() * 30).softmax(-1) @ v


def normalised_later(q, k, v):
    return F.normalize((q @ k.mT).softmax(-1), dim=-1) @ v


def other_largest(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def largest_over_queries(q, k, v):
    scores = k @ q.mT
    weights = (scores - scores.amax(-1, keepdim=True)).softmax(-2)
    return weights.mT @ v


def dropped(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


@pytest.mark.parametrize(
    "call",
    [
        learned, used_elsewhere, written_in_place, sliced_in_place, over_queries, over_heads,
        capped, normalised_later, other_largest, largest_over_queries,
    ],
)  # fmt: skip
def test_what_is_no_softmax_attention(call):
    reason = only(check(Video(plain, call), *inputs()))
    assert "written out as softmax" in reason and "call torch.nn.functional" in reason


def test_dropout_is_a_reason():
    gm, _ = capture(Video(plain, dropped), *inputs())
    assert "dropout 0.1" in only(manager.analyse(gm))


def test_a_softmax_that_is_no_attention_is_not_named():
    def gate(block, x, text, grid):
        return x * block.q(x).softmax(-1)

    assert check(Video(gate), *inputs()).candidates == []


@pytest.mark.parametrize("feature", [F.relu, lambda x: F.elu(x) + 1])
def test_linear_attention_is_named(feature):
    def linear(q, k, v):
        q, k = feature(q), feature(k)
        return (q @ (k.mT @ v)) / (q @ k.sum(2, keepdim=True).mT + 1e-6)

    reason = only(check(Video(plain, linear), *inputs()))
    assert "linear attention" in reason


# ---- hypothesis: letters, layouts, orders and sizes


@st.composite
def spellings(draw: Any) -> tuple[Any, ...]:
    axes = (
        draw(st.permutations("bihd")),
        draw(st.permutations("bjhd")),
        draw(st.permutations("bjhe")),
    )
    scores, out = draw(st.permutations("bhij")), draw(st.permutations("bhie"))
    sizes = {
        "b": draw(st.integers(1, 3)),
        "h": draw(st.integers(1, 3)),
        "d": draw(st.integers(1, 4)),
    }
    sizes["i"] = sizes["j"] = draw(st.integers(2, 5))
    sizes["e"] = sizes["d"]
    scale = draw(st.sampled_from([1.0, 0.5, 3.0]))
    return (
        axes,
        "".join(scores),
        "".join(out),
        sizes,
        scale,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(spellings())
def test_any_einsum(spelling):
    """Graphs are made by hand here: tracing them all would take minutes."""
    (a, b, c), scores, out, sizes, scale, first, masked = spelling
    a, b, c = ("".join(x) for x in (a, b, c))
    tensors = [torch.randn([sizes[x] for x in letters]) for letters in (a, b, c)]
    keep = torch.arange(sizes["j"]) < sizes["j"] - 1

    def model(q, k, v, keep):
        s = (
            torch.einsum(f"{a},{b}->{scores}", q, k)
            if first
            else torch.einsum(f"{b},{a}->{scores}", k, q)
        )
        s = s * scale
        if masked:
            at = [len(scores) if x != "j" else 0 for x in scores]
            view = [sizes["j"] if x == 0 else 1 for x in at]
            s = s.masked_fill(~keep.view(view), -torch.inf)
        p = s.softmax(scores.index("j"))
        return torch.einsum(f"{scores},{c}->{out}", p, v)

    gm = traced(model, *tensors, keep)
    expected = gm(*tensors, keep)
    _, (call,) = normalise(gm)
    assert call.unsupported == ""
    module, count = with_twins(gm)
    assert count == 1
    assert relative_rms(module(*tensors, keep), expected) <= 1e-5


def traced(model: Any, *args: Any) -> fx.GraphModule:
    """A graph with example values, as Dynamo would make it."""
    gm = fx.symbolic_trace(model)

    class Examples(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                n.meta["example_value"] = result
            return result

    Examples(gm).run(*args)
    return gm


# ---- nn.MultiheadAttention


class Multihead(nn.Module):
    def __init__(self, weights: bool = False, mask: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.weights, self.mask = weights, mask
        self.first = options.get("batch_first", False)
        self.register_buffer("padding", torch.arange(60)[None] >= 50)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else x.transpose(0, 1)
        mask = self.padding if self.mask else None
        out = self.attention(y, y, y, need_weights=self.weights, key_padding_mask=mask)[0]
        return x + (out if self.first else out.transpose(0, 1))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": WIDTH, "vdim": WIDTH}]
)
def test_multihead(options, weights):
    model = Video(plain)
    model.block = Multihead(weights, **options)
    if "kdim" in options:  # the module takes this for one fused projection: separate it
        model.block.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=WIDTH, vdim=WIDTH)
    target = replaced(check(model.eval(), *inputs(batch=2)))
    assert target.candidate.call.spelling == "nn.MultiheadAttention"
    assert manager.query_of(target).shape == (2, HEADS, 60, WIDTH // HEADS)
    assert target.weight is not None


class Conditioned(nn.Module):
    """nn.MultiheadAttention with keys and values of other widths, and so with separate weights."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 40)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=40)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        out = self.attention(y, self.keys(y), self.values(y), need_weights=self.weights)[0]
        return x + out.transpose(0, 1)


class Functional(nn.Module):
    """`F.multi_head_attention_forward` with a weight for each of queries, keys and values."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            y, y, y, WIDTH, HEADS, None, torch.cat([self.q.bias, self.k.bias, self.v.bias]), None,
            None, False, 0.0, self.o.weight, self.o.bias, training=False,
            need_weights=self.weights, use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return x + out.transpose(0, 1)


@pytest.mark.parametrize("block", [Conditioned, Functional])
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_with_separate_weights(block, weights):
    model = Video(plain)
    model.block = block(weights)
    target = replaced(check(model.eval(), *inputs(batch=2)))
    assert target.candidate.call.spelling == "nn.MultiheadAttention"
    assert target.weight is not None


def test_multihead_whose_weights_are_read_is_named():
    def block(x):
        out, weights = attention(x, x, x, need_weights=True)
        return x + out * weights.mean()

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    model = Video(lambda _, x, text, grid: block(x)).eval()
    model.block = attention
    reason = only(check(model, *inputs()))
    assert "other results" in reason


def test_multihead_with_key_padding():
    model = Video(plain)
    model.block = Multihead(mask=True, batch_first=True)
    target = replaced(check(model.eval(), *inputs()))
    assert target.candidate.key_mask is not None


def test_multihead_left_dense():
    model = Video(plain)
    model.block = Multihead(dropout=0.1)
    gm, _ = capture(model.train(), *inputs())
    assert "dropout 0.1" in only(manager.analyse(gm))
    model.block = Multihead(add_zero_attn=True)
    assert "add_zero_attn" in only(check(model.eval(), *inputs()))


# ---- grouped heads


class Grouped(nn.Module):
    """Twice as many heads of queries as of keys and values; `call` takes [B, H, N, D]."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(self.call(q, k, v).transpose(1, 2).flatten(2))


def grouped_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grouped_flash(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.flash_attn.flash_attn_func(q, k, v).transpose(1, 2)


def grouped_by_repeating(q, k, v):
    return after(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("call", [grouped_sdpa, grouped_flash, grouped_by_repeating])
def test_grouped_heads(call):
    model = Video(plain)
    model.block = Grouped(call)
    target = replaced(check(model, *inputs(batch=2)))
    key = target.candidate.call.key.meta["example_value"]
    assert manager.query_of(target).shape == (2, 4, 60, 16)
    assert key.shape == (2, 4 if call is grouped_by_repeating else 2, 60, 16)


# ---- gradients


def gradients(module: fx.GraphModule, given: list[Any]) -> list[Tensor]:
    """Of everything that the inputs hold, for an output that weighs all positions otherwise."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
    out = module(*leaves)
    out = out[0] if isinstance(out, tuple | list) else out
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [x.grad for x in leaves if x.grad is not None]


GRADIENTS = {
    "einsum": lambda: Block(einsum_bnhd, split=True),
    "tokens first": lambda: Block(tokens_first, split=False),
    "matmul": lambda: Block(matmul_bnhd, split=True),
    "exponentials": lambda: Block(
        lambda *x: exponentials(*(y.transpose(1, 2) for y in x)).transpose(1, 2), split=True
    ),
    "multihead": lambda: Multihead(batch_first=True),
    "multihead, separate weights": lambda: Conditioned(weights=False),
    "multihead, a functional": lambda: Functional(weights=True),
    "grouped": lambda: Grouped(grouped_sdpa),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_through_a_twin(name):
    model = Video(plain)
    model.block = GRADIENTS[name]()
    gm, given = capture(model.eval(), *inputs(batch=2))
    expected = gradients(gm, given)
    module, count = with_twins(gm)
    assert count == (name != "grouped")
    for found, wanted in zip(gradients(module, given), expected, strict=True):
        scale = max(g.norm().item() for g in expected)  # a bias of keys has a gradient of zero
        assert relative_rms(found, wanted, least=1e-3 * scale) <= 1e-4


# ---- libraries, which are not installed: ops of the same names and signatures

_OPS = torch.library.Library("flash_attn", "DEF")
_OPS.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, int window_size_left, int window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor)"
)
_OPS.define(
    "flash_attn_func(Tensor q, Tensor k, Tensor v, float dropout_p=0.0, float? softmax_scale=None, "
    "bool causal=False, int[] window_size=[-1, -1], float softcap=0.0, Tensor? alibi_slopes=None, "
    "bool deterministic=False) -> Tensor"
)
_OPS.define(
    "flash_attn_varlen_func(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float dropout_p=0.0, "
    "float? softmax_scale=None, bool causal=False, int[] window_size=[-1, -1], "
    "Tensor? block_table=None) -> Tensor"
)
_XFORMERS = torch.library.Library("xformers", "DEF")
_XFORMERS.define(
    "memory_efficient_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, "
    "float p=0.0, float? scale=None) -> Tensor"
)
_SAGE = torch.library.Library("sageattention", "DEF")
_SAGE.define(
    'sageattn(Tensor q, Tensor k, Tensor v, str tensor_layout="HND", bool is_causal=False, '
    "float? sm_scale=None) -> Tensor"
)


def _bnhd(q, k, v, scale=None, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _forward(q, k, v, dropout_p, softmax_scale, causal, *rest):
    return _bnhd(q, k, v, softmax_scale, causal), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def _func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *rest):
    return _bnhd(q, k, v, softmax_scale, causal)


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest):
    batch = cu_seqlens_q.shape[0] - 1
    return _bnhd(*(x.unflatten(0, (batch, -1)) for x in (q, k, v))).flatten(0, 1)


def _efficient(query, key, value, attn_bias=None, p=0.0, scale=None):
    return _bnhd(query, key, value, scale)


def _sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale)


for _library, _name, _body in (
    (_OPS, "_flash_attn_forward", _forward),
    (_OPS, "flash_attn_func", _func),
    (_OPS, "flash_attn_varlen_func", _varlen),
    (_XFORMERS, "memory_efficient_attention", _efficient),
    (_SAGE, "sageattn", _sage),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")


def flash(q, k, v):
    return torch.ops.flash_attn.flash_attn_func(q, k, v, softmax_scale=0.25)


def flash_forward(q, k, v):
    return torch.ops.flash_attn._flash_attn_forward(
        q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False
    )[0]


def xformers(q, k, v):
    return torch.ops.xformers.memory_efficient_attention(q, k, v)


def varlen(starts: Callable[[int, int], Tensor]) -> Callable[..., Tensor]:
    def call(q, k, v):
        b, n = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = starts(b, n)
        out = torch.ops.flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, n, n)
        return out.unflatten(0, (b, n))

    return call


def by_arange(b: int, n: int) -> Tensor:
    return torch.arange(0, (b + 1) * n, n, dtype=torch.int32)


def by_list(b: int, n: int) -> Tensor:
    return torch.tensor([i * n for i in range(b + 1)], dtype=torch.int32)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "call", [flash, flash_forward, xformers, varlen(by_arange), varlen(by_list)]
)
def test_libraries_that_are_rewritten(call, batch):
    target = replaced(check(video(call), *inputs(batch=batch)))
    assert manager.query_of(target).shape == (batch, HEADS, 60, WIDTH // HEADS)
    assert (target.candidate.call.scale == 0.25) == ("flash" in call.__name__)


def ragged(b: int, n: int) -> Tensor:
    return torch.tensor([0, n - 10, n], dtype=torch.int32)


def windowed(q, k, v):
    return torch.ops.flash_attn.flash_attn_func(q, k, v, window_size=[5, 5])


def alibi(q, k, v):
    return torch.ops.flash_attn.flash_attn_func(q, k, v, alibi_slopes=torch.ones(HEADS))


def sage(q, k, v):
    return torch.ops.sageattention.sageattn(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (windowed, "window_size is [5, 5]"),
        (alibi, "alibi_slopes"),
        (sage, "computed by SageAttention, which is not rewritten"),
        (lambda q, k, v: torch.ops.xformers.memory_efficient_attention(q, k, v, q), "attn_bias"),
    ],
)
def test_libraries_that_are_named(call, reason):
    found = only(check(video(call), *inputs()))
    assert reason in found and 'set_attention_backend("native")' in found


def test_varlen_that_may_be_ragged_is_named():
    for starts in (ragged, lambda b, n: (torch.arange(3) * n).int()):
        reason = varlen_reason(starts)
        assert "cu_seqlens" in reason


def varlen_reason(starts: Any) -> str:
    def call(q, k, v):
        cu = starts(*q.shape[:2])
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = torch.ops.flash_attn.flash_attn_varlen_func(*flat, cu, cu, 60, 60)
        return out.unflatten(0, (q.shape[0], -1))

    gm, _ = capture(video(call), *inputs(batch=2))
    return only(manager.analyse(gm))


def test_causal_flash_is_left():
    def call(q, k, v):
        return torch.ops.flash_attn.flash_attn_func(q, k, v, causal=True)

    assert "causal" in only(check(video(call), *inputs()))


def aten_cpu(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def test_aten_variant():
    replaced(check(Video(plain, aten_cpu), *inputs()))


def flex(**options: Any) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return lambda q, k, v: flex_attention(q, k, v, **options)


def test_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    gm, _ = capture(Video(plain, flex()), *inputs())
    target = replaced(manager.analyse(gm))
    assert target.candidate.call.spelling == "FlexAttention"
    gm, _ = capture(Video(plain, flex(score_mod=lambda s, b, h, i, j: s * 2)), *inputs())
    reason = only(manager.analyse(gm))
    assert "score_mod" in reason and "set_attention_backend" in reason
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 60, 60, device="cpu")
    gm, _ = capture(Video(plain, flex(block_mask=blocks)), *inputs())
    assert "block mask" in only(manager.analyse(gm))
