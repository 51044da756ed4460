"""Segments slides: what one slide takes, as tasks that return numbers, and how many slides go through a cluster.

A slide is planned (tissue found, canvas made), then its tiles are run in blocks of neighbours, then it is finished (pyramid,
regions, measurements, pictures). A tile is done when its shard is on disk, a slide when its provenance is; so a run that was
killed at any moment is finished by running it again. A worker that outlives its command may still write; so blocks share a
lock on their slide's folder, and what plans or finishes the slide has it alone.

What only tasks use is imported in them, so that a command has its workers sooner.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import __version__, ensemble
from pipeline.ahead import ahead
from pipeline.blending import TILE_SIZE
from pipeline.canvas import Canvas, create_canvas, open_canvas
from pipeline.cluster import Cluster
from pipeline.config import EngineSettings, SegmentationSettings, TissueSettings
from pipeline.errors import CanvasError, FullfieldError
from pipeline.files import locked, write_text
from pipeline.geometry import Mpp
from pipeline.grid import Tile
from pipeline.network import ModelSpec
from pipeline.runtime import EXACT, describe, load_engine, settled
from pipeline.slide import Pixels, Slide, open_slide
from pipeline.staining import Staining
from pipeline.stitching import Stitching, stitching
from pipeline.tiling import tile_size_for

if TYPE_CHECKING:
    from pipeline.tissue import Tissue

CANVAS, PROVENANCE = "segmentation.ome.zarr", "provenance.json"
_STAINING = "staining"  # of what the canvas says was measured
_BLOCK_TILES = 4  # a block is this many tiles wide and high: neighbours share halos and the decoder's cache
_SLIDES_AT_ONCE = 4


@dataclass(frozen=True)
class SlideJob:
    """One slide to segment with the model in the folder `model`, into `folder`.

    `mpp`, if any, counts before the scale that the scan states.
    """

    slide_id: str
    slide: Path
    mpp: float | None
    model: Path
    folder: Path
    settings: SegmentationSettings
    tissue: TissueSettings
    engine: EngineSettings = EXACT


@dataclass(frozen=True)
class Plan:
    """What is left to do: blocks of tile indices, (row, column). `finished` says that nothing is."""

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    finished: bool


@dataclass(frozen=True)
class Row:
    """How a slide ended, as `slides.csv` has it; `megapixels` counts what this call segmented, at the model's mpp."""

    slide_id: str
    slide: str
    status: str
    reason: str
    seconds: float
    megapixels: float

    @property
    def skipped(self) -> bool:
        """Whether the slide was done already."""
        return self.status == "done" and self.megapixels == 0


@dataclass(frozen=True)
class Step:
    """Something that happened: `blocks` more to do, or `blocks_done` of `megapixels`, or a slide that ended with a `row`."""

    job: SlideJob
    blocks: int = 0
    blocks_done: int = 0
    megapixels: float = 0.0
    row: Row | None = None


def with_tile_sizes(jobs: Sequence[SlideJob], cluster: Cluster, memory_gib: float | None) -> list[SlideJob]:
    """The same jobs, each with a tile size: the user's; else its canvas's; else one for all others, chosen in a worker (or
    `blending.TILE_SIZE` where they are blended).

    A canvas keeps its tile size so that a slightly different measurement never refuses to go on with it. Raises
    ClusterError where no tile fits into `memory_gib`, and CheckpointError where the model cannot be loaded.
    """
    sizes = dict[str, int]()
    for job in jobs:
        with suppress(CanvasError):
            sizes[job.slide_id] = _tile_size(job)
    sizes |= {job.slide_id: TILE_SIZE for job in jobs if job.settings.blend and job.slide_id not in sizes}
    fresh = [job for job in jobs if job.slide_id not in sizes]
    if fresh:
        slides = [(job.slide, job.mpp) for job in fresh]
        cluster.submit("tile size", tile_size_for, slides, fresh[0].model, memory_gib, fresh[0].tissue, fresh[0].engine)
        (outcome,) = cluster
        if outcome.error:
            raise outcome.error
        sizes |= {job.slide_id: outcome.value for job in fresh}
    settings = (job.settings.model_copy(update={"tile_size": sizes[job.slide_id]}) for job in jobs)
    return [replace(job, settings=chosen) for job, chosen in zip(jobs, settings, strict=True)]


