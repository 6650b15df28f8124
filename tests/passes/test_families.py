"""Every video transformer of diffusers: what is replaced, what is left and why, and the numbers."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import transformers
from torch import Tensor

import fpsc
from bench.families import PAGE, WORST, analyse, page
from bench.family_runs import GRIDS as RUN
from bench.family_runs import first, run
from fpsc import backend
from fpsc.families import family_of
from fpsc.kernels.rows import CONVENTIONS
from fpsc.passes import manager
from fpsc.passes.match import Role
from tests.families import COSMOS, MODELS, TEXT, Model
from tests.passes import foreign
from tests.passes.test_spellings import capture

GRIDS = [(1, 4, 5), (4, 4, 4)]  # beside those that every model runs on
BY_KEY = {model.key: model for model in MODELS}

VIDEO = {
    "WanTransformer3DModel": 2,
    "WanTransformer3DModel/per-token timestep": 2,
    "WanTransformer3DModel/image": 2,
    "WanVACETransformer3DModel": 4,  # main and control blocks
    "WanAnimateTransformer3DModel": 2,
    "SkyReelsV2Transformer3DModel": 2,
    "SkyReelsV2Transformer3DModel/diffusion forcing": 2,
    "ChronoEditTransformer3DModel": 2,
    "AnyFlowTransformer3DModel": 2,
    "HunyuanVideoTransformer3DModel": 3,
    "HunyuanVideoTransformer3DModel/image": 3,
    "CogVideoXTransformer3DModel/2B": 2,
    "CogVideoXTransformer3DModel/5B": 2,
    "CogVideoXTransformer3DModel/1.5": 2,
    "ConsisIDTransformer3DModel": 2,
    "EasyAnimateTransformer3DModel": 2,
    "AllegroTransformer3DModel": 2,
    "CosmosTransformer3DModel/1": 2,
    "CosmosTransformer3DModel/2": 2,
    "Kandinsky5Transformer3DModel": 2,
    "Kandinsky6Transformer3DModel": 2,
    "JoyImageEditTransformer3DModel": 2,
    "SanaWMTransformer3DModel": 2,  # tokens and cameras
}
"""Replaced attentions of the tiny models, on any grid; all their video self-attentions."""

TOKENS = {"LTXVideoTransformer3DModel": 2, "LTX2VideoTransformer3DModel": 2}
"""The same for models that are given tokens: one frame cannot be told from an image there."""

DENSE = {
    "LatteTransformer3DModel": "inside frames or along time",
    "SanaVideoTransformer3DModel": "cross-attention",  # its self-attention is linear
    "Kandinsky6SRTransformer3DModel": "FlexAttention",
    "SkyReelsV2Transformer3DModel/causal blocks": "mask of shape [1, 1, 60, 60]",
    "LTXVideoTransformer3DModel/coordinates": 'options={"grid": [T, Y, X]}',
    "AnyFlowFARTransformer3DModel": "block mask",
    "AnyFlowFARTransformer3DModel/cache": "earlier frames",
    "Cosmos3OmniTransformer": "keys of text",
    "JoyImageEditPlusTransformer3DModel": "66 tokens are joined from [60, 6]",
    "MiniMaxH3Transformer3DModel": "indices that are data (index_copy)",
    "SanaWMLTX2RefinerTransformer3DModel": 'options={"grid": [T, Y, X]}',
    "SanaWMLTX2RefinerTransformer3DModel/cache": "earlier frames",
    "TransformerTemporalModel": "batch merged from [1, 4, 5]",
    "WanAnimate2Transformer3DModel/reference": "a graph break stands before this attention",
    "WanAnimate2Transformer3DModel/cache": "block mask",
}
"""Models of which nothing is replaced, with the words that say why."""

PARTLY = {
    "HeliosTransformer3DModel": (2, ""),
    "MotifVideoTransformer3DModel": (2, "several spans of [60, 60] tokens"),
}

STATED = {
    "LTXVideoTransformer3DModel/coordinates, grid stated": 2,
    "SanaWMLTX2RefinerTransformer3DModel/grid stated": 2,
}
"""Replaced on the grid that the options state, and left dense on any other."""

UNPADDED = {
    "MochiTransformer3DModel": 2,
    "HunyuanVideoFramepackTransformer3DModel": 3,
    "HunyuanVideo15Transformer3DModel": 2,
}
"""The same for models that drop padding, so that a length depends on data."""

PREFIX = {"CogVideoX": TEXT, "ConsisID": TEXT, "EasyAnimate": TEXT, "Helios": 28}
SUFFIX = {"HunyuanVideoT": TEXT, "JoyImage": TEXT, "Motif": TEXT + 3}


def expected_grid(model: Model, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    t, y, x = grid
    return (t + 1, y, x) if "WanAnimate" in model.key else grid  # and a reference frame


def spans(table: dict[str, int], key: str) -> int:
    return next((n for prefix, n in table.items() if key.startswith(prefix)), 0)


def check_replaced(key: str, grid: tuple[int, int, int], count: int) -> Any:
    model = BY_KEY[key]
    found = analyse(model, grid)
    assert found.graphs == 1
    replaced = [s for s in found.sites if s.replaced]
    assert [s.grid for s in replaced] == [expected_grid(model, grid)] * count
    assert {s.grid_source for s in replaced} == {"graph"}
    assert {(s.prefix, s.suffix) for s in replaced} == {(spans(PREFIX, key), spans(SUFFIX, key))}
    return found


@pytest.mark.parametrize("key", BY_KEY)
def test_noise_levels_and_resolutions(key: str) -> None:
    """Right and replaced on every grid, and compiled once more for all that come after the first.

    Dynamo takes sizes for dynamic then. That the grid is not that of another call shows only in
    what the kernels are given: everything dense is the same for any grid.
    """
    found = run(key)
    assert found.error <= WORST
    assert [stage.later for stage in found.stages] == [0] * len(RUN)
    *_, back = found.stages
    assert back.compiles == 0
    partly = {k: n for k, (n, _) in PARTLY.items()}
    count = {**VIDEO, **TOKENS, **STATED, **UNPADDED, **partly}.get(key, 0)
    assert found.stages[0].replaced == count
    model = BY_KEY[key]
    for stage in found.stages:
        here = 0 if key in STATED and stage.grid != RUN[0] else count
        assert not stage.sites or stage.replaced == here
        spans = {span.grid for span in stage.spans}
        assert spans == ({expected_grid(model, stage.grid)} if here else set())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("key", VIDEO)
def test_video_self_attention_is_replaced(key: str, grid: tuple[int, int, int]) -> None:
    found = check_replaced(key, grid, VIDEO[key])
    left = [s for s in found.sites if not s.replaced]
    assert all(s.role in (Role.CROSS, Role.OTHER) and s.reason for s in left)
    assert found.timestep is not None


@pytest.mark.parametrize("key", TOKENS)
def test_models_that_are_given_tokens(key: str) -> None:
    check_replaced(key, (4, 4, 4), TOKENS[key])
    left = [s for s in analyse(BY_KEY[key], (1, 4, 5)).sites if s.role == Role.VIDEO]
    assert len(left) == 2 and all("an image" in s.reason for s in left)


@pytest.mark.parametrize("key", DENSE)
def test_what_is_left_dense_has_the_reason(key: str) -> None:
    found = analyse(BY_KEY[key], RUN[0]) if key in UNPADDED else run(key).stages[0]
    assert not any(s.replaced for s in found.sites)
    assert DENSE[key] in " ".join(s.reason for s in found.sites)
    assert all(s.reason for s in found.sites)


@pytest.mark.parametrize("key", PARTLY)
def test_several_videos_in_one_sequence(key: str) -> None:
    count, reason = PARTLY[key]
    found = check_replaced(key, (3, 4, 5), count)
    assert reason in " ".join(s.reason for s in found.sites)


def test_audio_is_never_taken_for_video() -> None:
    """LTX 2 with as many audio tokens as video tokens, and a grid that would fit both."""
    model = BY_KEY["LTX2VideoTransformer3DModel"]
    audio = {"audio_hidden_states": torch.randn(1, 60, 6), "audio_num_frames": 60}
    for options in ({}, {"grid": (3, 4, 5)}):
        found = analyse(model, (3, 4, 5), options, **audio)
        roles = [(s.role, s.replaced) for s in found.sites if s.role != Role.CROSS]
        assert sorted(roles) == [("other", False)] * 2 + [("video", True)] * 2


@pytest.mark.parametrize(
    "key", ["HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel/5B"]
)
def test_text_as_long_as_the_video(key: str) -> None:
    """Also where both were one tensor before: single blocks split it, and join it again."""
    model, text = BY_KEY[key], torch.randn(1, 60, 16)
    given: dict[str, Any] = {"encoder_hidden_states": text}
    if key.startswith("Hunyuan"):
        given["encoder_attention_mask"] = torch.ones(1, 60, dtype=torch.int64)
    found = analyse(model, (3, 4, 5), **given)
    replaced = {(s.prefix, s.suffix) for s in found.sites if s.replaced}
    assert replaced == {(0, 60) if key.startswith("Hunyuan") else (60, 0)}


def test_every_video_transformer_is_listed() -> None:
    """A new release of diffusers may bring one that nobody has looked at."""
    found = set()
    for module in pkgutil.iter_modules(transformers.__path__):
        loaded = importlib.import_module(f"{transformers.__name__}.{module.name}")
        for name, cls in vars(loaded).items():
            is_model = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
            ours = is_model and cls.__module__ == loaded.__name__
            if ours and re.search("3DModel|Video|Temporal|OmniTransformer", name):
                found.add(name)
    assert found - {m.name for m in MODELS} == set()


def error_of(key: str, **given: Tensor) -> float:
    """Relative RMS between a tiny model, compiled with the dense policy, and the model itself."""
    model = BY_KEY[key].build((3, 4, 5))
    inputs = {**BY_KEY[key].inputs((3, 4, 5)), **given}
    with torch.no_grad():
        expected = first(model(**inputs))
        fpsc.reports(clear=True)
        compiled = torch.compile(model, backend="fpsattn", options={"policy": "dense"})
        found = first(compiled(**inputs))
    assert sum(report.replaced for report in fpsc.reports())
    assert expected.isfinite().all()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(
    "key", ["HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"]
)
def test_numbers_with_padded_text(key: str) -> None:
    """The second one masks rows of padded queries too, which nothing reads."""
    mask = torch.tensor([[1] * 4 + [0] * (TEXT - 4)])
    assert error_of(key, encoder_attention_mask=mask) <= 1e-4


def test_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    if f"and torch {torch.__version__.partition('+')[0]};" not in written:
        pytest.skip("the page is of another version of torch, which counts graphs differently")
    assert page() == written


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 4, 19)])
def test_tokens_that_are_placed_by_indices_stay_dense(grid: tuple[int, int, int]) -> None:
    """Even where a grid is stated that fits the video, or text, audio and video together."""
    found = analyse(BY_KEY["MiniMaxH3Transformer3DModel"], (3, 4, 5), {"grid": grid})
    assert not any(s.replaced for s in found.sites)


def shuffled(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    """Tokens in another order, as models that scan along a curve have them."""
    order = torch.arange(x.shape[1]).flip(0)
    return layer(x[:, order])[:, order]


def picked(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    order = torch.arange(x.shape[1]).flip(0)
    return layer(x.index_select(1, order)).index_select(1, order)


@pytest.mark.parametrize("call", [shuffled, picked])
def test_tokens_in_another_order_stay_dense(call: Any) -> None:
    gm, _ = capture(foreign.Model(foreign.Layer(), call), *foreign.arguments())
    (decision,) = manager.analyse(gm).decisions
    assert isinstance(decision, str) and "indices that are data" in decision


@pytest.mark.parametrize(("learnable", "convention"), [("learnable", "log-sigma"), (None, "unit")])
def test_convention_of_cosmos(learnable: str | None, convention: str) -> None:
    """One class: EDM's noise levels in version 1, those from 0 to 1 in versions 2 and 2.5."""
    config = {**COSMOS, "extra_pos_embed_type": learnable}
    family = family_of(diffusers.CosmosTransformer3DModel(**config))
    assert family is not None and family.convention == convention


def test_unknown_convention_is_explained() -> None:
    """The report says what to state, for every convention there is."""
    found: list[Any] = []

    def keep(gm: Any, example_inputs: Any) -> Any:
        found.append(backend.analyse_graph(gm))
        return gm.forward

    model = foreign.Model(foreign.Layer())
    with torch.no_grad():
        torch.compile(model, backend=keep)(*foreign.arguments())
    (note,) = [n for n in found[0].notes if "convention" in n]
    assert all(f'"{name}"' in note for name in CONVENTIONS)
