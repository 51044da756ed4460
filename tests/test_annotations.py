"""Annotations: names and values become classes, what is not known counts for nothing, and masks come back bit for bit."""

import json
import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from rasterio.features import shapes as mask_shapes

from pipeline.annotations import OutlineTruth, open_truth, with_glass
from pipeline.classes import IGNORED, Class, Classes
from pipeline.errors import AnnotationError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.label_image import open_label_image
from pipeline.label_truth import LabelImageTruth
from pipeline.tissue import PackedTissue, Tissue
from pipeline.truth import ClassMap, Truth

CLASSES = Classes((Class("Other", (200, 200, 200)), Class("Gland", (0, 120, 0)), Class("Tumour", (200, 0, 0))))
BASE = Lattice(37, 23, Mpp.square(0.5))
X = IGNORED


def feature(name: str | None, geometry: Any) -> dict[str, Any]:
    shape = geometry if isinstance(geometry, dict) else shapely.geometry.mapping(geometry)
    return {"type": "Feature", "geometry": shape, "properties": {"classification": name and {"name": name}}}


def geojson(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def drawn(folder: Path, class_map: ClassMap, *features: dict[str, Any]) -> Truth:
    return open_truth(geojson(folder / "a.geojson", *features), BASE, class_map, None)


def naming(**options: Any) -> ClassMap:
    return ClassMap(**({"classes": CLASSES, "names": {"Gland": 1, "Tumor": 2}, "rest": 0} | options))


# Outlines


def test_painting_order(tmp_path: Path) -> None:
    """Later classes over earlier ones, whatever the file's order; then what is ignored; and last what is not known."""
    truth = drawn(
        tmp_path,
        naming(known=("Region*",), ignored=("Ignore*",)),
        feature("Tumor", shapely.box(2, 0, 5, 1)),
        feature("Region*", shapely.box(1, 0, 7, 1)),
        feature("Gland", shapely.box(0, 0, 4, 1)),
        feature("Ignore*", shapely.box(4, 0, 6, 1)),
    )
    assert truth.read(Roi(0, 0, 9, 1), BASE).tolist() == [[X, 1, 2, 2, X, X, 0, X, X]]
    assert truth.known_roi() == Roi(1, 0, 6, 1)


def test_outlines_of_no_effect_are_told(tmp_path: Path) -> None:
    """As the exclusions of CAMELYON are where the class of everything else comes first."""
    tumour, hole = feature("Tumor", shapely.box(2, 0, 12, 9)), feature("Gland", shapely.box(4, 2, 6, 4))
    beside, ignored = feature("Gland", shapely.box(11, 2, 14, 4)), feature("Ignore*", shapely.box(0, 0, 30, 20))
    truth = drawn(tmp_path, naming(), tumour, hole, beside)
    assert truth.remarks == ("outlines wholly under one of a later class, of no effect: 1",)
    assert drawn(tmp_path, naming(names={"Tumor": 1, "Gland": 2}), tumour, hole, beside).remarks == ()
    assert drawn(tmp_path, naming(ignored=("Ignore*",)), tumour, beside, ignored).remarks == ()


def test_outlines_of_no_effect_are_those_that_one_of_a_later_class_covers(tmp_path: Path) -> None:
    rng, counts = np.random.default_rng(3), set()
    for _ in range(20):
        sizes = rng.integers(1, 12, (16, 2))
        corners = rng.integers(0, (26, 12), (16, 2))
        outlines = [shapely.box(*shape) for shape in np.hstack([corners, corners + sizes]).tolist()]
        names = rng.choice(["Gland", "Tumor", "Ignore*"], 16, p=[0.5, 0.4, 0.1]).tolist()
        later = [outline for name, outline in zip(names, outlines, strict=True) if name == "Tumor"]
        glands = [outline for name, outline in zip(names, outlines, strict=True) if name == "Gland"]
        count = sum(any(over.covers(gland) for over in later) for gland in glands)
        told = (f"outlines wholly under one of a later class, of no effect: {count}",) if count else ()
        assert drawn(tmp_path, naming(ignored=("Ignore*",)), *map(feature, names, outlines)).remarks == told
        counts.add(count)
    assert len(counts) > 2


def test_glass_outside_the_known_is_rest_to_training(tmp_path: Path) -> None:
    """Not where tissue is, nor under what is ignored; inside, outlines alone count; outside the slide is nothing."""
    outlines = [feature(*drawn) for drawn in (("Region*", shapely.box(4, 0, 8, 23)), ("Gland", shapely.box(0, 0, 6, 23)))]
    ignored = feature("Ignore*", shapely.box(12, 0, 14, 23))
    mask = np.zeros((23, 37), bool)
    mask[:, 7:11] = True
    plain = drawn(tmp_path, naming(known=("Region*",), ignored=("Ignore*",)), *outlines, ignored)
    tissue = PackedTissue.of(Tissue(mask, BASE))
    truth = with_glass(plain, tissue)
    expected = [X, 0, 0, 0, 0, 1, 1, 0, 0, X, X, X, 0, X, X, 0]
    for seen in (truth, pickle.loads(pickle.dumps(truth))):
        assert seen.read(Roi(-1, 5, 16, 1), BASE).tolist() == [expected]
    assert plain.read(Roi(-1, 5, 16, 1), BASE).tolist() == [[X] * 5 + [1, 1, 0, 0] + [X] * 7]
    nameless = drawn(tmp_path, naming(known=("Region*",), ignored=("Ignore*",), rest=None), *outlines, ignored)
    assert (with_glass(nameless, tissue).read(BASE.roi, BASE) == nameless.read(BASE.roi, BASE)).all()


def test_without_rest_only_outlines_are_known(tmp_path: Path) -> None:
    truth = drawn(tmp_path, naming(rest=None), feature("Gland", shapely.box(1.5, 1, 4, 2)))
    assert truth.read(Roi(0, 0, 6, 3), BASE).tolist() == [[X] * 6, [X, 1, 1, 1, X, X], [X] * 6]
    assert truth.known_roi() == Roi(1, 1, 3, 1)


def test_a_file_without_outlines(tmp_path: Path) -> None:
    assert (drawn(tmp_path, naming()).read(BASE.roi, BASE) == 0).all()
    nothing = drawn(tmp_path, naming(rest=None))
    assert (nothing.read(BASE.roi, BASE) == X).all()
    assert nothing.known_roi().area == 0


def test_outside_the_slide_nothing_is_known(tmp_path: Path) -> None:
    truth = drawn(tmp_path, naming(), feature("Gland", shapely.box(-50, -50, 100, 100)))
    seen = truth.read(BASE.roi.grow(3), BASE)
    assert (seen[3:-3, 3:-3] == 1).all()
    assert (seen == 1).sum() == BASE.roi.area
    coarse = BASE.at(Mpp.square(2.0))  # 10 x 6 px; the last column's centre lies past the slide, the last row's inside
    assert coarse.shape == (6, 10)
    assert (truth.read(coarse.roi, coarse) == 1).tolist() == [[True] * 9 + [False]] * 6
    halved = BASE.at(Mpp.square(1.0))  # 19 x 12 px; the centres of the last column and row lie on the slide's very edge
    assert (truth.read(halved.roi, halved) == 1).tolist() == [*[[True] * 18 + [False]] * 11, [False] * 19]


def test_outlines_of_another_slide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="outlines from x 500, y 0 to x 504, y 4; expected most of them on the slide"):
        drawn(tmp_path, naming(), feature("Gland", shapely.box(500, 0, 504, 4)))


