"""Calibration of a tiny model: what is in the file, and that interruptions leave no trace in it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpsc.errors import UserError
from fpsc.tune import calibrate, subjects
from fpsc.tune.calibrate import FILE, Settings
from fpsc.tune.instrument import Instrument
from fpsc.tune.parts import Parts
from fpsc.tune.record import Calibration
from fpsc.tune.subjects import Subject
from tests.tune.common import CANDIDATES, GRID, TILE, Stop, samples, settings, stopping, subject


def test_what_it_holds(calibration: Calibration) -> None:
    run = calibration.run
    assert (run.layers, run.heads, run.head_dim) == (2, 2, 64)
    assert (run.grid, run.tile) == (GRID, TILE)
    assert run.bins == 2 and len(run.steps) == 4 and run.steps[0] == 1
    assert calibration.damage.shape == (2, 2, 2, 2, len(CANDIDATES))
    names = calibration.names
    damage = calibration.damage.mean(axis=(0, 1, 2, 3))
    assert not calibration.damage[..., names.index("dense")].any()
    # Fewer tiles and FP8 cost more, in the mean.
    assert damage[names.index("near-0_25")] > damage[names.index("near-0_5")] > 0
    assert damage[names.index("dense-fp8")] > 0
    assert np.isfinite(calibration.gains).all() and (calibration.gains > 0).all()
    assert calibration.carried.shape == (1, 2, 2) and (calibration.carried > 0).all()
    assert np.allclose(calibration.maps.sum(-1), 1, atol=1e-4)


def test_damage_predicts_what_one_mode_in_one_head_does(calibration: Calibration) -> None:
    """Against the true change of the prediction, with all else dense."""
    model = subject()
    found, expected = [], []
    with Instrument(model.model, calibration.policy) as instrument:
        with instrument.recorded() as calls:
            dense = model.sample(0)
        for layer, head in np.ndindex(2, 2):
            for name in ("near-0_25", "frame-0_25", "near-0_5-fp8"):
                rule = {"layers": layer, "heads": head, "use": name}
                value = {**calibration.policy.document.value, "except": [rule]}
                instrument.use(type(calibration.policy).from_dict(value))
                changed = model.sample(0)
                mode = calibration.names.index(name)
                for b, level in enumerate(calibration.run.levels):
                    step = min(range(len(calls)), key=lambda i: abs(calls[i].noise - level))
                    expected.append(calibrate.relative_square(changed[step], dense[step]))
                    found.append(float(calibration.damage[0, b, layer, head, mode]))
    ratios = np.array(found) / np.array(expected)
    assert 0.5 < np.exp(np.log(ratios).mean()) < 2
    ranks = [np.argsort(np.argsort(x)) for x in (found, expected)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7  # one direction, and few tokens


def test_interrupted_and_resumed_it_is_the_same_file(
    calibration: Calibration, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        calibrate.calibrate(subject(), settings(), tmp_path, tell=stopping(4))
    assert not (tmp_path / FILE).exists()
    assert len(list((tmp_path / "calibration.parts").iterdir())) > 2

    calibrate.calibrate(subject(), settings(), tmp_path)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_two_processes_make_the_file_of_one(
    calibration: Calibration, folder: Path, tmp_path: Path
) -> None:
    model, wanted = subject(), settings()
    for rank in (1, 0):
        parts = Parts(tmp_path / "parts", {})
        calibrate._Work(model, wanted, parts, lambda *_: None).measure(range(rank, 2, 2))
    calibrate.merge(model, wanted, parts).save(tmp_path / FILE)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_what_is_done_is_not_measured_again(
    calibration: Calibration, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate._Work, "measure", None)
    again = calibrate.calibrate(subject(), settings(), folder)
    assert (again.damage == calibration.damage).all()
    with pytest.raises(UserError, match=r"other settings \(seed\).*--fresh"):
        calibrate.calibrate(subject(), settings(seed=1), folder)


def test_short_memory_is_met_with_checkpoints_then_with_fewer_queries(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Instrument.measure
    tried: list[tuple[bool, float]] = []

    def short(self: Instrument, call: Any, measurement: Any, generator: Any) -> float:
        checkpoints = bool(self.model.is_gradient_checkpointing)
        tried.append((checkpoints, measurement.queries))
        found = measured(self, call, measurement, generator)
        if not checkpoints or measurement.queries > 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    regions = 0

    def counted(body: Any, *args: Any, **how: Any) -> Any:
        nonlocal regions
        regions += 1
        return checkpoint(body, *args, **how)

    monkeypatch.setattr(Instrument, "measure", short)
    monkeypatch.setattr("fpsc.tune.instrument.checkpoint", counted)
    told: list[str] = []
    model = subject(2)
    found = calibrate.calibrate(
        model, settings(), tmp_path, tell=lambda what, done=0, total=0: told.append(what)
    )
    assert tried[:3] == [(False, 1.0), (True, 1.0), (True, 0.5)]
    assert any("checkpointing" in line for line in told)
    assert any("50% of the query tiles" in line for line in told)
    assert found.facts.queries == 0.5
    assert regions == 2 * (1 + 4)  # blocks of the call that failed, and of the four that did not
    assert not model.model.is_gradient_checkpointing
    # Half of the queries, and backward through checkpoints, say about the same.
    sparse = [m for m, name in enumerate(found.names) if not name.startswith("dense")]
    ratio = found.damage[..., sparse] / calibration.damage[..., sparse]
    assert 0.7 < np.exp(np.log(ratio).mean()) < 1.4


def test_no_memory_at_all_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Instrument, "measure", short)
    with pytest.raises(UserError, match="smaller grid"):
        calibrate.calibrate(subject(2), settings(), tmp_path)


def test_the_model_is_left_as_it_was(calibration: Calibration) -> None:
    model = subject().model.requires_grad_(True)
    with Instrument(model, calibration.policy):
        assert model._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    assert all(p.requires_grad for p in model.parameters())


class Flat(nn.Module):
    """Takes a latent and a timestep, and has no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(4, 4, 1)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.mix(hidden_states) * timestep.view(-1, 1, 1, 1, 1)


