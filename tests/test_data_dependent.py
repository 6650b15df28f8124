"""Models that cut text to its real length inside the graph: what is replaced, and the numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import fpsc
from fpsc import backend
from fpsc.grid import layout
from fpsc.kernels import reference, spans
from fpsc.kernels.ops import resolve_modes
from fpsc.kernels.rows import noise_rows
from fpsc.passes.graph import Program, shape
from fpsc.passes.rewrite import PLAN
from fpsc.passes.sizes import Sizes
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve
from tests.families import MODELS, TEXT
from tests.thresholds import COMPILED_DENSE, COMPILED_FP8, relative_rms
from tests.wan import PHASES, query_key_value

FLAGS = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
GRID = (3, 4, 5)
BY_KEY = {model.key: model for model in MODELS}
MOCHI = "MochiTransformer3DModel"
FRAMEPACK = "HunyuanVideoFramepackTransformer3DModel"
HUNYUAN15 = "HunyuanVideo15Transformer3DModel"

# class: graphs, sites of a batch of one and of two, tokens in front of the video
EXPECTED = {MOCHI: (1, 2, 4, 0), FRAMEPACK: (1, 3, 3, 28), HUNYUAN15: (2, 2, 2, 0)}


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
    fpsc.reports(clear=True)
    counters.clear()
    with torch._dynamo.config.patch(**FLAGS):
        yield


@pytest.fixture
def aot_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd traces the rewritten graph, and what it makes runs as it is."""

    def compiled(gm: Any, example_inputs: Any, config_patches: Any = None) -> Any:
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr(backend, "inductor", compiled)


@functools.cache
def built(key: str) -> torch.nn.Module:
    return BY_KEY[key].build(GRID)


def inputs_of(
    key: str, lengths: Sequence[int], grid: tuple[int, int, int] = GRID
) -> dict[str, Any]:
    """Arguments with this many text tokens in each batch element, and padding behind them."""
    given = BY_KEY[key].inputs(grid, len(lengths))
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return {**given, "encoder_attention_mask": mask.to(given["encoder_attention_mask"].dtype)}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def replaced() -> list[Any]:
    return [s for report in fpsc.reports() for s in report.sites if s.replaced]


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("key", EXPECTED)
def test_every_length_of_text_equals_eager_without_recompiling(key: str, batch: int) -> None:
    graphs, *sites, prefix = EXPECTED[key]
    model = built(key)
    compiled = torch.compile(model, backend="fpsattn", options={"policy": "dense"})
    for i, length in enumerate((TEXT, 4, 5, 1)):
        given = inputs_of(key, [length, max(1, length - 2)][:batch])
        fixed = torch._dynamo.config.patch(error_on_recompile=i > 0)
        with torch.no_grad(), fixed:
            assert relative_rms(first(compiled(**given)), first(model(**given))) <= COMPILED_DENSE
    assert counters["stats"]["unique_graphs"] == graphs
    found = replaced()
    assert len(found) == sites[batch - 1]
    assert {(s.grid, s.prefix) for s in found} == {(GRID, prefix)}
    left = [s for report in fpsc.reports() for s in report.sites if not s.replaced]
    assert {s.role for s in left} <= {"cross", "other"}


@pytest.mark.usefixtures("no_inductor")
def test_both_branches_of_hunyuan_15() -> None:
    """Without an image the model goes another way after its graph breaks."""
    model = built(HUNYUAN15)
    compiled = torch.compile(model, backend="fpsattn", options={"policy": "dense"})
    given = inputs_of(HUNYUAN15, [4])
    given["image_embeds"] = torch.zeros_like(given["image_embeds"])
    with torch.no_grad():
        assert relative_rms(first(compiled(**given)), first(model(**given))) <= COMPILED_DENSE
    assert len(replaced()) == 2


