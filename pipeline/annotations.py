"""What is true of each pixel of a slide, from outlines or from a label image.

GeoJSON, XML:  names  --+
                        +-- ClassMap --> Truth.read(roi, lattice) -> class indices, IGNORED where nothing is known
PNG, TIFF:     values --+
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import IGNORED, Classes
from pipeline.errors import AnnotationError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.label_image import LabelImage, file_stamp, is_label_image, open_label_image
from pipeline.outlines import Outlines, read_outlines
from pipeline.polygons import Area
from pipeline.stencil import Stencil

if TYPE_CHECKING:
    from pipeline.tissue import Tissue

_NO_NAME = "(no name)"


@dataclass(frozen=True)
class ClassMap:
    """Which class an outline's name, or a label image's value, stands for.

    `names` and `values` give class indices; without `values`, a label image holds class indices. The value 255 is
    IGNORED unless `values` says otherwise. `unnamed` is the class of outlines without a name. `rest` is the class of
    known pixels under no outline; None: nothing is known of them. `known` and `ignored` are patterns of names
    (`Region*`): outlines outside which nothing is known, and outlines inside which nothing is known.

    Raises ValueError for an index that is no class.
    """

    classes: Classes
    names: Mapping[str, int] = field(hash=False)
    known: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rest: int | None = None
    unnamed: int | None = None
    values: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        given = [*self.names.values(), *(value for value in self.values.values() if value != IGNORED)]
        given += [index for index in (self.rest, self.unnamed) if index is not None]
        wrong = sorted({index for index in given if not 0 <= index < len(self.classes)})
        if wrong or min(self.values, default=0) < 0:
            raise ValueError(f"expected indices of {self.classes.names} and values from 0 up, found {wrong or self.values}")


class Truth(Protocol):
    """What is true of each pixel of one slide."""

    @property
    def base(self) -> Lattice:
        """The slide's full-resolution lattice."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of the file: objects left out, polygons repaired."""

    def known_roi(self) -> Roi:
        """A rectangle of `base` outside which nothing is known."""

    def read(self, roi: Roi, lattice: Lattice) -> NDArray[np.uint8]:
        """The truth at the centres of the pixels of `roi`, a window of `lattice` of any scale.

        Returns uint8 (rows, columns): class indices; IGNORED where nothing is known, and outside the slide. A window
        read at once or in pieces gives the same bytes.
        """


def open_truth(path: Path, base: Lattice, class_map: ClassMap, label_mpp: float | None) -> Truth:
    """The truth in a file of outlines or a label image, which its content tells, of a slide with the lattice `base`.

    `label_mpp` is the scale of a label image in micrometres per pixel; None where it has the slide's own size.
    Raises AnnotationError for a file that cannot be used: see `read_outlines`, `OutlineTruth`, `LabelImageTruth`.
    """
    if is_label_image(path):
        return _fit(open_label_image(path), base, class_map, label_mpp)
    truth = OutlineTruth(path, base, class_map)
    truth.check()  # reads the file, so that its errors come now
    return truth