def test_a_model_without_3d_attention(tmp_path: Path) -> None:
    given = [{"latents": sample["latents"]} for sample in samples(2)]
    flat = subjects.latents(Flat(), given, levels=2)
    options = {"timestep": {"convention": "flow"}}
    model = Subject(flat.name, flat.model, 2, flat.sample, options=options)
    with pytest.raises(UserError, match="no 3D attention"):
        calibrate.calibrate(model, settings(), tmp_path)
    with pytest.raises(UserError, match="how its timestep tells the noise is not known"):
        calibrate.calibrate(flat, settings(), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": 1}, "2 or more"),
        ({"prompts": 9}, "9 prompts to measure on, and there are 4"),
        ({"edges": (1.0, 0.5)}, "from 1 down to 0"),
        ({"edges": (1.0, 0.5, 0.7, 0.0)}, "from 1 down to 0"),
        ({"bins": 99}, "1 to 16"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        calibrate.calibrate(subject(), settings(**changes), tmp_path)


def test_bins_hold_equally_many_steps() -> None:
    steps = [0.999, 0.99, 0.97, 0.9, 0.8, 0.6, 0.4, 0.2]
    edges = calibrate.bins(steps, 4)
    assert edges[0] == 1 and edges[-1] == 0 and len(edges) == 5
    counts = [sum(hi > s >= lo or s == hi for s in steps) for hi, lo in pairwise(edges)]
    assert counts == [2, 2, 2, 2]
    assert calibrate.bins([0.5], 5) == (1.0, 0.0)


def test_samples_are_read_from_a_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="found none"):
        subjects.read_samples(tmp_path)
    for i, sample in enumerate(samples(2)):
        save_file(sample, tmp_path / f"{i}.safetensors")
    found = subjects.read_samples(tmp_path)
    assert len(found) == 2 and torch.equal(found[1]["latents"], samples(2)[1]["latents"])
    save_file({"x": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(UserError, match="`latents` of 5 dimensions"):
        subjects.read_samples(tmp_path)


def test_default_settings_fit_the_demo() -> None:
    from fpsc.tune import modes

    Settings(modes.default()).check(10_000)


def test_a_run_that_begins_alike_is_not_computed_twice(calibration: Calibration) -> None:
    """What was answered is given again, down to the first bin that differs."""
    model = subject()
    with Instrument(model.model, calibration.policy) as instrument:
        with instrument.recorded() as calls:
            dense = model.sample(0)
        schedule = [
            {"noise": "1..0.8", "use": "dense"},
            {"noise": "0.8..0", "use": "near-0_25"},
        ]
        clean = calibration.policy.document.value | {"schedule": schedule}
        instrument.use(type(calibration.policy).from_dict(clean))
        whole = model.sample(0)
        with instrument.following(calls, 0.8), instrument.recorded() as computed:
            found = model.sample(0)
    assert torch.equal(found, whole) and not torch.equal(found, dense)
    assert [call.noise for call in computed] == [n for n in calibration.run.steps if n <= 0.8]
