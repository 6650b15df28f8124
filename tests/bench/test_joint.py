"""The experiment of joint fine-tuning: variants, a run of one, and what follows from records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import joint
from bench.tuning import carry_out as carrying
from bench.tuning import survey, trainer
from bench.tuning.record import Distance, Losses, Record, RecordError, Samples, Training
from bench.tuning.tables import (
    Experiment,
    keep_of,
    marks_table,
    short_table,
    targets,
    variants_table,
)
from bench.tuning.v_scale import v_scale
from bench.tuning.variants import (
    CONSTANT,
    CONTROL,
    DENSE,
    NOTHING,
    PAPER,
    SAFE,
    SEEDS,
    VARIANTS,
    Run,
    Scale,
    runs,
)
from fpsc.bench.environment import environment
from fpsc.demo.model import build_model, load_model, save_model
from fpsc.evaluate.network import QUESTIONS
from fpsc.functional import attention
from fpsc.kernels import reference
from fpsc.policy import Policy, find, resolve
from fpsc.train import config
from tests.thresholds import KERNEL_FP8, relative_rms

# ---- the variants


def test_every_policy_is_valid_and_has_both_orders() -> None:
    for variant in VARIANTS.values():
        for policy in (variant.run, variant.train or NOTHING):
            Policy.from_dict(policy)
        assert (variant.train is None) == (variant.untrained == "" and variant.name != CONTROL)
        if variant.untrained:
            other = VARIANTS[variant.untrained]
            assert other.train is None and other.run == variant.run
            assert other.v_scale == variant.v_scale
    phases = ("early", "middle", "late")
    keeps = []
    for near in ("", "-near"):
        modes = [PAPER["modes"][phase + near] for phase in phases]
        assert [mode["scales"]["qk"] for mode in modes] == ["coarse", "fine", "intermediate"]
        keeps.append([mode["keep"] for mode in modes])
    early, middle, late = (14 * frame + 4 * near for frame, near in zip(*keeps, strict=True))
    assert early < late < middle <= 18 * 0.25
    # The same as `fpsc train demo` trains for.
    given = Policy.load(files("fpsc.train") / "recipes" / "demo-policy.yaml")
    size = {"layers": 6, "heads": 3, "fp8": True}
    ours = resolve(Policy.from_dict(PAPER), **size)
    assert {str(mode) for mode in given.modes.values()} == {
        str(mode) for mode in Policy.from_dict(PAPER).modes.values()
    }
    assert torch.equal(resolve(given, **size).cells, ours.cells)
    assert SAFE["schedule"][0]["use"] == "dense" and SAFE["modes"]["dense"]["keep"] == 1


def test_the_constant_schedule_costs_as_much_as_the_papers() -> None:
    assert keep_of(VARIANTS["joint-constant"]) == pytest.approx(
        keep_of(VARIANTS["joint"]), rel=0.02
    )
    assert len(CONSTANT["schedule"]) == 1


@pytest.mark.parametrize("suffix", ["", "-safe"])
def test_parts_alone_differ_from_the_whole_in_their_training_only(suffix: str) -> None:
    whole, sparse, fp8 = (VARIANTS[f"{name}{suffix}"] for name in ("joint", "sparse", "fp8"))
    assert whole.train == whole.run == sparse.run == fp8.run
    assert sparse.train is not None and fp8.train is not None
    for name, mode in whole.run["modes"].items():
        alone = sparse.train["modes"][name]
        assert alone["dtype"] == "bf16" and alone["keep"] == mode["keep"]
        alone = fp8.train["modes"][name]
        assert alone["keep"] == 1 and alone.get("scales") == mode.get("scales")
        assert alone["dtype"] == mode["dtype"]


def test_runs_are_in_an_order_in_which_what_they_need_comes_first() -> None:
    names = list(runs(Scale()))
    assert len(names) == len(set(names)) == len(VARIANTS) * len(SEEDS) and len(SEEDS) >= 3
    assert names[: len(SEEDS)] == [f"{DENSE}-s{seed}" for seed in SEEDS]
    assert names.index("joint-s2") < names.index("joint-constant-s0")


# ---- one scale for V


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_v_scale_is_what_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the specification, whose rounding of V is given one scale too."""
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    v *= torch.logspace(-4, 0, 16)  # of one scale for all, small channels get few steps

    def run(kernel: str) -> torch.Tensor:
        return attention(q, k, v, grid=(4, 4, 4), dtype="fp8", kernel=kernel)

    def together(x_ND: torch.Tensor) -> torch.Tensor:
        return reference.quantisation_scale(x_ND.abs().max()).expand(x_ND.shape[1])

    plain = run("cpu")
    if kind == "tensor":
        monkeypatch.setattr(reference, "_scale_per_channel", together)
    with v_scale(kind):
        found = run("cpu")
    expected, small = run("reference"), slice(0, 4)
    assert relative_rms(found[..., small], expected[..., small]) < KERNEL_FP8
    different = relative_rms(plain[..., small], expected[..., small]) > 20 * KERNEL_FP8
    assert different is (kind == "tensor")
    assert torch.equal(run("cpu"), plain)


