"""How a lattice is cut into tiles. The grid that cuts is the object that pastes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.geometry import Lattice, Roi


@dataclass(frozen=True)
class Tile:
    """One window of a grid: what to read, and what of the answer to keep. Both in pixels of the grid's lattice.

    |hhhh|wwwwwwww|hhhh|     h: halo, read for context and cropped away
    `---- read_roi ----´     w: write_roi, which no other tile writes
    """

    index: tuple[int, int]
    read_roi: Roi
    write_roi: Roi

    def target(self, output_stride: int) -> Roi:
        """Where the answer goes, in pixels of the output (`output_stride` lattice pixels each)."""
        return self.write_roi.shrink(output_stride)

    def crop(self, output_stride: int) -> Roi:
        """What to keep of the answer, in its own pixels."""
        return self.target(output_stride).within(self.read_roi.shrink(output_stride))


@dataclass(frozen=True)
class Grid:
    """Tiles whose write_rois partition a lattice and whose read_rois all have one shape.

    Every origin is a multiple of `stride`, so that each window is pooled as the whole lattice would be. The lattice is
    thought of as padded with glass, at right and bottom, to a multiple of the stride. At its borders a window is shifted
    inward instead of cut: the network's own zero padding then happens only where it would in one forward pass over the
    whole. `write_size` is rounded up to a multiple of the stride, `halo` likewise.
    """

    lattice: Lattice
    write_size: int
    halo: int
    stride: int

    def __post_init__(self) -> None:
        if self.write_size < 1 or self.halo < 0 or self.stride < 1:
            raise ValueError(f"no grid of write_size {self.write_size}, halo {self.halo}, stride {self.stride}")
        object.__setattr__(self, "write_size", round_up(self.write_size, self.stride))
        object.__setattr__(self, "halo", round_up(self.halo, self.stride))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return -(-self.lattice.height // self.write_size), -(-self.lattice.width // self.write_size)

    @property
    def padded(self) -> Lattice:
        """The lattice with whole strides."""
        width, height = round_up(self.lattice.width, self.stride), round_up(self.lattice.height, self.stride)
        return Lattice(width, height, self.lattice.mpp)

    @property
    def read_shape(self) -> tuple[int, int]:
        """(rows, columns) of every read_roi."""
        size = self.write_size + 2 * self.halo
        return min(size, self.padded.height), min(size, self.padded.width)

    def __len__(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def __iter__(self) -> Iterator[Tile]:
        rows, columns = self.shape
        return (self[row, column] for row in range(rows) for column in range(columns))

    def __getitem__(self, index: tuple[int, int]) -> Tile:
        row, column = index
        x, y = column * self.write_size, row * self.write_size
        write = Roi(x, y, self.write_size, self.write_size).intersect(self.lattice.roi)
        if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
            raise IndexError(f"tile {index} of a grid of {self.shape}")
        height, width = self.read_shape
        read_x = min(max(x - self.halo, 0), self.padded.width - width)
        read_y = min(max(y - self.halo, 0), self.padded.height - height)
        return Tile(index, Roi(read_x, read_y, width, height), write)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step
