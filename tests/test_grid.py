import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geometry import Lattice, Mpp
from pipeline.grid import Grid

strides = st.sampled_from([1, 2, 3, 8, 16, 32])
grids = st.builds(
    lambda width, height, size, halo, stride: Grid(Lattice(width, height, Mpp.square(1)), size, halo, stride),
    st.integers(1, 150),
    st.integers(1, 110),
    st.integers(8, 90),
    st.integers(0, 50),
    strides,
)


@given(grids)
def test_write_rois_partition_the_lattice(grid: Grid) -> None:
    written = np.zeros(grid.lattice.shape, int)
    for tile in grid:
        written[tile.write_roi.slices()] += 1
    assert (written == 1).all()
    assert len(list(grid)) == len(grid)


@given(grids)
def test_read_rois_are_alike_and_on_the_stride(grid: Grid) -> None:
    for tile in grid:
        assert tile.read_roi.shape == grid.read_shape
        assert tile.read_roi.x % grid.stride == tile.read_roi.y % grid.stride == 0
        assert tile.read_roi.width % grid.stride == tile.read_roi.height % grid.stride == 0
        assert grid.padded.roi.intersect(tile.read_roi) == tile.read_roi
        assert tile.read_roi.intersect(tile.write_roi) == tile.write_roi


@given(grids)
def test_every_side_has_its_halo_or_is_the_border(grid: Grid) -> None:
    for tile in grid:
        read, write = tile.read_roi, tile.write_roi
        assert write.x - read.x >= grid.halo or read.x == 0
        assert write.y - read.y >= grid.halo or read.y == 0
        assert read.right - write.right >= grid.halo or read.right == grid.padded.width
        assert read.bottom - write.bottom >= grid.halo or read.bottom == grid.padded.height


@given(grids)
def test_what_is_cropped_is_what_was_cut(grid: Grid) -> None:
    image = np.arange(grid.padded.roi.area).reshape(grid.padded.shape)
    pasted = np.zeros(grid.lattice.shape, int)
    for tile in grid:
        pasted[tile.target(1).slices()] = image[tile.read_roi.slices()][tile.crop(1).slices()]
    rows, columns = grid.lattice.roi.slices()
    assert (pasted == image[rows, columns]).all()


def test_a_coarser_answer_is_pasted_whole() -> None:
    grid = Grid(Lattice(101, 67, Mpp.square(1)), write_size=32, halo=16, stride=8)
    image = np.arange(grid.padded.roi.area).reshape(grid.padded.shape)
    answer = image[::8, ::8]
    pasted = np.full(answer.shape, -1)
    for tile in grid:
        pasted[tile.target(8).slices()] = image[tile.read_roi.slices()][::8, ::8][tile.crop(8).slices()]
    assert answer.shape == (9, 13)
    assert (pasted == answer).all()


def test_a_tile_outside_the_grid_is_refused() -> None:
    for index in ((1, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            Grid(Lattice(100, 60, Mpp.square(1)), 64, 0, 1)[index]