def test_another_scale_of_v_is_refused() -> None:
    with pytest.raises(ValueError, match="channel or tensor"), v_scale("row"):
        pass


# ---- a run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights of as many layers and heads as the demo has; their output is not zero."""
    torch.manual_seed(0)
    model = build_model(heads=3, head_dim=16, layers=6, ffn_dim=32)
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    folder = tmp_path_factory.mktemp("start")
    save_model(model, folder)
    return folder


@pytest.fixture
def tiny(start: Path) -> Scale:
    training = {
        "objective": {"prediction": "sample", "floor": 0.1},
        "optimiser": {"lr": 1e-3, "warmup": 1, "steps": 2, "batch": 1},
        "ema": 0.5,
        "ramp": {"keep": "0..1"},
    }
    return Scale(
        training=training,
        model=str(start),
        seeds=(0, 1),
        validation_clips=1,
        noise=(0.9, 0.3),
        clips=3,
        steps=2,
    )


def quiet(part: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, no_inductor: None) -> None:
    """Dense models run as they are, sparse ones as rewritten graphs."""
    compile = torch.compile

    def lazily(model: torch.nn.Module, **given: Any) -> Any:
        return compile(model, **given) if given else model

    monkeypatch.setattr(torch, "compile", lazily)


def test_an_untrained_run_is_compared_with_the_dense_model(
    tiny: Scale, tmp_path: Path, uncompiled: None
) -> None:
    run = Run(VARIANTS["untrained"], 1)
    record = carrying.carry_out(run, tiny, tmp_path, quiet)
    assert (record.name, record.variant, record.seed) == ("untrained-s1", "untrained", 1)
    assert record.training is None and record.settings["run"] == PAPER
    assert len(record.losses.dense) == 1 and len(record.losses.dense[0]) == 2
    assert record.losses.dense != record.losses.as_run
    assert list(record.samples.distances) == [0]  # not to the set from its own noise
    assert len(record.samples.psnr) == 3 and all(
        20 < decibel < 90 for decibel in record.samples.psnr
    )
    assert list(record.samples.accuracy) == list(QUESTIONS)
    record.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == record

    dense = carrying.carry_out(Run(VARIANTS[DENSE], 1), tiny, tmp_path, quiet)
    assert dense.losses.dense == dense.losses.as_run == record.losses.dense
    assert dense.samples.psnr == (None,) * 3 and set(dense.samples.ssim) == {1.0}


def test_a_trained_run_is_compared_with_the_start_s_clips(
    tiny: Scale, tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(VARIANTS["sparse"], 0)
    record = carrying.carry_out(run, tiny, tmp_path, quiet)
    assert record.training is not None and record.training.steps == 2
    assert [step for step, *_ in record.training.curve] == [0, 1, 2]
    weights = tmp_path / "sparse-s0" / "training" / "output" / "weights"
    assert find(weights).name == "demo-paper-sparse"  # trained with this, and run with another
    assert record.settings["run"] == PAPER
    before, after = (load_model(folder).proj_out.weight for folder in (Path(tiny.model), weights))
    assert not torch.equal(before, after)
    assert record.losses.dense != record.losses.as_run

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer, "fpsc_train", again)
    assert carrying.carry_out(run, tiny, tmp_path, quiet).losses == record.losses


