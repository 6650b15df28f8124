"""The JSON Schema of policy files, for editors; `fpsc-policy-1.json` beside this module is it.

It knows what one field can know. Gaps, overlaps and names of modes are for `fpsc policy check`.
"""

from __future__ import annotations

import json
from typing import Any

from .schema import PolicySpec

FILE = "fpsc-policy-1.json"
"""The committed schema: `fpsc policy schema > fpsc/policy/fpsc-policy-1.json`."""

ONE_AXIS = [{"required": [key]} for key in ("noise", "steps", "percent")]
NEEDED = ["modes", "schedule"]


def json_schema() -> dict[str, Any]:
    """The schema as plain values (JSON Schema, draft 2020-12)."""
    schema = tidy(PolicySpec.model_json_schema(by_alias=True))
    schema["$defs"]["Phase"]["oneOf"] = ONE_AXIS
    # What a policy does not say may stand in the one that it imports.
    schema["required"] = [key for key in schema["required"] if key not in NEEDED]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fpsc policy",
        **schema,
        "anyOf": [{"required": ["$import"]}, {"required": NEEDED}],
    }


def dumps() -> str:
    """The text of the committed file."""
    return json.dumps(json_schema(), indent=2) + "\n"


def tidy(node: Any) -> Any:
    """A schema without titles made of keys, and without null, which no field takes."""
    if isinstance(node, list):
        return [tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidied = {
        key: {name: tidy(field) for name, field in value.items()}
        if key in ("properties", "$defs")
        else value
        if key in ("default", "enum", "const")
        else tidy(value)
        for key, value in node.items()
        if key != "title" or not isinstance(value, str)
    }
    if not isinstance(tidied.get("default", ""), str | int | float | bool):
        del tidied["default"]
    options = tidied.get("anyOf", [])
    if {"type": "null"} in options:
        kept = [option for option in options if option != {"type": "null"}]
        del tidied["anyOf"]
        tidied = {**kept[0], **tidied} if len(kept) == 1 else {"anyOf": kept, **tidied}
    return tidied
