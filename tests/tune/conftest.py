"""One calibration of the tiny model, for all tests that look at one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpsc.tune import calibrate
from fpsc.tune.record import Calibration
from tests.tune.common import settings, subject


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where its file is."""
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="session")
def calibration(folder: Path) -> Calibration:
    return calibrate.calibrate(subject(), settings(), folder)
