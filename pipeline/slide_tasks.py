"""What segmenting one slide takes, as tasks that return numbers.

    plan_slide --> segment_block, ... --> finish_slide, ... --> seal_slide

Planning finds the tissue, for all, and makes the canvas; a block is tiles that lie side by side; finishing makes what
follows from the canvas, part by part; sealing writes the provenance. A tile is done when its shards are on disk, whole, a
slide when its provenance is; so a run that was killed at any moment is finished by running it again. A worker that outlives
its command may still write; so what plans or seals a slide has its folder alone, and all others share a lock on it.

What only tasks use is imported in them, so that a command has its workers sooner.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline import ensemble
from pipeline.ahead import ahead
from pipeline.canvas import Canvas, create_canvas, open_canvas
from pipeline.files import locked, write_json
from pipeline.grid import Grid, Tile
from pipeline.machine import release_memory
from pipeline.pyramid import CoarseShard, remove_coarse
from pipeline.runtime import load_engine, require_ability
from pipeline.shards import Place
from pipeline.slide_job import (
    CANVAS,
    FOUND_TISSUE,
    MADE,
    MADE_OF_SOME,
    PROVENANCE,
    OpenedJob,
    SlideJob,
    finished_mm2,
    is_finished,
    job_engine,
    too_coarse,
    two_codes,
)

if TYPE_CHECKING:
    from pipeline.tissue import Tissue

_BLOCK_TILES = 2
"""A block is this many tiles wide and high, as a coarse shard is. What OpenSlide decoded for a halo is in its cache then."""


@dataclass(frozen=True)
class Plan:
    """What is left to do of a slide with so much tissue: blocks of tile indices, (row, column). `finished`: nothing is.

    `bands` says how many tiles each row of tiles will have. `remark` is what a reader of the slide's results has to know.
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    bands: Mapping[int, int]
    tissue_mm2: float
    remark: str = ""
    finished: bool = False


@dataclass(frozen=True)
class Busy:
    """Another command is at the slide, which cannot be planned meanwhile."""


@dataclass(frozen=True)
class Segmented:
    """What a block was: its rows of tiles, and its megapixels."""

    rows: frozenset[int]
    megapixels: float


Made = Literal["band", "regions", "pyramid", "tissue"]


@dataclass(frozen=True)
class Part:
    """Something that is made of a canvas: what is in one `band`, or the `regions` of all bands together; the `pyramid` with
    its pictures; the picture of the `tissue`.
    """

    made: Made
    band: int = 0


def get_ready(job: SlideJob) -> None:
    """Load what a worker needs for such a job. Its errors are those of the tasks that follow.

    It does not look for the slide's canvas: a network file system that finds none would not find it for a while afterwards.
    """
    import pipeline.finishing  # noqa: F401 - kept by the process

    load_engine(job.model, job.engine)


