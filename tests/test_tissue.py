from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import morphology

from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.histology import GLASS
from pipeline.phantom import render, write_slide
from pipeline.settings import TissueSettings
from pipeline.slide import open_slide
from pipeline.tissue import PackedTissue, Tissue, _bands_at_once, find_tissue

MPP = 2.0
BLUE, GREEN, BLACK, LIME = (35, 60, 170), (30, 140, 70), (25, 25, 28), (60, 150, 70)


@pytest.fixture(scope="module")
def phantom() -> tuple[np.ndarray, np.ndarray]:
    """A piece of tissue on glass, and where it is."""
    image, truth = render(5, 1501, 1203, MPP, spread=0.6)
    return image, truth != GLASS


def tissue_of(image: np.ndarray, folder: Path) -> Tissue:
    write_slide(image, folder / "slide.tiff", MPP)
    return find_tissue(open_slide(folder / "slide.tiff"), TissueSettings())


def agreement(tissue: Tissue, truth: np.ndarray) -> float:
    """Dice of the mask against the truth, at the mask's scale."""
    step = tissue.lattice.mpp.x / MPP
    rows = np.minimum((np.arange(tissue.lattice.height) + 0.5) * step, truth.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(tissue.lattice.width) + 0.5) * step, truth.shape[1] - 1).astype(int)
    sampled = truth[np.ix_(rows, columns)]
    return 2 * (tissue.mask & sampled).sum() / (tissue.mask.sum() + sampled.sum())


def test_tissue_is_found(phantom, tmp_path: Path) -> None:
    image, truth = phantom
    assert agreement(tissue_of(image, tmp_path), truth) > 0.95


def test_pale_tissue_is_found(phantom, tmp_path: Path) -> None:
    image, truth = phantom
    pale = (245 - (245 - image.astype(float)) * 0.3).astype(np.uint8)
    assert agreement(tissue_of(pale, tmp_path), truth) > 0.9


def test_a_tinted_glass_is_glass(phantom, tmp_path: Path) -> None:
    image, truth = phantom
    tinted = (image * np.array([1.0, 0.985, 0.955])).astype(np.uint8)
    assert agreement(tissue_of(tinted, tmp_path), truth) > 0.95


@pytest.mark.parametrize("ink", [BLUE, GREEN, BLACK, LIME], ids=["blue", "green", "black", "lime"])
def test_pen_is_no_tissue(phantom, tmp_path: Path, ink: tuple[int, int, int]) -> None:
    image, truth = phantom
    marked = image.copy()
    marked[60:90, 100:1400] = ink
    marked[60:1100, 40:75] = ink
    far = ~ndimage.binary_dilation(truth, iterations=30)
    marked[~far] = image[~far]
    assert agreement(tissue_of(marked, tmp_path), truth) > 0.93


def test_a_black_border_is_no_tissue(phantom, tmp_path: Path) -> None:
    image, truth = phantom
    framed = image.copy()
    framed[:50], framed[-40:], framed[:, :45], framed[:, -60:] = 6, 6, 6, 6
    inside = truth.copy()
    inside[:50], inside[-40:], inside[:, :45], inside[:, -60:] = False, False, False, False
    assert agreement(tissue_of(framed, tmp_path), inside) > 0.93