class ReferenceAttention(TorchFunctionMode):
    """Every attention over the grid and text is computed by the reference, as the policy says."""

    def __init__(
        self,
        policy: Policy,
        noise: Sequence[float],
        grid: Sequence[int],
        prefix: int,
        layers: int,
        one_by_one: bool,
    ) -> None:
        super().__init__()
        self.policy, self.grid, self.prefix = policy, grid, prefix
        self.table = resolve(policy, layers=layers, heads=2, fp8=True)
        self.rows = noise_rows(torch.tensor(noise), self.table.edges, "unit")
        self.one_by_one, self.calls = one_by_one, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = query_key_value(args, kwargs)
        t, y, x = self.grid
        text = q.shape[2] - t * y * x - self.prefix
        if text < 0:  # a refiner of text
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        assert mask is None or mask.all()
        tile = self.policy.tile_for(self.grid)
        lists = plan(self.policy, layout(self.grid, tile, self.prefix, text))
        layer, element = self.calls, slice(None)
        if self.one_by_one:
            layer, b = divmod(self.calls, len(self.rows))
            element = slice(b, b + 1)
        self.calls += 1
        table = self.table
        modes = resolve_modes(q.shape[0], self.rows[element], table.cells, table.modes, layer)
        tables = (lists.list_ptr, lists.list_idx, lists.order, lists.groups, lists.gather)
        scale = q.shape[-1] ** -0.5
        return reference.forward(q, k, v, modes, *tables, lists.valid, None, scale)[0]


