"""Stencil: a pixel is covered exactly if its centre is; windows never show; shared edges are watertight."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.features import rasterize

from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.outlines import read_outlines
from pipeline.stencil import Stencil

BASE = Lattice(61, 43, Mpp(0.5, 0.5))
SCALES = st.sampled_from([0.13, 0.25, 0.5, 0.62005, 1.0, 1.24, 2.5, 7.0])


def centres(roi: Roi, lattice: Lattice, base: Lattice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The slow reference's (x, y) of every pixel of a window, in base pixels."""
    y, x = np.mgrid[roi.y : roi.bottom, roi.x : roi.right] + 0.5
    return x * lattice.mpp.x / base.mpp.x, y * lattice.mpp.y / base.mpp.y


@st.composite
def blobs(draw: st.DrawFn) -> list[shapely.Polygon | shapely.MultiPolygon]:
    """Some polygons with holes and concave sides, on whole, half and odd coordinates, some past the slide's border."""
    number = st.one_of(st.integers(-10, 70), st.integers(-20, 140).map(lambda n: n / 2), st.floats(-10, 70))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        ring = draw(st.lists(st.tuples(number, number), min_size=3, max_size=9))
        shape = shapely.make_valid(shapely.Polygon(ring), method="structure", keep_collapsed=False)
        if shape.area > 0:
            found.append(shapely.union_all([shape]))
    return found or [shapely.box(3, 4, 20, 9)]


@given(shapes=blobs(), scale_x=SCALES, scale_y=SCALES)
@settings(max_examples=60, deadline=None)
def test_a_pixel_is_covered_if_its_centre_is(shapes: list[shapely.Polygon], scale_x: float, scale_y: float) -> None:
    lattice = BASE.at(Mpp(scale_x, scale_y))
    found = Stencil(shapes).fill(lattice.roi, lattice, BASE)
    x, y = centres(lattice.roi, lattice, BASE)
    expected = np.any([shapely.contains_xy(shape, x, y) for shape in shapes], axis=0)
    wrong = shapely.points(x[found != expected], y[found != expected])
    assert all(min(point.distance(shape.boundary) for shape in shapes) < 1e-9 for point in wrong)


@given(shapes=blobs(), scale=SCALES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_give_the_same_bytes_as_the_whole(shapes: list[shapely.Polygon], scale: float, data: st.DataObject) -> None:
    lattice = BASE.at(Mpp(scale, 1.1 * scale))
    stencil = Stencil(shapes)
    whole = lattice.roi.grow(5)
    expected = stencil.fill(whole, lattice, BASE)
    x = data.draw(st.integers(whole.x, whole.right - 1))
    y = data.draw(st.integers(whole.y, whole.bottom - 1))
    width = data.draw(st.integers(1, whole.right - x))
    piece = Roi(x, y, width, data.draw(st.integers(1, whole.bottom - y)))
    np.testing.assert_array_equal(stencil.fill(piece, lattice, BASE), expected[piece.within(whole).slices()])


@given(scale=SCALES, seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_neighbours_neither_overlap_nor_leave_a_gap(scale: float, seed: int) -> None:
    """Triangles that tile a rectangle, with corners on pixel centres too: every pixel is in exactly one."""
    spots = np.random.default_rng(seed).integers(0, 86, (12, 2)) / 2
    corners = [(0, 0), (61, 0), (0, 43), (61, 43)]
    frame = shapely.MultiPoint([*map(tuple, spots * (61 / 43, 1)), *corners])
    triangles = shapely.get_parts(shapely.delaunay_triangles(frame))
    lattice = BASE.at(Mpp.square(scale))
    counts = sum(Stencil([triangle]).fill(lattice.roi, lattice, BASE).astype(int) for triangle in triangles)
    x, y = centres(lattice.roi, lattice, BASE)
    assert (counts[(x < 61) & (y < 43)] == 1).all()


def test_rectangle_by_hand() -> None:
    found = Stencil([shapely.box(2, 1, 4, 2)]).fill(Roi(0, 0, 6, 3), BASE, BASE)
    assert found.astype(int).tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_overlapping_polygons_unite() -> None:
    many = [shapely.box(0, 0, 30, 20)] * 400  # more than a byte counts
    assert Stencil(many).fill(BASE.roi, BASE, BASE).sum() == 600


def test_bounds_of_them_all() -> None:
    assert Stencil([shapely.box(2, 1, 4, 2), shapely.box(9, -3, 10, 1)]).bounds.tolist() == [2, -3, 10, 2]


def test_glas_windows_against_point_in_polygon(shared_data: Path) -> None:
    """The outlines as GeoJSON has them, each pixel centre asked one by one."""
    path = shared_data / "glas/glas-patient-01.geojson"
    shapes = [shapely.geometry.shape(item["geometry"]) for item in json.loads(path.read_text())["features"]]
    stencil = Stencil([outline.geometry for outline in read_outlines(path).outlines if outline.name == "Gland"])
    glands = [shape for shape, item in zip(shapes, json.loads(path.read_text())["features"], strict=True)
              if item["properties"]["classification"]["name"] == "Gland"]  # fmt: skip
    base = Lattice(4061, 2919, Mpp.square(0.62005))
    for roi in (Roi(620, 140, 330, 270), Roi(2200, 1500, 210, 340)):
        x, y = centres(roi, base, base)
        expected = np.any([shapely.contains_xy(shape, x, y) for shape in glands], axis=0)
        assert 0.1 < expected.mean() < 0.9
        np.testing.assert_array_equal(stencil.fill(roi, base, base), expected)


@pytest.mark.parametrize("file", ["nuclei/TCGA-44-2665-01B-06-BS6.xml", "nuclei/TCGA-CH-5767-01Z-00-DX1.xml"])
def test_nuclei_against_gdal(shared_data: Path, file: str) -> None:
    """GDAL decides ties on an edge otherwise; everywhere else both must agree."""
    shapes = [outline.geometry for outline in read_outlines(shared_data / file).outlines]
    base = Lattice(1000, 990, Mpp.square(0.2527))
    found = Stencil(shapes).fill(base.roi, base, base)
    expected = rasterize(shapes, out_shape=base.shape).astype(bool)
    assert 0.1 < expected.mean() < 0.5
    rows, columns = np.nonzero(found != expected)
    edges = shapely.union_all([shape.boundary for shape in shapes])
    assert len(rows) < 0.05 * expected.sum()  # many sides run at 45 degrees between whole pixels, through centres
    assert shapely.dwithin(shapely.points(columns + 0.5, rows + 0.5), edges, 1e-9).all()