def test_outlines_on_either_side_of_a_slide_are_not_on_it(tmp_path: Path) -> None:
    sides = [feature("Gland", shapely.box(x, 0, x + 4, 4)) for x in (-50, 60)]
    with pytest.raises(AnnotationError, match="on the slide of .* where 0 of 2 are"):
        drawn(tmp_path, naming(), *sides)


def test_outlines_off_the_slide_are_told_and_refused_where_they_are_most(tmp_path: Path) -> None:
    on, off = feature("Gland", shapely.box(2, 2, 6, 6)), feature("Gland", shapely.box(500, 0, 504, 4))
    (remark,) = drawn(tmp_path, naming(), on, off).remarks
    assert remark.startswith("outlines off the slide of ") and remark.endswith(": 1 of 2")
    with pytest.raises(AnnotationError, match="where 1 of 3 are"):
        drawn(tmp_path, naming(), on, off, off)
    (remark,) = drawn(tmp_path, naming(), on, feature("Gland", shapely.box(-4, 2, 0, 6))).remarks  # it ends at the edge
    assert remark.endswith(": 1 of 2")


def test_unnamed_objects(tmp_path: Path) -> None:
    truth = drawn(tmp_path, naming(unnamed=2), feature(None, shapely.box(0, 0, 2, 1)))
    assert truth.read(Roi(0, 0, 3, 1), BASE).tolist() == [[2, 2, 0]]


