"""`fullfield verify --model MODEL [SLIDE]`: proves that tiles, stitched, are what one forward pass gives,
or says how far blended windows are from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import ensemble
from pipeline.exactness import TOLERANCE, Comparison, comparisons
from pipeline.geometry import Mpp
from pipeline.machine import keep_memory
from pipeline.normalised import normalised
from pipeline.phantom import make_phantom
from pipeline.progress import console, new_table, show
from pipeline.registry import resolve_model
from pipeline.runtime import load_engine, settled, with_flips
from pipeline.settings import EngineSettings
from pipeline.slide import fallback_mpp, open_slide, unused_mpp
from pipeline.stitching import Stitching, stitching
from pipeline.tissue import find_tissue


def verify(
    path: Path | None, model: str, mpp: float | None, settings: EngineSettings, blend: bool, flips: bool | None = None
) -> int:
    """Compare and print; the exit code is 1 above 1e-5, as it is where windows are blended."""
    keep_memory()
    folder = resolve_model(model)
    way = stitching(ensemble.load_spec(folder), blend)
    settings = with_flips(settings, folder, flips)
    engine = load_engine(folder, settings)
    spec, looked = engine.spec, ensemble.load_tissue(folder)
    with _given_or_phantom(path) as scan:
        slide, remark = open_slide(scan, fallback_mpp(scan, mpp)), unused_mpp(scan, mpp)
        lattice, tissue = slide.base.at(Mpp.square(spec.mpp)), find_tissue(slide, looked)
        found = list(comparisons(normalised(slide, tissue, spec.normalisation), tissue, lattice, engine, way))
    columns = ("window (x, y, width, height)", "pixels", "largest difference", "mean difference", "labels that differ")
    table = new_table("", *columns)
    for item in found:
        window = f"{item.window.x}, {item.window.y}, {item.window.width}, {item.window.height}"
        figures = f"{item.difference:.2e}", f"{item.mean_difference:.2e}", str(item.label_changes)
        table.add_row(window, str(item.pixels), *figures)
    console.print(
        f"{scan.name}: {lattice.width} x {lattice.height} px at {spec.mpp:g} um/px; {spec.architecture}, "
        f"{way}; precision {settings.precision}, {settled(settings).backend}"
        f"{', mean over flips' if settings.flips else ''}"
    )
    if remark:
        console.print(f"{scan.name} {remark}")
    show(table)
    console.print(_verdict(found, way))
    return 0 if all(item.exact for item in found) else 1


def _verdict(found: Sequence[Comparison], way: Stitching) -> str:
    changes = sum(item.label_changes for item in found)
    if all(item.exact for item in found):
        return f"exact: tiled equals whole{f', except {changes} labels where two classes tie' if changes else ''}"
    if way.exact:
        return f"NOT exact: a probability differs by more than {TOLERANCE:g}"
    share = changes / sum(item.pixels for item in found)
    largest = max(item.difference for item in found)
    return f"NOT exact, as asked: blended, {share:.3%} of labels differ, and a probability by up to {largest:.3f}"


@contextmanager
def _given_or_phantom(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with TemporaryDirectory() as folder:
        phantom = Path(folder) / "phantom.tiff"
        make_phantom(phantom, seed=1, width=3001, height=2003)
        yield phantom
