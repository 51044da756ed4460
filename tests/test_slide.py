import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import psutil
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ScaleError, SlideError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.machine import release_memory
from pipeline.phantom import render, write_slide
from pipeline.sampling import resample_columns, resample_rows, sampling
from pipeline.slide import Slide, _shared_slide, fallback_mpp, open_slide, unused_mpp

WIDTH, HEIGHT, MPP = 1403, 1021, 0.5


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return render(3, WIDTH, HEIGHT, MPP)[0]


@pytest.fixture(scope="module")
def slide(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """A pyramid whose levels have fractional downsamples, since its sides are odd."""
    path = tmp_path_factory.mktemp("slide") / "odd.tiff"
    write_slide(image, path, MPP)
    return open_slide(path)


def in_pieces(slide: Slide, roi: Roi, lattice: Lattice, width: int, height: int) -> np.ndarray:
    pixels = np.zeros((*roi.shape, 3), np.uint8)
    for y in range(roi.y, roi.bottom, height):
        for x in range(roi.x, roi.right, width):
            piece = Roi(x, y, width, height).intersect(roi)
            pixels[piece.within(roi).slices()] = slide.read(piece, lattice)
    return pixels


def test_a_slide_says_what_it_is(slide: Slide) -> None:
    assert (slide.base.width, slide.base.height) == (WIDTH, HEIGHT)
    assert slide.base.mpp.x == pytest.approx(MPP, rel=1e-4)
    assert len(slide.levels) >= 3
    assert slide.levels[0] == slide.base
    for level in slide.levels:
        assert level.width * level.mpp.x == pytest.approx(WIDTH * slide.base.mpp.x)
        assert level.height * level.mpp.y == pytest.approx(HEIGHT * slide.base.mpp.y)


def test_some_level_has_a_fractional_downsample(slide: Slide) -> None:
    downsamples = openslide.OpenSlide(str(slide.path)).level_downsamples
    assert any(value != round(value) for value in downsamples)


def test_the_base_is_what_openslide_reads(slide: Slide) -> None:
    roi = Roi(100, 50, 301, 202)
    reference = openslide.OpenSlide(str(slide.path)).read_region((100, 50), 0, (301, 202)).convert("RGB")
    assert (slide.read(roi, slide.base) == np.asarray(reference)).all()


@settings(max_examples=25)
@given(
    st.sampled_from([0.3, 0.5, 0.61, 1.0, 1.24, 2.0, 3.7, 8.0]),
    st.integers(-40, 500),
    st.integers(-40, 400),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(17, 150),
    st.integers(17, 150),
)
def test_pieces_are_the_whole(
    slide: Slide, mpp: float, x: int, y: int, width: int, height: int, piece_width: int, piece_height: int
) -> None:
    lattice, roi = slide.base.at(Mpp.square(mpp)), Roi(x, y, width, height)
    whole = slide.read(roi, lattice)
    assert whole.shape == (height, width, 3)
    assert (whole == in_pieces(slide, roi, lattice, piece_width, piece_height)).all()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.7, 1.24])
def test_pieces_are_the_whole_on_real_slides(shared_data: Path, name: str, mpp: float) -> None:
    real = open_slide(shared_data / "slides" / name, 0.25 if "tcga" in name else None)
    lattice = real.base.at(Mpp.square(mpp))
    roi = Roi(200, 301, 417, 333)
    assert (real.read(roi, lattice) == in_pieces(real, roi, lattice, 97, 131)).all()


def area_average(image: np.ndarray, scale: float, roi: Roi) -> np.ndarray:
    """Slow reference: each pixel is the mean of the image over its own area."""
    result = np.zeros((*roi.shape, 3))
    for row in range(roi.height):
        for column in range(roi.width):
            total, weight = np.zeros(3), 0.0
            top, left = (roi.y + row) * scale, (roi.x + column) * scale
            for y in range(int(top), int(np.ceil(top + scale))):
                for x in range(int(left), int(np.ceil(left + scale))):
                    share = (min(y + 1, top + scale) - max(y, top)) * (min(x + 1, left + scale) - max(x, left))
                    total, weight = total + share * image[y, x], weight + share
            result[row, column] = total / weight
    return result


