"""What tiles take, measured: memory, seconds and disk of a few that are run.

Memory is measured in the process that does the work, on its own slide, with everything that a tile takes: reading ahead, the
forward pass, compressing and writing; that of a GPU by itself. What was measured of a model on a machine is kept for the
next run.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil

from pipeline import ensemble
from pipeline.canvas import create_canvas
from pipeline.files import write_text
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.machine import cache_folder, has_gpu, release_memory, threads
from pipeline.memory import cuda
from pipeline.network import ModelSpec
from pipeline.origin import source_digest
from pipeline.pyramid import CoarseShard
from pipeline.runtime import backend_version, describe, holds_turned, open_engine, settled
from pipeline.settings import EngineSettings
from pipeline.slide import Pixels, Slide
from pipeline.staining import Staining
from pipeline.stitching import Stitching

if TYPE_CHECKING:
    from pipeline.engine import Engine

PROBE_SIZES = (256, 768)
"""Pixels along a side of the tiles that are run, smaller and larger ones."""

_PROBE_TILES = 3  # the first warms up; by then a window is read while another is run and a third is written
_FRAGMENTED = 1.2  # a heap after dozens of tiles, relative to two: activations no longer fit the gaps that they left


@dataclass(frozen=True)
class Probe:
    """What a few tiles took.

    The process held `base_bytes`, and `bytes_per_pixel` for each pixel that the network computes for a tile; it computed
    `pixels_per_second` of these. `output_bytes` is on disk for each pixel of a tile, probabilities and labels together.
    `gpu_base_bytes` and `gpu_bytes_per_pixel` are the same of a GPU, `gpu_free_bytes` how many this process could have of
    it; all 0 where there is none. `turned` says that a window that is not square takes as much again for its quarter turn;
    the windows of a probe are square.
    """

    base_bytes: float
    bytes_per_pixel: float
    pixels_per_second: float
    output_bytes: float
    gpu_base_bytes: float = 0.0
    gpu_bytes_per_pixel: float = 0.0
    gpu_free_bytes: float = 0.0
    turned: bool = False

    def peak_bytes(self, pixels: int) -> float:
        """Memory of the whole process at its peak, for tiles that take so many pixels."""
        return self.base_bytes + _FRAGMENTED * self.bytes_per_pixel * pixels

    def gpu_peak_bytes(self, pixels: int) -> float:
        """Memory of the GPU at its peak, for tiles that take so many pixels."""
        return self.gpu_base_bytes + self.gpu_bytes_per_pixel * pixels


def probe(slide: Pixels, lattice: Lattice, engine: Engine, place: Roi, way: Stitching, turned: bool = False) -> Probe:
    """Run a few tiles of two sizes at `place`, a rectangle of `lattice`, and write them to a folder that is then dropped.

    The engine is a fresh one: what one that has run holds for its last windows would seem to cost nothing. `turned`: see
    `runtime.holds_turned`. Raises SlideError where the slide cannot be read.
    """
    if engine.spec.normalisation is not None:  # to whichever stain: the cost is the same
        from pipeline.normalised import NormalisedSlide

        white = Staining((255.0, 255.0, 255.0), engine.spec.normalisation.dyes)
        slide = NormalisedSlide(slide, white, engine.spec.normalisation)
    held, free = _start_measuring(), _free_on_gpu()
    small, large = (_run(slide, lattice, engine, place, way, size) for size in PROBE_SIZES)
    _start_measuring()  # the work begins with a heap that is whole again
    # The process holds no less than before: where the line would say so, it goes through what was held then.
    # What comes and goes beside the network, such as a window being read, may meet it in one tile and miss it in another.
    rise = (large.peak - small.least) / (large.pixels - small.pixels)
    slope = max(min(rise, (large.peak - held) / large.pixels), 0.0)
    on_gpu = max((large.gpu_peak - small.gpu_peak) / (large.pixels - small.pixels), 0.0)
    bases = [peak - each * large.pixels for peak, each in ((large.peak, slope), (large.gpu_peak, on_gpu))]
    return Probe(bases[0], slope, large.pixels / large.seconds, large.output_bytes, bases[1], on_gpu, free, turned)


def known_probe(slide: Slide, model: Path, settings: EngineSettings, way: Stitching) -> Probe:
    """What is kept of an earlier probe in the middle of such a slide, else a new one, which is then kept.

    What a process holds already, and what others leave of a GPU, differs from one time to the next, and is not kept. Raises
    SlideError, and EngineError where the model cannot be run in that way here.
    """
    held, spec = _start_measuring(), ensemble.load_spec(model)
    path = kept_probe(slide, spec, model, settings)
    with suppress(OSError, ValueError, TypeError):
        kept = Probe(**json.loads(path.read_text(encoding="utf-8")))
        return replace(kept, base_bytes=kept.base_bytes + held, gpu_free_bytes=_free_on_gpu())
    lattice, chosen = slide.base.at(Mpp.square(spec.mpp)), settled(settings)
    middle = Roi(lattice.width // 2, lattice.height // 2, 1, 1)
    found = probe(slide, lattice, open_engine(model, chosen), middle, way, holds_turned(chosen))
    with suppress(OSError):
        write_text(path, json.dumps(asdict(replace(found, base_bytes=found.base_bytes - held, gpu_free_bytes=0.0))))
    return found


def kept_probe(slide: Slide, spec: ModelSpec, model: Path, settings: EngineSettings) -> Path:
    """Where a probe is kept: a file of its own for everything that may change what it finds. Raises EngineError."""
    engine, scale = settled(settings), Mpp.square(spec.mpp)
    versions = [source_digest(), version("numpy"), backend_version(engine.backend)]
    device = ""
    if engine.backend == "torch" and has_gpu():
        from pipeline.engine import device_name

        device = device_name()
    shrink = round(scale.x / slide.levels[slide.best_level(scale)].mpp.x, 1)
    facts = [versions, ensemble.digest(model), describe(model, engine), platform.node(), device, threads(), shrink]
    return cache_folder() / "probes" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"


@dataclass(frozen=True)
class _Run:
    """A few tiles of one size, with so many `pixels` computed for each.

    `least` and `peak` are the bytes held at the peaks of the tile that took least and of the one that took most, `gpu_peak`
    those of a GPU; `seconds` is a tile's time, and `output_bytes` what a pixel takes on disk.
    """

    pixels: int
    least: int
    peak: int
    gpu_peak: int
    seconds: float
    output_bytes: float


def _run(slide: Pixels, lattice: Lattice, engine: Engine, place: Roi, way: Stitching, size: int) -> _Run:
    spec, grid = engine.spec, way.grid(lattice, size)
    # A small slide is continued with glass, so that the windows of the two sizes differ.
    least = _PROBE_TILES * grid.write_size + 2 * grid.halo
    wide = Lattice(max(lattice.width, least), max(lattice.height, least), lattice.mpp)
    grid = replace(grid, lattice=wide)
    row, column = place.y // grid.write_size, min(place.x // grid.write_size, grid.shape[1] - _PROBE_TILES)
    tiles = [grid[row, column + offset] for offset in range(_PROBE_TILES)]
    with TemporaryDirectory(prefix="fullfield-") as folder:
        shape = wide.shrink(spec.output_stride)
        canvas = create_canvas(Path(folder) / "probe", shape, spec.classes, grid.write_size // spec.output_stride, {})
        coarse = CoarseShard(canvas, (row // 2, column // 2))
        times, peaks = [], []
        for tile, probabilities in way.predict(slide, grid, tiles, engine):
            coarse.add(tile.index, *canvas.write(tile.target(spec.output_stride), probabilities))
            times.append(time.perf_counter())
            peaks.append(_peak_resident())
            if len(times) == 1:  # an engine may compile itself for windows of this size, which takes memory but once
                peaks.clear()
                _start_measuring()
            _forget_peak()
        gpu_peak = gpu.max_memory_reserved() if (gpu := cuda()) else 0
        pixels = sum(tile.write_roi.intersect(lattice.roi).area for tile in tiles)  # glass compresses to nothing
        written = sum(file.stat().st_size for file in canvas.path.rglob("c/**/*") if file.is_file())
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return _Run(way.computed(grid), min(peaks), max(peaks), gpu_peak, seconds, written / pixels)


def _start_measuring() -> int:
    """Give freed memory back to the kernel and forget the peak; returns the bytes that this process holds."""
    release_memory()
    if gpu := cuda():
        gpu.empty_cache()
        gpu.reset_peak_memory_stats()
    _forget_peak()
    return int(psutil.Process().memory_info().rss)


def _free_on_gpu() -> int:
    """Bytes of the GPU that this process has or could have."""
    gpu = cuda()
    return int(gpu.mem_get_info()[0] + gpu.memory_reserved()) if gpu else 0


def _forget_peak() -> None:
    """Let the peak be what is held now, where the kernel can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    """The most bytes that this process has held, since measuring started where the kernel can tell."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
