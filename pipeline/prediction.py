"""A model's answer for the tiles of a slide, exactly as one forward pass over the whole slide would give it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipeline.ahead import ahead
from pipeline.grid import Grid, Tile
from pipeline.slide import Pixels

if TYPE_CHECKING:
    from pipeline.engine import Engine


def predict(slide: Pixels, grid: Grid, tiles: Iterable[Tile], engine: Engine) -> Iterator[tuple[Tile, np.ndarray]]:
    """Each tile with its probabilities, (classes, height, width) float32, the halo cropped away.

    The place of the array in the output is `tile.target(output_stride)`. The next windows are read while the network runs.
    Raises SlideError where the slide cannot be read.
    """
    for tile, window in read_ahead(slide, grid, tiles):
        rows, columns = tile.crop(engine.spec.output_stride).slices()
        yield tile, engine(window[None])[0, :, rows, columns]


def read_ahead(slide: Pixels, grid: Grid, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, np.ndarray]]:
    """Each tile with its `read_roi`, (height, width, 3) uint8 RGB, while a thread reads the next ones.

    Raises SlideError where the slide cannot be read.
    """
    return ahead(lambda tile: slide.read(tile.read_roi, grid.lattice), tiles)
