"""A tiny model of every video transformer that diffusers ships, with inputs for any token grid.

Real weights and data on CPU: two layers, two heads, a width that the kernels take. What `fpsc
inspect` knows of a forward's arguments is used (`fpsc.cli.inputs`); the rest is stated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fpsc.cli.inputs import example_inputs
from fpsc.grid import TokenGrid

TEXT = 7  # text tokens
Arguments = Callable[[TokenGrid, int], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """One way to build and call one class.

    Attributes:
        key: `class` or `class/variant`, unique.
        config: settings of the constructor.
        given: arguments of forward that are not derived from its signature, for (grid, batch).
        flags: settings of Dynamo without which the model is not one graph.
        sized: settings that a grid decides.
    """

    key: str
    config: dict[str, Any]
    given: Arguments = lambda grid, batch: {}
    flags: dict[str, bool] = field(default_factory=dict)
    sized: Callable[[TokenGrid], dict[str, Any]] = lambda grid: {}

    @property
    def name(self) -> str:
        return self.key.partition("/")[0]

    def build(self, grid: tuple[int, int, int]) -> nn.Module:
        torch.manual_seed(0)
        cls: Any = getattr(diffusers, self.name)
        model: nn.Module = cls(**self.config, **self.sized(TokenGrid(*grid))).eval()
        for parameter in model.parameters():
            if (
                parameter.ndim > 1 and not parameter.any()
            ):  # gates and last layers that begin at zero would hide errors
                nn.init.normal_(parameter, std=0.05)
        return model.requires_grad_(False)

    def inputs(self, grid: tuple[int, int, int], batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of forward: random floats, text without padding, timestep 500."""
        tokens = TokenGrid(*grid)
        given = self.given(tokens, batch)
        cls: Any = getattr(diffusers, self.name)
        with torch.device("meta"):
            model = cls(**self.config, **self.sized(tokens))
        meta = example_inputs(
            model, grid=tokens, batch=batch, text_tokens=TEXT, dtype=torch.float32, given=given
        )
        made = {k: v if k in given else _real(k, v) for k, v in meta.items()}
        return {k: v for k, v in made.items() if v is not None}


