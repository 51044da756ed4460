"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import event
from sqlalchemy.engine import Engine

_ROOT = Path(__file__).resolve().parents[1]
_SHARED = _ROOT.parent / "shared" / "data"


def pytest_configure() -> None:
    """What Fullfield keeps for later runs is kept from the user's own cache, here and in the commands that tests run."""
    os.environ["XDG_CACHE_HOME"] = str(_ROOT / ".pytest_cache" / "home")
    # What MLflow stores need not outlive a power cut here, and waiting for the disk takes longest of all on some machines.
    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and outlines; the test is skipped where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip(f"no real slides at {_SHARED}")
    return _SHARED


@pytest.fixture(autouse=True)
def _imports_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the code of a model that it loads first on the path, where workers of later tests would find it."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small images are too little to share: beside other work, threads that wait for each other take ten times as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


settings.register_profile("fullfield", deadline=None, max_examples=60)
settings.load_profile("fullfield")