@dataclass(frozen=True)
class OutlineTruth:
    """The truth drawn as outlines: later classes lie over earlier ones, `ignored` outlines over all.

    Where `tissue` is given, glass outside the known outlines is `rest`. Pickles as its path: the file is read when first
    needed, once a process. Its methods raise AnnotationError for names that the class map does not know.
    """

    path: Path
    base: Lattice
    class_map: ClassMap
    tissue: Tissue | None = field(default=None, compare=False, repr=False)

    @cached_property
    def _layers(self) -> _Layers:
        return _load_layers(self.path, file_stamp(self.path), self.class_map)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutlineTruth, (self.path, self.base, self.class_map, self.tissue)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was left out and what was repaired."""
        return self._layers.remarks

    def check(self) -> None:
        """Raise AnnotationError where no outline lies on the slide: they will be those of another."""
        stencils = [stencil for _, stencil in self._layers.painted]
        stencils += [] if self._layers.known is None else [self._layers.known]
        if stencils and not any(stencil.reaches(self.base) for stencil in stencils):
            bounds = np.array([stencil.bounds for stencil in stencils])
            (left, top), (right, bottom) = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
            found = f"outlines from x {left:g}, y {top:g} to x {right:g}, y {bottom:g}"
            expected = f"some on the slide, which has {self.base.width} x {self.base.height} px"
            raise AnnotationError(str(self.path), found, expected, "Name the annotation of this slide.")

    def known_roi(self) -> Roi:
        """The box of the known outlines; of all outlines where only they are known; else the whole slide."""
        if self._layers.known is None and self.class_map.rest is not None:
            return self.base.roi
        painted = [stencil for value, stencil in self._layers.painted if value != IGNORED]
        stencils = painted if self._layers.known is None else [self._layers.known]
        if not stencils:
            return Roi(0, 0, 0, 0)
        bounds = np.stack([stencil.bounds for stencil in stencils])
        left, top = (math.floor(edge) for edge in bounds[:, :2].min(axis=0))
        right, bottom = (math.ceil(edge) for edge in bounds[:, 2:].max(axis=0))
        return Roi(left, top, right - left, bottom - top).intersect(self.base.roi)

    def read(self, roi: Roi, lattice: Lattice) -> NDArray[np.uint8]:
        """See `Truth.read`."""
        rest = IGNORED if self.class_map.rest is None else self.class_map.rest
        truth = np.full(roi.shape, rest, dtype=np.uint8)
        for value, stencil in self._layers.painted:
            truth[stencil.fill(roi, lattice, self.base)] = value
        if self._layers.known is not None:
            unknown = ~self._layers.known.fill(roi, lattice, self.base)
            if self.tissue is not None:
                glass = unknown & (truth != IGNORED) & ~self.tissue.sampled(roi, lattice)
                truth[glass] = rest
                unknown &= ~glass
            truth[unknown] = IGNORED
        rows, columns = _centres(roi, lattice, self.base)
        truth[(rows < 0) | (rows >= self.base.height), :] = IGNORED
        truth[:, (columns < 0) | (columns >= self.base.width)] = IGNORED
        return truth


def with_glass(truth: Truth, tissue: Tissue) -> Truth:
    """A truth that knows glass for `rest` outside the known outlines as well; a label image says itself what is known."""
    return replace(truth, tissue=tissue) if isinstance(truth, OutlineTruth) else truth


@dataclass(frozen=True)
class _Layers:
    """Stencils in the order of painting, each with its value; the stencil of what is known; remarks."""

    painted: tuple[tuple[int, Stencil], ...]
    known: Stencil | None
    remarks: tuple[str, ...]


@lru_cache(maxsize=8)
def _load_layers(path: Path, stamp: tuple[int, int], class_map: ClassMap) -> _Layers:
    """Reads a file and sorts its outlines; `stamp` makes sure that a changed file is read anew."""
    outlines = read_outlines(path)
    painted, known = _sort(outlines, class_map, path)
    if class_map.known and not known:
        raise AnnotationError(
            str(path),
            f"no outline of an annotated area ({', '.join(class_map.known)})",
            "at least one, as `annotations.known` asks",
            "Outline what was annotated, or empty `annotations.known` if all of every slide was.",
        )
    return _Layers(
        painted=tuple((value, Stencil(areas)) for value, areas in sorted(painted.items())),
        known=Stencil(known) if known else None,
        remarks=_remarks(outlines),
    )


def _sort(outlines: Outlines, class_map: ClassMap, path: Path) -> tuple[dict[int, list[Area]], list[Area]]:
    """(areas by value, areas that are known). IGNORED sorts last, so it is painted over the classes."""
    painted: dict[int, list[Area]] = {}
    known: list[Area] = []
    unmapped: Counter[str] = Counter()
    for outline in outlines.outlines:
        name = outline.name
        value = class_map.unnamed if name is None else class_map.names.get(name)
        if value is not None:
            painted.setdefault(value, []).append(outline.geometry)
        elif name is not None and _matches(name, class_map.known):
            known.append(outline.geometry)
        elif name is not None and _matches(name, class_map.ignored):
            painted.setdefault(IGNORED, []).append(outline.geometry)
        else:
            unmapped[_NO_NAME if name is None else repr(name)] += 1
    if unmapped:
        raise _unmapped_error(path, outlines, class_map, unmapped)
    return painted, known


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmapped_error(path: Path, outlines: Outlines, class_map: ClassMap, unmapped: Counter[str]) -> AnnotationError:
    every = Counter(_NO_NAME if outline.name is None else repr(outline.name) for outline in outlines.outlines)
    found = ", ".join(f"{count} x {name}" for name, count in every.most_common())
    accepted = [repr(name) for name in (*class_map.names, *class_map.known, *class_map.ignored)]
    accepted += [] if class_map.unnamed is None else [_NO_NAME]
    return AnnotationError(
        str(path),
        f"outlines that stand for no class: {', '.join(unmapped)} (the file holds {found})",
        f"only {', '.join(accepted) or 'nothing, as the configuration names no outline'}",
        "Add the name to a class under `classes[].annotations`, to `annotations.known` or to `annotations.ignored`; "
        "for outlines without a name, set `annotations.unnamed`.",
    )


def _remarks(outlines: Outlines) -> tuple[str, ...]:
    counts = (
        ("invalid polygons, repaired", outlines.repaired),
        ("points, lines and rulers, left out", outlines.skipped),
        ("outlines without an area, left out", outlines.dropped),
    )
    none = () if outlines.outlines else ("no outlines",)
    return (*none, *(f"{text}: {count}" for text, count in counts if count))


@dataclass(frozen=True)
class LabelImageTruth:
    """The truth as a picture of class numbers; the label whose pixel holds a centre is taken, none is blended.

    Its `read` raises AnnotationError for values that the class map does not know.
    """

    image: LabelImage
    labels: Lattice
    base: Lattice
    class_map: ClassMap

    @property
    def remarks(self) -> tuple[str, ...]:
        """None: a label image holds nothing but labels."""
        return ()

    def known_roi(self) -> Roi:
        """The whole slide."""
        return self.base.roi

    def read(self, roi: Roi, lattice: Lattice) -> NDArray[np.uint8]:
        """See `Truth.read`."""
        truth = np.full(roi.shape, IGNORED, dtype=np.uint8)
        base_rows, base_columns = _centres(roi, lattice, self.base)
        rows, columns = (np.floor(axis).astype(np.int64) for axis in _centres(roi, lattice, self.labels))
        in_rows = (rows >= 0) & (rows < self.labels.height) & (base_rows < self.base.height)
        in_columns = (columns >= 0) & (columns < self.labels.width) & (base_columns < self.base.width)
        if in_rows.any() and in_columns.any():
            values = self.image.sample(rows[in_rows], columns[in_columns])
            truth[np.ix_(in_rows, in_columns)] = self._classes_of(values)
        return truth

    def _classes_of(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Class indices of label values."""
        plain = {index: index for index in range(len(self.class_map.classes))}
        meaning = {IGNORED: IGNORED, **(self.class_map.values or plain)}
        past = max(meaning) + 1
        table = np.full(past + 1, -1, dtype=np.int16)
        table[list(meaning)] = list(meaning.values())
        index = values.astype(np.int64)
        classes = table[np.where((index >= 0) & (index < past), index, past)]
        if (classes < 0).any():
            found = ", ".join(str(value) for value in np.unique(values[classes < 0])[:10])
            raise AnnotationError(
                str(self.image.path),
                f"labels of value {found}",
                f"only {', '.join(str(value) for value in sorted(meaning))}",
                "Say in `classes[].values` which class each value of the label image stands for (255: unknown).",
            )
        return classes.astype(np.uint8)


