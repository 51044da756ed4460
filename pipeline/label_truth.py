"""The truth that a label image holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import IGNORED
from pipeline.errors import AnnotationError
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.label_image import LabelImage
from pipeline.truth import ClassMap, centres

_TABLE = 65536  # label values that are looked up in a table; larger ones, of which there are few, are looked for one by one

Place = tuple[Mpp, Roi]
"""The micrometres per pixel of labels, and the part of a slide that they show."""


@dataclass(frozen=True)
class LabelImageTruth:
    """The truth as a picture of class numbers; the label whose pixel holds a centre is taken, none is blended.

    `part` is the rectangle of `base` that the picture shows, all of it: where its size was rounded down, its last labels
    reach on. Its `read` raises AnnotationError for values that the class map does not know.
    """

    image: LabelImage
    labels: Lattice
    base: Lattice
    class_map: ClassMap
    part: Roi

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
        base_rows, base_columns = centres(roi, lattice, self.base)
        scale_x, scale_y = self.base.scale_to(self.labels)
        y, x = centres(roi, lattice, self.labels)
        rows = np.clip(np.floor(y - self.part.y * scale_y).astype(np.int64), 0, self.labels.height - 1)
        columns = np.clip(np.floor(x - self.part.x * scale_x).astype(np.int64), 0, self.labels.width - 1)
        in_rows = (base_rows >= self.part.y) & (base_rows < self.part.bottom)
        in_columns = (base_columns >= self.part.x) & (base_columns < self.part.right)
        if in_rows.any() and in_columns.any():
            values = self.image.sample(rows[in_rows], columns[in_columns])
            truth[np.ix_(in_rows, in_columns)] = self._classes_of(values)
        return truth

    def _classes_of(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Class indices of label values."""
        plain = {index: index for index in range(len(self.class_map.classes))}
        meaning = {IGNORED: IGNORED, **(self.class_map.values or plain)}
        small = {value: index for value, index in meaning.items() if value < _TABLE}
        past = max(small) + 1
        table = np.full(past + 1, -1, dtype=np.int16)
        table[list(small)] = list(small.values())
        index = values.astype(np.int64)
        classes = table[np.where((index >= 0) & (index < past), index, past)]
        for value in meaning.keys() - small.keys():
            classes[values == value] = meaning[value]
        if (classes < 0).any():
            found = ", ".join(str(value) for value in np.unique(values[classes < 0])[:10])
            raise AnnotationError(
                str(self.image.path),
                f"labels of value {found}",
                f"only {', '.join(str(value) for value in sorted(meaning))}",
                "Say in `classes[].values` which class each value of the label image stands for (255: unknown).",
            )
        return classes.astype(np.uint8)


def fit(image: LabelImage, base: Lattice, class_map: ClassMap, label_mpp: float | None, shown: Roi) -> LabelImageTruth:
    """Lays a label image over its slide, or over what QuPath shows of it.

    Without `label_mpp`, a pixel of it is as wide and as high as one of the slide, or as a whole number of them, as QuPath
    exports labels: slides of several scales need no other word. At `label_mpp`, a slide whose pixels are no squares may have
    labels that are, or that are as its own. Raises AnnotationError where its size is neither exactly the slide's nor to
    within 1 px one of the others.
    """
    places = _divided(image, base, shown) if label_mpp is None else _scaled(image, base, shown, label_mpp)
    if not places:
        raise _misfit(image, base, label_mpp)
    mpp, part = places[0]
    return LabelImageTruth(image, Lattice(image.width, image.height, mpp), base, class_map, part)


def _scaled(image: LabelImage, base: Lattice, shown: Roi, label_mpp: float) -> list[Place]:
    """Where labels of that scale fit."""
    scales = (Mpp.square(label_mpp), Mpp(label_mpp, label_mpp * base.mpp.y / base.mpp.x))
    parts = (base.roi, shown)
    return [(mpp, part) for mpp in scales for part in parts if _fits(image, part, mpp.x / base.mpp.x, mpp.y / base.mpp.y)]


def _divided(image: LabelImage, base: Lattice, shown: Roi) -> list[Place]:
    """Where labels fit that are a whole number of the slide's pixels wide; nowhere where several numbers would do."""
    places = list[Place]()
    for part in dict.fromkeys((base.roi, shown)):
        if part.shape == (image.height, image.width):
            return [(base.mpp, part)]
        least, most = max(part.width // (image.width + 1), 2), part.width // max(image.width - 1, 1)
        downsamples = (number for number in range(least, most + 1) if _fits(image, part, number, number))
        places += [(Mpp(base.mpp.x * number, base.mpp.y * number), part) for number in downsamples]
    return places if len(places) == 1 else []


def _fits(image: LabelImage, part: Roi, downsample_x: float, downsample_y: float) -> bool:
    """Whether an image has the size of part of a slide, so many times smaller, to within 1 px."""
    apart = (image.width - part.width / downsample_x, image.height - part.height / downsample_y)
    return max(map(abs, apart)) <= 1 + 1e-6


def _misfit(image: LabelImage, base: Lattice, label_mpp: float | None) -> AnnotationError:
    """The error for a label image of another size; says which scale it would have."""
    fitting, size = base.width * base.mpp.x / image.width, base if label_mpp is None else base.at(Mpp.square(label_mpp))
    expected = f"{size.width} x {size.height} px, the slide's size at {size.mpp.x:g} um/px"
    return AnnotationError(
        str(image.path),
        f"a label image of {image.width} x {image.height} px",
        f"{expected}, or that divided by one whole number" if label_mpp is None else expected,
        f"Set `annotations.label_mpp` to the image's scale (its width would suit {fitting:.6g} um/px), or, for slides of "
        "several scales, leave it null and export each at a whole downsample; or make sure that it belongs to this slide.",
    )
