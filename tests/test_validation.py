"""What is looked at after every epoch, and that it counts as an evaluation would count it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotations import open_truth
from pipeline.classes import IGNORED
from pipeline.geometry import Lattice, Mpp
from pipeline.histology import GLASS
from pipeline.metrics import confusion
from pipeline.network import ModelSpec
from pipeline.patches import Source
from pipeline.phantom import PHANTOM_CLASSES, render, write_outlines, write_slide
from pipeline.settings import TissueSettings
from pipeline.slide import open_slide
from pipeline.stitching import usual
from pipeline.team import Alone
from pipeline.tissue import Tissue, find_tissue
from pipeline.truth import ClassMap
from pipeline.validation import KNOWN_TILE, Validation, draw, plan_validation, validate

SPEC = ModelSpec(architecture="fcn", classes=PHANTOM_CLASSES, mpp=1.0, patch_size=32, width=4, depth=2)
ALL = 1 << 40
TILE = KNOWN_TILE**2


class Darkness:
    """A network of one pixel: glass where it is bright, else the next class."""

    spec = SPEC

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        dark = windows.mean(axis=-1) < 200
        return np.stack([dark == (index == GLASS + 1) for index in range(len(SPEC.classes))], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Tissue]:
    """A piece of tissue on glass, and a mistaken outline in a corner where there is only glass."""
    folder = tmp_path_factory.mktemp("phantom")
    image, truth = render(5, 1701, 1303, 1.0, spread=0.4)
    truth[-70:-20, -90:-10] = GLASS + 1
    write_slide(image, folder / "slide.tiff", 1.0)
    write_outlines(truth, folder / "slide.geojson")
    slide = open_slide(folder / "slide.tiff")
    names = {item.name: index for index, item in enumerate(PHANTOM_CLASSES.items)}
    known = open_truth(folder / "slide.geojson", slide.base, ClassMap(PHANTOM_CLASSES, names, rest=GLASS), None)
    return Source(slide, known, slide.base), find_tissue(slide, TissueSettings())


def test_tiles_without_tissue_count_as_an_evaluation_counts_them(phantom: tuple[Source, Tissue]) -> None:
    (source, tissue), engine = phantom, Darkness()
    lattice = source.lattice
    labels, tiles = engine(source.slide.read(lattice.roi, lattice)[None])[0].argmax(axis=0).astype(np.uint8), 0
    for tile in usual(SPEC).grid(lattice, KNOWN_TILE):
        if tissue.fraction(tile.write_roi, lattice) > 0:
            tiles += 1
        else:
            labels[tile.write_roi.slices()] = IGNORED
    expected = confusion(source.truth.read(lattice.roi, lattice), labels, len(SPEC.classes))
    validation = plan_validation({"phantom": lambda: phantom}, SPEC, ALL, 0, Alone())
    found, unread = validate(validation, engine)
    assert (found == expected).all() and not unread and not validation.remark
    assert found[GLASS, -1] > 100_000 and found[GLASS + 1, -1] == 50 * 80
    assert len(validation.parts["phantom"].tiles) == tiles


@given(st.lists(st.lists(st.sampled_from([0, 0, TILE, TILE // 3]), max_size=40), max_size=6), st.integers(1, 30 * TILE))
def test_no_more_is_drawn_than_allowed_and_as_much_of_every_slide(slides: list[list[int]], most: int) -> None:
    pixels = [np.array(slide, np.int64) for slide in slides]
    chosen = draw(pixels, most, seed=3)
    drawn = sum(int(own[mask].sum()) for own, mask in zip(pixels, chosen, strict=True))
    everything = sum(int(own.sum()) for own in pixels)
    assert everything < most or most <= drawn < most + TILE or drawn == everything
    of_tissue = [((own > 0).sum(), (own[mask] > 0).sum()) for own, mask in zip(pixels, chosen, strict=True)]
    largest = max((shown for _, shown in of_tissue), default=0)
    assert all(shown >= min(there, largest - 1) for there, shown in of_tissue)
    if everything < most:
        assert all(mask.all() for mask in chosen)


def test_tiles_are_drawn_anywhere_and_glass_as_often_as_tissue() -> None:
    tissue = np.arange(4000) % 4 > 0
    (chosen,) = draw([tissue * TILE], 1500 * TILE, seed=1)
    assert chosen[tissue].sum() == 1500 and 0.45 < chosen[~tissue].mean() < 0.55
    assert all(0.4 < part.mean() < 0.6 for part in np.split(chosen, 8))
    assert (draw([tissue * TILE], 1500 * TILE, seed=2)[0] != chosen).any()


def test_no_slide_is_looked_at_more_because_it_is_listed_first() -> None:
    chosen = np.concatenate(draw([np.array([TILE])] * 400, 200 * TILE, seed=1))
    assert chosen.sum() == 200 and 70 < chosen[:200].sum() < 130


class Share:
    """A thread as one process of a team, which waits for the others to add up what each has counted."""

    def __init__(self, rank: int, told: list[np.ndarray], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._told, self._barrier = rank, len(told), told, barrier

    def total(self, counts: np.ndarray) -> np.ndarray:
        self._told[self.rank] = counts
        self._barrier.wait(60)
        total = np.sum(self._told, axis=0)
        self._barrier.wait(60)
        return total


def shares(opened: dict[str, Callable[[], tuple[Source, Tissue]]], most: int, size: int) -> list[Validation]:
    """What each process of a team of some size looks at."""
    told, barrier = [np.zeros(0)] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: plan_validation(opened, SPEC, most, 7, Share(rank, told, barrier)), range(size)))


def test_any_number_of_processes_look_at_the_same_tiles(phantom: tuple[Source, Tissue]) -> None:
    """Three slides, two of them a corner of the first that is all tissue."""
    source, _ = phantom

    def corner(width: int) -> tuple[Source, Tissue]:
        base = Lattice(width, 777, Mpp.square(1.0))
        mask = Tissue(np.ones(base.shape, bool), base)
        return Source(source.slide, replace(source.truth, base=base), base), mask

    opened = {"whole": lambda: phantom, "wide": lambda: corner(1300), "narrow": lambda: corner(600)}
    (alone,) = shares(opened, 4 * TILE, 1)
    assert 4 * TILE <= alone.looked_at < 5 * TILE < alone.known
    assert f"validation looks at {alone.looked_at / 1e6:.2f} of {alone.known / 1e6:.2f} Mpx" in alone.remark
    expected = {name: [tile.index for tile in part.tiles] for name, part in alone.parts.items()}
    for size in (2, 4):
        found = shares(opened, 4 * TILE, size)
        assert {(one.looked_at, one.known, one.remark) for one in found} == {(alone.looked_at, alone.known, alone.remark)}
        parts = {name: part for one in found for name, part in one.parts.items()}
        assert {name: [tile.index for tile in parts[name].tiles] for name in opened} == expected
    confusions = [validate(one, Darkness())[0] for one in found]
    assert (sum(confusions) == validate(alone, Darkness())[0]).all()