def _real(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_real(name, v) for v in value)
    if not isinstance(value, Tensor):
        return value
    if "timestep" in name:
        return torch.full(value.shape, 500, dtype=value.dtype)
    if value.dtype == torch.int64:
        return torch.ones(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, dtype=value.dtype)


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
HELIOS = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 6, 6)}
HUNYUAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
COGVIDEOX: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "max_text_seq_length": TEXT,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
}
ROPE = {"use_rotary_positional_embeddings": True}
COSMOS: dict[str, Any] = {
    **HEADS,
    "concat_padding_mask": False,  # it would need torchvision
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
}
LTX: dict[str, Any] = {
    **HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX2: dict[str, Any] = {
    **LTX,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "use_prompt_adaln_single": False,
}
KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 16,
    "out_visual_dim": 4,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
AUDIO = 9  # audio tokens


def _latent(grid: TokenGrid, batch: int, channels: int = 4, patch: int = 2) -> Tensor:
    return torch.randn(batch, channels, grid.t, patch * grid.y, patch * grid.x)


def _channels_last(grid: TokenGrid, batch: int, channels: int = 4, patch: int = 2) -> Tensor:
    return torch.randn(batch, grid.t, patch * grid.y, patch * grid.x, channels)


def _image(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states_image": torch.randn(batch, 9, 16)}


def _per_token(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"timestep": torch.full((batch, grid.tokens), 500)}


def _vace(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"control_hidden_states_scale": torch.ones(2)}


def _animate(grid: TokenGrid, batch: int) -> dict[str, Any]:
    latent = torch.randn(batch, 12, grid.t + 1, 2 * grid.y, 2 * grid.x)
    return {
        "hidden_states": latent,
        "pose_hidden_states": torch.randn(batch, 4, grid.t, 2 * grid.y, 2 * grid.x),
        "face_pixel_values": torch.rand(batch, 3, 4 * grid.t, 16, 16),
        **_image(grid, batch),
    }


def _hunyuan15(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, *grid_sizes(grid)),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states_2": torch.randn(batch, 5, 16),
        "encoder_attention_mask_2": torch.ones(batch, 5, dtype=torch.int64),
        "image_embeds": torch.randn(batch, 3, 16),
    }


def grid_sizes(grid: TokenGrid) -> tuple[int, int, int]:
    return grid.t, grid.y, grid.x


def _framepack(grid: TokenGrid, batch: int) -> dict[str, Any]:
    y, x = 2 * grid.y, 2 * grid.x

    def clip(frames: int) -> Tensor:
        return torch.randn(batch, 4, frames, y, x)

    def places(frames: int) -> Tensor:
        return torch.arange(frames)

    return {
        "timestep": torch.full((batch,), 500.0),
        "image_embeds": torch.randn(batch, 3, 16),
        "indices_latents": places(grid.t),
        "latents_clean": clip(1),
        "indices_latents_clean": places(1),
        "latents_history_2x": clip(2),
        "indices_latents_history_2x": places(2),
        "latents_history_4x": clip(4),
        "indices_latents_history_4x": places(4),
    }


def _cogvideox(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {}


def _cogvideox15(grid: TokenGrid, batch: int) -> dict[str, Any]:
    table = torch.randn(grid.tokens, 16)
    latent = torch.randn(batch, 2 * grid.t, 4, 2 * grid.y, 2 * grid.x)
    return {"hidden_states": latent, "image_rotary_emb": (table, table.clone())}


def _consisid(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "id_cond": torch.randn(batch, 12),
        "id_vit_hidden": [torch.randn(batch, 4, 10) for _ in range(2)],
    }


def _easyanimate(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"hidden_states": _latent(grid, batch)}


def _ltx2(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "audio_hidden_states": torch.randn(batch, AUDIO, 6),
        "audio_encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "audio_num_frames": AUDIO,
        "fps": 24.0,
    }


def _allegro(grid: TokenGrid, batch: int) -> dict[str, Any]:
    positions = torch.cartesian_prod(*(torch.arange(n) for n in grid_sizes(grid)))
    tables = tuple((torch.randn(grid.tokens, 8), torch.randn(grid.tokens, 8)) for _ in "tyx")
    places = tuple(positions[:, i].expand(batch, -1) for i in range(3))
    return {
        "image_rotary_emb": (tables, places),
    }


def _cosmos_frames(grid: TokenGrid, batch: int) -> dict[str, Any]:
    latent = _latent(grid, batch)
    mask = torch.zeros(batch, 1, *latent.shape[2:])
    return {
        "timestep": torch.full((batch, 1, grid.t, 1, 1), 0.5),
        "condition_mask": mask,
        "fps": 16,
        "hidden_states": latent[:, :3],
    }


def _kandinsky5(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _channels_last(grid, batch),
        "visual_rope_pos": tuple(torch.arange(n) for n in grid_sizes(grid)),
        "text_rope_pos": torch.arange(TEXT),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "pooled_projections": torch.randn(batch, 16),
    }


def _kandinsky6(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _channels_last(grid, batch, 9),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "pooled_projections": torch.randn(batch, 16),
        "audio_hidden_states": torch.randn(batch, AUDIO, 6),
    }


def _kandinsky6_sr(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, grid.t, 8 * grid.y, 8 * grid.x, 9)}


def _flow_map(grid: TokenGrid, batch: int) -> dict[str, Any]:
    latent = _latent(grid, batch).transpose(1, 2)
    return {
        "hidden_states": latent,
        "timestep": torch.full((batch, grid.t), 500),
        "r_timestep": torch.full((batch, grid.t), 400),
    }


def _helios(grid: TokenGrid, batch: int) -> dict[str, Any]:
    def clip(frames: int) -> Tensor:
        return torch.randn(batch, 4, frames, 2 * grid.y, 2 * grid.x)

    def places(start: int, frames: int) -> Tensor:
        return torch.arange(start, start + frames)[None].expand(batch, -1)

    return {
        "indices_hidden_states": places(7, grid.t),
        "latents_history_short": clip(1),
        "indices_latents_history_short": places(6, 1),
        "latents_history_mid": clip(2),
        "indices_latents_history_mid": places(4, 2),
        "latents_history_long": clip(4),
        "indices_latents_history_long": places(0, 4),
    }


def _motif(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"image_embeds": torch.randn(batch, 3, 16)}


def _joy(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"hidden_states": _latent(grid, batch)}


NO_MASK: Arguments = lambda grid, batch: {"encoder_attention_mask": None}  # noqa: E731

MODELS = (
    Model("WanTransformer3DModel", WAN),
    Model("WanTransformer3DModel/per-token timestep", WAN, _per_token),
    Model("WanTransformer3DModel/image", {**WAN, "image_dim": 16, "added_kv_proj_dim": 32}, _image),
    Model(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0, 1], "vace_in_channels": 8},
        _vace,
    ),
    Model(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "added_kv_proj_dim": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _animate,
    ),
    Model("SkyReelsV2Transformer3DModel", WAN),
    Model("ChronoEditTransformer3DModel", WAN),
    Model(
        "AnyFlowTransformer3DModel",
        WAN,
        _flow_map,
    ),
    Model("HeliosTransformer3DModel", HELIOS, _helios),
    Model("HunyuanVideoTransformer3DModel", HUNYUAN),
    Model(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan15,
        flags={"capture_dynamic_output_shape_ops": True},
    ),
    Model(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _framepack,
        flags={"capture_scalar_outputs": True},
    ),
    Model("CogVideoXTransformer3DModel/2B", COGVIDEOX),
    Model("CogVideoXTransformer3DModel/5B", {**COGVIDEOX, **ROPE}),
    Model(
        "CogVideoXTransformer3DModel/1.5",
        {**COGVIDEOX, **ROPE, "patch_size_t": 2, "patch_bias": False},
        _cogvideox15,
    ),
    Model(
        "ConsisIDTransformer3DModel",
        {
            **COGVIDEOX,
            **ROPE,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12,
            "LFE_vit_dim": 10,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 2,
        },
        _consisid,
    ),
    Model(
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 2,
            "mmdit_layers": 1,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "sample_width": 16,
            "sample_height": 16,
        },
        _easyanimate,
    ),
    Model("LTXVideoTransformer3DModel", LTX),
    Model("LTX2VideoTransformer3DModel", LTX2, _ltx2),
    Model(
        "MochiTransformer3DModel",
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": TEXT,
        },
        flags={"capture_dynamic_output_shape_ops": True},
    ),
    Model(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 16,
            "sample_height": 16,
            "sample_width": 16,
            "sample_frames": 4,
        },
        _allegro,
    ),
    Model(
        "LatteTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 16,
            "patch_size": 2,
            "caption_channels": 16,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 8,
            "norm_elementwise_affine": False,
        },
        NO_MASK,
        sized=lambda grid: {"video_length": grid.t},
    ),
    Model("CosmosTransformer3DModel/1", COSMOS),
    Model(
        "CosmosTransformer3DModel/2",
        {**COSMOS, "extra_pos_embed_type": None},
        _cosmos_frames,
    ),
    Model(
        "SanaVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 64,
        },
    ),
    Model("Kandinsky5Transformer3DModel", KANDINSKY, _kandinsky5),
    Model(
        "Kandinsky6Transformer3DModel",
        {**KANDINSKY, "in_audio_dim": 6, "out_audio_dim": 6},
        _kandinsky6,
    ),
    Model(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky6_sr,
    ),
    Model(
        "MotifVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _motif,
    ),
    Model(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "mlp_width_ratio": 2.0,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        _joy,
    ),
)
"""Every case, in the order of the table."""

ELSEWHERE = {
    "AnyFlowFARTransformer3DModel": "causal chunks through FlexAttention, or keys from a cache",
    "Cosmos3OmniTransformer": "text, video, sound and actions in one sequence, placed by indices",
    "JoyImageEditPlusTransformer3DModel": "images of several sizes in one padded sequence",
    "MiniMaxH3Transformer3DModel": "text, video and audio in one sequence, placed by indices",
    "SanaWMTransformer3DModel": "linear attention in most layers, cameras in the others",
    "SanaWMLTX2RefinerTransformer3DModel": "keys from a cache of earlier chunks",
    "TransformerTemporalModel": "attention along time inside a 2D UNet",
    "WanAnimate2Transformer3DModel": "lists of clips, keys from a cache of the reference",
}
"""Classes that are given a video and are not built here, and what they do."""
