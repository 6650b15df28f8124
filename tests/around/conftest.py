"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._dynamo.utils import counters

import fpsc
from fpsc.policy import Policy
from tests.around.common import POLICY


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fpsc.reports(clear=True)
    counters.clear()


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """Path of `POLICY`."""
    path = tmp_path / "around.yaml"
    Policy.from_dict(POLICY).save(path)
    return str(path)
