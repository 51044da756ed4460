import csv
from pathlib import Path

import numpy as np
import pytest

from pipeline.canvas import Canvas, create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.geometry import Lattice, Mpp
from pipeline.measurement import Measurement, count_pixels, measure, write_measurements
from pipeline.tissue import Tissue

CLASSES = Classes((Class("Stroma", (255, 0, 128)), Class("Gland", (0, 200, 80)), Class("Fat", (250, 220, 10))))
LATTICE = Lattice(130, 70, Mpp(2.0, 1.0))


def measured(canvas: Canvas, tissue: Tissue) -> tuple[Measurement, ...]:
    counts = np.zeros((2, len(CLASSES)), np.int64)
    for band in canvas.bands():
        counts += count_pixels(canvas, band, tissue)
    return measure(canvas, counts)


@pytest.fixture
def labels() -> np.ndarray:
    """Noise of three classes; the tiles of the second column were not examined."""
    labels = np.random.default_rng(3).choice(3, LATTICE.shape, p=[0.6, 0.3, 0.1]).astype(np.uint8)
    labels[:, 32:64] = IGNORED
    return labels


def drawn(path: Path, labels: np.ndarray, tile: int, examined: np.ndarray) -> Canvas:
    """A canvas of tiles of so many pixels, with these labels in those that hold something of `examined`, a mask."""
    canvas = create_canvas(path, LATTICE, CLASSES, tile, {})
    for place in np.ndindex(-(-LATTICE.height // tile), -(-LATTICE.width // tile)):
        roi = canvas.tile_roi(place)
        if examined[roi.slices()].any():
            part = labels[roi.slices()]
            canvas.write(roi, np.stack([part == index for index in range(3)]).astype(np.float32))
    return canvas


@pytest.fixture
def canvas(tmp_path: Path, labels: np.ndarray) -> Canvas:
    return drawn(tmp_path / "out.ome.zarr", labels, 32, labels != IGNORED)


def on_tissue(mask: np.ndarray) -> np.ndarray:
    """A mask at 8 um/px in pixels of the canvas."""
    return np.repeat(np.repeat(mask, 8, axis=0), 4, axis=1)[: LATTICE.height, : LATTICE.width]


def test_areas_count_every_examined_pixel(canvas: Canvas, labels: np.ndarray) -> None:
    nowhere = Tissue(np.zeros((9, 33), bool), Lattice(33, 9, Mpp.square(8)))
    for index, item in enumerate(measured(canvas, nowhere)):
        assert item.class_name == CLASSES.names[index]
        assert item.area_mm2 == pytest.approx((labels == index).sum() * 2e-6)
        assert (item.tissue_mm2, item.tissue_share) == (0, 0)


def test_what_is_on_tissue_does_not_depend_on_the_tiles(tmp_path: Path) -> None:
    labels = np.random.default_rng(5).choice(3, LATTICE.shape, p=[0.2, 0.3, 0.5]).astype(np.uint8)
    mask = np.zeros((9, 33), bool)
    mask[2:5, 9:14] = mask[-1, -1] = True
    tissue, stained = Tissue(mask, Lattice(33, 9, Mpp.square(8))), on_tissue(mask)
    found = [measured(drawn(tmp_path / f"{tile}.zarr", labels, tile, stained), tissue) for tile in (16, 32, 64)]
    areas = [sum(item.area_mm2 for item in items) for items in found]
    assert areas == sorted(set(areas))  # with larger tiles more glass is examined
    for items in found:
        for index, item in enumerate(items):
            assert item.tissue_mm2 == pytest.approx((labels[stained] == index).sum() * 2e-6)
            assert item.tissue_share == pytest.approx((labels[stained] == index).mean())


def test_shares_are_of_the_examined_tissue(canvas: Canvas, labels: np.ndarray) -> None:
    mask = np.random.default_rng(4).random((9, 33)) < 0.4
    examined = on_tissue(mask) & (labels != IGNORED)
    measurements = measured(canvas, Tissue(mask, Lattice(33, 9, Mpp.square(8))))
    for index, item in enumerate(measurements):
        assert item.tissue_share == pytest.approx((labels[examined] == index).mean())
    assert sum(item.tissue_share for item in measurements) == pytest.approx(1)


def test_a_slide_of_which_nothing_was_examined_has_zeros(tmp_path: Path) -> None:
    canvas = create_canvas(tmp_path / "empty.ome.zarr", LATTICE, CLASSES, 32, {})
    measurements = measured(canvas, Tissue(np.zeros((9, 33), bool), Lattice(33, 9, Mpp.square(8))))
    assert [(item.area_mm2, item.tissue_mm2, item.tissue_share) for item in measurements] == [(0, 0, 0)] * 3


def test_the_table_has_a_row_a_class(canvas: Canvas, tmp_path: Path) -> None:
    mask = np.random.default_rng(4).random((9, 33)) < 0.4
    measurements = measured(canvas, Tissue(mask, Lattice(33, 9, Mpp.square(8))))
    write_measurements(tmp_path / "measurements.csv", measurements, {"Stroma": 0, "Gland": 12})
    with (tmp_path / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["regions"]) for row in rows] == [("Stroma", "0"), ("Gland", "12"), ("Fat", "")]
    for row, item in zip(rows, measurements, strict=True):
        assert float(row["area_mm2"]) == pytest.approx(item.area_mm2, abs=1e-6)
        assert float(row["tissue_mm2"]) == pytest.approx(item.tissue_mm2, abs=1e-6)
        assert float(row["tissue_share"]) == pytest.approx(item.tissue_share, abs=1e-6)
