"""Outlines drawn by people: QuPath GeoJSON, ASAP XML and Aperio ImageScope XML, read into polygons.

The format is told by a file's content, not by its name. All three give places in base pixels, QuPath from the corner of what
it shows of a slide. What QuPath calls a class, ASAP a group and ImageScope a layer is an outline's name here.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np
import shapely
from defusedxml.common import DefusedXmlException
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.polygons import Area, Drawing

_ELLIPSE_POINTS = 256  # within 0.1 px of the true ellipse up to a radius of 1300 px
_GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString")
_EXPECTED = "QuPath GeoJSON, ASAP XML or Aperio ImageScope XML"


@dataclass(frozen=True)
class Outline:
    """One annotated object: its name (None where it has none) and a valid polygon in base pixels."""

    name: str | None
    geometry: Area


@dataclass(frozen=True)
class Outlines:
    """What an annotation file holds, in the file's order.

    `skipped` counts points, lines, arrows and rulers; `repaired` the objects whose polygon was not valid as written;
    `dropped` the objects that enclose no area; `nuclei` the cells whose nucleus is drawn too, which is passed over.
    """

    outlines: tuple[Outline, ...]
    skipped: int
    repaired: int
    dropped: int
    nuclei: int


class _Sketchbook:
    """Gathers the named objects of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str | None] = []
        self.drawing = Drawing()
        self.skipped = 0
        self.nuclei = 0

    def add(self, name: str | None, polygons: Sequence[Sequence[NDArray[np.float64]]]) -> None:
        """Note one object: its polygons, each a list of rings (the shell, then holes) of float64 (points, 2)."""
        self.names.append(name)
        self.drawing.add(polygons)

    def finish(self) -> Outlines:
        """The outlines that enclose an area, with the counts of the rest."""
        areas, repaired = self.drawing.areas()
        return self.bind(self.names, areas, repaired)

    def bind(self, names: Sequence[str | None], areas: Sequence[Area], repaired: int) -> Outlines:
        """The same of areas that are made already, each with its name."""
        kept = tuple(Outline(name, area) for name, area in zip(names, areas, strict=True) if area.area > 0)
        return Outlines(kept, self.skipped, repaired, len(names) - len(kept), self.nuclei)

    def error(self, found: str, expected: str) -> AnnotationError:
        """The error for something in this file that cannot be understood."""
        return AnnotationError(str(self.path), found, expected, "Export the outlines again, or correct the file.")


