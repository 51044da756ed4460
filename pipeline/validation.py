"""Holds a model against the truth, over everything that is known of some slides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pipeline.classes import IGNORED
from pipeline.grid import Grid, Tile
from pipeline.metrics import confusion
from pipeline.patches import Source
from pipeline.prediction import predict

if TYPE_CHECKING:
    from pipeline.engine import Engine

_TILE = 512  # pixels: known areas are often small fields


def validate(sources: Iterable[Source], engine: Engine) -> np.ndarray:
    """Pixels by true and predicted class over all known pixels at the model's scale, summed over `sources`.

    Returns (classes, classes + 1) int64 as `metrics.confusion` does. Tiles in which nothing is known are not run.
    """
    spec = engine.spec
    total = np.zeros((len(spec.classes), len(spec.classes) + 1), np.int64)
    for source in sources:
        grid = Grid(source.lattice, _TILE, spec.halo, spec.stride)
        truths = _known_tiles(source, grid, spec.output_stride)
        tiles = [tile for tile, _ in truths]
        for (_, truth), (_, probabilities) in zip(truths, predict(source.slide, grid, tiles, engine), strict=True):
            labels = probabilities.argmax(axis=0).astype(np.uint8)
            total += confusion(truth, labels, len(spec.classes))
    return total


def _known_tiles(source: Source, grid: Grid, output_stride: int) -> list[tuple[Tile, np.ndarray]]:
    lattice = source.lattice.shrink(output_stride)
    found = ((tile, source.truth.read(tile.target(output_stride), lattice)) for tile in grid)
    return [(tile, truth) for tile, truth in found if (truth != IGNORED).any()]
