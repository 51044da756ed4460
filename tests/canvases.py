"""A canvas of shapes, for tests of what is made of one, and canvases as another library reads them."""

from pathlib import Path

import numpy as np
import zarr
from scipy import ndimage

from pipeline.canvas import Canvas, create_canvas
from pipeline.classes import Class, Classes
from pipeline.geometry import Lattice
from pipeline.pyramid import build_pyramid
from pipeline.shards import ShardedArray

CLASSES = Classes((Class("Glass", (240, 240, 240)), Class("Drüse", (0, 160, 80)), Class("Fat", (250, 180, 10))))


def blobs(shape: tuple[int, int]) -> np.ndarray:
    """Smooth shapes of three classes."""
    rng = np.random.default_rng(7)
    return np.stack([ndimage.gaussian_filter(rng.random(shape), 12) for _ in range(3)]).argmax(axis=0).astype(np.uint8)


def as_zarr_reads(shards: ShardedArray) -> np.ndarray:
    """The pixels of an array on disk as zarr-python reads them."""
    return np.asarray(zarr.open_array(shards.folder, mode="r")[:])


def make(folder: Path, lattice: Lattice, write_size: int) -> Canvas:
    """A canvas of blobs; every third tile was not examined."""
    canvas, labels = create_canvas(folder / "out.ome.zarr", lattice, CLASSES, write_size, {}), blobs(lattice.shape)
    for row, column in np.ndindex(-(-lattice.height // write_size), -(-lattice.width // write_size)):
        roi = canvas.tile_roi((row, column))
        if (row + column) % 3 != 1:
            part = labels[roi.slices()]
            canvas.write(roi, np.stack([part == index for index in range(3)]).astype(np.float32))
    build_pyramid(canvas)
    return canvas
