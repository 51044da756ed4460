"""How large tiles are and what a slide will take, from what a few tiles took (probe.py); and how many workers are started.

A tile of t pixels reads a window of t + 2 h, so that the halo costs (1 + 2 h / t)^2: larger tiles spend less on halos, more
on glass round the tissue, and hold more memory. No window is larger than its slide. The tissue is found in a coarse view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from pipeline import ensemble
from pipeline.blending import TILE_SIZE
from pipeline.errors import ClusterError, SlideError
from pipeline.geometry import Lattice, Mpp
from pipeline.grid import Grid, round_up
from pipeline.machine import cores, has_gpu, memory_left, threads
from pipeline.network import ModelSpec
from pipeline.probe import PROBE_SIZES, Probe, known_probe, probe
from pipeline.runtime import EXACT, holds_turned, open_engine, settled
from pipeline.settings import EngineSettings, SegmentationSettings, TissueSettings
from pipeline.slide import Slide, open_slide
from pipeline.stitching import Exact, Stitching, stitching

if TYPE_CHECKING:
    from pipeline.tissue import Tissue

GIB = 2**30

_STEP, _LARGEST = 256, 4096  # pixels: tile sizes are multiples of the first, up to the second where windows then still grow
_LEAST_SAVING = 0.02  # of the work, by doubling the tile: less is not worth its memory
_TILES_ACROSS = 64  # at most, where memory allows: two files a tile, so hundreds of a slide and not hundreds of thousands
_USUAL_GIB, _MOST_GIB = 2.0, 3.0  # of a worker, where nobody says how much; the latter where the halo costs over `_DEAR`
_DEAR = 1.2
_WORTH = 1.1  # times the pixels, at most, are read so that the halo is not dear
_SHARE = 0.8  # of the free memory of the machine or the GPU, or of all that a container may take
_SAMPLED = 4  # slides at most whose tissue is looked for, the largest among them, by this many um/px or more
_COARSE_MPP = 32.0
_PYRAMID = 4 / 3  # pixels of all levels, relative to the finest
_LEAST_WORK = 15_000_000  # pixels for each of several workers; with less, starting one costs more than it saves
_THREADS = 4  # of a worker on a machine of many processors, where what one thread does, such as outlines, weighs more


@dataclass(frozen=True)
class Estimate:
    """What segmenting a slide will take. `pixels` counts those of tiles with tissue, at the model's scale.

    `halo_cost` is the pixels computed for each that is written, on this slide, whose border cuts windows and tiles.
    `seconds` leaves out starting up and what is made of a finished canvas; `peak_bytes` is of each worker. `output_bytes` is
    the canvas with its pyramid, at the rate at which the probe's tiles were compressed.
    """

    tile_size: int
    halo_cost: float
    tiles: int
    tissue_tiles: int
    pixels: int
    workers: int
    seconds: float
    peak_bytes: int
    output_bytes: int


def tile_size_for(
    slides: Sequence[tuple[Path, float | None]],
    model: Path,
    memory_gib: float | None,
    tissue: TissueSettings,
    settings: EngineSettings = EXACT,
) -> int:
    """One tile size for all slides, given as path and mpp, with the model in a folder run in one way; see `choose`.

    The tiles that are run are of the slide that costs most to read; tissue is looked for in a few. Slides that cannot be
    read do not count. What was measured before, of such a slide with this model on this machine, is not measured again.
    """
    spec = ensemble.load_spec(model)
    scale, way = Mpp.square(spec.mpp), stitching(spec, blended=False)
    opened = []
    for path, mpp in slides:
        with suppress(SlideError):
            opened.append(open_slide(path, mpp))
    opened.sort(key=lambda slide: slide.levels[slide.best_level(scale)].mpp.area_um2)
    sample = _sample(opened, scale, tissue)
    for slide in opened if sample else ():
        with suppress(SlideError):
            others = [other.base.at(scale) for other in opened]
            return choose(spec, sample, known_probe(slide, model, settings, way), memory_gib, others)
    return _STEP


def _sample(slides: Sequence[Slide], scale: Mpp, settings: TissueSettings) -> list[tuple[Lattice, Tissue]]:
    """A few slides, from the largest to smaller ones, as `choose` takes them; others where one of them cannot be read."""
    from pipeline.tissue import find_tissue

    coarse = settings.model_copy(update={"mpp": max(settings.mpp, _COARSE_MPP)})
    by_size = sorted(slides, key=lambda slide: -max(slide.base.at(scale).shape))
    step = max(len(by_size) // _SAMPLED, 1)
    first = by_size[::step][:_SAMPLED]
    found: list[tuple[Lattice, Tissue]] = []
    for slide in (*first, *(other for other in by_size if other not in first)):
        if len(found) == len(first):
            break
        with suppress(SlideError):
            found.append((slide.base.at(scale), find_tissue(slide, coarse)))
    return found


def foresee(
    path: Path,
    mpp: float | None,
    model: Path,
    settings: TissueSettings,
    wanted: SegmentationSettings,
    engine_settings: EngineSettings,
    workers: int,
) -> Estimate:
    """What segmenting a slide with the model in a folder takes `workers` such as this, with the tiles that it would get.

    Time and memory are those of a few tiles where there is most tissue.
    """
    from pipeline.tissue import find_tissue

    spec, slide = ensemble.load_spec(model), open_slide(path, mpp)
    way, lattice = stitching(spec, wanted.blend), slide.base.at(Mpp.square(spec.mpp))
    tissue = find_tissue(slide, settings)
    if wanted.tile_size is not None:
        size = wanted.tile_size
    else:
        size = TILE_SIZE if wanted.blend else tile_size_for([(path, mpp)], model, None, settings, engine_settings)
    places = (tile.write_roi for tile in way.grid(lattice, PROBE_SIZES[-1]))
    place = max(places, key=lambda place: tissue.fraction(place, lattice))
    chosen = settled(engine_settings)
    found = probe(slide, lattice, open_engine(model, chosen), place, way, holds_turned(chosen))
    return estimate(way, lattice, tissue, found, size, workers)


def choose(
    spec: ModelSpec,
    slides: Sequence[tuple[Lattice, Tissue]],
    found: Probe,
    memory_gib: float | None,
    others: Sequence[Lattice] = (),
) -> int:
    """The tile size, in pixels, with which the tissue of these slides is read least, such that their windows and those of
    `others` fit into the memory of a worker.

    Sizes at which the halo costs more than a fifth are taken only where all others read a tenth more: so large slides and
    small ones, which differ in how much glass lies in their tiles, get tiles of one size, and take as much memory.
    `memory_gib` None: as much as the machine has free, up to 2 GiB, or 3 where the halo would cost more than a fifth; beside
    a GPU, whose memory has to do as well, as much as the machine has free. Raises ClusterError where not even the smallest
    tile fits.
    """
    way, step = Exact(spec.required_halo(), spec.stride), math.lcm(spec.stride, _STEP)
    extent = max(max(lattice.shape) for lattice, _ in slides)
    least = round_up(-(-extent // _TILES_ACROSS), step)
    largest = max(least, _largest_useful(way, step))
    if extent <= largest + 2 * way.halo:  # one window has all of the slide: larger tiles take no more memory
        largest = round_up(extent, step)
    lattices = {*others, *(lattice for lattice, _ in slides)}
    windows = {
        size: max(_held(way, way.grid(lattice, size), found) for lattice in lattices)
        for size in range(step, largest + 1, step)
    }
    sizes = [size for size, pixels in windows.items() if found.gpu_peak_bytes(pixels) <= _SHARE * found.gpu_free_bytes]
    fitting: list[int] = []
    limits = _default_limits(found) if memory_gib is None else [memory_gib]
    for limit in limits:
        fitting = [size for size in sizes if found.peak_bytes(windows[size]) <= limit * GIB]
        if fitting and way.cost(fitting[-1]) <= _DEAR:
            break
    if not sizes:
        raise _too_small_gpu(step, found.gpu_free_bytes, found.gpu_peak_bytes(windows[step]))
    if not fitting:
        raise _too_little(limits[-1], step, found.peak_bytes(windows[step]))
    few = [size for size in fitting if size >= least] or fitting[-1:]
    read = {size: sum(_read(way, *slide, size) for slide in slides) for size in few}
    cheap = [size for size in few if way.cost(size) <= _DEAR and read[size] <= _WORTH * min(read.values())]
    return min(cheap or few, key=lambda size: (read[size], size))


def estimate(way: Stitching, lattice: Lattice, tissue: Tissue, found: Probe, tile_size: int, workers: int) -> Estimate:
    """What segmenting a slide with tiles of a size will take `workers` side by side, each as fast as `found` says."""
    grid = way.grid(lattice, tile_size)
    pixels = [tile.write_roi.area for tile in grid if tissue.fraction(tile.write_roi, lattice) > 0]
    computed = way.computed(grid)
    return Estimate(
        tile_size=grid.write_size,
        halo_cost=len(pixels) * computed / sum(pixels) if pixels else way.cost(grid.write_size),
        tiles=len(grid),
        tissue_tiles=len(pixels),
        pixels=sum(pixels),
        workers=workers,
        seconds=len(pixels) * computed / found.pixels_per_second / workers,
        peak_bytes=round(found.peak_bytes(_held(way, grid, found))),
        output_bytes=round(sum(pixels) * found.output_bytes * _PYRAMID),
    )


def _largest_useful(way: Exact, step: int) -> int:
    """The smallest tile size, in pixels, at which doubling saves less than _LEAST_SAVING of the work; at most _LARGEST."""
    sizes = range(step, _LARGEST + 1, step)
    saved = ((size, 1 - way.cost(2 * size) / way.cost(size)) for size in sizes)
    return next((size for size, saving in saved if saving < _LEAST_SAVING), _LARGEST)


def local_workers(slides: Iterable[tuple[Path, float | None]], scale: Mpp) -> int:
    """How many share the processors, where slides, given as path and mpp, have work for them at `scale`.

    That is two, so that one reads, writes or outlines while the other computes, or one for every four processors where that
    is more. A GPU is not shared, and each has memory of its own. Slides that cannot be read do not count.
    """
    if cores() == 1 or has_gpu():
        return 1
    most, pixels = min(max(cores() // _THREADS, 2), int(free_gib() // _USUAL_GIB)), 0
    for path, mpp in slides:
        with suppress(SlideError):
            pixels += open_slide(path, mpp).base.at(scale).roi.area
        if pixels >= most * _LEAST_WORK:
            break
    return max(min(most, pixels // _LEAST_WORK), 1)


def free_gib() -> float:
    """Memory that all workers of this machine may take together."""
    from distributed.system import MEMORY_LIMIT  # of the container, where there is one

    return _SHARE * float(min(psutil.virtual_memory().available, MEMORY_LIMIT, memory_left())) / GIB


def _default_limits(found: Probe) -> list[float]:
    own = free_gib() * min(threads() / cores(), 1)  # workers share the memory as they share the processors
    if found.gpu_free_bytes:  # CUDA alone holds some GiB
        return [own]
    return [min(own, _USUAL_GIB), min(own, _MOST_GIB)]


def _held(way: Stitching, grid: Grid, found: Probe) -> int:
    """Pixels for which an engine holds memory while a grid's tiles are run."""
    height, width = grid.read_shape
    return way.computed(grid) * (2 if found.turned and way.exact and height != width else 1)  # blended windows are square


