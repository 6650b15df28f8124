"""The JSON Schema of policy files, for editors; committed as `fpsc-policy-1.json`."""

from __future__ import annotations

import json
from typing import Any

from .schema import PolicySpec

FILE = "fpsc-policy-1.json"
"""The committed schema, beside this module."""


def json_schema() -> dict[str, Any]:
    """The schema as plain values (JSON Schema, draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **PolicySpec.model_json_schema(by_alias=True),
        "title": "fpsc policy",
    }


def dumps() -> str:
    """The text of the committed file."""
    return json.dumps(json_schema(), indent=2) + "\n"
