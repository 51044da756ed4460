"""Everything that follows from a slide's canvas: its pyramid, regions, measurements, and what people look at.

Two chains go side by side, since neither can use more than a processor for most of its time:

    canvas --+--> pyramid --> segmentation.ome.tif (--> entropy.ome.tif) --> overlay.png
             `--> regions.geojson --> measurements.csv; tissue.png
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.canvas import Canvas
from pipeline.export import overlay, write_entropy, write_ome_tiff, write_png
from pipeline.measurement import measure, write_measurements
from pipeline.regions import find_regions, write_geojson
from pipeline.slide import Slide
from pipeline.tissue import Tissue, outlined


@dataclass(frozen=True)
class Finish:
    """What is finished, and where to. Regions of less than `min_region_um2`, and of the class `rest`, are left out.

    What an `ensemble` made has a map of its entropy.
    """

    folder: Path
    slide: Slide
    canvas: Canvas
    tissue: Tissue
    rest: int | None
    min_region_um2: float
    ensemble: bool

    def make(self) -> None:
        """Write all files; each appears when it is complete."""
        with ThreadPoolExecutor(1, "pyramid") as pool:
            pyramid = pool.submit(self._pyramid)
            self._regions()
            pyramid.result()

    def _pyramid(self) -> None:
        self.canvas.build_pyramid()
        write_ome_tiff(self.canvas, self.folder / "segmentation.ome.tif")
        if self.ensemble:
            write_entropy(self.canvas, self.folder / "entropy.ome.tif")
        write_png(self.folder / "overlay.png", overlay(self.slide, self.canvas))

    def _regions(self) -> None:
        skip = () if self.rest is None else (self.rest,)
        regions = find_regions(self.canvas, self.slide.base, self.min_region_um2, skip)
        counts = write_geojson(self.folder / "regions.geojson", regions, self.canvas.classes)
        write_measurements(self.folder / "measurements.csv", measure(self.canvas, self.tissue), counts)
        write_png(self.folder / "tissue.png", outlined(self.slide, self.tissue))
