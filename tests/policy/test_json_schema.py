"""The JSON Schema for editors: up to date, and of one mind with the reader where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fpsc.policy import Policy, PolicyError, find, presets
from fpsc.policy.json_schema import FILE, dumps, json_schema
from tests.policy.test_broken import GOOD, gallery

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def value(text: str) -> Any:
    from fpsc.policy.document import parse

    return parse(text.encode(), "p").value


def test_the_committed_file_is_up_to_date(checkout: Path) -> None:
    """If not: fpsc policy schema > fpsc/policy/fpsc-policy-1.json"""
    assert (checkout / "fpsc" / "policy" / FILE).read_text(encoding="utf-8") == dumps()
    VALIDATOR.check_schema(json_schema())


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_valid(name: str) -> None:
    VALIDATOR.validate(find(name).document.value)


def test_everything_that_can_be_said_is_valid() -> None:
    text = GOOD + "roles: [video]\nsampling: {scheduler: UniPCMultistepScheduler, steps: 50}\n"
    text += "components:\n  transformer_2:\n    tile: [4, 4, 8]\n    limits: {min_tokens: 0}\n"
    Policy.load(text)
    VALIDATOR.validate(value(text))
    VALIDATOR.validate(value("fpsc: 1\n$import: generic\nmodes:\n  fast: {keep: 0.2}\n"))
    VALIDATOR.validate(value(GOOD + "table: t.safetensors\n"))


def test_it_accepts_nothing_of_the_wrong_kind() -> None:
    """Of the gallery it finds what one field shows; what it finds, the reader finds, too."""
    found = 0
    for old, new, _ in gallery():
        text = GOOD.replace(old, new, 1)
        try:
            document = value(text)
        except PolicyError:
            continue  # not even plain YAML
        found += not VALIDATOR.is_valid(document)
    assert found >= 60
    for broken in ({"kep": 1}, {"keep": 1.5}, {"pattern": "naer"}, {"window": [3, 3]}):
        document = value(GOOD)
        document["modes"]["fast"] = broken
        assert not VALIDATOR.is_valid(document), broken