def test_the_control_is_trained_dense_with_as_much(tiny: Scale, tmp_path: Path) -> None:
    control, joint = (Run(VARIANTS[name], 1) for name in (CONTROL, "joint"))
    given = trainer.configuration(control, tiny, tmp_path / "control")
    other = trainer.configuration(joint, tiny, tmp_path / "joint")
    assert given["baseline"] and not other["baseline"]
    assert "ramp" not in given and other["ramp"] == tiny.training["ramp"]
    same = ("model", "data", "objective", "optimiser", "ema", "seed")
    assert all(given[name] == other[name] for name in same)
    for value in (given, other):
        config.from_value(value)  # valid


def test_a_run_that_was_killed_goes_on_and_ends_alike(
    tiny: Scale, tmp_path: Path, uncompiled: None
) -> None:
    run = Run(VARIANTS["untrained"], 0)

    class Killed(Exception):
        pass

    def stop(part: str, done: int, total: int) -> None:
        if part == "untrained-s0: clips" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        carrying.carry_out(run, tiny, tmp_path / "killed", stop)
    assert len(list((tmp_path / "killed" / run.name / "clips").iterdir())) == 2
    told: list[int] = []

    def note(part: str, done: int, total: int) -> None:
        if part == "untrained-s0: clips":
            told.append(done)

    found = carrying.carry_out(run, tiny, tmp_path / "killed", note)
    assert told == [2, 3]
    straight = carrying.carry_out(run, tiny, tmp_path / "straight", quiet)
    for name in ("losses", "samples"):
        assert getattr(found, name) == getattr(straight, name)


def test_a_folder_of_other_settings_is_refused(tiny: Scale, tmp_path: Path) -> None:
    run = Run(VARIANTS["untrained"], 0)
    carrying.claim(run, tiny, tmp_path)
    carrying.claim(run, tiny, tmp_path)
    with pytest.raises(carrying.SettingsError, match=r"untrained-s0.*delete the folder"):
        carrying.claim(run, dataclasses.replace(tiny, steps=3), tmp_path)


