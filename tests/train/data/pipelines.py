"""Whole text-to-video pipelines of five families, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fpsc.models.build import ModelSpec
from tests.families import COGVIDEOX, HUNYUAN, LTX, WAN

WIDTH = 16  # of text embeddings
CAPTION = "a red disc moves right over checks"


@dataclass(frozen=True)
class Tiny:
    """A pipeline, the frames and pixels of a clip that it takes, and the strides of its VAE."""

    build: Callable[[], Any]
    size: tuple[int, int, int]
    latents: tuple[int, int, int, int]

    @property
    def pipe(self) -> Any:
        torch.manual_seed(0)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        for name in ("vae", "transformer", "text_encoder"):
            getattr(pipe, name).eval()
        return pipe


def spec_of(pipe: Any) -> ModelSpec:
    """What `fpsc.models.build.find_model` reads of a saved pipeline."""
    config = dict(pipe.transformer.config)
    return ModelSpec(type(pipe.transformer).__name__, config, "a test", saved=True)


@cache
def tokenizer() -> Any:
    """One number for each word that the tests use, one for all others."""
    words = f"{CAPTION} another clip number one two {' '.join('0123456789')}".split()
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5(cls: Any, config: Any) -> Any:
    return cls(
        config(
            vocab_size=100,
            d_model=WIDTH,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
        )
    )


def scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def wan() -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    model = diffusers.WanTransformer3DModel(**{**WAN, "in_channels": 16, "out_channels": 16})
    text = t5(transformers.UMT5EncoderModel, transformers.UMT5Config)
    return diffusers.WanPipeline(tokenizer(), text, vae, scheduler(), model)


def ltx() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        scaling_factor=0.7,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    vae.latents_mean = torch.randn(8)
    vae.latents_std = torch.rand(8) + 0.5
    model = diffusers.LTXVideoTransformer3DModel(**LTX)
    text = t5(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.LTXPipeline(scheduler(), vae, text, tokenizer(), model)


def hunyuan() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    text = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=100,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    text_2 = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN)
    return diffusers.HunyuanVideoPipeline(
        text, tokenizer(), model, vae, scheduler(), text_2, tokenizer()
    )


def cogvideox() -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    model = diffusers.CogVideoXTransformer3DModel(**{**COGVIDEOX, "max_text_seq_length": 226})
    text = t5(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.CogVideoXPipeline(
        tokenizer(), text, vae, model, diffusers.CogVideoXDDIMScheduler()
    )


def mochi() -> Any:
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),  # it has norms of 32 groups
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.7,
    )
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
    )
    text = t5(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.MochiPipeline(scheduler(), vae, text, tokenizer(), model)


FAMILIES = {
    "wan": Tiny(wan, (5, 32, 48), (16, 2, 4, 6)),
    "ltx": Tiny(ltx, (5, 32, 64), (8, 2, 8, 16)),
    "hunyuan": Tiny(hunyuan, (5, 32, 48), (4, 2, 4, 6)),
    "cogvideox": Tiny(cogvideox, (5, 32, 48), (4, 2, 4, 6)),
    "mochi": Tiny(mochi, (7, 32, 48), (12, 2, 4, 6)),
}
