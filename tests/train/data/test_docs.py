"""The code in docs/trainers.md and docs/training-data.md, run as it stands there.

What a reader would have and a test has not is put in its place: a small model for a published one,
clips of its shape, and loops of two steps instead of thousands. Graphs run without Inductor.
"""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from ruamel.yaml import YAML
from safetensors.torch import load_file

import fpsc
from fpsc.train.data import Data
from fpsc.train.data.write import Encoded, writing
from tests.wan import TEXT, reference_forward, small_wan

STEPS = 2
LATENTS = (4, 3, 16, 20)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fpsc.reports(clear=True)
    return tmp_path


def blocks(checkout: Path, page: str, language: str) -> list[str]:
    text = (checkout / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def run(code: str, **names: Any) -> dict[str, Any]:
    """The code's names after it ran, with few rounds of its long loop."""

    def few(*given: int) -> range:
        return builtins.range(STEPS) if given[0] >= 100 else builtins.range(*given)

    names |= {"range": few, "__name__": "docs"}
    exec(compile(code, "docs", "exec"), names)
    return names


@pytest.fixture
def code(checkout: Path, folder: Path) -> list[str]:
    """The blocks of docs/trainers.md; its policy is in the working directory."""
    (policy,) = blocks(checkout, "trainers.md", "yaml")
    (folder / "policy.yaml").write_text(policy)
    found = blocks(checkout, "trainers.md", "python")
    assert len(found) == 3
    return found


def test_a_pytorch_loop_and_a_ramp(
    code: list[str], no_inductor: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fpsc.demo import model as demo

    loaded: list[Any] = []

    def two_blocks() -> Any:
        model = load()
        del model.blocks[2:]  # the first ones are as good, and four more cost time
        loaded.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    load = demo.load_model
    monkeypatch.setattr(demo, "load_model", two_blocks)
    names = run(code[0])
    model, report = names["model"], fpsc.reports()[0]
    assert report.replaced == 2 and "near-quarter" in report.policy
    assert str(report) in capsys.readouterr().out
    assert torch.isfinite(names["loss"])
    changed = {
        name for name, value in model.named_parameters() if not torch.equal(value, loaded[0][name])
    }
    assert {
        f"blocks.{i}.attn1.{part}.weight" for i in (0, 1) for part in ("to_q", "to_k")
    } <= changed
    # The ramp, with the model that the loop left.
    seen: list[float] = []
    original = fpsc.set_policy
    monkeypatch.setattr(
        fpsc,
        "set_policy",
        lambda model, policy: (
            seen.append(policy.spec.modes["near"].keep),
            original(model, policy),
        ),
    )
    inputs, level = names["inputs"].detach(), torch.tensor([300.0])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(inputs, level, **names["batch"].conditioning)[0]
        return out

    before = forward()
    names = run(code[1], **names)
    assert seen == [0.625]
    half = forward()
    assert not torch.equal(before, half)
    policy = fpsc.Policy.load("policy.yaml")
    names["ramp"](500)
    torch.testing.assert_close(forward(), before)
    assert names["policy"].spec == policy.spec


@pytest.fixture
def published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model for the one on the hub, and clips for it."""

    def small(name: str, *, subfolder: str) -> Any:
        assert (name, subfolder) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer")
        return small_wan()

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", small)
    with writing(folder / "latents", {"vae": "v"}, {}, size=4) as writer:
        for n in range(4):
            text = {"conditioning.encoder_hidden_states": torch.randn(TEXT, 32)}
            tensors = {"latents": torch.randn(LATENTS), **text}
            writer.add(Encoded(str(n), "", False, tensors))


def test_accelerate_lora_and_checkpointing(
    code: list[str], published: None, folder: Path, no_inductor: None
) -> None:
    names = run(code[2])
    # One graph for the block whose input needs no gradient, one for all others.
    assert [(report.replaced, report.layers) for report in fpsc.reports()] == [(1, 2), (1, 2)]
    assert names["accelerator"].sync_gradients and torch.isfinite(names["loss"])
    model = names["accelerator"].unwrap_model(names["model"])
    assert model.is_gradient_checkpointing
    # Only the adapter was trained: one optimiser step of two batches.
    frozen = dict(small_wan().state_dict())
    state = {k.replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    weights = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    second = [value for name, value in weights.items() if "lora_B" in name]
    assert len(second) == 2 * 2 * 4 and all(value.any() for value in second)
    # The files load in diffusers, and the policy is found beside them.
    plain = small_wan()
    plain.load_lora_adapter(WanPipeline.lora_state_dict("lora", local_files_only=True))
    loaded = [v for n, v in plain.named_parameters() if "lora_B" in n]
    assert sorted(v.sum().item() for v in loaded) == pytest.approx(
        sorted(v.sum().item() for v in second)
    )
    assert fpsc.Policy.load(folder / "lora" / "fpsc-policy.yaml").spec.name == "near-quarter"


def test_the_gradients_of_that_loop_are_those_of_the_reference(
    code: list[str], published: None, no_inductor: None
) -> None:
    """LoRA, checkpoints, autocast and the compiler around it change nothing beyond rounding: the
    loss of a step is that of the reference attention."""
    once = code[2].replace("for step in range(2000):", "for step in range(1):")
    torch.manual_seed(0)
    names = run(once)
    inputs = {
        "hidden_states": names["noisy"],
        "timestep": 1000 * names["level"],
        **names["batch"].conditioning,
    }
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = reference_forward(
            small_wan(), {**inputs, "return_dict": False}, fpsc.Policy.load("policy.yaml")
        )
    found = names["velocity"].detach()
    error = (found - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, error


def test_the_data_page(checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (section,) = blocks(checkout, "training-data.md", "yaml")
    data = Data.model_validate(YAML(typ="safe").load(section)["data"])
    assert data.train == data.validation == "latents/"
    seeded, own = blocks(checkout, "training-data.md", "python")
    names = run(seeded)
    assert names["batch"].keys == names["clips"].batch(1000, 0, 2, 4).keys
    made = run(own)["batch"]
    assert made.latents.shape == (2, 16, 5, 60, 104)
    assert made.keys[0] != made.keys[1]
