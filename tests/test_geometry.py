import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geometry import Lattice, Mpp, Roi

sides = st.integers(0, 50)
rois = st.builds(Roi, st.integers(-20, 60), st.integers(-20, 60), sides, sides)


def pixels(roi: Roi) -> set[tuple[int, int]]:
    return {(x, y) for x in range(roi.x, roi.right) for y in range(roi.y, roi.bottom)}


@given(rois, rois)
def test_an_intersection_holds_the_common_pixels(a: Roi, b: Roi) -> None:
    assert pixels(a.intersect(b)) == pixels(a) & pixels(b)


def test_slices_are_rows_then_columns() -> None:
    image = np.arange(6 * 9).reshape(6, 9)
    assert image[Roi(4, 1, 3, 2).slices()].tolist() == [[13, 14, 15], [22, 23, 24]]


def test_within_counts_from_the_other_corner() -> None:
    assert Roi(12, 9, 3, 4).within(Roi(10, 5, 100, 100)) == Roi(2, 4, 3, 4)


def test_a_roi_shrinks_to_whole_pixels() -> None:
    assert Roi(16, 8, 17, 9).shrink(8) == Roi(2, 1, 3, 2)


@pytest.mark.parametrize(
    ("mpp", "size"), [(0.25, (1001, 703)), (0.5, (501, 352)), (1.0, (251, 176)), (1.24, (202, 142)), (1000.0, (1, 1))]
)
def test_a_lattice_at_another_scale_covers_the_same_area(mpp: float, size: tuple[int, int]) -> None:
    other = Lattice(1001, 703, Mpp.square(0.25)).at(Mpp.square(mpp))
    assert (other.width, other.height) == size


@pytest.mark.parametrize(
    ("mpp", "longest", "shape"), [(0.25, 2000, (703, 1001)), (0.25, 100, (71, 100)), (1.0, 250, (176, 250))]
)
def test_a_lattice_is_seen_at_most_so_long(mpp: float, longest: int, shape: tuple[int, int]) -> None:
    seen = Lattice(1001, 703, Mpp.square(0.25)).seen(Mpp.square(mpp), longest)
    assert seen.shape == shape
    upright = Lattice(703, 1001, Mpp(0.25, 0.5)).seen(Mpp(mpp, 2 * mpp), longest)
    assert upright.shape == shape[::-1] and upright.mpp.y == 2 * upright.mpp.x


def test_rounding_noise_adds_no_pixel() -> None:
    # 0.1 * 3 is 0.30000000000000004, and 0.3 / 0.1 is 2.9999999999999996
    fine, coarse = Lattice(30, 60, Mpp.square(0.1)), Lattice(10, 20, Mpp.square(0.3))
    assert fine.at(coarse.mpp) == coarse
    assert Lattice(3, 6, fine.mpp).at(coarse.mpp) == Lattice(1, 2, coarse.mpp)
    assert fine.cover(Roi(3, 6, 6, 3), coarse) == Roi(1, 2, 2, 1)
    assert coarse.cover(Roi(1, 2, 2, 1), fine) == Roi(3, 6, 6, 3)


@given(rois.filter(lambda roi: roi.area > 0), st.floats(0.05, 20), st.floats(0.05, 20))
def test_cover_is_the_smallest_rectangle_that_covers(roi: Roi, mpp: float, other_mpp: float) -> None:
    lattice, other = Lattice(100, 80, Mpp.square(mpp)), Lattice(10, 8, Mpp.square(other_mpp))
    found = lattice.cover(roi, other)
    for low, high, start, stop in (
        (roi.x, roi.right, found.x, found.right),
        (roi.y, roi.bottom, found.y, found.bottom),
    ):
        assert start * other_mpp <= low * mpp + 1e-5 * other_mpp
        assert stop * other_mpp >= high * mpp - 1e-5 * other_mpp
        assert (start + 1) * other_mpp > low * mpp
        assert stop - start == 1 or (stop - 1) * other_mpp < high * mpp
