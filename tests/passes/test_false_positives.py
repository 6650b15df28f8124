"""Models that are no video transformers: their graph goes to Inductor as Dynamo made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import fpsc
from fpsc import backend

IMAGE_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
Case = tuple[nn.Module, dict[str, Any]]


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        **IMAGE_HEADS, in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=16,
        pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 60, 8), "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.rand(1),
        "img_ids": torch.zeros(60, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        **IMAGE_HEADS, in_channels=8, out_channels=2, num_layers=1, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 60, 8), "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7), "timestep": torch.rand(1),
        "img_shapes": [[(1, 6, 10)]],
    }  # fmt: skip


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        **IMAGE_HEADS, sample_size=12, in_channels=4, out_channels=4, num_layers=2,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 12, 10), "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.rand(1),
    }  # fmt: skip


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        **IMAGE_HEADS, sample_size=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=32, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 12, 12), "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.rand(1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 8, 8), "timestep": torch.rand(1),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }  # fmt: skip


def image_vae() -> Case:
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 16, 16)}


class Decoder(nn.Module):
    """The decoder of a video VAE: attention inside every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decoder(latent)


def video_vae() -> Case:
    return Decoder(), {"latent": torch.randn(1, 4, 3, 4, 5)}


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5EncoderModel(config)
    mask = torch.arange(60)[None] < 50
    return model, {"input_ids": torch.arange(60)[None] % 32, "attention_mask": mask.long()}


def clip() -> Case:
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=60,
    )  # fmt: skip
    return transformers.CLIPTextModel(config), {"input_ids": torch.arange(60)[None] % 32}


CASES: list[Callable[[], Case]] = [
    flux, qwen_image, sd3, pixart, unet, image_vae, video_vae, t5, clip,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_graph_is_what_dynamo_made(
    case: Callable[[], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = case()
    before: list[tuple[fx.GraphModule, str]] = []
    handed: list[tuple[fx.GraphModule, str]] = []

    def shown(gm: fx.GraphModule) -> tuple[fx.GraphModule, str]:
        return gm, gm.print_readable(print_output=False)

    def inductor(gm: fx.GraphModule, example_inputs: Any, config_patches: Any = None) -> Any:
        handed.append(shown(gm))
        return gm.forward

    def watched(gm: fx.GraphModule, example_inputs: Any) -> Any:
        before.append(shown(gm))
        options = {"policy": "dense", "timestep": {"convention": "flow"}}
        return backend.fpsattn(gm, example_inputs, options=options)

    monkeypatch.setattr(backend, "inductor", inductor)
    fpsc.reports(clear=True)
    with torch.no_grad():
        torch.compile(model.eval(), backend=watched)(**inputs)
    assert [a is b and s == t for (a, s), (b, t) in zip(before, handed, strict=True)] == (
        [True] * len(before)
    )
    sites = [s for r in fpsc.reports() for s in r.sites]
    assert sites and not any(s.replaced for s in sites)
    assert all(s.reason for s in sites)
