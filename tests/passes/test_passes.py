"""The passes alone: what is matched in Dynamo's graphs, without Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fpsc.passes import manager
from fpsc.passes.graph import Program, module_path, op_name
from fpsc.passes.infer_grid import Hints, raster_events
from fpsc.passes.manager import Analysis, Limits
from fpsc.passes.match import Role
from fpsc.passes.rewrite import Target
from tests.wan import small_inputs, small_wan

WIDTH, HEADS = 64, 2


def capture(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    graphs = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


def analyse(model: Any, *args: Any, hints: Hints | None = None, **kwargs: Any) -> Analysis:
    return manager.analyse(capture(model, *args, **kwargs), hints)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention with a residual; `text` tokens are put before or after the video."""

    def __init__(self, call: Any = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.call = call

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Any = None) -> Tensor:
        source = x if source is None else source
        q, k, v = heads(self.q(x)), heads(self.k(source)), heads(self.v(source))
        out = self.call(q, k, v, mask) if mask is not None else self.call(q, k, v)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Video(nn.Module):
    """A plain video model: patches, one block, un-patchify. What it does inside is `inner`."""

    def __init__(self, inner: Any, call: Any = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.block = Block(call)
        self.out = nn.Linear(WIDTH, 16)
        self.inner = inner

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.patch(latent)
        b, _, t, y, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = self.inner(self.block, x + timestep.view(-1, 1, 1), text, (b, t, y, w))
        x = self.out(x).reshape(b, t, y, w, 1, 2, 2, 4).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(latent.shape)


def inputs(grid=(3, 4, 5), batch=1, text=7) -> tuple[Tensor, Tensor, Tensor]:
    t, y, x = grid
    latent = torch.randn(batch, 4, t, 2 * y, 2 * x)
    return latent, torch.rand(batch), torch.randn(batch, text, WIDTH)


def plain(block, x, text, grid):
    return block(x)


def text_first(block, x, text, grid):
    return block(torch.cat([text, x], 1))[:, text.shape[1] :]


def text_last(block, x, text, grid):
    return block(torch.cat([x, text], 1))[:, : x.shape[1]]


def only(analysis: Analysis) -> Any:
    (decision,) = analysis.decisions
    return decision


def positional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def keyword(q, k, v):
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, scale=0.25)


def aten(q, k, v):
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, v)


@pytest.mark.parametrize("call", [positional, keyword, aten])
@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 4, 5), (4, 4, 4), (2, 3, 7)])
def test_plain_video(call, grid):
    analysis = analyse(Video(plain, call), *inputs(grid))
    target = only(analysis)
    assert isinstance(target, Target)
    assert target.candidate.role == Role.VIDEO
    assert target.found.grid == grid and target.found.origin == "graph"
    assert target.candidate.call.scale == (0.25 if call is keyword else None)
    assert analysis.timestep is not None and "timestep" in analysis.timestep.name
    assert "block" in analysis.program.placeholders[target.weight.position].name


@pytest.mark.parametrize(("inner", "spans"), [(text_first, (7, 0)), (text_last, (0, 7))])
def test_joint_sequence(inner, spans):
    target = only(analyse(Video(inner), *inputs()))
    assert target.candidate.role == Role.JOINT
    assert (target.found.prefix, target.found.suffix) == spans
    assert target.found.grid == (3, 4, 5)


@pytest.mark.parametrize("inner", [text_first, text_last])
def test_text_as_long_as_the_video(inner):
    target = only(analyse(Video(inner), *inputs(text=60)))
    expected = (60, 0) if inner is text_first else (0, 60)
    assert (target.found.prefix, target.found.suffix) == expected


def test_cross_attention_of_equal_length_is_not_self_attention():
    def cross(block, x, text, grid):
        return block(x, text)

    analysis = analyse(Video(cross), *inputs(text=60))
    assert analysis.candidates[0].role == Role.CROSS
    assert "different streams" in only(analysis)


def test_attention_inside_frames_is_left():
    def frames(block, x, text, grid):
        b, t, y, w = grid
        return block(x.reshape(b * t, y * w, -1)).reshape(b, t * y * w, -1)

    analysis = analyse(Video(frames), *inputs())
    assert analysis.candidates[0].role == Role.FRAME
    assert "inside frames or along time" in only(analysis)


def test_text_refiner_is_left():
    def refine(block, x, text, grid):
        return x + block(text).mean(1, keepdim=True)

    analysis = analyse(Video(refine), *inputs(text=60))
    assert "do not come from a latent" in only(analysis)
    assert analysis.candidates[0].role == Role.OTHER


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(1, 1, 1, 60, dtype=torch.bool), None),
        (torch.zeros(1, 1, 1, 60), "additive mask"),
        (torch.ones(1, 1, 60, 60, dtype=torch.bool), "expected key padding"),
    ],
)
def test_masks(mask, reason):
    def masked(block, x, text, grid):
        return block(x, mask=mask)

    decision = only(analyse(Video(masked), *inputs()))
    if reason is None:
        assert decision.candidate.key_mask is not None
    else:
        assert reason in decision


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "dropout 0.1"),
        (lambda q, k, v: (q @ k.mT * -0.1).softmax(-1) @ v, "written out as softmax"),
    ],
)
def test_what_cannot_be_rewritten_has_a_reason(call, reason):
    assert reason in only(analyse(Video(plain, call), *inputs()))


