"""A folder with a small model, its clips and its policy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train import common


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    common.prepare(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that runs are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
