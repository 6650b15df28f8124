"""The configuration: what it accepts, and what it says of everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.errors import UserError
from fpsc.train.config import (
    SCHEMA,
    TrainSpec,
    differences,
    dumps_schema,
    from_value,
    json_schema,
    load,
    recipe,
)

GOOD = """\
fpsc-train: 1
model: demo
policy: demo
output: run
data: {train: demo}
optimiser: {lr: 5e-6, steps: 600, batch: 4, accumulate: 2}
ramp: {keep: 0..500, fp8: 100}
method: lora
lora: {rank: 4, targets: [to_q]}
"""

BROKEN = [
    ("model: demo", "modle: demo", '2:1: unknown key "modle"; did you mean "model"?'),
    ("policy: demo\n", "", '1:1: "policy" is missing: expected a built-in policy, a file'),
    ("lr: 5e-6", "lr: fast", "6:17: optimiser.lr: expected a number above 0, the learning rate"),
    ("lr: 5e-6", "lr: -1.0", "6:17: optimiser.lr: expected a number above 0"),
    ("steps: 600", "step: 600", '6:23: optimiser: unknown key "step"; did you mean "steps"?'),
    ("batch: 4", "batch: 5", "6:57: optimiser.accumulate: 5 clips in a step do not divide"),
    ("0..500", "500..0", "7:14: ramp.keep: a range counts up; write 0..500, found 500..0"),
    ("0..500", "0..700", "7:14: ramp.keep: ends after the last of 600 steps"),
    ("fp8: 100", "fp8: 600", "7:27: ramp.fp8: fp8 begins after the last of 600 steps"),
    ("method: lora", "method: lroa", "expected full (all weights) or lora (adapters on"),
    ("method: lora", "method: lroa", 'found "lroa"; did you mean "lora"?'),
    ("method: lora", "method: full", "9:7: lora: belongs to method: lora"),
    ("train: demo", "train: 5", "5:15: data.train: expected demo, a folder of encoded clips"),
    ("train: demo", "tarin: demo", '5:8: data: unknown key "tarin"; did you mean "train"?'),
    ("ramp: {keep: 0..500, fp8: 100}", "ramp:", "7:1: ramp: expected a mapping with keep, fp8"),
    ("fpsc-train: 1", "fpsc-train: 2", "1:13: fpsc-train: expected 1, the version of the format"),
    ("rank: 4", "rank: &a 4", "9:14: anchors are not used here"),
    (GOOD, "a list\n", 'expected a mapping that starts with "fpsc-train: 1"'),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def test_values_and_defaults(tmp_path: Path) -> None:
    spec = load(written(tmp_path, GOOD)).spec
    assert (spec.optimiser.lr, spec.optimiser.clip, spec.ema) == (5e-6, 1.0, 0.99)
    assert (spec.ramp.keep, spec.ramp.fp8, spec.lora.rank) == ((0, 500), 100, 4)


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_a_mistake_is_found_with_its_place(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:")


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(UserError, match=r"demmo: no such file, and not one of demo; did you mean"):
        load("demmo")


def test_the_committed_schema_is_up_to_date(checkout: Path) -> None:
    """If not: fpsc train --schema > fpsc/train/fpsc-train-1.json"""
    assert (checkout / "fpsc" / "train" / SCHEMA).read_text(encoding="utf-8") == dumps_schema()
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for text in (GOOD, recipe("demo"), recipe("start")):
        validator.validate(YAML(typ="safe", pure=True).load(text))
    for old, new, _ in BROKEN[:5]:
        assert not validator.is_valid(YAML(typ="safe", pure=True).load(GOOD.replace(old, new, 1)))


def test_what_init_writes_says_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert CliRunner().invoke(app, ["train", "--init", str(path)]).exit_code == 0
    spec = load(path).spec
    mine, named = spec.model_dump(), {"model", "policy", "output", "data", "ramp", "checkpointing"}
    default = TrainSpec.model_validate({"fpsc-train": 1, "model": "", "policy": "", "output": ""})
    for key, value in default.model_dump().items():
        assert key in named or mine[key] == value, key
    again = CliRunner().invoke(app, ["train", "--init", str(path)])
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_values_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    changes = ["optimiser.lr=1e-3", "validation.clips=3", "samples={prompts: [a cat]}", "seed=7"]
    options = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(app, ["train", str(path), "--check", "--json", *options])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)["config"]
    assert values["optimiser"]["lr"] == 1e-3 and values["optimiser"]["steps"] == 600
    assert values["validation"]["clips"] == 3 and values["validation"]["every"] == 200
    assert values["samples"]["prompts"] == ["a cat"] and values["seed"] == 7
    for wrong, message in (
        ("optimiser.rl=1", 'unknown key "rl"'),
        ("seed", "expected KEY=VALUE"),
        ("seed={", "is not YAML"),
    ):
        found = CliRunner().invoke(app, ["train", str(path), "--check", "--set", wrong])
        assert found.exit_code == 2 and message in found.stderr


def test_the_demo_recipe_reaches_a_quarter_in_fp8() -> None:
    config = load("demo")
    policy = config.policy()
    assert {policy.modes[phase.use].dtype for phase in policy.schedule} == {"fp8"}
    assert all((policy.modes[phase.use].keep or 1) <= 0.25 for phase in policy.schedule)


def test_a_run_may_go_on_only_with_what_changes_nothing(tmp_path: Path) -> None:
    value: dict[str, Any] = YAML(typ="safe", pure=True).load(GOOD)
    before = from_value(value).values()
    assert differences(before, from_value(value)) == []
    free = {**value, "output": "there", "checkpoints": {"every": 5}, "tensorboard": False}
    assert differences(before, from_value(free)) == []
    longer = {**value, "optimiser": {**value["optimiser"], "steps": 900}}
    assert differences(before, from_value(longer)) == []
    falling = {**value, "optimiser": {**value["optimiser"], "decay": "linear"}}
    longer = {**value, "optimiser": {**falling["optimiser"], "steps": 900}}
    (found,) = differences(from_value(falling).values(), from_value(longer))
    assert found == "optimiser.steps: expected 600 as it began, found 900"
    other = {**value, "lora": {"rank": 8, "targets": ["to_q"]}, "model": "there"}
    assert differences(before, from_value(other)) == [
        "lora.rank: expected 4 as it began, found 8",
        'model: expected "demo" as it began, found "there"',
    ]


def test_every_key_is_in_the_documentation(checkout: Path) -> None:
    page = (checkout / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.partition("| key | default |")[2].partition("\n\n")[0]
    for name, field in TrainSpec.model_fields.items():
        if name != "fpsc_train":
            assert f"| `{name}" in table, name
        inner: Any = getattr(field.annotation, "model_fields", {})
        for key in inner:
            if name not in ("data", "lora"):
                assert f"`{key}`" in table or f"`{name}.{key}`" in table, f"{name}.{key}"
