"""Everything that follows from a slide's canvas: its pyramid, regions, measurements, and what people look at.

Parts that several workers can do at once, since none can use more than a processor for most of its time:

    canvas --+--> pyramid --> segmentation.ome.tif (--> entropy.ome.tif) --> overlay.png
             +--> outlines and counts of a band --+
             `--> of the next, ...              --+--> regions.geojson, measurements.csv
    tissue -----> tissue.png

Each file appears when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.canvas import Canvas
from pipeline.files import write_json
from pipeline.geojson import write_features, write_geojson
from pipeline.measurement import count_pixels, measure, write_measurements
from pipeline.ome_tiff import write_entropy, write_ome_tiff
from pipeline.open_regions import OpenRegions
from pipeline.pictures import outlined, overlay, write_png
from pipeline.pyramid import build_pyramid
from pipeline.regions import Region, band_regions, joined_regions
from pipeline.slide import Slide
from pipeline.tissue import Tissue

_PARTS = "regions-{}.partial"
_LEFT = ("features", "npz", "json")  # of a band


def write_pyramid(folder: Path, slide: Slide, canvas: Canvas, ensemble: bool) -> None:
    """Build the canvas's pyramid, and write what follows from it; of an `ensemble` its entropy as well."""
    build_pyramid(canvas)
    write_ome_tiff(canvas, folder / "segmentation.ome.tif")
    if ensemble:
        write_entropy(canvas, folder / "entropy.ome.tif")
    write_png(folder / "overlay.png", overlay(slide, canvas))


def write_tissue(folder: Path, slide: Slide, tissue: Tissue) -> None:
    """Write a picture of what was taken for tissue."""
    write_png(folder / "tissue.png", outlined(slide, tissue))


def outline_band(
    folder: Path, slide: Slide, canvas: Canvas, tissue: Tissue, rest: int | None, min_region_um2: float, band: int
) -> None:
    """Outline and count what is in a band, a row of tiles, for `write_regions`. Of the class `rest` there are no regions."""
    parts, left = _parts(folder, min_region_um2), None

    def regions() -> Iterator[Region]:
        nonlocal left
        left = yield from band_regions(canvas, band, slide.base, min_region_um2, _skipped(rest))

    counts = write_features(parts / f"{band}.features", regions(), canvas.classes, (slide.shown.x, slide.shown.y))
    assert left is not None
    left.save(parts / f"{band}.npz")
    pixels = count_pixels(canvas, band, tissue)
    write_json(parts / f"{band}.json", {"pixels": pixels.tolist(), "regions": counts})


def missing_bands(folder: Path, canvas: Canvas, min_region_um2: float) -> list[int]:
    """The bands of the canvas that `outline_band` has not left, or not all of what it leaves."""
    parts = _parts(folder, min_region_um2)
    return [band for band in canvas.bands() if not all((parts / f"{band}.{kind}").exists() for kind in _LEFT)]


def write_regions(folder: Path, slide: Slide, canvas: Canvas, rest: int | None, min_region_um2: float) -> None:
    """Put all bands of the canvas together: outlines and measurements. None may be missing."""
    parts, bands = _parts(folder, min_region_um2), canvas.bands()
    left = (OpenRegions.load(parts / f"{band}.npz") for band in bands)
    across = joined_regions(canvas, left, slide.base, min_region_um2)
    counts = [write_features(parts / "across.features", across, canvas.classes, (slide.shown.x, slide.shown.y))]
    write_geojson(folder / "regions.geojson", [parts / f"{name}.features" for name in (*bands, "across")])
    pixels = np.zeros((2, len(canvas.classes)), np.int64)
    for band in bands:
        found = json.loads((parts / f"{band}.json").read_text(encoding="utf-8"))
        pixels += found["pixels"]
        counts.append(found["regions"])
    names = [name for index, name in enumerate(canvas.classes.names) if index != rest]
    regions = {name: sum(found[name] for found in counts) for name in names}
    write_measurements(folder / "measurements.csv", measure(canvas, pixels), regions)


def remove_bands(folder: Path) -> None:
    """Remove what `outline_band` has left for `write_regions`."""
    for parts in folder.glob(_PARTS.format("*")):
        shutil.rmtree(parts)


def _parts(folder: Path, min_region_um2: float) -> Path:
    """The folder of what is kept of the bands; its name keeps apart what two settings make."""
    return folder / _PARTS.format(f"{min_region_um2:g}")


def _skipped(rest: int | None) -> tuple[int, ...]:
    return () if rest is None else (rest,)
