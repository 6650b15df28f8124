"""LPIPS says what it lacks, downloads nothing, and reads tensors only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fpsc.quality.lpips import FILES, LpipsMissing, Network, lpips_by_frame, weights_of

CLIP = torch.rand(3, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's folder of checkpoints, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("network", Network)
def test_weights_are_looked_for_where_torchvision_keeps_them(home: Path, network: Network) -> None:
    assert weights_of(network) == home / FILES[network]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(LpipsMissing, match=r'pip install "fpsc\[quality\]"'):
        lpips_by_frame(CLIP, CLIP)


def test_frames_that_no_network_takes() -> None:
    with pytest.raises(ValueError, match="64x64 or more"):
        lpips_by_frame(CLIP[..., :32], CLIP[..., :32])
    with pytest.raises(ValueError, match="one shape"):
        lpips_by_frame(CLIP, CLIP[:, :1])


@pytest.fixture
def torchvision() -> None:
    """A torchvision that is made for another torch raises as it is imported."""
    try:
        import torchmetrics  # noqa: F401
        import torchvision.models  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision or torchmetrics here: {error}")


@pytest.mark.usefixtures("torchvision")
def test_missing_weights_are_named_with_a_command_to_get_them(home: Path) -> None:
    with pytest.raises(LpipsMissing, match="curl -L --create-dirs -o") as caught:
        lpips_by_frame(CLIP, CLIP)
    assert str(home / FILES[Network.alex]) in str(caught.value)
    assert not home.exists()  # nothing was fetched


@pytest.mark.usefixtures("torchvision")
def test_distance_with_weights_that_are_there(home: Path) -> None:
    from torchvision.models import squeezenet1_1

    home.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), home / FILES[Network.squeeze])
    other = CLIP.clone()
    other[:, 1] *= 0.5
    done: list[int] = []
    same, apart = lpips_by_frame(CLIP, other, Network.squeeze, done.append)
    assert same == pytest.approx(0, abs=1e-6) and apart > 1e-4
    assert done == [1, 2]
    assert lpips_by_frame(other, CLIP, Network.squeeze)[1] == pytest.approx(apart, rel=1e-4)


@pytest.mark.usefixtures("torchvision")
def test_a_checkpoint_with_code_is_refused(home: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    home.mkdir(parents=True)
    torch.save({"features": Code()}, home / FILES[Network.squeeze])
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        lpips_by_frame(CLIP, CLIP, Network.squeeze)
    assert not (tmp_path / "ran").exists()
