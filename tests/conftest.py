"""Fixtures that every test may use."""

from pathlib import Path

import pytest
from hypothesis import settings

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and outlines; the test is skipped where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip(f"no real slides at {_SHARED}")
    return _SHARED


settings.register_profile("fullfield", deadline=None, max_examples=60)
settings.load_profile("fullfield")
