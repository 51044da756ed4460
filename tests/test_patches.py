from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from scipy import ndimage, stats

from pipeline.annotations import open_truth
from pipeline.augment import Augmentation, augment
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import AnnotationError, SlideError, TrainingError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.patches import Patch, PatchIndex, PatchStream, Shown, Source, patch_roi, read_index
from pipeline.slide import Pixels, Slide, open_slide
from pipeline.truth import ClassMap, Truth

SIZE = 64
STRENGTHS = Augmentation(flips=True, rotation_degrees=180, scale=0.1, elastic_px=2, blur_px=0.5, stain=0.1)
NAMES = ("gland", "stroma", "tumour")


CLASSES = Classes((Class("bright", (250, 220, 250)), Class("dark", (40, 20, 90))))


@dataclass(frozen=True)
class Counted(PatchStream):
    """A stream that notes what it prepares."""

    prepared: list[int] = field(default_factory=list)

    def patch(self, epoch: int, position: int) -> Patch:
        self.prepared.append(position)
        return super().patch(epoch, position)


def source_of(slide: Slide, mpp: float, labels: Path, dark: int = 1) -> Source:
    """The slide with a truth that can be seen: a label image, `dark` where it is dark at `mpp` and 0 elsewhere."""
    lattice = slide.base.at(Mpp.square(mpp))
    mask = np.where(slide.read(lattice.roi, lattice)[..., 0] < 128, dark, 0).astype(np.uint8)
    Image.fromarray(mask).save(labels)
    return Source(slide, open_truth(labels, slide.base, ClassMap(CLASSES, {}), mpp), lattice)


