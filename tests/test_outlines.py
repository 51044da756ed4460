"""Outlines: every dialect of the three formats gives the polygons that its tool shows; what is broken is named."""

import gc
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from pipeline.errors import AnnotationError
from pipeline.outlines import Outlines, read_outlines

SQUARE = [[[2, 1], [9, 1], [9, 5], [2, 5], [2, 1]]]  # 7 wide, 4 high


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "outlines.anything"  # the name must not matter
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_json(folder: Path, document: Any) -> Outlines:
    return read_outlines(written(folder, json.dumps(document)))


def feature(kind: str, coordinates: Any, properties: Any = None) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def layer(regions: str, name: str = "", attributes: str = "") -> str:
    inside = f"<Attributes>{attributes}</Attributes><Regions>{regions}</Regions>"
    return f'<Annotation Id="1" Name="{name}">{inside}</Annotation>'


def region(points: list[tuple[float, float]], kind: int = 0, negative: int = 0) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    return f'<Region Id="1" Type="{kind}" NegativeROA="{negative}"><Vertices>{vertices}</Vertices></Region>'


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


IMAGESCOPE = f"<Annotations>{layer(region(box(2, 1, 9, 5)), 'Drüse')}</Annotations>"


def asap(kind: str, group: str, points: list[tuple[int, float, float]]) -> str:
    places = "".join(f'<Coordinate Order="{order}" X="{x}" Y="{y}"/>' for order, x, y in points)
    return f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>{places}</Coordinates></Annotation>'


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [feature("Polygon", SQUARE)]},
        [{"type": "FeatureCollection", "features": [feature("Polygon", SQUARE)]}],
        [feature("Polygon", SQUARE)],
        feature("Polygon", SQUARE),
        {"type": "Polygon", "coordinates": SQUARE},
        [{"type": "Polygon", "coordinates": [[[*point, 0] for point in SQUARE[0]]]}],
        feature("MultiPolygon", [SQUARE]),
    ],
)
def test_geojson_in_every_wrapping(tmp_path: Path, document: Any) -> None:
    (outline,) = read_json(tmp_path, document).outlines
    assert outline.name is None
    assert outline.geometry.equals(shapely.box(2, 1, 9, 5))


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"classification": {"name": "Tumor", "color": [200, 0, 0]}}, "Tumor"),
        ({"classification": {"name": "Tumor", "colorRGB": -3670016}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"], "color": [200, 50, 50]}}, "Tumor: Positive"),
        ({"classification": {"parentClass": {"name": "Tumor", "colorRGB": -9}, "name": "Positive"}}, "Tumor: Positive"),
        ({"classification": {"name": "C", "parentClass": {"name": "B", "parentClass": {"name": "A"}}}}, "A: B: C"),
        ({"classification": "Tumor"}, "Tumor"),
        ({"classification": None, "name": "my third try"}, None),
        ({"name": "my third try"}, None),
        ({"classification": {"name": ""}}, None),
        (None, None),
    ],
)
def test_qupath_class_is_the_name(tmp_path: Path, properties: Any, name: str | None) -> None:
    assert read_json(tmp_path, feature("Polygon", SQUARE, properties)).outlines[0].name == name


def test_a_large_export_is_read_without_a_search_for_cycles(tmp_path: Path) -> None:
    """It takes a third of all the time where 60 000 cells have two million lists."""
    cells = [feature("Polygon", [[[x, y + 1] for y in range(30)] + [[x + 9, 5]]]) for x in range(1000)]
    path, begun = written(tmp_path, json.dumps(cells)), list[int]()
    gc.callbacks.append(lambda phase, info: begun.append(info["generation"]) if phase == "start" else None)
    try:
        assert len(read_outlines(path).outlines) == len(cells)
    finally:
        gc.callbacks.pop()
    assert len(begun) < 10  # 30 000 lists, of which every 700th would begin one
    assert gc.isenabled()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    document = json.dumps(feature("Polygon", SQUARE, {"classification": {"name": "Drüse"}}), ensure_ascii=False)
    assert read_outlines(written(tmp_path, ("\n " + document).encode(encoding))).outlines[0].name == "Drüse"
    head = '<?xml version="1.0" encoding="utf-16"?>' if encoding == "utf-16" else ""
    assert read_outlines(written(tmp_path, (head + IMAGESCOPE).encode(encoding))).outlines[0].name == "Drüse"


