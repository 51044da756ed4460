"""How many workers of this machine segment slides soonest."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import SlideError
from pipeline.geometry import Mpp
from pipeline.machine import cores, has_gpu
from pipeline.slide import open_slide
from pipeline.tiling import USUAL_GIB, free_gib

_WORK_FOR_TWO = 30_000_000  # pixels; below, starting a second worker costs more than it saves


def local_workers(slides: Iterable[tuple[Path, float | None]], scale: Mpp) -> int:
    """Two, each with half the threads, where slides, given as path and mpp, have work for both at `scale`; else one.

    One then reads, writes or outlines while the other computes. A GPU, or scarce memory, is not shared. Slides that cannot
    be read do not count.
    """
    if cores() == 1 or has_gpu() or free_gib() < 2 * USUAL_GIB:
        return 1
    pixels = 0
    for path, mpp in slides:
        with suppress(SlideError):
            pixels += open_slide(path, mpp).base.at(scale).roi.area
        if pixels > _WORK_FOR_TWO:
            return 2
    return 1