def test_unmapped_names_are_listed_with_the_remedy(tmp_path: Path) -> None:
    box = shapely.box(0, 0, 2, 1)
    features = [feature(name, box) for name in ("Gland", "Necrosis", "Necrosis", "Region 1", None)]
    with pytest.raises(AnnotationError) as caught:
        drawn(tmp_path, naming(known=("Region*",)), *features)
    error = caught.value
    assert error.subject.endswith("a.geojson")
    assert "stand for no class: 'Necrosis', (no name)" in error.found
    assert "2 x 'Necrosis'" in error.found and "1 x 'Gland'" in error.found and "1 x (no name)" in error.found
    assert error.expected == "only 'Gland', 'Tumor', 'Region*'"
    for key in ("classes[].annotations", "annotations.known", "annotations.ignored", "annotations.unnamed"):
        assert key in error.remedy


def test_a_missing_annotated_region_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"annotated area \(Region\*\)"):
        drawn(tmp_path, naming(known=("Region*",)), feature("Gland", shapely.box(0, 0, 2, 1)))


@pytest.mark.parametrize("wrong", [{"names": {"Gland": 3}}, {"rest": -1}, {"unnamed": 9}, {"values": {1: 4}}])
def test_class_map_refuses_what_is_no_class(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Gland"):
        naming(**wrong)


def test_remarks_tell_what_happened_to_the_file(tmp_path: Path) -> None:
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]]}
    line = {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}
    flat = {"type": "Polygon", "coordinates": [[[0, 0], [9, 9], [0, 0]]]}
    cell = feature("Tumor", shapely.box(20, 10, 30, 18)) | {"nucleusGeometry": shapely.box(23, 12, 26, 15).__geo_interface__}
    plain = feature("Tumor", shapely.box(20, 10, 30, 18)) | {"nucleusGeometry": None}
    truth = drawn(tmp_path, naming(), *(feature("Gland", shape) for shape in (bow_tie, line, flat)), cell, plain)
    assert (truth.read(BASE.roi, BASE) == 2).sum() == 10 * 8
    assert truth.remarks == (
        "invalid polygons (crossed lines, or points that are no numbers), repaired: 1",
        "points, lines and rulers, left out: 1",
        "outlines without an area (or three points that are numbers), left out: 1",
        "cells whose nucleus is outlined too, of which the cell's own outline counts: 1",
    )


@given(
    mask=hnp.arrays(np.uint8, (BASE.height, BASE.width), elements=st.integers(0, 2), fill=st.just(0)),
    connectivity=st.sampled_from([4, 8]),
)
@settings(max_examples=40, deadline=None)
def test_masks_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, mask: NDArray[Any], connectivity: int
) -> None:
    """Outlines along pixel edges, with holes and parts that touch at corners (self-touching rings with 8)."""
    names = {1: "Gland", 2: "Tumor"}
    traced = [feature(names[int(value)], shape) for shape, value in mask_shapes(mask, mask > 0, connectivity)]
    truth = drawn(tmp_path_factory.mktemp("mask"), naming(), *traced)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), mask)


def test_a_coarse_pixel_has_the_class_of_its_centre(tmp_path: Path) -> None:
    mask = np.random.default_rng(7).integers(0, 3, BASE.shape).astype(np.uint8)
    names = ("", "Gland", "Tumor")
    truth = drawn(
        tmp_path, naming(), *(feature(names[int(value)], shape) for shape, value in mask_shapes(mask, mask > 0, 4))
    )
    lattice = BASE.at(Mpp(1.5, 2.5))  # 3 x 5 base pixels: the centres are those of base pixels
    np.testing.assert_array_equal(truth.read(Roi(0, 0, 12, 4), lattice), mask[2:20:5, 1:36:3])


def test_truth_travels_light_and_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    many = [feature("Gland", shapely.Point(x / 10, 9).buffer(3)) for x in range(300)]
    truth = drawn(tmp_path, naming(), *many)
    packed = pickle.dumps(truth)
    assert len(packed) < 1000
    np.testing.assert_array_equal(pickle.loads(packed).read(BASE.roi, BASE), truth.read(BASE.roi, BASE))
    geojson(tmp_path / "a.geojson", feature("Tumor", shapely.box(0, 0, 40, 40)))
    assert (pickle.loads(packed).read(BASE.roi, BASE) == 2).all()
    (tmp_path / "a.geojson").unlink()
    with pytest.raises(AnnotationError, match="No such file"):
        pickle.loads(packed).read(BASE.roi, BASE)


def glas(folder: Path, patient: str) -> Truth:
    with tifffile.TiffFile(folder / f"glas/glas-patient-{patient}.tiff") as tiff:
        height, width = tiff.series[0].shape[:2]
    base = Lattice(width, height, Mpp.square(0.62005))
    return open_truth(folder / f"glas/glas-patient-{patient}.geojson", base, naming(known=("Region*",)), None)


