from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from pipeline.classes import IGNORED
from pipeline.geometry import Mpp
from pipeline.pictures import outlined, overlay, truth_beside_prediction, write_png
from pipeline.slide import Slide, open_slide
from pipeline.tissue import Tissue
from tests.canvases import CLASSES, blobs, make


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


def test_truth_and_prediction_stand_side_by_side_and_the_unknown_is_hatched() -> None:
    truth, prediction = blobs((200, 310)), blobs((310, 200)).T
    truth[50:100, 50:120] = IGNORED
    image = np.zeros((200, 310, 3), np.uint8)
    picture = truth_beside_prediction(image, truth, prediction, CLASSES)
    gap = (picture.shape[1] - 3 * 310) // 2
    top = next(y for y in range(picture.shape[0]) if np.all(picture[y, :310] == 0))
    second, third = (picture[top : top + 200, start : start + 310] for start in (310 + gap, 620 + 2 * gap))
    assert np.all(picture[top : top + 200, :310] == 0)
    rows, columns = np.nonzero(truth == IGNORED)
    lines = (rows + columns) % 12 == 0  # between them all pales a little
    assert np.all(second[rows, columns][lines] > 60) and np.all(second[rows, columns][~lines] < 15)
    for panel, labels in ((second, truth), (third, prediction)):
        inside = ndimage.minimum_filter(labels, 7) == ndimage.maximum_filter(labels, 7)
        inside &= truth != IGNORED
        for index in (0, 1, 2):
            expected = np.array(CLASSES[index].color) * 0.38
            assert np.abs(panel[inside & (labels == index)] - expected).max() <= 2


def test_the_legend_has_a_swatch_for_what_is_not_known_where_there_is_any() -> None:
    image, known = np.zeros((200, 310, 3), np.uint8), blobs((200, 310))
    some = known.copy()
    some[50:100, 50:120] = IGNORED
    legend, longer = (truth_beside_prediction(image, truth, known, CLASSES)[230:] for truth in (known, some))
    added = np.any(legend != longer, axis=(0, 2))
    assert added.any() and np.all(legend[:, added] == 255)


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


def test_tissue_is_outlined_and_what_is_none_is_dimmed(tmp_path: Path) -> None:
    slide = small_slide(tmp_path / "slide.tif")
    mask = np.zeros((33, 50), bool)
    mask[8:20, 15:40] = True
    picture = outlined(slide, Tissue(mask, slide.base.at(Mpp.square(5.0))))
    pixels = slide.read(slide.base.roi, slide.base)
    fine = mask.repeat(10, 0).repeat(10, 1)
    line = ndimage.binary_dilation(fine) & ~ndimage.binary_erosion(fine)
    assert np.all(picture[line] == (0, 160, 60))
    assert np.array_equal(picture[fine & ~line], pixels[fine & ~line])
    assert np.all(picture[~fine & ~line] == pixels[~fine & ~line] // 4 * 3 + 32)
