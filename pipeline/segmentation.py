"""Segments slides: what one slide takes, as tasks that return numbers, and how many slides go through a cluster.

A slide is planned (tissue found, canvas made), then its tiles are run in blocks of neighbours, then it is finished in two
parts (pyramid and pictures; regions and measurements) and sealed. A tile is done when its shards are on disk, whole, a slide
when its provenance is; so a run that was killed at any moment is finished by running it again. A worker that outlives its
command may still write; so what plans or seals a slide has its folder alone, and all others share a lock on it.

What only tasks use is imported in them, so that a command has its workers sooner.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from pipeline import ensemble
from pipeline.ahead import ahead
from pipeline.blending import TILE_SIZE
from pipeline.canvas import Canvas, create_canvas, open_canvas
from pipeline.errors import CanvasError, FullfieldError, WorkerError, refusal
from pipeline.files import locked, write_json
from pipeline.grid import Tile
from pipeline.machine import release_memory
from pipeline.runtime import load_engine
from pipeline.slide_job import (
    CANVAS,
    MADE,
    MADE_OF_SOME,
    PROVENANCE,
    OpenedJob,
    SlideJob,
    finished_mm2,
    is_finished,
    job_engine,
    job_tile_size,
    too_coarse,
)
from pipeline.tasks import Cluster, Outcome
from pipeline.tiling import tile_size_for

_BLOCK_TILES = 2  # a block is this many tiles wide and high: what neighbours read twice, their halos, is in memory then
_SLIDES_AT_ONCE = 4  # and no fewer than there are workers, which small slides would leave without work


@dataclass(frozen=True)
class Plan:
    """What is left to do of a slide with so much tissue: blocks of tile indices, (row, column). `finished`: nothing is.

    `remark` is what a reader of the slide's results has to know.
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    tissue_mm2: float
    remark: str = ""
    finished: bool = False


