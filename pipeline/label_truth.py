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


def fit(image: LabelImage, base: Lattice, class_map: ClassMap, label_mpp: float | None, shown: Roi) -> LabelImageTruth:
    """Lays a label image over its slide, or over what QuPath shows of it.

    At `label_mpp`, a slide whose pixels are no squares may have labels that are, or that are as its own. Raises
    AnnotationError where its size differs from that of both: at all without `label_mpp`, else by over 1 px.
    """
    scales = [base.mpp]
    if label_mpp is not None:
        scales = [Mpp.square(label_mpp), Mpp(label_mpp, label_mpp * base.mpp.y / base.mpp.x)]
    slack = 1e-6 if label_mpp is None else 1 + 1e-6
    for mpp in scales:
        labels = Lattice(image.width, image.height, mpp)
        scale_x, scale_y = base.scale_to(labels)
        for part in (base.roi, shown):
            if abs(image.width - part.width * scale_x) <= slack and abs(image.height - part.height * scale_y) <= slack:
                return LabelImageTruth(image, labels, base, class_map, part)
    fitting, expected = base.width * base.mpp.x / image.width, base.at(scales[0])
    raise AnnotationError(
        str(image.path),
        f"a label image of {image.width} x {image.height} px",
        f"{expected.width} x {expected.height} px, the slide's size at {expected.mpp.x:g} um/px",
        f"Set `annotations.label_mpp` to the image's scale (its width would suit {fitting:.6g} um/px), "
        "or make sure that it belongs to this slide.",
    )
