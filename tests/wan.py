"""A small Wan transformer for tests, and the same model by the reference, without a compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fpsc.grid import layout
from fpsc.kernels import reference
from fpsc.kernels.ops import resolve_modes
from fpsc.kernels.rows import noise_rows
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve

HEADS, HEAD_DIM, TEXT = 2, 64, 7
PHASES = {
    "fpsc": 1,
    "name": "phases",
    "tile": [1, 4, 5],
    "modes": {
        "dense": {"keep": 1.0, "dtype": "bf16"},
        "near": {"pattern": "near", "keep": 0.5, "dtype": "fp8"},
        "window": {"pattern": "window", "window": [1, 1, 1], "dtype": "fp8"},
    },
    "schedule": [
        {"noise": "1.00..0.90", "use": "dense"},
        {"noise": "0.90..0.40", "use": "near"},
        {"noise": "0.40..0.00", "use": "window"},
    ],
    "except": [{"layers": [1], "heads": [0], "noise": "0.90..0.40", "use": "window"}],
    "limits": {"min_tokens": 0},
}
"""Three phases that differ on a small grid: all tiles, half of them, one; and one head of its
own."""


def small_wan(layers: int = 2, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": layers,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**config, **changes}).eval()


def small_inputs(
    timesteps: Sequence[float] = (500.0,), grid: Sequence[int] = (3, 8, 10), seed: int = 1
) -> dict[str, Any]:
    """Arguments of `small_wan` for a token grid, one batch element a timestep."""
    generator = torch.Generator().manual_seed(seed)
    t, y, x = grid
    batch = len(timesteps)
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * y, 2 * x, generator=generator),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": torch.randn(batch, TEXT, 32, generator=generator),
        "return_dict": False,
    }


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, tables: tuple[Any, ...]
    ) -> Tensor:
        modes, plan, scale, _ = tables
        lists = (plan.list_ptr, plan.list_idx, plan.order, plan.groups, plan.gather, plan.valid)
        out, lse, _ = reference.forward(q, k, v, modes, *lists, keys, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.keys = tables, keys
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        modes, plan, scale, fp8 = ctx.tables
        lists = [getattr(plan, name) for name in PLAN]
        given = (dout, q, k, v, out, lse, None)
        rest = (modes, *lists, ctx.keys, scale)
        return *reference.backward(*given, *rest, fp8_backward=fp8), None, None


def query_key_value(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The first three arguments of `scaled_dot_product_attention`, however they are given."""
    names = ("query", "key", "value")
    return tuple(args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names))


class ReferenceAttention(TorchFunctionMode):
    """Every self-attention over the grid is computed by the reference, as the policy says.

    Args:
        timestep: as the model is given it.
        layers: of the model; attentions are taken as layers in the order in which they run.
        text: tokens before and after the video.
        convention: of the timestep.
        every: takes only each so many of the attentions of that many queries and keys.
        fp8_backward: products of backward are FP8 where those of forward are.
    """

    def __init__(
        self,
        policy: Policy,
        timestep: Tensor,
        layers: int,
        grid: Sequence[int],
        heads: int = HEADS,
        text: tuple[int, int] = (0, 0),
        convention: str = "flow",
        every: int = 1,
        fp8_backward: bool = False,
    ) -> None:
        super().__init__()
        self.table = resolve(policy, layers=layers, heads=heads, fp8=True)
        self.plan = plan(policy, layout(grid, policy.tile_for(grid), *text))
        self.rows = noise_rows(timestep, self.table.edges, convention)
        self.tokens = grid[0] * grid[1] * grid[2] + sum(text)
        self.layer = self.seen = 0
        self.every = every
        self.fp8_backward = fp8_backward

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = query_key_value(args, kwargs)
        if not q.shape[2] == k.shape[2] == self.tokens:
            return func(*args, **kwargs)
        self.seen += 1
        if (self.seen - 1) % self.every:
            return func(*args, **kwargs)
        table, lists = self.table, self.plan
        modes = resolve_modes(q.shape[0], self.rows, table.cells, table.modes, self.layer)
        self.layer += 1
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        keys = None if mask is None else mask[:, 0, 0].expand(q.shape[0], -1)
        if torch.is_autocast_enabled("cpu"):  # which casts the arguments of attention, and no more
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            given = (modes, lists, q.shape[-1] ** -0.5, self.fp8_backward)
            return _Reference.apply(q, k, v, keys, given)


def reference_forward(
    model: WanTransformer3DModel,
    inputs: dict[str, Any],
    policy: Policy,
    *,
    fp8_backward: bool = False,
) -> Tensor:
    """Output of the uncompiled model with the reference in place of its video self-attention."""
    patch = model.config.patch_size
    size = inputs["hidden_states"].shape[2:]
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    mode = ReferenceAttention(
        policy,
        inputs["timestep"],
        model.config.num_layers,
        grid,
        model.config.num_attention_heads,
        fp8_backward=fp8_backward,
    )
    with mode:
        return model(**inputs)[0]
