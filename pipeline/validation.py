"""Holds a model against the truth, over everything that is known of some slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipeline.classes import IGNORED
from pipeline.errors import SlideError
from pipeline.grid import Grid, Tile
from pipeline.metrics import confusion
from pipeline.patches import Source
from pipeline.stitching import usual

if TYPE_CHECKING:
    from pipeline.engine import Engine

KNOWN_TILE = 512
"""Pixels along a side of a tile where what is known decides which tiles are run: it is often but small fields."""


def validate(sources: Mapping[str, Source], engine: Engine) -> tuple[np.ndarray, set[str]]:
    """Pixels by true and predicted class over all known pixels at the model's scale, summed over slides.

    Returns (classes, classes + 1) int64 as `metrics.confusion` does, and the slides that cannot be read, of which nothing
    is counted.
    """
    classes, unread = len(engine.spec.classes), set[str]()
    total = np.zeros((classes, classes + 1), np.int64)
    for name, source in sources.items():
        try:
            total += _count(source, engine)
        except SlideError:
            unread.add(name)
    return total, unread


def _count(source: Source, engine: Engine) -> np.ndarray:
    """The confusion of one slide, (classes, classes + 1) int64. Tiles in which nothing is known are not run."""
    spec, way = engine.spec, usual(engine.spec)
    total = np.zeros((len(spec.classes), len(spec.classes) + 1), np.int64)
    grid = way.grid(source.lattice, KNOWN_TILE)
    lattice = source.lattice.shrink(spec.output_stride)
    for tile, probabilities in way.predict(source.slide, grid, known_tiles(source, grid), engine):
        labels = probabilities.argmax(axis=0).astype(np.uint8)
        total += confusion(source.truth.read(tile.target(spec.output_stride), lattice), labels, len(spec.classes))
    return total


def known_tiles(source: Source, grid: Grid) -> Iterator[Tile]:
    """The tiles in which something is known."""
    known = source.truth.base.cover(source.truth.known_roi(), source.lattice)
    for tile in grid:
        inside = tile.write_roi.intersect(known)
        if inside.area and (source.truth.read(inside, source.lattice) != IGNORED).any():
            yield tile