def segment_slides(jobs: Iterable[SlideJob], cluster: Cluster) -> Iterator[Step]:
    """Segment slides, a few at a time, and say what happens as it happens. A slide that fails does not stop the others."""
    waiting, active = iter(jobs), {}
    for job in itertools.islice(waiting, _SLIDES_AT_ONCE):
        active[job.slide_id] = _Active(job, cluster)
    for outcome in cluster:
        state = active[outcome.key]
        step = state.failed(outcome.error) if outcome.error else state.advanced(outcome.value)
        yield step
        if step.row is not None:
            for job in itertools.islice(waiting, 1):
                active[job.slide_id] = _Active(job, cluster)


class _Active:
    """A slide that is under way: how many of its blocks are still out, and what they have cost."""

    def __init__(self, job: SlideJob, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.started, self.blocks, self.megapixels = time.monotonic(), 0, 0.0
        self.over = False
        cluster.submit(job.slide_id, plan_slide, job)

    def advanced(self, value: Plan | float | None) -> Step:
        """Count a task that ended well, and submit what follows from it."""
        if self.over:
            return Step(self.job)
        if isinstance(value, Plan):
            return self._planned(value)
        if value is None:
            return self._ended("done", "")
        self.blocks -= 1
        self.megapixels += value
        if not self.blocks:
            self.cluster.submit(self.job.slide_id, finish_slide, self.job)
        return Step(self.job, blocks_done=1, megapixels=value)

    def failed(self, error: BaseException) -> Step:
        """The slide is over; what is still out for it no longer counts."""
        if self.over:
            return Step(self.job)
        self.cluster.cancel(self.job.slide_id)
        reason = str(error) if isinstance(error, FullfieldError) else f"{type(error).__name__}: {error}"
        return self._ended("failed", reason)

    def _planned(self, plan: Plan) -> Step:
        if plan.finished:
            return self._ended("done", "")
        self.blocks = len(plan.blocks)
        for block in plan.blocks:
            self.cluster.submit(self.job.slide_id, segment_block, self.job, block)
        if not plan.blocks:
            self.cluster.submit(self.job.slide_id, finish_slide, self.job)
        return Step(self.job, blocks=len(plan.blocks))

    def _ended(self, status: str, reason: str) -> Step:
        self.over = True
        seconds = round(time.monotonic() - self.started, 2)
        row = Row(self.job.slide_id, str(self.job.slide), status, reason, seconds, round(self.megapixels, 2))
        return Step(self.job, blocks_done=self.blocks if status == "failed" else 0, row=row)


def plan_slide(job: SlideJob) -> Plan:
    """Find the tissue, make or reopen the canvas, and list the tiles that are not done.

    Where the model has a normalisation, the slide's staining is estimated as the canvas is made, and kept in it. Raises
    SlideError where the slide cannot be read, and CanvasError where the folder holds another run's output.
    """
    opened = _Opened(job)
    identity, path = opened.identity(), job.folder / CANVAS
    with locked(job.folder):
        if path.exists():
            canvas = open_canvas(path, identity)
            if is_finished(job):
                return Plan((), finished=True)
            tissue = opened.tissue()
        else:
            job.folder.mkdir(exist_ok=True)
            (job.folder / PROVENANCE).unlink(missing_ok=True)
            tissue, lattice = opened.tissue(), opened.grid.lattice.shrink(opened.spec.output_stride)
            write_size = opened.grid.write_size // opened.spec.output_stride
            canvas = create_canvas(path, lattice, opened.spec.classes, write_size, identity, opened.measured(tissue))
        done = set(canvas.done())
    blocks = defaultdict(list)
    for tile in opened.grid:
        if tile.index not in done and tissue.fraction(tile.write_roi, opened.grid.lattice) > 0:
            blocks[tile.index[0] // _BLOCK_TILES, tile.index[1] // _BLOCK_TILES].append(tile.index)
    return Plan(tuple(tuple(block) for block in blocks.values()), finished=False)


def is_finished(job: SlideJob) -> bool:
    """Whether the job's folder holds a finished segmentation that is this job's, not another run's."""
    try:
        provenance = json.loads((job.folder / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if not (job.folder / CANVAS).exists():
        return False
    return bool(provenance["identity"] == _Opened(job).identity())


def segment_block(job: SlideJob, block: Sequence[tuple[int, int]]) -> float:
    """Run the model over some tiles and write each to the shard that is its alone; returns the megapixels segmented."""
    opened, engine = _Opened(job), load_engine(job.model, _engine(job))
    canvas = open_canvas(job.folder / CANVAS)

    def write(done: tuple[Tile, np.ndarray]) -> int:
        tile, probabilities = done
        canvas.write(tile.target(opened.spec.output_stride), probabilities)
        return tile.write_roi.area

    tiles = (opened.grid[index] for index in block)
    with locked(job.folder, shared=True):
        predicted = opened.stitching.predict(opened.pixels(canvas), opened.grid, tiles, engine)
        return sum(pixels for _, pixels in ahead(write, predicted)) / 1e6


def finish_slide(job: SlideJob) -> None:
    """Make everything that follows from the canvas; the provenance comes last, and says that the slide is done."""
    from pipeline.finishing import Finish

    opened = _Opened(job)
    tissue = opened.tissue()
    with locked(job.folder):
        canvas = open_canvas(job.folder / CANVAS, opened.identity())
        rest, several = opened.spec.rest, len(ensemble.members(job.model)) > 1
        Finish(job.folder, opened.slide, canvas, tissue, rest, job.settings.min_region_um2, several).make()
        write_text(job.folder / PROVENANCE, json.dumps(opened.provenance(canvas, tissue), indent=2) + "\n")


def _tile_size(job: SlideJob) -> int:
    """The job's tile size, or that of the canvas which it goes on with. Raises CanvasError where there is neither."""
    if job.settings.tile_size is not None:
        return job.settings.tile_size
    return open_canvas(job.folder / CANVAS).write_size * ensemble.load_spec(job.model).output_stride


def _engine(job: SlideJob) -> EngineSettings:
    """The job's engine. Where nobody names a backend, exact output goes on with the one that it was begun with.

    So installing the other backend later neither refuses what is there nor mixes the two in one output.
    """
    if job.engine.precision == "exact" and job.engine.backend == "auto":
        ways = {f"exact, {backend}": backend for backend in ("torch", "openvino")}
        with suppress(CanvasError):
            begun = ways.get(open_canvas(job.folder / CANVAS).identity.get("engine", ""))
            if begun:
                return job.engine.model_copy(update={"backend": begun})
    return settled(job.engine, ensemble.load_spec(job.model).architecture)


class _Opened:
    """A job's slide, model and grid; opening them is cheap, since a process keeps each slide open."""

    def __init__(self, job: SlideJob) -> None:
        self.job = job
        self.slide: Slide = open_slide(job.slide, job.mpp)
        self.spec: ModelSpec = ensemble.load_spec(job.model)
        lattice = self.slide.base.at(Mpp.square(self.spec.mpp))
        self.stitching: Stitching = stitching(self.spec, job.settings.blend)
        self.grid = self.stitching.grid(lattice, _tile_size(job))

    def tissue(self) -> Tissue:
        """The slide's tissue."""
        from pipeline.tissue import find_tissue

        return find_tissue(self.slide, self.job.tissue)

    def measured(self, tissue: Tissue) -> dict[str, object]:
        """What is measured once on the slide, and then holds for every tile, whichever worker segments it."""
        if self.spec.normalisation is None:
            return {}
        from pipeline.normalised import estimate

        return {_STAINING: estimate(self.slide, tissue, self.spec.normalisation.method).to_dict()}

    def pixels(self, canvas: Canvas) -> Pixels:
        """The slide as the network sees it."""
        if self.spec.normalisation is None:
            return self.slide
        from pipeline.normalised import NormalisedSlide

        return NormalisedSlide(self.slide, Staining.from_dict(canvas.measured[_STAINING]), self.spec.normalisation)

    def identity(self) -> dict[str, str]:
        """What the labels depend on: a canvas takes tiles of no other run."""
        return {
            "fullfield": __version__,
            "model": ensemble.digest(self.job.model),
            "engine": describe(self.job.model, _engine(self.job)),
            "slide": self.slide.digest(),
            "slide_mpp": f"{self.slide.base.mpp.x} x {self.slide.base.mpp.y}",
            "classes": ", ".join(self.spec.classes.names),
            "tile_size": str(self.grid.write_size),
            "tissue": json.dumps(self.job.tissue.model_dump(), sort_keys=True),
            **({} if self.stitching.exact else {"blend": str(self.stitching)}),
        }

    def provenance(self, canvas: Canvas, tissue: Tissue) -> dict[str, object]:
        """Where this output comes from."""
        return {
            "slide_path": str(self.job.slide.resolve()),
            "model_path": str(self.job.model.resolve()),
            "members": [str(member.resolve()) for member in ensemble.members(self.job.model)],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "identity": self.identity(),
            "exact": self.stitching.exact and self.job.engine.precision == "exact",
            "stitching": str(self.stitching),
            "model_spec": self.spec.to_dict(),
            "staining": canvas.measured.get(_STAINING),
            "min_region_um2": self.job.settings.min_region_um2,
            "mpp": asdict(canvas.lattice.mpp),
            "width": canvas.lattice.width,
            "height": canvas.lattice.height,
            "tissue_mm2": tissue.area_um2 / 1e6,
            "tiles": len(canvas.done()),
        }