def test_glas_is_known_in_its_fields_only(shared_data: Path) -> None:
    truth = glas(shared_data, "08")
    assert truth.remarks == ()
    seen = truth.read(truth.base.roi, truth.base)
    areas = {"Region*": 0.0, "Gland": 0.0}
    for item in json.loads((shared_data / "glas/glas-patient-08.geojson").read_text())["features"]:
        areas[item["properties"]["classification"]["name"]] += shapely.geometry.shape(item["geometry"]).area
    assert (seen != X).sum() == areas["Region*"]
    assert (seen == 1).sum() == areas["Gland"]  # along pixel edges, so the areas are whole numbers of pixels
    known = truth.known_roi()
    assert (seen[known.slices()] != X).mean() == 1.0
    assert (seen != X).sum() == known.area


@given(data=st.data(), mpp=st.sampled_from([0.62005, 1.0, 1.24, 1.2401, 4.96]))
@settings(max_examples=25, deadline=None)
def test_glas_in_pieces_is_glas_at_once(shared_data: Path, data: st.DataObject, mpp: float) -> None:
    truth = glas(shared_data, "06")
    lattice = truth.base.at(Mpp.square(mpp))
    width, height = data.draw(st.integers(2, 300)), data.draw(st.integers(2, 200))
    whole = Roi(data.draw(st.integers(-9, lattice.width)), data.draw(st.integers(-9, lattice.height)), width, height)
    column, row = data.draw(st.integers(1, width - 1)), data.draw(st.integers(1, height - 1))
    parts = [
        [Roi(whole.x, y, column, rows), Roi(whole.x + column, y, width - column, rows)]
        for y, rows in ((whole.y, row), (whole.y + row, height - row))
    ]
    pieces = np.block([[truth.read(roi, lattice) for roi in line] for line in parts])
    np.testing.assert_array_equal(pieces, truth.read(whole, lattice))


def test_imagescope_and_qupath_say_the_same_of_one_slide(shared_data: Path) -> None:
    base = Lattice(99_000, 62_000, Mpp.square(0.252))
    stem = shared_data / "annotations/TCGA-EJ-5519-01Z-00-DX1"
    from_xml = open_truth(stem.with_suffix(".imagescope.xml"), base, naming(names={"CaP": 1}, unnamed=2), None)
    names = {"Tumor": 1, "Other": 2, "Negative": 2}
    from_json = open_truth(stem.with_suffix(".qupath.json"), base, naming(names=names), None)
    lattice = base.at(Mpp.square(8.0))
    xml, qupath = from_xml.read(lattice.roi, lattice), from_json.read(lattice.roi, lattice)
    assert (np.bincount(qupath.ravel(), minlength=3)[:3] > 1000).all()
    assert (xml != qupath).mean() < 1e-4


def test_thousands_of_nuclei_are_each_in_their_place(tmp_path: Path) -> None:
    """5,000 outlines on one slide, against each of them asked by itself."""
    base, rng = Lattice(32_000, 24_000, Mpp.square(0.25)), np.random.default_rng(0)
    circle = np.stack([np.cos(np.linspace(0, 2 * np.pi, 25)), np.sin(np.linspace(0, 2 * np.pi, 25))], axis=1)
    places = rng.uniform((0, 0), (32_000, 24_000), (5_000, 2))
    rings = (places[:, None] + rng.uniform(8, 25, (5_000, 1, 1)) * circle).round(2)
    nuclei = [feature("Gland", {"type": "Polygon", "coordinates": [ring]}) for ring in rings.tolist()]
    truth = open_truth(geojson(tmp_path / "nuclei.geojson", *nuclei), base, naming(), None)
    lattice, found = base.at(Mpp.square(0.5)), 0
    for x, y in rng.integers(0, (lattice.width - 256, lattice.height - 256), (20, 2)):
        roi = Roi(int(x), int(y), 256, 256)
        columns, rows = 2 * (roi.x + np.arange(256) + 0.5), 2 * (roi.y + np.arange(256) + 0.5)  # centres in base pixels
        near = (np.abs(places - (columns.mean(), rows.mean())) < 300).all(axis=1)
        inside = [shapely.contains_xy(shapely.Polygon(ring), *np.meshgrid(columns, rows)) for ring in rings[near]]
        mask = truth.read(roi, lattice) == 1
        assert np.array_equal(mask, np.any([np.zeros_like(mask), *inside], axis=0))
        found += int(mask.sum())
    assert found > 0


# Label images


