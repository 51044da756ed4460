from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.canvas import create_canvas
from pipeline.classes import IGNORED
from pipeline.geometry import Lattice, Mpp
from pipeline.ome_tiff import write_ome_tiff
from pipeline.pyramid import build_pyramid
from tests.canvases import CLASSES, make


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
            assert (page.colormap[:, IGNORED] == 65535).all()
            assert page.is_reduced == (number > 0)
            resolution = [tag[0] / tag[1] for tag in (page.tags["XResolution"].value, page.tags["YResolution"].value)]
            assert resolution == pytest.approx([1e4 / 0.5 / 2**number, 1e4 / 0.25 / 2**number])
            assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"]) == (0.5, 0.25)
    assert pixels["PhysicalSizeXUnit"] == "µm"
    assert (pixels["SizeX"], pixels["SizeY"], pixels["Type"]) == (1300, 770, "uint8")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("place", [(0, 1), (1, 0)])
def test_a_tile_of_the_tiff_is_written_though_only_its_end_was_examined(tmp_path: Path, place: tuple[int, int]) -> None:
    """Tiles of 296 pixels do not suit TIFF, whose tiles of 512 begin in one and end in the next."""
    canvas = create_canvas(tmp_path / "out.ome.zarr", Lattice(900, 800, Mpp(0.5, 0.25)), CLASSES, 296, {})
    canvas.write(canvas.tile_roi(place), np.full((3, 296, 296), 1 / 3, np.float32))
    build_pyramid(canvas)
    write_ome_tiff(canvas, tmp_path / "classes.ome.tif")
    for number, level in enumerate(canvas.levels):
        found = tifffile.imread(tmp_path / "classes.ome.tif", level=number)
        assert np.array_equal(found, canvas.read_labels(level.roi, number))


@pytest.mark.parametrize(("most", "is_big"), [(1.4 * 300 * 170, False), (1.4 * 300 * 170 - 1, True)])
def test_what_a_classic_tiff_may_not_hold_is_a_big_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, is_big: bool
) -> None:
    monkeypatch.setattr("pipeline.ome_tiff._CLASSIC_TIFF_BYTES", most)
    write_ome_tiff(make(tmp_path, Lattice(300, 170, Mpp(0.5, 0.5)), 64), tmp_path / "classes.ome.tif")
    with tifffile.TiffFile(tmp_path / "classes.ome.tif") as tiff:
        assert tiff.is_bigtiff == is_big


def test_ome_tiff_opens_in_pillow_as_indices_with_colours(tmp_path: Path) -> None:
    canvas = make(tmp_path, Lattice(300, 170, Mpp(0.5, 0.5)), 64)
    write_ome_tiff(canvas, tmp_path / "classes.ome.tif")
    with Image.open(tmp_path / "classes.ome.tif") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), canvas.read_labels(canvas.lattice.roi))
        colored = np.asarray(image.convert("RGB"))
    assert np.all(colored[np.asarray(canvas.read_labels(canvas.lattice.roi)) == 2] == CLASSES[2].color)