class Part(Enum):
    """The parts of what is made of a finished canvas."""

    REGIONS = "regions"
    PYRAMID = "pyramid"


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

    A slide that was finished before is `skipped`.
    """

    job: SlideJob
    blocks: int = 0
    blocks_done: int = 0
    megapixels: float = 0.0
    row: Row | None = None
    skipped: bool = False


def with_tile_sizes(jobs: Sequence[SlideJob], cluster: Cluster, memory_gib: float | None) -> list[SlideJob]:
    """The same jobs, each with a tile size to fall back on where neither the user nor a canvas says one: the same for all,
    chosen in a worker (or `blending.TILE_SIZE` where they are blended).

    A canvas keeps its tile size so that a slightly different measurement never refuses to go on with it. Raises
    ClusterError where no tile fits into `memory_gib`, and CheckpointError where the model cannot be loaded. Where the slides
    together kill the workers that try them, one of them by itself decides.
    """
    jobs = [replace(job, chosen_tile_size=TILE_SIZE) if job.settings.blend else job for job in jobs]
    fresh = [job for job in jobs if not _has_tile_size(job)]
    if fresh:
        for tried in (fresh, *([job] for job in fresh if len(fresh) > 1)):
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
    waiting, active, under_way = iter(jobs), dict[str, _Active](), 0

    def begin() -> int:
        """Begin as many slides as there is room for."""
        room = max(_SLIDES_AT_ONCE, cluster.workers()) - under_way
        begun = {job.slide_id: _Active(job, cluster) for job in itertools.islice(waiting, max(room, 0))}
        active.update(begun)
        return len(begun)

    under_way += begin()
    for outcome in cluster:
        state = active[outcome.key]
        step = state.failed(outcome.error) if outcome.error else state.advanced(outcome.value)
        yield step
        if step.row is not None:
            under_way -= 1
            under_way += begin()


class _Active:
    """A slide that is under way: how many of its blocks are still out, and what they have cost."""

    def __init__(self, job: SlideJob, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.started, self.blocks, self.megapixels = time.monotonic(), 0, 0.0
        self.tissue_mm2, self.remark, self.parts, self.over = 0.0, "", 0, False
        cluster.submit(job.slide_id, plan_slide, job)

    def advanced(self, value: Plan | float | Part | None) -> Step:
        """Count a task that ended well, and submit what follows from it."""
        if self.over:
            return Step(self.job)
        if isinstance(value, Plan):
            return self._planned(value)
        if value is None:
            return self._ended("done", self.remark)
        if isinstance(value, Part):
            self.parts -= 1
            if not self.parts:
                self.cluster.submit(self.job.slide_id, seal_slide, self.job, self.tissue_mm2)
            return Step(self.job)
        self.blocks -= 1
        self.megapixels += value
        if not self.blocks:
            self._finish()
        return Step(self.job, blocks_done=1, megapixels=value)

    def failed(self, error: BaseException) -> Step:
        """The slide is over; what is still out for it no longer counts."""
        if self.over:
            return Step(self.job)
        self.cluster.cancel(self.job.slide_id)
        return self._ended("failed", self._reason(error))

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, OSError) and (told := refusal(error, self.job.folder)):
            return told
        return str(error) if isinstance(error, FullfieldError) else f"{type(error).__name__}: {error}"

    def _planned(self, plan: Plan) -> Step:
        if plan.finished:
            return replace(self._ended("done", plan.remark), skipped=True)
        self.blocks, self.tissue_mm2, self.remark = len(plan.blocks), plan.tissue_mm2, plan.remark
        for block in plan.blocks:
            self.cluster.submit(self.job.slide_id, segment_block, self.job, block)
        if not plan.blocks:
            self._finish()
        return Step(self.job, blocks=len(plan.blocks))

    def _finish(self) -> None:
        self.parts = len(Part)
        for part in Part:
            self.cluster.submit(self.job.slide_id, finish_slide, self.job, part)

    def _ended(self, status: str, reason: str) -> Step:
        self.over = True
        seconds = round(time.monotonic() - self.started, 2)
        row = Row(self.job.slide_id, str(self.job.slide), status, reason, seconds, round(self.megapixels, 2))
        return Step(self.job, blocks_done=self.blocks if status == "failed" else 0, row=row)


def get_ready(job: SlideJob) -> None:
    """Load what a worker needs for such a job. Its errors are those of the tasks that follow."""
    import pipeline.finishing  # noqa: F401 - kept by the process

    load_engine(job.model, job_engine(job))


def plan_slide(job: SlideJob) -> Plan:
    """Find the tissue, make or reopen the canvas, and list the tiles that are not done.

    Where the model has a normalisation, the slide's staining is estimated as the canvas is made, and kept in it. Raises
    SlideError where the slide cannot be read, CanvasError where the folder holds another run's output, and EngineError where
    the way in which this worker would run the model was never held against exact.
    """
    if job.engine.precision != "exact":
        from pipeline.approval import require_approval

        for member in ensemble.members(job.model):
            require_approval(job_engine(job), member)
    OpenedJob(job)  # what cannot be opened leaves no folder
    path = job.folder / CANVAS
    with locked(job.folder):
        opened = OpenedJob(job)  # another command may just have made the canvas, whose tile size then counts
        identity = opened.identity()
        if path.exists():
            canvas = open_canvas(path, identity)
            if is_finished(job):
                return Plan((), 0.0, _remark(opened, canvas, finished_mm2(job)), finished=True)
            (job.folder / PROVENANCE).unlink(missing_ok=True)  # it vouches for files that are now made anew
            tissue = opened.tissue()
        else:
            tissue, lattice = opened.tissue(), opened.grid.lattice.shrink(opened.spec.output_stride)
            job.folder.mkdir(exist_ok=True)
            for name in (PROVENANCE, *MADE, *MADE_OF_SOME):
                (job.folder / name).unlink(missing_ok=True)
            write_size = opened.grid.write_size // opened.spec.output_stride
            measured, shown = opened.measured(tissue), opened.slide.base.mpp
            canvas = create_canvas(path, lattice, opened.spec.classes, write_size, identity, measured, shown)
        done = set(canvas.whole())
    release_memory()  # what looking for tissue took is in other pieces than tiles need
    blocks = defaultdict(list)
    for tile in opened.grid:
        if tile.index not in done and tissue.fraction(tile.write_roi, opened.grid.lattice) > 0:
            blocks[tile.index[0] // _BLOCK_TILES, tile.index[1] // _BLOCK_TILES].append(tile.index)
    tissue_mm2 = tissue.area_um2 / 1e6
    return Plan(tuple(tuple(block) for block in blocks.values()), tissue_mm2, _remark(opened, canvas, tissue_mm2))


def _remark(opened: OpenedJob, canvas: Canvas, tissue_mm2: float) -> str:
    """What nobody should overlook: that nothing was looked at, or that the slide is not as the model knows slides."""
    nothing = "" if tissue_mm2 else "no tissue was found, and nothing examined"
    coarse = too_coarse(opened.slide.base.mpp, opened.spec.mpp)
    problem = opened.problem(canvas)
    return "; ".join(filter(None, (nothing, coarse, problem and f"the stain is left as scanned: {problem}")))


def segment_block(job: SlideJob, block: Sequence[tuple[int, int]]) -> float:
    """Run the model over some tiles and write each to the shard that is its alone; returns the megapixels segmented.

    Raises CanvasError where model or slide are no longer what the canvas was begun with.
    """
    engine, opened = load_engine(job.model, job_engine(job)), OpenedJob(job)
    canvas = open_canvas(job.folder / CANVAS, opened.identity())

    def write(done: tuple[Tile, np.ndarray]) -> int:
        tile, probabilities = done
        canvas.write(tile.target(opened.spec.output_stride), probabilities)
        return tile.write_roi.area

    tiles = (opened.grid[index] for index in block)
    with locked(job.folder, shared=True):
        predicted = opened.stitching.predict(opened.pixels(canvas), opened.grid, tiles, engine)
        return sum(pixels for _, pixels in ahead(write, predicted)) / 1e6


def finish_slide(job: SlideJob, part: Part) -> Part:
    """Make a part of what follows from the canvas; the two parts may go side by side, the same of two commands may not."""
    from pipeline.finishing import write_pyramid, write_regions

    opened, own = OpenedJob(job), job.folder.with_name(f"{job.folder.name}.{part.value}")
    with locked(job.folder, shared=True), locked(own):
        canvas = open_canvas(job.folder / CANVAS, opened.identity())
        if part is Part.PYRAMID:
            write_pyramid(job.folder, opened.slide, canvas, opened.tissue(), len(ensemble.members(job.model)) > 1)
        else:
            rest, smallest = opened.spec.rest, job.settings.min_region_um2
            write_regions(job.folder, opened.slide, canvas, opened.tissue(), rest, smallest)
    return part


def seal_slide(job: SlideJob, tissue_mm2: float) -> None:
    """Clear away what killed workers left, and write the provenance, which comes last and says that the slide is done."""
    opened = OpenedJob(job)
    with locked(job.folder):
        canvas = open_canvas(job.folder / CANVAS, opened.identity())
        canvas.remove_partial_files()
        write_json(job.folder / PROVENANCE, opened.provenance(canvas, tissue_mm2))