LABELS = np.random.default_rng(3).choice(np.array([0, 1, 2, 255], dtype=np.uint8), BASE.shape)


def tiled_pyramid(path: Path, labels: NDArray[Any]) -> None:
    options: dict[str, Any] = {"tile": (16, 16), "compression": "deflate", "photometric": "minisblack"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(labels, subifds=1, **options)
        tiff.write(np.zeros_like(labels[::2, ::2]), subfiletype=1, **options)  # must never be read


WRITERS = {
    "grey.png": lambda path, labels: Image.fromarray(labels).save(path),
    "pyramid.tif": tiled_pyramid,
    "strips.tif": lambda path, labels: tifffile.imwrite(path, labels, rowsperstrip=4, compression="lzw"),
    "one_strip.tif": lambda path, labels: tifffile.imwrite(path, labels, compression="deflate"),
    "plain.tif": lambda path, labels: tifffile.imwrite(path, labels),
    "sixteen_bits.tif": lambda path, labels: tifffile.imwrite(path, labels.astype(">u2"), byteorder=">"),
    "sixteen_bits.png": lambda path, labels: Image.fromarray(labels.astype(np.uint16)).save(path),
    "signed.tif": lambda path, labels: tifffile.imwrite(path, labels.astype(np.int32), tile=(16, 16)),
    "large.tif": lambda path, labels: tifffile.imwrite(path, labels, bigtiff=True, tile=(16, 32)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_label_images_of_every_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    WRITERS[kind](path, LABELS)
    truth = open_truth(path, BASE, naming(), None)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), LABELS)
    piece = Roi(5, 3, 20, 17)
    np.testing.assert_array_equal(truth.read(piece, BASE), LABELS[piece.slices()])
    beyond = truth.read(BASE.roi.grow(2), BASE)
    assert (beyond[2:-2, 2:-2] == LABELS).all() and (beyond[:2] == X).all() and (beyond[:, -2:] == X).all()
    assert truth.known_roi() == BASE.roi
    packed = pickle.dumps(truth)
    assert len(packed) < 1500
    np.testing.assert_array_equal(pickle.loads(packed).read(piece, BASE), LABELS[piece.slices()])


def test_palette_png_gives_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(np.minimum(LABELS, 2)).convert("P")
    image.putpalette([9, 9, 9, 0, 255, 0, 255, 0, 0])
    image.save(tmp_path / "p.png")
    truth = open_truth(tmp_path / "p.png", BASE, naming(), None)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), np.minimum(LABELS, 2))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_png_of_few_bits_gives_its_values(tmp_path: Path, bits: int) -> None:
    """Written by hand, as no library here writes grey of 2 and 4 bits: rows of values packed from the left, unfiltered."""
    values = np.random.default_rng(0).integers(0, min(1 << bits, 3), BASE.shape, np.uint8)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(BASE.height, -1), axis=1)
    header = struct.pack(">IIBBBBB", BASE.width, BASE.height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    lines = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    (tmp_path / "l.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(lines))
    truth = open_truth(tmp_path / "l.png", BASE, naming(), None)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), values)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.bool_])
def test_windows_of_a_large_png(tmp_path: Path, kind: type[np.generic]) -> None:
    """Its pixels are kept in squares of 512: windows within one, across several, and along the edges."""
    labels, base = np.random.default_rng(1).integers(0, 2, (700, 1024)), Lattice(1024, 700, Mpp.square(0.5))
    Image.fromarray(labels.astype(kind)).save(tmp_path / "l.png")
    truth = open_truth(tmp_path / "l.png", base, naming(), None)
    for window in (base.roi, Roi(3, 5, 200, 99), Roi(510, 511, 4, 3), Roi(512, 512, 512, 188), Roi(1023, 0, 1, 700)):
        np.testing.assert_array_equal(truth.read(window, base), labels[window.slices()])
    held = open_label_image(tmp_path / "l.png").sample(np.arange(700), np.arange(1024))
    assert held.dtype.itemsize == np.dtype(kind).itemsize


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_put_in_the_place_of_others_are_read_anew(tmp_path: Path, suffix: str) -> None:
    """As large, and changed at the same time, as what copies times along leaves them."""
    path, other = tmp_path / f"l.{suffix}", tmp_path / f"other.{suffix}"
    for place, labels in ((path, LABELS), (other, 1 - LABELS.clip(0, 1))):
        tifffile.imwrite(place, labels) if suffix == "tif" else Image.fromarray(labels).save(place, compress_level=0)
    image = open_label_image(path)
    rows, columns = (np.arange(size) for size in LABELS.shape)
    np.testing.assert_array_equal(image.sample(rows, columns), LABELS)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)
    np.testing.assert_array_equal(image.sample(rows, columns), 1 - LABELS.clip(0, 1))


