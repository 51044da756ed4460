"""`fullfield verify --model MODEL [SLIDE]`: proves that tiles, stitched, are what one forward pass gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from pipeline import checkpoint
from pipeline.cluster import keep_memory
from pipeline.config import EngineSettings, TissueSettings
from pipeline.exactness import TOLERANCE, comparisons
from pipeline.geometry import Mpp
from pipeline.normalised import normalised
from pipeline.phantom import make_phantom
from pipeline.progress import console
from pipeline.registry import resolve_model
from pipeline.runtime import load_engine, settled
from pipeline.slide import fallback_mpp, open_slide
from pipeline.tissue import find_tissue


def verify(path: Path | None, model: str, mpp: float | None, settings: EngineSettings) -> int:
    """Compare and print; the exit code is 1 above 1e-5 or where a label differs."""
    keep_memory()
    folder = resolve_model(model)
    engine = load_engine(folder, settings)
    spec, looked = engine.spec, TissueSettings(**checkpoint.load_lineage(folder).get("tissue", {}))
    with _given_or_phantom(path) as scan:
        slide = open_slide(scan, fallback_mpp(scan, mpp))
        lattice, tissue = slide.base.at(Mpp.square(spec.mpp)), find_tissue(slide, looked)
        found = list(comparisons(normalised(slide, tissue, spec.normalisation), tissue, lattice, engine))
    table = Table("window (x, y, width, height)", "pixels", "largest difference", "labels that differ")
    for item in found:
        window = f"{item.window.x}, {item.window.y}, {item.window.width}, {item.window.height}"
        table.add_row(window, f"{item.pixels}", f"{item.difference:.2e}", f"{item.flips}")
    console.print(
        f"{scan.name}: {lattice.width} x {lattice.height} px at {spec.mpp:g} um/px; {spec.architecture}, "
        f"halo {spec.halo} px, stride {spec.stride} px; {settings.precision}, {settled(settings, spec.architecture).backend}"
    )
    console.print(table)
    exact = all(item.exact for item in found)
    verdict = "exact: tiled equals whole" if exact else f"NOT exact: a difference above {TOLERANCE:g}, or a label, differs"
    console.print(verdict)
    return 0 if exact else 1


@contextmanager
def _given_or_phantom(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with TemporaryDirectory() as folder:
        phantom = Path(folder) / "phantom.tiff"
        make_phantom(phantom, seed=1, width=3001, height=2003)
        yield phantom
