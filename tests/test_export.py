from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from pipeline.canvas import Canvas, create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.export import overlay, truth_beside_prediction, write_ome_tiff, write_png
from pipeline.geometry import Lattice, Mpp
from pipeline.slide import Slide, open_slide

CLASSES = Classes((Class("Glass", (240, 240, 240)), Class("Drüse", (0, 160, 80)), Class("Fat", (250, 180, 10))))


def blobs(shape: tuple[int, int]) -> np.ndarray:
    """Smooth shapes of three classes."""
    rng = np.random.default_rng(7)
    return np.stack([ndimage.gaussian_filter(rng.random(shape), 12) for _ in range(3)]).argmax(axis=0).astype(np.uint8)


def make(folder: Path, lattice: Lattice, write_size: int) -> Canvas:
    """A canvas of blobs; every third tile was not examined."""
    canvas, labels = create_canvas(folder / "out.ome.zarr", lattice, CLASSES, write_size, {}), blobs(lattice.shape)
    for row, column in np.ndindex(-(-lattice.height // write_size), -(-lattice.width // write_size)):
        roi = canvas.tile_roi((row, column))
        if (row + column) % 3 != 1:
            part = labels[roi.slices()]
            canvas.write(roi, np.stack([part == index for index in range(3)]).astype(np.float32))
    canvas.build_pyramid()
    return canvas


@pytest.mark.parametrize("write_size", [256, 300, 1021])
def test_ome_tiff_holds_every_level_of_the_canvas(tmp_path: Path, write_size: int) -> None:
    canvas = make(tmp_path, Lattice(1300, 770, Mpp(0.5, 0.25)), write_size)
    path = tmp_path / "classes.ome.tif"
    write_ome_tiff(canvas, path)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert len(tiff.series) == 1
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [level.shape for level in canvas.levels]
        for number, level in enumerate(levels):
            assert np.array_equal(level.asarray(), canvas.read_labels(canvas.levels[number].roi, number))
            page = level.pages[0]
            assert page.is_tiled
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert tuple(page.colormap[:, 1] // 257) == CLASSES[1].color
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"]) == (0.5, 0.25)
    assert pixels["PhysicalSizeXUnit"] == "µm"
    assert (pixels["SizeX"], pixels["SizeY"], pixels["Type"]) == (1300, 770, "uint8")
    assert not list(tmp_path.glob("*.partial"))


def test_ome_tiff_opens_in_pillow_as_indices_with_colours(tmp_path: Path) -> None:
    canvas = make(tmp_path, Lattice(300, 170, Mpp(0.5, 0.5)), 64)
    write_ome_tiff(canvas, tmp_path / "classes.ome.tif")
    with Image.open(tmp_path / "classes.ome.tif") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), canvas.read_labels(canvas.lattice.roi))
        colored = np.asarray(image.convert("RGB"))
    assert np.all(colored[np.asarray(canvas.read_labels(canvas.lattice.roi)) == 2] == CLASSES[2].color)


def test_overlay_shows_slide_classes_legend_and_what_was_not_examined(tmp_path: Path, shared_data: Path) -> None:
    slide = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs")
    canvas = make(tmp_path, slide.base.at(Mpp.square(1.0)), 256)
    picture = overlay(slide, canvas)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    height = 2048 - 256
    width = -(-slide.base.width * height // slide.base.height)
    assert picture.shape[1] == pytest.approx(width, abs=1)
    assert height < picture.shape[0] <= 2048
    lines = np.all(picture[:height] == CLASSES[1].color, axis=2)
    labels = canvas.read_labels(canvas.lattice.roi)
    scale = slide.base.mpp.x * slide.base.height / height
    places = (np.argwhere(lines) * scale).astype(int)
    rows, columns = np.clip(places, 4, np.array(labels.shape) - 5).T
    around = np.stack([labels[rows + dy, columns + dx] for dy in (-3, 0, 3) for dx in (-3, 0, 3)])
    assert len(rows) > 1000
    assert (around.min(axis=0) != around.max(axis=0)).mean() > 0.95


def small_slide(path: Path) -> Slide:
    pixels = np.random.default_rng(2).integers(0, 256, (330, 500, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb")
    return open_slide(path, 0.5)


def test_overlay_of_a_small_slide_has_room_for_its_legend(tmp_path: Path) -> None:
    slide = small_slide(tmp_path / "slide.tif")
    canvas = make(tmp_path, slide.base.at(Mpp.square(4.0)), 24)
    picture = overlay(slide, canvas)
    assert picture.shape[1] == 640
    assert picture.shape[0] > slide.base.height
    assert np.all(picture[: slide.base.height, slide.base.width :] == 255)


def test_overlay_does_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = small_slide(tmp_path / "slide.tif")
    canvas = make(tmp_path, slide.base.at(Mpp.square(1.0)), 64)
    whole = overlay(slide, canvas)
    monkeypatch.setattr("pipeline.slide._MOST_PIXELS", 5000)
    assert np.array_equal(overlay(slide, canvas), whole)


def test_truth_and_prediction_stand_side_by_side_and_the_unknown_is_pale() -> None:
    truth, prediction = blobs((200, 310)), blobs((310, 200)).T
    truth[50:100, 50:120] = IGNORED
    image = np.zeros((200, 310, 3), np.uint8)
    picture = truth_beside_prediction(image, truth, prediction, CLASSES)
    gap = (picture.shape[1] - 3 * 310) // 2
    top = next(y for y in range(picture.shape[0]) if np.all(picture[y, :310] == 0))
    second, third = (picture[top : top + 200, start : start + 310] for start in (310 + gap, 620 + 2 * gap))
    assert np.all(picture[top : top + 200, :310] == 0)
    assert np.all(second[truth == IGNORED] >= 127)
    for panel, labels in ((second, truth), (third, prediction)):
        inside = ndimage.minimum_filter(labels, 7) == ndimage.maximum_filter(labels, 7)
        inside &= truth != IGNORED
        for index in (0, 1, 2):
            expected = np.array(CLASSES[index].color) * 0.38
            assert np.abs(panel[inside & (labels == index)] - expected).max() <= 2


def test_large_and_tiny_panels_are_brought_to_size() -> None:
    for shape, longer in (((3000, 2100), 1000), ((40, 80), 480)):
        labels = np.zeros(shape, np.uint8)
        picture = truth_beside_prediction(np.zeros((*shape, 3), np.uint8), labels, labels, CLASSES)
        dark = np.all(picture == 0, axis=2)
        assert max(dark.any(axis=0).sum(), dark.any(axis=1).sum()) == pytest.approx(longer, abs=40)


def test_png_is_written_whole(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 50, 3), np.uint8)
    write_png(tmp_path / "new" / "a.png", picture)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.array_equal(np.asarray(image), picture)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
