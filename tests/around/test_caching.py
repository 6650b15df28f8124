"""The caches of diffusers, which skip blocks or attentions in some steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

import fpsc
from tests.thresholds import COMPILED_DENSE, relative_rms
from tests.wan import small_inputs, small_wan

STEPS = (950.0, 945.0, 600.0, 100.0)


def first_block(now: list[float]) -> Any:
    return FirstBlockCacheConfig(threshold=0.05)


def pyramid(now: list[float]) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 999),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: now[0],
    )


def outputs(model: Any, run: Any, now: list[float]) -> list[torch.Tensor]:
    found = []
    for timestep in STEPS:
        now[0] = timestep
        with model.cache_context("cond"), torch.no_grad():
            found.append(run(**small_inputs((timestep,)))[0])
    return found


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.parametrize("cache", [first_block, pyramid])
def test_a_cached_model_equals_itself_uncompiled(cache: Any, way: str, no_inductor: None) -> None:
    now = [0.0]
    plain, model = small_wan(layers=3), small_wan(layers=3)
    plain.enable_cache(cache(now))
    model.enable_cache(cache(now))
    expected = outputs(plain, plain, now)
    options = {"policy": "dense"}
    run: Any = model
    # Hooks of this cache are objects of their own: every block is a graph, in every state.
    with torch._dynamo.config.patch(recompile_limit=100):
        if way == "blocks":
            model.compile_repeated_blocks(backend="fpsattn", options=options)
        else:
            run = torch.compile(model, backend="fpsattn", options=options)
        found = outputs(model, run, now)
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= COMPILED_DENSE
    reports = fpsc.reports()
    assert reports and all(not s.reason for r in reports for s in r.sites if s.role == "video")
    assert sum(r.replaced for r in reports) > 0 and {r.layers for r in reports if r.replaced} == {3}


def test_the_timestep_of_a_hooked_block_is_not_its_second_argument(
    policy: str, no_inductor: None
) -> None:
    """The block's text stands where the model has its timestep."""
    model = small_wan(layers=3)
    model.enable_cache(first_block([]))
    model.compile_repeated_blocks(backend="fpsattn", options={"policy": policy})
    outputs(model, model, [0.0])
    assert {r.timestep for r in fpsc.reports()} == {"the root module"}
    used = [p.forwards for p in fpsc.reports()[0].phases]
    assert used == [2, 1, 1]
