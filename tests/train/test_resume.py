"""Runs that are stopped, killed, or short of disk; and runs of two processes."""

from __future__ import annotations

import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fpsc.errors import UserError
from fpsc.train.loop import train
from tests.train.common import configured, finished, losses, started

LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": ["to_q", "to_v"]}}

PROCESSES = 2e-5
"""Largest relative difference between losses of two processes and of one: the order of sums."""


def same_weights(a: Path, b: Path) -> bool:
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(folder / "weights" / name) for folder in (a, b))
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_a_run_that_stops_goes_on_as_if_it_had_not(folder: Path, no_inductor: None) -> None:
    """At a checkpoint, and after one: what came after it is computed again."""
    whole = configured(folder, output="whole")
    parts = configured(folder, output="parts")
    assert train(whole) is not None
    for stop in (1, 2, 3, None):
        train(parts, stop_at=stop)
    assert losses(folder / "parts") == losses(folder / "whole")
    assert same_weights(folder / "parts", folder / "whole")


def test_a_run_that_is_killed_anywhere_ends_the_same(
    folder: Path, checkout: Path, no_inductor: None, one_thread: None
) -> None:
    """kill -9 at random moments, in a step or a save; bitwise."""
    changes = {"checkpoints.every": 1, "optimiser.steps": 6, "validation.every": 3}
    whole = configured(folder, changes, output="whole")
    assert train(whole) is not None
    config = configured(folder, changes, output="killed")
    path = folder / "killed-run.yaml"
    path.write_text(config.document.text)
    moments = random.Random(0)
    steps = 0
    for _ in range(2):
        process = started(path, checkout=checkout)
        log = folder / "killed" / "log.jsonl"
        seen = steps
        while process.poll() is None and seen <= steps:  # a step later than the last time
            time.sleep(0.01)
            text = log.read_text() if log.is_file() else ""
            seen = text.count('"loss"')
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = min(seen, 4)
    finished(started(path, checkout=checkout))
    assert losses(folder / "killed") == losses(folder / "whole")
    assert same_weights(folder / "killed", folder / "whole")
    assert not list((folder / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.safetensors", "state.json"])
def test_killed_in_a_save_the_checkpoint_before_is_whole(
    file: str, folder: Path, no_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process ended at each file: nothing of the new checkpoint counts."""
    from fpsc.train import checkpoint

    config = configured(folder)
    train(config, stop_at=2)
    original = {n: getattr(checkpoint, n) for n in ("write_tensors", "write_text")}

    class Killed(BaseException):
        pass

    def dies(name: str) -> Any:
        def write(*args: Any) -> None:
            target = next(a for a in args if isinstance(a, Path))
            if target.name == file:
                target.write_bytes(b"half")
                raise Killed
            original[name](*args)

        return write

    with monkeypatch.context() as patch:
        for name in original:
            patch.setattr(checkpoint, name, dies(name))
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # nor tidied up
        with pytest.raises(Killed):
            train(config)
    folder_ = folder / "run" / "checkpoints"
    assert [p.name for p in folder_.glob("step-*")] == ["step-000002"]
    assert list(folder_.glob(".step-*.tmp"))
    assert train(config) is not None
    assert [p.name for p in sorted(folder_.iterdir())] == ["step-000002", "step-000004"]


def test_a_full_disk_keeps_what_is_there(folder: Path, no_inductor: None) -> None:
    """Files may not grow beyond a size that the optimiser's state exceeds."""
    config = configured(folder)
    train(config, stop_at=2)
    weights = folder / "run" / "checkpoints" / "step-000002" / "weights.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights.stat().st_size * 1.5), before[1]))
    try:
        with pytest.raises(UserError) as error:
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "optimiser.safetensors" in str(error.value) and "File too large" in str(error.value)
    assert "step-000002 is whole, and the run goes on from it" in str(error.value)
    assert [p.name for p in (folder / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert train(config) is not None


def test_a_checkpoint_that_was_cut_off_is_named(folder: Path, no_inductor: None) -> None:
    config = configured(folder)
    train(config, stop_at=2)
    file = folder / "run" / "checkpoints" / "step-000002" / "average.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step-000002 cannot be read: .*Remove that folder"):
        train(config)


def test_another_configuration_does_not_go_on(folder: Path, no_inductor: None) -> None:
    train(configured(folder), stop_at=2)
    other = configured(folder, {"optimiser.lr": 0.5, "ema": 0.9})
    with pytest.raises(UserError) as error:
        train(other)
    assert "ema: expected 0.99 as it began, found 0.9" in str(error.value)
    assert "optimiser.lr: expected 0.001 as it began, found 0.5" in str(error.value)
    assert "Choose another output" in str(error.value)


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_two_processes_train_as_one(
    method: dict[str, Any], folder: Path, checkout: Path, no_inductor: None, one_thread: None
) -> None:
    """FSDP2 over gloo, full and LoRA; then one process goes on from the checkpoint of two."""
    alone = configured(folder, output="alone", **method)
    assert train(alone) is not None
    config = configured(folder, output="together", **method)
    path = folder / "two.yaml"
    path.write_text(config.document.text)
    finished(started(path, "2", processes=2, checkout=checkout))
    assert losses(folder / "together")[-1]["step"] == 2
    assert train(config) is not None
    ours, theirs = losses(folder / "together"), losses(folder / "alone")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=PROCESSES)
            assert a["gradient"] == pytest.approx(b["gradient"], rel=PROCESSES)
        else:
            for kind in ("dense", "sparse"):
                expected = b["validation"][kind]
                assert a["validation"][kind] == pytest.approx(expected, rel=PROCESSES)
