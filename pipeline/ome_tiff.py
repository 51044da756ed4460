"""A canvas as pyramidal OME-TIFFs: its classes, and how undecided its probabilities are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from pipeline.canvas import Canvas
from pipeline.classes import IGNORED, Classes
from pipeline.files import replacing
from pipeline.geometry import Roi

_TILE = 512  # pixels; where the canvas's own chunks do not suit TIFF, whose tiles are multiples of 16
_CLASSIC_TIFF_BYTES = 2**31  # of pixels before compression: a margin of two below what a classic TIFF can hold


def write_ome_tiff(canvas: Canvas, path: Path) -> None:
    """Write the class indices as a tiled, lossless OME-TIFF with all levels of the canvas's pyramid.

    Pixels are uint8 indices, IGNORED where not examined, with a colour table of the classes' colours. The file appears when
    it is complete; memory does not depend on its size.
    """
    classes = ", ".join(f"{index} {name}" for index, name in enumerate(canvas.classes.names))
    palette = {"photometric": "palette", "colormap": _colormap(canvas.classes)}
    _write_pyramid(canvas, path, f"classes: {classes}", canvas.read_labels, IGNORED, palette)


def write_entropy(canvas: Canvas, path: Path) -> None:
    """Write how undecided the probabilities are, as a tiled, lossless OME-TIFF with all levels of the canvas's pyramid.

    Pixels are uint8: 255 times the entropy of the class probabilities divided by its largest value, the logarithm of the
    number of classes; so 0 where one class is certain or nothing was examined, 255 where all are equally likely. A coarse
    pixel has the entropy of its mean probabilities. Reference: Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x.
    """
    _write_pyramid(
        canvas, path, "entropy of the class probabilities", partial(_entropy, canvas), 0, {"photometric": "minisblack"}
    )


def _write_pyramid(
    canvas: Canvas, path: Path, name: str, read: Callable[..., np.ndarray], empty: int, colours: Mapping[str, Any]
) -> None:
    """All levels of what `read` gives for a rectangle of a level, (rows, columns) uint8; most of it may be `empty`."""
    tile = canvas.chunk if canvas.chunk % 16 == 0 else _TILE
    big = 1.4 * canvas.lattice.width * canvas.lattice.height > _CLASSIC_TIFF_BYTES
    with replacing(path) as unfinished, tifffile.TiffWriter(unfinished, bigtiff=big, ome=True) as writer:
        for number, level in enumerate(canvas.levels):
            first = {"subifds": len(canvas.levels) - 1, "metadata": _ome(canvas, name)}
            writer.write(
                _encoded_tiles(canvas, number, tile, read, empty),
                shape=level.shape,
                dtype=np.uint8,
                tile=(tile, tile),
                compression="zlib",
                resolution=(1e4 / level.mpp.x, 1e4 / level.mpp.y),
                resolutionunit="CENTIMETER",
                **colours,
                **(first if number == 0 else {"subfiletype": 1}),
            )


def _entropy(canvas: Canvas, roi: Roi, level: int) -> np.ndarray:
    """See `write_entropy`; probabilities have 8 bits, so that each term is looked up."""
    probabilities = np.arange(256) / 255
    terms = np.zeros(256, np.float32)
    terms[1:] = -probabilities[1:] * np.log(probabilities[1:]) * 255 / np.log(len(canvas.classes))
    total = terms[canvas.read_probabilities(roi, level)].sum(axis=0)
    return np.asarray(np.rint(np.minimum(total, 255)), np.uint8)


def _encoded_tiles(canvas: Canvas, number: int, tile: int, read: Callable[..., np.ndarray], empty: int) -> Iterator[bytes]:
    """The tiles of a level, row by row, each compressed; the many that are `empty` are compressed once."""
    nothing = _compressed(np.full((tile, tile), empty, np.uint8))
    level, written, size = canvas.levels[number], canvas.written(number), canvas.write_size
    for y in range(0, level.height, tile):
        rows = slice(y // size, (y + tile - 1) // size + 1)
        for x in range(0, level.width, tile):
            touched = written[rows, x // size : (x + tile - 1) // size + 1].any()
            pixels = read(Roi(x, y, tile, tile), number) if touched else None
            yield nothing if pixels is None or np.all(pixels == empty) else _compressed(pixels)


def _compressed(pixels: np.ndarray) -> bytes:
    """Deflate as TIFF has it; this library is twice as fast as Python's own and no worse."""
    return bytes(imagecodecs.deflate_encode(pixels.tobytes(), level=5))


def _ome(canvas: Canvas, name: str) -> dict[str, object]:
    mpp = canvas.lattice.mpp
    return {
        "axes": "YX",
        "Name": name,
        "PhysicalSizeX": mpp.x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mpp.y,
        "PhysicalSizeYUnit": "µm",
    }


def _colormap(classes: Classes) -> np.ndarray:
    """(3, 256) uint16: the colour of each index; white where not examined."""
    table = np.zeros((3, 256), np.uint16)
    table[:, IGNORED] = 65535
    for index, item in enumerate(classes):
        table[:, index] = np.array(item.color) * 257
    return table
