import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.canvas import Canvas, create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.geometry import Lattice, Mpp
from pipeline.halving import halve_labels, halve_probabilities
from pipeline.pyramid import CoarseShard, build_pyramid, has_pyramid, remove_coarse
from tests.canvases import as_zarr_reads

CLASSES = Classes((Class("Stroma", (255, 0, 128)), Class("Gland", (0, 200, 80)), Class("Fat", (250, 220, 10))))


def make(folder: Path, width: int, height: int, write_size: int) -> Canvas:
    return create_canvas(folder / "out.ome.zarr", Lattice(width, height, Mpp(0.5, 0.25)), CLASSES, write_size, {})


def scores(canvas: Canvas, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).random((len(CLASSES), *canvas.lattice.shape), np.float32)
    return raw / raw.sum(axis=0)


def places(canvas: Canvas) -> list[tuple[int, int]]:
    return list(np.ndindex(*(-(-side // canvas.write_size) for side in canvas.lattice.shape)))


def write(canvas: Canvas, tiles: list[tuple[int, int]], probabilities: np.ndarray) -> None:
    for tile in tiles:
        roi = canvas.tile_roi(tile)
        canvas.write(roi, probabilities[:, *roi.slices()])


def write_blocks(canvas: Canvas, tiles: list[tuple[int, int]], probabilities: np.ndarray) -> None:
    """As a worker does: the tiles of a coarse shard together, and it with them."""
    for above in sorted({(row // 2, column // 2) for row, column in tiles}):
        coarse = CoarseShard(canvas, above)
        for tile in tiles:
            if (tile[0] // 2, tile[1] // 2) == above:
                roi = canvas.tile_roi(tile)
                coarse.add(tile, *canvas.write(roi, probabilities[:, *roi.slices()]))
        coarse.store()


def coarse_files(canvas: Canvas) -> dict[str, bytes]:
    arrays = (
        shards(level)
        for level in range(1, len(canvas.levels))
        for shards in (canvas.label_shards, canvas.probability_shards)
    )
    files = (path for array in arrays for path in sorted(array.folder.rglob("c/**/*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def slow_pyramid(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One level coarser, pixel by pixel."""
    height, width = (-(-side // 2) for side in labels.shape)
    coarse, means = np.full((height, width), IGNORED, np.uint8), np.zeros((len(probabilities), height, width), np.uint8)
    for y, x in np.ndindex(height, width):
        window = (slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        known = labels[window] != IGNORED
        if known.any():
            values, votes = np.unique(labels[window][known], return_counts=True)
            coarse[y, x] = values[votes.argmax()]
            means[:, y, x] = np.floor(probabilities[:, *window][:, known].mean(axis=1) + 0.5)
    return coarse, means


@pytest.mark.parametrize("write_size", [64, 75, 1031])
def test_pyramid_equals_a_slow_one(tmp_path: Path, write_size: int) -> None:
    canvas = make(tmp_path, width=1061, height=133, write_size=write_size)
    probabilities = scores(canvas)
    done = [place for place in np.ndindex(3, 17) if canvas.tile_roi(place).area and sum(place) % 3]
    write(canvas, done, probabilities)
    build_pyramid(canvas)
    assert [level.shape for level in canvas.levels] == [(133, 1061), (67, 531), (34, 266)]
    labels, means = canvas.read_labels(canvas.lattice.roi), canvas.read_probabilities(canvas.lattice.roi)
    for level in (1, 2):
        labels, means = slow_pyramid(labels, means)
        assert np.array_equal(as_zarr_reads(canvas.label_shards(level)), labels)
        assert np.array_equal(as_zarr_reads(canvas.probability_shards(level)), means)


def test_a_half_built_pyramid_is_made_anew(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    write(canvas, places(canvas), scores(canvas))
    build_pyramid(canvas)
    expected = [as_zarr_reads(canvas.label_shards(level)) for level in range(3)]
    canvas.label_shards(1).path((0, 1)).unlink()
    canvas.label_shards(2).path((0, 0)).write_bytes(canvas.label_shards(1).path((0, 0)).read_bytes())
    build_pyramid(canvas)
    assert all(np.array_equal(as_zarr_reads(canvas.label_shards(level)), expected[level]) for level in range(3))


@given(hnp.arrays(np.uint8, (4, 6), elements=st.sampled_from([0, 1, 2, 3, IGNORED])), st.integers(0, 2**32 - 1))
def test_halving_equals_a_slow_one(labels: np.ndarray, seed: int) -> None:
    probabilities = np.random.default_rng(seed).integers(0, 256, (2, 4, 6), np.uint8)
    probabilities[:, labels == IGNORED] = 0
    coarse, means = slow_pyramid(labels, probabilities)
    assert np.array_equal(halve_labels(labels), coarse)
    assert np.array_equal(halve_probabilities(probabilities, labels != IGNORED), means)


@settings(max_examples=25, deadline=None)
@given(st.integers(513, 700), st.integers(1, 300), st.integers(20, 300), st.integers(0, 99))
@example(531, 267, 75, 0)  # a pixel of level 1 has its four in two tiles
def test_level_1_made_of_tiles_as_they_are_written_is_that_made_from_disk(
    width: int, height: int, write_size: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        at_once, later = make(Path(one), width, height, write_size), make(Path(other), width, height, write_size)
        probabilities, chance = scores(at_once, seed), np.random.default_rng(seed)
        tiles = [tile for tile in places(at_once) if chance.random() < 0.7]
        write_blocks(at_once, tiles, probabilities)
        write(later, tiles, probabilities)
        if write_size % 2 == 0:
            above = {(row // 2, column // 2) for row, column in tiles}
            assert set(at_once.label_shards(1).places()) == set(at_once.probability_shards(1).places()) == above
        for canvas in (at_once, later):
            build_pyramid(canvas)
            assert has_pyramid(canvas)
        assert list(coarse_files(at_once).values()) == list(coarse_files(later).values())


def test_a_shard_of_level_1_waits_for_all_its_tiles_and_goes_when_one_is_to_be_written_anew(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=531, height=267, write_size=128)
    first, second = scores(canvas), scores(canvas, seed=1)
    write_blocks(canvas, places(canvas), first)
    before = canvas.label_shards(1).places()
    remove_coarse(canvas, [(1, 2)])
    for shards in (canvas.label_shards(1), canvas.probability_shards(1)):
        assert shards.places() == [place for place in before if place != (0, 1)]
    coarse = CoarseShard(canvas, (0, 1))
    roi = canvas.tile_roi((1, 2))
    coarse.add((1, 2), *canvas.write(roi, second[:, *roi.slices()]))
    coarse.store()  # three of its tiles are not in memory
    assert (0, 1) not in canvas.label_shards(1).places()
    build_pyramid(canvas)
    found = canvas.read_labels(canvas.levels[1].roi, 1)
    probabilities = canvas.read_probabilities(canvas.lattice.roi)
    assert np.array_equal(found, slow_pyramid(canvas.read_labels(canvas.lattice.roi), probabilities)[0])


def test_what_is_examined_is_found_beside_chunks_of_the_same_shard_that_are_not(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=2048, height=700, write_size=1024)
    assert canvas.write_size == 2 * canvas.chunk
    write(canvas, [(0, 1)], np.broadcast_to(np.float32([[[0]], [[1]], [[0]]]), (3, 700, 2048)))
    build_pyramid(canvas)
    for level, lattice in enumerate(canvas.levels):
        expected = np.full(lattice.shape, IGNORED)
        expected[:, lattice.width // 2 :] = 1
        assert np.array_equal(canvas.read_labels(lattice.roi, level), expected)
        assert np.array_equal(as_zarr_reads(canvas.label_shards(level)), expected)
        assert np.array_equal(canvas.read_probabilities(lattice.roi, level)[1] == 255, expected == 1)


@pytest.mark.parametrize(("level", "place"), [(1, (1, 1)), (2, (0, 1))])
def test_a_torn_shard_of_a_coarse_level_is_made_anew(tmp_path: Path, level: int, place: tuple[int, int]) -> None:
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    write_blocks(canvas, places(canvas), scores(canvas))
    build_pyramid(canvas)
    expected = coarse_files(canvas)
    path = canvas.label_shards(level).path(place)
    path.write_bytes(path.read_bytes()[:-9])
    assert not has_pyramid(canvas)
    build_pyramid(canvas)
    assert coarse_files(canvas) == expected


def test_a_slide_of_one_level_has_no_coarse_shard(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=300, height=170, write_size=64)
    write_blocks(canvas, places(canvas), scores(canvas))
    assert has_pyramid(canvas)
    assert not coarse_files(canvas)