def test_a_png_is_decoded_once_a_process(tmp_path: Path) -> None:
    """However many there are, since patches are drawn from all in any order: what becomes of the files is not seen."""
    labels = {tmp_path / f"{number}.png": np.roll(LABELS, number) for number in range(12)}
    for path, values in labels.items():
        Image.fromarray(values).save(path)
        open_truth(path, BASE, naming(), None).read(Roi(0, 0, 1, 1), BASE)
    truths = [open_truth(path, BASE, naming(), None) for path in labels]
    for path in labels:
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for truth, values in zip(truths, labels.values(), strict=True):
        np.testing.assert_array_equal(truth.read(BASE.roi, BASE), values)


def test_values_stand_for_classes(tmp_path: Path) -> None:
    WRITERS["pyramid.tif"](tmp_path / "l.tif", LABELS)
    truth = open_truth(tmp_path / "l.tif", BASE, naming(values={0: X, 1: 2, 2: 0}), None)
    expected = np.select([LABELS == 0, LABELS == 1, LABELS == 2], [X, 2, 0], X)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), expected)

    large = np.array([70_000, 2**32 - 1, 2**64 - 1, X], np.uint64)  # numbers that no table has a place for
    tifffile.imwrite(tmp_path / "large.tif", large[np.minimum(LABELS, 3)])
    values = {70_000: X, 2**32 - 1: 2, 2**64 - 1: 0, 10**30: 1}
    truth = open_truth(tmp_path / "large.tif", BASE, naming(values=values), None)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), expected)
    truth = open_truth(tmp_path / "large.tif", BASE, naming(values={70_000: X, 2**32 - 1: 2}), None)
    with pytest.raises(AnnotationError, match=f"labels of value {2**64 - 1}; expected only 255, 70000, {2**32 - 1}"):
        truth.read(BASE.roi, BASE)


def test_binary_mask(tmp_path: Path) -> None:
    mask = LABELS == 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    tifffile.imwrite(tmp_path / "m.tif", mask)  # with 0 as white, but for the numbers to be taken as they are
    for name in ("m.png", "m.tif"):
        truth = open_truth(tmp_path / name, BASE, naming(), None)
        np.testing.assert_array_equal(truth.read(BASE.roi, BASE), mask)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")  # as most programs write one
    truth = open_truth(tmp_path / "m.png", BASE, naming(values={0: 0, 255: 1}), None)
    np.testing.assert_array_equal(truth.read(BASE.roi, BASE), mask)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.9, 1.24, 6.0])