def test_limits():
    gm = capture(Video(plain), *inputs())
    assert "fewer than limits.min_tokens 61" in only(manager.analyse(gm, None, Limits(61)))
    assert "head_dim 32" in only(manager.analyse(gm, None, Limits(0, head_dims=(64, 256))))


def test_projection_of_a_projection_is_one_stream():
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = (
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, 4),
                nn.Linear(4, WIDTH),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.b(self.a(x))

    model = Video(plain)
    model.block.q, model.block.k = Lora(), Lora()
    assert isinstance(only(analyse(model, *inputs())), Target)


def test_in_place_rope_is_followed():
    """Wan writes rotated halves into an empty tensor: the projection is off the use chain."""
    analysis = analyse(small_wan(), **small_inputs(grid=(3, 4, 5)))
    roles = [c.role for c in analysis.candidates]
    assert roles == [Role.VIDEO, Role.CROSS] * 2
    assert [t.found.grid for t in analysis.targets] == [(3, 4, 5)] * 2
    assert "blocks.0" in module_path(analysis.targets[0].candidate.call.node)


def test_block_takes_its_grid_from_outside():
    block = Block()
    hints = Hints(((3, 4, 5), (6, 4, 5)), "latent")
    target = only(analyse(block, torch.randn(1, 60, WIDTH), hints=hints))
    assert target.found.grid == (3, 4, 5) and target.found.origin == "latent"
    torch._dynamo.reset()
    assert "state it with" in only(analyse(block, torch.randn(1, 60, WIDTH)))
    torch._dynamo.reset()
    assert "another number of tokens" in only(
        analyse(block, torch.randn(1, 61, WIDTH), hints=hints)
    )


def test_symbolic_grid():
    analysis = analyse(Video(plain), *inputs(), dynamic=True)
    grid = only(analysis).found.grid
    symbols = dict(zip(grid, (3, 4, 5), strict=True))
    assert len(symbols) == 3 and all(hasattr(s, "free_symbols") for s in grid)


def test_raster_events_ignore_unsqueezes():
    program = Program(capture(lambda x: x.reshape(1, 60, 1, 8) + 1, torch.randn(60, 8)))
    assert raster_events(program) == []
    program = Program(capture(lambda x: x.reshape(1, 60, 8) + 1, torch.randn(3, 4, 5, 8)))
    assert (60, (3, 4, 5)) in [(e.length, e.grid) for e in raster_events(program)]


def attention_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if "fpsc.attention" in str(n.target)]


def test_rewrite_leaves_the_original_alone_and_appends_its_inputs():
    gm = capture(Video(plain), *inputs())
    before = gm.print_readable(print_output=False)
    rewritten = manager.apply(manager.analyse(gm), "flow")
    assert gm.print_readable(print_output=False) == before
    assert rewritten.inputs == [
        "edges", "cells", "modes", "list_ptr.0", "list_idx.0", "back_ptr.0", "back_idx.0",
        "order.0", "groups.0", "gather.0", "valid.0",
    ]  # fmt: skip
    placeholders = [n.name for n in rewritten.module.graph.nodes if n.op == "placeholder"]
    appended = [f"fpsc_{n.replace('.', '_')}" for n in rewritten.inputs]
    assert placeholders[-len(appended) :] == appended
    assert len(attention_nodes(rewritten.module)) == 1
    assert not any("scaled_dot" in op_name(n) for n in rewritten.module.graph.nodes)
    assert rewritten.returns_rows


def test_without_a_convention_the_rows_come_from_outside():
    rewritten = manager.apply(manager.analyse(capture(Video(plain), *inputs())), None)
    assert rewritten.inputs[0] == "rows" and not rewritten.returns_rows


def test_sites_inside_checkpoints_are_rewritten():
    def checkpointed(block, x, text, grid):
        x = checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False)

    graphs = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model = Video(checkpointed)
    torch.compile(model, backend=keep, fullgraph=True)(*inputs())
    analysis = manager.analyse(graphs[0])
    assert [t.found.grid for t in analysis.targets] == [(3, 4, 5)] * 2
    assert analysis.targets[0].weight == analysis.targets[1].weight
    rewritten = manager.apply(analysis, "flow")
    assert not attention_nodes(rewritten.module)
    bodies = [m for m in rewritten.module.children() if isinstance(m, fx.GraphModule)]
    assert sum(len(attention_nodes(b)) for b in bodies) == 2
