"""A tiny model of every video transformer that diffusers ships, with inputs for any token grid.

Real weights and data on CPU: two layers, two heads, a width that the kernels take. What `fpsc
inspect` knows of a forward's arguments is used (`fpsc.models.inputs`); the rest is stated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from fpsc.grid import TokenGrid
from fpsc.models.inputs import example_inputs

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
        options: of the backend, where the graph alone does not say enough.
    """

    key: str
    config: dict[str, Any]
    given: Arguments = lambda grid, batch: {}
    flags: dict[str, bool] = field(default_factory=dict)
    sized: Callable[[TokenGrid], dict[str, Any]] = lambda grid: {}
    options: Callable[[TokenGrid], dict[str, Any]] = lambda grid: {}

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
    "guidance_embeds": True,
}
TOKEN_REPLACE = {"image_condition_type": "token_replace"}
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
JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
REFINER: dict[str, Any] = {**LTX2, "rope_double_precision": False}
ANIMATE2: dict[str, Any] = {
    "in_dim": 8,
    "out_dim": 4,
    "dim": 32,
    "num_heads": 2,
    "num_layers": 2,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 16,
    "text_len": TEXT,
    "use_img_emb": False,
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


def _forcing(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"timestep": torch.full((batch, grid.t), 500), "enable_diffusion_forcing": True}


def _coordinates(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """Positions as numbers: no grid in the graph; and a timestep for every token."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid_sizes(grid)))
    return {
        "video_coords": places.T.float().expand(batch, -1, -1),
        "timestep": torch.full((batch, grid.tokens), 500),
        "num_frames": None,
        "height": None,
        "width": None,
    }


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


def _cosmos(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {"timestep": torch.full((batch,), 0.25)}  # ln(sigma) / 4


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


def _far(grid: TokenGrid, batch: int) -> dict[str, Any]:
    latent = _latent(grid, batch).transpose(1, 2)
    return {
        "hidden_states": latent,
        "timestep": torch.full((batch, grid.t), 500.0),
        "r_timestep": torch.full((batch, grid.t), 400.0),
        "chunk_partition": [grid.t],
    }


def _far_cached(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """One chunk against a cache of an earlier one, as its pipeline generates."""
    cache = {
        "full_cache": torch.randn(2, batch, 2, grid.tokens, 16),
        "compressed_cache": torch.randn(2, batch, 2, grid.tokens, 16),
    }
    return {
        **_far(grid, batch),
        "chunk_partition": [grid.t, grid.t],
        "kv_cache": [cache, cache],
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 1},
    }


def _cosmos3(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """Text, then video; one sample, in the width of the model without a batch."""
    sequence = TEXT + grid.tokens
    video = torch.arange(TEXT, sequence)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(sequence).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": sequence,
        "vision_tokens": [_latent(grid, 1)],
        "vision_token_shapes": [grid_sizes(grid)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((grid.tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(grid.t)],
    }


def _joy_plus(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """The target and one reference image of another size, as patches."""
    return {
        "hidden_states": torch.randn(batch, grid.tokens + 6, 4, 1, 2, 2),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT),
        "shape_list": [[grid_sizes(grid), (1, 2, 3)]] * batch,
    }


def _minimax(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """Text, audio, video."""
    sequence = TEXT + AUDIO + grid.tokens
    text, audio, video = torch.arange(sequence).split([TEXT, AUDIO, grid.tokens])
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid_sizes(grid)))
    return {
        "hidden_states": torch.randn(batch, grid.tokens, 16),
        "audio_hidden_states": torch.randn(batch, AUDIO, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "timestep_indices": torch.zeros(sequence, dtype=torch.int64).index_fill(0, audio, 1),
        "token_tags": torch.tensor([1] * TEXT + [2] * AUDIO + [0] * grid.tokens),
        "position_ids": torch.cat([*(n[:, None].expand(-1, 3) for n in (text, audio)), places]),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def _sana_wm(grid: TokenGrid, batch: int) -> dict[str, Any]:
    pose = torch.eye(4).repeat(batch, grid.t, 1, 1)
    pose[..., 2, 3] = torch.arange(grid.t) * 0.1
    lens = torch.tensor([grid.x, grid.y, grid.x / 2, grid.y / 2]).expand(batch, grid.t, 4)
    return {
        "timestep": torch.full((batch, 1, grid.t), 500.0),
        "encoder_hidden_states": torch.randn(batch, 1, TEXT, 16),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": torch.randn(batch, 8, *grid_sizes(grid)),
    }


def _refiner(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """Tables of positions as the model makes them, and no tokens from earlier chunks."""
    model = Model("SanaWMLTX2RefinerTransformer3DModel", REFINER).build((1, 1, 1))
    tables = model.build_rotary_emb_for_absolute_positions(  # type: ignore[operator]
        batch, list(range(grid.t)), grid.y, grid.x, torch.device("cpu"), 24.0
    )
    return {
        "hidden_states": torch.randn(batch, grid.tokens, 8),
        "timestep": torch.full((batch, grid.tokens), 500.0),
        "video_rotary_emb": tables,
    }


def _refiner_cached(grid: TokenGrid, batch: int) -> dict[str, Any]:
    cache = SanaWMRefinerKVCache(2)
    for layer in range(2):
        keys = torch.randn(batch, grid.tokens, 32)
        cache.get(layer).store_history(keys, keys.clone())
    return {**_refiner(grid, batch), "kv_cache": cache, "kv_cache_mode": "inject"}


def _temporal(grid: TokenGrid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch * grid.t, 32, grid.y, grid.x),
        "encoder_hidden_states": None,
        "timestep": None,
        "num_frames": grid.t,
    }


def _animate2(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """The pass over the reference, which fills the cache."""
    return {
        "hidden_states": [_latent(grid, 1)[0] for _ in range(batch)],
        "condition_latents": [_latent(grid, 1)[0] for _ in range(batch)],
        "timestep": torch.full((batch,), 1.0),
        "encoder_hidden_states": [torch.randn(TEXT, 16) for _ in range(batch)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": grid.tokens,
        "offset_grid_sizes": torch.tensor([grid_sizes(grid)] * batch),
    }


def _animate2_cached(grid: TokenGrid, batch: int) -> dict[str, Any]:
    """A denoising step: a frame more than the reference has."""
    cache = WanAnimate2KVCache(2)
    frames = TokenGrid(grid.t - 1, grid.y, grid.x)
    for layer in range(2):
        keys = torch.randn(batch, frames.tokens, 2, 16)
        cache.get(layer).store(keys, keys.clone())
    return {
        **_animate2(grid, batch),
        "timestep": torch.full((batch,), 500.0),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([grid_sizes(frames)] * batch),
        "origin_len": 4 * (frames.t - 1) + 1,
        "origin_area": [16 * grid.y, 16 * grid.x],
    }


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
    Model("SkyReelsV2Transformer3DModel/diffusion forcing", WAN, _forcing),
    Model(
        "SkyReelsV2Transformer3DModel/causal blocks",
        WAN,
        sized=lambda grid: {"num_frame_per_block": grid.t},
    ),
    Model("ChronoEditTransformer3DModel", WAN),
    Model(
        "AnyFlowTransformer3DModel",
        WAN,
        _flow_map,
    ),
    Model("HeliosTransformer3DModel", HELIOS, _helios),
    Model("HunyuanVideoTransformer3DModel", HUNYUAN),
    Model("HunyuanVideoTransformer3DModel/image", {**HUNYUAN, **TOKEN_REPLACE}),
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
    Model("LTXVideoTransformer3DModel/coordinates", LTX, _coordinates),
    Model(
        "LTXVideoTransformer3DModel/coordinates, grid stated",
        LTX,
        _coordinates,
        options=lambda grid: {"grid": grid_sizes(grid)},
    ),
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
    Model("CosmosTransformer3DModel/1", COSMOS, _cosmos),
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
        JOY,
        _joy,
    ),
    Model("AnyFlowFARTransformer3DModel", WAN, _far),
    Model("AnyFlowFARTransformer3DModel/cache", WAN, _far_cached),
    Model(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 32,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "rope_axes_dim": (4, 2, 2),
            "vocab_size": 16,
        },
        _cosmos3,
    ),
    Model(
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        _joy_plus,
    ),
    Model(
        "MiniMaxH3Transformer3DModel",
        {
            **HEADS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax,
    ),
    Model(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 16,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
        },
        _sana_wm,
    ),
    Model("SanaWMLTX2RefinerTransformer3DModel", REFINER, _refiner),
    Model(
        "SanaWMLTX2RefinerTransformer3DModel/grid stated",
        REFINER,
        _refiner,
        options=lambda grid: {"grid": grid_sizes(grid)},
    ),
    Model("SanaWMLTX2RefinerTransformer3DModel/cache", REFINER, _refiner_cached),
    Model(
        "TransformerTemporalModel",
        {**HEADS, "in_channels": 32, "num_layers": 2},
        _temporal,
    ),
    Model("WanAnimate2Transformer3DModel/reference", ANIMATE2, _animate2),
    Model("WanAnimate2Transformer3DModel/cache", ANIMATE2, _animate2_cached),
)
"""Every case, in the order of the table."""