def test_holes_and_parts_are_kept(tmp_path: Path) -> None:
    hole = [[3, 2], [5, 2], [5, 4], [3, 4], [3, 2]]
    far = [[[20, 20], [22, 20], [22, 23], [20, 20]]]
    (outline,) = read_json(tmp_path, feature("MultiPolygon", [[*SQUARE, hole], far])).outlines
    assert outline.geometry.area == 28 - 4 + 3
    assert not outline.geometry.contains(shapely.Point(4, 3))


def test_points_and_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    mixed = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": SQUARE},
                                                          {"type": "Point", "coordinates": [1, 2]}]}  # fmt: skip
    features = [feature("Point", [1, 2]), feature("MultiPoint", [[1, 2]]), feature("LineString", [[1, 2], [3, 4]])]
    features += [feature("MultiLineString", [[[1, 2], [3, 4]]]), {"type": "Feature", "geometry": None}]
    outlines = read_json(tmp_path, [*features, {"type": "Feature", "geometry": mixed, "properties": {}}])
    assert outlines.skipped == 6
    assert [outline.geometry.area for outline in outlines.outlines] == [28]


def test_invalid_polygons_are_repaired_and_counted(tmp_path: Path) -> None:
    bow_tie = [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]
    # A freehand loop whose end runs over its beginning: the overlap is inside, not a hole.
    overrun = [[[0, 0], [10, 0], [10, 10], [0, 10], [0, -1], [2, -1], [2, 5], [-1, 5], [-1, 0], [0, 0]]]
    keyhole = [[[0, 0], [9, 0], [9, 9], [0, 9], [0, 5], [3, 5], [3, 6], [6, 6], [6, 3], [3, 3], [3, 5], [0, 5], [0, 0]]]
    lost_vertex = [[[0, 0], [8, 0], [8, None], [8, 3], [0, 3]]]
    holes = [box(20, 1, 24, 5), [*box(3, 2, 5, 4)], box(8, 3, 12, 4), box(9, 1, 12, 2), [(30, 1), (31, 2), (31, 1), (30, 2)]]
    beside = [*SQUARE, *([*ring, ring[0]] for ring in holes)]  # but for one within, and one across the edge
    documents = [feature("Polygon", rings) for rings in (bow_tie, overrun, keyhole, lost_vertex, beside, SQUARE)]
    documents.append(feature("MultiPolygon", [beside, [box(40, 1, 44, 5)]]))
    outlines = read_json(tmp_path, documents)
    assert outlines.repaired == 6
    assert [outline.geometry.area for outline in outlines.outlines] == [50, 107, 72, 24, 23, 28, 39]
    assert all(outline.geometry.is_valid for outline in outlines.outlines)


@pytest.mark.parametrize(
    "ring",
    [
        [],
        [[1, 1]],
        [[1, 1], [5, 5]],
        [[1, 1], [5, 5], [1, 1]],
        [[1, 1], [1, 1], [1, 1], [1, 1]],
        [[1, 1], [5, 5], [9, 9], [1, 1]],
        [[float("nan"), 1], [5, float("inf")], [9, 9], [1, 2]],
        [[1e300, 1], [5, -1e300], [9, 9], [1, 1e12]],
    ],
)
def test_outlines_without_area_are_dropped_and_counted(tmp_path: Path, ring: Any) -> None:
    outlines = read_json(tmp_path, [feature("Polygon", [ring]), feature("Polygon", SQUARE)])
    assert (outlines.dropped, outlines.repaired, len(outlines.outlines)) == (1, 0, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"type": "Feature",\n  oops', "line 2, column 3"),
        (b'{"type": "\xff\xfe"}', "broken JSON"),
        ("[" * 200_000, "broken JSON"),
        ('{"type": "Topology"}', "Topology"),
        ("[1, 2]", "1 in a list"),
        ('{"a": 1}', "None"),
        ('{"type": ["Feature"]}', "['Feature']"),
        ('{"type": "FeatureCollection"}', "FeatureCollection"),
        (json.dumps([feature("Polygon", SQUARE), feature("Polygon", [[["x", 1], [2, 2], [3, 3]]])]), "object 2"),
        (json.dumps(feature("Polygon", [[1, 2, 3]])), "object 1"),
        (json.dumps({"type": "Feature", "geometry": {"type": "Polygon"}}), "object 1"),
        (json.dumps({"type": "Feature", "geometry": {"type": "Circle"}}), "Circle"),
        ("<Annotations><Annotation>", "line 1, column 25"),
        ("<html></html>", "<html>"),
        (f"<Annotations>{layer(region([(1, 2), ('left', 3)]))}</Annotations>", "left"),  # type: ignore[list-item]
        (IMAGESCOPE.replace('Type="0"', 'Type="Polygon"'), "'Polygon'"),
        (IMAGESCOPE.replace("<Vertex ", "<V "), "<V>"),
        ("slide,annotation\n", "slide,annota"),
        ("", "an empty file"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(AnnotationError) as caught:
        read_outlines(path)
    assert caught.value.subject == str(path)
    assert words in caught.value.found


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="No such file"):
        read_outlines(tmp_path / "absent.geojson")


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE a [<!ENTITY l "lol"><!ENTITY m "&l;&l;&l;&l;&l;&l;&l;&l;">]>',
        '<!DOCTYPE a [<!ENTITY m SYSTEM "file:///etc/hostname">]>',
    ],
)
def test_entities_in_xml_are_refused(tmp_path: Path, declaration: str) -> None:
    text = f'<?xml version="1.0"?>{declaration}<Annotations><Annotation Name="&m;"/></Annotations>'
    with pytest.raises(AnnotationError, match="declares entities"):
        read_outlines(written(tmp_path, text))


