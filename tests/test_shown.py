"""Scans that state which part of them was scanned: QuPath shows nothing else, and counts pixels from its corner."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.annotations import open_truth
from pipeline.canvas import create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import AnnotationError
from pipeline.finishing import outline_band, write_regions
from pipeline.geometry import Roi
from pipeline.phantom import render, write_slide
from pipeline.settings import TissueSettings
from pipeline.slide import Slide, open_slide
from pipeline.tissue import find_tissue, light_of
from pipeline.truth import ClassMap

CLASSES = Classes((Class("Other", (0, 0, 0)), Class("Gland", (0, 128, 0))))
NAMING = ClassMap(CLASSES, {"Gland": 1}, rest=0)
SHOWN = Roi(600, 450, 1024, 768)
WIDTH, HEIGHT, MPP = 3000, 2500, 0.5


def _image(name: str, sizes: list[tuple[int, int]], first: int, view: Roi, power: int) -> str:
    """One image of a Leica SCN: https://openslide.org/formats/leica/."""
    x, y, width, height = (int(number * MPP * 1000) for number in (view.x, view.y, view.width, view.height))
    levels = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{first + r}"/>' for r, (w, h) in enumerate(sizes))
    return f"""<image name="{name}"><device model="m" version="1"/>
        <pixels sizeX="{sizes[0][0]}" sizeY="{sizes[0][1]}">{levels}</pixels>
        <view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}" spacingZ="0"/><scanSettings>
        <objectiveSettings><objective>{power}</objective></objectiveSettings><illuminationSettings>
        <numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>
        </illuminationSettings></scanSettings></image>"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """A phantom on a larger glass, of which only `SHOWN` was scanned."""
    path = tmp_path_factory.mktemp("scn") / "slide.scn"
    pixels = render(4, SHOWN.width, SHOWN.height, MPP, spread=3)[0]
    macro = _image("macro", [(300, 250)], 0, Roi(0, 0, WIDTH, HEIGHT), 1)
    main = _image("main", [(SHOWN.width, SHOWN.height), (256, 192)], 1, SHOWN, 20)
    text = f"""<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
        <collection name="c" uuid="1" sizeX="{int(WIDTH * MPP * 1000)}" sizeY="{int(HEIGHT * MPP * 1000)}">
        <barcode>x</barcode>{macro}{main}</collection></scn>"""
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, "metadata": None}
    options |= {"software": False, "tile": (256, 256), "resolutionunit": "CENTIMETER"}
    small = pixels.reshape(192, 4, 256, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(np.full((250, 300, 3), 240, np.uint8), description=text, resolution=(1000, 1000), **options)
        file.write(pixels, resolution=(20000, 20000), **options)
        file.write(small, resolution=(5000, 5000), **options)
    return open_slide(path)


def test_a_scan_says_what_of_it_is_shown(slide: Slide, shared_data: Path) -> None:
    assert (slide.base.width, slide.base.height, slide.shown) == (WIDTH, HEIGHT, SHOWN)
    whole = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs")
    assert whole.shown == whole.base.roi


def test_outlines_are_read_and_written_from_the_corner_that_is_shown(slide: Slide, tmp_path: Path) -> None:
    lattice = slide.base
    canvas = create_canvas(tmp_path / "canvas", lattice, CLASSES, 512, {})
    gland = np.zeros(lattice.shape, np.float32)
    gland[SHOWN.y + 100 : SHOWN.y + 300, SHOWN.x + 200 : SHOWN.x + 600] = 1
    for row, column in np.ndindex(-(-HEIGHT // 512), -(-WIDTH // 512)):
        roi = canvas.tile_roi((row, column))
        part = gland[roi.slices()]
        canvas.write(roi, np.stack([1 - part, part]))
    for band in canvas.bands():
        outline_band(tmp_path, slide, canvas, find_tissue(slide, TissueSettings()), 0, 0.0, band)
    write_regions(tmp_path, slide, canvas, 0, 0.0)
    (feature,) = json.loads((tmp_path / "regions.geojson").read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring.min(axis=0).tolist(), ring.max(axis=0).tolist()) == ([200, 100], [600, 300])
    truth = open_truth(tmp_path / "regions.geojson", slide.base, NAMING, None, slide.shown)
    assert np.array_equal(truth.read(lattice.roi, lattice), gland.astype(np.uint8))


def test_a_label_image_may_have_the_size_that_is_shown(slide: Slide, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, SHOWN.shape, np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    truth = open_truth(tmp_path / "labels.png", slide.base, ClassMap(CLASSES, {}), None, slide.shown)
    found = truth.read(slide.base.roi, slide.base)
    assert np.array_equal(found[SHOWN.slices()], labels)
    found[SHOWN.slices()] = IGNORED
    assert (found == IGNORED).all()
    with pytest.raises(AnnotationError, match="1024 x 768"):
        open_truth(tmp_path / "labels.png", slide.base, ClassMap(CLASSES, {}), None)


def test_glass_is_what_was_scanned_of_it(slide: Slide, tmp_path: Path) -> None:
    write_slide(slide.read(SHOWN, slide.base), tmp_path / "alone.tiff", MPP)
    alone, settings = open_slide(tmp_path / "alone.tiff"), TissueSettings()
    expected = light_of(alone, find_tissue(alone, settings))
    assert np.abs(light_of(slide, find_tissue(slide, settings)) - expected).max() <= 2
    assert expected.max() < 245  # round it all is 255