def blobs(path: Path, width: int, height: int, seed: int) -> Slide:
    """A slide of dark blobs on bright ground, 0.5 um a pixel."""
    noise = np.random.default_rng(seed).random((height, width))
    dark = ndimage.gaussian_filter(noise, 8) < 0.5
    pixels = np.where(dark[..., None], (40, 20, 90), (240, 220, 250)).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    return open_slide(path, 0.5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("slides")
    slides = {"a": blobs(folder / "a.tif", 500, 310, 1), "b": blobs(folder / "b.tif", 290, 410, 2)}
    return {name: source_of(slide, 1.0, folder / f"{name}.png") for name, slide in slides.items()}


def index_of(rows: list[tuple[str, int, int, tuple[float, ...]]]) -> PatchIndex:
    rows = sorted(rows)
    ids = sorted({row[0] for row in rows})
    return PatchIndex(
        tuple(ids),
        np.array([ids.index(row[0]) for row in rows]),
        np.array([row[1:3] for row in rows]),
        np.array([row[3] for row in rows]),
    )


def cells(sources: dict[str, Source], size: int = SIZE) -> PatchIndex:
    """Every cell of some slides, with the share of it that each class covers."""
    rows = []
    for name, source in sources.items():
        for y, x in product(range(0, source.lattice.height, size), range(0, source.lattice.width, size)):
            mask = source.truth.read(Roi(x, y, size, size), source.lattice)
            rows.append((name, x, y, (float((mask == 0).mean()), float((mask == 1).mean()))))
    return index_of(rows)


def stream_of(sources: dict[str, Source], threads: int = 1, strengths: Augmentation = STRENGTHS) -> PatchStream:
    return PatchStream(cells(sources), sources, strengths, SIZE, seed=3, threads=threads)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def skewed() -> PatchIndex:
    """Slide `a` has 400 cells of class 0 and 40 of class 1, `b` 10 of class 0, `c` 3 of class 1 and one half of 2."""
    counts = {("a", 0): 400, ("a", 1): 40, ("b", 0): 10, ("c", 1): 3}
    rows = []
    for (slide, column), count in counts.items():
        pure = tuple(float(k == column) for k in range(3))
        rows += [(slide, 1000 * k, 1000 * column, pure) for k in range(count)]
    return index_of([*rows, ("c", 0, 2000, (0.25, 0.25, 0.5))])


def drawn(index: PatchIndex, seed: int, count: int = 3000) -> list[Shown]:
    rng = np.random.default_rng(seed)
    return [index.draw(SIZE, rng) for _ in range(count)]


def test_classes_are_equally_likely_and_slides_by_the_root_of_what_they_hold() -> None:
    places = drawn(skewed(), 5)
    # Class 0 is in a, b and c; class 1 in a and c; class 2 in c alone. The mixed cell, row 2, is all that c has of classes 2
    # and 0, and 0.25 of the 3.25 that it has of class 1.
    class_0, class_1 = np.sqrt([400, 10, 0.25]), np.sqrt([40, 3.25])
    (a0, b0, c0), (a1, c1) = class_0 / class_0.sum() / 3, class_1 / class_1.sum() / 3
    expected = {
        ("a", 0, 0): a0,
        ("b", 0, 0): b0,
        ("c", 0, 2): c0,
        ("a", 1, 1): a1,
        ("c", 1, 1): c1 * 3 / 3.25,
        ("c", 1, 2): c1 * 0.25 / 3.25,
        ("c", 2, 2): 1 / 3,
    }
    found = Counter((shown.slide_id, shown.class_index, shown.cell.y // 1000) for shown in places)
    seen = [found[key] for key in expected]
    assert sum(seen) == len(places) and {shown.cell.shape for shown in places} == {(SIZE, SIZE)}
    assert stats.chisquare(seen, len(places) * np.array(list(expected.values()))).pvalue > 0.001


def test_cells_are_drawn_in_proportion_to_their_class() -> None:
    shares = np.array([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    places = drawn(index_of([("a", 1000 * k, 0, (share,)) for k, share in enumerate(shares)]), 0)
    seen = np.bincount([shown.cell.x // 1000 for shown in places], minlength=6)
    assert (seen[shares == 0] == 0).all()
    assert stats.chisquare(seen[shares > 0], len(places) * shares[shares > 0]).pvalue > 0.01


@pytest.fixture(scope="module")
def speck(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A slide of 400 x 300 px on which class 1 is two pixels beside each other and a third; half of the rest is unknown."""
    folder = tmp_path_factory.mktemp("speck")
    tifffile.imwrite(folder / "s.tif", np.full((300, 400, 3), 200, np.uint8), tile=(64, 64), photometric="rgb")
    slide, mask = open_slide(folder / "s.tif", 1.0), np.zeros((300, 400), np.uint8)
    mask[:, 200:] = IGNORED
    mask[130, 150:152] = mask[190, 129] = 1
    Image.fromarray(mask).save(folder / "s.png")
    return Source(slide, open_truth(folder / "s.png", slide.base, ClassMap(CLASSES, {}), 1.0), slide.base)


SPECK = Shown("s", Roi(128, 128, SIZE, SIZE), 1)


def test_a_patch_shows_a_pixel_of_its_class_anywhere(speck: Source) -> None:
    rng = np.random.default_rng(1)
    rois = [patch_roi(SPECK, speck, SIZE, rng) for _ in range(600)]
    spread = Counter[tuple[int, int]]()
    for roi in rois:
        found = np.argwhere(speck.truth.read(roi, speck.lattice) == 1)
        assert len(found)
        spread.update((int(x) // 16, int(y) // 16) for y, x in found)
    assert roi.shape == (SIZE, SIZE) and len(spread) == 16
    counts = np.array(list(spread.values()))
    assert counts.min() > 0.6 * counts.mean()


def test_a_centred_patch_has_each_pixel_of_its_class_as_often_in_the_middle(speck: Source) -> None:
    rng = np.random.default_rng(2)
    rois = [patch_roi(SPECK, speck, SIZE, rng, centred=True) for _ in range(900)]
    middles = Counter((roi.y + SIZE // 2, roi.x + SIZE // 2) for roi in rois)
    assert set(middles) == {(130, 150), (130, 151), (190, 129)}
    assert stats.chisquare(list(middles.values())).pvalue > 0.001


def test_a_cell_without_what_the_table_says_is_told(speck: Source) -> None:
    with pytest.raises(TrainingError, match=r"s: found no pixel of class 1 in the tile at 0, 64.*Delete `tiles.parquet`"):
        patch_roi(replace(SPECK, cell=Roi(0, 64, SIZE, SIZE)), speck, SIZE, np.random.default_rng(0))


def test_half_of_a_classifiers_patches_are_of_a_small_class(speck: Source) -> None:
    index, shares = index_of([("s", 128, 128, (0.9, 3 / SIZE**2)), ("s", 0, 0, (1.0, 0.0))]), []
    for centred in (True, False):
        stream = PatchStream(index, {"s": speck}, Augmentation(), SIZE, seed=1, threads=1, centred=centred)
        shares.append([int(stream.patch(0, position)[1][SIZE // 2, SIZE // 2]) for position in range(100)])
    assert 35 < sum(value == 1 for value in shares[0]) < 65 and set(shares[0]) == {0, 1}
    assert IGNORED in shares[1]


def write_tiles(path: Path, order: np.ndarray, names: tuple[str, ...] = NAMES) -> Path:
    rows = [("s2", "val", 0, 0)] + [("s1", "train", x, y) for x in (0, 64, 128) for y in (0, 64)] + [("s0", "train", 64, 0)]
    columns: dict[str, list[object]] = {"slide_id": [], "split": [], "x": [], "y": []}
    for row in (rows[k] for k in order):
        for key, value in zip(columns, row, strict=True):
            columns[key].append(value)
    for k, name in enumerate(names):
        columns[name] = [(x + y + k) / 1000 for x, y in zip(columns["x"], columns["y"], strict=True)]  # type: ignore[operator]
    parquet.write_table(pa.table(columns), path)
    return path


def test_index_is_one_split_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    index = read_index(write_tiles(tmp_path / "one.parquet", np.arange(8)), NAMES, "train")
    other = read_index(write_tiles(tmp_path / "two.parquet", np.random.default_rng(0).permutation(8)), NAMES, "train")
    assert index.slide_ids == ("s0", "s1")
    assert index.slides.tolist() == [0] + [1] * 6
    assert index.corners.tolist() == [[64, 0], [0, 0], [64, 0], [128, 0], [0, 64], [64, 64], [128, 64]]
    np.testing.assert_allclose(index.fractions[:, 2], (index.corners.sum(axis=1) + 2) / 1000)
    for name in ("slides", "corners", "fractions"):
        np.testing.assert_array_equal(getattr(index, name), getattr(other, name))
    assert drawn(index, 0, 20) == drawn(other, 0, 20)


def test_no_two_of_a_patch_s_random_streams_are_one(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, stream, begin = list[tuple[int, ...]](), stream_of(sources), np.random.default_rng
    monkeypatch.setattr("pipeline.patches.np.random.default_rng", lambda seed: (drawn.append(tuple(seed)), begin(seed))[1])
    for position in range(2):
        stream.patch(0, position)
        for attempt in range(1, 4):
            stream.place(0, position, attempt)
    assert len({begin(seed).bytes(8) for seed in drawn}) == len(drawn) == 2 * (2 + 3)


def test_index_of_many_cells_takes_little_beside_them(tmp_path: Path) -> None:
    """Names as those of TCGA, whose letters as an array of numpy's are 4 bytes each in every row."""
    rows, names = 20_000, [f"TCGA-CR-{number:04d}-01A-01-TS1.3f6a9b0c-1234-4a5b-9c8d-0123456789ab" for number in range(9)]
    rng = np.random.default_rng(1)
    ids, (x, y), share = rng.integers(9, size=rows), rng.integers(50_000, size=(2, rows)), rng.random(rows)
    columns = {"slide_id": [names[number] for number in ids], "split": ["train"] * rows, "x": x, "y": y, "gland": share}
    parquet.write_table(pa.table(columns), tmp_path / "tiles.parquet")
    read_index(tmp_path / "tiles.parquet", ("gland",), "train")  # what is imported for it
    tracemalloc.start()
    index = read_index(tmp_path / "tiles.parquet", ("gland",), "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    order = np.lexsort((x, y, ids))
    assert [index.slide_ids[number] for number in index.slides] == [names[number] for number in ids[order]]
    assert (index.corners == np.stack([x, y], axis=1)[order]).all() and (index.fractions[:, 0] == share[order]).all()
    assert peak < 64 * rows


def test_index_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    path = write_tiles(tmp_path / "tiles.parquet", np.arange(8))
    with pytest.raises(TrainingError, match=r"no column for the classes \['fat'\]"):
        read_index(path, ("gland", "fat"), "train")
    with pytest.raises(TrainingError, match="no known pixel .* in the split 'test'"):
        read_index(path, NAMES, "test")
    with pytest.raises(TrainingError, match="no known pixel"):
        read_index(write_tiles(tmp_path / "empty.parquet", np.arange(1), ("gland",)), ("gland",), "val")


@dataclass(frozen=True)
class Given:
    """A truth that is an array."""

    mask: np.ndarray

    def read(self, roi: Roi, lattice: Lattice) -> np.ndarray:
        rows, columns = roi.intersect(lattice.roi).shape
        part = self.mask[roi.intersect(lattice.roi).slices()]
        return np.pad(part, ((0, roi.height - rows), (0, roi.width - columns)), constant_values=IGNORED)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_patch_that_would_hang_over_is_moved_onto_the_lattice(width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lattice, size = Lattice(width, height, Mpp.square(1)), int(rng.integers(1, 200))
    mask = (rng.random((height, width)) < 0.02).astype(np.uint8)
    mask[rng.integers(height), rng.integers(width)] = 1
    source = Source(cast(Pixels, None), cast(Truth, Given(mask)), lattice)
    for centred in (False, True):
        roi = patch_roi(Shown("s", Roi(0, 0, max(mask.shape), max(mask.shape)), 1), source, size, rng, centred)
        assert roi.shape == (size, size)
        middle = (roi.y + size // 2, roi.x + size // 2)
        assert not centred or mask[middle] == 1
        for start, length in () if centred else ((roi.x, width), (roi.y, height)):
            assert 0 <= start <= length - size or abs((start + size / 2) - length / 2) <= 1 and length < size
        assert centred or max(mask.shape) < size or mask[roi.intersect(lattice.roi).slices()].any()


def test_image_and_truth_agree_on_every_patch(sources: dict[str, Source]) -> None:
    stream = stream_of(sources)
    for position in range(40):
        image, mask = stream.patch(0, position)
        assert image.shape == (SIZE, SIZE, 3) and mask.shape == (SIZE, SIZE)
        known = mask != IGNORED
        assert known.mean() > 0.5
        assert ((image[..., 0] < 128) == (mask == 1))[known].mean() > 0.97


def test_without_augmentation_a_patch_is_the_slide_itself(sources: dict[str, Source]) -> None:
    stream = stream_of(sources, strengths=Augmentation())
    for position in range(10):
        slide_id, roi = stream.place(1, position)
        source = stream.sources[slide_id]
        image, mask = stream.patch(1, position)
        np.testing.assert_array_equal(image, source.slide.read(roi, source.lattice))
        np.testing.assert_array_equal(mask, source.truth.read(roi, source.lattice))


def test_where_a_patch_lies_depends_on_seed_epoch_and_position_alone(sources: dict[str, Source]) -> None:
    stream = stream_of(sources)
    later = [stream.place(2, position) for position in range(9, -1, -1)]
    assert later[::-1] == [stream_of(sources).place(2, position) for position in range(10)]
    others = (stream.place(3, 3), replace(stream, seed=2).place(2, 3), stream.place(2, 4), stream.place(2, 3, attempt=1))
    assert later[6] not in others


def test_every_patch_is_changed_in_its_own_way(sources: dict[str, Source]) -> None:
    stream = stream_of(sources, strengths=Augmentation(brightness=0.5))
    patches = [stream.patch(epoch, position) for epoch in (0, 1) for position in range(15)]
    darkest = [image[..., 2].min() for image, _ in patches]
    assert len(set(darkest)) > 20


def test_how_a_patch_is_turned_has_nothing_to_do_with_where_it_is(sources: dict[str, Source]) -> None:
    both = cells(sources)
    index = replace(both, fractions=np.eye(2)[both.slides])  # all of a class on one slide
    stream = PatchStream(index, sources, Augmentation(flips=True), SIZE, seed=3, threads=1)
    seen = {name: set[int]() for name in sources}
    for position in range(100):
        slide_id, roi = stream.place(0, position)
        plain, _ = sources[slide_id].read(roi)
        views = [np.rot90(image, turns) for image in (plain, plain[:, ::-1]) for turns in range(4)]
        patch, _ = stream.patch(0, position)
        seen[slide_id].update(number for number, view in enumerate(views) if np.array_equal(patch, view))
    assert seen == {name: set(range(8)) for name in sources}


def test_patches_on_a_real_slide(shared_data: Path, tmp_path: Path) -> None:
    slide = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs")
    sources = {"s": source_of(slide, 1.2, tmp_path / "labels.png")}
    stream = PatchStream(cells(sources, 256), sources, replace(STRENGTHS, stain=0.0), 256, seed=0, threads=1)
    for image, mask in (stream.patch(0, position) for position in range(6)):
        clear = (mask != IGNORED) & (np.abs(image[..., 0].astype(int) - 128) > 25)
        assert clear.mean() > 0.5
        assert ((image[..., 0] < 128) == (mask == 1))[clear].mean() > 0.97


def first_that_can_be_read(stream: PatchStream, position: int) -> tuple[int, Patch]:
    """Attempts at a patch until one succeeds: its number and what comes of it."""
    for attempt in range(99):
        slide_id, roi = stream.place(0, position, attempt)
        rng = np.random.default_rng([stream.seed, 0, position, 1])
        try:
            pixels = stream.sources[slide_id].read(roi.grow(STRENGTHS.margin(SIZE)))
        except SlideError:
            continue
        return attempt, augment(*pixels, rng, STRENGTHS, SIZE)
    raise AssertionError


def test_a_patch_that_cannot_be_read_is_drawn_anew_and_all_others_stay(shared_data: Path, tmp_path: Path) -> None:
    whole = source_of(open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs"), 1.2, tmp_path / "labels.png")
    damaged = replace(whole, slide=open_slide(shared_data / "damaged" / "cmu_zeroed_tile.svs"))
    healthy, stream = (PatchStream(cells({"s": one}), {"s": one}, STRENGTHS, SIZE, 0, 1) for one in (whole, damaged))
    attempts = list[int]()
    for position in range(200):
        attempt, expected = first_that_can_be_read(stream, position)
        attempts.append(attempt)
        for found in (stream.patch(0, position), *([] if attempt else [healthy.patch(0, position)])):
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        assert stream.unread == ({"s"} if any(attempts) else set())
        if len(set(attempts)) == 2:
            break
    assert set(attempts) == {0, 1}
    hopeless = replace(stream, index=index_of([("s", 317, 716, (1.0, 0.0))]))  # the tile of which there are but zeros
    with pytest.raises(SlideError, match=r"cmu_zeroed_tile\.svs.*level 0"):
        hopeless.patch(0, 0)


def test_batches_are_the_patches_in_their_order_for_any_number_of_threads(sources: dict[str, Source]) -> None:
    positions = [0, 1, 2, 11, 10, 9, 30, 31, 32, 33]
    stream = stream_of(sources)
    expected = [stream.patch(2, position) for position in positions]
    for threads in (1, 3):
        batches = list(stream_of(sources, threads).batches(2, positions, 4))
        assert [len(images) for images, _ in batches] == [4, 4, 2]
        assert batches[0][0].dtype == np.uint8 and batches[0][1].shape == (4, SIZE, SIZE)
        np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), [image for image, _ in expected])
        np.testing.assert_array_equal(np.concatenate([masks for _, masks in batches]), [mask for _, mask in expected])
    assert not reader_threads()


def test_threads_work_ahead_but_not_far(sources: dict[str, Source]) -> None:
    stream = Counted(cells(sources), sources, STRENGTHS, SIZE, seed=3, threads=2)
    batches = stream.batches(0, range(1000), 3)
    next(batches)
    deadline = time.monotonic() + 30
    while len(stream.prepared) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(stream.prepared) == list(range(9)), "one batch taken, two ahead"


def test_a_failure_is_raised_in_its_turn(sources: dict[str, Source], tmp_path: Path) -> None:
    broken = source_of(sources["b"].slide, 1.0, tmp_path / "broken.png", dark=9)
    stream = replace(stream_of(sources, threads=2), sources={**sources, "b": broken})
    names = [stream_of(sources).place(0, position)[0] for position in range(100)]
    healthy = [position for position, name in enumerate(names) if name == "a"][:6]
    batches = stream.batches(0, [*healthy, names.index("b"), *healthy], 3)
    assert len(next(batches)[0]) == len(next(batches)[0]) == 3
    with pytest.raises(AnnotationError, match=r"broken\.png.*labels of value 9"):
        next(batches)
    assert not reader_threads()


def test_stopping_early_leaves_no_thread(sources: dict[str, Source]) -> None:
    for images, _ in stream_of(sources, threads=3).batches(0, range(10_000), 4):
        assert len(reader_threads()) == 3 and len(images) == 4
        break
    assert not reader_threads()