def _read(way: Exact, lattice: Lattice, tissue: Tissue, size: int) -> int:
    """Pixels of all windows with tissue (of all windows where there is none): the last tiles of rows and columns read whole
    windows, too.
    """
    grid = way.grid(lattice, size)
    x_scale, y_scale = tissue.lattice.scale_to(lattice)
    rows, columns = (index + 0.5 for index in np.nonzero(tissue.mask))
    rows = np.minimum(rows * y_scale, lattice.height - 1) // grid.write_size
    columns = np.minimum(columns * x_scale, lattice.width - 1) // grid.write_size
    return (np.unique(rows * grid.shape[1] + columns).size or len(grid)) * math.prod(grid.read_shape)


def _too_small_gpu(size: int, free: float, needed: float) -> ClusterError:
    return ClusterError(
        "the GPU",
        f"{free / GIB:.2f} GiB of memory that are free",
        f"{needed / _SHARE / GIB:.2f} GiB, for tiles of {size} px",
        "Free memory on it, set a smaller `segmentation.tile_size` (--tile-size), or compute on the processor: "
        "CUDA_VISIBLE_DEVICES= in the environment.",
    )


def _too_little(limit_gib: float, size: int, needed: float) -> ClusterError:
    return ClusterError(
        "cluster.worker_memory_gib",
        f"{limit_gib:.2f} GiB for a worker",
        f"{needed / GIB:.2f} GiB, which tiles of {size} px take",
        "Allow more, free memory on this machine, or set a smaller `segmentation.tile_size` (--tile-size).",
    )