def read_outlines(path: Path, corner: tuple[int, int] = (0, 0)) -> Outlines:
    """The outlines of an annotation file, in base pixels; `corner` is the x and y of the pixel that QuPath calls 0, 0.

    Raises AnnotationError for a file that cannot be read, is damaged, or is in none of the three formats.

    References: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html,
    https://github.com/computationalpathologygroup/ASAP.
    """
    book = _Sketchbook(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise book.error(error.strerror or str(error), "a file that can be read") from error
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").replace(b"\x00", b"").lstrip(b"\xff\xfe \t\r\n")[:1]
    if start == b"<":
        return _read_xml(data, book)
    if start in (b"{", b"["):
        return _read_geojson(data, book, np.array(corner, np.float64))
    found = f"a file that starts with {data[:12]!r}" if data else "an empty file"
    raise book.error(found, f"{_EXPECTED}, or a label image (PNG or TIFF)")


# GeoJSON


@contextmanager
def _no_collection() -> Iterator[None]:
    """Spares the search for cycles, of which JSON has none: among millions of lists it takes longer than the reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def _read_geojson(data: bytes, book: _Sketchbook, corner: NDArray[np.float64]) -> Outlines:
    try:
        document = json.loads(data)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise book.error(f"broken JSON: {place}", "GeoJSON") from error
    except (ValueError, RecursionError) as error:
        raise book.error(f"broken JSON: {error}", "GeoJSON") from error
    for number, (name, geometry) in enumerate(_features(document, book), start=1):
        try:
            polygons = [[ring + corner for ring in rings] for rings in _polygons(geometry, book)]
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise book.error(f"object {number} with broken coordinates ({error})", "lists of [x, y]") from error
        if polygons:
            book.add(name, polygons)
    return book.finish()


def _features(document: Any, book: _Sketchbook) -> Iterator[tuple[str | None, Any]]:
    """(name, geometry) of every object of a list, a FeatureCollection, one Feature or one geometry."""
    for item in document if isinstance(document, list) else [document]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "Feature":
            book.nuclei += item.get("nucleusGeometry") is not None
            yield _class_name(item.get("properties")), item.get("geometry")
        elif kind in _GEOMETRIES:
            yield None, item
        elif kind == "FeatureCollection" and isinstance(item.get("features"), list):
            yield from _features(item["features"], book)
        else:
            found = f"JSON with an object of type {kind!r}" if isinstance(item, dict) else f"{item!r:.40} in a list"
            raise book.error(found, "a FeatureCollection, a list of Features, a Feature or a geometry of GeoJSON")


def _class_name(properties: Any) -> str | None:
    """The class that QuPath gave an object, as QuPath shows it: a name, or `A: B` of a list of names.

    Until 0.3 there were no lists, and a class `B` said that it has the parent class `A`.
    """
    classification = properties.get("classification") if isinstance(properties, dict) else None
    names: list[Any] = []
    while isinstance(classification, dict):
        listed = classification.get("names")
        names[:0] = listed if isinstance(listed, list) else [classification.get("name")]
        classification = classification.get("parentClass")
    return ": ".join(str(name) for name in (classification, *names) if name).strip() or None


def _polygons(geometry: Any, book: _Sketchbook) -> Iterator[list[NDArray[np.float64]]]:
    """The rings of every polygon of a geometry; counts what has no area."""
    kind = geometry["type"] if geometry is not None else None
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part, book)
    elif kind in ("Polygon", "MultiPolygon"):
        polygons = geometry["coordinates"]
        for rings in polygons if kind == "MultiPolygon" else [polygons]:
            yield [_ring([point[:2] for point in ring]) for ring in rings]
    elif kind is None or kind in _GEOMETRIES:
        book.skipped += 1
    else:
        raise ValueError(f"a geometry of type {kind!r}")


def _ring(points: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """Points as an array (points, 2)."""
    return np.asarray(points, dtype=np.float64).reshape(len(points), 2)


# XML


def _read_xml(data: bytes, book: _Sketchbook) -> Outlines:
    try:
        root = defusedxml.ElementTree.fromstring(data)
    except ParseError as error:
        raise book.error(f"broken XML: {error}", _EXPECTED) from error
    except DefusedXmlException as error:
        raise book.error(f"XML that declares entities ({error})", "XML without entities") from error
    except (ValueError, LookupError) as error:
        raise book.error(f"XML in an encoding that cannot be read ({error})", "UTF-8") from error
    if root.find(".//Annotation/Coordinates") is not None or root.tag == "ASAP_Annotations":
        return _read_asap(root, book)
    if root.tag == "Annotations":
        return _read_imagescope(root, book)
    raise book.error(f"XML whose first element is <{root.tag}>", _EXPECTED)


def _read_asap(root: Element, book: _Sketchbook) -> Outlines:
    """ASAP: an annotation's group is its name. Splines are joined by straight lines, as in ASAP's own masks."""
    for annotation in root.iter("Annotation"):
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            book.skipped += 1
            continue
        points = sorted(annotation.iter("Coordinate"), key=lambda point: _number(point, "Order", book))
        group = annotation.get("PartOfGroup", "None").strip()
        book.add(None if group in ("", "None") else group, [[_places(points, book)]])
    return book.finish()


def _read_imagescope(root: Element, book: _Sketchbook) -> Outlines:
    """ImageScope: a layer's negative regions are holes in its other regions."""
    names: list[str | None] = []
    areas: list[Area] = []
    repaired = 0
    for layer in root.iter("Annotation"):
        name, drawn, holes = _layer_name(layer), Drawing(), Drawing()
        for region in layer.iter("Region"):
            rings = _region(region, book)
            if not rings:
                book.skipped += 1
            elif region.get("NegativeROA") == "1":
                holes.add([rings])
            else:
                drawn.add([rings])
        (positive, fixed), (negative, fixed_holes) = drawn.areas(), holes.areas()
        _cut(positive, negative)
        names += [name] * len(positive)
        areas += positive
        repaired += fixed + fixed_holes
    return book.bind(names, areas, repaired)


def _layer_name(layer: Element) -> str | None:
    """The layer's name; without one, what was typed as its description, or the name of an attribute of its own."""
    names = [layer.get("Name", "")]
    for attribute in layer.findall("Attributes/Attribute"):
        name = attribute.get("Name", "")
        names.append(attribute.get("Value", "") if name == "Description" else name)  # every layer has a "Description"
    return next((name.strip() for name in names if name.strip()), None)


def _region(region: Element, book: _Sketchbook) -> list[NDArray[np.float64]]:
    """The ring of a region of type 0 (freehand), 1 (rectangle) or 2 (ellipse); none for arrows and rulers.

    Rectangles and ellipses are written as the corners of their box, or as all their points.
    """
    kind = region.get("Type", "0")
    if not kind.isdecimal():  # HALO writes words there, and its vertices otherwise
        raise book.error(f"<Region Type={kind!r}>", "a number there, as ImageScope writes it")
    if kind not in ("0", "1", "2"):
        return []
    vertices = region.findall("Vertices/*")
    if strange := next((vertex.tag for vertex in vertices if vertex.tag != "Vertex"), None):
        raise book.error(f"<{strange}> among a region's vertices", "<Vertex>, as ImageScope writes it")
    points = _places(vertices, book)
    if (kind == "1" and len(points) == 2) or (kind == "2" and 2 <= len(points) <= 4):
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        if kind == "1":
            return [_ring([(left, top), (right, top), (right, bottom), (left, bottom)])]
        angle = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
        x, y = (1 + np.cos(angle)) / 2, (1 + np.sin(angle)) / 2
        return [np.stack([left + x * (right - left), top + y * (bottom - top)], axis=1)]
    return [points]


def _cut(positive: list[Area], negative: list[Area]) -> None:
    """Cuts holes, in place; an island drawn inside a hole stays, but not what another hole leaves of a region there."""
    tree, cutters = shapely.STRtree(positive), np.asarray(negative, dtype=object)
    met, covered = (set(zip(*tree.query(cutters, predicate=how).tolist(), strict=True)) for how in ("intersects", "covers"))
    holes: dict[int, list[Area]] = {}
    for hole, index in sorted(met - covered):
        holes.setdefault(index, []).append(negative[hole])
    for index, some in holes.items():  # all at once: one by one, each would draw the whole region anew
        cut: Any = shapely.difference(positive[index], shapely.union_all(some))
        positive[index] = cut


def _places(points: Sequence[Element], book: _Sketchbook) -> NDArray[np.float64]:
    return _ring([(_number(point, "X", book), _number(point, "Y", book)) for point in points])


def _number(element: Element, key: str, book: _Sketchbook) -> float:
    text = element.get(key, "")
    try:
        return float(text)
    except ValueError as error:
        raise book.error(f"<{element.tag} {key}={text!r}>", f"a number as {key}") from error
