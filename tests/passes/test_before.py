"""Norms and rotations in front of a site: which the op does, what is left in the graph, numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fpsc
from bench.families import analyse
from bench.family_runs import first
from fpsc.passes.graph import is_linear, module_path, op_name
from fpsc.policy import Policy
from tests.compiled import compile_whole
from tests.families import MODELS
from tests.passes import foreign
from tests.passes.foreign import DIM, HEADS, WIDTH, angles, join, split
from tests.thresholds import relative_rms

SAME = 2e-6
"""Relative RMS of a whole model in float32, one order of sums against another."""

DENSE = Policy.from_dict(
    {
        "fpsc": 1,
        "modes": {"dense": {"keep": 1.0, "dtype": "bf16"}},
        "schedule": [{"noise": "1..0", "use": "dense"}],
        "limits": {"min_tokens": 0},
    }
)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """Rewritten graphs, which run as they are."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: object, config_patches: object = None) -> Any:
        found.append(gm)
        return gm.forward

    monkeypatch.setattr("fpsc.backend.inductor", keep)
    fpsc.reports(clear=True)
    yield found


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.fpsc.attention.default]


def in_front(node: fx.Node) -> set[str]:
    """Names of the calls between projections and the queries and keys of an attention."""
    found, seen, queue = set(), set(), [node.args[0], node.args[1]]
    for current in queue:
        if is_linear(current) or current.op == "placeholder" or current in seen:
            continue
        seen.add(current)
        found.add(op_name(current))
        queue += current.all_input_nodes
    return found


ONLY_VIEWS = {
    "unflatten", "permute", "transpose", "view", "reshape", "cat", "getitem", "chunk", "split",
    "contiguous", "size", "sym_size",
}  # fmt: skip


