"""Pictures to look at: a slide's tissue, the classes over it, truth beside prediction, with legend and scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline.canvas import Canvas
from pipeline.classes import IGNORED, Classes
from pipeline.files import replacing
from pipeline.geometry import Lattice, Mpp
from pipeline.slide import Slide
from pipeline.tissue import Tissue

PICTURE_PIXELS = 2048
"""Longer side of pictures of whole slides."""

_PANEL, _NARROWEST = 1024, 640  # pixels: longer side of a panel, least width of a picture
_LEGEND_SPACE = 256  # pixels of a picture's height that are kept for its legend
_TINT, _LINES, _BETWEEN = np.array([97, 115, 13], np.uint8)  # of 255: cover by colour, by grey lines, between these
_PNG_LEVEL = 3  # of 9: pictures are looked at, not archived
_HATCHING = 12  # pixels from one line to the next
_WHITE, _INK, _GREY, _LINE = (255, 255, 255), (40, 40, 40), (150, 150, 150), (0, 160, 60)
_CROSS = ndimage.generate_binary_structure(2, 1)


def thumbnail(slide: Slide) -> np.ndarray:
    """A slide at a glance: (rows, columns, 3) uint8 RGB, 2048 px on its longer side, or all of a smaller slide."""
    seen = slide.base.seen(slide.base.mpp, PICTURE_PIXELS)
    return slide.read(seen.roi, seen)


def outlined(slide: Slide, tissue: Tissue) -> np.ndarray:
    """The thumbnail with a line round the tissue and the glass dimmed: (rows, columns, 3) uint8 RGB."""
    seen = slide.base.seen(slide.base.mpp, PICTURE_PIXELS)
    picture, mask = slide.read(seen.roi, seen), tissue.sampled(seen.roi, seen)
    picture = np.where(mask[..., None], picture, picture // 4 * np.uint8(3) + np.uint8(32))
    picture[ndimage.morphological_gradient(mask.view(np.uint8), footprint=_CROSS) > 0] = _LINE
    return picture


def overlay(slide: Slide, canvas: Canvas) -> np.ndarray:
    """The slide under its classes, each in its translucent colour and outlined, with legend and scale bar.

    Returns (rows, columns, 3) uint8 RGB, at most 2048 pixels on the longer side; what was not examined is hatched.
    """
    base = slide.base
    shrink = max(base.width / PICTURE_PIXELS, base.height / (PICTURE_PIXELS - _LEGEND_SPACE), 1)
    lattice = base.at(Mpp(base.mpp.x * shrink, base.mpp.y * shrink))
    labels = _labels_at(canvas, lattice)
    unseen = labels == IGNORED
    picture = _hatched(_painted(slide.read(lattice.roi, lattice), labels, canvas.classes), unseen)
    width = max(lattice.width, _NARROWEST)
    legend = _legend(width, canvas.classes, "not examined" if unseen.any() else "", lattice.mpp.x)
    return np.asarray(_stacked([Image.fromarray(picture), legend], width))


def truth_beside_prediction(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Slide, truth and prediction side by side, with legend; where nothing is known, the latter two are hatched.

    `image` is (rows, columns, 3) uint8 RGB, `truth` and `prediction` (rows, columns) uint8 class indices or IGNORED.
    Returns (rows, columns, 3) uint8 RGB; a panel is at most 1024 pixels on its longer side, and a tiny one is enlarged.
    """
    image, truth, prediction = (_resized(pixels, _PANEL) for pixels in (image, truth, prediction))
    unknown = truth == IGNORED
    panels = {
        "slide": image,
        "truth": _hatched(_painted(image, truth, classes), unknown),
        "prediction": _hatched(_painted(image, prediction, classes), unknown),
    }
    gap = max(image.shape[1] // 64, 6)
    size = _font_size(3 * image.shape[1])
    width = max(3 * image.shape[1] + 2 * gap, _NARROWEST)
    row = Image.new("RGB", (width, image.shape[0] + 2 * size), _WHITE)
    for number, (title, panel) in enumerate(panels.items()):
        x = number * (image.shape[1] + gap)
        ImageDraw.Draw(row).text((x + size // 2, size), title, _INK, _font(size), anchor="lm")
        row.paste(Image.fromarray(panel), (x, 2 * size))
    return np.asarray(_stacked([row, _legend(width, classes, "not known" if unknown.any() else "", None)], width))


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture, (rows, columns, 3) uint8 RGB, as PNG; the file appears when it is complete."""
    with replacing(path) as unfinished:
        Image.fromarray(picture).save(unfinished, format="PNG", compress_level=_PNG_LEVEL)


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


def _legend(width: int, classes: Classes, hatched: str, mpp: float | None) -> Image.Image:
    """A strip with a swatch and name for each class, and for what is `hatched`, if any; a scale bar where `mpp` is given."""
    size = _font_size(width)
    font = _font(size)
    entries = [*((item.name, item.color) for item in classes), *([(hatched, None)] if hatched else [])]
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
