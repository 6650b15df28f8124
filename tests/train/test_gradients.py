"""What rounding and sparsity do to gradients: their direction, their size, and where P is from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import fpsc
from fpsc.grid import layout
from fpsc.kernels.reference import cells, operands, tile_rows
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve
from fpsc.train.loop import Trainer
from tests.train.common import configured

FP8_COSINE = 0.995
"""Least cosine between gradients of the small model at keep 1 in fp8 and dense, over parameters."""

FP8_BIAS = 0.02
"""Largest relative difference between their norms along the dense gradient, over steps' mean."""

GRID = (3, 8, 10)


def gradients(folder: Path, modes: dict[str, object], steps: int) -> list[Tensor]:
    """Of some steps, each as one vector, with every mode of the policy replaced."""
    trainer = Trainer(configured(folder))
    policy = Policy.load(folder / "policy.yaml")
    dressed = policy.with_values({f"modes.{name}": modes for name in policy.modes})
    trainer.ramp._policy = dressed
    trainer.subject.set_policy(trainer.ramp._with({}))
    found = []
    for step in range(steps):
        noisy = trainer._noisy(trainer._order.batch(step, 0, 1, 2), step, 0)
        trainer.subject.model.zero_grad()
        trainer._losses(noisy)["loss"].backward()
        parts = [
            p.grad.flatten() for p in trainer.subject.parameters.values() if p.grad is not None
        ]
        found.append(torch.cat(parts))
    return found


def test_gradients_in_fp8_point_where_dense_ones_do(folder: Path, no_inductor: None) -> None:
    dense = gradients(folder, {"keep": 1.0, "dtype": "bf16"}, 4)
    fp8 = gradients(folder, {"keep": 1.0, "dtype": "fp8"}, 4)
    sparse = gradients(folder, {"pattern": "near", "keep": 0.5, "dtype": "bf16"}, 4)
    both = gradients(folder, {"pattern": "near", "keep": 0.5, "dtype": "fp8"}, 4)
    cosine = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(fp8, dense, strict=True)]
    assert min(cosine) > FP8_COSINE
    # The part along the dense gradient is neither longer nor shorter: straight-through is unbiased.
    along = [(torch.dot(a, b) / torch.dot(b, b)).item() for a, b in zip(fp8, dense, strict=True)]
    assert abs(sum(along) / len(along) - 1) < FP8_BIAS
    # Rounding on top of sparsity is as small as rounding alone.
    cosine = [
        torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(both, sparse, strict=True)
    ]
    assert min(cosine) > FP8_COSINE


def test_p_of_backward_is_that_of_the_rounded_operands() -> None:
    """dV = P^T dO: with dO one in one channel, the rows of P add up to one under the forward's lse,
    and P is the softmax of the scores of the rounded Q and K, not of the exact ones."""
    torch.manual_seed(0)
    tokens, dim = 240, 32
    q, k, v = (torch.randn(1, 1, tokens, dim) * 2 for _ in range(3))
    v.requires_grad_(True)
    out = fpsc.attention(q, k, v, grid=GRID, keep=1.0, dtype="fp8", tile=(1, 4, 5))
    index = 17
    dout = torch.zeros_like(out)
    dout[0, 0, index, 0] = 1.0
    (dv,) = torch.autograd.grad(out, v, dout)
    p = dv[0, 0, :, 0]
    assert abs(p.sum().item() - 1) < 1e-5

    policy = Policy.from_dict(
        {
            "fpsc": 1,
            "tile": [1, 4, 5],
            "modes": {"all": {"keep": 1.0, "dtype": "fp8"}},
            "schedule": [{"noise": "1.0..0.0", "use": "all"}],
        }
    )
    table, lists = (
        resolve(policy, layers=1, heads=1, fp8=True),
        plan(policy, layout(GRID, (1, 4, 5))),
    )
    modes = table.modes[table.cells[0, 0].long()][None]
    (cell,) = cells(q, k, modes, lists.groups, None)
    scale = dim**-0.5
    head = operands(
        q[0, 0], k[0, 0], v[0, 0].detach(), tile_rows(lists.gather, lists.valid), cell, scale
    )
    rounded = torch.softmax(scale * head.q_ND[index] @ head.k_ND.T, dim=0)
    exact = torch.softmax(scale * q[0, 0, index] @ k[0, 0].T, dim=0)
    assert (p - rounded).abs().max() < 1e-5 * rounded.max()
    assert (p - exact).abs().max() > 1e-3 * exact.max()
