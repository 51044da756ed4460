"""Everything that follows from a slide's canvas: its pyramid, regions, measurements, and what people look at.

Two parts, which two workers can do at once, since neither can use more than a processor for most of its time:

    canvas --+--> pyramid --> segmentation.ome.tif (--> entropy.ome.tif) --> overlay.png; tissue.png
             `--> regions.geojson --> measurements.csv

Each file appears when it is complete.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.canvas import Canvas
from pipeline.geojson import write_geojson
from pipeline.measurement import measure, write_measurements
from pipeline.ome_tiff import write_entropy, write_ome_tiff
from pipeline.pictures import outlined, overlay, write_png
from pipeline.pyramid import build_pyramid
from pipeline.regions import find_regions
from pipeline.slide import Slide
from pipeline.tissue import Tissue


def write_pyramid(folder: Path, slide: Slide, canvas: Canvas, tissue: Tissue, ensemble: bool) -> None:
    """Build the canvas's pyramid, and write what follows from it, and pictures; of an `ensemble` its entropy as well."""
    build_pyramid(canvas)
    write_ome_tiff(canvas, folder / "segmentation.ome.tif")
    if ensemble:
        write_entropy(canvas, folder / "entropy.ome.tif")
    write_png(folder / "overlay.png", overlay(slide, canvas))
    write_png(folder / "tissue.png", outlined(slide, tissue))


def write_regions(
    folder: Path, slide: Slide, canvas: Canvas, tissue: Tissue, rest: int | None, min_region_um2: float
) -> None:
    """Write outlines and measurements. Regions below `min_region_um2`, and of the class `rest`, are left out."""
    skip = () if rest is None else (rest,)
    regions = find_regions(canvas, slide.base, min_region_um2, skip)
    counts = write_geojson(folder / "regions.geojson", regions, canvas.classes, (slide.shown.x, slide.shown.y))
    for index in skip:
        del counts[canvas.classes.names[index]]
    write_measurements(folder / "measurements.csv", measure(canvas, tissue), counts)
