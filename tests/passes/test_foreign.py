"""Models that are not diffusers': what is replaced, what is left, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsc
from fpsc.passes import manager
from fpsc.passes.rewrite import Target
from fpsc.policy import Policy
from tests.passes import foreign
from tests.passes.test_spellings import capture
from tests.thresholds import COMPILED_DENSE, COMPILED_FP8, relative_rms
from tests.wan import PHASES, ReferenceAttention


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("name", foreign.REPLACED)
def test_replaced(name):
    gm, _ = capture(seeded(foreign.REPLACED[name]), *foreign.arguments())
    (target,) = manager.analyse(gm).decisions
    assert isinstance(target, Target), target
    assert target.found.grid == foreign.GRID
    text = foreign.TEXT
    spans = {
        "text before": (text, 0),
        "text after": (0, text),
        "text after, written out": (0, text),
    }
    assert (target.found.prefix, target.found.suffix) == spans.get(name, (0, 0))


@pytest.mark.parametrize("name", foreign.LEFT)
def test_left_dense(name):
    make, reason = foreign.LEFT[name]
    gm, _ = capture(seeded(make), *foreign.arguments())
    for decision in manager.analyse(gm).decisions:
        assert reason in decision


def compiled(model: nn.Module, policy: str) -> Any:
    options = {"policy": policy, "mode": "lite", "timestep": {"convention": "flow"}}
    return torch.compile(model, backend="fpsattn", fullgraph=True, options=options)


@pytest.mark.parametrize("name", foreign.REPLACED)
def test_dense_policy_equals_eager(name):
    torch._dynamo.reset()
    model, given = seeded(foreign.REPLACED[name]), foreign.arguments(batch=2)
    with torch.no_grad():
        expected = model(*given)
        found = compiled(model, "dense")(*given)
    assert relative_rms(found, expected) <= COMPILED_DENSE
    assert fpsc.reports()[-1].replaced == 1


@pytest.mark.parametrize("name", ["softmax written out", "rearranged", "multihead"])
def test_sparse_policy_equals_the_reference(name, tmp_path: Path):
    """The reference takes the place of SDPA in the same model with another spelling."""
    grid = (3, 8, 10)
    policy = Policy.from_dict({**PHASES, "except": []})
    policy.save(tmp_path / "phases.yaml")
    torch._dynamo.reset()
    model, given = seeded(foreign.REPLACED[name]), foreign.arguments(grid=grid)
    with torch.no_grad():
        found = compiled(model, str(tmp_path / "phases.yaml"))(*given)
        layer = model.layers[0]
        if name == "multihead":
            layer.forward = lambda x: x + projected(layer.inner, x)
        else:
            layer.call = foreign.sdpa
        with ReferenceAttention(policy, given[1], 1, grid, foreign.HEADS):
            expected = model(*given)
    assert relative_rms(found, expected) <= COMPILED_FP8


def projected(inner: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """nn.MultiheadAttention with an SDPA call that a mode sees."""
    q, k, v = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).chunk(3, -1)
    return inner.out_proj(foreign.join(foreign.sdpa(*map(foreign.split, (q, k, v)))))


# ---- false positives


class Image(nn.Module):
    """An image DiT: a latent of four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(4, 64, 2, 2), foreign.Layer()

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        z = self.stem(latent)
        y, x = z.shape[2:]
        z = self.layer(z.flatten(2).transpose(1, 2) + timestep.view(-1, 1, 1))
        return z.transpose(1, 2).unflatten(2, (y, x))


class Encoder(nn.Module):
    """A text encoder with key padding, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 64), foreign.Layer()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask[:, None, None].float()) * -10000.0
        self.layer.call = lambda q, k, v: (q @ k.mT * 0.2 + bias).softmax(-1) @ v
        return self.layer(self.table(tokens))


class Pixels(nn.Module):
    """The middle of an image VAE: one head over all pixels, by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (f(x).reshape(b, c, h * w) for f in (self.q, self.k, self.v))
        weights = (torch.bmm(q.permute(0, 2, 1), k) * c**-0.5).softmax(dim=2)
        return x + torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w)


class Frames(nn.Module):
    """The same in a video VAE: attention inside every frame of a latent of five axes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Pixels()

    def forward(self, latent: Tensor) -> Tensor:
        b, c, t, h, w = latent.shape
        frames = self.inner(latent.transpose(1, 2).reshape(b * t, c, h, w))
        return frames.view(b, t, c, h, w).transpose(1, 2)


class Audio(nn.Module):
    """A branch of audio tokens beside a latent of which it takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = foreign.Layer()

    def forward(self, latent: Tensor, audio: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return latent * 2, self.layer(audio + timestep.view(-1, 1, 1))


class UNet(nn.Module):
    """Convolutions and attention in 2D, with a cross-attention to text."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 64, 3, 2, 1), nn.ConvTranspose2d(64, 4, 2, 2)
        self.one, self.q, self.kv = foreign.Layer(), nn.Linear(64, 64), nn.Linear(64, 128)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        z = self.down(sample) + timestep.view(-1, 1, 1, 1)
        y, x = z.shape[2:]
        z = self.one(z.flatten(2).transpose(1, 2))
        k, v = map(foreign.split, self.kv(text).chunk(2, -1))
        z = z + foreign.join(foreign.written(foreign.split(self.q(z)), k, v))
        return self.up(z.transpose(1, 2).unflatten(2, (y, x)))


OTHERS = {
    "image": (Image, lambda: (torch.randn(1, 4, 12, 10), torch.rand(1))),
    "encoder": (Encoder, lambda: (torch.arange(8)[None], torch.arange(8)[None] < 6)),
    "pixels": (Pixels, lambda: (torch.randn(1, 8, 6, 5),)),
    "frames": (Frames, lambda: (torch.randn(1, 8, 3, 6, 5),)),
    "audio": (
        Audio,
        lambda: (torch.randn(1, 4, 3, 4, 5), torch.randn(1, 60, 64), torch.rand(1)),
    ),
    "unet": (UNet, lambda: (torch.randn(1, 4, 12, 10), torch.rand(1), torch.randn(1, 7, 64))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_compile_unchanged(name):
    torch._dynamo.reset()
    make, given = OTHERS[name]
    model, args = seeded(make), given()
    fpsc.reports(clear=True)
    with torch.no_grad():
        expected = model(*args)
        with pytest.warns(fpsc.NothingReplacedWarning):
            found = compiled(model, "generic")(*args)
    for f, e in zip(_flat(found), _flat(expected), strict=True):
        assert relative_rms(f, e) <= COMPILED_DENSE
    (report,) = fpsc.reports()
    assert report.replaced == 0 and report.sites
    assert all(site.reason for site in report.sites)


def _flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