def test_asap_groups_types_and_order(tmp_path: Path) -> None:
    ring = [(2, 9, 5), (0, 2, 1), (3, 2, 5), (1, 9, 1)]  # by Order, a rectangle; as written, a bow tie
    drawn = asap("Polygon", "Tumor", ring) + asap("Spline", "_2", ring) + asap("Rectangle", "None", ring)
    other = asap("Dot", "Tumor", ring[:1]) + asap("PointSet", "Tumor", ring) + asap("Measurement", "None", ring[:2])
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None"/></AnnotationGroups>'
    outlines = read_outlines(
        written(tmp_path, f"<ASAP_Annotations><Annotations>{drawn}{other}</Annotations>{groups}</ASAP_Annotations>")
    )
    assert [outline.name for outline in outlines.outlines] == ["Tumor", "_2", None]
    assert all(outline.geometry.equals(shapely.box(2, 1, 9, 5)) for outline in outlines.outlines)
    assert (outlines.skipped, outlines.repaired) == (3, 0)


def test_asap_file_without_annotations(tmp_path: Path) -> None:
    assert read_outlines(written(tmp_path, "<ASAP_Annotations><Annotations/></ASAP_Annotations>")).outlines == ()


def test_imagescope_negative_regions_are_holes_of_their_layer(tmp_path: Path) -> None:
    tissue, lumen, islet = box(0, 0, 30, 20), box(5, 5, 25, 15), box(10, 8, 12, 11)
    tumour = layer(region(tissue) + region(islet) + region(lumen, negative=1), "Tumour")
    elsewhere = layer(region(box(0, 0, 30, 10)), "Stroma")
    outlines = read_outlines(written(tmp_path, f"<Annotations>{tumour}{elsewhere}</Annotations>"))
    areas = [(outline.name, outline.geometry.area) for outline in outlines.outlines]
    assert areas == [("Tumour", 600 - 200), ("Tumour", 6), ("Stroma", 300)]


def test_imagescope_holes_that_overlap_are_all_cut(tmp_path: Path) -> None:
    holes = region(box(0, 0, 18, 20), negative=1) + region(box(14, 0, 40, 20), negative=1)
    tissue = layer(region(box(0, 0, 30, 20)) + holes, "Tumour")
    assert not read_outlines(written(tmp_path, f"<Annotations>{tissue}</Annotations>")).outlines


def test_imagescope_holes_are_those_that_are_cut_one_by_one(tmp_path: Path) -> None:
    """Regions and holes at random: they overlap, touch, lie in one another, and some holes cover regions."""
    rng, lost = np.random.default_rng(4), 0
    for _ in range(20):
        corners, sizes = rng.integers(0, 24, (12, 2)), rng.integers(1, 16, (12, 2))
        shapes = np.hstack([corners, corners + sizes]).tolist()
        regions = [shapely.box(*shape) for shape in shapes[:5]]
        for index, one in enumerate(regions):
            for hole in (shapely.box(*shape) for shape in shapes[5:]):
                regions[index] = regions[index] if hole.covers(one) else regions[index].difference(hole)
        drawn = "".join(region(box(*shape), negative=int(number > 4)) for number, shape in enumerate(shapes))
        outlines = read_outlines(written(tmp_path, f"<Annotations>{layer(drawn)}</Annotations>"))
        expected = [one for one in regions if one.area]
        lost += len(regions) - len(expected)
        assert len(outlines.outlines) == len(expected)
        assert all(found.geometry.equals(one) for found, one in zip(outlines.outlines, expected, strict=True))
    assert lost