def dead(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls in the modules of the sites that nothing reads, and writes of their results."""
    paths = {module_path(site) for site in attentions(gm)}
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    return [n for n in calls if not n.users and module_path(n) in paths]


def run(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[float, list[str]]:
    """Error of a compiled model, everything dense, and what its report says of each site."""
    expected = first(model(*args, **kwargs))
    compiled = compile_whole(model, policy=DENSE, fuse_prologue=True)
    found = first(compiled(*args, **kwargs))
    assert expected.isfinite().all()
    (report,) = fpsc.reports(clear=True)
    return relative_rms(found, expected), [s.prologue for s in report.sites if s.replaced]


# ---- models of diffusers

BY_KEY = {model.key: model for model in MODELS}
ACROSS = "fused (rms across heads + rope interleaved)"
FUSED = {
    "WanTransformer3DModel": ACROSS,
    "HunyuanVideoTransformer3DModel": "fused (rms per head + rope interleaved)",
    "CogVideoXTransformer3DModel/5B": "fused (layer norm per head + rope interleaved)",
    "LTXVideoTransformer3DModel": ACROSS,
    "CosmosTransformer3DModel/1": "fused (rms per head + rope half-split)",
}


@pytest.mark.parametrize("key", FUSED)
def test_norms_and_rotations_are_gone(key: str, graphs: list[fx.GraphModule]) -> None:
    """Nothing but views is left between projections and attentions."""
    grid = (3, 4, 5)
    model, inputs = BY_KEY[key].build(grid), BY_KEY[key].inputs(grid, batch=2)
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "added" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide weights that are mixed up
    with torch.no_grad():
        error, prologues = run(model, **inputs)
    assert error <= 10 * SAME
    assert set(prologues) == {FUSED[key]}
    (gm,) = graphs
    sites = attentions(gm)
    assert len(sites) == len(prologues)
    for site in sites:
        assert in_front(site) <= ONLY_VIEWS
    tables = {site.kwargs.get("cos") for site in sites}
    assert len(tables) == 1, "every site makes its own table"
    assert dead(gm) == []


_LTX2 = BY_KEY["LTX2VideoTransformer3DModel"]
BY_KEY["LTX2/split"] = replace(_LTX2, config={**_LTX2.config, "rope_type": "split"})
READ = {
    "LTX2/split": "fused (rms across heads + rope half-split)",
    "CogVideoXTransformer3DModel/2B": "fused (layer norm per head)",
    "AllegroTransformer3DModel": "not fused: ",  # three rotations, one an axis of the grid
    "Kandinsky5Transformer3DModel": "not fused: ",  # products with matrices of 2 x 2
}


@pytest.mark.parametrize("key", READ)
def test_what_is_read(key: str) -> None:
    found = [site.prologue for site in analyse(BY_KEY[key], (3, 4, 5)).sites if site.replaced]
    assert found and all(said.startswith(READ[key]) for said in found), found


# ---- spellings


class Layer(nn.Module):
    """Attention whose queries and keys [B, N, H * D] go through `front(layer, x, side)`."""

    def __init__(self, front: Callable[..., Tensor], after: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        shapes = {"head": (DIM,), "wide": (WIDTH,), "bias": (DIM,), "own": (HEADS, 1, DIM)}
        for side in "qk":
            for name, shape in shapes.items():
                setattr(self, f"{side}_{name}", nn.Parameter(torch.rand(shape) + 0.5))
        self.learned = nn.Parameter(angles(60))
        self.front, self.after = front, after or (lambda layer, q: 0.0)

    def of(self, side: str, name: str) -> Tensor:
        found: Tensor = getattr(self, f"{side}_{name}")
        return found

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.front(self, p(x), side) for p, side in ((self.a, "q"), (self.b, "k")))
        out = F.scaled_dot_product_attention(q, k, split(self.c(x)))
        return x + self.d(join(out)) + self.after(self, q)


def cos_sin(x: Tensor, repeated: str = "") -> tuple[Tensor, Tensor]:
    """[1, 1, N, D / 2], or D where repeated."""
    angle = angles(x.shape[2])[None, None]
    if repeated == "interleaved":
        angle = angle.repeat_interleave(2, dim=-1)
    elif repeated == "half":
        angle = torch.cat([angle, angle], dim=-1)
    elif repeated == "unlike":
        angle = torch.cat([angle, 1.3 * angle], dim=-1)
    return angle.cos(), angle.sin()


def rms(layer: Layer, x: Tensor, side: str) -> Tensor:
    return F.rms_norm(split(x), (DIM,), layer.of(side, "head"), 1e-5)


def rms_across(layer: Layer, x: Tensor, side: str) -> Tensor:
    return split(F.rms_norm(x, (WIDTH,), layer.of(side, "wide"), 1e-5))


def rms_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return layer.of(side, "head") * (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def rms_divided(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5) * layer.of(side, "head")


def rms_one_more(layer: Layer, x: Tensor, side: str) -> Tensor:
    return F.rms_norm(split(x), (DIM,), 1 + layer.of(side, "head"), 1e-5)


def rms_bare(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def layer_norm(layer: Layer, x: Tensor, side: str) -> Tensor:
    return F.layer_norm(split(x), (DIM,), layer.of(side, "head"), layer.of(side, "bias"), 1e-5)


def written_into(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    cos, sin = cos_sin(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def halves_written_into(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    cos, sin = cos_sin(x)
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    out = torch.zeros_like(x)
    out[..., : DIM // 2] = a * cos - b * sin
    out[..., DIM // 2 :] = b * cos + a * sin
    return out


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(3)


def halves(layer: Layer, x: Tensor, side: str, repeated: str = "half") -> Tensor:
    x = split(x)
    cos, sin = cos_sin(x, repeated)
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def unlike_halves(layer: Layer, x: Tensor, side: str) -> Tensor:
    return halves(layer, x, side, "unlike")


def pairs(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms_written(layer, x, side)
    cos, sin = cos_sin(x, "interleaved")
    return x * cos + rotate_pairs(x) * sin


def backwards(layer: Layer, x: Tensor, side: str) -> Tensor:
    """By minus the angle."""
    x = rms(layer, x, side)
    cos, sin = cos_sin(x, "interleaved")
    return x * cos - rotate_pairs(x) * sin


def complex_numbers(layer: Layer, x: Tensor, side: str) -> Tensor:
    return foreign.complex_rope(rms_across(layer, x, side))


def float64(layer: Layer, x: Tensor, side: str) -> Tensor:
    return foreign.double_rope(layer_norm(layer, x, side))


def numpy_table(layer: Layer, x: Tensor, side: str) -> Tensor:
    return foreign.numpy_rope(rms_bare(layer, x, side))


def across_heads(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Before heads are split, each with frequencies of its own."""
    x = F.rms_norm(x, (WIDTH,), layer.of(side, "wide"), 1e-5)
    steps = torch.outer(torch.arange(x.shape[1]).float(), torch.linspace(1, 0.01, WIDTH // 2))
    cos, sin = (t.repeat_interleave(2, dim=-1)[None] for t in (steps.cos(), steps.sin()))
    a, b = x.unflatten(2, (-1, 2)).unbind(-1)
    return split(x * cos + torch.stack([-b, a], dim=-1).flatten(2) * sin)


def in_place(layer: Layer, x: Tensor, side: str) -> Tensor:
    """As LTX 2 splits it."""
    x = rms_across(layer, x, side)
    cos, sin = (t.unsqueeze(-2) for t in cos_sin(x))
    parts = x.reshape(*x.shape[:-1], 2, DIM // 2)
    one, two = parts[..., :1, :], parts[..., 1:, :]
    out = parts * cos
    out[..., :1, :].addcmul_(-sin, two)
    out[..., 1:, :].addcmul_(sin, one)
    return out.reshape(x.shape)


def tokens_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = layer_norm(layer, x, side)
    part = x[:, :, 5:50]
    cos, sin = cos_sin(part, "interleaved")
    x[:, :, 5:50] = part * cos + rotate_pairs(part) * sin
    return x


def negated_table(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    cos, sin = cos_sin(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * -sin, a * sin + b * cos], dim=-1)


def learned_tables(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    cos, sin = layer.learned.cos()[None, None], layer.learned.sin()[None, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


Spellings = dict[str, tuple[Callable[..., Tensor], str]]

SPELLINGS: Spellings = {
    "rms": (rms, "rms per head"),
    "rms across heads": (rms_across, "rms across heads"),
    "rms written out": (rms_written, "rms per head"),
    "rms by division": (rms_divided, "rms per head"),
    "rms, weight of one more": (rms_one_more, "rms per head"),
    "rms without weight": (rms_bare, "rms per head"),
    "layer norm": (layer_norm, "layer norm per head"),
    "written into channels": (written_into, "rms per head + rope interleaved"),
    "written into halves": (halves_written_into, "rms per head + rope half-split"),
    "halves": (halves, "rope half-split"),
    "halves with tables of their own": (unlike_halves, "rope half-split"),
    "pairs": (pairs, "rms per head + rope interleaved"),
    "by minus the angle": (backwards, "rms per head + rope interleaved"),
    "complex numbers": (complex_numbers, "rms across heads + rope interleaved"),
    "float64": (float64, "layer norm per head + rope interleaved"),
    "table from numpy": (numpy_table, "rms per head + rope half-split"),
    "before heads are split": (across_heads, "rms across heads + rope interleaved"),
    "in place": (in_place, "rms across heads + rope half-split"),
    "some tokens": (tokens_written, "layer norm per head + rope interleaved"),
    "sin negated": (negated_table, "rope half-split"),
    "learned tables, without a gradient": (learned_tables, "rms per head + rope half-split"),
}


@torch.no_grad()
def check(spellings: Spellings, batch: int = 1, after: Any = None) -> dict[str, str]:
    """Run a model with a layer of each spelling; returns what the report says of them."""
    layers = [Layer(front, after) for front, _ in spellings.values()]
    model = foreign.Model(layers[0])
    model.layers = nn.ModuleList(layers)
    error, prologues = run(model, *foreign.arguments(batch))
    assert error <= 10 * SAME
    return dict(zip(spellings, prologues, strict=True))


def test_spellings(graphs: list[fx.GraphModule]) -> None:
    expected = {name: f"fused ({front})" for name, (_, front) in SPELLINGS.items()}
    assert check(SPELLINGS) == expected
    for name, site in zip(SPELLINGS, attentions(graphs[0]), strict=True):
        assert in_front(site) <= ONLY_VIEWS, name
        wide = "cos" in site.kwargs and site.kwargs["cos"].meta["example_value"].shape[-1] == DIM
        assert wide == ("of their own" in name), "tables of one value a pair are enough"
    names = {op_name(n) for n in graphs[0].graph.nodes}
    assert not names & {"setitem", "rms_norm", "stack", "addcmul_", "view_as_complex"}


# ---- near misses: left alone, or fused and still right


def no_epsilon(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    return x * x.square().mean(-1, keepdim=True).rsqrt() * layer.of(side, "head")


def over_tokens(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    return x * (x.square().mean(-2, keepdim=True) + 1e-5).rsqrt()


def of_something_else(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    return x * ((2 * x).square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def own_weights(layer: Layer, x: Tensor, side: str) -> Tensor:
    return F.rms_norm(split(x), (DIM,), None, 1e-5) * layer.of(side, "own")


def queries_alone(layer: Layer, x: Tensor, side: str) -> Tensor:
    return rms(layer, x, side) if side == "q" else split(x)


def other_epsilon(layer: Layer, x: Tensor, side: str) -> Tensor:
    return F.rms_norm(split(x), (DIM,), None, 1e-5 if side == "q" else 1e-2)


def other_tables(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    cos, sin = cos_sin(x, "interleaved")
    if side == "k":
        cos, sin = cos.flip(2), sin.flip(2)
    return x * cos + rotate_pairs(x) * sin


def reflection(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    cos, sin = cos_sin(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, a * sin + b * cos], dim=-1)


def other_pairs(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Read as halves, written as neighbours."""
    x = split(x)
    cos, sin = cos_sin(x)
    a, b = x.chunk(2, dim=-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3)


def some_channels(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    return torch.cat([foreign_half(x[..., : DIM // 2]), x[..., DIM // 2 :]], dim=-1)


def foreign_half(x: Tensor) -> Tensor:
    cos, sin = (t[..., : x.shape[-1] // 2] for t in cos_sin(x))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def twice(layer: Layer, x: Tensor, side: str) -> Tensor:
    return foreign.numpy_rope(foreign.numpy_rope(rms(layer, x, side)))


def heads_swapped(layer: Layer, x: Tensor, side: str) -> Tensor:
    return rms(layer, x, side).flip(1)


def another_split(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Heads are the inner axis of features."""
    x = x.view(x.shape[0], x.shape[1], DIM, HEADS).permute(0, 3, 1, 2)
    return F.rms_norm(x, (DIM,), layer.of(side, "head"), 1e-5)


def written_after(layer: Layer, x: Tensor, side: str) -> Tensor:
    """What the norm read is overwritten before the attention."""
    x = split(x)
    y = F.rms_norm(x, (DIM,), layer.of(side, "head"), 1e-5)
    x.mul_(3.0)
    return y


def table_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = rms(layer, x, side)
    cos, sin = cos_sin(x)
    a, b = x.chunk(2, dim=-1)
    y = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    cos.mul_(2.0)
    return y


def view_of_a_projection(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Without a norm, the rotated tokens are written over the projection's own."""
    x = split(x)
    part = x[:, :, 5:]
    cos, sin = cos_sin(part, "interleaved")
    x[:, :, 5:] = part * cos + rotate_pairs(part) * sin
    return x


def statistic_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    x = split(x)
    mean = x.square().mean(-1, keepdim=True)
    mean.mul_(2.0)
    return x * (mean + 1e-5).rsqrt()


def one_angle(layer: Layer, x: Tensor, side: str) -> Tensor:
    """The same for all channels of a head."""
    x = split(x)
    cos, sin = (t[..., 3:4] for t in cos_sin(x))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def tokens_of_all(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Tokens of all batch elements in one axis, in the table too."""
    x = x.reshape(-1, HEADS, DIM)
    angle = angles(len(x))[:, None]
    a, b = x.chunk(2, dim=-1)
    x = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
    return x.view(-1, 60, HEADS, DIM).transpose(1, 2)


def middle_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    """Into channels that are neither half nor every other."""
    x = rms(layer, x, side)
    cos, sin = cos_sin(x)
    a, b = x.chunk(2, dim=-1)
    x = torch.zeros_like(x)
    x[..., 8:24] = a * cos - b * sin
    x[..., : DIM // 2] = a * sin + b * cos
    return x


def read_after_written(layer: Layer, x: Tensor, side: str) -> Tensor:
    """The second write reads the first one's result."""
    x = rms(layer, x, side)
    cos, sin = cos_sin(x)
    a, b = x[..., 0::2], x[..., 1::2]
    x[..., 0::2] = a * cos - b * sin
    x[..., 1::2] = a * sin + b * cos
    return x


NEAR_MISSES: Spellings = {
    "no epsilon": (no_epsilon, "not fused"),
    "a mean over tokens": (over_tokens, "not fused"),
    "the statistic of something else": (of_something_else, "not fused"),
    "weights of each head": (own_weights, "not fused"),
    "queries alone": (queries_alone, "not fused"),
    "two epsilons": (other_epsilon, "not fused"),
    "tables that differ": (other_tables, "queries and keys are rotated by different tables"),
    "a reflection": (reflection, "no rotation"),
    "pairs taken apart in another way": (other_pairs, "not fused"),
    "some channels": (some_channels, "not fused"),
    "rotated twice": (twice, "a product with two tables"),
    "heads in another order": (heads_swapped, "not fused"),
    "heads inside": (another_split, "fused (rms per head)"),
    "overwritten": (written_after, "is written in place"),
    "a table overwritten": (table_written, "is written in place"),
    "over the projection": (view_of_a_projection, "not fused"),
    "the statistic overwritten": (statistic_written, "not fused"),
    "one angle": (one_angle, "a part of its tokens or channels"),
    "batch and tokens in one": (tokens_of_all, "not fused"),
    "read after it was written": (read_after_written, "not fused"),
    "channels in the middle": (middle_written, "a part of the channels"),
}


def test_near_misses() -> None:
    found = check(NEAR_MISSES, batch=2)
    wrong = {name: said for name, said in found.items() if NEAR_MISSES[name][1] not in said}
    assert wrong == {}


def also_read(layer: Layer, q: Tensor) -> Tensor:
    return 0.1 * join(q)


def test_another_reader_of_the_result_gets_it() -> None:
    """The norm and the rotation then stay for it."""
    names = ("rms", "pairs", "written into channels", "some tokens")
    read = {name: SPELLINGS[name] for name in names}
    found = check(read, after=also_read)
    assert found == {name: f"fused ({front})" for name, (_, front) in read.items()}


def test_tables_with_a_gradient_stay() -> None:
    """The op gives them none."""
    layer = Layer(learned_tables)
    error, (prologue,) = run(foreign.Model(layer), *foreign.arguments())
    assert error <= SAME
    assert "has a gradient" in prologue


def test_options_decide(graphs: list[fx.GraphModule]) -> None:
    """On CPU Inductor does as well; true and false mean it."""
    model, args = foreign.Model(Layer(pairs)), foreign.arguments()
    said = {"auto": "not fused: the cpu kernel gains nothing", False: "not fused: fuse_prologue is"}
    for wanted, expected in (*said.items(), (True, "fused (rms")):
        torch._dynamo.reset()
        with torch.no_grad():
            compile_whole(model, policy=DENSE, fuse_prologue=wanted)(*args)
        (report,) = fpsc.reports(clear=True)
        assert report.sites[0].prologue.startswith(expected)
        assert f"replaced; prologue {expected}" in str(report)
    assert [bool(attentions(gm)[0].kwargs) for gm in graphs] == [False, False, True]


NORMS = [rms, rms_across, rms_written, rms_bare, layer_norm, no_epsilon, own_weights]
TURNS = [foreign.complex_rope, foreign.double_rope, foreign.numpy_rope, foreign_half]
LATER = [
    lambda x: x.contiguous(),
    lambda x: x.transpose(1, 2).transpose(1, 2),
    lambda x: x.flip(2),
    lambda x: 2 * x,
    lambda x: x.reshape(x.shape[0], -1, x.shape[-1]).view(x.shape),
    lambda x: torch.cat([x[:, :, 30:], x[:, :, :30]], dim=2),
    lambda x: torch.cat([x[:, :, :9], x[:, :, 9:]], dim=2),
    lambda x: x[..., torch.arange(DIM).flip(0)],
]


@st.composite
def fronts(draw: st.DrawFn) -> Callable[..., Tensor]:
    norm = draw(st.sampled_from(NORMS))
    steps = draw(st.lists(st.sampled_from([*TURNS, *LATER]), max_size=3))
    keys_alike = draw(st.booleans())

    def front(layer: Layer, x: Tensor, side: str) -> Tensor:
        y = norm(layer, x, side)
        for step in steps if side == "q" or keys_alike else steps[:-1]:
            y = step(y)
        return y

    return front


@settings(max_examples=3)
@given(st.lists(fronts(), min_size=5, max_size=5))
def test_whatever_stands_in_front_is_right(found: list[Callable[..., Tensor]]) -> None:
    model = foreign.Model(Layer(found[0]))
    model.layers = nn.ModuleList(map(Layer, found))
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of it is taken for two sequences, and stays dense
        error, prologues = run(model, *foreign.arguments())
    assert error <= 10 * SAME
    assert all(p.startswith(("fused (", "not fused: ")) for p in prologues)