def test_labels_at_their_own_scale(tmp_path: Path, mpp: float) -> None:
    """The slow reference asks for each pixel which label holds its centre; and pieces give the whole."""
    labels = np.random.default_rng(5).integers(0, 3, (17, 29)).astype(np.uint8)
    base = Lattice(58, 34, Mpp.square(0.4))  # 23.2 x 13.6 um, so labels of 0.8 um
    tiled_pyramid(tmp_path / "l.tif", labels)
    truth = open_truth(tmp_path / "l.tif", base, naming(), 0.8)
    lattice = base.at(Mpp.square(mpp))
    seen = truth.read(lattice.roi, lattice)
    for row in range(lattice.height):
        for column in range(lattice.width):
            x, y = (column + 0.5) * mpp, (row + 0.5) * mpp
            expected = labels[int(y / 0.8), int(x / 0.8)] if x < 23.2 and y < 13.6 else X
            assert seen[row, column] == expected
    width, height = max(1, lattice.width // 3), max(1, lattice.height // 2)
    piece = Roi(lattice.width - width, lattice.height - height, width, height)
    np.testing.assert_array_equal(truth.read(piece, lattice), seen[piece.slices()])


@pytest.mark.parametrize("y", range(3990, 4000))
def test_labels_of_a_part_begin_with_it(tmp_path: Path, y: int) -> None:
    """Where the centre of a pixel lies on the part's very edge, rounding must not lead before the first label."""
    labels = np.random.default_rng(6).integers(0, 3, (364, 60)).astype(np.uint8)
    part, base = Roi(0, y, 390, 2366), Lattice(400, y + 2400, Mpp.square(0.2))
    tiled_pyramid(tmp_path / "l.tif", labels)
    truth, lattice = open_truth(tmp_path / "l.tif", base, naming(), 1.3, part), base.at(Mpp.square(2.0))
    seen = truth.read(lattice.roi, lattice)
    for row in range(lattice.height):
        place = (row + 0.5) * 10 - y
        if place == 0 or place % 6.5:  # elsewhere on an edge, either label will do
            assert seen[row, 0] == (labels[int(place / 6.5), 0] if 0 <= place < 2366 else X)


def test_a_coarse_view_of_large_labels_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.label_image._BLOCK_PIXELS", 100)
    WRITERS["strips.tif"](tmp_path / "l.tif", LABELS)
    truth, lattice = open_truth(tmp_path / "l.tif", BASE, naming(), None), BASE.at(Mpp.square(1.5))
    np.testing.assert_array_equal(truth.read(Roi(0, 0, 12, 7), lattice), LABELS[1:21:3, 1:36:3])


@pytest.mark.parametrize(
    ("mpp", "rows", "fits"), [(None, 10, False), (None, 12, True), (0.8, 12, False), (0.944, 12, False), (1.0, 12, True)]
)
def test_labels_must_have_the_slides_extent(tmp_path: Path, mpp: float | None, rows: int, fits: bool) -> None:
    half = np.zeros((rows, 18), np.uint8)  # the slide is 18.5 x 11.5 um: within a pixel of 1 um, either way
    Image.fromarray(half).save(tmp_path / "l.png")
    if fits:
        assert isinstance(open_truth(tmp_path / "l.png", BASE, naming(), mpp), LabelImageTruth)
        return
    with pytest.raises(AnnotationError, match=f"18 x {rows} px.*annotations.label_mpp.*whole downsample"):
        open_truth(tmp_path / "l.png", BASE, naming(), mpp)


@pytest.mark.parametrize(("mpp", "downsample"), [(0.252, 4), (0.2527, 4), (0.5, 2), (0.2527, 1), (0.25, 7)])
def test_labels_of_slides_of_several_scales_need_no_scale(tmp_path: Path, mpp: float, downsample: int) -> None:
    """As QuPath exports them, at one downsample of each slide; the last labels reach on where the size was rounded down."""
    base = Lattice(1203, 905, Mpp(mpp, mpp * 1.001))
    shape = (base.height // downsample, base.width // downsample)
    labels = np.random.default_rng(7).integers(0, 3, shape).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    rows, columns = (np.minimum(np.arange(size) // downsample, size // downsample - 1) for size in base.shape)
    truth = open_truth(tmp_path / "l.png", base, naming(), None)
    np.testing.assert_array_equal(truth.read(base.roi, base), labels[np.ix_(rows, columns)])


def test_labels_that_several_downsamples_would_give_are_refused(tmp_path: Path) -> None:
    Image.new("L", (10, 8)).save(tmp_path / "l.png")  # of 1000 x 800 px: 100, or 99
    with pytest.raises(AnnotationError, match="10 x 8 px.*1000 x 800 px.*divided by one whole number"):
        open_truth(tmp_path / "l.png", Lattice(1000, 800, Mpp.square(0.5)), naming(), None)


@pytest.mark.parametrize("downsample", [2, 4])
def test_labels_of_a_scan_whose_pixels_are_no_squares(tmp_path: Path, downsample: int) -> None:
    base = Lattice(5120, 3814, Mpp(0.456413, 0.455063))
    size = (base.width // downsample, base.height // downsample)
    Image.new("L", size).save(tmp_path / "l.png")
    truth = open_truth(tmp_path / "l.png", base, naming(), downsample * base.mpp.x)
    assert (truth.read(Roi(base.width - 2, base.height - 2, 3, 3), base) == [[0, 0, X], [0, 0, X], [X, X, X]]).all()


def test_unknown_values_are_listed(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[4, 5:7] = (7, 9)
    Image.fromarray(labels).save(tmp_path / "l.png")
    truth = open_truth(tmp_path / "l.png", BASE, naming(), None)
    with pytest.raises(AnnotationError, match=r"values? 7, 9.*only 0, 1, 2, 255.*classes\[\]\.values"):
        truth.read(BASE.roi, BASE)
    labels = LABELS.astype(np.int16)
    labels[4, 5:7] = (-1, -2)
    tifffile.imwrite(tmp_path / "l.tif", labels)
    with pytest.raises(AnnotationError, match="values? -2, -1.*only 0, 1, 2, 255"):
        open_truth(tmp_path / "l.tif", BASE, naming(), None).read(BASE.roi, BASE)


NO_LABELS = {
    "rgb.png": "RGB",
    "rgb.tif": "3 channels",
    "float.tif": "float32",
    "jpeg.tif": "compression, jpeg",
    "stack.tif": "pages of one size",
    "apart.tif": "pages of one size",
    "preview.tif": "first page, of 18 x 11 px, is smaller than a later one, of 37 x 23 px",
    "white.tif": "0 is white",
    "cut.png": "cannot be read",
    "cut.tif": "cannot be read",
    "empty.png": "cannot be read",
}


@pytest.mark.parametrize("file", NO_LABELS)
def test_pictures_that_are_no_labels(tmp_path: Path, file: str) -> None:
    path, rgb = tmp_path / file, np.zeros((*BASE.shape, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 3, BASE.shape).astype(np.uint8)
    half = noise[:22:2, :36:2]
    if file == "rgb.png":
        Image.fromarray(rgb).save(path)
    elif file == "rgb.tif":
        tifffile.imwrite(path, rgb, photometric="rgb")
    elif file == "float.tif":
        tifffile.imwrite(path, noise.astype(np.float32))
    elif file == "jpeg.tif":
        tifffile.imwrite(path, noise, compression="jpeg", tile=(16, 16))
    elif file == "white.tif":
        tifffile.imwrite(path, noise == 1, photometric="miniswhite", software="a scanner")
    elif pages := {"stack.tif": [noise] * 4, "apart.tif": [noise, half, noise], "preview.tif": [half, noise]}.get(file):
        with tifffile.TiffWriter(path) as tiff:
            for page in pages:
                tiff.write(page, photometric="minisblack")
    else:
        WRITERS["grey.png" if file.endswith("png") else "pyramid.tif"](path, noise)
        path.write_bytes(path.read_bytes()[: {"cut.png": 120, "cut.tif": 60, "empty.png": 8}[file]])
    with pytest.raises(AnnotationError, match="one channel of whole numbers") as caught:
        open_truth(path, BASE, naming(), None).read(BASE.roi, BASE)
    assert NO_LABELS[file] in caught.value.found


@pytest.mark.parametrize("kind", ["pyramid.tif", "strips.tif"])  # deflate and LZW
def test_a_picture_damaged_inside_says_so_when_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "l.tif"
    WRITERS[kind](path, LABELS)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[0]
    data[start : start + 40] = b"\xaa" * 40
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match="cannot be read"):
        open_truth(path, BASE, naming(), None).read(BASE.roi, BASE)


def test_a_png_too_large_to_hold_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses one of twice its limit; that it warns of one beyond the limit is nothing to a user."""
    base = Lattice(1000, 700, Mpp.square(0.5))
    Image.new("L", (base.width, base.height), 1).save(tmp_path / "l.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", base.roi.area * 2 // 3)
    with warnings.catch_warnings(action="error"):
        assert (open_truth(tmp_path / "l.png", base, naming(), None).read(base.roi, base) == 1).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", base.roi.area // 3)
    with pytest.raises(AnnotationError, match="tiled TIFF"):
        open_truth(tmp_path / "l.png", base, naming(), None)


@pytest.mark.parametrize("kind", ["grey.png", "pyramid.tif"])
def test_threads_share_a_truth(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / kind, LABELS)
    truth = open_truth(tmp_path / kind, BASE, naming(), None)
    rois = [Roi(n % 30, n % 19, 7, 4) for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for roi, seen in zip(rois, pool.map(lambda roi: truth.read(roi, BASE), rois), strict=True):
            np.testing.assert_array_equal(seen, LABELS[roi.slices()])


def test_the_kind_of_file_is_told_by_its_content(tmp_path: Path) -> None:
    assert isinstance(drawn(tmp_path, naming()), OutlineTruth)
    Image.fromarray(LABELS).save(tmp_path / "labels.geojson", format="png")
    assert isinstance(open_truth(tmp_path / "labels.geojson", BASE, naming(), None), LabelImageTruth)
    with pytest.raises(AnnotationError, match="No such file"):
        open_truth(tmp_path / "absent.png", BASE, naming(), None)


@pytest.mark.parametrize(("width", "height"), [(57, 33), (58, 34), (59, 35)])
def test_labels_whose_size_was_rounded_down_reach_the_slides_edge(tmp_path: Path, width: int, height: int) -> None:
    labels = np.random.default_rng(6).integers(0, 3, (height // 2, width // 2)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    base = Lattice(width, height, Mpp.square(0.4))
    truth = open_truth(tmp_path / "l.png", base, naming(), 0.8)
    seen = truth.read(base.roi.grow(1), base)
    inside = np.pad(labels.repeat(2, 0).repeat(2, 1), ((0, 1), (0, 1)), mode="edge")[:height, :width]
    np.testing.assert_array_equal(seen, np.pad(inside, 1, constant_values=X))