def test_imagescope_many_holes_cost_no_more_than_few(tmp_path: Path) -> None:
    """One by one, each would draw a region of 20 000 points anew: a quarter of a minute."""
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    outer = np.stack([20_000 * np.cos(angles), 20_000 * np.sin(angles)], axis=1)
    holes = [box(x, y, x + 100, y + 100) for x in range(-9000, 9000, 600) for y in range(-9000, 9000, 600)]
    drawn = region(outer.tolist()) + "".join(region(hole, negative=1) for hole in holes)
    path = written(tmp_path, f"<Annotations>{layer(drawn)}</Annotations>")
    began = time.process_time()
    (outline,) = read_outlines(path).outlines
    assert time.process_time() - began < 4
    assert len(outline.geometry.interiors) == len(holes)


def test_imagescope_shapes(tmp_path: Path) -> None:
    corners = [(29.0, 11.0), (1.0, 3.0)]
    shapes = region(corners, kind=1) + region(corners, kind=2) + region(box(1, 3, 29, 11), kind=2)
    rulers = region(corners, kind=3) + region(corners, kind=4)
    outlines = read_outlines(written(tmp_path, f"<Annotations>{layer(shapes + rulers)}</Annotations>"))
    rectangle, ellipse, same = (outline.geometry for outline in outlines.outlines)
    assert outlines.skipped == 2
    assert rectangle.equals(shapely.box(1, 3, 29, 11))
    assert ellipse.area == pytest.approx(3.14159265 * 14 * 4, rel=1e-3)
    assert ellipse.bounds == pytest.approx((1, 3, 29, 11))
    assert same.equals(ellipse)


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("Tumour ", '<Attribute Name="CaP" Value=""/>', "Tumour"),
        ("", '<Attribute Name="CaP" Value=""/>', "CaP"),
        ("", '<Attribute Name="Description" Value="Stroma"/>', "Stroma"),
        ("", '<Attribute Name="Description" Value=""/>', None),
        ("", "", None),
    ],
)
def test_imagescope_layer_names(tmp_path: Path, name: str, attributes: str, expected: str | None) -> None:
    text = f"<Annotations>{layer(region(box(2, 1, 9, 5)), name, attributes)}</Annotations>"
    assert read_outlines(written(tmp_path, text)).outlines[0].name == expected


REAL = {
    "annotations/TCGA-EJ-5519-01Z-00-DX1.qupath.json": ({"Tumor": 1, "Other": 1, "Negative": 1}, 0),
    "annotations/TCGA-EJ-5519-01Z-00-DX1.imagescope.xml": ({"CaP": 1, None: 2}, 0),
    "annotations/wsidicom_asap-polygon.xml": ({None: 1}, 0),
    "annotations/qupath-brush.json": ({None: 1}, 0),
    "annotations/qupath-ellipse.json": ({None: 1}, 0),
    "annotations/qupath-rectangle.json": ({None: 1}, 0),
    "annotations/qupath-polygon.json": ({None: 1}, 0),
    "annotations/qupath-point.json": ({}, 1),
    "annotations/dlup_qupath05.geojson": ({None: 3}, 0),
    "glas/glas-patient-01.geojson": ({"Gland": 113, "Region*": 16}, 0),
    "nuclei/TCGA-B0-5698-01Z-00-DX1.xml": ({None: 357}, 0),
    "nuclei/TCGA-CH-5767-01Z-00-DX1.xml": ({None: 294}, 0),
}


@pytest.mark.parametrize("file", REAL)
def test_real_exports(shared_data: Path, file: str) -> None:
    names, skipped = REAL[file]
    outlines = read_outlines(shared_data / file)
    assert Counter(outline.name for outline in outlines.outlines) == names
    assert (outlines.skipped, outlines.dropped) == (skipped, 0)
    assert all(outline.geometry.is_valid and outline.geometry.area > 0 for outline in outlines.outlines)


def test_imagescope_states_its_own_areas(shared_data: Path) -> None:
    """The XML holds the area that ImageScope computed for each region: only self-crossing outlines may differ."""
    path = shared_data / "annotations/TCGA-EJ-5519-01Z-00-DX1.imagescope.xml"
    stated = [float(area) for area in re.findall(r'\bArea="([\d.]+)"', path.read_text())]
    found = read_outlines(path).outlines
    assert [outline.geometry.area for outline in found] == pytest.approx(stated, rel=0.006)
    assert [outline.geometry.area for outline in found[:2]] == pytest.approx(stated[:2], rel=1e-9)
