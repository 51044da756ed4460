"""Phantoms: the same again for a seed, exact in their outlines, slides to OpenSlide, and no prey for a colour threshold."""

import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio.features
import shapely

from pipeline import phantom
from pipeline.errors import CohortError
from pipeline.histology import FAT, GLAND, GLASS, STROMA, TUMOUR
from pipeline.phantom import PHANTOM_CLASSES, Phantom

WIDTH, HEIGHT = 1501, 1203
Picture = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    return phantom.make_phantom(tmp_path_factory.mktemp("phantom") / "slide.tiff", 4, WIDTH, HEIGHT, 0.5)


@pytest.fixture(scope="module")
def picture() -> Picture:
    return phantom.render(4, WIDTH, HEIGHT, 0.5)


@pytest.fixture(scope="module")
def pair() -> tuple[Picture, Picture]:
    """Two phantoms of the size that the demo draws."""
    return phantom.render(11, 3001, 2402), phantom.render(12, 3001, 2402)


def dice(truth: np.ndarray, found: np.ndarray, index: int) -> float:
    return float(2 * np.sum((truth == index) & (found == index)) / (np.sum(truth == index) + np.sum(found == index)))


def test_a_seed_gives_one_phantom() -> None:
    (image, truth), again, other = (phantom.render(seed, 803, 602, 0.5) for seed in (4, 4, 5))
    assert image.shape == (602, 803, 3)
    assert truth.shape == (602, 803)
    assert np.array_equal(image, again[0])
    assert np.array_equal(truth, again[1])
    assert not np.array_equal(truth, other[1])


def test_the_height_of_a_band_changes_no_structure(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "_BAND", 190)
    image, truth = phantom.render(4, WIDTH, HEIGHT, 0.5)
    assert np.mean(truth != picture[1]) < 1e-6  # a pixel on the edge may fall either way, in the last bit of a float
    assert np.abs(image.astype(int) - picture[0]).max() < 25  # the camera's noise is drawn by band, nothing else


def test_outlines_rasterised_are_the_truth(made: Phantom, picture: Picture) -> None:
    features = json.loads(made.annotation.read_text())["features"]
    named = [(shapely.geometry.shape(f["geometry"]), f["properties"]["classification"]["name"]) for f in features]
    shapes = [(polygon, PHANTOM_CLASSES.index(name)) for polygon, name in named]
    found = rasterio.features.rasterize(shapes, out_shape=(HEIGHT, WIDTH), fill=GLASS, dtype="uint8")
    assert np.array_equal(found, picture[1])
    assert np.array_equal(found, made.truth)
    assert all(polygon.is_valid for polygon, _ in named)
    assert any(polygon.interiors for polygon, name in named if name == "Stroma")
    assert GLASS not in {index for _, index in shapes}


def test_outlines_are_what_qupath_exports(made: Phantom) -> None:
    collection = json.loads(made.annotation.read_text())
    assert collection["type"] == "FeatureCollection"
    colors = {kind.name: list(kind.color) for kind in PHANTOM_CLASSES}
    for feature in collection["features"]:
        label = feature["properties"]["classification"]
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"
        assert label["color"] == colors[label["name"]]


def test_openslide_opens_it(made: Phantom) -> None:
    slide = openslide.OpenSlide(made.slide)
    assert slide.dimensions == (WIDTH, HEIGHT)
    assert slide.properties["openslide.vendor"] == "generic-tiff"
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-6)
    assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-6)
    assert slide.level_dimensions[:4] == ((1501, 1203), (750, 601), (375, 300), (187, 150))
    assert slide.level_downsamples[1] != 2


def area_mean(image: np.ndarray, count: int) -> np.ndarray:
    """`image` with `count` rows, each the exact mean of the rows that it covers, whole or not."""
    sums = np.concatenate([np.zeros_like(image[:1]), image.cumsum(0)])
    edges = np.linspace(0, len(image), count + 1)
    whole = np.minimum(edges.astype(int), len(image) - 1)
    return np.diff(sums[whole] + (edges - whole)[:, None, None] * image[whole], axis=0) * count / len(image)


def test_every_level_shows_the_whole_slide(made: Phantom, picture: Picture) -> None:
    slide = openslide.OpenSlide(made.slide)
    for level, (width, height) in enumerate(slide.level_dimensions):
        rows = area_mean(picture[0].astype(float), height)
        expected = area_mean(rows.swapaxes(0, 1), width).swapaxes(0, 1)
        seen = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB"), float)
        error = np.abs(seen - expected).mean()  # of JPEG
        assert error < 7, f"level {level}"
        for axis in (0, 1):
            assert error < 0.6 * np.abs(np.roll(seen, 1, axis) - expected).mean(), f"level {level}: out of place"
        assert np.abs((seen - expected)[-9:, -9:]).mean() < 7, f"level {level}: last corner"
        assert np.abs((seen - expected).mean((0, 1))).max() < 0.3, f"level {level}: brightness"


