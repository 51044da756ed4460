"""What people look at: a pyramidal OME-TIFF of the classes, and pictures with a legend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline.canvas import Canvas
from pipeline.classes import IGNORED, Classes
from pipeline.files import replacing
from pipeline.geometry import Lattice, Mpp, Roi
from pipeline.slide import Slide
from pipeline.tissue import PICTURE_PIXELS

_TILE = 512  # pixels; where the canvas's own chunks do not suit TIFF, whose tiles are multiples of 16
_CLASSIC_TIFF_BYTES = 2**31  # of pixels before compression: a margin of two below what a classic TIFF can hold
_PANEL, _NARROWEST = 1024, 640  # pixels: longer side of a panel, least width of a picture
_LEGEND_SPACE = 256  # pixels of a picture's height that are kept for its legend
_TINT, _DIM, _LINES, _BETWEEN = np.array([97, 128, 115, 13], np.uint8)  # of 255: cover by colour, white, grey lines, gaps
_PNG_LEVEL = 3  # of 9: pictures are looked at, not archived
_HATCHING = 12  # pixels from one line to the next
_WHITE, _INK, _GREY = (255, 255, 255), (40, 40, 40), (150, 150, 150)


def write_ome_tiff(canvas: Canvas, path: Path) -> None:
    """Write the class indices as a tiled, lossless OME-TIFF with all levels of the canvas's pyramid.

    Pixels are uint8 indices, IGNORED where not examined, with a colour table of the classes' colours. The file appears when
    it is complete; memory does not depend on its size.
    """
    classes = ", ".join(f"{index} {name}" for index, name in enumerate(canvas.classes.names))
    palette = {"photometric": "palette", "colormap": _colormap(canvas.classes)}
    _write_pyramid(canvas, path, f"classes: {classes}", canvas.read_labels, IGNORED, palette)


def write_entropy(canvas: Canvas, path: Path) -> None:
    """Write how undecided the probabilities are, as a tiled, lossless OME-TIFF with all levels of the canvas's pyramid.

    Pixels are uint8: 255 times the entropy of the class probabilities divided by its largest value, the logarithm of the
    number of classes; so 0 where one class is certain or nothing was examined, 255 where all are equally likely. A coarse
    pixel has the entropy of its mean probabilities. Reference: Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x.
    """
    _write_pyramid(
        canvas, path, "entropy of the class probabilities", partial(_entropy, canvas), 0, {"photometric": "minisblack"}
    )


def _write_pyramid(
    canvas: Canvas, path: Path, name: str, read: Callable[..., np.ndarray], empty: int, colours: Mapping[str, Any]
) -> None:
    """All levels of what `read` gives for a rectangle of a level, (rows, columns) uint8; most of it may be `empty`."""
    tile = canvas.chunk if canvas.chunk % 16 == 0 else _TILE
    big = 1.4 * canvas.lattice.width * canvas.lattice.height > _CLASSIC_TIFF_BYTES
    with replacing(path) as unfinished, tifffile.TiffWriter(unfinished, bigtiff=big, ome=True) as writer:
        for number, level in enumerate(canvas.levels):
            first = {"subifds": len(canvas.levels) - 1, "metadata": _ome(canvas, name)}
            writer.write(
                _encoded_tiles(canvas, number, tile, read, empty),
                shape=level.shape,
                dtype=np.uint8,
                tile=(tile, tile),
                compression="zlib",
                resolution=(1e4 / level.mpp.x, 1e4 / level.mpp.y),
                resolutionunit="CENTIMETER",
                **colours,
                **(first if number == 0 else {"subfiletype": 1}),
            )


def overlay(slide: Slide, canvas: Canvas) -> np.ndarray:
    """The slide under its classes, each in its translucent colour and outlined, with legend and scale bar.

    Returns (rows, columns, 3) uint8 RGB, at most 2048 pixels on the longer side; what was not examined is hatched.
    """
    base = slide.base
    shrink = max(base.width / PICTURE_PIXELS, base.height / (PICTURE_PIXELS - _LEGEND_SPACE), 1)
    lattice = base.at(Mpp(base.mpp.x * shrink, base.mpp.y * shrink))
    labels = _labels_at(canvas, lattice)
    picture = _hatched(_painted(slide.read(lattice.roi, lattice), labels, canvas.classes), labels == IGNORED)
    width = max(lattice.width, _NARROWEST)
    legend = _legend(width, canvas.classes, bool((labels == IGNORED).any()), lattice.mpp.x)
    return np.asarray(_stacked([Image.fromarray(picture), legend], width))


def truth_beside_prediction(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Slide, truth and prediction side by side; where nothing is known, the latter two are dimmed.

    `image` is (rows, columns, 3) uint8 RGB, `truth` and `prediction` (rows, columns) uint8 class indices or IGNORED.
    Returns (rows, columns, 3) uint8 RGB; a panel is at most 1024 pixels on its longer side, and a tiny one is enlarged.
    """
    image, truth, prediction = (_resized(pixels, _PANEL) for pixels in (image, truth, prediction))
    unknown = truth == IGNORED
    pale = " (pale: not known)" if unknown.any() else ""
    panels = {
        "slide": image,
        f"truth{pale}": _dimmed(_painted(image, truth, classes), unknown),
        f"prediction{pale}": _dimmed(_painted(image, prediction, classes), unknown),
    }
    gap = max(image.shape[1] // 64, 6)
    size = _font_size(3 * image.shape[1])
    width = max(3 * image.shape[1] + 2 * gap, _NARROWEST)
    row = Image.new("RGB", (width, image.shape[0] + 2 * size), _WHITE)
    for number, (title, panel) in enumerate(panels.items()):
        x = number * (image.shape[1] + gap)
        ImageDraw.Draw(row).text((x + size // 2, size), title, _INK, _font(size), anchor="lm")
        row.paste(Image.fromarray(panel), (x, 2 * size))
    return np.asarray(_stacked([row, _legend(width, classes, False, None)], width))


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture, (rows, columns, 3) uint8 RGB, as PNG; the file appears when it is complete."""
    with replacing(path) as unfinished:
        Image.fromarray(picture).save(unfinished, format="PNG", compress_level=_PNG_LEVEL)


def _entropy(canvas: Canvas, roi: Roi, level: int) -> np.ndarray:
    """See `write_entropy`; probabilities have 8 bits, so that each term is looked up."""
    probabilities = np.arange(256) / 255
    terms = np.zeros(256, np.float32)
    terms[1:] = -probabilities[1:] * np.log(probabilities[1:]) * 255 / np.log(len(canvas.classes))
    total = terms[canvas.read_probabilities(roi, level)].sum(axis=0)
    return np.asarray(np.rint(np.minimum(total, 255)), np.uint8)


def _encoded_tiles(canvas: Canvas, number: int, tile: int, read: Callable[..., np.ndarray], empty: int) -> Iterator[bytes]:
    """The tiles of a level, row by row, each compressed; the many that are `empty` are compressed once."""
    nothing = _compressed(np.full((tile, tile), empty, np.uint8))
    level, written, size = canvas.levels[number], canvas.written(number), canvas.write_size
    for y in range(0, level.height, tile):
        rows = slice(y // size, (y + tile - 1) // size + 1)
        for x in range(0, level.width, tile):
            touched = written[rows, x // size : (x + tile - 1) // size + 1].any()
            pixels = read(Roi(x, y, tile, tile), number) if touched else None
            yield nothing if pixels is None or np.all(pixels == empty) else _compressed(pixels)


def _compressed(pixels: np.ndarray) -> bytes:
    """Deflate as TIFF has it; this library is twice as fast as Python's own and no worse."""
    return bytes(imagecodecs.deflate_encode(pixels.tobytes(), level=5))


def _ome(canvas: Canvas, name: str) -> dict[str, object]:
    mpp = canvas.lattice.mpp
    return {
        "axes": "YX",
        "Name": name,
        "PhysicalSizeX": mpp.x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mpp.y,
        "PhysicalSizeYUnit": "µm",
    }


def _colormap(classes: Classes) -> np.ndarray:
    """(3, 256) uint16: the colour of each index; white where not examined."""
    table = np.zeros((3, 256), np.uint16)
    table[:, IGNORED] = 65535
    for index, item in enumerate(classes):
        table[:, index] = np.array(item.color) * 257
    return table


def _labels_at(canvas: Canvas, lattice: Lattice) -> np.ndarray:
    """Labels at the centres of the pixels of another lattice, from the coarsest level that is as fine."""
    fine = [number for number, level in enumerate(canvas.levels) if level.mpp.x <= lattice.mpp.x]
    number = max(fine, default=0)
    level = canvas.levels[number]
    x_scale, y_scale = lattice.scale_to(level)
    columns = np.minimum(((np.arange(lattice.width) + 0.5) * x_scale).astype(int), level.width - 1)
    rows = np.minimum(((np.arange(lattice.height) + 0.5) * y_scale).astype(int), level.height - 1)
    return canvas.read_labels(level.roi, number)[np.ix_(rows, columns)]


def _painted(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """The image under translucent colours; where two classes meet, the later one is outlined on its own side."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(classes)] = [item.color for item in classes]
    known = labels != IGNORED
    width = 5 if max(labels.shape) > _PANEL else 3
    line = known & (ndimage.minimum_filter(labels, width) < labels)
    return _blended(image, colors.take(labels, axis=0), np.where(line, 255, known * _TINT))


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Every nth pixel of a large picture, or each pixel of a tiny one n times, to suit a panel of `size` pixels."""
    longest = max(pixels.shape[:2])
    step, times = -(-longest // size), max(size // (2 * longest), 1)
    return pixels[::step, ::step].repeat(times, axis=0).repeat(times, axis=1)


def _dimmed(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    return _blended(picture, np.array(_WHITE), where * _DIM)


def _hatched(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Thin diagonal lines over part of a picture."""
    rows, columns = np.ogrid[: where.shape[0], : where.shape[1]]
    lines = (rows + columns) % _HATCHING == 0
    return _blended(picture, np.array(_GREY), where * np.where(lines, _LINES, _BETWEEN))


def _blended(picture: np.ndarray, color: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """A picture under a colour, (3,) or (rows, columns, 3) uint8, that covers each pixel by `cover`, uint8, of 255."""
    below, over = Image.fromarray(picture), Image.fromarray(cover)
    above = Image.fromarray(color) if color.ndim == 3 else Image.new("RGB", below.size, tuple(color.tolist()))
    return np.asarray(Image.composite(above, below, over))


def _legend(width: int, classes: Classes, hatched: bool, mpp: float | None) -> Image.Image:
    """A strip with a swatch and a name for each class, and for what is hatched; a scale bar where `mpp` is given."""
    size = _font_size(width)
    font = _font(size)
    entries = [*((item.name, item.color) for item in classes), *([("not examined", None)] if hatched else [])]
    widths = [int(font.getlength(name)) + 4 * size for name, _ in entries]
    bar_width = width // 3 if mpp else 0
    places, x, y = [], size, size
    for needed in widths:
        if x + needed > width - bar_width and x > size:
            x, y = size, y + 2 * size
        places.append((x, y))
        x += needed
    strip = Image.new("RGB", (width, y + 2 * size + size // 2), _WHITE)
    draw = ImageDraw.Draw(strip)
    for (name, color), (x, y) in zip(entries, places, strict=True):
        _swatch(strip, (x, y, x + 3 * size // 2, y + size), color)
        draw.text((x + 2 * size, y + size // 2), name, _INK, font, anchor="lm")
    if mpp:
        _scale_bar(draw, width - size, size, size, mpp, width // 5)
    return strip


def _swatch(strip: Image.Image, box: tuple[int, int, int, int], color: tuple[int, int, int] | None) -> None:
    left, top, right, bottom = box
    area = np.full((bottom - top, right - left, 3), 255, np.uint8)
    if color is None:
        area = _hatched(area, np.ones(area.shape[:2], bool))
    else:
        area = _blended(area, np.array(color), np.full(area.shape[:2], _TINT))
    strip.paste(Image.fromarray(area), (left, top))
    ImageDraw.Draw(strip).rectangle(box, outline=color or _GREY, width=max((bottom - top) // 10, 1))


def _scale_bar(draw: ImageDraw.ImageDraw, right: int, top: int, size: int, mpp: float, longest: int) -> None:
    """A bar of a round length, at most `longest` pixels, that ends at `right`, with its length written over its left."""
    length_um = _round_length(longest * mpp)
    pixels = round(length_um / mpp)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    middle = top + size // 2
    tick, line = size // 3, max(size // 8, 2)
    draw.line([(right - pixels, middle), (right, middle)], _INK, line)
    for x in (right - pixels, right):
        draw.line([(x, middle - tick), (x, middle + tick)], _INK, line)
    draw.text((right - pixels - size // 2, middle), text, _INK, _font(size), anchor="rm")


def _round_length(longest: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... (and of their tenths) that is not above `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))


def _stacked(parts: Sequence[Image.Image], width: int) -> Image.Image:
    """Pictures one below the other, on white."""
    page = Image.new("RGB", (width, sum(part.height for part in parts)), _WHITE)
    y = 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    return page


def _font_size(width: int) -> int:
    return min(max(width // 72, 12), 28)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: unlike Pillow's own font it writes most languages, and the sign µ.

    Matplotlib itself is not imported, which would take a fifth of a second.
    """
    found = distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(found), size)
