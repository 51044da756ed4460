"""How many slides are under way at once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import WorkerError
from pipeline.segmentation import segment_slides
from pipeline.settings import SegmentationSettings, TissueSettings
from pipeline.slide_job import SlideJob
from pipeline.tasks import Here, Outcome


class Crew(Here):
    """This process, which says that it is so many workers, and counts what they were given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.given = size, 0

    def workers(self) -> int:
        return self.size

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        self.given += 1
        super().submit(key, function, *arguments)


@pytest.mark.parametrize(("workers", "at_once"), [(1, 4), (4, 4), (7, 7), (50, 9)])
def test_no_worker_waits_for_a_slide_and_few_have_many(workers: int, at_once: int, tmp_path: Path) -> None:
    names = [f"slide-{number}" for number in range(9)]
    settings, tissue = SegmentationSettings(tile_size=64), TissueSettings()
    jobs = [SlideJob(name, tmp_path / name, None, tmp_path, tmp_path / name, settings, tissue) for name in names]
    crew, under_way, ended = Crew(workers), list[int](), list[str]()
    for step in segment_slides(jobs, crew):  # there are no such slides: each ends with its first task
        under_way.append(crew.given - len(ended))
        assert step.row is not None and step.row.status == "failed"
        ended.append(step.row.slide_id)
    assert ended == names
    assert max(under_way) == under_way[0] == at_once


class Deadly(Here):
    """Every task kills its worker."""

    def __iter__(self) -> Iterator[Outcome]:
        for outcome in super().__iter__():
            yield Outcome(outcome.key, error=WorkerError("a task", "3 deaths", "life", "Start fewer workers."))


def test_who_kills_its_workers_is_told_how_to_take_less(tmp_path: Path) -> None:
    settings, tissue = SegmentationSettings(tile_size=64), TissueSettings()
    job = SlideJob("slide", tmp_path / "slide", None, tmp_path, tmp_path / "slide", settings, tissue)
    (step,) = segment_slides([job], Deadly())
    assert step.row is not None and "3 deaths" in step.row.reason and "--tile-size" in step.row.reason
