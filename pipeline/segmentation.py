"""How many slides go through a cluster, some at a time, and what is told of them.

A slide is planned, then its tiles are run in blocks of neighbours, then it is sealed. Meanwhile it is finished part by part,
each as soon as it can be. All are tasks that return numbers, see slide_tasks.py.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.blending import TILE_SIZE
from pipeline.errors import CanvasError, WorkerError, why
from pipeline.slide_job import SlideJob, job_tile_size
from pipeline.slide_tasks import (
    Busy,
    Made,
    Part,
    Plan,
    Segmented,
    finish_slide,
    get_ready,
    plan_slide,
    seal_slide,
    segment_block,
)
from pipeline.tasks import Cluster, Outcome
from pipeline.tiling import tile_size_for

_SMALLER_TILES = (
    "Or set a lower `cluster.worker_memory_gib` or a smaller `segmentation.tile_size` (--tile-size), delete this slide's "
    "output, and run again."
)
_TRIED_ALONE = 3  # slides, to find a tile size: each that fails costs some workers their lives
_SLIDES_AT_ONCE = 4  # and no fewer than there are workers, which small slides would leave without work


@dataclass(frozen=True)
class Row:
    """How a slide ended, as `slides.csv` has it; `megapixels` counts what this call segmented, at the model's mpp.

    `reason` says why it failed, or what a reader of its results has to know.
    """

    slide_id: str
    slide: str
    status: str
    reason: str
    seconds: float
    megapixels: float


@dataclass(frozen=True)
class Step:
    """Something that happened: `blocks` more to do, or `blocks_done` of `megapixels`, or a slide that ended with a `row`.

    A slide that was finished before is `skipped`; one that another command is at is `postponed`, and comes last.
    """

    job: SlideJob
    blocks: int = 0
    blocks_done: int = 0
    megapixels: float = 0.0
    row: Row | None = None
    skipped: bool = False
    postponed: bool = False


def with_tile_sizes(jobs: Sequence[SlideJob], cluster: Cluster, memory_gib: float | None) -> list[SlideJob]:
    """The same jobs, each with a tile size to fall back on where neither the user nor a canvas says one: the same for all,
    chosen in a worker (or `blending.TILE_SIZE` where they are blended).

    A canvas keeps its tile size so that a slightly different measurement never refuses to go on with it. Those that have one
    take part in the choice, so that slides which are left after a kill get the tiles that they would have got. Raises
    ClusterError where no tile fits into `memory_gib`, and CheckpointError where the model cannot be loaded. Where the slides
    together kill the workers that try them, one of the first three by itself decides: where each does, it is the model.
    """
    jobs = [replace(job, chosen_tile_size=TILE_SIZE) if job.settings.blend else job for job in jobs]
    fresh = [job for job in jobs if not _has_tile_size(job)]
    if fresh:
        for tried in (jobs, *([job] for job in fresh[:_TRIED_ALONE] if len(jobs) > 1)):
            outcome = _tile_size(tried, cluster, memory_gib)
            if not isinstance(outcome.error, WorkerError):
                break
        if outcome.error:
            raise outcome.error
        jobs = [replace(job, chosen_tile_size=outcome.value) for job in jobs]
    return jobs


def _tile_size(jobs: Sequence[SlideJob], cluster: Cluster, memory_gib: float | None) -> Outcome:
    slides, first = [(job.slide, job.mpp) for job in jobs], jobs[0]
    cluster.submit("tile size", tile_size_for, slides, first.model, memory_gib, first.tissue, first.engine)
    cluster.prepare(get_ready, first)  # the other workers, which have nothing else to do meanwhile
    (outcome,) = cluster
    return outcome


def _has_tile_size(job: SlideJob) -> bool:
    try:
        job_tile_size(job)
    except CanvasError:
        return False
    return True


def segment_slides(jobs: Iterable[SlideJob], cluster: Cluster) -> Iterator[Step]:
    """Segment slides, some at a time, and say what happens as it happens. A slide that fails does not stop the others."""
    waiting, postponed = iter(jobs), deque[SlideJob]()
    active, under_way = dict[str, _Active](), 0

    def begin() -> int:
        """Begin as many slides as there is room for."""
        room = max(_SLIDES_AT_ONCE, cluster.workers()) - under_way
        begun = {job.slide_id: _Active(job, cluster) for job in itertools.islice(waiting, max(room, 0))}
        if not begun and not under_way and postponed:  # a worker that waits for another command's holds up nothing else
            job = postponed.popleft()
            begun[job.slide_id] = _Active(job, cluster, wait=True)
        active.update(begun)
        return len(begun)

    under_way += begin()
    for outcome in cluster:
        state = active[outcome.key]
        step = state.failed(outcome.error) if outcome.error else state.advanced(outcome.value)
        yield step
        if step.postponed:
            postponed.append(step.job)
        if step.row is not None or step.postponed:
            under_way -= 1
            under_way += begin()


class _Active:
    """A slide that is under way: what of it is still out, and what it has cost."""

    def __init__(self, job: SlideJob, cluster: Cluster, wait: bool = False) -> None:
        self.job, self.cluster = job, cluster
        self.started, self.blocks, self.megapixels = time.monotonic(), 0, 0.0
        self.tissue_mm2, self.remark, self.over = 0.0, "", False
        self.rows = Counter[int]()  # of tiles, each with how many blocks it waits for
        self.tiles: Mapping[int, int] = {}  # of each row
        self.bands, self.parts = set[int](), {"tissue", "pyramid", "regions"}  # what is to be made, or under way
        cluster.submit(job.slide_id, plan_slide, job, wait)

    def advanced(self, value: Plan | Busy | Segmented | Part | None) -> Step:
        """Count a task that ended well, and submit what follows from it."""
        if self.over:
            return Step(self.job)
        match value:
            case Plan():
                return self._planned(value)
            case Busy():
                return Step(self.job, postponed=True)
            case Segmented():
                return self._block_done(value)
            case Part():
                return self._part_done(value)
            case None:  # it is sealed
                return self._ended("done", self.remark)

    def failed(self, error: BaseException) -> Step:
        """The slide is over; what is still out for it no longer counts."""
        if self.over:
            return Step(self.job)
        self.cluster.cancel(self.job.slide_id)
        return self._ended("failed", self._reason(error))

    def _reason(self, error: BaseException) -> str:
        told = why(error, self.job.folder)
        return f"{told} {_SMALLER_TILES}" if isinstance(error, WorkerError) else told

    def _planned(self, plan: Plan) -> Step:
        if plan.finished:
            return replace(self._ended("done", plan.remark), skipped=True)
        self.blocks, self.tissue_mm2, self.remark = len(plan.blocks), plan.tissue_mm2, plan.remark
        self.tiles = plan.bands
        self.bands.update(plan.bands)
        for block in plan.blocks:
            self.cluster.submit(self.job.slide_id, segment_block, self.job, block)
            self.rows.update({row for row, _ in block})
        self._make("tissue")
        self._finish(plan.bands)
        return Step(self.job, blocks=len(plan.blocks))

    def _block_done(self, block: Segmented) -> Step:
        self.blocks -= 1
        self.megapixels += block.megapixels
        self.rows.subtract(block.rows)
        self._finish(sorted(block.rows))
        return Step(self.job, blocks_done=1, megapixels=block.megapixels)

    def _finish(self, rows: Iterable[int]) -> None:
        """Make what can be made now that these rows of tiles wait for a block less."""
        for row in rows:
            if not self.rows[row]:
                self._make("band", row)
        if not self.blocks:
            self._make("pyramid")
        if not self.bands:
            self._make("regions")

    def _make(self, made: Made, band: int = 0) -> None:
        self.cluster.submit(self.job.slide_id, finish_slide, self.job, Part(made, band), self.tiles)

    def _part_done(self, part: Part) -> Step:
        if part.made == "band":
            self.bands.remove(part.band)
            if not self.bands:
                self._make("regions")
        self.parts.discard(part.made)
        if not self.parts:
            self.cluster.submit(self.job.slide_id, seal_slide, self.job, self.tissue_mm2, self.tiles)
        return Step(self.job)

    def _ended(self, status: str, reason: str) -> Step:
        self.over = True
        seconds = round(time.monotonic() - self.started, 2)
        row = Row(self.job.slide_id, str(self.job.slide), status, reason, seconds, round(self.megapixels, 2))
        return Step(self.job, blocks_done=self.blocks if status == "failed" else 0, row=row)
