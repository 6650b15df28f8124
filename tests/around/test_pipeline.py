"""A whole pipeline of Wan 2.2: two transformers, each with its own range of noise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch._dynamo.utils import counters

import fpsc
from tests.thresholds import COMPILED_DENSE, relative_rms
from tests.wan import small_wan


def test_two_transformers_share_a_graph_and_keep_their_own_counts() -> None:
    high, low = (small_wan(in_channels=16, out_channels=16) for _ in range(2))
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.9)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=high,
        transformer_2=low,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        boundary_ratio=0.8,
    )
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        text, no_text = (torch.randn(1, 7, 32, generator=generator) for _ in range(2))
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=no_text,
            height=128,
            width=160,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=generator,
            output_type="latent",
            max_sequence_length=7,
        ).frames

    expected = draw()
    pipe.transformer = torch.compile(high, backend="fpsattn", options={"policy": "dense"})
    pipe.transformer_2 = torch.compile(low, backend="fpsattn", options={"policy": "dense"})
    assert relative_rms(draw(), expected) <= COMPILED_DENSE
    assert counters["stats"]["unique_graphs"] == 1
    reports = fpsc.reports()
    assert [r.replaced for r in reports] == [2, 2]
    forwards = [sum(p.forwards for p in r.phases) for r in reports]
    assert sum(forwards) == 8 and min(forwards) > 0  # four steps, with and without the prompt
