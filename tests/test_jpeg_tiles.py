from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SlideError
from pipeline.geometry import Lattice, Roi
from pipeline.jpeg_tiles import JpegLevel, jpeg_levels
from pipeline.phantom import render
from pipeline.slide import Slide, open_slide

WIDTH, HEIGHT, TILE = 902, 606, 128  # halved, one side is odd
KINDS = {"rgb": None, "ycbcr 444": (1, 1), "ycbcr 422": (2, 1), "ycbcr 420": (2, 2)}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return render(5, WIDTH, HEIGHT, 0.5)[0]


def write(image: np.ndarray, path: Path, kind: str) -> Slide:
    jpeg = {"tile": (TILE, TILE), "photometric": kind.split()[0], "subsampling": KINDS[kind], "compression": "jpeg"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None, **jpeg)
        writer.write(image[::2, ::2], subfiletype=1, metadata=None, **jpeg)
    return open_slide(path)


def drawn(slide: Slide, level: int, roi: Roi) -> np.ndarray:
    """What OpenSlide draws, over white."""
    scan = openslide.OpenSlide(str(slide.path))
    place = (roi.x * 2**level, roi.y * 2**level)
    picture = np.asarray(scan.read_region(place, level, (roi.width, roi.height))).astype(int)
    return np.where(picture[..., 3:] == 0, 255, picture[..., :3])


def tiles_of(slide: Slide) -> dict[int, JpegLevel]:
    slide.read(Roi(0, 0, slide.base.width, slide.base.height), slide.base)
    assert slide._scan.proven == {0}
    assert slide._scan.tiles is not None
    return slide._scan.tiles


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_what_openslide_draws(kind: str, image: np.ndarray, tmp_path: Path) -> None:
    slide = write(image, tmp_path / "slide.tiff", kind)
    tiles = tiles_of(slide)
    assert set(tiles) == {0, 1}
    slide.read(slide.levels[1].roi, slide.levels[1])
    assert slide._scan.proven == {0, 1}

    @settings(max_examples=25, deadline=None)
    @given(
        st.sampled_from([0, 1]),
        st.integers(-500, WIDTH + 50),
        st.integers(-400, HEIGHT + 50),
        st.integers(1, 400),
        st.integers(1, 300),
    )
    def check(level: int, x: int, y: int, width: int, height: int) -> None:
        roi = Roi(x, y, width, height)
        assert (slide.read(roi, slide.levels[level]) == drawn(slide, level, roi)).all()

    check()
    assert (tiles[0].read(slide.base.roi) == drawn(slide, 0, slide.base.roi)).all()


@pytest.mark.parametrize("name", ["glas/glas-patient-01.tiff", "slides/CMU-1-Small-Region.svs"])
def test_real_slides_are_what_openslide_draws(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / name)
    tiles_of(slide)
    roi = Roi(slide.base.width - 777, slide.base.height - 555, 900, 700)
    assert (slide.read(roi, slide.base) == drawn(slide, 0, roi)).all()


@pytest.mark.parametrize("name", ["tcga-cr-7395-01a-01-ts1.svs", "boxes.tiff"])
def test_other_compressions_are_left_to_openslide(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / "slides" / name, 0.5)
    slide.read(Roi(3, 5, 200, 100), slide.base)
    assert slide._scan.tiles == {}


def test_what_differs_is_not_used_again(image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide, roi = write(image, tmp_path / "slide.tiff", "ycbcr 444"), Roi(17, 33, 400, 300)
    expected = drawn(slide, 0, roi)
    monkeypatch.setattr(JpegLevel, "read", lambda self, roi: np.zeros((*roi.shape, 3), np.uint8))
    for _ in range(2):
        assert (slide.read(roi, slide.base) == expected).all()
    assert slide._scan.tiles is not None
    assert set(slide._scan.tiles) == {1}


def test_a_level_that_is_no_page_costs_the_others_nothing(image: np.ndarray, tmp_path: Path) -> None:
    slide = write(image, tmp_path / "slide.tiff", "rgb")
    base, small = slide.levels
    odd = Lattice(small.width + 1, small.height, small.mpp)
    assert set(jpeg_levels(slide.path, (base, odd, small))) == {0, 2}


def test_grey_proves_nothing(tmp_path: Path) -> None:
    grey = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    slide = write(grey, tmp_path / "slide.tiff", "rgb")
    slide.read(slide.base.roi, slide.base)
    assert slide._scan.proven == set()


HARM = {
    "ends early": lambda payload: payload[:-200] + b"\xff\xd9" * 100,
    "half is gone": lambda payload: payload[: len(payload) // 2] + bytes(len(payload) - len(payload) // 2),
    "all is gone": lambda payload: bytes(len(payload)),
    "bits are turned": lambda payload: payload[:-300] + bytes(byte ^ 0x5A for byte in payload[-300:]),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_tile_is_what_openslide_makes_of_it(harm: str, image: np.ndarray, tmp_path: Path) -> None:
    whole = write(image, tmp_path / "whole.tiff", "ycbcr 420")
    with tifffile.TiffFile(whole.path) as file:
        page = file.pages[0]
        offset, length = page.dataoffsets[9], page.databytecounts[9]  # the second row's second tile
    content = bytearray(whole.path.read_bytes())
    content[offset : offset + length] = HARM[harm](content[offset : offset + length])
    (tmp_path / "damaged.tiff").write_bytes(content)
    slide, good = open_slide(tmp_path / "damaged.tiff"), Roi(0, 0, WIDTH, TILE)
    slide.read(good, slide.base)
    assert slide._scan.proven == {0}
    try:
        expected = drawn(slide, 0, slide.base.roi)
    except openslide.OpenSlideError:
        with pytest.raises(SlideError, match=r"damaged\.tiff.*level 0"):
            slide.read(slide.base.roi, slide.base)
    else:
        assert harm in ("half is gone", "bits are turned")  # which can be read as a tile, if a wrong one
        assert (slide.read(slide.base.roi, slide.base) == expected).all()
    assert (slide.read(good, slide.base) == whole.read(good, whole.base)).all()


def test_a_tile_larger_than_the_file_says_is_left_to_openslide(image: np.ndarray, tmp_path: Path) -> None:
    slide = write(image, tmp_path / "slide.tiff", "rgb")
    tile = tiles_of(slide)[0]
    small = JpegLevel(tile.path, tile.width, tile.height, TILE // 2, TILE // 2, tile.offsets, tile.lengths, tile.head)
    with pytest.raises(ValueError, match="buffer"):
        small.read(Roi(0, 0, 10, 10))
