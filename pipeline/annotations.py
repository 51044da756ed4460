"""Opens the truth in a file of any kind, and holds that which is drawn as outlines; label_truth.py has that of pictures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.classes import IGNORED
from pipeline.errors import AnnotationError
from pipeline.files import Stamp
from pipeline.geometry import Lattice, Roi
from pipeline.label_image import annotation_stamp, is_label_image, open_label_image
from pipeline.label_truth import fit
from pipeline.outlines import Outlines, read_outlines
from pipeline.polygons import Area
from pipeline.stencil import Stencil
from pipeline.truth import ClassMap, Truth, centres

if TYPE_CHECKING:
    from pipeline.tissue import PackedTissue

_NO_NAME = "(no name)"
_LEAST_ON_SLIDE = 0.5  # of a slide's own outlines


def open_truth(path: Path, base: Lattice, class_map: ClassMap, label_mpp: float | None, shown: Roi | None = None) -> Truth:
    """The truth in a file of outlines or a label image, which its content tells, of a slide with the lattice `base`.

    `label_mpp` is the scale of a label image in micrometres per pixel; None where its pixels are as large as
    the slide's, or a whole number of them. `shown` is `Slide.shown`; None: all of it.
    Raises AnnotationError for a file that cannot be used: see `read_outlines`, `OutlineTruth`, `LabelImageTruth`.
    """
    if is_label_image(path):
        return fit(open_label_image(path), base, class_map, label_mpp, shown or base.roi)
    truth = OutlineTruth(path, base, class_map, corner=(shown.x, shown.y) if shown else (0, 0))
    truth.check()  # reads the file, so that its errors come now
    return truth


@dataclass(frozen=True)
class OutlineTruth:
    """The truth drawn as outlines: later classes lie over earlier ones, `ignored` outlines over all.

    Where `tissue` is given, glass outside the known outlines is `rest`. `corner` is that of `read_outlines`. Pickles as its
    path: the file is read when first needed, once a process. Its methods raise AnnotationError for names that the class map
    does not know.
    """

    path: Path
    base: Lattice
    class_map: ClassMap
    tissue: PackedTissue | None = field(default=None, compare=False, repr=False)
    corner: tuple[int, int] = (0, 0)

    @cached_property
    def _layers(self) -> _Layers:
        return _load_layers(self.path, annotation_stamp(self.path), self.class_map, self.corner)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutlineTruth, (self.path, self.base, self.class_map, self.tissue, self.corner)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was left out, what was repaired, and what lies off the slide."""
        off = ~self._on_slide()
        told = f"outlines off the slide of {self.base.width} x {self.base.height} px: {off.sum()} of {off.size}"
        return (*self._layers.remarks, told) if off.any() else self._layers.remarks

    def _on_slide(self) -> NDArray[np.bool_]:
        """Which of all outlines lie on the slide, at least in part."""
        return np.concatenate([np.zeros(0, bool), *(stencil.reaches(self.base) for stencil in self._stencils)])

    @property
    def _stencils(self) -> list[Stencil]:
        known = self._layers.known
        return [stencil for _, stencil in self._layers.painted] + ([] if known is None else [known])

    def check(self) -> None:
        """Raise AnnotationError where most outlines lie off the slide: they are probably another slide's."""
        on_slide = self._on_slide()
        if on_slide.size and on_slide.mean() < _LEAST_ON_SLIDE:
            bounds = np.array([stencil.bounds for stencil in self._stencils])
            (left, top), (right, bottom) = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
            found = f"outlines from x {left:g}, y {top:g} to x {right:g}, y {bottom:g}"
            size, share = f"{self.base.width} x {self.base.height} px", f"{on_slide.sum()} of {on_slide.size}"
            expected = f"most of them on the slide of {size}, where {share} are"
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
        rows, columns = centres(roi, lattice, self.base)
        truth[(rows < 0) | (rows >= self.base.height), :] = IGNORED
        truth[:, (columns < 0) | (columns >= self.base.width)] = IGNORED
        return truth


def with_glass(truth: Truth, tissue: PackedTissue) -> Truth:
    """A truth that knows glass for `rest` outside the known outlines as well; a label image says itself what is known."""
    return replace(truth, tissue=tissue) if isinstance(truth, OutlineTruth) else truth


@dataclass(frozen=True)
class _Layers:
    """Stencils in the order of painting, each with its value; the stencil of what is known; remarks."""

    painted: tuple[tuple[int, Stencil], ...]
    known: Stencil | None
    remarks: tuple[str, ...]


@lru_cache(maxsize=8)
def _load_layers(path: Path, stamp: Stamp, class_map: ClassMap, corner: tuple[int, int]) -> _Layers:
    """Reads a file and sorts its outlines; `stamp` makes sure that a changed file is read anew."""
    outlines = read_outlines(path, corner)
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
        remarks=(*_remarks(outlines), *_hidden(painted)),
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


def _hidden(painted: dict[int, list[Area]]) -> tuple[str, ...]:
    """A remark where outlines lie wholly under one of a later class: nothing of them is seen."""
    count = 0
    for value, areas in painted.items():
        later = [area for other, over in painted.items() if value < other < IGNORED for area in over]
        # The large ones ask: GEOS prepares who asks.
        _, under = shapely.STRtree(areas).query(np.asarray(later, dtype=object), predicate="covers")
        count += len(np.unique(under))
    return (f"outlines wholly under one of a later class, of no effect: {count}",) if count else ()


def _remarks(outlines: Outlines) -> tuple[str, ...]:
    counts = (
        ("invalid polygons (crossed lines, or points that are no numbers), repaired", outlines.repaired),
        ("points, lines and rulers, left out", outlines.skipped),
        ("outlines without an area (or three points that are numbers), left out", outlines.dropped),
        ("cells whose nucleus is outlined too, of which the cell's own outline counts", outlines.nuclei),
    )
    none = () if outlines.outlines else ("no outlines",)
    return (*none, *(f"{text}: {count}" for text, count in counts if count))
