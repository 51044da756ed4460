from dataclasses import replace
from pathlib import Path

import pytest
import tifffile

from pipeline.annotations import open_truth
from pipeline.errors import SlideError
from pipeline.geometry import Mpp, Roi
from pipeline.patches import Source
from pipeline.phantom import PHANTOM_CLASSES, make_phantom, render, write_slide
from pipeline.remembered import remembered
from pipeline.slide import open_slide
from pipeline.truth import ClassMap


class Counted:
    """A slide that counts how often it is read."""

    def __init__(self, slide):
        self.slide, self.reads = slide, 0

    def read(self, roi, lattice):
        self.reads += 1
        return self.slide.read(roi, lattice)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_slide(render(6, 1201, 903, 1.0)[0], tmp_path / "slide.tiff", 1.0)
    slide = open_slide(tmp_path / "slide.tiff")
    return Source(Counted(slide), None, slide.base.at(Mpp.square(1.7)))


@pytest.mark.parametrize("roi", [Roi(0, 0, 60, 50), Roi(200, 190, 300, 280), Roi(600, 450, 200, 170), Roi(-20, -30, 90, 70)])
def test_the_bytes_are_those_of_the_slide(source: Source, roi: Roi) -> None:
    kept = remembered({"a": source})["a"].slide
    for lattice in (source.lattice, source.lattice.at(Mpp.square(4))):
        assert (kept.read(roi, lattice) == source.slide.slide.read(roi, lattice)).all()


def test_nothing_is_read_twice(source: Source) -> None:
    kept = remembered({"a": source})["a"].slide
    first = kept.read(Roi(10, 20, 400, 300), source.lattice)
    reads = source.slide.reads
    assert (kept.read(Roi(10, 20, 400, 300), source.lattice) == first).all()
    kept.read(Roi(50, 30, 200, 100), source.lattice)
    assert source.slide.reads == reads


def test_beside_a_damaged_tile_all_is_read_that_the_slide_gives(source: Source) -> None:
    path, beside = source.slide.slide.path, Roi(180, 20, 60, 50)  # in the block, but not in the tile
    expected = source.slide.read(beside, source.lattice)
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    content = path.read_bytes()
    path.write_bytes(content[:offset] + bytes(length) + content[offset + length :])
    kept = remembered({"a": replace(source, slide=open_slide(path))})["a"].slide
    assert (kept.read(beside, source.lattice) == expected).all()
    with pytest.raises(SlideError, match=r"slide\.tiff.*level 0"):
        kept.read(Roi(100, 20, 60, 50), source.lattice)


def test_what_does_not_fit_is_not_kept(source: Source) -> None:
    large = replace(source, lattice=source.lattice.at(Mpp.square(0.02)))
    assert remembered({"a": source, "b": large})["a"].slide is source.slide


def test_small_fields_count_with_all_that_is_kept_of_them(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(source, lattice=source.lattice.at(Mpp.square(6)))
    kept = remembered({"a": small})["a"].slide
    kept.read(small.lattice.roi.grow(100), small.lattice)
    held = sum(block.nbytes for block in kept._blocks.values()) * 4 // 3  # and the truth
    monkeypatch.setattr("pipeline.remembered._MOST_BYTES", held - 1)
    assert remembered({"a": small})["a"].slide is small.slide


def test_the_truth_stays_where_it_is_in_the_image(tmp_path: Path) -> None:
    phantom = make_phantom(tmp_path / "slide.tiff", 6, 1201, 903, 1.0)
    slide = open_slide(phantom.slide)
    classes = ClassMap(PHANTOM_CLASSES, {name: index for index, name in enumerate(PHANTOM_CLASSES.names)}, rest=0)
    plain = Source(slide, open_truth(phantom.annotation, slide.base, classes, None), slide.base.at(Mpp.square(1.7)))
    kept = remembered({"a": plain})["a"]
    roi = Roi(-20, 190, 600, 280)
    for lattice in (plain.lattice, plain.lattice.at(Mpp.square(4))):
        assert (kept.truth.read(roi, lattice) == plain.truth.read(roi, lattice)).all()
    assert len(set(plain.truth.read(roi, plain.lattice).flat)) > 3
    assert (kept.truth.known_roi(), kept.truth.base) == (plain.truth.known_roi(), plain.truth.base)
