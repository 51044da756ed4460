"""The growing output of one slide: class labels and probabilities as a pyramid of shards, written tile by tile.

    segmentation.ome.zarr            OME-NGFF 0.5, Zarr v3
    |-- 0, 1, 2, ...                 probabilities (c, y, x) uint8: round(255 p); 0 where not examined
    `-- labels/classes/0, 1, 2, ...  class index (y, x) uint8; IGNORED where not examined

One tile of the slide is one shard, and so one file, of each array. Tiles are written by many processes at once and need
no lock. A tile is done when both its shards are on disk, whole: nothing else is state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.classes import IGNORED, Classes
from pipeline.errors import CanvasError, OtherWayError
from pipeline.files import new_folder, write_json
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.ngff import image_metadata, label_metadata, read_image_metadata
from pipeline.shards import Place, ShardedArray

Chunk = tuple[Place, np.ndarray, np.ndarray]
"""(row, column) of a chunk in its shard, and its pixels: probabilities and labels, as `Canvas.write` returns them."""

_LABELS = "labels/classes"
_LARGEST_CHUNK, _SMALLEST_CHUNK = 512, 64  # pixels
_LARGEST_BLOCK = 1024  # pixels
_ROUNDING = 1e-3  # by which a probability of half precision may pass 1
_SMALLEST_LEVEL = 512  # pixels: the pyramid ends with the first level that is no longer than this


@dataclass(frozen=True)
class Canvas:
    """The output of one slide, on disk at `path`, in pixels of `lattice`; tiles are squares of `write_size` pixels.

    `identity` says what it is made from, and `measured` what was measured on the slide beforehand and holds for every tile,
    or else is kept from its beginning, both as `create_canvas` was told.
    """

    path: Path
    lattice: Lattice
    classes: Classes
    write_size: int
    identity: Mapping[str, str]
    measured: Mapping[str, Any]

    @cached_property
    def levels(self) -> tuple[Lattice, ...]:
        """The lattices of the pyramid, finest first; each pixel of a level covers 2 x 2 of the level before it."""
        levels = [self.lattice]
        while max(levels[-1].shape) > _SMALLEST_LEVEL:
            levels.append(levels[-1].shrink(2))
        return tuple(levels)

    @cached_property
    def chunk(self) -> int:
        """Side of the squares that are compressed one by one, in pixels; it divides `write_size`."""
        return _largest_divisor(self.write_size, _LARGEST_CHUNK, _SMALLEST_CHUNK)

    def write(self, roi: Roi, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write one tile: its probabilities, then the class of highest probability (the first, where two are equal).

        `roi` is a square of `write_size` pixels at a multiple of it, cut at the right and lower edge of the lattice;
        `probabilities` is (classes, rows, columns) float32, 0 to 1. Returns what is then on disk: (classes, rows, columns)
        uint8, 255 times the probabilities, and (rows, columns) uint8 class indices.
        Raises CanvasError where they are not numbers from 0 to 1.
        """
        place = (roi.y // self.write_size, roi.x // self.write_size)
        if not roi.area or self.tile_roi(place) != roi or probabilities.shape != (len(self.classes), *roi.shape):
            raise ValueError(f"{roi} with probabilities of shape {probabilities.shape} is no tile of {self.path}")
        quantised, labels = np.empty(probabilities.shape, np.uint8), np.empty(roi.shape, np.uint8)

        def chunks() -> Iterator[Chunk]:
            for y in range(0, roi.height, self.chunk):
                for x in range(0, roi.width, self.chunk):
                    part = (slice(y, y + self.chunk), slice(x, x + self.chunk))
                    quantised[:, *part], labels[part] = self._quantise(probabilities[:, *part])
                    yield (y // self.chunk, x // self.chunk), quantised[:, *part], labels[part]

        self.store(0, place, chunks())
        return quantised, labels

    def store(self, level: int, place: Place, chunks: Iterable[Chunk]) -> None:
        """Write both shards at a place of a level, probabilities first; chunks that are not given count as not examined."""
        probabilities, labels = self.probability_shards(level), self.label_shards(level)
        encoded = {at: (probabilities.encode(one), labels.encode(other)) for at, one, other in chunks}
        probabilities.store(place, {at: payload for at, (payload, _) in encoded.items()})
        labels.store(place, {at: payload for at, (_, payload) in encoded.items()})

    def done(self) -> list[Place]:
        """(row, column) of every tile that is written, probabilities and labels, row by row."""
        return sorted({*self.probability_shards(0).places()}.intersection(self.label_shards(0).places()))

    def whole(self) -> list[Place]:
        """Those of the tiles that are `done` whose files are whole; it reads the end of each."""
        return [place for place in self.done() if self.is_whole(place, 0)]

    def is_whole(self, place: Place, level: int) -> bool:
        """Whether both shards at a place of a level are on disk, whole."""
        return self.probability_shards(level).is_whole(place) and self.label_shards(level).is_whole(place)

    def written(self, level: int) -> np.ndarray:
        """(rows, columns) bool: in which squares of `write_size` pixels of a level something is examined."""
        height, width = self.levels[level].shape
        found = np.zeros((-(-height // self.write_size), -(-width // self.write_size)), bool)
        for row, column in self.label_shards(0).places():
            found[row >> level, column >> level] = True
        return found

    def tile_roi(self, place: Place) -> Roi:
        """The rectangle of the tile at (row, column)."""
        size = self.write_size
        return Roi(place[1] * size, place[0] * size, size, size).intersect(self.lattice.roi)

    def bands(self) -> list[int]:
        """The rows of tiles of which one or more are `done`, from the top."""
        return sorted({row for row, _ in self.done()})

    def columns(self, band: int) -> list[int]:
        """The columns of the tiles of a row that are `done`, from the left; no other row is looked at."""
        return sorted({*self.probability_shards(0).columns(band)}.intersection(self.label_shards(0).columns(band)))

    def require(self, bands: Mapping[int, int]) -> None:
        """Raise CanvasError where fewer tiles of a row are `done` than `bands` says, which knows what was written."""
        for band, count in bands.items():
            if (found := len(self.columns(band))) < count:
                told = f"{found} of the {count} tiles of row {band}, all of which were written"
                remedy = (
                    "A file system that machines share may tell one late of what another wrote: run the same command again, "
                    "which makes only what is missing."
                )
                raise CanvasError(str(self.path), told, "all of them", remedy)

    def block_rows(self, band: int) -> Iterator[list[Roi]]:
        """What is examined of a row of tiles, in blocks of some 1024 pixels a side, one row of blocks after the other."""
        step = self.chunk * _largest_divisor(self.write_size // self.chunk, max(_LARGEST_BLOCK // self.chunk, 1), 1)
        columns = self.columns(band)
        for y in range(band * self.write_size, self.tile_roi((band, 0)).bottom, step):
            starts = (x for c in columns for x in range(c * self.write_size, (c + 1) * self.write_size, step))
            blocks = (Roi(x, y, step, step).intersect(self.lattice.roi) for x in starts)
            yield [block for block in blocks if block.area]

    def read_labels(self, roi: Roi, level: int = 0) -> np.ndarray:
        """(rows, columns) uint8 class indices of a rectangle of a level; IGNORED where not examined or outside it."""
        return self.label_shards(level).read(roi)

    def read_probabilities(self, roi: Roi, level: int = 0) -> np.ndarray:
        """(classes, rows, columns) uint8, 255 times the probability; 0 where not examined or outside the level."""
        return self.probability_shards(level).read(roi)

    def label_shards(self, level: int) -> ShardedArray:
        """The shards of the class indices of a level."""
        folder = self.path / _LABELS / str(level)
        return ShardedArray(folder, self.levels[level].shape, self.write_size, self.chunk, IGNORED)

    def probability_shards(self, level: int) -> ShardedArray:
        """The shards of the probabilities of a level."""
        shape = (len(self.classes), *self.levels[level].shape)
        return ShardedArray(self.path / str(level), shape, self.write_size, self.chunk, 0)

    def remove_partial_files(self) -> None:
        """Remove what killed writers left behind; to be called when nobody writes."""
        for level in range(len(self.levels)):
            self.label_shards(level).remove_partial_files()
            self.probability_shards(level).remove_partial_files()

    def _no_numbers(self) -> str:
        """What to do where a network answers with what is no probability."""
        engine = self.identity.get("engine", "exact")
        if engine.startswith("exact"):
            return "The network's weights have diverged: train it again with a lower learning rate."
        return (
            f"They were computed as {engine}: say --precision exact (engine.precision=exact), and delete this output first."
        )

    def _quantise(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C, h, w) levels and (h, w) winners, by channel: numpy's argmax over a first axis is six times slower."""
        winners = np.zeros(probabilities.shape[1:], np.uint8)
        best = np.array(probabilities[0], np.float32)
        for index, channel in enumerate(probabilities):
            better = np.greater(channel, best).view(np.uint8)
            np.maximum(winners, better * np.uint8(index), out=winners)
            np.maximum(best, channel, out=best)
        low, high = best.min(), best.max()
        if not (low >= 0 and high <= 1 + _ROUNDING):
            raise CanvasError(
                str(self.path), f"probabilities from {low} to {high}", "numbers from 0 to 1", self._no_numbers()
            )
        levels = np.empty(probabilities.shape, np.uint8)
        for index, channel in enumerate(probabilities):
            levels[index] = channel * np.float32(255) + np.float32(0.5)
        return levels, winners


def create_canvas(
    path: Path,
    lattice: Lattice,
    classes: Classes,
    write_size: int,
    identity: Mapping[str, str],
    measured: Mapping[str, Any] = MappingProxyType({}),
    slide_mpp: Mpp | None = None,
) -> Canvas:
    """Make an empty canvas on disk, whole or not at all.

    `slide_mpp` is the scale of the slide at full resolution, on whose pixels viewers lay it; None: that of the canvas.

    `identity` says what the output is made from (model, configuration, slide); it is compared when the canvas is opened
    again. `measured` says what was measured on the slide, as values that JSON can hold; it is kept, and not compared. Raises
    CanvasError where something is at `path` already.
    """
    if path.exists():
        raise CanvasError(str(path), "an output that exists", "none", "Open it to go on, or delete it to start again.")
    own = {"fullfield": dict(identity), "fullfield-measured": dict(measured)}
    shown = slide_mpp or lattice.mpp
    with new_folder(path) as partial:
        canvas = Canvas(partial, lattice, classes, write_size, dict(identity), dict(measured))
        _create_group(partial, {"ome": image_metadata(canvas.levels, classes, shown), **own})
        _create_group(partial / "labels", {"ome": {"version": "0.5", "labels": ["classes"]}})
        _create_group(partial / _LABELS, {"ome": label_metadata(canvas.levels, classes, shown)})
        for level in range(len(canvas.levels)):
            canvas.probability_shards(level).create("cyx")
            canvas.label_shards(level).create("yx")
    return replace(canvas, path=path)


def open_canvas(path: Path, identity: Mapping[str, str] | None = None) -> Canvas:
    """Open a canvas that exists; it reads two small files.

    Raises CanvasError where there is none, and where its identity is not `identity` (OtherWayError where that is of the same
    model and slide); None takes it whatever it is.
    """
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        array = json.loads((path / _LABELS / "0" / "zarr.json").read_text())
        mpp, classes = read_image_metadata(attributes["ome"])
        found: dict[str, str] = attributes["fullfield"]
        measured: dict[str, Any] = attributes.get("fullfield-measured", {})
        height, width = array["shape"]
        write_size: int = array["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        remedy = "Delete it, if it is there, and segment the slide."
        raise CanvasError(str(path), f"no readable canvas ({error})", "the output of a segmentation", remedy) from error
    if identity is not None and dict(identity) != found:
        raise _other_identity(path, found, identity)
    return Canvas(path, Lattice(width, height, mpp), classes, write_size, found, measured)


def _other_identity(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> CanvasError:
    keys = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    kind = CanvasError if {"model", "slide"} & {*keys} else OtherWayError
    return kind(
        f"{path} (made by another run)",
        ", ".join(f"{key} {found.get(key, 'absent')}" for key in keys),
        ", ".join(f"{key} {expected.get(key, 'absent')}" for key in keys),
        f"Repeat the settings that it was made with, delete {path.parent} to make it anew, or choose another output.",
    )


def _largest_divisor(number: int, largest: int, smallest: int) -> int:
    """The largest divisor of `number` up to `largest`; `number` itself where that is below `smallest`."""
    divisor = next(candidate for candidate in range(min(largest, number), 0, -1) if number % candidate == 0)
    return divisor if divisor >= smallest else number


def _create_group(folder: Path, attributes: dict[str, Any]) -> None:
    description = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_json(folder / "zarr.json", description)
