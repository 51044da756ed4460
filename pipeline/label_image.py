"""Label images: a PNG or TIFF with one channel of whole numbers, read by window."""

from __future__ import annotations

import math
import re
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from pipeline.errors import AnnotationError
from pipeline.files import Stamp, file_stamp
from pipeline.squares import Squares, pack

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_EXPECTED = "a PNG or TIFF with one channel of whole numbers"
_PALETTE_OR_GREY = ("1", "L", "P", "I", "I;16")
_LOSSY = ("jpeg", "webp", "jxl")  # in any spelling of GDAL's
_DEPTH_AND_KIND = slice(24, 26)  # bytes of a PNG: bits of a value, and 0 for grey
_SPREAD = {2: 85, 4: 17}  # by which Pillow multiplies grey values of so many bits
_PAGE = re.compile(r"\((\d+)P x (\d+)L ")  # width and height of a page, in GDAL's words
_BLOCK_PIXELS = 2**26  # label pixels held at once while a coarse window is sampled
_reading = threading.Lock()  # a GDAL data set serves one thread at a time, and one decoded PNG fills memory enough


@dataclass(frozen=True)
class LabelImage:
    """The full-resolution picture of a label image: where it is and its size in pixels.

    Nothing is kept open in the object, so that it travels to worker processes; each process opens the file once.
    """

    path: Path
    width: int
    height: int

    def sample(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        """The values where `rows` and `columns` cross, both ascending and inside the image: (rows, columns), integer.

        Decodes only the tiles or strips it needs. Raises AnnotationError where the file is damaged.
        """
        stamp = annotation_stamp(self.path)
        left, width = int(columns[0]), int(columns[-1] - columns[0]) + 1
        at_once = max(1, _BLOCK_PIXELS * len(rows) // (width * int(rows[-1] - rows[0] + 1)))
        pieces = []
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            window = Window(left, int(part[0]), width, int(part[-1] - part[0]) + 1)
            try:
                block = _read(self.path, stamp, window)
            except Exception as error:  # a decoder raises whatever it likes
                raise _damaged(self.path, error) from error
            pieces.append(block[np.ix_(part - part[0], columns - left)])
        return np.concatenate(pieces)


def annotation_stamp(path: Path) -> Stamp:
    """The `file_stamp` of an annotation file. Raises AnnotationError where there is none."""
    try:
        return file_stamp(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def is_label_image(path: Path) -> bool:
    """Whether a file is a PNG or TIFF, by its first bytes. Raises AnnotationError for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG))
    except OSError as error:
        raise _unreadable(path, error) from error
    return start == _PNG or start.startswith(_TIFF)


def open_label_image(path: Path) -> LabelImage:
    """A label image, of which only the header has been read.

    Raises AnnotationError for a damaged file and for one that is not a single channel of whole numbers.
    """
    try:
        height, width, fault = _tiff_header(path) if _is_tiff(path) else _png_header(path)
    except Exception as error:  # a decoder raises whatever it likes
        raise _damaged(path, error) from error
    if fault:
        remedy = (
            "Save class numbers, not colours, with 0 as black, the full size on the first page, and LZW or Deflate: for "
            "instance QuPath's LabeledImageServer without multichannelOutput."
        )
        raise AnnotationError(str(path), fault, _EXPECTED, remedy)
    return LabelImage(path, width, height)


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(_TIFF)


def _tiff_header(path: Path) -> tuple[int, int, str]:
    """(height, width, what is wrong with it) of a TIFF's full-resolution picture."""
    with _open_tiff(path) as tiff:
        return tiff.height, tiff.width, _tiff_fault(tiff)


def _tiff_fault(tiff: Any) -> str:
    """What is wrong with a TIFF whose first page is to be labels."""
    compression = str(tiff.profile.get("compress", "")).lower()
    if tiff.count != 1:
        return f"a TIFF of {tiff.count} channels"
    if np.dtype(tiff.dtypes[0]).kind not in "iu":
        return f"a TIFF of {tiff.dtypes[0]} numbers"
    if any(name in compression for name in _LOSSY):
        return f"a TIFF whose compression, {compression}, changes numbers"
    if tiff.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES" and not _writes_as_is(tiff):
        return "a TIFF in which 0 is white"
    return _page_fault(tiff)


def _writes_as_is(tiff: Any) -> bool:
    """Whether tifffile wrote a TIFF: its masks have 0 as white, and mean their numbers; others mean what viewers show."""
    return str(tiff.tags().get("TIFFTAG_SOFTWARE", "")).startswith("tifffile")


def _page_fault(tiff: Any) -> str:
    """What is wrong with the pages that are not marked as levels of a pyramid: the first is to be the largest."""
    told = (text for name, text in tiff.tags(ns="SUBDATASETS").items() if name.endswith("_DESC"))
    sizes = [tuple(map(int, size)) for size in _PAGE.findall(" ".join(told))]  # to open each takes minutes with thousands
    if sizes.count(tiff.shape[::-1]) > 1:
        return "a TIFF of several pages of one size"
    width, height = max(sizes, key=math.prod, default=(0, 0))
    first = f"a TIFF whose first page, of {tiff.width} x {tiff.height} px, is smaller than a later one"
    return f"{first}, of {width} x {height} px" if width * height > tiff.width * tiff.height else ""


def _png_header(path: Path) -> tuple[int, int, str]:
    """(height, width, what is wrong with it) of a PNG."""
    with _open_png(path) as image:
        fault = "" if image.mode in _PALETTE_OR_GREY else f"a PNG of kind {image.mode}"
        return image.height, image.width, fault


def _read(path: Path, stamp: Stamp, window: Window) -> NDArray[Any]:
    """The values of a window. `stamp` makes sure that a changed file is opened anew."""
    values: NDArray[Any]
    if _is_tiff(path):
        with _reading:
            values = _tiff_dataset(path, stamp).read(1, window=window)
    else:
        with _reading:
            squares = _png_squares(path, stamp)
        values = squares.read(*window.toslices())
    return values


@lru_cache(maxsize=1024)  # of some 0.3 MiB each: patches are drawn from all slides of a cohort, in any order
def _png_squares(path: Path, stamp: Stamp) -> Squares:
    """All pixels: a PNG can only be decoded from its start."""
    with path.open("rb") as file:
        depth, kind = file.read(_DEPTH_AND_KIND.stop)[_DEPTH_AND_KIND]
    spread = np.uint8(_SPREAD.get(depth, 1) if kind == 0 else 1)  # of eight bits: Python's own 1 makes int64 of masks
    with _open_png(path) as image:
        return pack(image.width, image.height, lambda box: np.asarray(image.crop(box)) // spread)


def _open_png(path: Path) -> Image.Image:
    """A PNG of which only the header has been read. Pillow warns of one of 89 Mpx, which is fine, and refuses one of 179."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


@lru_cache(maxsize=32)
def _tiff_dataset(path: Path, stamp: Stamp) -> Any:
    """An open TIFF that decodes only what is asked of it."""
    return _open_tiff(path)


def _open_tiff(path: Path | str) -> Any:
    """A TIFF opened by GDAL: tifffile crashes on a damaged LZW tile, and hangs on a damaged directory."""
    with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, driver="GTiff")


def _unreadable(path: Path, error: OSError) -> AnnotationError:
    remedy = "Check the path in the manifest's column `annotation`."
    return AnnotationError(str(path), error.strerror or str(error), "a file that can be read", remedy)


def _damaged(path: Path, error: Exception) -> AnnotationError:
    remedy = "Export the label image again; one too large for a PNG should be a tiled TIFF."
    return AnnotationError(str(path), f"an image that cannot be read ({error.__cause__ or error})", _EXPECTED, remedy)
