"""LPIPS between two clips, where its weights are on this machine. Nothing is ever downloaded.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", CVPR 2018, as torchmetrics computes it: the linear weights come with that
package, the network's with torchvision, from torch's folder of checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import torch

SMALLEST = 64
"""Pixels of the smaller side of a frame: of fewer AlexNet leaves nothing."""


class Network(StrEnum):
    """Whose features are compared; `alex` is the one that papers report."""

    alex = "alex"
    vgg = "vgg"
    squeeze = "squeeze"


FILES = {
    Network.alex: "alexnet-owt-7be5be79.pth",
    Network.vgg: "vgg16-397923af.pth",
    Network.squeeze: "squeezenet1_1-b8a52dc0.pth",
}
"""What torchvision calls the weights of each network."""

ORIGIN = "https://download.pytorch.org/models/"


class LpipsMissing(Exception):
    """LPIPS cannot be computed here. The message says what is missing and how to get it."""


def weights_of(network: Network) -> Path:
    """Where torchvision looks for the network's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILES[network]


def lpips_by_frame(
    a: torch.Tensor,
    b: torch.Tensor,
    network: Network = Network.alex,
    on_frame: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """LPIPS of each frame of two clips, float [3, F, H, W] in [-1, 1]; 0 for equal frames.

    Raises:
        LpipsMissing: a package or the weights are not there.
        ValueError: the clips differ in shape, or their frames are too small.
    """
    if a.shape != b.shape or min(a.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"expected two clips of one shape, frames of {SMALLEST}x{SMALLEST} or more; found "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    try:
        import torchvision.models  # noqa: F401
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch: RuntimeError
        raise LpipsMissing(
            f"LPIPS needs torchmetrics and torchvision ({error}): pip install "
            '"fpsc[quality]", with a torchvision that is made for torch '
            f"{torch.__version__}"
        ) from error
    path = weights_of(network)
    if not path.is_file():
        raise LpipsMissing(
            f"LPIPS needs the weights of {network}, and {path} is not there; to get them: "
            f"curl -L --create-dirs -o {path} {ORIGIN}{path.name}"
        )
    with _tensors_only():
        metric = LearnedPerceptualImagePatchSimilarity(net_type=network.value)
    values = []
    with torch.no_grad():
        for f in range(a.shape[1]):
            values.append(float(metric(a[:, f][None].float(), b[:, f][None].float())))
            on_frame(f + 1)
    return values


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch.load refuse everything but tensors: torchvision does not ask it to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
