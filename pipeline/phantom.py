"""Phantoms: seeded slides on disk with exact outlines, one or a whole cohort."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio.features
import tifffile
from numpy.typing import NDArray

from pipeline.classes import Class, Classes
from pipeline.errors import CohortError
from pipeline.files import replacing, write_csv, write_text
from pipeline.histology import GLASS, Bytes, Floats, draw, plan

PHANTOM_CLASSES = Classes(
    (
        Class("Glass", (235, 235, 235)),
        Class("Stroma", (150, 200, 150)),
        Class("Gland", (50, 110, 210)),
        Class("Tumour", (200, 0, 0)),
        Class("Fat", (240, 190, 50)),
    )
)

_RECIPE = 1  # raise it when the drawing changes: a cohort then draws its slides again
_TILE = 256
_SMALLEST = 64  # pixels along the short side of the last level, at least
_BAND = 256  # rows drawn at once: bounds the memory


@dataclass(frozen=True, eq=False)
class Phantom:
    """A slide on disk, its outlines, and its truth: (height, width) uint8 indices of PHANTOM_CLASSES."""

    slide: Path
    annotation: Path
    truth: Bytes


def render(seed: int, width: int, height: int, mpp: float = 0.5, spread: float = 0.9) -> tuple[Bytes, Bytes]:
    """Draw a phantom: (height, width, 3) uint8 RGB and (height, width) uint8 indices of PHANTOM_CLASSES.

    `spread` is the tissue's share of the slide's sides: 0 leaves only glass, 3 none. All four tissues appear from about
    1 x 0.8 mm on.
    """
    scene = plan(seed, width, height, mpp, spread)
    image, truth = np.empty((height, width, 3), np.uint8), np.empty((height, width), np.uint8)
    for top in range(0, height, _BAND):
        rows = slice(top, min(top + _BAND, height))
        image[rows], truth[rows] = draw(scene, rows.start, rows.stop)
    return image, truth


def _taps(size: int) -> list[tuple[NDArray[np.intp], Floats]]:
    """How `size` pixels become half as many, rounded down: four times, the pixel to take for each and its weight."""
    edges = np.linspace(0, size, size // 2 + 1)
    start, stop = edges[:-1], edges[1:]
    taps = [start.astype(np.intp) + tap for tap in range(4)]
    shares = [np.clip(np.minimum(stop, at + 1) - np.maximum(start, at), 0, None) / edges[1] for at in taps]
    return [(np.minimum(at, size - 1), share.astype(np.float32)) for at, share in zip(taps, shares, strict=True)]


def _halve(image: Bytes) -> Bytes:
    """`image` with half the rows and columns, rounded down: each pixel the mean of the area that it covers."""
    rows, columns = _taps(image.shape[0]), _taps(image.shape[1])
    small = np.empty((image.shape[0] // 2, image.shape[1] // 2, 3), np.uint8)
    for top in range(0, small.shape[0], _BAND):
        band = slice(top, top + _BAND)
        wide = np.sum([image[at[band]] * share[band, None, None] for at, share in rows], 0)
        small[band] = np.rint(np.sum([wide[:, at] * share[:, None] for at, share in columns], 0))
    return small


def _tiles(image: Bytes) -> Iterator[Bytes]:
    """Whole tiles, row by row; past the image its last pixels are repeated."""
    for top in range(0, image.shape[0], _TILE):
        for left in range(0, image.shape[1], _TILE):
            tile = image[top : top + _TILE, left : left + _TILE]
            yield np.pad(tile, ((0, _TILE - tile.shape[0]), (0, _TILE - tile.shape[1]), (0, 0)), "edge")


def write_slide(image: Bytes, path: Path, mpp: float, description: str = "") -> None:
    """Write (height, width, 3) uint8 RGB as a tiled, pyramidal JPEG TIFF; a memory map is read a piece at a time.

    Levels halve, rounded down: with odd sides their downsamples are no whole numbers.
    """
    with replacing(path) as unfinished, tifffile.TiffWriter(unfinished, bigtiff=image.size > 2**32) as writer:
        for level in range(32):
            writer.write(
                _tiles(image),
                shape=image.shape,
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 88},
                subfiletype=int(level > 0),
                resolution=(1e4 / mpp / 2**level, 1e4 / mpp / 2**level),
                resolutionunit="CENTIMETER",
                description=None if level else description,
                metadata=None,
                software=False,
            )
            if min(image.shape[:2]) < 2 * _SMALLEST:
                break
            image = _halve(image)


def write_outlines(truth: Bytes, path: Path) -> None:
    """Write what is not glass as QuPath GeoJSON, along pixel edges: rasterised at pixel centres it is `truth` again."""
    features = []
    for shape, value in rasterio.features.shapes(truth, mask=truth != GLASS):
        rings = [[[int(x), int(y)] for x, y in ring] for ring in shape["coordinates"]]
        kind = PHANTOM_CLASSES[int(value)]
        label = {"objectType": "annotation", "classification": {"name": kind.name, "color": list(kind.color)}}
        outline = {"type": "Polygon", "coordinates": rings}
        features.append({"type": "Feature", "geometry": outline, "properties": label})
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")))


def _description(seed: int, width: int, height: int, mpp: float) -> str:
    """What a slide's file says of how it was made."""
    return f"Fullfield phantom {_RECIPE}: seed {seed}, {width} x {height} px, {mpp} um/px"


def make_phantom(path: Path, seed: int, width: int, height: int, mpp: float = 0.5) -> Phantom:
    """Draw a phantom and write the slide `path` (.tiff) and, beside it, its outlines (.geojson)."""
    image, truth = render(seed, width, height, mpp)
    phantom = Phantom(path, path.with_suffix(".geojson"), truth)
    write_outlines(truth, phantom.annotation)
    write_slide(image, path, mpp, _description(seed, width, height, mpp))
    return phantom


def _is_made(path: Path, description: str) -> bool:
    """Whether the slide is there as described, and its outlines too."""
    if not (path.exists() and path.with_suffix(".geojson").exists()):
        return False
    with tifffile.TiffFile(path) as slide:
        return bool(slide.pages.first.description == description)


def make_cohort(folder: Path, seed: int, slides: int = 6, width: int = 3001, height: int = 2402, mpp: float = 0.5) -> Path:
    """Make a cohort and return its manifest, `cohort.csv`; slides that an earlier call made alike are kept.

    The first two of four or more slides are one patient's; the last slide is for test, the one before for validation.
    Raises CohortError for fewer than three slides.
    """
    if slides < 3:
        raise CohortError(str(folder), f"{slides} slides", "3 or more: to train, validate and test", "Ask for 3.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(slides):
        path, own_seed = folder / f"phantom-{index + 1:02d}.tiff", 1000 * seed + index
        if not _is_made(path, _description(own_seed, width, height, mpp)):
            make_phantom(path, own_seed, width, height, mpp)
        patient = max(index, 1) if slides > 3 else index + 1
        split = {slides - 1: "test", slides - 2: "val"}.get(index, "train")
        names = {"slide": path.name, "annotation": path.with_suffix(".geojson").name}
        rows.append({**names, "patient": f"P{patient:02d}", "split": split})
    write_csv(folder / "cohort.csv", list(rows[0]), rows)
    return folder / "cohort.csv"
