"""A picture in memory as compressed squares, for windows of it: labels take a hundredth of the room of their pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_SIDE = 512  # pixels
_ZSTD_LEVEL = 1


@dataclass(frozen=True)
class Squares:
    """A picture of `columns` squares a row, each of (512, 512) values of `dtype`; what lies past its edges is packed too."""

    columns: int
    dtype: np.dtype[Any]
    packed: tuple[bytes, ...]

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """The values of a window inside the picture; unpacks only the squares that it touches."""
        window = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for top, left in product(_starts(rows), _starts(columns)):
            row, row_end = max(top, rows.start), min(top + _SIDE, rows.stop)
            column, column_end = max(left, columns.start), min(left + _SIDE, columns.stop)
            part = self._square(top, left)[row - top : row_end - top, column - left : column_end - left]
            window[row - rows.start : row_end - rows.start, column - columns.start : column_end - columns.start] = part
        return window

    def _square(self, top: int, left: int) -> NDArray[Any]:
        payload = imagecodecs.zstd_decode(self.packed[top // _SIDE * self.columns + left // _SIDE])
        return np.frombuffer(payload, self.dtype).reshape(_SIDE, _SIDE)


def pack(width: int, height: int, cut: Callable[[tuple[int, int, int, int]], NDArray[Any]]) -> Squares:
    """Pack a picture square by square; `cut` gives what lies between (left, top, right, bottom), past its edges as well."""
    places = product(range(0, height, _SIDE), range(0, width, _SIDE))
    packed, dtype = list[bytes](), np.dtype(np.uint8)
    for top, left in places:
        square = cut((left, top, left + _SIDE, top + _SIDE))
        packed.append(bytes(imagecodecs.zstd_encode(square.tobytes(), level=_ZSTD_LEVEL)))
        dtype = square.dtype
    return Squares(-(-width // _SIDE), dtype, tuple(packed))


def _starts(window: slice) -> range:
    """Where the squares begin that a window touches."""
    return range(window.start // _SIDE * _SIDE, window.stop, _SIDE)
