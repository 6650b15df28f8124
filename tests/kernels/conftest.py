"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Also that of float8; in integers it is the largest number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for dtype in (torch.float32, torch.float8_e4m3fn):
        assert torch.empty(3, dtype=dtype).float().isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