def reference_output(
    model: Any, key: str, policy: Policy, given: dict[str, Any], grid: tuple[int, int, int]
) -> Tensor:
    level = given["timestep"].float() / 1000
    noise = (1 - level if key == MOCHI else level).tolist()
    prefix = EXPECTED[key][3]
    if key == FRAMEPACK:  # history of this grid, at three scales
        _, y, x = grid
        prefix = y * x + (-(-y // 2)) * (-(-x // 2)) + (-(-y // 4)) * (-(-x // 4))
    layers = EXPECTED[key][1]
    with (
        torch.no_grad(),
        ReferenceAttention(policy, noise, grid, prefix, layers, key == MOCHI) as mode,
    ):
        output = first(model(**given))
    assert mode.calls == layers * (len(noise) if key == MOCHI else 1)
    return output


SPARSE = (3, 8, 10)


@pytest.mark.parametrize(
    ("key", "batch", "how"),
    [(MOCHI, 2, "no_inductor"), (FRAMEPACK, 1, "aot_only"), (HUNYUAN15, 2, "no_inductor")],
)
def test_sparse_policy_equals_the_reference(
    key: str, batch: int, how: str, phases: str, request: pytest.FixtureRequest
) -> None:
    """Batch elements with noise levels, and with Mochi text lengths, of their own."""
    request.getfixturevalue(how)
    model = built(key)
    lengths = {MOCHI: (4, TEXT), FRAMEPACK: (4,), HUNYUAN15: (TEXT, TEXT)}[key]
    given = inputs_of(key, lengths, SPARSE)
    compiled = torch.compile(model, backend="fpsattn", options={"policy": phases})
    for i, timesteps in enumerate(((600.0, 100.0), (50.0, 950.0))):
        given["timestep"] = torch.tensor(timesteps[:batch])
        expected = reference_output(model, key, Policy.load(phases), given, SPARSE)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert relative_rms(first(compiled(**given)), expected) <= COMPILED_FP8
    assert len(replaced()) == EXPECTED[key][batch]


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("key", [MOCHI, HUNYUAN15])
def test_models_that_share_graphs_have_their_own_lists(key: str, phases: str) -> None:
    """Also through a graph break: the first graph finds out which model it is called for."""
    models = [BY_KEY[key].build(GRID) for _ in range(2)]
    policy = Policy.load(phases)
    policies = [policy, policy.with_values({"modes.near.keep": 0.9})]
    given = inputs_of(key, [TEXT], SPARSE)
    options = {"policy": phases}
    compiled = [torch.compile(m, backend="fpsattn", options=options) for m in models]
    with torch.no_grad():
        for each in compiled:
            each(**given)
        assert counters["stats"]["unique_graphs"] == EXPECTED[key][0]
        fpsc.set_policy(models[1], policies[1])
        found = [first(each(**given)) for each in compiled]
    expected = [
        reference_output(m, key, p, given, SPARSE) for m, p in zip(models, policies, strict=True)
    ]
    assert relative_rms(*expected) > 10 * COMPILED_FP8 or key == HUNYUAN15
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= COMPILED_FP8


def test_mochi_through_inductor_with_gradients() -> None:
    torch.manual_seed(0)
    config = {**BY_KEY[MOCHI].config, "num_layers": 1}
    model = MochiTransformer3DModel(**config)
    compiled = torch.compile(model, backend="fpsattn", fullgraph=True, options={"policy": "dense"})
    for length in (5, 3):
        outputs, grads = [], []
        for each in (model, compiled):
            torch.manual_seed(length)
            given = inputs_of(MOCHI, [length])
            model.zero_grad()
            out = first(each(**given))
            out.square().mean().backward()
            outputs.append(out.detach())
            grads.append(model.transformer_blocks[0].attn1.to_k.weight.grad.clone())
        assert relative_rms(*reversed(outputs)) <= COMPILED_DENSE
        assert relative_rms(*reversed(grads)) <= 1e-4
    assert len(replaced()) == 1


# ---- sizes


def sizes_of(function: Callable[..., Any], *args: Tensor) -> tuple[Sizes, list[Any]]:
    """What is known of the first axes of the outputs of a function."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*args)
    program = Program(graphs[0])
    output = next(n for n in program.nodes if n.op == "output")
    return Sizes(program), [(shape(n) or [None])[0] for n in output.args[0]]


def counted_twice(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return x[mask[0].flatten().nonzero().flatten()] + 1, x[mask[0].flatten().nonzero().flatten()]


def counted_before_and_after_a_write(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    row = mask.clone()[0]
    before = x[row.flatten().nonzero().flatten()]
    row.view(-1)[0] = False
    return before, x[row.flatten().nonzero().flatten()]


def of_other_rows(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return x[mask[0].nonzero().flatten()], x[mask[1].nonzero().flatten()]


def cut_alike(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    n = mask[0].sum().item()
    return x[:n] * 2, (x + 1)[: mask[0].sum().item()]


def cut_apart(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return x[: mask[0].sum().item()] * 2, x[: mask[1].sum().item()]


@pytest.mark.parametrize(
    ("function", "equal"),
    [
        (counted_twice, True),
        (counted_before_and_after_a_write, False),
        (of_other_rows, False),
        (cut_alike, True),
        (cut_apart, False),
    ],
)
def test_sizes_that_are_one_number(function: Callable[..., Any], equal: bool) -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    sizes, (one, other) = sizes_of(function, torch.randn(4, 3), mask)
    assert one != other  # two symbols
    assert sizes.same(one, other) == equal


# ---- the op


class Planner:
    def lists(self, grid: Any, prefix: int, suffix: int, device: Any) -> list[Tensor]:
        policy = Policy.from_dict(PHASES)
        made = plan(policy, layout(grid, policy.tile_for(grid), prefix, suffix))
        return [getattr(made, n) for n in PLAN]


def test_plan_op() -> None:
    planner = Planner()
    span = torch.tensor([spans.register(planner), *GRID])
    given = (span, 2, 5, 67, torch.device("cpu"))
    torch.library.opcheck(torch.ops.fpsc.plan.default, given)
    for found, expected in zip(spans.plan(*given), planner.lists(GRID, 2, 5, None), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"\[3, 4, 5\] with 2 \+ 5 text tokens makes 67.*has 68"):
        spans.plan(span, 2, 5, 68, torch.device("cpu"))
    del planner
    with pytest.raises(RuntimeError, match="no longer exists"):
        spans.plan(*given)
