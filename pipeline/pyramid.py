"""The coarser levels of a canvas: each pixel covers 2 x 2 of the level before it.

    tiles, as they are written  --> the shard of level 1 that four of them share     in memory: nothing is read again
    a level, once it is done    --> the shards of the next                           from disk

A coarse label is the most frequent of its four (the lowest, where two are equal), not counting the unexamined; a coarse
probability is the mean over the examined ones. A shard of level 1 is on disk only while all that it follows from is: whoever
plans to write one of its tiles removes it first, while nobody else is at work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pipeline.canvas import Canvas, Chunk
from pipeline.classes import IGNORED
from pipeline.geometry import Roi
from pipeline.halving import halve_labels, halve_probabilities
from pipeline.shards import Place

_BAND = 512  # rows of a tile that are halved at once; an even number


def has_pyramid(canvas: Canvas) -> bool:
    """Whether the coarser levels hold, in whole files, all that follows from the tiles that are done."""
    places = set(canvas.done())
    for level in range(1, len(canvas.levels)):
        places = _above(places)
        if not all(canvas.is_whole(place, level) for place in places):
            return False
    return True


def build_pyramid(canvas: Canvas) -> None:
    """Make the coarser levels, all but the shards of level 1 that are there, reading what is examined and nothing else.

    What an earlier, interrupted call left of the other levels is replaced.
    """
    places = set(canvas.done())
    for level in range(1, len(canvas.levels)):
        places = _above(places)
        for place in sorted(places):
            if level > 1 or not canvas.is_whole(place, level):
                canvas.store(level, place, _halved_chunks(canvas, level, place))


def remove_coarse(canvas: Canvas, tiles: Iterable[Place]) -> None:
    """Remove the shards of level 1 that follow from some tiles, since these are to be written; to be called when nobody
    reads or writes.
    """
    if len(canvas.levels) > 1:
        for shards in (canvas.label_shards(1), canvas.probability_shards(1)):
            for place in _above(tiles).intersection(shards.places()):
                shards.path(place).unlink()


class CoarseShard:
    """The shard of level 1 at `place`, made of its tiles as they are written: write and add each tile, store.

    It holds the pixels of one tile.
    """

    def __init__(self, canvas: Canvas, place: Place) -> None:
        size = canvas.write_size
        self._canvas, self._place, self._added = canvas, place, set[Place]()
        self._levels = np.zeros((len(canvas.classes), size, size), np.uint8)
        self._labels = np.full((size, size), IGNORED, np.uint8)

    def add(self, tile: Place, levels: np.ndarray, labels: np.ndarray) -> None:
        """Take the pixels of the tile at (row, column), as `Canvas.write` returns them."""
        size = self._canvas.write_size
        if size % 2:  # a pixel of level 1 then covers pixels of two tiles
            return
        self._added.add(tile)
        top, left = (index % 2 * size // 2 for index in tile)
        for y in range(0, len(labels), _BAND):
            band = _halved(levels[:, y : y + _BAND], labels[y : y + _BAND])
            height, width = band[1].shape
            part = Roi(left, top + y // 2, width, height).slices()
            self._levels[:, *part], self._labels[part] = band

    def store(self) -> None:
        """Write the shard, where all tiles that it follows from were added; else `build_pyramid` makes it."""
        on_disk = {tile for tile in _below(self._place) if self._canvas.label_shards(0).path(tile).exists()}
        if len(self._canvas.levels) > 1 and on_disk and on_disk == self._added:
            self._canvas.store(1, self._place, self._chunks())

    def _chunks(self) -> Iterator[Chunk]:
        """Those of which something is examined."""
        size = self._canvas.chunk
        for row, column in _chunk_places(self._canvas):
            part = (slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            if np.any(self._labels[part] != IGNORED):
                yield (row, column), self._levels[:, *part], self._labels[part]


def _halved_chunks(canvas: Canvas, level: int, place: Place) -> Iterator[Chunk]:
    """The chunks of a shard of which something is examined, made of the level before it."""
    for row, column in _chunk_places(canvas):
        x, y = place[1] * canvas.write_size + column * canvas.chunk, place[0] * canvas.write_size + row * canvas.chunk
        source = Roi(2 * x, 2 * y, 2 * canvas.chunk, 2 * canvas.chunk)
        labels = canvas.read_labels(source, level - 1)
        if np.any(labels != IGNORED):
            yield (row, column), *_halved(canvas.read_probabilities(source, level - 1), labels)


def _halved(levels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half as many rows and columns; one that has no neighbour, at the edge of the slide, is by itself."""
    if (odd := [size % 2 for size in labels.shape]) != [0, 0]:
        rows, columns = ((0, size) for size in odd)
        levels = np.pad(levels, ((0, 0), rows, columns))
        labels = np.pad(labels, (rows, columns), constant_values=IGNORED)
    return halve_probabilities(levels, labels != IGNORED), halve_labels(labels)


def _above(places: Iterable[Place]) -> set[Place]:
    """The shards of the next level that follow from those at `places`."""
    return {(row // 2, column // 2) for row, column in places}


def _below(place: Place) -> list[Place]:
    """The shards of the level before that the one at `place` follows from, if they are there."""
    return [(2 * place[0] + row, 2 * place[1] + column) for row, column in np.ndindex(2, 2)]


def _chunk_places(canvas: Canvas) -> Iterator[Place]:
    """(row, column) of every chunk of a shard."""
    return np.ndindex(*[canvas.write_size // canvas.chunk] * 2)