@pytest.mark.parametrize("mpp", [0.7, 0.83, 1.0])
def test_a_coarser_scale_is_an_average_over_area(slide: Slide, mpp: float) -> None:
    base, roi = slide.read(slide.base.roi, slide.base).astype(float), Roi(31, 17, 23, 12)
    lattice = slide.base.at(Mpp.square(mpp))
    only_base = Slide(
        slide.path,
        slide.base,
        slide.levels[:1],
        slide.downsamples[:1],
        slide.vendor,
        slide.objective,
        slide.shown,
        slide._scan,
    )
    reference = area_average(base, lattice.mpp.x / slide.base.mpp.x, roi)
    assert np.abs(only_base.read(roi, lattice) - reference).max() <= 2


@pytest.mark.parametrize(
    ("downsamples", "mpp", "level"),
    [
        ((1.0, 2.0, 4.0), (0.2, 0.2), 0),  # finer than the scan
        ((1.0, 2.0, 4.0), (0.49, 0.49), 0),
        ((1.0, 2.0, 4.0), (0.496, 0.496), 1),  # coarser by less than a hundredth
        ((1.0, 2.0, 4.0), (0.5, 0.49), 0),  # along one axis
        ((1.0, 2.0, 4.0), (0.8, 0.8), 1),
        ((1.0, 2.0, 4.0), (0.98, 0.98), 1),
        ((1.0, 2.0, 4.0), (1.0, 1.0), 2),
        ((1.0, 2.0, 4.0), (8.0, 8.0), 2),
        ((1.0, 2.0, 4.0004), (1.0, 1.0), 1),  # four times the pixels cost less than those between two others
        ((1.0, 2.0004, 4.0), (0.5, 0.5), 0),
        ((1.0, 2.0004, 4.0008), (1.0, 1.0), 2),  # sixteen times cost more
    ],
)
def test_the_best_level_is_the_cheapest_that_is_fine_enough(
    slide: Slide, downsamples: tuple[float, ...], mpp: tuple[float, float], level: int
) -> None:
    levels = tuple(Lattice(800 // 2**index, 600 // 2**index, Mpp.square(0.25 * 2**index)) for index in range(3))
    assert replace(slide, base=levels[0], levels=levels, downsamples=downsamples).best_level(Mpp(*mpp)) == level


def test_fiducials_come_back_in_place(tmp_path: Path) -> None:
    """A dark square at a known place is found there at every scale, far from the origin too."""
    image = np.full((2501, 3701, 3), 240, np.uint8)
    centres = [(100.0, 80.0), (3600.0, 100.0), (140.0, 2400.0), (3580.0, 2380.0)]
    for x, y in centres:
        image[int(y) - 24 : int(y) + 24, int(x) - 24 : int(x) + 24] = 20
    write_slide(image, tmp_path / "marks.tiff", 0.25)
    slide = open_slide(tmp_path / "marks.tiff")
    for mpp in (0.25, 0.4, 0.5, 0.77, 1.0, 2.0):
        lattice = slide.base.at(Mpp.square(mpp))
        dark = 240.0 - slide.read(lattice.roi, lattice)[..., 1]
        rows, columns = np.mgrid[: lattice.height, : lattice.width] + 0.5
        for x, y in centres:
            near = (abs(columns * mpp / 0.25 - x) < 60) & (abs(rows * mpp / 0.25 - y) < 60)
            found_x = (columns * dark)[near].sum() / dark[near].sum() * mpp / 0.25
            found_y = (rows * dark)[near].sum() / dark[near].sum() * mpp / 0.25
            assert abs(found_x - x) < 1.1, mpp
            assert abs(found_y - y) < 1.1, mpp


def test_outside_the_scan_is_white(slide: Slide) -> None:
    assert (slide.read(Roi(-50, -70, 40, 60), slide.base) == 255).all()
    assert (slide.read(Roi(WIDTH + 1, HEIGHT + 1, 40, 60), slide.base) == 255).all()


def test_a_slide_travels_between_processes(slide: Slide) -> None:
    slide.read(Roi(0, 0, 10, 20), slide.base)
    copy = pickle.loads(pickle.dumps(slide))
    assert copy == slide
    assert (copy.read(Roi(5, 6, 70, 80), slide.base) == slide.read(Roi(5, 6, 70, 80), slide.base)).all()


def test_the_digest_sees_a_change(slide: Slide, image: np.ndarray, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.tiff" for name in "abc")
    write_slide(image[:400, :500], first, MPP)
    write_slide(255 - image[:400, :500], second, MPP)
    assert open_slide(first).digest() == open_slide(first).digest() != open_slide(second).digest()
    content = bytearray(slide.path.read_bytes())
    content[len(content) // 2] ^= 1  # a pixel of the base, at which OpenSlide's own hash does not look
    third.write_bytes(content)
    assert open_slide(third).digest() != slide.digest()


def test_a_slide_put_in_the_place_of_another_is_opened_anew(tmp_path: Path) -> None:
    """As large, and changed at the same time, as what copies times along leaves it."""
    path, other, pixels = tmp_path / "a.tiff", tmp_path / "b.tiff", np.full((192, 256, 3), 90, np.uint8)
    for place, shown in ((path, pixels), (other, pixels + 60)):
        tifffile.imwrite(place, shown, tile=(64, 64), photometric="rgb", metadata=None)
    assert (open_slide(path, 1.0).read(Roi(0, 0, 9, 9), Lattice(256, 192, Mpp.square(1.0))) == 90).all()
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)
    assert (open_slide(path, 1.0).read(Roi(0, 0, 9, 9), Lattice(256, 192, Mpp.square(1.0))) == 150).all()


def test_a_missing_scale_is_refused_and_may_be_given(shared_data: Path) -> None:
    path = shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(ScaleError, match="`mpp` column"):
        open_slide(path)
    assert open_slide(path, 0.25).base.mpp == Mpp(0.25, 0.25)


def test_a_fallback_is_for_slides_that_do_not_say(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "slides"
    assert fallback_mpp(folder / "tcga-cr-7395-01a-01-ts1.svs", 0.25) == 0.25
    assert fallback_mpp(folder / "boxes.tiff", 0.25) == 0.25
    assert fallback_mpp(folder / "CMU-1-Small-Region.svs", 0.25) is None
    assert fallback_mpp(tmp_path / "none.svs", 0.25) is None
    opened = _shared_slide.cache_info().misses
    assert fallback_mpp(folder / "boxes.tiff", None) is None
    assert _shared_slide.cache_info().misses == opened  # there is nothing to fall back on, so nothing is opened
    stated = "states 0.499 um/px, so that --mpp 0.25 is not used"
    assert unused_mpp(folder / "CMU-1-Small-Region.svs", 0.25).startswith(stated)
    assert not any(unused_mpp(folder / name, 0.25) for name in ("boxes.tiff", "none.svs"))
    assert not any(unused_mpp(folder / "CMU-1-Small-Region.svs", mpp) for mpp in (0.499, None))


def test_an_absurd_scale_is_refused(shared_data: Path) -> None:
    with pytest.raises(ScaleError, match=r"352\.7"):
        open_slide(shared_data / "slides" / "boxes.tiff")


@pytest.mark.parametrize(
    "name", ["cmu_trunc50.svs", "cmu_zeroed_tile.svs", "histolab-broken.svs", "oom.tif", "unopenable.tiff", "unreadable.svs"]
)
def test_a_damaged_file_is_one_clear_error(shared_data: Path, name: str) -> None:
    with pytest.raises(SlideError, match=name):
        damaged = open_slide(shared_data / "damaged" / name, 0.5)
        damaged.read(damaged.base.roi, damaged.base)


def test_a_slide_is_read_again_after_a_failure(shared_data: Path) -> None:
    damaged = open_slide(shared_data / "damaged" / "cmu_zeroed_tile.svs")
    good = Roi(0, 0, 200, 150)
    before = damaged.read(good, damaged.base)
    with pytest.raises(SlideError, match="level 0"):
        damaged.read(damaged.base.roi, damaged.base)
    assert (damaged.read(good, damaged.base) == before).all()


def test_a_missing_file_and_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "none.svs")
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(SlideError, match="no known format"):
        open_slide(tmp_path / "text.svs")


def test_a_compression_that_openslide_lacks_is_no_damage(tmp_path: Path) -> None:
    path, image = tmp_path / "jpeg2000.tiff", np.full((300, 400, 3), 200, np.uint8)
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", compression="jpeg2000")
    with pytest.raises(SlideError, match="not read .*34712.*Convert it"):
        open_slide(path, 0.5)


def test_channels_on_pages_of_their_own_are_no_grey_slide(tmp_path: Path) -> None:
    """Samples of a channel are stated, or not; and an RGB slide stays one, however its samples lie."""
    planes, path = np.random.default_rng(0).integers(0, 255, (3, 300, 400), np.uint8), tmp_path / "slide.ome.tif"
    pixels, options = np.moveaxis(planes, 0, -1), {"tile": (128, 128), "compression": "deflate"}
    apart = {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "ome": True}
    tifffile.imwrite(path, planes, **options, **apart)
    stated = tifffile.TiffFile(path).ome_metadata
    for text in (stated, stated.replace(' SamplesPerPixel="1"', ""), re.sub("<Channel.*</Channel>", "", stated)):
        tifffile.imwrite(path, planes, **options, photometric="minisblack", description=text, metadata=None)
        with pytest.raises(SlideError, match="3 channels, each on a page of its own.*RGB"):
            open_slide(path, 0.5)
        tifffile.imwrite(path, pixels, **options, photometric="rgb", description=text, metadata=None)
        assert (open_slide(path, 0.5).read(Roi(0, 0, 400, 300), Lattice(400, 300, Mpp.square(0.5))) == pixels).all()
    for text in ("<OME>", "<OME/>", stated.replace('SizeC="3"', ""), stated.replace('SizeC="3"', 'SizeC="x"')):
        tifffile.imwrite(path, planes[0], **options, photometric="minisblack", description=text, metadata=None)
        assert open_slide(path, 0.5).base.roi == Roi(0, 0, 400, 300)


@pytest.mark.parametrize("reduction", [2, 3, 2.5, 30, 56, 98, 160, 255, 400, 511])
def test_a_large_reduction_is_an_average_too(reduction: float) -> None:
    """Weights in whole 256ths are never below 0, however many there are, and one of them beside the truth at most."""
    found = sampling(3, 4, reduction, 5000)
    pixels, sources = np.arange(3, 7)[:, None], found.start + np.arange(found.length)
    common = np.minimum(sources + 1, (pixels + 1) * reduction) - np.maximum(sources, pixels * reduction)
    weights, truth = found.weights.toarray(), np.clip(common, 0, None) / reduction
    assert (weights.sum(axis=1) == 256).all()
    assert np.abs(weights - 256 * truth).max() <= 1
    rows = np.random.default_rng(0).integers(0, 256, (found.length, 2, 3), np.uint8)
    whole = resample_rows(rows, found)
    assert np.array_equal(whole, np.floor(np.tensordot(weights.astype(int), rows, 1) / 256 + 0.5))
    spread = 0.5 + 255 * np.sqrt(reduction) / 256  # of rounding that is as often up as down
    assert np.abs(whole - np.tensordot(truth, rows, 1)).max() <= spread
    constant = np.full((found.length, 2, 3), 245, np.uint8)
    assert (resample_rows(constant, found) == 245).all()


@pytest.mark.parametrize("scale", [0.37, 0.7, 1, 1.0107, 1.98, 2, 5.3])
def test_columns_are_made_as_rows_are(scale: float) -> None:
    found = sampling(3, 200, scale, 5000)
    pixels = np.random.default_rng(0).integers(0, 256, (150, found.length, 3), np.uint8)
    expected = resample_rows(np.ascontiguousarray(pixels.swapaxes(0, 1)), found).swapaxes(0, 1)
    assert np.array_equal(resample_columns(pixels, found), expected)


def test_rounding_noise_reads_no_pixel_more() -> None:
    # 45 * 1.4 is 62.99999999999999
    assert sampling(45, 2, 1.4, 5000).start == 63


def test_slides_held_open_share_one_cache(tmp_path: Path) -> None:
    """Each deflated slide of 28 MB of pixels is read through OpenSlide, whose cache would hold all of it."""
    pixels = np.random.default_rng(0).integers(0, 255, (384, 384, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    held, opened = [], []
    for number in range(4):
        path = tmp_path / f"{number}.tiff"
        tags = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}
        tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb", **tags)
        opened.append(open_slide(path))
        for y in range(0, opened[-1].base.height, 512):
            opened[-1].read(Roi(0, y, opened[-1].base.width, 512), opened[-1].base)
        release_memory()
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[0] < pixels.nbytes
