"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._dynamo.utils import counters

import fpsc
from fpsc import backend
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


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph runs as it is: what Inductor makes of it is not the point here."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, config_patches=None: gm)
