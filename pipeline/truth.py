"""What is true of each pixel of a slide, and how what a file says becomes classes.

GeoJSON, XML:  names  --+
                        +-- ClassMap --> Truth.read(roi, lattice) -> class indices, IGNORED where nothing is known
PNG, TIFF:     values --+
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import IGNORED, Classes
from pipeline.geometry import Lattice, Roi


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


def centres(roi: Roi, lattice: Lattice, other: Lattice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(y, x) of the centres of the rows and the columns of `roi`, in pixels of `other`."""
    scale_x, scale_y = lattice.scale_to(other)
    rows, columns = (np.arange(*ends, dtype=np.float64) for ends in ((roi.y, roi.bottom), (roi.x, roi.right)))
    return (rows + 0.5) * scale_y, (columns + 0.5) * scale_x
