import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import ome_zarr_models.v05 as ngff
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.canvas import Canvas, create_canvas, open_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import CanvasError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.pyramid import build_pyramid
from tests.canvases import as_zarr_reads

CLASSES = Classes((Class("Stroma", (255, 0, 128)), Class("Gland", (0, 200, 80)), Class("Fat", (250, 220, 10))))
IDENTITY = {"model": "a1", "config": "b2", "slide": "c3"}


def make(folder: Path, width: int = 300, height: int = 170, write_size: int = 64) -> Canvas:
    return create_canvas(folder / "out.ome.zarr", Lattice(width, height, Mpp(0.5, 0.25)), CLASSES, write_size, IDENTITY)


def scores(canvas: Canvas, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).random((len(CLASSES), *canvas.lattice.shape), np.float32)
    return raw / raw.sum(axis=0)


def write_all(canvas: Canvas, probabilities: np.ndarray) -> None:
    rows, columns = (-(-side // canvas.write_size) for side in canvas.lattice.shape)
    for place in np.ndindex(rows, columns):
        roi = canvas.tile_roi(place)
        canvas.write(roi, probabilities[:, *roi.slices()])


def test_what_is_written_is_read_back_by_us_and_by_zarr(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    probabilities = scores(canvas)
    write_all(canvas, probabilities)
    roi = canvas.lattice.roi
    assert np.array_equal(canvas.read_labels(roi), probabilities.argmax(axis=0))
    assert np.abs(canvas.read_probabilities(roi) - 255 * probabilities).max() <= 0.5001
    assert np.array_equal(as_zarr_reads(canvas.label_shards(0)), canvas.read_labels(roi))
    assert np.array_equal(as_zarr_reads(canvas.probability_shards(0)), canvas.read_probabilities(roi))


def test_what_zarr_writes_is_read_by_us(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    labels = np.random.default_rng(1).integers(0, 3, canvas.lattice.shape, np.uint8)
    zarr.open_array(canvas.label_shards(0).folder, mode="r+")[:] = labels
    assert np.array_equal(canvas.read_labels(canvas.lattice.roi), labels)


def test_equal_probabilities_give_the_first_class(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=40, height=30)
    canvas.write(canvas.lattice.roi, np.full((3, 30, 40), 1 / 3, np.float32))
    assert np.all(canvas.read_labels(canvas.lattice.roi) == 0)


def test_unexamined_pixels_are_ignored_and_rois_may_reach_outside(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    roi = canvas.tile_roi((1, 2))
    canvas.write(roi, scores(canvas)[:, *roi.slices()])
    wide = Roi(-7, -3, 330, 190)
    labels, probabilities = canvas.read_labels(wide), canvas.read_probabilities(wide)
    examined = np.zeros(wide.shape, bool)
    examined[roi.within(wide).slices()] = True
    assert np.array_equal(labels != IGNORED, examined)
    assert np.all(probabilities[:, ~examined] == 0)
    assert canvas.done() == [(1, 2)]


@pytest.mark.parametrize(("write_size", "chunk", "block"), [(2048, 512, 1024), (1500, 500, 500), (2062, 2062, 2062)])
def test_blocks_cover_what_is_examined_once(tmp_path: Path, write_size: int, chunk: int, block: int) -> None:
    canvas = make(tmp_path, width=5000, height=2200, write_size=write_size)
    assert canvas.chunk == chunk
    seen = np.zeros(canvas.lattice.shape, int)
    for place in ((0, 0), (0, 2), (1, 1)):
        roi = canvas.tile_roi(place)
        canvas.write(roi, np.ones((3, *roi.shape), np.float32) / 3)
    assert canvas.bands() == [0, 1]
    for row in itertools.chain.from_iterable(map(canvas.block_rows, canvas.bands())):
        assert len({roi.y for roi in row}) == 1
        for roi in row:
            assert max(roi.shape) <= block
            seen[roi.slices()] += 1
    assert np.array_equal(seen, canvas.read_labels(canvas.lattice.roi) != IGNORED)


def test_metadata_is_valid_ngff_with_classes_and_micrometres(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    image = ngff.Image.from_zarr(zarr.open_group(canvas.path, mode="r"))
    label = ngff.ImageLabel.from_zarr(zarr.open_group(canvas.path / "labels/classes", mode="r"))
    ngff.Labels.from_zarr(zarr.open_group(canvas.path / "labels", mode="r"))
    ome = zarr.open_group(canvas.path, mode="r").attrs["ome"]
    assert [(item["label"], item["color"]) for item in ome["omero"]["channels"]] == [
        ("Stroma", "ff0080"),
        ("Gland", "00c850"),
        ("Fat", "fadc0a"),
    ]
    axes = image.ome_attributes.multiscales[0].axes
    assert [(axis.name, axis.type, axis.unit) for axis in axes][1:] == [
        ("y", "space", "micrometer"),
        ("x", "space", "micrometer"),
    ]
    colors = {item.label_value: item.rgba for item in label.ome_attributes.image_label.colors}
    assert colors[IGNORED][3] == 0
    assert colors[1] == (0, 200, 80, 255)


def test_levels_lie_over_each_other(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    attributes = zarr.open_group(canvas.path / "labels/classes", mode="r").attrs["ome"]
    for level, dataset in enumerate(attributes["multiscales"][0]["datasets"]):
        scale, shift = (
            dataset["coordinateTransformations"][0]["scale"],
            dataset["coordinateTransformations"][1]["translation"],
        )
        for axis, mpp in enumerate((0.25, 0.5)):
            left_edge = shift[axis] - scale[axis] / 2
            assert scale[axis] == mpp * 2**level
            assert left_edge == -mpp / 2


def test_a_canvas_of_another_scale_lies_on_its_slide(tmp_path: Path) -> None:
    """Viewers put the centre of a slide's first pixel at 0, and so its corner at half a pixel before."""
    lattice = Lattice(61, 33, Mpp(8.0, 4.0))
    canvas = create_canvas(tmp_path / "heat.ome.zarr", lattice, CLASSES, 64, {}, slide_mpp=Mpp(0.5, 0.25))
    for group in (canvas.path, canvas.path / "labels/classes"):
        (dataset,) = zarr.open_group(group, mode="r").attrs["ome"]["multiscales"][0]["datasets"]
        scale, shift = (list(each.values())[1][-2:] for each in dataset["coordinateTransformations"])
        assert [corner - side / 2 for corner, side in zip(shift, scale, strict=True)] == [-0.25 / 2, -0.5 / 2]
    assert open_canvas(canvas.path) == canvas


@pytest.mark.parametrize(("side", "levels"), [(512, 1), (513, 2), (1025, 3)])
def test_the_last_level_is_the_first_of_512_pixels_or_fewer(tmp_path: Path, side: int, levels: int) -> None:
    assert len(make(tmp_path / "wide", side, 60, 256).levels) == len(make(tmp_path / "high", 60, side, 256).levels) == levels


def test_opening_gives_back_the_same_canvas(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    assert open_canvas(canvas.path, IDENTITY) == canvas
    assert open_canvas(canvas.path) == canvas


def test_another_identity_is_refused_with_what_differs(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    with pytest.raises(CanvasError) as caught:
        open_canvas(canvas.path, {"model": "zz", "config": "b2", "device": "cpu"})
    assert caught.value.found == "device absent, model a1, slide c3"
    assert caught.value.expected == "device cpu, model zz, slide absent"
    assert "choose another output" in caught.value.remedy
    with pytest.raises(CanvasError):  # what says less is another run as well: only a blended one says `blend`
        open_canvas(canvas.path, {"model": "a1", "config": "b2"})


def test_what_is_no_canvas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CanvasError, match="Delete it, if it is there, and segment the slide"):
        open_canvas(tmp_path / "none.ome.zarr")
    zarr.create_group(tmp_path / "other.ome.zarr")
    with pytest.raises(CanvasError, match="Delete it, if it is there, and segment the slide"):
        open_canvas(tmp_path / "other.ome.zarr")


def test_an_existing_output_is_not_overwritten_but_a_partial_one_is(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    with pytest.raises(CanvasError):
        make(tmp_path)
    canvas.path.rename(tmp_path / "out.ome.zarr.partial")
    (tmp_path / "out.ome.zarr.partial" / "left over").touch()
    make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ome.zarr"]
    assert not (canvas.path / "left over").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 1.5])
def test_probabilities_that_are_none_are_refused_and_nothing_is_written(tmp_path: Path, bad: float) -> None:
    canvas = make(tmp_path)
    probabilities = scores(canvas)[:, :64, :64].copy()
    probabilities[:, 3, 5] = bad
    for engine, remedy in (("exact, torch", "train it again"), ("fast fp16, torch 2", "fast fp16.*say --precision exact")):
        begun = replace(canvas, identity={"engine": engine})
        with pytest.raises(CanvasError, match=f"numbers from 0 to 1.*{remedy}"):
            begun.write(canvas.tile_roi((0, 0)), probabilities)
    assert canvas.done() == []


@pytest.mark.parametrize("roi", [Roi(32, 0, 64, 64), Roi(0, 0, 32, 64), Roi(256, 128, 64, 64), Roi(320, 0, 0, 64)])
def test_what_is_no_tile_is_refused(tmp_path: Path, roi: Roi) -> None:
    with pytest.raises(ValueError, match="no tile"):
        make(tmp_path).write(roi, np.ones((3, *roi.shape), np.float32))


def test_a_torn_shard_is_named(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    write_all(canvas, scores(canvas))
    path = canvas.label_shards(0).path((1, 1))
    whole = path.read_bytes()
    for torn in (b"", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(torn)
        with pytest.raises(CanvasError, match="damaged shard") as caught:
            canvas.read_labels(canvas.lattice.roi)
        assert str(path) == caught.value.subject


@pytest.mark.parametrize("kind", ["label_shards", "probability_shards"])
def test_a_tile_is_done_with_both_of_its_files_and_whole_with_all_their_bytes(tmp_path: Path, kind: str) -> None:
    canvas = make(tmp_path)
    write_all(canvas, scores(canvas))
    damaged, *others = canvas.done()
    path = getattr(canvas, kind)(0).path(damaged)
    content = path.read_bytes()
    for left in (b"", content[: len(content) // 2], content[1:], b"x" + content):  # an index that is sound
        path.write_bytes(left)
        assert canvas.done() == [damaged, *others] and canvas.whole() == others
    path.unlink()
    assert canvas.done() == canvas.whole() == others


def test_every_row_of_tiles_has_its_folder_from_the_first_moment_on(tmp_path: Path) -> None:
    """A network file system that found none would not look for it again for a while, though another machine has made it."""
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    for level, rows in enumerate((3, 2, 1)):
        for shards in (canvas.label_shards(level), canvas.probability_shards(level)):
            folders = [shards.path((row, 0)).parent for row in range(rows)]
            assert sorted(folders[0].parent.iterdir()) == folders


def test_a_flipped_bit_anywhere_in_a_shard_is_noticed(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    write_all(canvas, scores(canvas))
    path = canvas.label_shards(0).path((1, 1))
    whole = path.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 97, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CanvasError, match="damaged shard"):
            canvas.read_labels(canvas.lattice.roi)


KEEP_WRITING = """
import sys, pathlib, numpy
from pipeline.canvas import open_canvas
canvas, scores = open_canvas(pathlib.Path(sys.argv[1])), numpy.load(sys.argv[2])
while True:
    for place in numpy.ndindex(3, 6):
        roi = canvas.tile_roi(place)
        canvas.write(roi, scores[:, *roi.slices()])
"""


def test_kill_at_any_moment_leaves_only_whole_tiles(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1500, height=700, write_size=256)
    probabilities = scores(canvas)
    np.save(tmp_path / "scores.npy", probabilities)
    expected = probabilities.argmax(axis=0)
    command = [sys.executable, "-c", KEEP_WRITING, str(canvas.path), str(tmp_path / "scores.npy")]
    for delay in (0.0, 0.013, 0.05):
        writers = [subprocess.Popen(command) for _ in range(2)]
        while not canvas.done():
            time.sleep(0.001)
        time.sleep(delay)
        for writer in writers:
            writer.kill()
            writer.wait()
        for place in canvas.done():
            roi = canvas.tile_roi(place)
            assert np.array_equal(canvas.read_labels(roi), expected[roi.slices()])
            assert np.abs(canvas.read_probabilities(roi) - 255 * probabilities[:, *roi.slices()]).max() <= 0.5001
            canvas.label_shards(0).path(place).unlink()
    write_all(canvas, probabilities)
    build_pyramid(canvas)
    assert np.array_equal(canvas.read_labels(canvas.lattice.roi), expected)
    canvas.remove_partial_files()
    assert not list(canvas.path.rglob("*.partial"))


def test_what_killed_writers_left_is_removed_from_every_array_and_nothing_else(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1061, height=533, write_size=256)
    write_all(canvas, scores(canvas))
    build_pyramid(canvas)
    before = {path: path.read_bytes() for path in canvas.path.rglob("*") if path.is_file()}
    for level in range(len(canvas.levels)):
        for shards in (canvas.label_shards(level), canvas.probability_shards(level)):
            path = shards.path((0, 0))
            path.with_name("9.5f3a.partial").write_bytes(b"half")
    assert canvas.done() == canvas.whole() and canvas.columns(0) == [0, 1, 2, 3, 4]
    canvas.remove_partial_files()
    assert {path: path.read_bytes() for path in canvas.path.rglob("*") if path.is_file()} == before


def test_one_tile_that_disk_does_not_tell_of_is_missed(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    write_all(canvas, scores(canvas))
    canvas.require({0: 5, 2: 5})
    for missing in (canvas.label_shards(0).path((0, 3)), canvas.probability_shards(0).path((2, 4))):
        missing.unlink()
        with pytest.raises(CanvasError, match="found 4 of the 5 tiles of row"):
            canvas.require({int(missing.parent.name): 5})
    canvas.require({0: 4, 1: 5})


def test_a_slide_is_few_files(tmp_path: Path) -> None:
    canvas = make(tmp_path, width=1500, height=700, write_size=256)
    write_all(canvas, scores(canvas))
    build_pyramid(canvas)
    tiles, coarse = 6 * 3, 3 * 2 + 2
    shards = [path for path in canvas.path.rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(shards) <= 2 * (tiles + coarse)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(20, 90), st.integers(0, 99))
def test_any_size_comes_back(width: int, height: int, write_size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        canvas = make(Path(folder), width, height, write_size)
        probabilities = scores(canvas, seed)
        write_all(canvas, probabilities)
        assert np.array_equal(as_zarr_reads(canvas.label_shards(0)), probabilities.argmax(axis=0))
        assert np.array_equal(canvas.read_labels(canvas.lattice.roi), probabilities.argmax(axis=0))
