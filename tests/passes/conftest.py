"""Fixtures of the tests of the passes."""

from __future__ import annotations

from typing import Any

import pytest

from fpsc import backend


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph runs as it is."""

    def eager(gm: Any, example_inputs: Any, config_patches: Any = None) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "inductor", eager)
