"""What every test gets: fixed seeds, a clean Dynamo, compile caches of its own, few threads.

The environment is set when this file is imported, which is before any test imports torch.
"""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of several workers would wait for each other: tiny models take twice as long.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

# Caches that outlive a run would hide a change in an op's backward or fake: neither is a part of
# Inductor's own cache key. Every run (every worker of it) starts from empty folders.
_caches = Path(tempfile.mkdtemp(prefix="fpsc-tests-"))
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_caches / "inductor")
os.environ["TRITON_CACHE_DIR"] = str(_caches / "triton")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compiler processes per worker
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is not a test
os.environ["DIFFUSERS_VERBOSITY"] = "error"
# Without a GPU the Triton kernels run in the interpreter. A machine with one sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)

hypothesis.settings.register_profile(
    "fpsc", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("fpsc")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No compiled code and no recompile count from an earlier test."""
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes seconds: only where a test did
        torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten graphs run as they are: what Inductor makes of them is not the point here."""

    def as_it_is(gm: torch.fx.GraphModule, inputs: object, config_patches: object = None) -> object:
        return gm.forward

    monkeypatch.setattr("fpsc.backend.inductor", as_it_is)


@pytest.fixture
def phases(tmp_path: Path) -> str:
    """Path of a policy with three phases that differ on a small grid."""
    from fpsc.policy import Policy
    from tests.wan import PHASES

    path = tmp_path / "phases.yaml"
    Policy.from_dict(PHASES).save(path)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def _remove_caches() -> Iterator[None]:
    yield
    shutil.rmtree(_caches, ignore_errors=True)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
