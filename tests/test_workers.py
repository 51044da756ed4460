"""How many workers are started for which slides."""

from pathlib import Path

import pytest

from pipeline import workers
from pipeline.geometry import Mpp
from pipeline.phantom import make_phantom
from pipeline.slide import open_slide
from pipeline.workers import local_workers

SCALE = Mpp.square(1.0)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers") / "scan.tiff"
    make_phantom(path, seed=1, width=1203, height=901, mpp=1.0)
    return path


def test_two_where_there_is_work_and_memory_for_two(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 8)
    monkeypatch.setattr(workers, "has_gpu", lambda: False)
    monkeypatch.setattr(workers, "free_gib", lambda: 8.0)
    few = int(30e6 // open_slide(scan).base.roi.area)
    damaged = (scan.with_name("none.tiff"), None)
    assert local_workers([(scan, None)] * few, SCALE) == 1
    assert local_workers([damaged] + [(scan, None)] * (few + 1), SCALE) == 2
    assert local_workers([(scan, None)] * (few + 1), Mpp.square(4.0)) == 1
    for name, value in (("free_gib", 3.0), ("has_gpu", True), ("cores", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(workers, name, lambda own=value: own)
            assert local_workers([(scan, None)] * (few + 1), SCALE) == 1