def _fit(image: LabelImage, base: Lattice, class_map: ClassMap, label_mpp: float | None) -> LabelImageTruth:
    """Lays a label image over its slide. Raises AnnotationError where its size and the slide's differ by over 1 px."""
    mpp = base.mpp if label_mpp is None else Mpp.square(label_mpp)
    labels = Lattice(image.width, image.height, mpp)
    scale_x, scale_y = base.scale_to(labels)
    width, height = base.width * scale_x, base.height * scale_y
    slack = 1e-6 if label_mpp is None else 1 + 1e-6
    if abs(image.width - width) > slack or abs(image.height - height) > slack:
        fitting = base.width * base.mpp.x / image.width
        raise AnnotationError(
            str(image.path),
            f"a label image of {image.width} x {image.height} px",
            f"{width:.0f} x {height:.0f} px, the slide's size at {mpp.x:g} um/px",
            f"Set `annotations.label_mpp` to the image's scale (its width would suit {fitting:.6g} um/px), "
            "or make sure that it belongs to this slide.",
        )
    return LabelImageTruth(image, labels, base, class_map)


def _centres(roi: Roi, lattice: Lattice, other: Lattice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(y, x) of the centres of the rows and the columns of `roi`, in pixels of `other`."""
    scale_x, scale_y = lattice.scale_to(other)
    rows, columns = (np.arange(*ends, dtype=np.float64) for ends in ((roi.y, roi.bottom), (roi.x, roi.right)))
    return (rows + 0.5) * scale_y, (columns + 0.5) * scale_x