def plan_slide(job: SlideJob, wait: bool = True) -> Plan | Busy:
    """Find the tissue, make or reopen the canvas, and list the tiles that are not done.

    Where another command is at the slide, it ends at once unless it is to `wait`.

    Where the model has a normalisation, the slide's staining is estimated as the canvas is made, and kept in it. Raises
    SlideError where the slide cannot be read, CanvasError where the folder holds another run's output, and EngineError where
    this worker cannot run the model in that way, or would do so in one that was never held against exact.
    """
    if job.engine.precision != "exact":
        from pipeline.approval import require_approval

        require_ability(job_engine(job))
        for member in ensemble.members(job.model):
            require_approval(job_engine(job), member)
    OpenedJob(job)  # what cannot be opened leaves no folder
    with locked(job.folder, wait=wait) as free:
        if not free:
            return Busy()
        opened = OpenedJob(job)  # another command may just have made the canvas, whose tile size then counts
        if begun := (job.folder / CANVAS).exists():
            canvas = open_canvas(job.folder / CANVAS, opened.identity())
            if is_finished(job):
                return Plan((), {}, 0.0, _remark(opened, canvas, finished_mm2(job)), finished=True)
            (job.folder / PROVENANCE).unlink(missing_ok=True)  # it vouches for files that are now made anew
            tissue = opened.find_tissue()
        else:
            tissue = opened.find_tissue()
            canvas = _begin(opened, tissue)
        done = set(canvas.whole() if begun else ())  # a network file system would go on telling of empty folders for a while
        left = [index for index in _with_tissue(opened.grid, tissue) if index not in done]
        if begun:
            remove_coarse(canvas, left)
        tissue.save(job.folder / FOUND_TISSUE)  # other workers need not look for it
    release_memory()  # what looking for tissue took is in other pieces than tiles need
    blocks = defaultdict[Place, list[Place]](list)
    for row, column in left:
        blocks[row // _BLOCK_TILES, column // _BLOCK_TILES].append((row, column))
    bands = Counter(sorted(row for row, _ in (*done, *left)))
    tissue_mm2 = tissue.area_um2(opened.slide.base) / 1e6
    planned = tuple(tuple(block) for block in blocks.values())
    return Plan(planned, dict(bands), tissue_mm2, _remark(opened, canvas, tissue_mm2))


def _begin(opened: OpenedJob, tissue: Tissue) -> Canvas:
    """Make the canvas of a slide, and remove what an earlier one may have left."""
    folder, stride = opened.job.folder, opened.spec.output_stride
    folder.mkdir(exist_ok=True)
    for name in (PROVENANCE, *MADE, *MADE_OF_SOME):
        (folder / name).unlink(missing_ok=True)
    lattice, write_size = opened.grid.lattice.shrink(stride), opened.grid.write_size // stride
    measured, shown = opened.measured(tissue), opened.slide.base.mpp
    return create_canvas(folder / CANVAS, lattice, opened.spec.classes, write_size, opened.identity(), measured, shown)


def _with_tissue(grid: Grid, tissue: Tissue) -> Iterator[Place]:
    """(row, column) of the tiles that hold tissue."""
    return (tile.index for tile in grid if tissue.fraction(tile.write_roi, grid.lattice) > 0)


def _remark(opened: OpenedJob, canvas: Canvas, tissue_mm2: float) -> str:
    """What nobody should overlook: that nothing was looked at, that the slide is not as the model knows slides, or that it
    is segmented partly with other code.
    """
    nothing = "" if tissue_mm2 else "no tissue was found, and nothing examined"
    coarse = too_coarse(opened.slide.base.mpp, opened.spec.mpp)
    problem = opened.problem(canvas)
    stain = problem and f"the stain is left as scanned: {problem}"
    return "; ".join(filter(None, (nothing, coarse, stain, two_codes(opened.job, canvas))))


def segment_block(job: SlideJob, block: Sequence[tuple[int, int]]) -> Segmented:
    """Run the model over some tiles and write each to the shard that is its alone; those that are done are left as they are.

    Raises CanvasError where model or slide are no longer what the canvas was begun with.
    """
    engine, opened = load_engine(job.model, job_engine(job)), OpenedJob(job)
    canvas = open_canvas(job.folder / CANVAS, opened.identity())
    coarse = CoarseShard(canvas, (block[0][0] // _BLOCK_TILES, block[0][1] // _BLOCK_TILES))

    def write(done: tuple[Tile, np.ndarray]) -> int:
        tile, probabilities = done
        coarse.add(tile.index, *canvas.write(tile.target(opened.spec.output_stride), probabilities))
        return tile.write_roi.area

    with locked(job.folder, shared=True):
        tiles = [opened.grid[index] for index in block if not canvas.is_whole(index, 0)]  # another command may be at them
        predicted = opened.stitching.predict(opened.pixels(canvas), opened.grid, tiles, engine)
        area = sum(pixels for _, pixels in ahead(write, predicted))
        coarse.store()
    return Segmented(frozenset(row for row, _ in block), area / 1e6)


def finish_slide(job: SlideJob, part: Part, bands: Mapping[int, int]) -> Part:
    """Make a part of what follows from the canvas, whose rows of tiles have as many tiles as `bands` says.

    A band is for when its tiles are done, the pyramid for when all are, the regions for when all bands are. Raises
    CanvasError where the file system does not tell of all these tiles.
    """
    from pipeline import finishing

    opened, smallest = OpenedJob(job), job.settings.min_region_um2
    rest = opened.spec.rest
    with locked(job.folder, shared=True):
        canvas = open_canvas(job.folder / CANVAS, opened.identity())
        match part:
            case Part("band", band):
                canvas.require({band: bands[band]})
                finishing.outline_band(job.folder, opened.slide, canvas, opened.tissue(), rest, smallest, band)
            case Part("regions"):
                canvas.require(bands)
                for band in finishing.missing_bands(job.folder, canvas, smallest):  # another command has cleared them away
                    finishing.outline_band(job.folder, opened.slide, canvas, opened.tissue(), rest, smallest, band)
                finishing.write_regions(job.folder, opened.slide, canvas, rest, smallest)
            case Part("pyramid"):
                canvas.require(bands)
                with locked(job.folder.with_name(f"{job.folder.name}.pyramid")):  # another command may be at it
                    finishing.write_pyramid(job.folder, opened.slide, canvas, len(ensemble.members(job.model)) > 1)
            case Part("tissue"):
                finishing.write_tissue(job.folder, opened.slide, opened.tissue())
    return part


def seal_slide(job: SlideJob, tissue_mm2: float, bands: Mapping[int, int]) -> None:
    """Clear away bands, tissue and what killed workers left, and write the provenance, which comes last: the slide is done.

    Raises CanvasError as `finish_slide` does.
    """
    from pipeline.finishing import remove_bands

    opened = OpenedJob(job)
    with locked(job.folder):
        canvas = open_canvas(job.folder / CANVAS, opened.identity())
        canvas.require(bands)
        canvas.remove_partial_files()
        remove_bands(job.folder)
        (job.folder / FOUND_TISSUE).unlink(missing_ok=True)
        write_json(job.folder / PROVENANCE, opened.provenance(canvas, tissue_mm2))