def test_a_slide_without_tissue_has_none(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(241, 2.5, (900, 1300, 3)).clip(0, 255).astype(np.uint8)
    tissue = tissue_of(noise, tmp_path)
    assert tissue.mask.sum() == 0
    assert tissue.area_um2(Lattice(1300, 900, Mpp.square(MPP))) == 0


def test_a_slide_that_is_all_tissue_is_all_tissue(tmp_path: Path) -> None:
    image, truth = render(5, 1501, 1203, MPP, spread=3)
    assert (truth != GLASS).all()
    assert tissue_of(image, tmp_path).mask.mean() > 0.99


@settings(max_examples=30)
@given(width=st.integers(1, 90), height=st.integers(1, 90), x=st.floats(0.2, 3), y=st.floats(0.2, 3), seed=st.integers(0))
def test_tissue_does_not_reach_past_the_slide(width: int, height: int, x: float, y: float, seed: int) -> None:
    """Its area is that of its pixels, each cut to the slide."""
    base = Lattice(width, height, Mpp(x, y))
    lattice = base.at(Mpp(8.0, 7.0))
    mask = np.random.default_rng(seed).random(lattice.shape) < 0.6
    slow = sum(
        (min(8.0 * (column + 1), width * x) - 8.0 * column) * (min(7.0 * (row + 1), height * y) - 7.0 * row)
        for row, column in np.argwhere(mask)
    )
    assert Tissue(mask, lattice).area_um2(base) == pytest.approx(slow, abs=1e-4)
    whole = Tissue(np.ones(lattice.shape, bool), lattice)
    assert whole.area_um2(base) == pytest.approx(base.roi.area * base.mpp.area_um2)


@pytest.mark.parametrize("mpp", [1.0, 3.3, 8.0])
def test_bands_give_the_same_tissue_as_the_whole_view(
    phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpp: float
) -> None:
    image = phantom[0].copy()
    image[60:90, 100:1400], image[400:407, 300:304] = BLUE, GREEN
    write_slide(image, tmp_path / "slide.tiff", MPP)
    slide, settings = open_slide(tmp_path / "slide.tiff"), TissueSettings(mpp=mpp, min_area_um2=500, max_hole_um2=500)
    masks = []
    for pixels in (1 << 24, int(40_000 / mpp)):
        monkeypatch.setattr("pipeline.tissue._BAND_PIXELS", pixels)
        masks.append(find_tissue(slide, settings).mask)
    assert 0.1 < masks[0].mean() < 0.9
    assert np.array_equal(*masks)


def test_a_large_slide_is_judged_by_a_coarser_view(phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tissue._SURVEYED", 60)
    assert agreement(tissue_of(phantom[0], tmp_path), phantom[1]) > 0.95


def test_memory_does_not_grow_with_the_processors(phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(phantom[0], tmp_path / "slide.tiff", MPP)
    base, level = Lattice(100_003, 80_021, Mpp.square(0.25)), Lattice(6251, 5002, Mpp.square(4.0))
    scan = replace(open_slide(tmp_path / "slide.tiff"), base=base, levels=(base, level), downsamples=(1.0, 16.0))
    without_pyramid = replace(scan, levels=(base,), downsamples=(1.0,))
    seen = base.at(Mpp.square(8.0))
    for slide, most in ((without_pyramid, 2), (scan, 11)):
        for processors in (1, 2, 8, 64, 512):
            monkeypatch.setattr("pipeline.tissue.threads", lambda own=processors: own)
            assert _bands_at_once(slide, Roi(0, 0, seen.width, 200), seen) == min(processors, most)


def test_small_parts_and_holes_are_gone(phantom, tmp_path: Path) -> None:
    """Of what scikit-image would call small, to the pixel: what is as large as the limit, too."""
    write_slide(phantom[0], tmp_path / "slide.tiff", MPP)
    slide = open_slide(tmp_path / "slide.tiff")
    raw = find_tissue(slide, TissueSettings(min_area_um2=0, max_hole_um2=0)).mask
    part, hole = (sorted(np.bincount(ndimage.label(kind)[0].ravel())[1:])[-2] for kind in (raw, ~raw))
    cleaned = find_tissue(slide, TissueSettings(min_area_um2=64.0 * part, max_hole_um2=64.0 * hole)).mask
    expected = morphology.remove_small_holes(morphology.remove_small_objects(raw, max_size=part), max_size=hole)
    assert np.array_equal(cleaned, expected)
    assert ndimage.label(cleaned)[1] == ndimage.label(~cleaned)[1] == 1 < ndimage.label(raw)[1]


@pytest.mark.parametrize("patient", ["01", "03", "08", "10"])
def test_real_fields_on_glass_are_found(shared_data: Path, patient: str) -> None:
    """What experts annotated (the class `Region...`) is tissue; the glass between the fields is none."""
    import json

    from shapely.geometry import shape

    slide = open_slide(shared_data / "glas" / f"glas-patient-{patient}.tiff")
    tissue = find_tissue(slide, TissueSettings())
    outlines = json.loads((shared_data / "glas" / f"glas-patient-{patient}.geojson").read_text())["features"]
    fields = [shape(item["geometry"]) for item in outlines if item["properties"]["classification"]["name"][:6] == "Region"]
    boxes = [Roi(*(int(v) for v in (b[0], b[1], b[2] - b[0], b[3] - b[1]))) for b in (f.bounds for f in fields)]
    shares = [tissue.fraction(box, slide.base) for box in boxes]
    assert np.mean(shares) > 0.85
    known = sum(box.area for box in boxes) * slide.base.mpp.area_um2
    assert tissue.area_um2(slide.base) < 1.25 * known


def test_a_fraction_is_of_the_rectangle(phantom) -> None:
    mask = np.zeros((100, 150), bool)
    mask[20:60, 30:130] = True
    tissue = Tissue(mask, Lattice(150, 100, Mpp.square(8)))
    base = Lattice(2400, 1600, Mpp.square(0.5))
    assert tissue.fraction(Roi(30 * 16, 20 * 16, 1600, 640), base) == 1
    assert tissue.fraction(Roi(0, 0, 30 * 16, 1600), base) == 0
    assert tissue.fraction(Roi(0, 20 * 16, 60 * 16, 640), base) == 0.5
    assert tissue.fraction(Roi(5000, 5000, 10, 20), base) == 0


def test_a_small_slide_without_tissue_is_no_hole_of_some(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (250, 260, 3))
    write_slide((243 + noise).astype(np.uint8), tmp_path / "slide.tiff", 1.0)
    assert not find_tissue(open_slide(tmp_path / "slide.tiff"), TissueSettings()).mask.any()


def test_a_sample_goes_past_every_edge() -> None:
    mask = np.zeros((4, 6), bool)
    mask[0, 0] = mask[-1, -1] = True
    tissue = Tissue(mask, Lattice(6, 4, Mpp.square(8)))
    fine = Lattice(12, 8, Mpp.square(4))
    whole = tissue.sampled(Roi(-100, -90, 300, 300), fine)
    assert (whole[90:98, 100:112] == mask.repeat(2, 0).repeat(2, 1)).all()
    assert whole[:92, :102].all() and whole[96:, 110:].all() and not whole[:92, 102:].any()


def test_saved_tissue_comes_back(tmp_path: Path) -> None:
    lattice = Lattice(103, 59, Mpp(8.0, 7.0))
    tissue = Tissue(np.random.default_rng(0).random(lattice.shape) < 0.5, lattice)
    tissue.save(tmp_path / "tissue.npz")
    found = Tissue.load(tmp_path / "tissue.npz")
    assert found.lattice == lattice and (found.mask == tissue.mask).all() and found.mask.dtype == bool
    assert [path.name for path in tmp_path.iterdir()] == ["tissue.npz"]


def test_a_scan_that_is_coarser_than_the_view_is_looked_at_as_it_is(phantom, tmp_path: Path) -> None:
    write_slide(phantom[0][::8, ::8], tmp_path / "slide.tiff", 16.0)
    slide = open_slide(tmp_path / "slide.tiff")
    tissue = find_tissue(slide, TissueSettings(mpp=8.0))
    assert tissue.lattice == slide.base and tissue.mask.shape == slide.base.shape
    sampled = phantom[1][::8, ::8]
    assert 2 * (tissue.mask & sampled).sum() / (tissue.mask.sum() + sampled.sum()) > 0.9


def test_nuclei_as_dark_as_ink_are_tissue(phantom, tmp_path: Path) -> None:
    image, truth = phantom
    inside = ndimage.binary_erosion(truth, iterations=40)
    row, column = np.argwhere(inside)[inside.sum() // 2].tolist()
    marked = image.copy()
    marked[row - 30 : row + 30, column - 30 : column + 30] = (28, 15, 66)
    write_slide(marked, tmp_path / "slide.tiff", MPP)
    tissue = find_tissue(open_slide(tmp_path / "slide.tiff"), TissueSettings(max_hole_um2=0))
    assert tissue.fraction(Roi(column - 30, row - 30, 60, 60), Lattice(1501, 1203, Mpp.square(MPP))) > 0.95


def test_packed_tissue_is_the_same_in_an_eighth_of_the_memory() -> None:
    rng, lattice = np.random.default_rng(2), Lattice(1003, 599, Mpp.square(8))
    tissue, fine = Tissue(rng.random(lattice.shape) < 0.5, lattice), Lattice(7000, 4700, Mpp(1.13, 1.01))
    packed = PackedTissue.of(tissue)
    assert packed.bits.nbytes < tissue.mask.nbytes / 7.9
    for roi in (Roi(-90, -40, 300, 200), Roi(3001, 2002, 257, 129), Roi(6900, 4650, 300, 200), Roi(5, 5, 0, 7)):
        assert (packed.sampled(roi, fine) == tissue.sampled(roi, fine)).all()
