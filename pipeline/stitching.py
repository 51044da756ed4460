"""The two ways in which tiles become the answer for a slide: exactly, or blended where no exact way exists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from pipeline.blending import Windows, blend
from pipeline.geometry import Lattice
from pipeline.grid import Grid, Tile
from pipeline.network import ModelSpec
from pipeline.prediction import predict
from pipeline.slide import Pixels

if TYPE_CHECKING:
    from pipeline.engine import Engine


class Stitching(Protocol):
    """How a slide is cut into tiles, and what the answer for a tile is. As text it says how, for people to read.

    `exact` promises that what is stitched is what one forward pass over the whole slide gives.
    """

    exact: ClassVar[bool]

    def grid(self, lattice: Lattice, write_size: int) -> Grid:
        """The tiles of a lattice, each writing `write_size` pixels or a little more."""

    def predict(self, slide: Pixels, grid: Grid, tiles: Iterable[Tile], engine: Engine) -> Iterator[tuple[Tile, np.ndarray]]:
        """Each tile with its probabilities, (classes, height, width) float32, in place at `tile.target(output_stride)`."""

    def cost(self, write_size: int) -> float:
        """Pixels that the network computes for each that is written, of tiles of a size."""

    def computed(self, grid: Grid) -> int:
        """Pixels that the network computes for one of a grid's tiles."""


@dataclass(frozen=True)
class Exact:
    """Tiles read a halo and crop it away: what is left is exactly the answer of one forward pass."""

    halo: int
    stride: int
    exact: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"halo {self.halo} px, stride {self.stride} px"

    def grid(self, lattice: Lattice, write_size: int) -> Grid:
        """See Stitching."""
        return Grid(lattice, write_size, self.halo, self.stride)

    def predict(self, slide: Pixels, grid: Grid, tiles: Iterable[Tile], engine: Engine) -> Iterator[tuple[Tile, np.ndarray]]:
        """See Stitching."""
        return predict(slide, grid, tiles, engine)

    def cost(self, write_size: int) -> float:
        """See Stitching: (1 + 2 h / t)^2."""
        return (1 + 2 * self.halo / write_size) ** 2

    def computed(self, grid: Grid) -> int:
        """See Stitching."""
        return math.prod(grid.read_shape)


@dataclass(frozen=True)
class Blended:
    """Tiles average the windows that reach into them, see blending.py."""

    windows: Windows
    stride: int
    exact: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"windows of {self.windows.size} px every {self.windows.interval} px, blended by Gaussian weights"

    def grid(self, lattice: Lattice, write_size: int) -> Grid:
        """See Stitching."""
        return Grid(lattice, write_size, 0, self.stride)

    def predict(self, slide: Pixels, grid: Grid, tiles: Iterable[Tile], engine: Engine) -> Iterator[tuple[Tile, np.ndarray]]:
        """See Stitching."""
        return blend(slide, grid, tiles, engine, self.windows)

    def cost(self, write_size: int) -> float:
        """See Stitching: windows overlap, and those across a tile's upper and lower edge are computed twice."""
        size, interval = self.windows.size, self.windows.interval
        return (size / interval) ** 2 * (1 + size / write_size)

    def computed(self, grid: Grid) -> int:
        """See Stitching; on average."""
        return round(self.cost(grid.write_size) * math.prod(grid.read_shape))


def stitching(spec: ModelSpec, blended: bool) -> Stitching:
    """The way to stitch a model's tiles: exact, or blended if the user says so.

    Raises NetworkError for a network that is not local, unless it is blended.
    """
    return Blended(Windows.of(spec), spec.stride) if blended else Exact(spec.required_halo(), spec.stride)


def usual(spec: ModelSpec) -> Stitching:
    """The best way that a model allows: exact where it is local."""
    return stitching(spec, blended=spec.halo is None)
