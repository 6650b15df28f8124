"""Any sizes: random dimensions of every family, symbolic ones, and numbers of a sparse policy."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpsc
from bench.families import analyse
from fpsc.passes import graph, manager
from fpsc.passes.match import Role
from fpsc.policy import Policy
from tests import families
from tests.families import Model
from tests.passes.test_families import (
    BY_KEY,
    PARTLY,
    PREFIX,
    SUFFIX,
    TOKENS,
    VIDEO,
    expected_grid,
    first,
    spans,
)
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import PHASES, ReferenceAttention

Grid = tuple[int, int, int]
SITES = {**VIDEO, **TOKENS}
TEXT = families.TEXT

FIXED = ("Allegro", "ConsisID", "CogVideoXTransformer3DModel/1.5", "WanAnimate", "LTX2")
"""Families whose heads are tied to other sizes of their configuration or inputs."""
WIDTHS = ("cross_attention_dim", "added_kv_proj_dim", "model_dim", "hidden_size")
ROPES = ("rope_axes_dim", "rope_dim", "axes_dims", "rope_dim_list")


def resized(model: Model, heads: int, factor: int, text: int) -> Model:
    """A family with this number of heads, each `factor` times as wide."""
    config = dict(model.config)
    if "max_text_seq_length" in config:
        config["max_text_seq_length"] = text
    if not model.key.startswith(FIXED):
        for name in WIDTHS:
            if config.get(name):
                config[name] = config[name] // 2 * heads * factor
        for name in ROPES:
            if name in config:
                config[name] = type(config[name])(n * factor for n in config[name])
        for name, times in (("num_attention_heads", heads / 2), ("attention_head_dim", factor)):
            if name in config:
                config[name] = int(config[name] * times)
    return dataclasses.replace(model, config=config)


@st.composite
def sizes(draw: Any) -> tuple[Grid, int, int, int, int]:
    """Grid, text tokens, batch, heads, factor of head_dim."""
    grid = draw(st.integers(2, 4)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    numbers = (st.integers(2, 12), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))
    return grid, *(draw(n) for n in numbers)  # type: ignore[return-value]


@pytest.mark.parametrize("key", SITES)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(sizes())
def test_any_sizes(key: str, drawn: tuple[Grid, int, int, int, int]) -> None:
    grid, text, batch, heads, factor = drawn
    with mock.patch.object(families, "TEXT", text):
        model = resized(BY_KEY[key], heads, factor, text)
        inputs = model.inputs(grid, batch)
        found = analyse(model, grid, **inputs)
    replaced = [s for s in found.sites if s.replaced]
    assert [s.grid for s in replaced] == [expected_grid(model, grid)] * SITES[key]
    before, after = (text if spans(table, key) else 0 for table in (PREFIX, SUFFIX))
    assert {(s.prefix, s.suffix) for s in replaced} == {(before, after)}
    assert {s.q_shape[0] for s in replaced} == {batch}
    if not key.startswith(FIXED) and "Joy" not in key:
        assert {s.q_shape[1] for s in replaced} == {heads}
    assert all(s.role in (Role.CROSS, Role.OTHER) for s in found.sites if not s.replaced)


# ---- symbolic sizes

SYMBOLIC = (
    "WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel/5B",
    "EasyAnimateTransformer3DModel", "LTX2VideoTransformer3DModel", "AllegroTransformer3DModel",
    "CosmosTransformer3DModel/1", "Kandinsky5Transformer3DModel", "JoyImageEditTransformer3DModel",
)  # fmt: skip
"""One family of each way to lay out tokens."""
DYNAMIC = {
    **{key: SITES[key] for key in SYMBOLIC},
    "HeliosTransformer3DModel": 1,  # of 2: which of several spans is the longest is not known
    "MotifVideoTransformer3DModel": 2,
}


@pytest.mark.parametrize("key", DYNAMIC)
def test_symbolic_sizes(key: str) -> None:
    """The same sites as with numbers, and grids whose symbols stand for the same numbers."""
    grid, model = (3, 4, 5), BY_KEY[key]
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.build(grid), backend=keep, fullgraph=True, dynamic=True)(
            **model.inputs(grid)
        )
    (gm,) = graphs
    analysis = manager.analyse(gm)
    hints = {}
    for node in analysis.program.placeholders:
        value = graph.example(node)
        for size in value.shape if isinstance(value, Tensor) else [value]:
            if isinstance(size, torch.SymInt):
                hints[size.node.expr] = size.node.hint

    def number(size: graph.Dim) -> int:
        return size if isinstance(size, int) else int(size.subs(hints))

    assert [tuple(map(number, t.found.grid)) for t in analysis.targets] == [grid] * DYNAMIC[key]
    assert any(not isinstance(n, int) for t in analysis.targets for n in t.found.grid)
    if key not in PARTLY:
        text = {(number(t.found.prefix), number(t.found.suffix)) for t in analysis.targets}
        assert text == {(spans(PREFIX, key), spans(SUFFIX, key))}


# ---- numbers of a policy that is not dense


def errors(
    key: str,
    grid: Grid,
    folder: Any,
    *,
    text: int = TEXT,
    convention: str = "flow",
    every: int = 1,
    **given: Any,
) -> float:
    """Relative error of a compiled model against the same model with the reference."""
    with mock.patch.object(families, "TEXT", text):
        model = resized(BY_KEY[key], 2, 1, text)
        built, inputs = model.build(grid), {**model.inputs(grid), **given}
    policy = Policy.from_dict(PHASES)
    policy.save(folder / "phases.yaml")
    around = (text if spans(PREFIX, key) else 0, text if spans(SUFFIX, key) else 0)
    reference = ReferenceAttention(
        policy, inputs["timestep"], SITES[key], grid, 2, around, convention, every
    )
    options: dict[str, Any] = {"policy": str(folder / "phases.yaml")}
    options["timestep"] = {"convention": convention}
    with torch.no_grad():
        dense = first(built(**inputs))
        with reference:
            expected = first(built(**inputs))
        assert reference.layer == SITES[key]
        torch._dynamo.reset()
        fpsc.reports(clear=True)
        compiled = torch.compile(built, backend="fpsattn", fullgraph=True, options=options)
        found = first(compiled(**inputs))
    assert fpsc.reports()[-1].replaced == SITES[key]
    assert relative_rms(dense, expected) > COMPILED_FP8  # the policy leaves something out
    return relative_rms(found, expected)


def half_clean(grid: Grid) -> Tensor:
    """A timestep for every token; the first frame is what the others are conditioned on."""
    t, y, x = grid
    return torch.tensor([0] * (y * x) + [600] * ((t - 1) * y * x))[None]


def padded(text: int, real: int) -> dict[str, Tensor]:
    return {"encoder_attention_mask": (torch.arange(text)[None] < real).long()}


NUMBERS: dict[str, tuple[str, Grid, dict[str, Any]]] = {
    "plain": ("WanTransformer3DModel", (3, 4, 5), {}),
    "a cubic grid": ("WanTransformer3DModel", (4, 4, 4), {}),
    "one frame": ("WanTransformer3DModel", (1, 8, 10), {}),
    "text as long as the video": ("WanTransformer3DModel", (3, 4, 5), {"text": 60, "every": 2}),
    "text as long, before": ("CogVideoXTransformer3DModel/5B", (3, 4, 5), {"text": 60}),
    "text as long, behind": ("JoyImageEditTransformer3DModel", (3, 4, 5), {"text": 60}),
    "padded": ("HunyuanVideoTransformer3DModel", (3, 4, 5), padded(TEXT, 3)),
    "clean frames": (
        "WanTransformer3DModel/per-token timestep", (3, 4, 5), {"timestep": half_clean((3, 4, 5))},
    ),
    "clean frames, [B, 1, T, 1, 1]": (
        "CosmosTransformer3DModel/2", (3, 4, 5),
        {
            "convention": "unit",
            "timestep": torch.tensor([0.0, 0.6, 0.6]).view(1, 1, 3, 1, 1),
        },
    ),
    "tokens": ("LTXVideoTransformer3DModel", (3, 4, 5), {}),
    "linear patches": (
        "CosmosTransformer3DModel/1", (2, 5, 4),
        {"convention": "log-sigma", "timestep": torch.tensor([0.1])},
    ),
}  # fmt: skip


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_sparse_policy(name: str, tmp_path: Any) -> None:
    key, grid, given_ = NUMBERS[name]
    assert errors(key, grid, tmp_path, **given_) <= COMPILED_FP8


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("key", ["WanTransformer3DModel", "CogVideoXTransformer3DModel/2B"])
@settings(
    max_examples=3, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.tuples(st.integers(2, 4), st.integers(4, 6), st.integers(5, 7)), st.integers(1, 9))
def test_numbers_of_any_sizes(key: str, tmp_path: Any, grid: Grid, text: int) -> None:
    assert errors(key, grid, tmp_path, text=text) <= COMPILED_FP8


@pytest.mark.usefixtures("no_inductor")
def test_portrait_then_landscape_of_tokens(tmp_path: Any) -> None:
    """As many tokens, and their grid only in Python numbers: never the grid of the first call."""
    key, policy = "LTXVideoTransformer3DModel", Policy.from_dict(PHASES)
    policy.save(tmp_path / "phases.yaml")
    model = BY_KEY[key].build((3, 4, 10))
    options = {"policy": str(tmp_path / "phases.yaml")}
    torch._dynamo.reset()
    fpsc.reports(clear=True)
    compiled = torch.compile(model, backend="fpsattn", fullgraph=True, options=options)
    for grid in ((3, 4, 10), (3, 10, 4), (3, 5, 8)):
        inputs = BY_KEY[key].inputs(grid)
        with torch.no_grad():
            found = first(compiled(**inputs))
            sites = [s for s in fpsc.reports()[-1].sites if s.role == Role.VIDEO]
            reference = ReferenceAttention(policy, inputs["timestep"], 2, grid, 2)
            with reference if sites[0].replaced else nullcontext():
                expected = first(model(**inputs))
        assert len(sites) == 2
        assert all(s.replaced or s.reason for s in sites)
        assert sites[0].replaced or grid != (3, 4, 10)
        assert relative_rms(found, expected) <= COMPILED_FP8


def test_coordinates_from_outside_show_no_grid() -> None:
    """`video_coords` of LTX 2: positions of every token as a tensor."""
    model, grid = BY_KEY["LTX2VideoTransformer3DModel"], (3, 4, 5)
    built: Any = model.build(grid)
    coordinates = built.rope.prepare_video_coords(1, *grid, torch.device("cpu"))
    found = analyse(model, grid, video_coords=coordinates)
    own = [s for s in found.sites if s.role in (Role.VIDEO, Role.OTHER)]
    assert own and not any(s.replaced for s in own)
    assert all('options={"grid": [T, Y, X]}' in s.reason for s in own)
    stated = analyse(model, grid, {"grid": grid}, video_coords=coordinates)
    assert [s.grid for s in stated.sites if s.replaced] == [grid] * 2