def test_a_memory_map_is_written_too(tmp_path: Path) -> None:
    image = np.memmap(tmp_path / "raw", np.uint8, "w+", shape=(401, 703, 3))
    image[:, :350], image[:, 350:] = 40, 220
    phantom.write_slide(image, tmp_path / "slide.tiff", 0.25)
    slide = openslide.OpenSlide(tmp_path / "slide.tiff")
    assert (slide.dimensions, float(slide.properties["openslide.mpp-x"])) == ((703, 401), pytest.approx(0.25))
    assert abs(slide.read_region((340, 400), 0, (1, 1)).getpixel((0, 0))[0] - 40) < 4
    assert abs(slide.read_region((702, 400), 0, (1, 1)).getpixel((0, 0))[0] - 220) < 4
    assert not list(tmp_path.glob("*.partial"))


def test_picture_and_truth_lie_on_each_other(picture: Picture) -> None:
    green, glass = picture[0][8:-8, 8:-8, 1].astype(float), picture[1] == GLASS

    def agreement(down: int, right: int) -> float:
        moved = glass[8 + down : HEIGHT - 8 + down, 8 + right : WIDTH - 8 + right]
        return float(np.corrcoef(green.ravel(), moved.ravel())[0, 1])

    best = max(((down, right) for down in range(-2, 3) for right in range(-2, 3)), key=lambda shift: agreement(*shift))
    assert best == (0, 0)


def test_every_class_is_there(pair: tuple[Picture, Picture]) -> None:
    for _, truth in pair:
        share = np.bincount(truth.ravel(), minlength=len(PHANTOM_CLASSES)) / np.sum(truth != GLASS)
        assert share[GLASS] > 0.1
        assert min(share[STROMA], share[GLAND], share[TUMOUR], share[FAT]) > 0.08
        assert max(share[STROMA], share[GLAND], share[TUMOUR], share[FAT]) < 0.65


def color_votes(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4096, classes) pixels of each class by colour in 16 steps a channel, and each pixel's colour."""
    color = (image >> 4).astype(int) @ (256, 16, 1)
    votes = [np.bincount(color[truth == index], minlength=4096) for index in range(len(PHANTOM_CLASSES))]
    return np.stack(votes, 1), color


def test_colour_alone_fails(pair: tuple[Picture, Picture]) -> None:
    """The best class for each colour: no threshold, tree or centroid on a pixel's colour can do better on its own slide."""
    (votes, own_color), (_, color) = color_votes(*pair[0]), color_votes(*pair[1])
    best = votes.argmax(1)
    own, transferred = best[own_color], best[color]
    for index, limit in ((GLAND, 0.75), (TUMOUR, 0.82), (FAT, 0.82)):
        assert dice(pair[0][1], own, index) < limit, PHANTOM_CLASSES[index].name
        assert dice(pair[1][1], transferred, index) < limit, PHANTOM_CLASSES[index].name
    assert dice(pair[1][1], transferred, STROMA) < 0.9


@pytest.mark.parametrize(("spread", "kinds"), [(0.0, {GLASS}), (3.0, {STROMA, GLAND, TUMOUR, FAT})])
def test_a_slide_without_tissue_and_one_of_nothing_else(spread: float, kinds: set[int]) -> None:
    image, truth = phantom.render(2, 1101, 903, 0.5, spread)
    assert set(np.unique(truth)) == kinds
    assert (image.min() > 200) == (kinds == {GLASS})


def test_a_cohort_keeps_patients_apart(tmp_path: Path) -> None:
    lines = phantom.make_cohort(tmp_path, 3, 5, 403, 302).read_text().splitlines()
    assert lines[0] == "slide,annotation,patient,split"
    slides, annotations, patients, splits = zip(*(line.split(",") for line in lines[1:]), strict=True)
    assert splits == ("train", "train", "train", "val", "test")
    assert len(set(patients)) == len(set(zip(patients, splits, strict=True))) == 4
    assert all((tmp_path / name).exists() for name in slides + annotations)


def test_a_cohort_is_finished_not_made_again(tmp_path: Path) -> None:
    phantom.make_cohort(tmp_path, 3, 3, 403, 302)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("phantom*")}
    (tmp_path / "phantom-02.geojson").unlink()
    (tmp_path / "cohort.csv").unlink()
    phantom.make_cohort(tmp_path, 3, 3, 403, 302)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    kept = {path.name for path in tmp_path.glob("phantom*") if path.stat().st_mtime_ns == times[path.name]}
    assert kept == {f"phantom-{number}.{kind}" for number in ("01", "03") for kind in ("tiff", "geojson")}
    phantom.make_cohort(tmp_path, 3, 3, 405, 302)
    assert openslide.OpenSlide(tmp_path / "phantom-01.tiff").dimensions == (405, 302)


def test_a_cohort_of_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="3 or more"):
        phantom.make_cohort(tmp_path, 1, 2)
