import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize
from rasterio.transform import Affine
from scipy import ndimage

from pipeline.canvas import Canvas, create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.geojson import write_features, write_geojson
from pipeline.geometry import Lattice, Mpp
from pipeline.open_regions import OpenRegions
from pipeline.regions import Region, band_regions, joined_regions

CLASSES = Classes((Class("Glass", (255, 255, 255)), Class("Gland", (0, 200, 80)), Class("Fat", (250, 220, 10))))
OUTPUT, BASE = Mpp(1.0, 1.5), Mpp(0.5, 0.25)


def make(folder: str | Path, labels: np.ndarray, write_size: int, likelihood: np.ndarray | None = None) -> Canvas:
    """A canvas that holds `labels`; a tile that is IGNORED throughout is not written."""
    height, width = labels.shape
    canvas = create_canvas(Path(folder) / "out.ome.zarr", Lattice(width, height, OUTPUT), CLASSES, write_size, {})
    likelihood = np.full(labels.shape, 0.75) if likelihood is None else likelihood
    for place in np.ndindex(-(-height // write_size), -(-width // write_size)):
        roi = canvas.tile_roi(place)
        part, own = labels[roi.slices()], likelihood[roi.slices()]
        if np.all(part == IGNORED):
            continue
        scores = np.stack([np.where(part == index, own, (1 - own) / 2) for index in range(3)])
        canvas.write(roi, scores.astype(np.float32))
    return canvas


def base_of(canvas: Canvas) -> Lattice:
    width, height = canvas.lattice.width * OUTPUT.x / BASE.x, canvas.lattice.height * OUTPUT.y / BASE.y
    return Lattice(int(width), int(height), BASE)


def find_regions(canvas: Canvas, base: Lattice, min_area_um2: float = 0.0, skip: Collection[int] = ()) -> Iterator[Region]:
    """All regions: those of each band, and then those that the bands leave open, which pass through a file."""
    left = []
    for band in canvas.bands():
        found = yield from band_regions(canvas, band, base, min_area_um2, skip)
        found.save(canvas.path / "open.npz")
        left.append(OpenRegions.load(canvas.path / "open.npz"))
    yield from joined_regions(canvas, left, base, min_area_um2)


def write(path: Path, regions: Iterable[Region], corner: tuple[int, int] = (0, 0)) -> dict[str, int]:
    """Regions as one GeoJSON file, put together from three, of which the second is empty."""
    given, counts = list(regions), dict.fromkeys(CLASSES.names, 0)
    pieces = [path.with_name(f"{path.name}.{index}") for index in range(3)]
    for piece, part in zip(pieces, (given[:2], [], given[2:]), strict=True):
        for name, count in write_features(piece, part, CLASSES, corner).items():
            counts[name] += count
    write_geojson(path, pieces)
    return counts


def polygon_of(region: Region) -> shapely.Polygon:
    outer, *holes = region.rings
    return shapely.Polygon(outer, holes)


def drawn(regions: list[Region], canvas: Canvas) -> np.ndarray:
    """The regions rasterised on the canvas's lattice, by GDAL."""
    shapes = [(polygon_of(region), region.class_index) for region in regions]
    to_base = Affine.scale(OUTPUT.x / BASE.x, OUTPUT.y / BASE.y)
    return rasterize(shapes, canvas.lattice.shape, fill=IGNORED, transform=to_base, dtype=np.uint8)


def check(labels: np.ndarray, write_size: int) -> None:
    """Regions say what the labels say: drawn again, counted, measured."""
    with TemporaryDirectory() as folder:
        canvas = make(folder, labels, write_size)
        regions = list(find_regions(canvas, base_of(canvas)))
    assert np.array_equal(drawn(regions, canvas), labels)
    for index in range(3):
        parts, count = ndimage.label(labels == index)
        sizes = np.bincount(parts.ravel())[1:] * OUTPUT.area_um2
        found = [region for region in regions if region.class_index == index]
        assert sorted(region.area_um2 for region in found) == sorted(sizes)
        assert len(found) == count
    polygons = np.array([polygon_of(region) for region in regions])
    assert shapely.is_valid(polygons).all()
    assert np.array_equal(shapely.area(polygons) * BASE.area_um2, [region.area_um2 for region in regions])
    assert len(shapely.get_coordinates(shapely.simplify(polygons, 0))) == len(shapely.get_coordinates(polygons))


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Label maps from noise of any grain, with tiles missing, and the size of the tiles."""
    height, width = draw(st.integers(1, 50)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([0.0, 0.6, 1.5, 4.0]))
    noise = np.stack([ndimage.gaussian_filter(rng.random((height, width)), grain) for _ in range(3)])
    labels = noise.argmax(axis=0).astype(np.uint8)
    write_size = draw(st.sampled_from([11, 16, 24, 40]))
    for place in np.ndindex(-(-height // write_size), -(-width // write_size)):
        if rng.random() < draw(st.sampled_from([0.0, 0.3])):
            row, column = place[0] * write_size, place[1] * write_size
            labels[row : row + write_size, column : column + write_size] = IGNORED
    return labels, write_size


@settings(max_examples=30, deadline=None)
@given(label_maps())
def test_regions_drawn_again_are_the_labels(case: tuple[np.ndarray, int]) -> None:
    check(*case)


def spiral(size: int) -> np.ndarray:
    """One thin line of class 1, wound through every tile."""
    labels = np.zeros((size, size + 6), np.uint8)
    row, column, step, length = 0, 0, (0, 1), size
    for _ in range(2 * (size // 4)):
        for _ in range(length - 1):
            labels[row, column] = 1
            row, column = row + step[0], column + step[1]
        step = (step[1], -step[0])
        length -= 2 if step[0] == 0 else 0
    return labels


def nested(size: int) -> np.ndarray:
    """Squares in squares, of classes in turn: holes within holes."""
    rows, columns = np.mgrid[:size, : size + 9]
    depth = np.minimum(np.minimum(rows, columns), np.minimum(rows[::-1], columns[:, ::-1]))
    return (depth // 3 % 3).astype(np.uint8)


def chessboard(size: int) -> np.ndarray:
    return (np.indices((size, size + 3)).sum(axis=0) % 2).astype(np.uint8)


def test_bands_between_which_nothing_was_examined_are_not_joined() -> None:
    for missing in ([1], [1, 2], [0, 3]):
        labels = np.ones((80, 30), np.uint8)
        for band in missing:
            labels[16 * band : 16 * (band + 1)] = IGNORED
        check(labels, 16)


@pytest.mark.parametrize("labels", [spiral(60), nested(61), chessboard(33), np.ones((50, 80), np.uint8)])
@pytest.mark.parametrize("write_size", [16, 25, 128])
def test_shapes_that_are_hard_to_join(labels: np.ndarray, write_size: int) -> None:
    check(labels, write_size)


@settings(max_examples=30, deadline=None)
@given(label_maps(), st.integers(40, 200))
def test_a_region_whose_outline_is_too_long_is_cut_and_loses_nothing(case: tuple[np.ndarray, int], longest: int) -> None:
    labels, write_size = case
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.open_regions._LONGEST", longest)
        canvas = make(folder, labels, write_size)
        regions = list(find_regions(canvas, base_of(canvas), min_area_um2=6 * OUTPUT.area_um2))
    large = labels.copy()
    for index in range(3):
        parts, _ = ndimage.label(labels == index)
        large[(parts > 0) & (np.bincount(parts.ravel())[parts] < 6)] = IGNORED
    assert np.array_equal(drawn(regions, canvas), large)
    polygons = np.array([polygon_of(region) for region in regions])
    assert shapely.is_valid(polygons).all()
    assert np.array_equal(shapely.area(polygons) * BASE.area_um2, [region.area_um2 for region in regions])


def test_outlines_are_no_longer_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = (np.random.default_rng(2).random((160, 200)) < 0.7).astype(np.uint8)
    canvas = make(tmp_path, labels, 16)
    whole = list(find_regions(canvas, base_of(canvas), skip=[0], min_area_um2=1000))
    monkeypatch.setattr("pipeline.open_regions._LONGEST", 600)
    parts = list(find_regions(canvas, base_of(canvas), skip=[0], min_area_um2=1000))
    assert len(whole) == 1 and shapely.count_coordinates(polygon_of(whole[0])) > 10_000
    assert max(shapely.count_coordinates(polygon_of(part)) for part in parts) < 2 * 600
    assert sum(part.area_um2 for part in parts) == whole[0].area_um2
    assert all(part.part for part in parts) and not whole[0].part
    assert write(tmp_path / "r.geojson", parts)["Gland"] == 0
    measured = [item["properties"]["measurements"] for item in json.loads((tmp_path / "r.geojson").read_text())["features"]]
    assert all(item["Part of a larger region"] == 1 for item in measured)


def test_what_a_part_is_joined_to_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.ones((16, 48), np.uint8)
    labels[1:15:2, 1:15:2] = 0  # a sieve in the first tile, whose outlines are too long to be joined to the second tile
    monkeypatch.setattr("pipeline.open_regions._LONGEST", 200)
    canvas = make(tmp_path, labels, 16)
    regions = list(find_regions(canvas, base_of(canvas), skip=[0]))
    assert sorted(region.area_um2 / OUTPUT.area_um2 for region in regions) == [16 * 16 - 49, 2 * 16 * 16]
    assert all(region.part for region in regions)


def test_tiles_larger_than_a_block_are_joined_within() -> None:
    rng = np.random.default_rng(5)
    noise = np.stack([ndimage.gaussian_filter(rng.random((1500, 2300)), 20) for _ in range(3)])
    check(noise.argmax(axis=0).astype(np.uint8), 2048)


def test_an_outline_that_meets_itself_at_a_corner_is_valid(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]], np.uint8)
    check(labels, 16)
    regions = list(find_regions(make(tmp_path, labels, 16), Lattice(8, 30, BASE), skip={0, 2}))
    assert [len(region.rings) - 1 for region in regions] == [2]


def test_skipped_classes_and_small_regions_are_left_out(tmp_path: Path) -> None:
    labels = np.zeros((40, 70), np.uint8)
    labels[3:5, 3:6], labels[14:18, 14:19], labels[30:31, 50:56] = 1, 1, 2
    canvas = make(tmp_path, labels, 16)
    found = list(find_regions(canvas, base_of(canvas), skip=[0], min_area_um2=6 * OUTPUT.area_um2))
    assert sorted((region.class_index, region.area_um2) for region in found) == [(1, 9.0), (1, 30.0), (2, 9.0)]
    found = list(find_regions(canvas, base_of(canvas), skip=[0], min_area_um2=9.1))
    assert [region.area_um2 for region in found] == [30.0]


def test_mean_probability_is_that_of_the_pixels_of_the_region(tmp_path: Path) -> None:
    labels = np.zeros((40, 70), np.uint8)
    labels[10:30, 12:60] = 1
    likelihood = np.random.default_rng(0).uniform(0.5, 1, labels.shape)
    canvas = make(tmp_path, labels, 16, likelihood)
    regions = list(find_regions(canvas, base_of(canvas)))
    assert sorted(region.class_index for region in regions) == [0, 1]
    for region in regions:
        expected = np.rint(255 * likelihood[labels == region.class_index]).mean() / 255
        assert region.mean_probability == pytest.approx(expected, abs=1e-6)


def test_nothing_examined_gives_no_regions(tmp_path: Path) -> None:
    canvas = make(tmp_path, np.full((30, 50), IGNORED, np.uint8), 16)
    assert list(find_regions(canvas, base_of(canvas))) == []


def test_geojson_reads_back_as_the_labels(tmp_path: Path) -> None:
    labels, path = nested(61), tmp_path / "regions.geojson"
    canvas = make(tmp_path, labels, 16)
    regions = list(find_regions(canvas, base_of(canvas), skip=[0]))
    counts = write(path, iter(regions))
    features = json.loads(path.read_text())["features"]
    assert counts == {"Glass": 0, "Gland": 4, "Fat": 3}
    assert len(features) == 7
    again = [
        Region(CLASSES.index(item["properties"]["classification"]["name"]), item["geometry"]["coordinates"], 0, 0, False)
        for item in features
    ]
    assert np.array_equal(drawn(again, canvas), np.where(labels == 0, IGNORED, labels))
    for rings in (item["geometry"]["coordinates"] for item in features):
        turns = [shapely.LinearRing(ring).is_ccw for ring in rings]
        assert turns == [True, *[False] * (len(rings) - 1)], "as RFC 7946 has it"
    assert any(len(item["geometry"]["coordinates"]) > 1 for item in features)
    assert features[0]["properties"]["classification"]["color"] in ([0, 200, 80], [250, 220, 10])
    assert features[0]["properties"]["objectType"] == "annotation"
    assert features[0]["properties"]["isLocked"] is False
    assert features[0]["properties"]["measurements"] == {
        "Area µm^2": regions[0].area_um2,
        "Mean probability": 0.749,
    }
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".partial")] == []


def test_geojson_of_no_regions_is_an_empty_collection(tmp_path: Path) -> None:
    counts = write(tmp_path / "none.geojson", [])
    assert json.loads((tmp_path / "none.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
    assert counts == {"Glass": 0, "Gland": 0, "Fat": 0}


def test_coordinates_have_three_decimals_and_whole_numbers_none(tmp_path: Path) -> None:
    canvas, path = make(tmp_path, chessboard(5), 16), tmp_path / "regions.geojson"
    for x, y, left, top in ((10 / 3, 7, 0, 0), (4, 7 / 9, 0, 0), (10 / 3, 7 / 9, 25, 3), (4, 7, 25, 3), (4, 7, 0, 0)):
        base = Lattice(99, 99, Mpp(OUTPUT.x / x, OUTPUT.y / y))
        write(path, find_regions(canvas, base), (left, top))
        features = json.loads(path.read_text())["features"]
        points = [point for item in features for ring in item["geometry"]["coordinates"] for point in ring]
        assert {point[0] for point in points} == {round(column * x - left, 3) for column in range(9)}
        assert {point[1] for point in points} == {round(row * y - top, 3) for row in range(6)}
        whole = isinstance(x, int) and isinstance(y, int)
        assert ("." in path.read_text().split('"coordinates":')[1].split("}")[0]) is not whole