def test_the_survey_measures_what_is_missing(
    start: Path, tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("every tile, FP8", "near, keep 0.25", "the paper's order")
    chosen = {name: survey.CANDIDATES[name] for name in names}
    path = tmp_path / "survey.json"
    monkeypatch.setattr(survey, "CANDIDATES", {names[1]: chosen[names[1]]})
    first = survey.survey(path, quiet, weights=start, clips=1)
    assert list(first.losses) == [names[1]] and first.dense != first.losses[names[1]]
    monkeypatch.setattr(survey, "CANDIDATES", chosen)
    told: list[int] = []
    found = survey.survey(
        path, lambda part, done, total: told.append(total), weights=start, clips=1
    )
    assert set(told) == {2} and set(found.losses) == set(names)
    assert found.losses[names[1]] == first.losses[names[1]]  # not measured again
    assert survey.Survey.load(path) == found
    # The policies were those that they are called: every tile changes least.
    assert abs(found.gap(names[0])) < abs(found.gap(names[1]))
    rows = survey.table(path).splitlines()
    assert len(rows) == 2 + 3 and f"{100 * found.gap(names[0], 2):+.1f} %" in rows[2]
    assert survey.table(tmp_path / "none.json").count("–") == 3 * 7


# ---- what follows from records

NOISE = (0.9, 0.3)


def record(
    variant: str, seed: int, *, dense: float = 1.0, as_run: float = 1.0, distance: float = 0.01
) -> Record:
    training = None
    if VARIANTS[variant].train is not None:
        training = Training(steps=1, seconds=1.0, curve=((0, 1.0, 2.0),))
    others = {other: Distance(value=distance, error=0.001) for other in SEEDS if other != seed}
    return Record(
        name=f"{variant}-s{seed}",
        variant=variant,
        seed=seed,
        settings=Run(VARIANTS[variant], seed).settings(Scale()),
        training=training,
        losses=Losses(
            noise=NOISE, dense=((dense, 2 * dense),) * 2, as_run=((as_run, 2 * as_run),) * 2
        ),
        samples=Samples(
            clips=2,
            steps=2,
            psnr=(None, None) if variant == DENSE else (20.0, 30.0),
            ssim=(0.8, 0.9),
            distances=others,
            accuracy=dict.fromkeys(QUESTIONS, 0.75),
        ),
        seconds={},
        environment=environment(torch.device("cpu")),
    )


def experiment(**joint: float) -> Experiment:
    """Start at loss 1, trained on to 0.9; untrained 1.2; three seeds."""
    found = []
    for seed in SEEDS:
        found += [
            record(DENSE, seed, distance=0.01 + 0.001 * seed),
            record(CONTROL, seed, dense=0.9, as_run=0.9),
            record("untrained", seed, as_run=1.2, distance=0.05),
            record("joint", seed, **{"dense": 0.9, "as_run": 0.909, **joint}),
        ]
    return Experiment({each.name: each for each in found})


def test_gaps_are_to_as_much_training() -> None:
    found = experiment()
    joint = found.gaps("joint")
    assert joint is not None and joint.mean == pytest.approx(0.01) and joint.deviation == 0
    untrained = found.gaps("untrained", level=1)
    assert untrained is not None and untrained.mean == pytest.approx(0.2)
    assert found.to_start(found.of("joint")[0]) == pytest.approx(0.909 - 1)
    assert found.gaps("sparse") is None
    assert found.floor() == pytest.approx([0.01, 0.01, 0.011])  # 0-1, 0-2, 1-2, once each
    assert found.distances("untrained") == pytest.approx([0.05] * 3)


@pytest.mark.parametrize(
    ("joint", "missed"),
    [
        ({}, []),
        ({"as_run": 0.93}, ["loss gap to dense trained on alike"]),
        (
            {"as_run": 0.98},
            ["loss gap to dense trained on alike", "the same, untrained to tuned, d"],
        ),
        (
            {"as_run": 1.05},
            [
                "loss gap to the dense weights",
                "loss gap to dense trained on alike",
                "the same, untrained to tuned, dense",
            ],
        ),
        ({"as_run": 0.89}, []),  # better than dense
        ({"distance": 0.0105}, []),
        ({"distance": 0.02}, ["distance to the dense model's clips"]),
    ],
)
def test_marks(joint: dict[str, float], missed: list[str]) -> None:
    found = [target.name for target in targets(experiment(**joint)) if not target.met]
    assert len(found) == len(missed)
    assert all(name.startswith(start) for name, start in zip(found, missed, strict=True))


def test_pages_say_which_marks_are_missed() -> None:
    _, _, to_start, _, to_control, _, _ = marks_table(experiment(as_run=0.93)).splitlines()[2:]
    assert to_start.startswith("| loss gap to the dense weights") and to_start.endswith("| yes |")
    assert to_control.startswith("| loss gap to dense trained on alike") and "+3.3" in to_control
    assert to_control.endswith("| **no** |")


def test_readme_shows_what_training_wins() -> None:
    rows = [line.split(" | ") for line in short_table(experiment()).splitlines()[2:]]
    assert [row[0][2:] for row in rows] == [
        *("dense, as it ships", "dense, trained on"),
        *("paper's order: not trained", "paper's order: trained jointly"),
    ]
    assert [row[2] for row in rows] == ["–", "-10.0 ± 0.0 %", "+20.0 ± 0.0 %", "-9.1 ± 0.0 %"]


def test_nothing_run_is_nothing_met() -> None:
    found = [target for target in targets(Experiment({})) if target.met]
    assert [target.name for target in found] == ["policy"]


def test_a_row_for_each_variant_with_a_dash_where_nothing_was_run() -> None:
    lines = variants_table(experiment(), ablation=False).splitlines()
    rows = {cells[0]: cells for cells in ([c.strip() for c in x[2:-2].split("|")] for x in lines)}
    joint, sparse = rows["paper's order: trained jointly"], rows["dense early: not trained"]
    assert joint[2:5] == ["3", "+1.0 ± 0.0 %", "-9.1 ± 0.0 %"]
    assert joint[5:] == ["25.0 ± 0.0 dB", "0.850 ± 0.000", "0.0100 ± 0.0000", "75.0% ± 0.0%"]
    assert set(sparse[2:]) == {"–"}
    assert rows["dense, as it ships"][3:6] == ["–", "–", "–"]
    ablations = variants_table(experiment(), ablation=True)
    assert "one scale for V" in ablations and "trained jointly" in ablations


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    whole = record("joint", 0)
    whole.save(tmp_path / "joint-s0.json")
    found = json.loads((tmp_path / "joint-s0.json").read_text())
    for change, message in (
        ({"schema_version": 9}, "schema_version 1, found 9"),
        ({"losses": {**found["losses"], "dense": [[1.0]]}}, "losses"),
        ({"seed": "x"}, "seed"),
        ({"settings": found["settings"] | {"run": SAFE}}, "another run than joint-s0 has now"),
    ):
        (tmp_path / "joint-s0.json").write_text(json.dumps(found | change))
        with pytest.raises(RecordError, match=message):
            Experiment.load(tmp_path)
    (tmp_path / "joint-s0.json").write_text("{")
    with pytest.raises(RecordError, match=r"joint-s0\.json"):
        Experiment.load(tmp_path)


def test_pictures_show_the_gaps(tmp_path: Path) -> None:
    pictures = pytest.importorskip("bench.tuning.pictures", exc_type=ImportError)
    figure = pictures.gaps_figure(experiment())
    bars, course = figure.axes
    heights = {
        container.get_label(): [bar.get_height() for bar in container]
        for container in bars.containers
        if hasattr(container, "patches") and container.patches
    }
    assert heights["not trained"] == pytest.approx([20.0])
    assert heights["trained jointly"] == pytest.approx([1.0])
    lines = {line.get_label(): list(line.get_ydata()) for line in course.lines}
    assert lines["trained jointly"] == pytest.approx([1.0, 1.0])


def test_a_sheet_is_drawn_where_all_clips_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = pytest.importorskip("bench.tuning.pictures", exc_type=ImportError)
    scale, path = Scale(clips=1, steps=2), tmp_path / "sheet.png"
    assert not pictures.sheet(scale, tmp_path, path) and not path.exists()
    for name in pictures.SHOWN:
        sets = carrying.ClipSet(0, 1, 2)
        sets.draw(lambda latent, *_, **__: (latent[:, :3],), tmp_path / f"{name}-s0" / "clips")
    assert pictures.sheet(scale, tmp_path, path) and path.stat().st_size > 1000


# ---- the command


def test_list_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record("joint", 1).save(tmp_path / "joint-s1.json")
    assert joint.main(["--list", "--json", "--results", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [each["name"] for each in found if each["done"]] == ["joint-s1"]
    assert joint.main(["--list", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and sum(line.startswith("done") for line in lines) == 1


def test_all_runs_what_is_missing_each_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record("joint", 1).save(tmp_path / "joint-s1.json")
    ran: list[str] = []

    def call(command: list[str]) -> Any:
        ran.append(command[command.index("--run") + 1])
        return type("Ended", (), {"returncode": 3 if len(ran) == 4 else 0})

    monkeypatch.setattr(joint.subprocess, "run", call)
    assert joint.main(["--all", "--results", str(tmp_path)]) == 3  # of the one that failed
    assert ran == list(runs(Scale()))[:4] and "joint-s1" not in ran
    ran.clear()
    assert joint.main(["--run", "joint-s1", "joint-s0", "--results", str(tmp_path)]) == 0
    assert ran == ["joint-s1", "joint-s0"]


def test_one_run_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(run: Run, scale: Scale, work: Path, tell: Callable[..., None]) -> Record:
        tell("part", 0, 2)
        tell("part", 2, 2)
        return record(run.variant.name, run.seed)

    monkeypatch.setattr(carrying, "carry_out", whole)
    assert joint.main(["--run", "joint-s2", "--results", str(tmp_path)]) == 0
    assert Record.load(tmp_path / "joint-s2.json").seed == 2


def test_check_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert joint.main(["--check", "--results", str(tmp_path)]) == 1
    assert "MISSED" in capsys.readouterr().out
    for each in experiment().records.values():
        each.save(tmp_path / f"{each.name}.json")
    assert joint.main(["--check", "--json", "--results", str(tmp_path)]) == 0
    marks = json.loads(capsys.readouterr().out)["marks"]
    assert len(marks) == 7 and all(mark["met"] for mark in marks)


def test_a_run_of_another_name_is_answered_with_the_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        joint.main(["--run", "joint-s9"])
    assert ended.value.code == 2
    assert "joint-s0" in capsys.readouterr().err
