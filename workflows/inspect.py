"""`fullfield inspect SLIDE`: what a slide is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import CanvasError, ScaleError
from pipeline.pictures import outlined, thumbnail, write_png
from pipeline.progress import console, facts_table
from pipeline.settings import TissueSettings
from pipeline.slide import Slide, fallback_mpp, open_slide, unused_mpp
from pipeline.tissue import Tissue, find_tissue

_UM2_PER_MM2 = 1e6


def inspect(path: Path, as_json: bool, picture: Path | None, mpp: float | None) -> None:
    """Print what a slide says of itself and how much tissue it has; write a picture where one is asked for.

    Raises CanvasError where the picture is to have another file's name, such as a slide's.
    """
    if picture is not None and picture.suffix.lower() != ".png":
        raise CanvasError(str(picture), "a picture of that name", "one that ends on .png", "Call it otherwise (--picture).")
    slide, problem = _open(path, mpp)
    tissue = None if problem else find_tissue(slide, TissueSettings())
    facts = {**_facts(slide, tissue, problem), "remark": unused_mpp(path, mpp) or None}
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        console.print(facts_table(_shown(facts)))
    if picture is not None:
        write_png(picture, thumbnail(slide) if tissue is None else outlined(slide, tissue))


def _open(path: Path, mpp: float | None) -> tuple[Slide, ScaleError | None]:
    """The slide; where it does not state its scale, with the error, and as if a pixel were a micrometre wide."""
    try:
        return open_slide(path, fallback_mpp(path, mpp)), None
    except ScaleError as error:
        return open_slide(path, 1.0), error


def _facts(slide: Slide, tissue: Tissue | None, problem: ScaleError | None) -> dict[str, Any]:
    slide_um2 = slide.base.roi.area * slide.base.mpp.area_um2
    tissue_um2 = None if tissue is None else tissue.area_um2(slide.base)
    return {
        "slide": str(slide.path),
        "vendor": slide.vendor,
        "width": slide.base.width,
        "height": slide.base.height,
        "levels": [{"width": level.width, "height": level.height} for level in slide.levels],
        "mpp": None if problem else [slide.base.mpp.x, slide.base.mpp.y],
        "objective": slide.objective,
        "tissue_mm2": None if tissue_um2 is None else tissue_um2 / _UM2_PER_MM2,
        "tissue_share": None if tissue_um2 is None else min(tissue_um2 / slide_um2, 1.0),
        "problem": None if problem is None else str(problem),
        "digest": slide.digest(),
    }


def _shown(facts: dict[str, Any]) -> dict[str, str | None]:
    """The same to be read."""
    levels = ", ".join(f"{level['width']} x {level['height']}" for level in facts["levels"])
    return {
        "slide": facts["slide"],
        "vendor": facts["vendor"],
        "size": f"{facts['width']} x {facts['height']} px",
        "levels": f"{len(facts['levels'])}: {levels}",
        "mpp": "not known" if facts["mpp"] is None else "{:.4f} x {:.4f} um/px".format(*facts["mpp"]),
        "objective": "not stated" if facts["objective"] is None else f"{facts['objective']:g}x",
        "tissue": "-" if facts["tissue_mm2"] is None else f"{facts['tissue_mm2']:.2f} mm2 ({facts['tissue_share']:.0%})",
        "problem": facts["problem"],
        "remark": facts["remark"],
    }
